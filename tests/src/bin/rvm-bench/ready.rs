//! Where a guest announces itself: a Unix socket behind rvm's monitor, an
//! `AF_VSOCK` socket of the host behind QEMU's vhost-vsock.

use std::{
    io::{BufRead, BufReader, Read},
    os::{
        fd::{AsFd, AsRawFd, FromRawFd, OwnedFd},
        unix::net::{UnixListener, UnixStream},
    },
    time::Duration,
};

use anyhow::{Context, Result, ensure};
use nix::{
    errno::Errno,
    poll::{PollFd, PollFlags, PollTimeout, poll},
};
use rvm_protocol::guest::{MAX_LINE_LEN, READY_PORT, ready_line};

/// A listener for one kind of announcement.
pub enum Listener {
    /// `<socket>_1025` of rvm's monitor.
    Unix(UnixListener),
    /// Port 1025 of the host.
    Vsock(OwnedFd),
}

impl Listener {
    /// Listens on the host's vsock port.
    pub fn vsock() -> Result<Self> {
        // SAFETY: plain system call; the result is checked.
        let fd = unsafe { libc::socket(libc::AF_VSOCK, libc::SOCK_STREAM | libc::SOCK_CLOEXEC, 0) };
        Errno::result(fd).context("AF_VSOCK (module vhost_vsock?)")?;
        // SAFETY: the descriptor is new and nobody else's.
        let fd = unsafe { OwnedFd::from_raw_fd(fd) };
        let address = libc::sockaddr_vm {
            svm_family: libc::AF_VSOCK as libc::sa_family_t,
            svm_reserved1: 0,
            svm_port: READY_PORT,
            svm_cid: libc::VMADDR_CID_ANY,
            svm_zero: [0; 4],
        };
        let size = size_of::<libc::sockaddr_vm>() as libc::socklen_t;
        // SAFETY: `address` is a sockaddr_vm of the size given.
        Errno::result(unsafe { libc::bind(fd.as_raw_fd(), (&raw const address).cast(), size) })
            .context("bind vsock")?;
        // SAFETY: plain system call on a socket we own.
        Errno::result(unsafe { libc::listen(fd.as_raw_fd(), 1) }).context("listen vsock")?;
        Ok(Self::Vsock(fd))
    }

    /// Waits for the agent's line. `limit` ends a run that will not get there.
    pub fn wait(&self, limit: Duration) -> Result<()> {
        let fd = match self {
            Self::Unix(listener) => listener.as_fd(),
            Self::Vsock(fd) => fd.as_fd(),
        };
        let timeout = PollTimeout::try_from(limit).unwrap_or(PollTimeout::MAX);
        let count = poll(&mut [PollFd::new(fd, PollFlags::POLLIN)], timeout)?;
        ensure!(count == 1, "no announcement within {limit:?}");
        let stream = match self {
            Self::Unix(listener) => OwnedFd::from(listener.accept()?.0),
            Self::Vsock(fd) => {
                // SAFETY: no address is asked for; the result is checked.
                let connection = unsafe {
                    libc::accept4(
                        fd.as_raw_fd(),
                        std::ptr::null_mut(),
                        std::ptr::null_mut(),
                        libc::SOCK_CLOEXEC,
                    )
                };
                Errno::result(connection).context("accept vsock")?;
                // SAFETY: the descriptor is new and nobody else's.
                unsafe { OwnedFd::from_raw_fd(connection) }
            }
        };
        // read(2) is all that is used of it, whatever its family.
        let stream = UnixStream::from(stream);
        let mut line = String::new();
        BufReader::new(stream.take(MAX_LINE_LEN as u64)).read_line(&mut line)?;
        ensure!(line == ready_line(), "announced itself as {line:?}");
        Ok(())
    }
}
