//! Leaves an image in the host's page cache in pages of 2 MiB.
//!
//! A guest reads an image where the host has it, and each page that it touches for the first time is an exit. Of a page
//! of 2 MiB there is one for all that is in it. Linux has files in such pages in one of two ways: it exchanges
//! small ones where it is told to (`MADV_COLLAPSE`, madvise(2), from 6.1 on: a tmpfs, and with
//! `CONFIG_READ_ONLY_THP_FOR_FS` other file systems), or the file system reads into large ones (folios: XFS from 5.18 on, ext4 from
//! 6.16 on) what is mapped by who asks for them.

use std::{
    fs::{self, File},
    io,
    ops::Range,
    os::fd::AsRawFd,
    ptr,
};

use crate::huge_pages;

const HUGE_PAGE: usize = huge_pages::BYTES as usize;
/// Not in every libc.
const MADV_COLLAPSE: libc::c_int = 25;

/// Brings what the page cache has of `file`, which is on the disk and which nobody has open for writing, into pages of
/// 2 MiB; whether it is in them. The file is as it was either way.
pub fn gather(file: &File) -> io::Result<bool> {
    let length = usize::try_from(file.metadata()?.len()).map_err(io::Error::other)?;
    let whole = length - length % HUGE_PAGE;
    if whole == 0 {
        return Ok(false);
    }
    let mapping = Mapping::new(file, whole)?;
    let pages = || (0..whole).step_by(HUGE_PAGE).map(|from| from..from + HUGE_PAGE);
    if mapping.exchange(0..HUGE_PAGE).is_ok() {
        // What is in use just then stays as it is.
        pages().skip(1).for_each(|page| drop(mapping.exchange(page)));
        return Ok(true);
    }
    // Once more: what is mapped is not forgotten, and where small pages were is a table for them.
    drop(mapping);
    let mapping = Mapping::new(file, whole)?;
    mapping.advise(0..whole, libc::MADV_HUGEPAGE)?;
    for page in pages() {
        forget(file, page.start)?;
        mapping.advise(page.clone(), libc::MADV_POPULATE_READ)?;
        // Where the first are none, no others are read once more.
        if page.start == 0 && !mapping.is_huge()? {
            return Ok(false);
        }
    }
    Ok(true)
}

/// Lets the page cache have nothing of a page of 2 MiB.
fn forget(file: &File, from: usize) -> io::Result<()> {
    let (from, length) = (from as libc::off_t, HUGE_PAGE as libc::off_t);
    // SAFETY: the call takes numbers.
    match unsafe { libc::posix_fadvise(file.as_raw_fd(), from, length, libc::POSIX_FADV_DONTNEED) } {
        0 => Ok(()),
        error => Err(io::Error::from_raw_os_error(error)),
    }
}

/// A file, mapped where its huge pages can be.
struct Mapping {
    /// Of a range of addresses with room for that.
    range: *mut libc::c_void,
    reserved: usize,
    start: *mut libc::c_void,
}

impl Mapping {
    /// Of the first `whole` bytes of `file`.
    fn new(file: &File, whole: usize) -> io::Result<Self> {
        let reserved = whole + HUGE_PAGE;
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE;
        // SAFETY: a new mapping, wherever there is room.
        let range = unsafe { libc::mmap(ptr::null_mut(), reserved, libc::PROT_NONE, flags, -1, 0) };
        if range == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        let address = range as usize;
        let start = range.wrapping_byte_add(address.next_multiple_of(HUGE_PAGE) - address);
        let mapping = Self { range, reserved, start };
        // Linux does this for programs.
        let protection = libc::PROT_READ | libc::PROT_EXEC;
        let flags = libc::MAP_SHARED | libc::MAP_FIXED;
        // SAFETY: what is replaced is part of the range, and nobody refers to what is there.
        let mapped = unsafe { libc::mmap(start, whole, protection, flags, file.as_raw_fd(), 0) };
        if mapped == libc::MAP_FAILED { Err(io::Error::last_os_error()) } else { Ok(mapping) }
    }

    /// Has one huge page in the place of small ones.
    fn exchange(&self, page: Range<usize>) -> io::Result<()> {
        // Before Linux 6.2 it is done, but told as an error, where there is no table of small pages.
        self.advise(page.clone(), libc::MADV_POPULATE_READ)?;
        self.advise(page, MADV_COLLAPSE)
    }

    fn advise(&self, bytes: Range<usize>, advice: libc::c_int) -> io::Result<()> {
        let start = self.start.wrapping_byte_add(bytes.start);
        // SAFETY: none of these changes what is there, and nobody refers to it.
        if unsafe { libc::madvise(start, bytes.len(), advice) } < 0 {
            return Err(io::Error::last_os_error());
        }
        Ok(())
    }

    /// Whether some of it is mapped in huge pages (`smaps` of proc(5)).
    fn is_huge(&self) -> io::Result<bool> {
        let smaps = fs::read_to_string("/proc/self/smaps")?;
        let ours = format!("{:x}-", self.start as usize);
        let mut fields = smaps.lines().skip_while(|line| !line.starts_with(&ours));
        Ok(fields
            .find_map(|line| line.strip_prefix("FilePmdMapped:"))
            .is_some_and(|kib| kib.trim() != "0 kB"))
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: the range is this one's alone, and nobody refers to what is in it.
        unsafe { libc::munmap(self.range, self.reserved) };
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::FileExt;

    use super::*;

    #[test]
    fn a_file_is_as_it_was() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("file");
        let content: Vec<u8> = (0..(5 << 20) / 4_u32).flat_map(u32::to_le_bytes).collect();
        fs::write(&path, &content).unwrap();
        let file = File::open(&path).unwrap();
        file.sync_all().unwrap();
        // What this machine's kernel and file system do is theirs.
        println!("{:?}", gather(&file));
        assert!(fs::read(&path).unwrap() == content);
        let short =
            File::options().read(true).write(true).create_new(true).open(dir.path().join("short")).unwrap();
        short.write_all_at(b"short", 0).unwrap();
        assert!(!gather(&short).unwrap());
    }
}
