//! Reads the initramfs into guest memory.
//!
//! The guest unpacks it, which is to copy it, and then has the memory for other
//! things; all of that is cheaper in pages of its own than in the file's.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

use thiserror::Error;

use crate::arch::layout::PAGE_SIZE;
use crate::memory::{self, GuestRam, MemoryError};

/// Why the initramfs could not be loaded.
#[derive(Debug, Error)]
pub enum InitramfsError {
    /// The file could not be read.
    #[error("it cannot be read")]
    Read(#[source] io::Error),
    /// The file is neither a cpio archive nor compressed.
    #[error("it is neither a newc cpio archive nor a compressed one")]
    Format,
    /// The archive is damaged.
    #[error("its cpio archive is damaged at byte {0}")]
    Damaged(u64),
    /// It does not fit beside the kernel.
    #[error("its {size} bytes do not fit into guest memory above the kernel ({free} bytes free)")]
    Space {
        /// Size of the file.
        size: u64,
        /// Room above the kernel.
        free: u64,
    },
    /// It could not be read into guest memory.
    #[error(transparent)]
    Memory(#[from] MemoryError),
}

/// An initramfs in guest memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LoadedInitramfs {
    /// Its first address, page aligned.
    pub address: u64,
    /// Its size in bytes.
    pub size: u64,
}

/// Reads `file` to the end of low memory (`low_memory` bytes), above `kernel_end`.
pub fn load(
    memory: &GuestRam,
    file: &File,
    kernel_end: u64,
    low_memory: u64,
) -> Result<LoadedInitramfs, InitramfsError> {
    let size = file.metadata().map_err(InitramfsError::Read)?.len();
    check(file, size)?;
    let free = low_memory.saturating_sub(kernel_end.next_multiple_of(PAGE_SIZE));
    let pages = size.checked_next_multiple_of(PAGE_SIZE).filter(|&p| p <= free);
    let Some(pages) = pages else { return Err(InitramfsError::Space { size, free }) };
    let address = low_memory - low_memory % PAGE_SIZE - pages;
    memory::read_file(memory, address, file, 0, size)?;
    Ok(LoadedInitramfs { address, size })
}

/// First bytes of compressed archives the kernel may be able to unpack; which
/// ones it can is its configuration's affair.
const COMPRESSED: [&[u8]; 7] = [
    b"\x1f\x8b",         // gzip
    b"BZh",              // bzip2
    b"\x5d\x00\x00",     // lzma
    b"\xfd7zXZ\x00",     // xz
    b"\x89LZO",          // lzo
    b"\x02\x21\x4c\x18", // lz4
    b"\x28\xb5\x2f\xfd", // zstd
];

const CPIO_HEADER_SIZE: usize = 110;
/// Enough entries for any initramfs that should be one; checking stops there.
const MAX_CHECKED_ENTRIES: usize = 4096;

/// A damaged archive gives a kernel panic and a guest that never answers; it is
/// cheaper for everyone to see it here. Walks the headers of the first archive.
fn check(file: &File, size: u64) -> Result<(), InitramfsError> {
    let mut start = [0; 6];
    if size < start.len() as u64 {
        return Err(InitramfsError::Format);
    }
    file.read_exact_at(&mut start, 0).map_err(InitramfsError::Read)?;
    if COMPRESSED.iter().any(|magic| start.starts_with(magic)) {
        return Ok(());
    }
    if !is_cpio(&start) {
        return Err(InitramfsError::Format);
    }
    let mut at = 0u64;
    for _ in 0..MAX_CHECKED_ENTRIES {
        let Some(entry) = read_entry(file, at, size)? else { return Err(InitramfsError::Damaged(at)) };
        if entry.is_trailer {
            return Ok(());
        }
        at = entry.next;
    }
    Ok(())
}

fn is_cpio(magic: &[u8]) -> bool {
    magic.starts_with(b"070701") || magic.starts_with(b"070702")
}

struct Entry {
    next: u64,
    is_trailer: bool,
}

/// Reads the header at `at`; `None` where there is no whole, well-formed entry.
fn read_entry(file: &File, at: u64, size: u64) -> Result<Option<Entry>, InitramfsError> {
    const TRAILER: &[u8] = b"TRAILER!!!\0";
    let mut bytes = [0; CPIO_HEADER_SIZE + TRAILER.len()];
    let Some(room) = size.checked_sub(at).filter(|&r| r >= bytes.len() as u64) else { return Ok(None) };
    file.read_exact_at(&mut bytes, at).map_err(InitramfsError::Read)?;
    let (header, name) = bytes.split_at(CPIO_HEADER_SIZE);
    let field = |index: usize| {
        let digits = std::str::from_utf8(&header[6 + index * 8..14 + index * 8]).ok()?;
        u64::from_str_radix(digits, 16).ok()
    };
    let (Some(data_size), Some(name_size), true) = (field(6), field(11), is_cpio(header)) else {
        return Ok(None);
    };
    // Both are below 2^32 and `room` is a file's size: no sum here can wrap.
    let data = (CPIO_HEADER_SIZE as u64 + name_size).next_multiple_of(4);
    let end = (data + data_size).next_multiple_of(4);
    let is_trailer = name == TRAILER;
    if name_size == 0 || (end > room && !is_trailer) {
        return Ok(None);
    }
    Ok(Some(Entry { next: at + end, is_trailer }))
}

#[cfg(test)]
mod tests {
    use vm_memory::{Bytes, GuestAddress};

