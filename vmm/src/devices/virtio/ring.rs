//! A device's view of one virtqueue, and of the guest buffers in a request.
//!
//! Guest memory is shared with running vCPUs: what was read once is not read
//! again, and bytes are moved by `vm-memory`'s volatile copies or by the
//! kernel, never through Rust references.

use std::io;
use std::num::Wrapping;
use std::sync::atomic::{Ordering, fence};
use std::sync::{Arc, Mutex, PoisonError};

use thiserror::Error;
use virtio_bindings::virtio_ring::{VIRTIO_RING_F_EVENT_IDX, VRING_AVAIL_F_NO_INTERRUPT};
use virtio_queue::{DescriptorChain, Queue, QueueOwnedT, QueueT};
use vm_memory::{Address, Bytes, GuestAddress, GuestMemory, VolatileSlice};
use vmm_sys_util::epoll::{Epoll, EpollEvent, EventSet};
use vmm_sys_util::eventfd::EventFd;

use super::worker::{self, Asked};
use super::{ActiveQueue, Interrupt, Progress};
use crate::memory::GuestRam;

/// Most pieces of guest memory one request may consist of; what Linux takes in
/// one `preadv`/`pwritev` (`UIO_MAXIOV`).
pub const MAX_PIECES: usize = 1024;

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

/// A request that is answered without being looked at further.
#[derive(Debug, Error, PartialEq, Eq)]
pub enum ChainError {
    /// A buffer is not in guest memory.
    #[error("a buffer lies outside guest memory")]
    OutsideMemory,
    /// The chain loops, leaves its table, or has too many pieces.
    #[error("the descriptor chain is malformed or has more than {MAX_PIECES} pieces")]
    Malformed,
    /// A device-readable buffer follows a device-writable one (section 2.7.4.2).
    #[error("a readable buffer follows a writable one")]
    Order,
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

/// A sequence of guest buffers, consumed from the front.
#[derive(Default)]
pub struct GuestBuffers<'m> {
    pieces: Vec<Piece<'m>>,
    len: usize,
}

#[derive(Clone, Copy)]
struct Piece<'m> {
    memory: VolatileSlice<'m>,
    /// Of a file's ([`GuestRam::lent`]): for the host's kernel alone to read.
    lent: bool,
}

impl<'m> Piece<'m> {
    fn own(memory: VolatileSlice<'m>) -> Self {
        Self { memory, lent: false }
    }

    fn len(&self) -> usize {
        self.memory.len()
    }

    fn split_at(&self, offset: usize) -> Option<(Self, Self)> {
        let head = self.memory.subslice(0, offset).ok()?;
        let tail = self.memory.offset(offset).ok()?;
        let piece = |memory| Self { memory, lent: self.lent };
        Some((piece(head), piece(tail)))
    }
}

impl<'m> GuestBuffers<'m> {
    /// The device-readable and the device-writable buffers of a request.
    pub fn from_chain(
        memory: &'m GuestRam,
        chain: DescriptorChain<&'m GuestRam>,
    ) -> Result<(Self, Self), ChainError> {
        Self::of_chain(memory, chain, false)
    }

    /// The same where the readable ones may also be of a file that the guest has mapped
    /// ([`GuestRam::lent`]), for a device that has the kernel read them: [`iovecs`](Self::iovecs)
    /// has these, and nothing else that reads does.
    pub fn with_lent(
        memory: &'m GuestRam,
        chain: DescriptorChain<&'m GuestRam>,
    ) -> Result<(Self, Self), ChainError> {
        Self::of_chain(memory, chain, true)
    }

