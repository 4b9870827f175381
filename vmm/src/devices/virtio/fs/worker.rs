//! The share's threads, one per queue of requests; the first also serves the
//! high-priority queue.

use std::io;
use std::io::Write;
use std::sync::Arc;

use fuse_backend_rs::abi::fuse_abi::{InHeader, OutHeader};
use fuse_backend_rs::api::server::Server;
use fuse_backend_rs::transport::{Reader, VirtioFsWriter, Writer};
use virtio_queue::DescriptorChain;
use vm_memory::ByteValued;
use vmm_sys_util::epoll::{Epoll, EpollEvent};

use super::FsError;
use super::passthrough::Passthrough;
use crate::devices::virtio::ring::Ring;
use crate::devices::virtio::worker::Handler;
use crate::memory::GuestRam;

pub(super) type FuseServer = Server<Arc<Passthrough>>;

pub(super) struct FsWorker {
    pub(super) memory: GuestRam,
    pub(super) rings: Vec<Ring>,
    pub(super) server: Arc<FuseServer>,
    pub(super) tree: Arc<Passthrough>,
}

impl Handler for FsWorker {
    type Error = FsError;

    fn register(&mut self, epoll: &Epoll) -> io::Result<()> {
        for (token, ring) in self.rings.iter().enumerate() {
            ring.register(epoll, token as u64)?;
        }
        Ok(())
    }

    fn start(&mut self) -> io::Result<()> {
        self.tree.enter_thread()
    }

    fn handle(&mut self, _epoll: &Epoll, ready: &[EpollEvent]) -> Result<(), FsError> {
        let Self { memory, rings, server, .. } = self;
        for event in ready {
            if let Some(ring) = rings.get_mut(event.data() as usize) {
                ring.serve(memory, |chain| answer(server, memory, chain))?;
            }
        }
        Ok(())
    }
}

/// Answers one request; returns the bytes of the answer, 0 for none.
fn answer(server: &FuseServer, memory: &GuestRam, chain: DescriptorChain<&GuestRam>) -> u32 {
    let served = (|| {
        let reader = Reader::from_descriptor_chain(memory, chain.clone()).ok()?;
        let writer = VirtioFsWriter::new(memory, chain.clone()).ok()?;
        server.handle_message(reader, Writer::VirtioFs(writer), None, None).ok()
    })();
    let written = served.unwrap_or_else(|| refuse(memory, chain).unwrap_or(0));
    u32::try_from(written).unwrap_or(0)
}

/// Answers a request that could not be decoded, if it has a header and room for
/// an answer: a driver must not take what lies in its buffer for one.
fn refuse(memory: &GuestRam, chain: DescriptorChain<&GuestRam>) -> Option<usize> {
    let request: InHeader = Reader::from_descriptor_chain(memory, chain.clone()).ok()?.read_obj().ok()?;
    let len = size_of::<OutHeader>();
    let header = OutHeader { len: len as u32, error: -libc::EINVAL, unique: request.unique };
    VirtioFsWriter::new(memory, chain).ok()?.write_all(header.as_slice()).ok()?;
    Some(len)
}
