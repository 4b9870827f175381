//! The file behind guest memory.
//!
//! A memfd has pages of 4 KiB unless the host's administrator has set
//! `/sys/kernel/mm/transparent_hugepage/shmem_enabled`, and every one of them
//! that a guest touches for the first time is an exit. Where huge pages are
//! wanted, the file is therefore an unnamed one (`O_TMPFILE`, open(2)) on a
//! tmpfs of its own, mounted nowhere, with `huge=advise` (tmpfs(5)): what the
//! monitor advises comes in pages of 2 MiB. It is a memfd in all but its seals.

use std::ffi::CStr;
use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::fd::AsRawFd;

use vm_memory::{FileOffset, MmapRegion};

use crate::mounts;
use crate::process::owned;

/// A new unnamed file of `size` bytes in memory, none of which are allocated;
/// `huge_pages` says whether [`advise`] is to have an effect on its mappings.
/// Where the host cannot do that (no right to mount, no such kernel), it is an
/// ordinary memfd.
pub fn create(size: u64, huge_pages: bool) -> io::Result<File> {
    if huge_pages {
        match on_own_tmpfs() {
            Ok(file) => {
                file.set_len(size)?;
                return Ok(file);
            }
            Err(error) => log::info!("guest memory has no huge pages: {error}"),
        }
    }
    memfd(size)
}

/// Asks for huge pages, or for none, behind a range of a mapping of [`create`]'s file.
pub fn advise(mapping: &MmapRegion, range: Range<u64>, huge: bool) {
    let advice = if huge { libc::MADV_HUGEPAGE } else { libc::MADV_NOHUGEPAGE };
    if range.is_empty() || range.end > mapping.size() as u64 {
        return;
    }
    let start = mapping.as_ptr().wrapping_add(range.start as usize);
    // SAFETY: the range was just checked to be mapped, and an advice changes no contents.
    if unsafe { libc::madvise(start.cast(), (range.end - range.start) as usize, advice) } < 0 {
        // A kernel without transparent huge pages.
        log::info!("guest memory has no huge pages: {}", io::Error::last_os_error());
    }
}

/// Keeps a mapping out of core files.
pub fn leave_out_of_dumps(mapping: &MmapRegion) {
    // SAFETY: the range is the mapping's own, and an advice changes no contents.
    if unsafe { libc::madvise(mapping.as_ptr().cast(), mapping.size(), libc::MADV_DONTDUMP) } < 0 {
        log::warn!("guest memory may be part of a core file: {}", io::Error::last_os_error());
    }
}

/// A new file of `size` bytes of the host's huge pages of 2 MiB (hugetlbfs), none of which
/// are taken from its pool, nor reserved there.
pub fn create_hugetlb(size: u64) -> io::Result<File> {
    sealed_memfd(c"rvm-guest-hugetlb", libc::MFD_HUGETLB | libc::MFD_HUGE_2MB, size)
}

/// What [`change`] does to a range of a file.
#[derive(Clone, Copy, Debug)]
pub enum Change {
    /// Its pages are there.
    Allocate,
    /// Its pages are the host's; it reads as zeroes.
    Discard,
}

/// Changes what is behind `range` of a region whose file is `backing`; the file's seals allow that, and it stays
/// as long as it is.
pub fn change(backing: &FileOffset, range: Range<u64>, change: Change) -> io::Result<()> {
    let mode = match change {
        Change::Allocate => libc::FALLOC_FL_KEEP_SIZE,
        Change::Discard => libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE,
    };
    let as_offset = |bytes: Option<u64>| {
        let bytes = bytes.and_then(|bytes| libc::off_t::try_from(bytes).ok());
        bytes.ok_or_else(|| io::Error::from(io::ErrorKind::InvalidInput))
    };
    let start = as_offset(backing.start().checked_add(range.start))?;
    let length = as_offset(range.end.checked_sub(range.start))?;
    if length == 0 {
        return Ok(());
    }
    loop {
        // SAFETY: plain fallocate(2) on a descriptor we own.
        if unsafe { libc::fallocate(backing.file().as_raw_fd(), mode, start, length) } == 0 {
            return Ok(());
        }
        let error = io::Error::last_os_error();
        if error.kind() != io::ErrorKind::Interrupted {
            return Err(error);
        }
    }
}

fn memfd(size: u64) -> io::Result<File> {
    sealed_memfd(c"rvm-guest-memory", 0, size)
}

fn sealed_memfd(name: &CStr, flags: libc::c_uint, size: u64) -> io::Result<File> {
    // SAFETY: the name is a C string that outlives the call.
    let fd =
        unsafe { libc::memfd_create(name.as_ptr(), libc::MFD_CLOEXEC | libc::MFD_ALLOW_SEALING | flags) };
    let file = File::from(owned(fd.into())?);
    file.set_len(size)?;
    // A memfd that cannot shrink cannot turn an access to guest memory into SIGBUS.
    let seals = libc::F_SEAL_SHRINK | libc::F_SEAL_GROW | libc::F_SEAL_SEAL;
    // SAFETY: plain fcntl on a descriptor we own.
    if unsafe { libc::fcntl(file.as_raw_fd(), libc::F_ADD_SEALS, seals) } < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(file)
}

fn on_own_tmpfs() -> io::Result<File> {
    // No limit beside the cgroup's: a tmpfs is otherwise half the host's memory.
    let options = [(c"huge", c"advise"), (c"size", c"0"), (c"mode", c"700")];
    let attributes = libc::MOUNT_ATTR_NOSUID | libc::MOUNT_ATTR_NODEV | libc::MOUNT_ATTR_NOEXEC;
    let mount = mounts::new_file_system(c"tmpfs", &options, attributes)?;
    let flags = libc::O_TMPFILE | libc::O_RDWR | libc::O_CLOEXEC;
    // SAFETY: the path is a NUL-terminated constant.
    let file = unsafe { libc::openat(mount.as_raw_fd(), c".".as_ptr(), flags, 0o600) };
    // The file keeps the file system when the mount's descriptor is closed.
    owned(file.into()).map(File::from)
}

/// Whether this host and this process's rights allow them.
#[cfg(test)]
pub fn has_huge_pages() -> bool {
    std::path::Path::new("/sys/kernel/mm/transparent_hugepage").exists() && on_own_tmpfs().is_ok()
}