    use super::*;
    use crate::boot::elf::tests::file;

    fn entry(name: &str, data: &[u8]) -> Vec<u8> {
        let mut bytes = b"070701".to_vec();
        for field in [1, 0o100755, 0, 0, 1, 0, data.len(), 0, 0, 0, 0, name.len() + 1, 0] {
            bytes.extend(format!("{field:08x}").into_bytes());
        }
        bytes.extend(name.as_bytes());
        bytes.push(0);
        bytes.resize(bytes.len().next_multiple_of(4), 0);
        bytes.extend(data);
        bytes.resize(bytes.len().next_multiple_of(4), 0);
        bytes
    }

    fn archive() -> Vec<u8> {
        [entry("init", &[0x90; 5001]), entry("TRAILER!!!", b"")].concat()
    }

    #[test]
    fn lies_page_aligned_at_the_end_of_memory() {
        let memory = memory::create(16 << 20).unwrap();
        let bytes = archive();
        let loaded = load(&memory, &file(&bytes), 8 << 20, 16 << 20).unwrap();
        assert_eq!(loaded, LoadedInitramfs { address: (16 << 20) - 0x2000, size: bytes.len() as u64 });
        let mut seen = vec![0; bytes.len()];
        memory.read_slice(&mut seen, GuestAddress(loaded.address)).unwrap();
        assert_eq!(seen, bytes);
    }

    #[test]
    fn too_large_is_refused() {
        let memory = memory::create(16 << 20).unwrap();
        let refused = load(&memory, &file(&archive()), (16 << 20) - 0x1000, 16 << 20);
        assert!(matches!(refused, Err(InitramfsError::Space { free: 0x1000, .. })), "{refused:?}");
    }

    #[test]
    fn damage_is_named() {
        let checked = |bytes: &[u8]| check(&file(bytes), bytes.len() as u64);
        let good = archive();
        assert!(checked(&good).is_ok());
        assert!(matches!(checked(b"not an archive"), Err(InitramfsError::Format)));
        assert!(matches!(checked(b""), Err(InitramfsError::Format)));
        assert!(matches!(checked(&good[..3000]), Err(InitramfsError::Damaged(0))));
        let second = entry("init", &[0x90; 5001]).len();
        assert!(matches!(checked(&good[..second]), Err(InitramfsError::Damaged(at)) if at == second as u64));
        let mut bad = good.clone();
        bad[second] = b'x';
        assert!(matches!(checked(&bad), Err(InitramfsError::Damaged(at)) if at == second as u64));
        let mut endless = good;
        endless[94..102].copy_from_slice(b"ffffffff");
        assert!(matches!(checked(&endless), Err(InitramfsError::Damaged(0))));
    }
}
