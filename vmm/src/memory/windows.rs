//! Files of the host's that a guest sees as memory it can only read (virtio-pmem).
//!
//! A window is an address range kept for one file at a time: addresses of the guest's
//! ([`layout::windows`](crate::arch::layout::windows)), and as many of this process's, which stay
//! its own whether there is a file or not. So what a device's thread was about to hand
//! to the host's kernel when the file goes is an address where nothing is, or the next file, and
//! never other memory of the monitor's.
//!
//! Windows are no guest memory: nothing is written there, no ring lies there, and the monitor
//! reads nothing there either, since a file that has become shorter would end it by SIGBUS. What a
//! driver wants read from there ([`GuestRam::lent`](super::GuestRam::lent)) the host's kernel reads,
//! which answers EFAULT.

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::sync::atomic::{AtomicU64, Ordering};

use thiserror::Error;
use vm_memory::mmap::MmapRegionBuilder;
use vm_memory::{GuestAddress, MmapRegion, VolatileMemory, VolatileSlice};

use super::{HUGE_PAGE, MemoryError};
use crate::arch::layout::PAGE_SIZE;

/// Windows of a machine.
pub const WINDOWS: usize = 4;

/// Why a file cannot be a guest's memory.
#[derive(Debug, Error)]
pub enum WindowError {
    /// Its size cannot be told.
    #[error("its size cannot be told")]
    Measure(#[source] io::Error),
    /// It is something else.
    #[error("it must be a regular file")]
    NotAFile,
    /// It is too large, or empty.
    #[error("it has {bytes} bytes; must have 1 to {most} (pmem_mib)")]
    Size {
        /// Its size.
        bytes: u64,
        /// That of a window.
        most: u64,
    },
    /// All are in use.
    #[error("{WINDOWS} files are there already")]
    Full,
    /// The file cannot be mapped.
    #[error("it cannot be mapped")]
    Map(#[source] io::Error),
}

/// One window.
#[derive(Debug)]
pub struct Window {
    start: GuestAddress,
    /// [`HUGE_PAGE`] more than the window has: where it begins in there is a multiple of one, without which the
    /// host's huge pages of a file would be the guest's one small page at a time.
    mapping: MmapRegion,
    bytes: usize,
    /// Bytes of it that have a file behind them, whole [`HUGE_PAGE`]s; 0 where it is free.
    lent: AtomicU64,
}

impl Window {
    /// A free one of `bytes` bytes at `start`.
    pub(super) fn new(start: u64, bytes: u64) -> Result<Self, MemoryError> {
        let mapping = MmapRegionBuilder::new((bytes + HUGE_PAGE) as usize)
            .with_mmap_prot(libc::PROT_NONE)
            .with_mmap_flags(libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE)
            .build()
            .map_err(MemoryError::Map)?;
        Ok(Self { start: GuestAddress(start), mapping, bytes: bytes as usize, lent: AtomicU64::new(0) })
    }

    /// Where the guest has it.
    pub fn start(&self) -> GuestAddress {
        self.start
    }

    /// Where it is in this process.
    pub fn as_ptr(&self) -> *mut u8 {
        self.mapping.as_ptr().wrapping_add(self.lead())
    }

    /// Bytes of the mapping before the window.
    fn lead(&self) -> usize {
        let address = self.mapping.as_ptr() as usize;
        address.next_multiple_of(HUGE_PAGE as usize) - address
    }

    /// Bytes the guest may read, whole pages of 2 MiB, which is what Linux takes memory of devices in; 0 where it is free.
    pub fn len(&self) -> u64 {
        self.lent.load(Ordering::Acquire)
    }

    /// Whether it is free.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Maps `file`, and zeroes behind its end; how many bytes that is. It is not lent yet.
    pub(super) fn map(&self, file: &File) -> Result<u64, WindowError> {
        let most = self.bytes as u64;
        let found = file.metadata().map_err(WindowError::Measure)?;
        if !found.file_type().is_file() || found.file_type().is_block_device() {
            return Err(WindowError::NotAFile);
        }
        let bytes = found.size();
        if !(1..=most).contains(&bytes) {
            return Err(WindowError::Size { bytes, most });
        }
        // The rest of a last page that is not whole reads as zeroes.
        let in_file = bytes.next_multiple_of(PAGE_SIZE);
        let whole = bytes.next_multiple_of(HUGE_PAGE);
        let file_flags = libc::MAP_SHARED | libc::MAP_NORESERVE;
        let mapped = self
            .put(0, in_file, libc::PROT_READ, file_flags, file.as_raw_fd())
            .and_then(|()| self.put(in_file, whole - in_file, libc::PROT_READ, NO_FILE, -1));
        match mapped {
            Ok(()) => Ok(whole),
            Err(error) => {
                self.take_back();
                Err(WindowError::Map(error))
            }
        }
    }

    /// From now on drivers may have it read.
    pub(super) fn lend(&self, bytes: u64) {
        self.lent.store(bytes, Ordering::Release);
    }

    /// Lets go of the file.
    pub(super) fn take_back(&self) {
        self.lent.store(0, Ordering::Release);
        if let Err(error) = self.put(0, self.bytes as u64, libc::PROT_NONE, NO_FILE, -1) {
            log::error!("a file stays mapped: {error}");
        }
    }

    /// What is at `bytes` bytes from `address`, if all of it is lent.
    pub(super) fn slice(&self, address: GuestAddress, bytes: usize) -> Option<VolatileSlice<'_>> {
        let offset = address.0.checked_sub(self.start.0)?;
        let end = offset.checked_add(bytes as u64)?;
        if end > self.len() {
            return None;
        }
        self.mapping.get_slice(self.lead() + usize::try_from(offset).ok()?, bytes).ok()
    }

    /// Exchanges what is behind `bytes` bytes from `offset`, whole pages.
    fn put(
        &self,
        offset: u64,
        bytes: u64,
        protection: libc::c_int,
        flags: libc::c_int,
        fd: libc::c_int,
    ) -> io::Result<()> {
        if bytes == 0 {
            return Ok(());
        }
        assert!(offset + bytes <= self.bytes as u64, "not a part of the window");
        let place = self.as_ptr().wrapping_add(offset as usize);
        // SAFETY: the range was just checked to lie inside the window's own mapping, to which there
        // are no references: only the host's kernel ever reads it.
        let mapped =
            unsafe { libc::mmap(place.cast(), bytes as usize, protection, flags | libc::MAP_FIXED, fd, 0) };
        if mapped == libc::MAP_FAILED { Err(io::Error::last_os_error()) } else { Ok(()) }
    }
}

const NO_FILE: libc::c_int = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE;

#[cfg(test)]
mod tests {
    use std::io::Write;

