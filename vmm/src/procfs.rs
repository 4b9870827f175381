//! This process as `/proc` shows it: the host's, or, once the process is shut in, one of
//! its own that nobody else sees.

use std::ffi::CString;
use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::path::Path;
use std::sync::OnceLock;

use crate::mounts;
use crate::process::owned;

/// This process's directory in a `/proc` of its own.
static OWN: OnceLock<File> = OnceLock::new();

/// Opens `name` of this process for reading.
pub fn open(name: &str) -> io::Result<File> {
    match OWN.get() {
        Some(own) => open_at(own.as_raw_fd(), name),
        None => File::open(Path::new("/proc/self").join(name)),
    }
}

/// A new `/proc` of this process's pid namespace, with its processes and nothing else in it. It
/// is at no place.
pub(crate) fn mount() -> io::Result<OwnedFd> {
    let attributes =
        libc::MOUNT_ATTR_RDONLY | libc::MOUNT_ATTR_NOSUID | libc::MOUNT_ATTR_NODEV | libc::MOUNT_ATTR_NOEXEC;
    mounts::new_file_system(c"proc", &[(c"subset", c"pid")], attributes)
}

/// From now on this process is looked at in `proc`, made by [`mount`].
pub(crate) fn use_own(proc: &OwnedFd) -> io::Result<()> {
    let _ = OWN.set(open_at(proc.as_raw_fd(), "self")?);
    Ok(())
}

fn open_at(dir: RawFd, name: &str) -> io::Result<File> {
    let name = CString::new(name)?;
    // SAFETY: a C string.
    let fd = unsafe { libc::openat(dir, name.as_ptr(), libc::O_RDONLY | libc::O_CLOEXEC) };
    owned(fd.into()).map(File::from)
}
