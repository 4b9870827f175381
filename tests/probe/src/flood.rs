//! Connections to the host over vsock without an end, from a container that may make such sockets.

use std::{
    io::{Error, Result},
    os::fd::{AsRawFd, FromRawFd, OwnedFd},
};

use crate::out::Out;

/// The host's address.
const HOST: u32 = 2;
/// What the host listens on, and what nobody does.
const PORTS: std::ops::Range<u32> = 1024..1034;
/// Sockets at a time.
const MOST: usize = 800;
/// Connections until that is told.
const TOLD: u64 = 1000;

/// Makes connections and says something on each; the oldest is closed for a new one.
pub fn run() -> Result<()> {
    let mut sockets = std::collections::VecDeque::new();
    let mut count = 0;
    for port in PORTS.cycle() {
        if sockets.len() == MOST {
            sockets.pop_front();
        }
        sockets.push_back(connect(port)?);
        count += 1;
        if count % TOLD == 0 {
            Out::line(&format!("round {}", count / TOLD));
        }
    }
    Ok(())
}

/// Begins a connection, and sends on it what the host may or may not take.
fn connect(port: u32) -> Result<OwnedFd> {
    const NOISE: [u8; 64] = [b'x'; 64];
    // SAFETY: makes a descriptor that is nobody's yet.
    let socket = unsafe { libc::socket(libc::AF_VSOCK, libc::SOCK_STREAM | libc::SOCK_NONBLOCK, 0) };
    if socket < 0 {
        return Err(Error::last_os_error());
    }
    // SAFETY: just made.
    let socket = unsafe { OwnedFd::from_raw_fd(socket) };
    let address = libc::sockaddr_vm {
        svm_family: libc::AF_VSOCK as libc::sa_family_t,
        svm_reserved1: 0,
        svm_port: port,
        svm_cid: HOST,
        svm_zero: [0; 4],
    };
    let len = size_of_val(&address) as libc::socklen_t;
    // That it cannot be made, or not yet, is no matter.
    // SAFETY: an address and its length.
    unsafe { libc::connect(socket.as_raw_fd(), (&raw const address).cast(), len) };
    // SAFETY: bytes and their length.
    unsafe { libc::send(socket.as_raw_fd(), NOISE.as_ptr().cast(), NOISE.len(), libc::MSG_NOSIGNAL) };
    Ok(socket)
}