    use super::*;

    const START: u64 = 4 << 30;

    fn window() -> Window {
        Window::new(START, 8 << 20).unwrap()
    }

    fn file(bytes: usize) -> File {
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(&vec![7; bytes]).unwrap();
        file
    }

    /// What the host's kernel reads there.
    fn read(window: &Window, offset: usize) -> io::Result<u8> {
        let (reader, writer) = io::pipe().unwrap();
        // SAFETY: the kernel reads one byte, or says that it cannot.
        let written =
            unsafe { libc::write(writer.as_raw_fd(), window.as_ptr().wrapping_add(offset).cast(), 1) };
        if written != 1 {
            return Err(io::Error::last_os_error());
        }
        let mut byte = [0];
        io::Read::read_exact(&mut &reader, &mut byte)?;
        Ok(byte[0])
    }

    fn lend(window: &Window, file: &File) -> u64 {
        let bytes = window.map(file).unwrap();
        window.lend(bytes);
        bytes
    }

    #[test]
    fn a_file_is_there_with_zeroes_to_the_next_huge_page() {
        let window = window();
        assert_eq!(window.as_ptr() as u64 % HUGE_PAGE, 0);
        assert_eq!(lend(&window, &file(5000)), HUGE_PAGE);
        for (offset, byte) in [(0, 7), (4999, 7), (5000, 0), (8192, 0), ((2 << 20) - 1, 0)] {
            assert_eq!(read(&window, offset).unwrap(), byte, "{offset}");
        }
        assert_eq!(read(&window, 2 << 20).unwrap_err().raw_os_error(), Some(libc::EFAULT));
        assert!(window.slice(GuestAddress(START + (2 << 20) - 4), 4).is_some());
        for (address, bytes) in
            [(START + (2 << 20) - 4, 5), (START - 1, 2), (u64::MAX, 1), (START, usize::MAX)]
        {
            assert!(window.slice(GuestAddress(address), bytes).is_none(), "{address:#x} {bytes}");
        }
    }

    #[test]
    fn one_that_was_taken_back_is_nothing_until_the_next() {
        let window = window();
        lend(&window, &file(3 << 20));
        window.take_back();
        assert!(window.is_empty() && window.slice(GuestAddress(START), 1).is_none());
        assert_eq!(read(&window, 0).unwrap_err().raw_os_error(), Some(libc::EFAULT));
        assert_eq!(lend(&window, &file(1)), HUGE_PAGE);
        assert_eq!(read(&window, 0).unwrap(), 7);
        assert_eq!(read(&window, (2 << 20) + 1).unwrap_err().raw_os_error(), Some(libc::EFAULT));
    }

    #[test]
    fn a_file_that_has_become_shorter_is_an_error_of_who_reads() {
        let window = window();
        let file = file(64 << 10);
        lend(&window, &file);
        file.set_len(4096).unwrap();
        assert_eq!(read(&window, 0).unwrap(), 7);
        assert_eq!(read(&window, 8192).unwrap_err().raw_os_error(), Some(libc::EFAULT));
    }

    #[test]
    fn what_cannot_be_one_is_named() {
        let window = window();
        let error = |file: &File| window.map(file).unwrap_err().to_string();
        assert_eq!(error(&file(0)), "it has 0 bytes; must have 1 to 8388608 (pmem_mib)");
        let large = file(1);
        large.set_len((8 << 20) + 1).unwrap();
        assert!(error(&large).contains("8388609 bytes"));
        assert_eq!(error(&File::open("/dev/zero").unwrap()), "it must be a regular file");
        let written = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(written.path(), "x").unwrap();
        let unreadable = File::options().write(true).open(written.path()).unwrap();
        assert_eq!(error(&unreadable), "it cannot be mapped");
        assert!(window.is_empty());
    }
}
