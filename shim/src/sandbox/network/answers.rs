//! Answers to what the namespace's own network stack has asked for: Docker's name
//! server asks others, port 53 beyond the container's interface, from within the
//! container's namespace. All that arrives there is the guest's, so a program at the
//! interface lets these answers through and leaves the rest to the redirection.

use std::{io, os::fd::OwnedFd};

use rvm_protocol::bpf::{self, Instruction};

// linux/bpf.h
const BPF_PROG_TYPE_SCHED_CLS: u32 = 3;
const SKB_LOAD_BYTES: i32 = 26;
const CLONE_REDIRECT: i32 = 13;
const SK_LOOKUP_TCP: i32 = 84;
const SK_LOOKUP_UDP: i32 = 85;
const SK_RELEASE: i32 = 86;
const BPF_F_CURRENT_NETNS: i32 = -1;
/// Of `struct __sk_buff`.
const PROTOCOL: i16 = 16;
// linux/pkt_cls.h
const TC_ACT_UNSPEC: i32 = -1;
const TC_ACT_OK: i32 = 0;

const ETH_P_IP: u16 = 0x0800;
const ETH_P_ARP: u16 = 0x0806;
/// Length of an Ethernet header.
const ETHERNET: i32 = 14;
/// Of an IPv4 header without options, and of the ports behind it.
const HEADERS: i16 = 24;
/// Where the operation is in an ARP message.
const ARP_OPERATION: i32 = 6;
const ARP_REPLY: u16 = 2;
const PORT: u16 = 53;

/// Loads a program for what arrives on an interface: answers by ARP go to the interface
/// `guest` as well as to the namespace, those from port 53 to a socket of the namespace to
/// that, and the program has no say about anything else.
pub fn load(guest: u32) -> io::Result<OwnedFd> {
    bpf::load(BPF_PROG_TYPE_SCHED_CLS, 0, "rvm_resolver", &program(guest))
}

fn program(guest: u32) -> Vec<Instruction> {
    // Places that jumps lead to, until these are known.
    const ARP: i16 = i16::MAX;
    const NONE: i16 = i16::MAX - 1;
    let op = |code, registers, offset, immediate| Instruction { code, registers, offset, immediate };
    // Numbers in packets, as loads see them.
    let number = |value: u16| i32::from(value.to_be());
    // `count` bytes of the packet from `from` on, to the stack below its top.
    let read = |from, count: i16| {
        [
            op(0xbf, 0x61, 0, 0), // r1 = r6
            op(0xb7, 0x02, 0, from),
            op(0xbf, 0xa3, 0, 0), // r3 = the stack
            op(0x07, 0x03, 0, i32::from(-HEADERS)),
            op(0xb7, 0x04, 0, i32::from(count)),
            op(0x85, 0x00, 0, SKB_LOAD_BYTES),
            op(0x55, 0x00, NONE, 0), // it is not that long
        ]
    };
    // r1 = a byte or two of that; unless it is `value`.
    let byte = |at: i16| op(0x71, 0xa1, at - HEADERS, 0);
    let two_bytes = |at: i16| op(0x69, 0xa1, at - HEADERS, 0);
    let unless = |value| op(0x55, 0x01, NONE, value);

    let mut program = vec![
        op(0xbf, 0x16, 0, 0),        // r6 = r1, the packet
        op(0x61, 0x61, PROTOCOL, 0), // r1 = its protocol
        op(0x15, 0x01, ARP, number(ETH_P_ARP)),
        unless(number(ETH_P_IP)),
    ];
    program.extend(read(ETHERNET, HEADERS));
    program.extend([
        byte(0), // version and length
        unless(0x45),
        two_bytes(6),                      // fragments
        op(0x57, 0x01, 0, number(0x3fff)), // r1 &= offset and whether more follow
        unless(0),
        two_bytes(20), // the port it comes from
        unless(number(PORT)),
        byte(9), // r1 = the protocol, r7 = r1
        op(0xbf, 0x17, 0, 0),
        op(0xbf, 0x61, 0, 0), // r1 = r6
        op(0xbf, 0xa2, 0, 0), // r2 = both addresses and ports: struct bpf_sock_tuple
        op(0x07, 0x02, 0, -12),
        op(0xb7, 0x03, 0, 12),
        op(0xb7, 0x04, 0, BPF_F_CURRENT_NETNS),
        op(0xb7, 0x05, 0, 0),
        op(0x15, 0x07, 3, libc::IPPROTO_UDP),
        op(0x55, 0x07, NONE, libc::IPPROTO_TCP),
        op(0x85, 0x00, 0, SK_LOOKUP_TCP),
        op(0x05, 0x00, 1, 0),
        op(0x85, 0x00, 0, SK_LOOKUP_UDP),
        op(0x15, 0x00, NONE, 0), // the namespace has none
        op(0xbf, 0x01, 0, 0),    // r1 = r0
        op(0x85, 0x00, 0, SK_RELEASE),
        op(0xb7, 0x00, 0, TC_ACT_OK),
        op(0x95, 0x00, 0, 0),
    ]);
    let arp = program.len();
    program.extend(read(ETHERNET + ARP_OPERATION, 2));
    program.extend([
        two_bytes(0),
        unless(number(ARP_REPLY)),
        op(0xbf, 0x61, 0, 0), // r1 = r6
        op(0xb7, 0x02, 0, guest.cast_signed()),
        op(0xb7, 0x03, 0, 0),
        op(0x85, 0x00, 0, CLONE_REDIRECT),
        op(0xb7, 0x00, 0, TC_ACT_OK),
        op(0x95, 0x00, 0, 0),
    ]);
    let none = program.len();
    bpf::lead(&mut program, ARP, arp);
    bpf::lead(&mut program, NONE, none);
    program.extend([op(0xb7, 0x00, 0, TC_ACT_UNSPEC), op(0x95, 0x00, 0, 0)]);
    program
}
