//! The device's configuration space: what its owner wants and what the guest
//! has. A vCPU reads it, the owner and the device's thread write to it, nobody
//! waits for anybody.

use std::ops::Range;
use std::sync::atomic::{AtomicU8, AtomicU64, Ordering};

use super::BLOCK_BYTES;

/// Bytes of `struct virtio_mem_config` (section 5.15.4).
const CONFIG_BYTES: usize = 56;

/// The registers.
#[derive(Debug)]
pub struct Registers {
    /// Guest address of the region.
    pub start: u64,
    /// Bytes of the region.
    pub size: u64,
    usable: AtomicU64,
    requested: AtomicU64,
    plugged: AtomicU64,
    generation: AtomicU8,
}

impl Registers {
    /// Of a region of `size` bytes at `start`, nothing of it usable.
    pub fn new(start: u64, size: u64) -> Self {
        Self {
            start,
            size,
            usable: AtomicU64::new(0),
            requested: AtomicU64::new(0),
            plugged: AtomicU64::new(0),
            generation: AtomicU8::new(0),
        }
    }

    /// Lets the guest plug up to `requested` bytes within the first `usable`.
    /// The usable part never shrinks: blocks at its end may be plugged.
    ///
    /// A driver that reads a number in halves meanwhile, before the generation
    /// is another, may get halves of two: the interrupt that follows has it read
    /// them again.
    pub fn request(&self, usable: u64, requested: u64) {
        let usable = usable.min(self.size);
        let usable = self.usable.fetch_max(usable, Ordering::AcqRel).max(usable);
        self.requested.store(requested.min(usable), Ordering::Release);
        self.generation.fetch_add(1, Ordering::AcqRel);
    }

    /// Bytes in which blocks can be plugged.
    pub fn usable(&self) -> u64 {
        self.usable.load(Ordering::Acquire)
    }

    /// Bytes the guest should have plugged.
    pub fn requested(&self) -> u64 {
        self.requested.load(Ordering::Acquire)
    }

    /// Bytes it has plugged.
    pub fn plugged(&self) -> u64 {
        self.plugged.load(Ordering::Acquire)
    }

    /// Notes how many blocks are plugged.
    pub fn set_plugged(&self, blocks: u64) {
        self.plugged.store(blocks * BLOCK_BYTES, Ordering::Release);
    }

    /// Another number after each [`Registers::request`].
    pub fn generation(&self) -> u8 {
        self.generation.load(Ordering::Acquire)
    }

    /// `struct virtio_mem_config`.
    pub fn config(&self) -> [u8; CONFIG_BYTES] {
        let mut config = [0; CONFIG_BYTES];
        // The second field is the memory node, which has a feature of its own.
        let fields = [BLOCK_BYTES, 0, self.start, self.size, self.usable(), self.plugged(), self.requested()];
        for (place, field) in config.chunks_exact_mut(8).zip(fields) {
            place.copy_from_slice(&field.to_le_bytes());
        }
        config
    }

    /// The blocks of the first `bytes` of the region.
    pub fn all(&self, bytes: u64) -> Range<u64> {
        0..bytes / BLOCK_BYTES
    }

    /// The blocks a request names, if they are blocks of the usable part.
    pub fn blocks(&self, address: u64, count: u16) -> Option<Range<u64>> {
        let offset = address.checked_sub(self.start)?;
        let end = offset.checked_add(u64::from(count) * BLOCK_BYTES)?;
        let valid = count > 0 && offset.is_multiple_of(BLOCK_BYTES) && end <= self.usable();
        valid.then_some(offset / BLOCK_BYTES..end / BLOCK_BYTES)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const START: u64 = 4 << 30;

    #[test]
    fn only_blocks_of_the_usable_part_are_named() {
        let registers = Registers::new(START, 1 << 30);
        assert_eq!(registers.blocks(START, 1), None);
        registers.request(256 << 20, 128 << 20);
        assert_eq!(registers.blocks(START, 1), Some(0..1));
        assert_eq!(registers.blocks(START + (254 << 20), 1), Some(127..128));
        for (address, count) in [
            (START, 0),
            (START, 129),
            (START, u16::MAX),
            (START + 4096, 1),
            (START + (254 << 20), 2),
            (START + (256 << 20), 1),
            (START - BLOCK_BYTES, 1),
            (0, 1),
            (u64::MAX, 1),
            (u64::MAX - BLOCK_BYTES + 1, u16::MAX),
        ] {
            assert_eq!(registers.blocks(address, count), None, "{address:#x} {count}");
        }
    }

    #[test]
    fn the_usable_part_grows_only() {
        let registers = Registers::new(START, 1 << 30);
        let both = || (registers.usable(), registers.requested());
        registers.request(256 << 20, 128 << 20);
        let generation = registers.generation();
        registers.request(128 << 20, 2 << 20);
        assert_eq!(both(), (256 << 20, 2 << 20));
        assert_ne!(registers.generation(), generation);
        registers.request(u64::MAX, u64::MAX);
        assert_eq!(both(), (1 << 30, 1 << 30));
        registers.request(0, 0);
        assert_eq!(both(), (1 << 30, 0));
    }
}