    fn of_chain(
        memory: &'m GuestRam,
        chain: DescriptorChain<&'m GuestRam>,
        with_lent: bool,
    ) -> Result<(Self, Self), ChainError> {
        let (mut readable, mut writable) = (Self::default(), Self::default());
        let mut unfinished = true;
        for descriptor in chain {
            unfinished = descriptor.has_next();
            let side = match (descriptor.is_write_only(), writable.pieces.is_empty()) {
                (true, _) => &mut writable,
                (false, true) => &mut readable,
                (false, false) => return Err(ChainError::Order),
            };
            let length = descriptor.len() as usize;
            let lent = (with_lent && !descriptor.is_write_only())
                .then(|| memory.lent(descriptor.addr(), length))
                .flatten();
            if let Some(memory) = lent {
                side.add(Piece { memory, lent: true })?;
                continue;
            }
            for piece in memory.get_slices(descriptor.addr(), length) {
                side.add(Piece::own(piece.map_err(|_| ChainError::OutsideMemory)?))?;
            }
        }
        // The iterator ends early where the chain is broken or loops.
        if unfinished { Err(ChainError::Malformed) } else { Ok((readable, writable)) }
    }

    fn add(&mut self, piece: Piece<'m>) -> Result<(), ChainError> {
        if self.pieces.len() == MAX_PIECES {
            return Err(ChainError::Malformed);
        }
        self.len += piece.len();
        self.pieces.push(piece);
        Ok(())
    }

    /// Bytes left.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether nothing is left.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Takes the first `count` bytes, or as many as there are.
    pub fn take(&mut self, count: usize) -> Self {
        let mut front = Self::default();
        let mut whole = 0;
        for piece in &self.pieces {
            let missing = count - front.len;
            if missing < piece.len() {
                if let Some((head, tail)) = piece.split_at(missing) {
                    if missing > 0 {
                        front.len += missing;
                        front.pieces.push(head);
                    }
                    if let Some(first) = self.pieces.get_mut(whole) {
                        *first = tail;
                    }
                }
                break;
            }
            front.len += piece.len();
            front.pieces.push(*piece);
            whole += 1;
        }
        self.pieces.drain(..whole);
        self.len -= front.len;
        front
    }

    /// Reads and consumes exactly `N` bytes; `None` if there are fewer, or one that is not the
    /// guest's own.
    pub fn read<const N: usize>(&mut self) -> Option<[u8; N]> {
        if self.len < N {
            return None;
        }
        let mut bytes = [0; N];
        let mut rest = bytes.as_mut_slice();
        for piece in &self.take(N).pieces {
            if piece.lent {
                return None;
            }
            let (now, later) = rest.split_at_mut(piece.len().min(rest.len()));
            piece.memory.copy_to(now);
            rest = later;
        }
        Some(bytes)
    }

    /// Appends everything up to what is not the guest's own to `bytes`, and consumes it.
    pub fn read_to_end(&mut self, bytes: &mut Vec<u8>) {
        for piece in self.pieces.drain(..).take_while(|piece| !piece.lent) {
            let start = bytes.len();
            bytes.resize(start + piece.len(), 0);
            if let Some(target) = bytes.get_mut(start..) {
                piece.memory.copy_to(target);
            }
        }
        self.len = 0;
    }

    /// Copies the bytes from `offset` on up to what is not the guest's own, as many as fit and there are; how many.
    pub fn read_at(&self, mut offset: usize, bytes: &mut [u8]) -> usize {
        let mut read = 0;
        for piece in self.pieces.iter().take_while(|piece| !piece.lent) {
            if offset >= piece.len() {
                offset -= piece.len();
                continue;
            }
            let (Ok(rest), Some(target)) = (piece.memory.offset(offset), bytes.get_mut(read..)) else {
                break;
            };
            read += rest.copy_to(target);
            offset = 0;
        }
        read
    }

    /// Writes `bytes` from `offset` on, as far as they fit; how many did.
    pub fn write_at(&self, mut offset: usize, bytes: &[u8]) -> usize {
        let mut written = 0;
        for piece in &self.pieces {
            if offset >= piece.len() {
                offset -= piece.len();
                continue;
            }
            let Some(rest) = bytes.get(written..).filter(|rest| !rest.is_empty()) else { break };
            let now = rest.get(..piece.len() - offset).unwrap_or(rest);
            // In range: it was just cut to fit.
            let _ = piece.memory.write_slice(now, offset);
            written += now.len();
            offset = 0;
        }
        written
    }

