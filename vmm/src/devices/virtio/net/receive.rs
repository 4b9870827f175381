//! From the tap to the guest.
//!
//! A frame is read straight into the guest's buffers. How long it is shows when it has
//! been read: as many buffers are offered to the kernel as frames of late needed, and
//! behind them a buffer of the monitor's, the spill, so that a longer one loses
//! nothing. What landed there is copied into more buffers.

use std::collections::VecDeque;
use std::io;
use std::sync::Arc;
use std::time::{Duration, Instant};

use rvm_protocol::vmm::NetCounts;

use super::filter::{Filter, LOOKED_AT};
use super::limit::Limit;
use super::tap::Tap;
use super::{BATCH, HEADER_BYTES, MAX_FRAME_BYTES};
use crate::devices::virtio::buffers::{GuestBuffers, MAX_PIECES};
use crate::devices::virtio::ring::{Ring, RingError};
use crate::memory::GuestRam;

/// Longest frame with its header.
const MAX_READ: usize = HEADER_BYTES + MAX_FRAME_BYTES;
/// What is offered for the first frame: one of an ordinary MTU.
const FIRST_GUESS: usize = 2048;
/// Offset of the number of buffers in the header (section 5.1.6).
const NUM_BUFFERS: usize = 10;

/// What the direction waits for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Waits {
    /// A frame on the tap.
    Tap,
    /// The guest's buffers: the tap need not be looked at.
    Guest,
    /// Its limit.
    Limit(Duration),
    /// Nothing: there is more to do, after other events.
    Nothing,
}

/// One queue's receiving side.
pub(super) struct Receiver {
    ring: Ring,
    tap: Arc<Tap>,
    limit: Option<Arc<Limit>>,
    /// A frame may lie in several of the guest's buffers.
    mergeable: bool,
    /// Bytes of late frames, the largest and slowly less.
    expected: usize,
    spill: Vec<u8>,
    /// A frame with its header for which the guest had too few buffers.
    kept: Option<Vec<u8>>,
}

/// Whether there are buffers for a frame.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Room {
    Enough,
    /// When the guest offers more.
    NotYet,
    /// Not in as many pieces as the kernel takes, or all buffers of the ring.
    Never,
}

/// The guest's buffers for one round, in order; those left over are given back to the
/// ring.
#[derive(Default)]
struct Buffers<'m> {
    chains: VecDeque<(u16, GuestBuffers<'m>)>,
    bytes: usize,
    pieces: usize,
}

impl<'m> Buffers<'m> {
    fn add(&mut self, head: u16, buffers: GuestBuffers<'m>) {
        self.bytes += buffers.len();
        self.pieces += buffers.pieces();
        self.chains.push_back((head, buffers));
    }

    fn iovecs(&self) -> Vec<libc::iovec> {
        let mut iovecs = Vec::with_capacity(self.pieces + 1);
        self.chains.iter().for_each(|(_, buffers)| iovecs.extend(buffers.iovecs()));
        iovecs
    }

    /// The bytes from `offset` on, as many as there are.
    fn read_at(&self, mut offset: usize, bytes: &mut [u8]) -> usize {
        let mut read = 0;
        for (_, buffers) in &self.chains {
            if offset >= buffers.len() {
                offset -= buffers.len();
                continue;
            }
            let Some(rest) = bytes.get_mut(read..).filter(|rest| !rest.is_empty()) else { break };
            read += buffers.read_at(offset, rest);
            offset = 0;
        }
        read
    }

    fn write_at(&self, mut offset: usize, bytes: &[u8]) {
        let mut written = 0;
        for (_, buffers) in &self.chains {
            if offset >= buffers.len() {
                offset -= buffers.len();
                continue;
            }
            let Some(rest) = bytes.get(written..).filter(|rest| !rest.is_empty()) else { break };
            written += buffers.write_at(offset, rest);
            offset = 0;
        }
    }

