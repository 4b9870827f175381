//! The device's thread: blocks come and go.

use std::io;
use std::ops::Range;
use std::sync::Arc;

use vmm_sys_util::epoll::{Epoll, EpollEvent};

use super::device::Shared;
use super::request::{Answer, Named, Request};
use super::{BLOCK_BYTES, MemError};
use crate::devices::virtio::buffers::GuestBuffers;
use crate::devices::virtio::ring::Ring;
use crate::devices::virtio::worker::Handler;
use crate::memory::{Change, GuestRam, Room};

pub(super) struct MemWorker {
    pub(super) memory: GuestRam,
    pub(super) ring: Ring,
    pub(super) shared: Arc<Shared>,
}

impl Handler for MemWorker {
    type Error = MemError;

    fn register(&mut self, epoll: &Epoll) -> io::Result<()> {
        self.ring.register(epoll, 0)
    }

    fn handle(&mut self, _epoll: &Epoll, _ready: &[EpollEvent]) -> Result<(), MemError> {
        let Self { memory, ring, shared } = self;
        ring.serve(memory, |chain| {
            // What cannot be read or answered gets no bytes.
            let Ok((mut readable, mut writable)) = GuestBuffers::from_chain(memory, chain) else { return 0 };
            let Some(request) = Request::decode(&mut readable) else { return 0 };
            let answer = execute(shared, request).encode();
            if writable.len() < answer.len() { 0 } else { writable.write(&answer) as u32 }
        })?;
        Ok(())
    }
}

/// Does what is asked for. Only this thread plugs and unplugs.
fn execute(shared: &Shared, request: Request) -> Answer {
    let registers = &shared.registers;
    let named = |named: Named| registers.blocks(named.address, named.count);
    let done = match request {
        Request::Plug(blocks) => named(blocks).map(|blocks| plug(shared, blocks)),
        Request::Unplug(blocks) => {
            let all =
                |blocks: &Range<u64>| shared.blocks().count(blocks.clone()) == blocks.end - blocks.start;
            named(blocks).filter(all).map(|blocks| unplug(shared, blocks))
        }
        Request::UnplugAll => Some(unplug(shared, registers.all(registers.usable()))),
        Request::State(blocks) => named(blocks).map(|blocks| {
            let all = blocks.end - blocks.start;
            match shared.blocks().count(blocks) {
                0 => Answer::Unplugged,
                count if count == all => Answer::Plugged,
                _ => Answer::Mixed,
            }
        }),
        Request::Unknown => None,
    };
    done.unwrap_or(Answer::Error)
}

/// Lets the guest use `blocks`; their pages come when they are touched, but for the host's
/// huge pages, which might be gone by then.
fn plug(shared: &Shared, blocks: Range<u64>) -> Answer {
    let mut plugged = shared.blocks();
    if plugged.count(blocks.clone()) > 0 {
        return Answer::Error;
    }
    let all = shared.registers.plugged() / BLOCK_BYTES + (blocks.end - blocks.start);
    if all * BLOCK_BYTES > shared.registers.requested() {
        return Answer::Nack;
    }
    if shared.room == Room::Hugetlb
        && let Err(e) = change_backing(shared, &blocks, Change::Allocate)
    {
        log::error!("mem: the host gives no more huge pages: {e}");
        // Those that came go back.
        if let Err(e) = change_backing(shared, &blocks, Change::Discard) {
            log::error!("mem: pages were not given back: {e}");
        }
        return Answer::Nack;
    }
    plugged.set(blocks, true);
    shared.registers.set_plugged(all);
    Answer::Ack
}

/// Gives the pages of `blocks` back to the host.
fn unplug(shared: &Shared, blocks: Range<u64>) -> Answer {
    if let Err(e) = change_backing(shared, &blocks, Change::Discard) {
        log::error!("mem: pages were not given back: {e}");
        return Answer::Busy;
    }
    let mut plugged = shared.blocks();
    let gone = plugged.count(blocks.clone());
    plugged.set(blocks, false);
    shared.registers.set_plugged((shared.registers.plugged() / BLOCK_BYTES).saturating_sub(gone));
    Answer::Ack
}

/// Allocates or discards what is behind `blocks`.
fn change_backing(shared: &Shared, blocks: &Range<u64>, change: Change) -> io::Result<()> {
    let region = shared.memory.growing(shared.room).ok_or(io::ErrorKind::NotFound)?;
    region.change(blocks.start * BLOCK_BYTES..blocks.end * BLOCK_BYTES, change)
}