    /// Writes `bytes` to the front and consumes what was written; returns how
    /// many bytes fitted.
    pub fn write(&mut self, bytes: &[u8]) -> usize {
        let target = self.take(bytes.len());
        let mut rest = bytes;
        for piece in &target.pieces {
            let (now, later) = rest.split_at(piece.len().min(rest.len()));
            // In range: the piece is at least as long as `now`.
            let _ = piece.memory.write_slice(now, 0);
            rest = later;
        }
        target.len
    }

    /// Pieces of memory left.
    pub fn pieces(&self) -> usize {
        self.pieces.len()
    }

    /// The buffers as the kernel wants them. They stay valid as long as guest
    /// memory does, which is what `'m` stands for.
    pub fn iovecs(&self) -> Vec<libc::iovec> {
        self.pieces
            .iter()
            .map(|piece| libc::iovec {
                iov_base: piece.memory.ptr_guard_mut().as_ptr().cast(),
                iov_len: piece.len(),
            })
            .collect()
    }

    /// Appends the buffers of `other`.
    pub fn extend(&mut self, other: &Self) {
        self.pieces.extend_from_slice(&other.pieces);
        self.len += other.len;
    }
}

#[cfg(test)]
mod tests {
    use virtio_bindings::virtio_ring::{VRING_DESC_F_NEXT, VRING_DESC_F_WRITE};
    use virtio_queue::desc::{RawDescriptor, split::Descriptor};
    use virtio_queue::mock::MockSplitQueue;
    use vm_memory::GuestAddress;

    use super::*;

    const WRITE: u16 = VRING_DESC_F_WRITE as u16;
    const NEXT: u16 = VRING_DESC_F_NEXT as u16;

    fn memory() -> GuestRam {
        // Two regions that touch: a buffer may lie across them.
        GuestRam::from_ranges(&[(GuestAddress(0), 0x8000), (GuestAddress(0x8000), 0x8000)])
    }

