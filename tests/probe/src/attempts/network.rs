//! Sockets.

use libc::{
    AF_ALG, AF_BLUETOOTH, AF_INET, AF_INET6, AF_NETLINK, AF_PACKET, AF_UNIX, AF_VSOCK, SOCK_DGRAM, SOCK_RAW,
    SOCK_SEQPACKET, SOCK_STREAM, SYS_bind, SYS_connect, SYS_ioctl, SYS_setsockopt, SYS_socket,
};
use nix::errno::Errno;

use super::Attempt;
use crate::calls::{Outcome, address, call};

pub const ATTEMPTS: &[Attempt] = &[
    ("bind_tcp_80", || bind(SOCK_STREAM, 80)),
    ("bind_udp_53", || bind(SOCK_DGRAM, 53)),
    ("bind_tcp_8080", || bind(SOCK_STREAM, 8080)),
    ("connect_closed_port", || {
        let socket = socket(AF_INET, SOCK_STREAM, 0)?;
        call(SYS_connect, [socket, address(&loopback(9)), 16])
    }),
    ("socket_tcp6", || call(SYS_socket, [AF_INET6 as usize, SOCK_STREAM as usize, 0])),
    ("socket_raw", || call(SYS_socket, [AF_INET as usize, SOCK_RAW as usize, libc::IPPROTO_ICMP as usize])),
    ("socket_ping", || {
        call(SYS_socket, [AF_INET as usize, SOCK_DGRAM as usize, libc::IPPROTO_ICMP as usize])
    }),
    ("socket_packet", || call(SYS_socket, [AF_PACKET as usize, SOCK_RAW as usize, 0])),
    ("socket_netlink", || call(SYS_socket, [AF_NETLINK as usize, SOCK_RAW as usize, 0])),
    ("socket_audit", || {
        call(SYS_socket, [AF_NETLINK as usize, SOCK_RAW as usize, libc::NETLINK_AUDIT as usize])
    }),
    ("socket_unix", || call(SYS_socket, [AF_UNIX as usize, SOCK_STREAM as usize, 0])),
    ("socket_alg", || call(SYS_socket, [AF_ALG as usize, SOCK_SEQPACKET as usize, 0])),
    ("socket_vsock", || call(SYS_socket, [AF_VSOCK as usize, SOCK_STREAM as usize, 0])),
    ("socket_bluetooth", || call(SYS_socket, [AF_BLUETOOTH as usize, SOCK_RAW as usize, 0])),
    ("socket_mark", || {
        let socket = socket(AF_INET, SOCK_DGRAM, 0)?;
        let mark = 1u32;
        call(SYS_setsockopt, [socket, libc::SOL_SOCKET as usize, libc::SO_MARK as usize, address(&mark), 4])
    }),
    ("interface_up", || {
        let socket = socket(AF_INET, SOCK_DGRAM, 0)?;
        // struct ifreq: the name, then the flags; lo is up already.
        let mut request = [0u8; 40];
        request[..2].copy_from_slice(b"lo");
        let flags = (libc::IFF_UP | libc::IFF_LOOPBACK | libc::IFF_RUNNING) as u16;
        request[16..18].copy_from_slice(&flags.to_ne_bytes());
        call(SYS_ioctl, [socket, libc::SIOCSIFFLAGS as usize, address(&request)])
    }),
];

fn socket(family: i32, kind: i32, protocol: i32) -> Result<usize, Errno> {
    call(SYS_socket, [family as usize, kind as usize, protocol as usize]).map(|fd| fd as usize)
}

/// `struct sockaddr_in` of a port of 127.0.0.1.
fn loopback(port: u16) -> [u8; 16] {
    let mut address = [0; 16];
    address[..2].copy_from_slice(&(AF_INET as u16).to_ne_bytes());
    address[2..4].copy_from_slice(&port.to_be_bytes());
    address[4..8].copy_from_slice(&[127, 0, 0, 1]);
    address
}

fn bind(kind: i32, port: u16) -> Outcome {
    let socket = socket(AF_INET, kind, 0)?;
    call(SYS_bind, [socket, address(&loopback(port)), 16])
}
