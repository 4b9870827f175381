//! A monitor without a shim, started as the shim starts it, with a guest of the tests'
//! own in it: one that attacks ([`hostile`]), and one with a network ([`networked`]).

use std::{
    io::IoSlice,
    os::{
        fd::{AsRawFd, OwnedFd, RawFd},
        unix::{net::UnixDatagram, process::CommandExt},
    },
    process::Command,
    time::Duration,
};

use anyhow::{Context, Result, ensure};
use nix::sys::socket::{AddressFamily, ControlMessage, MsgFlags, SockFlag, SockType, sendmsg, socketpair};
use rvm_protocol::vmm::{Call, MAX_MESSAGE_LEN, Reply, Request, Response};

pub mod hostile;
pub mod networked;

/// The owner's end of a monitor's control channel.
struct Control {
    socket: UnixDatagram,
    calls: u64,
}

impl Control {
    /// A channel, and its other end for the monitor.
    fn pair() -> Result<(Self, OwnedFd)> {
        let (ours, monitors) =
            socketpair(AddressFamily::Unix, SockType::SeqPacket, None, SockFlag::SOCK_CLOEXEC)?;
        Ok((Self { socket: UnixDatagram::from(ours), calls: 0 }, monitors))
    }

    /// Asks something, with descriptors attached, and waits for the answer.
    fn ask(&mut self, request: Request, fds: &[OwnedFd], limit: Duration) -> Result<Response> {
        self.calls += 1;
        let name = format!("{request:?}");
        let text = serde_json::to_vec(&Call { id: self.calls, request })?;
        let fds: Vec<RawFd> = fds.iter().map(AsRawFd::as_raw_fd).collect();
        let attached = [ControlMessage::ScmRights(&fds)];
        let attached = if fds.is_empty() { &[][..] } else { &attached };
        sendmsg::<()>(self.socket.as_raw_fd(), &[IoSlice::new(&text)], attached, MsgFlags::empty(), None)?;
        let mut answer = vec![0; MAX_MESSAGE_LEN];
        self.socket.set_read_timeout(Some(limit))?;
        let count = self.socket.recv(&mut answer).with_context(|| format!("no answer to {name}"))?;
        ensure!(count > 0, "the monitor ended instead of an answer to {name}");
        let reply: Reply = serde_json::from_slice(&answer[..count])?;
        ensure!(reply.id == self.calls, "{name}: an answer to another request");
        Ok(reply.response)
    }
}

/// Has a command inherit descriptors under their numbers here.
fn inherits(command: &mut Command, fds: Vec<RawFd>) {
    // SAFETY: the closure makes system calls only.
    unsafe { command.pre_exec(move || fds.iter().try_for_each(|fd| inherit(*fd))) };
}

fn inherit(fd: RawFd) -> std::io::Result<()> {
    // SAFETY: plain system call; 0 clears FD_CLOEXEC.
    match unsafe { libc::fcntl(fd, libc::F_SETFD, 0) } {
        0 => Ok(()),
        _ => Err(std::io::Error::last_os_error()),
    }
}