    fn parse<'m>(
        memory: &'m GuestRam,
        descriptors: &[(u64, u32, u16, u16)],
    ) -> Result<(GuestBuffers<'m>, GuestBuffers<'m>), ChainError> {
        let mock = MockSplitQueue::new(memory, 16);
        let raw: Vec<RawDescriptor> = descriptors
            .iter()
            .map(|&(addr, len, flags, next)| Descriptor::new(addr, len, flags, next).into())
            .collect();
        mock.add_desc_chains(&raw, 0).unwrap();
        let mut queue: Queue = mock.create_queue().unwrap();
        let chain = queue.iter(memory).unwrap().next().unwrap();
        GuestBuffers::from_chain(memory, chain)
    }

    #[test]
    fn buffers_are_split_where_asked_also_across_regions() {
        let memory = memory();
        let (mut readable, mut writable) =
            parse(&memory, &[(0x7ffe, 4, NEXT, 1), (0x1000, 3, NEXT | WRITE, 2), (0x2000, 3, WRITE, 0)])
                .unwrap();
        assert_eq!((readable.len(), writable.len()), (4, 6));
        memory.write_slice(b"abcd", GuestAddress(0x7ffe)).unwrap();
        assert_eq!(&readable.read::<3>().unwrap(), b"abc");
        assert!(readable.read::<2>().is_none());
        let mut rest = Vec::new();
        readable.read_to_end(&mut rest);
        assert_eq!(rest, b"d");

        assert_eq!(writable.write(b"12345"), 5);
        assert_eq!(writable.write(b"678"), 1);
        let mut seen = [0; 3];
        memory.read_slice(&mut seen, GuestAddress(0x2000)).unwrap();
        assert_eq!(&seen, b"456");
        assert!(writable.is_empty());
    }

    #[test]
    fn malformed_chains_are_refused() {
        let memory = memory();
        // A loop.
        assert_eq!(
            parse(&memory, &[(0x1000, 1, NEXT, 1), (0x1000, 1, NEXT, 0)]).err(),
            Some(ChainError::Malformed)
        );
        // Out of the table.
        assert_eq!(parse(&memory, &[(0x1000, 1, NEXT, 99)]).err(), Some(ChainError::Malformed));
        // Out of memory, also where the end would overflow.
        assert_eq!(parse(&memory, &[(0xfff0, 0x20, 0, 0)]).err(), Some(ChainError::OutsideMemory));
        assert_eq!(parse(&memory, &[(u64::MAX - 1, 0x20, 0, 0)]).err(), Some(ChainError::OutsideMemory));
        assert_eq!(
            parse(&memory, &[(0x1000, 1, NEXT | WRITE, 1), (0x1000, 1, 0, 0)]).err(),
            Some(ChainError::Order)
        );
    }

    #[test]
    fn of_a_file_the_guest_has_mapped_only_the_kernel_reads() {
        const FILE: u64 = 4 << 30;
        let shape = crate::memory::Shape { boot: 1 << 20, window: 128 << 20, ..Default::default() };
        let memory = crate::memory::create_shaped(shape).unwrap();
        let file = tempfile::tempfile().unwrap();
        file.set_len(8192).unwrap();
        let (window, bytes) = memory.map(&file).unwrap();
        memory.lend(window, bytes);
        let chain = |with_lent: bool, descriptors: &[(u64, u32, u16, u16)]| {
            let mock = MockSplitQueue::new(&memory, 16);
            let raw: Vec<RawDescriptor> = descriptors
                .iter()
                .map(|&(addr, len, flags, next)| Descriptor::new(addr, len, flags, next).into())
                .collect();
            mock.add_desc_chains(&raw, 0).unwrap();
            let mut queue: Queue = mock.create_queue().unwrap();
            let chain = queue.iter(&memory).unwrap().next().unwrap();
            match with_lent {
                true => GuestBuffers::with_lent(&memory, chain),
                false => GuestBuffers::from_chain(&memory, chain),
            }
        };
        let both = [(0x8000, 4, NEXT, 1), (FILE + 4096, 4096, 0, 0)];
        assert_eq!(chain(false, &both).err(), Some(ChainError::OutsideMemory));
        let (mut readable, _) = chain(true, &both).unwrap();
        assert_eq!((readable.len(), readable.pieces()), (4100, 2));
        let mut bytes = [0xee; 8];
        assert_eq!(readable.read_at(0, &mut bytes), 4);
        assert_eq!(readable.read::<4>(), Some([0; 4]));
        let front = readable.take(512).iovecs();
        assert_eq!((front.len(), front[0].iov_len), (1, 512));
        let mut rest = Vec::new();
        assert_eq!((readable.len(), readable.read::<1>()), (3584, None));
        readable.read_to_end(&mut rest);
        assert!(rest.is_empty());
        // Nothing is written there, and what is not lent is nothing.
        for descriptors in [(FILE, 4, WRITE, 0), (FILE + (2 << 20) - 1, 2, 0, 0), (FILE - 1, 2, 0, 0)] {
            assert_eq!(chain(true, &[descriptors]).err(), Some(ChainError::OutsideMemory), "{descriptors:?}");
        }
    }

    #[test]
    fn take_may_ask_for_more_than_there_is() {
        let memory = memory();
        let (mut readable, _) = parse(&memory, &[(0x1000, 8, 0, 0)]).unwrap();
        assert_eq!(readable.take(5).len(), 5);
        assert_eq!(readable.take(5).len(), 3);
        assert_eq!(readable.take(5).len(), 0);
        assert!(readable.iovecs().is_empty());
    }
}
