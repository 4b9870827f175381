//! Memory whose physical addresses are known: what a device can be pointed at.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::ptr::{self, NonNull};

use crate::Result;

/// Bytes of a huge page.
const HUGE: usize = 2 << 20;
const PAGE: usize = 4096;

/// Huge pages, each of which is contiguous for a device, handed out from the front.
pub struct Memory {
    page: Piece,
    used: usize,
}

/// Contiguous memory. The kernel does not move huge pages, and nothing unmaps them.
#[derive(Clone, Copy)]
pub struct Piece {
    start: NonNull<u8>,
    /// Where the device sees it.
    pub physical: u64,
    /// Bytes.
    pub len: usize,
}

impl Memory {
    /// Takes a first page.
    pub fn new() -> Result<Self> {
        Ok(Self { page: huge_page()?, used: 0 })
    }

    /// Zeroed memory of `len` bytes, 2 MiB at most, aligned to a page.
    pub fn take(&mut self, len: usize) -> Result<Piece> {
        let len = len.next_multiple_of(PAGE);
        if len > HUGE - self.used {
            self.page = huge_page()?;
            self.used = 0;
        }
        let piece = self.page.part(self.used, len);
        self.used += len;
        Ok(piece)
    }
}

impl Piece {
    /// `len` bytes from `offset` on.
    pub fn part(&self, offset: usize, len: usize) -> Self {
        assert!(offset.checked_add(len).is_some_and(|end| end <= self.len), "a part of a piece lies in it");
        // SAFETY: within the piece, as was just checked.
        let start = unsafe { self.start.add(offset) };
        Self { start, physical: self.physical + offset as u64, len }
    }

    /// Stores a value where the device sees it at once.
    pub fn put<T: Copy>(&self, offset: usize, value: T) {
        let place: *mut T = self.part(offset, size_of::<T>()).start.as_ptr().cast();
        assert!(place.is_aligned());
        // SAFETY: mapped, aligned and large enough; the device's accesses are the hardware's.
        unsafe { ptr::write_volatile(place, value) }
    }

    /// Loads what the device may have stored.
    pub fn get<T: Copy>(&self, offset: usize) -> T {
        let place: *const T = self.part(offset, size_of::<T>()).start.as_ptr().cast();
        assert!(place.is_aligned());
        // SAFETY: as for `put`; only integers are read.
        unsafe { ptr::read_volatile(place) }
    }

    /// Stores bytes.
    pub fn write(&self, offset: usize, bytes: &[u8]) {
        for (index, byte) in bytes.iter().enumerate() {
            self.put(offset + index, *byte);
        }
    }

    /// Loads bytes.
    pub fn read(&self, offset: usize, len: usize) -> Vec<u8> {
        (offset..offset + len).map(|at| self.get(at)).collect()
    }
}

/// Keeps what the program is made of in memory: it may lie in a share.
pub fn keep_all() -> Result<()> {
    // SAFETY: plain system call.
    if unsafe { libc::mlockall(libc::MCL_CURRENT | libc::MCL_FUTURE) } == 0 {
        Ok(())
    } else {
        Err(std::io::Error::last_os_error().into())
    }
}

/// One more huge page of the kernel's, mapped.
fn huge_page() -> Result<Piece> {
    const COUNT: &str = "/proc/sys/vm/nr_hugepages";
    let count: usize = std::fs::read_to_string(COUNT)?.trim().parse()?;
    std::fs::write(COUNT, (count + 1).to_string())?;
    let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_HUGETLB | libc::MAP_POPULATE;
    // SAFETY: a new mapping, which nobody has yet.
    let start =
        unsafe { libc::mmap(ptr::null_mut(), HUGE, libc::PROT_READ | libc::PROT_WRITE, flags, -1, 0) };
    if start == libc::MAP_FAILED {
        return Err(std::io::Error::last_os_error().into());
    }
    let start = NonNull::new(start.cast::<u8>()).ok_or("mapped at 0")?;
    // Written to, so that it is a page of its own.
    // SAFETY: mapped just now, for writing.
    unsafe { ptr::write_bytes(start.as_ptr(), 0, HUGE) };
    Ok(Piece { start, physical: physical(start.as_ptr() as usize)?, len: HUGE })
}

/// Where a page of this process lies (`proc_pid_pagemap(5)`).
fn physical(address: usize) -> Result<u64> {
    const PRESENT: u64 = 1 << 63;
    const FRAME: u64 = (1 << 55) - 1;
    let mut entry = [0; 8];
    let offset = (address / PAGE * entry.len()) as u64;
    File::open("/proc/self/pagemap")?.read_exact_at(&mut entry, offset)?;
    let entry = u64::from_le_bytes(entry);
    if entry & PRESENT == 0 || entry & FRAME == 0 {
        return Err(format!("/proc/self/pagemap says {entry:#x}").into());
    }
    Ok((entry & FRAME) * PAGE as u64)
}
