//! A program at a network namespace's socket lookup (`BPF_PROG_TYPE_SK_LOOKUP`,
//! since Linux 5.9) that gives connections to the loopback addresses to one socket,
//! whatever their port.

use std::{
    io,
    net::TcpListener,
    os::fd::{BorrowedFd, OwnedFd},
};

use rvm_protocol::bpf::{self, Instruction, raw};

// linux/bpf.h
const BPF_MAP_CREATE: libc::c_long = 0;
const BPF_MAP_UPDATE_ELEM: libc::c_long = 2;
const BPF_LINK_CREATE: libc::c_long = 28;
const BPF_MAP_TYPE_SOCKMAP: u32 = 15;
const BPF_PROG_TYPE_SK_LOOKUP: u32 = 30;
const BPF_SK_LOOKUP: u32 = 36;
const MAP_LOOKUP_ELEM: i32 = 1;
const SK_RELEASE: i32 = 86;
const SK_ASSIGN: i32 = 124;
const SK_PASS: i32 = 1;

// Fields of struct bpf_sk_lookup.
const FAMILY: i16 = 8;
const PROTOCOL: i16 = 12;
const LOCAL_IP4: i16 = 40;
const LOCAL_IP6: i16 = 44;

/// `union bpf_attr` for `BPF_MAP_CREATE`, up to where it is used.
#[repr(C)]
struct MapCreate {
    map_type: u32,
    key_size: u32,
    value_size: u32,
    max_entries: u32,
}

/// `union bpf_attr` for `BPF_MAP_UPDATE_ELEM`.
#[repr(C)]
struct MapUpdate {
    map_fd: u32,
    unused: u32,
    key: u64,
    value: u64,
    flags: u64,
}

/// `union bpf_attr` for `BPF_LINK_CREATE`.
#[repr(C)]
struct LinkCreate {
    prog_fd: u32,
    target_fd: u32,
    attach_type: u32,
    flags: u32,
}

fn program(map: u32) -> Vec<Instruction> {
    const PASS: i16 = i16::MAX;
    let op = |code, registers, offset, immediate| Instruction { code, registers, offset, immediate };
    // r2 = the context's u32 at a field; unless it is a value, on to the end.
    let load = |field| op(0x61, 0x62, field, 0);
    let unless = |value| op(0x55, 0x02, PASS, value);
    let loopback = i32::from_ne_bytes([127, 0, 0, 1]);
    let mut program = vec![
        op(0xbf, 0x16, 0, 0), // r6 = r1, the context
        load(PROTOCOL),
        unless(libc::IPPROTO_TCP),
        load(FAMILY),
        op(0xb7, 0x07, 0, 0),              // r7 = 0, the first socket
        op(0x15, 0x02, 10, libc::AF_INET), // IPv4: to its address below
        unless(libc::AF_INET6),
        load(LOCAL_IP6),
        unless(0),
        load(LOCAL_IP6 + 4),
        unless(0),
        load(LOCAL_IP6 + 8),
        unless(0),
        load(LOCAL_IP6 + 12),
        op(0xb7, 0x07, 0, 1), // r7 = 1, the second
        op(0x05, 0x00, 1, 0), // over the load below
        load(LOCAL_IP4),
    ];
    // What is in r2 is the end of an address, of either family.
    let last = |key| if key == 0 { loopback } else { i32::from_ne_bytes([0, 0, 0, 1]) };
    program.extend([
        op(0x55, 0x07, 2, 0), // the second socket: to its test
        unless(last(0)),
        op(0x05, 0x00, 1, 0),
        unless(last(1)),
        op(0x63, 0x7a, -4, 0),                // the key on the stack = r7
        op(0x18, 0x11, 0, map.cast_signed()), // r1 = the map
        op(0x00, 0x00, 0, 0),
        op(0xbf, 0xa2, 0, 0), // r2 = the key's address
        op(0x07, 0x02, 0, -4),
        op(0x85, 0x00, 0, MAP_LOOKUP_ELEM),
        op(0x15, 0x00, PASS, 0), // there is none
        op(0xbf, 0x07, 0, 0),    // r7 = r0, the socket
        op(0xbf, 0x61, 0, 0),    // r1 = the context
        op(0xbf, 0x72, 0, 0),    // r2 = the socket
        op(0xb7, 0x03, 0, 0),    // r3 = no flags
        op(0x85, 0x00, 0, SK_ASSIGN),
        op(0xbf, 0x71, 0, 0), // r1 = the socket
        op(0x85, 0x00, 0, SK_RELEASE),
    ]);
    let end = program.len();
    bpf::lead(&mut program, PASS, end);
    program.extend([op(0xb7, 0x00, 0, SK_PASS), op(0x95, 0x00, 0, 0)]);
    program
}

/// Gives connections to 127.0.0.1 to the first socket and those to ::1 to the
/// second, for as long as what is returned is open.
pub fn to(listeners: &[Option<TcpListener>; 2], namespace: BorrowedFd<'_>) -> io::Result<OwnedFd> {
    let create = MapCreate { map_type: BPF_MAP_TYPE_SOCKMAP, key_size: 4, value_size: 4, max_entries: 2 };
    // SAFETY: there is no pointer in `create`; a map is a descriptor.
    let map = unsafe { bpf::make(BPF_MAP_CREATE, &create) }?;
    for (key, listener) in listeners.iter().enumerate() {
        let Some(listener) = listener else { continue };
        let (key, value) = (key as u32, raw(listener));
        let update = MapUpdate {
            map_fd: raw(&map),
            unused: 0,
            key: &raw const key as u64,
            value: &raw const value as u64,
            flags: 0,
        };
        // SAFETY: `key` and `value` are as long as the map's and outlive the call.
        unsafe { bpf::call(BPF_MAP_UPDATE_ELEM, &update) }?;
    }
    let program = program(raw(&map));
    let program = bpf::load(BPF_PROG_TYPE_SK_LOOKUP, BPF_SK_LOOKUP, "rvm_loopback", &program)?;
    let link = LinkCreate {
        prog_fd: raw(&program),
        target_fd: raw(&namespace),
        attach_type: BPF_SK_LOOKUP,
        flags: 0,
    };
    // SAFETY: there is no pointer in `link`; a link is a descriptor.
    unsafe { bpf::make(BPF_LINK_CREATE, &link) }
}
