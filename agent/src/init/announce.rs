//! Listening on vsock, and telling the host so.

use std::{
    io::Write,
    os::fd::{AsRawFd, OwnedFd},
};

use nix::sys::socket::{self, AddressFamily, Backlog, SockFlag, SockType, VsockAddr};
use rvm_protocol::guest;

use super::Error;

/// The agent's listening sockets.
#[derive(Debug)]
pub struct Listeners {
    /// Requests, [`guest::AGENT_PORT`].
    pub agent: OwnedFd,
    /// Standard streams, [`guest::STDIO_PORT`].
    pub stdio: OwnedFd,
    /// Connections to loopback addresses, [`guest::RELAY_PORT`].
    pub relay: OwnedFd,
}

/// Connections that may wait to be accepted. A pod's containers attach three
/// streams each, all at once when it starts.
const BACKLOG: i32 = 128;

/// Listens on the agent's ports.
pub fn listen() -> Result<Listeners, Error> {
    Ok(Listeners {
        agent: listen_on(guest::AGENT_PORT)
            .map_err(|source| Error::Kernel { step: "listen for requests", source })?,
        stdio: listen_on(guest::STDIO_PORT)
            .map_err(|source| Error::Kernel { step: "listen for streams", source })?,
        relay: listen_on(guest::RELAY_PORT)
            .map_err(|source| Error::Kernel { step: "listen for connections to relay", source })?,
    })
}

fn listen_on(port: u32) -> nix::Result<OwnedFd> {
    let socket = stream_socket(SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK)?;
    socket::bind(socket.as_raw_fd(), &VsockAddr::new(libc::VMADDR_CID_ANY, port))?;
    socket::listen(&socket, Backlog::new(BACKLOG)?)?;
    Ok(socket)
}

/// Tells the host that the agent listens.
pub fn announce() -> Result<(), Error> {
    let host = VsockAddr::new(guest::HOST_CID, guest::READY_PORT);
    let connected = stream_socket(SockFlag::SOCK_CLOEXEC)
        .and_then(|socket| socket::connect(socket.as_raw_fd(), &host).map(|()| socket));
    let socket = connected.map_err(|source| Error::Kernel { step: "reach the host over vsock", source })?;
    let mut stream = std::fs::File::from(socket);
    stream
        .write_all(guest::ready_line().as_bytes())
        .map_err(|source| Error::Io { step: "announce the agent to the host", source })
}

fn stream_socket(flags: SockFlag) -> nix::Result<OwnedFd> {
    socket::socket(AddressFamily::Vsock, SockType::Stream, flags, None)
}
