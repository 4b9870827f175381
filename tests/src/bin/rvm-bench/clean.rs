//! Takes from free memory what an earlier run left in it.
//!
//! An emulator keeps the code it has translated until somebody writes to the page
//! it was in, and each such write is slow. A guest whose memory was another's
//! kernel a moment ago pays for that: in the devhost some 180 ms of a start, and
//! whoever came after the largest kernel paid most. On hardware it changes nothing.

use std::{io, ptr};

use anyhow::{Context, Result};

/// More than a run of any kind takes.
const LEN: usize = 512 << 20;

/// Writes to the pages that were freed last and will be given out first.
pub fn free_memory() -> Result<()> {
    let (protection, flags) = (libc::PROT_READ | libc::PROT_WRITE, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS);
    // SAFETY: a new mapping at an address of the kernel's choice.
    let start = unsafe { libc::mmap(ptr::null_mut(), LEN, protection, flags, -1, 0) };
    if start == libc::MAP_FAILED {
        return Err(io::Error::last_os_error()).context("mapping memory to clean");
    }
    // Single pages: huge ones would leave all that is in smaller pieces as it is. The kernel writes
    // zeros to each.
    let cleaned = [libc::MADV_NOHUGEPAGE, libc::MADV_POPULATE_WRITE].iter().try_for_each(|&advice| {
        // SAFETY: the mapping was just made, and nothing refers to what is in it.
        match unsafe { libc::madvise(start, LEN, advice) } {
            0 => Ok(()),
            _ => Err(io::Error::last_os_error()),
        }
    });
    // SAFETY: as above; it is not used after this.
    unsafe { libc::munmap(start, LEN) };
    cleaned.context("cleaning free memory")
}
