//! Puts the kernel into guest memory, copying only its data.

use std::fs::File;

use thiserror::Error;

use super::elf::{self, ElfError};
use crate::arch::layout::{BOOT_MAPPED_END, HIGH_RAM_START};
use crate::memory::{self, GuestRam, MemoryError};

/// Why the kernel could not be loaded.
#[derive(Debug, Error)]
pub enum KernelError {
    /// The file is not a kernel.
    #[error(transparent)]
    Elf(#[from] ElfError),
    /// A segment lies where no kernel may be.
    #[error(
        "its segment at {start:#x} to {end:#x} lies outside the memory a kernel may use, {low:#x} to {high:#x}"
    )]
    Place {
        /// First address of the segment.
        start: u64,
        /// Address after its last.
        end: u64,
        /// First address that would be right.
        low: u64,
        /// Address after the last that would be right.
        high: u64,
    },
    /// A segment could not be mapped or read.
    #[error(transparent)]
    Memory(#[from] MemoryError),
}

/// A kernel in guest memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LoadedKernel {
    /// Physical address of the 64-bit entry point.
    pub entry: u64,
    /// Address after the last byte it occupies.
    pub end: u64,
}

/// Puts the segments of the ELF kernel `file` to their physical addresses.
/// `low_memory` is the size of the memory below the hole.
///
/// What is run or only read is mapped: until the guest writes to a page, all guests
/// of a host share it. Data is read, since every page of it is written to.
///
/// Zero-initialised data needs no work: new guest memory is zero.
pub fn load(memory: &GuestRam, file: &File, low_memory: u64) -> Result<LoadedKernel, KernelError> {
    let image = elf::parse(file)?;
    let (low, high) = (HIGH_RAM_START, low_memory.min(BOOT_MAPPED_END));
    let mut kernel_end = low;
    // The mapped ones first: what lies beside them is not to come in huge pages.
    let in_turn = |data| image.segments.iter().filter(move |segment| segment.data == data);
    for segment in in_turn(false).chain(in_turn(true)) {
        let (start, end) = (segment.address, segment.address + segment.memory_size);
        if start < low || end > high {
            return Err(KernelError::Place { start, end, low, high });
        }
        let load = if segment.data { memory::read_file } else { memory::map_file };
        load(memory, start, file, segment.offset, segment.file_size)?;
        kernel_end = kernel_end.max(end);
    }
    Ok(LoadedKernel { entry: image.entry, end: kernel_end })
}

#[cfg(test)]
mod tests {
    use vm_memory::{Bytes, GuestAddress};

    use super::*;
    use crate::boot::elf::Segment;
    use crate::boot::elf::tests::{file, image};

    fn kernel(address: u64, data: bool) -> File {
        let segment = Segment { offset: 0x1000, file_size: 0x1800, address, memory_size: 0x4000, data };
        let mut bytes = image(address + 0x40, &[segment], 0x3000);
        bytes[0x1000..0x2800].fill(0xaa);
        bytes[0x2800..].fill(0xbb);
        file(&bytes)
    }

    #[test]
    fn segment_is_loaded_and_its_rest_is_zero() {
        for data in [false, true] {
            let memory = memory::create(32 << 20).unwrap();
            let loaded = load(&memory, &kernel(0x100_0000, data), 32 << 20).unwrap();
            assert_eq!(loaded, LoadedKernel { entry: 0x100_0040, end: 0x100_4000 });
            let mut seen = vec![0; 0x4000];
            memory.read_slice(&mut seen, GuestAddress(0x100_0000)).unwrap();
            assert!(seen[..0x1800].iter().all(|&b| b == 0xaa));
            assert!(
                seen[0x1800..].iter().all(|&b| b == 0),
                "bytes after the segment must not come from the file"
            );
        }
    }

    #[test]
    fn kernel_outside_memory_is_refused() {
        let memory = memory::create(32 << 20).unwrap();
        for address in [0, 0xf_f000, (32 << 20) - 0x1000, 4 << 30] {
            let refused = load(&memory, &kernel(address, false), 32 << 20);
            assert!(matches!(refused, Err(KernelError::Place { .. })), "{address:#x}: {refused:?}");
        }
    }
}
