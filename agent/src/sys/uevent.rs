//! What the kernel tells of its devices as they come and go (netlink(7),
//! `NETLINK_KOBJECT_UEVENT`).

use std::{
    io,
    os::fd::{AsRawFd, OwnedFd},
};

use nix::{
    errno::Errno,
    sys::socket::{
        AddressFamily, MsgFlags, NetlinkAddr, SockFlag, SockProtocol, SockType, bind, recv, socket,
    },
};
use tokio::io::{Interest, unix::AsyncFd};

use super::register;

/// The kernel's own messages; others pass on what udev made of them.
const KERNEL_GROUP: u32 = 1;

/// The kernel's messages from the moment it was opened.
#[derive(Debug)]
pub struct Uevents(AsyncFd<OwnedFd>);

impl Uevents {
    /// Listens from now on. The event loop must be running.
    pub fn open() -> io::Result<Self> {
        let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
        let protocol = SockProtocol::NetlinkKObjectUEvent;
        let socket = socket(AddressFamily::Netlink, SockType::Datagram, flags, protocol)?;
        bind(socket.as_raw_fd(), &NetlinkAddr::new(0, KERNEL_GROUP))?;
        Ok(Self(register(socket, Interest::READABLE)?))
    }

    /// Waits until there has been something since the last call. What it was is
    /// better looked up: the kernel drops messages when there are too many.
    pub async fn any(&self) -> io::Result<()> {
        let mut ready = self.0.readable().await?;
        let mut message = [0; 64];
        loop {
            match recv(self.0.get_ref().as_raw_fd(), &mut message, MsgFlags::empty()) {
                Ok(_) | Err(Errno::EINTR | Errno::ENOBUFS) => {}
                Err(Errno::EAGAIN) => break,
                Err(errno) => return Err(errno.into()),
            }
        }
        ready.clear_ready();
        Ok(())
    }
}
