//! Connections from the host, and from nowhere else.

use std::{
    io,
    os::fd::OwnedFd,
    pin::Pin,
    task::{Context, Poll, ready},
};

use futures_core::Stream;
use rvm_protocol::guest::HOST_CID;
use tokio_vsock::{VsockListener, VsockStream};

/// A listener that accepts the host only. vsock knows no network namespaces: a
/// container in this guest can try to connect as well, and whoever reaches the
/// agent commands the guest.
#[derive(Debug)]
pub struct HostListener(VsockListener);

impl HostListener {
    /// The next connection of the host.
    pub fn poll_accept(&self, cx: &mut Context<'_>) -> Poll<io::Result<VsockStream>> {
        loop {
            let (stream, peer) = ready!(self.0.poll_accept(cx))?;
            if peer.cid() == HOST_CID {
                return Poll::Ready(Ok(stream));
            }
            log::warn!("refused a connection from {peer:?}");
        }
    }
}

impl From<OwnedFd> for HostListener {
    fn from(listener: OwnedFd) -> Self {
        Self(VsockListener::from(listener))
    }
}

impl Stream for HostListener {
    type Item = io::Result<VsockStream>;

    fn poll_next(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        self.poll_accept(cx).map(Some)
    }
}
