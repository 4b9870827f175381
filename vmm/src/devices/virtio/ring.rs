//! A device's view of one virtqueue. What a request consists of is in [`buffers`](super::buffers).

use std::io;
use std::num::Wrapping;
use std::sync::atomic::{Ordering, fence};
use std::sync::{Arc, Mutex, PoisonError};

use thiserror::Error;
use virtio_bindings::virtio_ring::{VIRTIO_RING_F_EVENT_IDX, VRING_AVAIL_F_NO_INTERRUPT};
use virtio_queue::{DescriptorChain, Queue, QueueOwnedT, QueueT};
use vm_memory::{Address, Bytes, GuestAddress};
use vmm_sys_util::epoll::{Epoll, EpollEvent, EventSet};
use vmm_sys_util::eventfd::EventFd;

use super::worker::{self, Asked};
use super::{ActiveQueue, Interrupt, Progress};
use crate::memory::GuestRam;

/// A ring the device cannot go on with.
#[derive(Debug, Error)]
pub enum RingError {
    /// The ring's own memory or indices make no sense.
    #[error("the driver's ring is invalid")]
    Ring(#[from] virtio_queue::Error),
    /// The interrupt could not be raised.
    #[error("the interrupt could not be raised")]
    Interrupt(#[source] io::Error),
}

/// One virtqueue in use.
pub struct Ring {
    queue: Queue,
    kick: EventFd,
    interrupt: Arc<dyn Interrupt>,
    asked: Asked,
    progress: Arc<Progress>,
    /// The next used entry when the driver was last told of some.
    told: Wrapping<u16>,
}

/// Where a ring's parts lie in guest memory, for others that serve it.
#[derive(Clone, Copy, Debug)]
pub struct Layout {
    /// Entries.
    pub size: u16,
    /// The descriptor table.
    pub descriptors: GuestAddress,
    /// The ring of available requests.
    pub avail: GuestAddress,
    /// The ring of used requests.
    pub used: GuestAddress,
}

impl Ring {
    /// Takes over a queue; `features` are those both sides agreed on.
    pub fn new(active: ActiveQueue, features: u64) -> Self {
        let ActiveQueue { mut queue, kick, interrupt, asked, progress } = active;
        queue.set_event_idx(features & (1 << VIRTIO_RING_F_EVENT_IDX) != 0);
        let told = Wrapping(queue.next_used());
        Self { queue, kick, interrupt, asked, progress, told }
    }

    /// Where it lies.
    pub fn layout(&self) -> Layout {
        Layout {
            size: self.queue.size(),
            descriptors: GuestAddress(self.queue.desc_table()),
            avail: GuestAddress(self.queue.avail_ring()),
            used: GuestAddress(self.queue.used_ring()),
        }
    }

    /// What is written to when the driver adds requests.
    pub fn kick(&self) -> &EventFd {
        &self.kick
    }

    /// What tells the driver of used requests, for others to write to.
    pub fn interrupt_event(&self) -> io::Result<Option<EventFd>> {
        self.interrupt.event()
    }

    /// The next available entry.
    pub fn next_avail(&self) -> u16 {
        self.queue.next_avail()
    }

    /// Goes on where another has left off: its next available entry, and the next used
    /// one that the ring itself names.
    pub fn take_over(&mut self, memory: &GuestRam, next_avail: u16) -> Result<(), RingError> {
        let used = self.queue.used_idx(memory, Ordering::Acquire)?;
        self.queue.set_next_avail(next_avail);
        self.queue.set_next_used(used.0);
        self.told = used;
        self.progress.set((next_avail, used.0));
        Ok(())
    }

    /// Has epoll report, by `token`, when the driver adds requests. Edge
    /// triggered: the event's counter is never read, which saves a system call
    /// per round; every kick is an edge, also while the counter is not zero.
    pub fn register(&self, epoll: &Epoll, token: u64) -> io::Result<()> {
        worker::add(epoll, &self.kick, EventSet::IN | EventSet::EDGE_TRIGGERED, token)
    }

    /// The same for one of several workers that serve the ring: a kick is one's, of those that wait.
    fn register_among(&self, epoll: &Epoll, token: u64) -> io::Result<()> {
        let events = EventSet::IN | EventSet::EDGE_TRIGGERED | EventSet::EXCLUSIVE;
        worker::add(epoll, &self.kick, events, token)
    }

    /// Registers rings that several workers serve, each by its place among them.
    pub fn register_all(rings: &[Arc<Mutex<Self>>], epoll: &Epoll) -> io::Result<()> {
        (0..).zip(rings).try_for_each(|(token, ring)| {
            ring.lock().unwrap_or_else(PoisonError::into_inner).register_among(epoll, token)
        })
    }

    /// Those of [`Ring::register_all`] that became ready.
    pub fn ready<'r>(
        rings: &'r [Arc<Mutex<Self>>],
        events: &'r [EpollEvent],
    ) -> impl Iterator<Item = &'r Arc<Mutex<Self>>> {
        events.iter().filter_map(|event| rings.get(usize::try_from(event.data()).ok()?))
    }

