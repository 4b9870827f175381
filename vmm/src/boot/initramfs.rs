//! Maps the initramfs into guest memory.
//!
//! Our guest kernel makes whole pages of it pages of the files in it (decision 0105), so
//! that all guests of a host share them; what is left it has for other things.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

use thiserror::Error;

use crate::arch::layout::PAGE_SIZE;
use crate::memory::{self, GuestRam, HUGE_PAGE, MemoryError};

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
    /// It could not be mapped into guest memory.
    #[error(transparent)]
    Memory(#[from] MemoryError),
}

/// An initramfs in guest memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LoadedInitramfs {
    /// Its first address, at the beginning of a page.
    pub address: u64,
    /// Its size in bytes.
    pub size: u64,
}

/// Maps `file`, copy-on-write, above `kernel_end` into low memory (`low_memory` bytes).
pub fn load(
    memory: &GuestRam,
    file: &File,
    kernel_end: u64,
    low_memory: u64,
) -> Result<LoadedInitramfs, InitramfsError> {
    let size = file.metadata().map_err(InitramfsError::Read)?.len();
    check(file, size)?;
    let room = |boundary| {
        let start = kernel_end.next_multiple_of(boundary);
        (start, low_memory.saturating_sub(start))
    };
    let (first, free) = room(PAGE_SIZE);
    let pages = size.checked_next_multiple_of(PAGE_SIZE).filter(|&p| p <= free);
    let Some(pages) = pages else { return Err(InitramfsError::Space { size, free }) };
    // A huge page that is partly the file's is none: Linux takes what it needs first from the end of memory.
    let address = Some(room(HUGE_PAGE)).filter(|(_, free)| pages <= *free).map_or(first, |(start, _)| start);
    memory::map_file(memory, address, file, 0, size)?;
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
    fn lies_behind_the_kernel_in_huge_pages_of_its_own_where_there_is_room() {
        let memory = memory::create(16 << 20).unwrap();
        let bytes = archive();
        let near_the_end = (16 << 20) - 0x3000;
        for (kernel_end, address) in
            [(8 << 20, 8 << 20), ((8 << 20) + 1, 10 << 20), (near_the_end + 1, near_the_end + 0x1000)]
        {
            let loaded = load(&memory, &file(&bytes), kernel_end, 16 << 20).unwrap();
            assert_eq!(loaded, LoadedInitramfs { address, size: bytes.len() as u64 });
            let mut seen = vec![0; bytes.len()];
            memory.read_slice(&mut seen, GuestAddress(loaded.address)).unwrap();
            assert_eq!(seen, bytes);
        }
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
