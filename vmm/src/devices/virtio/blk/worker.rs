//! The disk's threads.

use std::io;
use std::sync::{Arc, Mutex, PoisonError};

use vmm_sys_util::epoll::{Epoll, EpollEvent};

use super::disk::Disk;
use super::request::execute;
use super::{BlkError, SERIAL_BYTES};
use crate::devices::virtio::buffers::GuestBuffers;
use crate::devices::virtio::ring::Ring;
use crate::devices::virtio::worker::Handler;
use crate::memory::GuestRam;

pub(super) struct BlkWorker {
    pub(super) memory: GuestRam,
    /// Those it serves, with others.
    pub(super) rings: Vec<Arc<Mutex<Ring>>>,
    pub(super) disk: Arc<Disk>,
    pub(super) serial: [u8; SERIAL_BYTES],
}

impl Handler for BlkWorker {
    type Error = BlkError;

    fn register(&mut self, epoll: &Epoll) -> io::Result<()> {
        Ring::register_all(&self.rings, epoll)
    }

    fn handle(&mut self, _epoll: &Epoll, ready: &[EpollEvent]) -> Result<(), BlkError> {
        let Self { memory, rings, disk, serial } = self;
        for ring in Ring::ready(rings, ready) {
            let asked = ring.lock().unwrap_or_else(PoisonError::into_inner).asked();
            let go_on = || !asked.to_stop();
            Ring::serve_among(ring, memory, |chain| match GuestBuffers::with_lent(memory, chain) {
                Ok((readable, writable)) => execute(disk, serial, readable, writable, &go_on),
                Err(_) => 0,
            })?;
        }
        Ok(())
    }
}
