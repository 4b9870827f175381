//! The share's threads: one for the high-priority queue, which carries what must
//! not wait behind data, and one per queue of requests.

use std::io;
use std::sync::Arc;

use vmm_sys_util::epoll::{Epoll, EpollEvent};

use super::FsError;
use super::message::FuseServer;
use crate::devices::virtio::ring::Ring;
use crate::devices::virtio::worker::Handler;
use crate::memory::GuestRam;

pub(super) struct FsWorker {
    pub(super) memory: GuestRam,
    pub(super) ring: Ring,
    pub(super) server: Arc<FuseServer>,
}

impl Handler for FsWorker {
    type Error = FsError;

    fn register(&mut self, epoll: &Epoll) -> io::Result<()> {
        self.ring.register(epoll, 0)
    }

    fn start(&mut self, _epoll: &Epoll) -> io::Result<()> {
        self.server.tree().enter_thread()
    }

    fn handle(&mut self, _epoll: &Epoll, ready: &[EpollEvent]) -> Result<(), FsError> {
        let Self { memory, ring, server } = self;
        if !ready.is_empty() {
            ring.serve(memory, |chain| server.answer(memory, chain))?;
        }
        Ok(())
    }
}
