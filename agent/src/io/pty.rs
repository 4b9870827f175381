//! The master side of a terminal.

use std::{
    io,
    os::fd::{AsRawFd, OwnedFd},
    pin::Pin,
    sync::Arc,
    task::{Context, Poll, ready},
};

use nix::errno::Errno;
use tokio::io::{AsyncRead, AsyncWrite, Interest, ReadBuf, unix::AsyncFd};

use crate::{
    error::{Step, StepResult},
    sys::register,
};

/// Columns and rows of a terminal.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Size {
    /// Columns.
    pub width: u16,
    /// Rows.
    pub height: u16,
}

/// Sets the size of the terminal a descriptor of either side belongs to.
pub fn resize(terminal: &impl AsRawFd, size: Size) -> nix::Result<()> {
    let size = libc::winsize { ws_row: size.height, ws_col: size.width, ws_xpixel: 0, ws_ypixel: 0 };
    // SAFETY: TIOCSWINSZ reads a winsize, which `size` is.
    Errno::result(unsafe { libc::ioctl(terminal.as_raw_fd(), libc::TIOCSWINSZ, &raw const size) }).map(drop)
}

/// The master side of a process's terminal; clones share it.
#[derive(Clone, Debug)]
pub struct Pty(Arc<AsyncFd<OwnedFd>>);

impl Pty {
    /// Takes over a non-blocking master.
    pub fn new(master: OwnedFd) -> StepResult<Self> {
        let master = register(master, Interest::READABLE | Interest::WRITABLE);
        Ok(Self(Arc::new(master.step(|| "watch the terminal")?)))
    }

    /// Sets the terminal's size; its foreground processes get SIGWINCH.
    pub fn resize(&self, size: Size) -> StepResult<()> {
        resize(self.0.get_ref(), size).step(|| "resize the terminal")
    }
}

impl AsyncRead for Pty {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        loop {
            let mut ready = ready!(self.0.poll_read_ready(cx))?;
            let space = buf.initialize_unfilled();
            match ready.try_io(|master| Ok(nix::unistd::read(master, space)?)) {
                Ok(Ok(length)) => {
                    buf.advance(length);
                    return Poll::Ready(Ok(()));
                }
                // Nobody has the terminal open any more, and all was read: its
                // end of file.
                Ok(Err(error)) if error.raw_os_error() == Some(libc::EIO) => return Poll::Ready(Ok(())),
                Ok(Err(error)) if error.kind() == io::ErrorKind::Interrupted => {}
                Ok(Err(error)) => return Poll::Ready(Err(error)),
                Err(_would_block) => {}
            }
        }
    }
}

impl AsyncWrite for Pty {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        loop {
            let mut ready = ready!(self.0.poll_write_ready(cx))?;
            match ready.try_io(|master| Ok(nix::unistd::write(master, buf)?)) {
                Ok(Err(error)) if error.kind() == io::ErrorKind::Interrupted => {}
                Ok(written) => return Poll::Ready(written),
                Err(_would_block) => {}
            }
        }
    }

    fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }
}