    /// Makes the worker look at this ring again in its next round.
    pub fn kick_again(&self) {
        // Fails only when the counter is full, and then the event is set.
        let _ = self.kick.write(1);
    }

    /// The next request, if there is one.
    pub fn pop<'m>(
        &mut self,
        memory: &'m GuestRam,
    ) -> Result<Option<DescriptorChain<&'m GuestRam>>, RingError> {
        let chain = self.queue.iter(memory)?.next();
        self.progress.set_avail(self.queue.next_avail());
        Ok(chain)
    }

    /// Gives back the `count` requests popped last, to be popped again.
    pub fn unpop(&mut self, count: u16) {
        self.queue.set_next_avail(self.queue.next_avail().wrapping_sub(count));
        self.progress.set_avail(self.queue.next_avail());
    }

    /// Returns a request to the driver, `len` bytes of it written.
    pub fn push(&mut self, memory: &GuestRam, head: u16, len: u32) -> Result<(), RingError> {
        self.queue.add_used(memory, head, len)?;
        self.progress.set_used(self.queue.next_used());
        Ok(())
    }

    /// Returns several requests at once: the driver sees all of them or none.
    pub fn push_all(&mut self, memory: &GuestRam, used: &[(u16, u32)]) -> Result<(), RingError> {
        let Some(((last, len), others)) = used.split_last() else { return Ok(()) };
        let Layout { size, used: ring, .. } = self.layout();
        let mut next = self.queue.next_used();
        for (head, len) in others {
            if *head >= size {
                return Err(virtio_queue::Error::InvalidDescriptorIndex.into());
            }
            let place = 4 + 8 * u64::from(next % size);
            let place = ring.checked_add(place).ok_or(virtio_queue::Error::AddressOverflow)?;
            // `struct virtq_used_elem` (section 2.7.8).
            let element = u64::from(*head) | u64::from(*len) << 32;
            memory.write_obj(element.to_le(), place).map_err(virtio_queue::Error::GuestMemory)?;
            next = next.wrapping_add(1);
        }
        // The index is written behind the last, for all.
        self.queue.set_next_used(next);
        self.push(memory, *last, *len)
    }

    /// Interrupts the driver if it asked for that since the last call; whether it did.
    pub fn notify(&mut self, memory: &GuestRam) -> Result<bool, RingError> {
        let used = Wrapping(self.queue.next_used());
        let told = std::mem::replace(&mut self.told, used);
        if used == told || !self.wants_interrupt(memory, told, used)? {
            return Ok(false);
        }
        self.interrupt.trigger().map_err(RingError::Interrupt)?;
        Ok(true)
    }

    /// Whether the driver is to hear that the entries from `told` to `used` were used
    /// (section 2.7.7.2).
    fn wants_interrupt(
        &self,
        memory: &GuestRam,
        told: Wrapping<u16>,
        used: Wrapping<u16>,
    ) -> Result<bool, RingError> {
        // What was used is visible before the driver's wish is read.
        fence(Ordering::SeqCst);
        let Layout { size, avail, .. } = self.layout();
        let word = |offset: u64| -> Result<u16, virtio_queue::Error> {
            let place = avail.checked_add(offset).ok_or(virtio_queue::Error::AddressOverflow)?;
            memory.load(place, Ordering::Relaxed).map_err(virtio_queue::Error::GuestMemory)
        };
        if self.queue.event_idx_enabled() {
            let event = Wrapping(word(4 + 2 * u64::from(size))?);
            return Ok(used - event - Wrapping(1) < used - told);
        }
        Ok(word(0)? & VRING_AVAIL_F_NO_INTERRUPT as u16 == 0)
    }

    /// Asks for a kick on the next request; true if one has come in already.
    pub fn arm(&mut self, memory: &GuestRam) -> Result<bool, RingError> {
        Ok(self.queue.enable_notification(memory)?)
    }

    /// Asks for no more kicks while the device looks at the ring anyway.
    pub fn disarm(&mut self, memory: &GuestRam) -> Result<(), RingError> {
        Ok(self.queue.disable_notification(memory)?)
    }

    /// Serves what is available, one queue full at most per call: `answer`
    /// returns the bytes it wrote into a request. What is left over, or comes in
    /// meanwhile, is seen in the worker's next round; so is all that follows when
    /// the thread is asked to leave. Returns how often the driver was interrupted.
    pub fn serve<'m>(
        &mut self,
        memory: &'m GuestRam,
        mut answer: impl FnMut(DescriptorChain<&'m GuestRam>) -> u32,
    ) -> Result<u64, RingError> {
        let mut interrupts = 0;
        self.disarm(memory)?;
        for _ in 0..self.size() {
            if self.asked.to_leave() {
                self.kick_again();
                break;
            }
            let Some(chain) = self.pop(memory)? else { break };
            let head = chain.head_index();
            let written = answer(chain);
            self.push(memory, head, written)?;
            interrupts += u64::from(self.notify(memory)?);
        }
        if self.arm(memory)? {
            self.kick_again();
        }
        Ok(interrupts)
    }

    /// The same of a ring that several workers serve: what follows a request that one of them is at is for the
    /// others, so that one the host takes its time for holds nothing up.
    pub fn serve_among<'m>(
        ring: &Mutex<Self>,
        memory: &'m GuestRam,
        mut answer: impl FnMut(DescriptorChain<&'m GuestRam>) -> u32,
    ) -> Result<u64, RingError> {
        let lock = || ring.lock().unwrap_or_else(PoisonError::into_inner);
        let (size, mut interrupts) = (lock().size(), 0);
        for _ in 0..size {
            let chain = {
                let mut ring = lock();
                if ring.asked.to_leave() {
                    ring.kick_again();
                    break;
                }
                let chain = ring.pop(memory)?;
                let more = ring.arm(memory)?;
                match chain {
                    Some(chain) => {
                        if more {
                            ring.kick_again();
                        }
                        chain
                    }
                    None if more => continue,
                    None => break,
                }
            };
            interrupts += Self::answer(ring, memory, chain, &mut answer)?;
        }
        Ok(interrupts)
    }

    /// Does what waits in a ring that others serve, a queue full at most, without asking for a notification of more.
    pub fn serve_waiting<'m>(
        ring: &Mutex<Self>,
        memory: &'m GuestRam,
        mut answer: impl FnMut(DescriptorChain<&'m GuestRam>) -> u32,
    ) -> Result<u64, RingError> {
        let lock = || ring.lock().unwrap_or_else(PoisonError::into_inner);
        let (size, mut interrupts) = (lock().size(), 0);
        for _ in 0..size {
            let chain = {
                let mut ring = lock();
                if ring.asked.to_leave() {
                    break;
                }
                ring.pop(memory)?
            };
            let Some(chain) = chain else { break };
            interrupts += Self::answer(ring, memory, chain, &mut answer)?;
        }
        Ok(interrupts)
    }

    /// Answers a request that was taken from a ring which others serve meanwhile; how often the driver was interrupted.
    fn answer<'m>(
        ring: &Mutex<Self>,
        memory: &'m GuestRam,
        chain: DescriptorChain<&'m GuestRam>,
        answer: &mut impl FnMut(DescriptorChain<&'m GuestRam>) -> u32,
    ) -> Result<u64, RingError> {
        let head = chain.head_index();
        let written = answer(chain);
        let mut ring = ring.lock().unwrap_or_else(PoisonError::into_inner);
        ring.push(memory, head, written)?;
        Ok(ring.notify(memory)?.into())
    }

    /// What is asked of the thread that serves it.
    pub fn asked(&self) -> Asked {
        self.asked.clone()
    }

    /// Requests the queue holds at most.
    pub fn size(&self) -> u16 {
        self.queue.size()
    }
}
