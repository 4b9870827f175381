//! From the guest to the tap.

use std::sync::Arc;
use std::time::Instant;

use rvm_protocol::vmm::NetCounts;

use super::limit::Limit;
use super::receive::Waits;
use super::tap::Tap;
use super::{BATCH, HEADER_BYTES, MAX_FRAME_BYTES};
use crate::devices::virtio::buffers::GuestBuffers;
use crate::devices::virtio::ring::{Ring, RingError};
use crate::memory::GuestRam;

/// An Ethernet header.
const MIN_FRAME_BYTES: usize = 14;

/// One queue's transmitting side.
pub(super) struct Transmitter {
    ring: Ring,
    tap: Arc<Tap>,
    limit: Option<Arc<Limit>>,
}

impl Transmitter {
    pub(super) fn new(ring: Ring, tap: Arc<Tap>, limit: Option<Arc<Limit>>) -> Self {
        Self { ring, tap, limit }
    }

    pub(super) fn ring(&self) -> &Ring {
        &self.ring
    }

    pub(super) fn is_limited(&self) -> bool {
        self.limit.is_some()
    }

    pub(super) fn ring_mut(&mut self) -> &mut Ring {
        &mut self.ring
    }

    /// Moves frames, [`BATCH`] at most; what it waits for then.
    pub(super) fn work(&mut self, memory: &GuestRam, counts: &mut NetCounts) -> Result<Waits, RingError> {
        self.ring.disarm(memory)?;
        let waits = self.move_frames(memory, counts)?;
        counts.interrupts += u64::from(self.ring.notify(memory)?);
        let more = waits == Waits::Guest && self.ring.arm(memory)?;
        Ok(if more { Waits::Nothing } else { waits })
    }

    fn move_frames(&mut self, memory: &GuestRam, counts: &mut NetCounts) -> Result<Waits, RingError> {
        let asked = self.ring.asked();
        for _ in 0..BATCH {
            if asked.to_leave() {
                return Ok(Waits::Nothing);
            }
            if let Some(limit) = &self.limit {
                let wait = limit.wait(Instant::now());
                if !wait.is_zero() {
                    return Ok(Waits::Limit(wait));
                }
            }
            let Some(chain) = self.ring.pop(memory)? else { return Ok(Waits::Guest) };
            let head = chain.head_index();
            let sent = GuestBuffers::with_lent(memory, chain).ok().and_then(|(frame, _)| self.send(&frame));
            match sent {
                Some(bytes) => {
                    counts.frames += 1;
                    counts.bytes += bytes;
                }
                None => counts.dropped += 1,
            }
            self.ring.push(memory, head, 0)?;
        }
        Ok(Waits::Nothing)
    }

    /// Hands a frame behind its header to the host's kernel; its bytes, or none where
    /// it is no frame or is refused: then it is lost, as on a wire.
    fn send(&self, frame: &GuestBuffers<'_>) -> Option<u64> {
        let bytes = frame.len().checked_sub(HEADER_BYTES)?;
        if !(MIN_FRAME_BYTES..=MAX_FRAME_BYTES).contains(&bytes) {
            return None;
        }
        if let Some(limit) = &self.limit {
            limit.take(bytes as u64, Instant::now());
        }
        match self.tap.write(&frame.iovecs()) {
            Ok(_) => Some(bytes as u64),
            Err(error) => {
                log::debug!("tap: {error}");
                None
            }
        }
    }
}
