//! The device's thread: free pages go back to the host.

use std::io;

use vmm_sys_util::epoll::{Epoll, EpollEvent};

use super::REPORTING;
use crate::devices::virtio::buffers::MAX_PIECES;
use crate::devices::virtio::ring::{Ring, RingError};
use crate::devices::virtio::worker::Handler;
use crate::memory::GuestRam;

pub(super) struct BalloonWorker {
    pub(super) memory: GuestRam,
    pub(super) ring: Ring,
}

impl Handler for BalloonWorker {
    type Error = RingError;

    fn register(&mut self, epoll: &Epoll) -> io::Result<()> {
        self.ring.register(epoll, REPORTING as u64)
    }

    /// The driver uses none of the pages until it is answered.
    fn handle(&mut self, _epoll: &Epoll, _ready: &[EpollEvent]) -> Result<(), RingError> {
        let Self { memory, ring } = self;
        ring.serve(memory, |chain| {
            for range in chain.take(MAX_PIECES) {
                // What stays costs the host memory, and the guest nothing.
                if let Err(e) = memory.discard(range.addr(), range.len().into()) {
                    log::debug!("balloon: {:#x} is not given back: {e}", range.addr().0);
                }
            }
            0
        })
        .map(drop)
    }
}