    /// The first chains, as many as `bytes` take, with what is in each of them.
    fn used(&mut self, mut bytes: usize) -> Vec<(u16, u32)> {
        let mut used = Vec::new();
        while bytes > 0
            && let Some((head, buffers)) = self.chains.pop_front()
        {
            self.bytes -= buffers.len();
            self.pieces -= buffers.pieces();
            let now = bytes.min(buffers.len());
            used.push((head, now as u32));
            bytes -= now;
        }
        used
    }
}

impl Receiver {
    pub(super) fn new(ring: Ring, tap: Arc<Tap>, limit: Option<Arc<Limit>>, mergeable: bool) -> Self {
        Self { ring, tap, limit, mergeable, expected: FIRST_GUESS, spill: vec![0; MAX_READ], kept: None }
    }

    pub(super) fn ring(&self) -> &Ring {
        &self.ring
    }

    pub(super) fn tap(&self) -> &Tap {
        &self.tap
    }

    pub(super) fn is_limited(&self) -> bool {
        self.limit.is_some()
    }

    pub(super) fn ring_mut(&mut self) -> &mut Ring {
        &mut self.ring
    }

    /// Moves frames, [`BATCH`] at most; what it waits for then.
    pub(super) fn work(
        &mut self,
        memory: &GuestRam,
        filter: &Filter,
        counts: &mut NetCounts,
    ) -> Result<Waits, RingError> {
        self.ring.disarm(memory)?;
        let mut buffers = Buffers::default();
        let waits = self.move_frames(memory, &mut buffers, filter, counts)?;
        counts.interrupts += u64::from(self.ring.notify(memory)?);
        // Where more buffers are waited for, behind those that do not suffice.
        let more = waits == Waits::Guest && self.ring.arm(memory)?;
        self.ring.unpop(buffers.chains.len() as u16);
        Ok(if more { Waits::Nothing } else { waits })
    }

