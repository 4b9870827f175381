//! The share's threads: one for the high-priority queue, which carries what must
//! not wait behind data, and some for the queues of requests, each for all of them.

use std::io;
use std::os::fd::OwnedFd;
use std::sync::{Arc, Mutex, OnceLock};

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
    /// Those it serves, with others.
    pub(super) rings: Vec<Arc<Mutex<Ring>>>,
    /// The high-priority queue, where that is not it: of what it carries, our guest kernel notifies the device
    /// later, and it belongs before what the guest asks next. A file that was removed takes room until it is
    /// forgotten.
    pub(super) hiprio: Option<Arc<Mutex<Ring>>>,
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
        Ring::register_all(&self.rings, epoll)
    }

    fn start(&mut self, _epoll: &Epoll) -> io::Result<()> {
        self.share.server()?.tree().enter_thread()
    }

    fn handle(&mut self, _epoll: &Epoll, ready: &[EpollEvent]) -> Result<(), FsError> {
        let Self { memory, rings, hiprio, share } = self;
        for ring in Ring::ready(rings, ready) {
            let server = share.server().map_err(FsError::Share)?;
            let mut first = Ok(0);
            let interrupts = Ring::serve_among(ring, memory, |chain| {
                if let (Some(hiprio), Ok(interrupts)) = (hiprio.as_ref(), &mut first) {
                    let done = Ring::serve_waiting(hiprio, memory, |chain| server.answer(memory, chain));
                    first = done.map(|more| *interrupts + more);
                }
                server.answer(memory, chain)
            })?;
            share.meter.round(interrupts + first?);
        }
        Ok(())
    }
}
