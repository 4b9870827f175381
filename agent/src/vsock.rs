//! Connections from the host, and from nowhere else.

use std::{
    io,
    os::fd::OwnedFd,
    pin::Pin,
    task::{Context, Poll, ready},
    time::Duration,
};

use futures_core::Stream;
use rvm_protocol::guest::HOST_CID;
use tokio::time::Sleep;
use tokio_vsock::{VsockListener, VsockStream};

/// A listener that accepts the host only. vsock knows no network namespaces: a
/// container in this guest can try to connect as well, and whoever reaches the
/// agent commands the guest.
#[derive(Debug)]
pub struct HostListener {
    listener: VsockListener,
    /// Until when nothing is accepted.
    pause: Option<Pin<Box<Sleep>>>,
}

/// How long to wait after there was no descriptor or no memory for a connection:
/// it stays where it is, and others may be given up meanwhile.
const PAUSE: Duration = Duration::from_millis(100);

/// Whether it is for want of something that may be there again soon, or because
/// of the one connection.
fn passes(error: &io::Error) -> bool {
    let errno = error.raw_os_error();
    [libc::EMFILE, libc::ENFILE, libc::ENOMEM, libc::ENOBUFS, libc::ECONNABORTED, libc::EINTR]
        .into_iter()
        .any(|passing| errno == Some(passing))
}

impl HostListener {
    /// The next connection of the host.
    pub fn poll_accept(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<VsockStream>> {
        loop {
            if let Some(pause) = &mut self.pause {
                ready!(pause.as_mut().poll(cx));
                self.pause = None;
            }
            match ready!(self.listener.poll_accept(cx)) {
                Ok((stream, peer)) if peer.cid() == HOST_CID => return Poll::Ready(Ok(stream)),
                Ok((_, peer)) => log::warn!("refused a connection from {peer:?}"),
                Err(error) if passes(&error) => {
                    log::error!("accept a connection: {error}");
                    self.pause = Some(Box::pin(tokio::time::sleep(PAUSE)));
                }
                Err(error) => return Poll::Ready(Err(error)),
            }
        }
    }
}

impl From<OwnedFd> for HostListener {
    fn from(listener: OwnedFd) -> Self {
        Self { listener: VsockListener::from(listener), pause: None }
    }
}

impl Stream for HostListener {
    type Item = io::Result<VsockStream>;

    fn poll_next(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        self.poll_accept(cx).map(Some)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn want_of_descriptors_passes_and_a_broken_listener_does_not() {
        assert!(passes(&io::Error::from_raw_os_error(libc::EMFILE)));
        assert!(passes(&io::Error::from_raw_os_error(libc::ENFILE)));
        assert!(!passes(&io::Error::from_raw_os_error(libc::EBADF)));
    }
}
