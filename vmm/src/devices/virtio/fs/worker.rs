//! The share's threads: one for the high-priority queue, which carries what must
//! not wait behind data, and one per queue of requests.

use std::io;
use std::os::fd::OwnedFd;
use std::sync::{Arc, OnceLock};

use vmm_sys_util::epoll::{Epoll, EpollEvent};

use super::FsError;
use super::message::FuseServer;
use super::meter::FsMeter;
use super::passthrough::{Passthrough, Policy};
use crate::devices::virtio::ring::Ring;
use crate::devices::virtio::worker::Handler;
use crate::memory::GuestRam;

pub(super) struct FsWorker {
    pub(super) memory: GuestRam,
    pub(super) ring: Ring,
    pub(super) share: Arc<Share>,
}

/// What the threads of one driver serve.
pub(super) struct Share {
    root: OwnedFd,
    policy: Policy,
    meter: FsMeter,
    server: OnceLock<FuseServer>,
}

impl Share {
    /// Looks at nothing yet: a vCPU's thread, on which a driver starts, has no calls for files.
    pub(super) fn new(root: OwnedFd, policy: Policy, meter: FsMeter) -> Self {
        Self { root, policy, meter, server: OnceLock::new() }
    }

    /// What all of the threads serve; whichever comes first makes it.
    fn server(&self) -> io::Result<&FuseServer> {
        if let Some(server) = self.server.get() {
            return Ok(server);
        }
        let tree = Passthrough::new(self.root.try_clone()?, self.policy)?;
        Ok(self.server.get_or_init(|| FuseServer::new(tree, self.meter.clone())))
    }
}

impl Handler for FsWorker {
    type Error = FsError;

    fn register(&mut self, epoll: &Epoll) -> io::Result<()> {
        self.ring.register(epoll, 0)
    }

    fn start(&mut self, _epoll: &Epoll) -> io::Result<()> {
        self.share.server()?.tree().enter_thread()
    }

    fn handle(&mut self, _epoll: &Epoll, ready: &[EpollEvent]) -> Result<(), FsError> {
        let Self { memory, ring, share } = self;
        if !ready.is_empty() {
            let server = share.server().map_err(FsError::Share)?;
            let interrupts = ring.serve(memory, |chain| server.answer(memory, chain))?;
            share.meter.round(interrupts);
        }
        Ok(())
    }
}