    fn move_frames<'m>(
        &mut self,
        memory: &'m GuestRam,
        buffers: &mut Buffers<'m>,
        filter: &Filter,
        counts: &mut NetCounts,
    ) -> Result<Waits, RingError> {
        let asked = self.ring.asked();
        // Of no use are as many buffers a round as there can be at a time.
        let mut refusals = self.ring.size();
        for _ in 0..BATCH {
            if asked.to_leave() {
                return Ok(Waits::Nothing);
            }
            if let Some(frame) = self.kept.take() {
                match self.gather(memory, buffers, frame.len(), &mut refusals)? {
                    Room::Enough => {
                        buffers.write_at(0, &frame);
                        self.complete(memory, buffers, frame.len(), counts)?;
                    }
                    Room::Never => counts.dropped += 1,
                    Room::NotYet => {
                        self.kept = Some(frame);
                        return Ok(if refusals == 0 { Waits::Nothing } else { Waits::Guest });
                    }
                }
                continue;
            }
            if let Some(limit) = &self.limit {
                let wait = limit.wait(Instant::now());
                if !wait.is_zero() {
                    return Ok(Waits::Limit(wait));
                }
            }
            self.gather(memory, buffers, self.expected, &mut refusals)?;
            if buffers.chains.is_empty() {
                return Ok(if refusals == 0 { Waits::Nothing } else { Waits::Guest });
            }
            let count = match self.read(buffers) {
                Ok(count) => count,
                // The tap's queue is empty, or detached, or its interface is gone.
                Err(error) => {
                    if error.kind() != io::ErrorKind::WouldBlock {
                        log::debug!("tap: {error}");
                    }
                    return Ok(Waits::Tap);
                }
            };
            if let Some(limit) = &self.limit {
                limit.take(count.saturating_sub(HEADER_BYTES) as u64, Instant::now());
            }
            self.expected = count.max(self.expected - self.expected / 16).max(FIRST_GUESS);
            self.deliver(memory, buffers, count, filter, counts, &mut refusals)?;
        }
        Ok(Waits::Nothing)
    }

    /// Takes buffers of the guest's until there is room for `bytes`, or there are no
    /// more. Where the first is of no use it is given back empty, `refusals` at most; a
    /// later one is a piece of a frame that nothing fits into.
    fn gather<'m>(
        &mut self,
        memory: &'m GuestRam,
        buffers: &mut Buffers<'m>,
        bytes: usize,
        refusals: &mut u16,
    ) -> Result<Room, RingError> {
        loop {
            if !buffers.chains.is_empty() {
                if buffers.bytes >= bytes {
                    return Ok(Room::Enough);
                }
                if !self.mergeable || buffers.chains.len() == usize::from(self.ring.size()) {
                    return Ok(Room::Never);
                }
            }
            if *refusals == 0 {
                return Ok(Room::NotYet);
            }
            let Some(chain) = self.ring.pop(memory)? else { return Ok(Room::NotYet) };
            let head = chain.head_index();
            let (_, buffer) = GuestBuffers::from_chain(memory, chain).unwrap_or_default();
            if buffers.pieces + buffer.pieces() >= MAX_PIECES && !buffers.chains.is_empty() {
                self.ring.unpop(1);
                return Ok(Room::Never);
            }
            // One piece is kept for the spill; a frame's header is in one buffer.
            if (HEADER_BYTES..).contains(&buffer.len()) && buffer.pieces() < MAX_PIECES {
                buffers.add(head, buffer);
            } else if buffers.chains.is_empty() {
                self.ring.push(memory, head, 0)?;
                *refusals -= 1;
            } else {
                buffers.add(head, GuestBuffers::default());
            }
        }
    }

    fn read(&mut self, buffers: &Buffers<'_>) -> io::Result<usize> {
        let mut iovecs = buffers.iovecs();
        iovecs.push(libc::iovec { iov_base: self.spill.as_mut_ptr().cast(), iov_len: self.spill.len() });
        self.tap.read(&iovecs)
    }

    /// A frame of `count` bytes with its header lies in the buffers, and in the spill
    /// where they did not suffice.
    fn deliver<'m>(
        &mut self,
        memory: &'m GuestRam,
        buffers: &mut Buffers<'m>,
        count: usize,
        filter: &Filter,
        counts: &mut NetCounts,
        refusals: &mut u16,
    ) -> Result<(), RingError> {
        let room = buffers.bytes;
        let wanted = filter.takes_all() || {
            let mut start = [0; LOOKED_AT];
            let inside = buffers.read_at(HEADER_BYTES, &mut start);
            let spilled = start.get_mut(inside..).unwrap_or_default();
            let known = spilled.len().min(self.spill.len());
            spilled[..known].copy_from_slice(&self.spill[..known]);
            filter.wants(start.get(..count.saturating_sub(HEADER_BYTES)).unwrap_or(&start))
        };
        let fits = count <= room || self.mergeable;
        if !wanted || !fits || !(HEADER_BYTES..=MAX_READ).contains(&count) {
            counts.dropped += 1;
            return Ok(());
        }
        if count > room {
            counts.copied += 1;
            let enough = self.gather(memory, buffers, count, refusals)? == Room::Enough;
            let tail = self.spill.get(..count - room).unwrap_or_default();
            if !enough {
                // For when it is known whether there ever will be.
                let mut frame = vec![0; room];
                buffers.read_at(0, &mut frame);
                frame.extend_from_slice(tail);
                self.kept = Some(frame);
                return Ok(());
            }
            buffers.write_at(room, tail);
        }
        self.complete(memory, buffers, count, counts)
    }

    /// Gives the guest the buffers that a frame fills.
    fn complete(
        &mut self,
        memory: &GuestRam,
        buffers: &mut Buffers<'_>,
        count: usize,
        counts: &mut NetCounts,
    ) -> Result<(), RingError> {
        let mut left = count;
        let chains = buffers.chains.iter().take_while(|(_, chain)| {
            let needed = left > 0;
            left = left.saturating_sub(chain.len());
            needed
        });
        let number = chains.count() as u16;
        buffers.write_at(NUM_BUFFERS, &number.to_le_bytes());
        let used = buffers.used(count);
        self.ring.push_all(memory, &used)?;
        counts.frames += 1;
        counts.bytes += count.saturating_sub(HEADER_BYTES) as u64;
        Ok(())
    }
}
