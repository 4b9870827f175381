//! The disk's thread.

use std::io;
use std::sync::Arc;

use vmm_sys_util::epoll::{Epoll, EpollEvent};

use super::disk::Disk;
use super::request::execute;
use super::{BlkError, SERIAL_BYTES};
use crate::devices::virtio::ring::{GuestBuffers, Ring};
use crate::devices::virtio::worker::Handler;
use crate::memory::GuestRam;

pub(super) struct BlkWorker {
    pub(super) memory: GuestRam,
    pub(super) ring: Ring,
    pub(super) disk: Arc<Disk>,
    pub(super) serial: [u8; SERIAL_BYTES],
}

impl Handler for BlkWorker {
    type Error = BlkError;

    fn register(&mut self, epoll: &Epoll) -> io::Result<()> {
        self.ring.register(epoll, 0)
    }

    fn handle(&mut self, _epoll: &Epoll, _ready: &[EpollEvent]) -> Result<(), BlkError> {
        let Self { memory, ring, disk, serial } = self;
        let asked = ring.asked();
        let go_on = || !asked.to_stop();
        ring.serve(memory, |chain| match GuestBuffers::with_lent(memory, chain) {
            Ok((readable, writable)) => execute(disk, serial, readable, writable, &go_on),
            Err(_) => 0,
        })?;
        Ok(())
    }
}
