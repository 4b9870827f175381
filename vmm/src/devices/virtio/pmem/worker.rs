//! The device's thread.

use std::io;

use vmm_sys_util::epoll::{Epoll, EpollEvent};

use super::{REQUEST_FLUSH, RESPONSE_EIO, RESPONSE_OK};
use crate::devices::virtio::buffers::GuestBuffers;
use crate::devices::virtio::ring::{Ring, RingError};
use crate::devices::virtio::worker::Handler;
use crate::memory::GuestRam;

pub(super) struct PmemWorker {
    pub(super) memory: GuestRam,
    pub(super) ring: Ring,
}

impl Handler for PmemWorker {
    type Error = RingError;

    fn register(&mut self, epoll: &Epoll) -> io::Result<()> {
        self.ring.register(epoll, 0)
    }

    fn handle(&mut self, _epoll: &Epoll, _ready: &[EpollEvent]) -> Result<(), RingError> {
        let Self { memory, ring } = self;
        ring.serve(memory, |chain| match GuestBuffers::from_chain(memory, chain) {
            Ok((readable, writable)) => answer(readable, writable),
            Err(_) => 0,
        })
        .map(drop)
    }
}

/// Returns the bytes written.
fn answer(mut readable: GuestBuffers<'_>, mut writable: GuestBuffers<'_>) -> u32 {
    let response = match readable.read().map(u32::from_le_bytes) {
        // Nothing was written that could be lost.
        Some(REQUEST_FLUSH) => RESPONSE_OK,
        _ => RESPONSE_EIO,
    };
    writable.write(&response.to_le_bytes()) as u32
}
