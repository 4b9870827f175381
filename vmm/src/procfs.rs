//! This process as `/proc` shows it: the host's, or, once the process is shut in, one of
//! its own that nobody else sees.

use std::ffi::{CStr, CString};
use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::path::Path;
use std::sync::OnceLock;

use crate::process::ok;

/// This process's directory in a `/proc` of its own.
static OWN: OnceLock<File> = OnceLock::new();

/// Opens `name` of this process for reading.
pub fn open(name: &str) -> io::Result<File> {
    match OWN.get() {
        // Whatever it is relative to: a link of procfs names where the descriptor leads.
        Some(own) => open_at(own.as_raw_fd(), name),
        None => File::open(Path::new("/proc/self").join(name)),
    }
}

/// A new `/proc` of this process's pid namespace, with its processes and nothing else in it. It
/// is at no place.
pub(crate) fn mount() -> io::Result<OwnedFd> {
    // SAFETY: a C string and flags (fsopen(2), Linux 5.2).
    let context = new_fd(unsafe { libc::syscall(libc::SYS_fsopen, c"proc".as_ptr(), FSOPEN_CLOEXEC) })?;
    configure(&context, FSCONFIG_SET_STRING, Some((c"subset", c"pid")))?;
    configure(&context, FSCONFIG_CMD_CREATE, None)?;
    let attributes =
        libc::MOUNT_ATTR_RDONLY | libc::MOUNT_ATTR_NOSUID | libc::MOUNT_ATTR_NODEV | libc::MOUNT_ATTR_NOEXEC;
    // SAFETY: an open descriptor of a file system that was created, and flags (fsmount(2)).
    new_fd(unsafe { libc::syscall(libc::SYS_fsmount, context.as_raw_fd(), FSMOUNT_CLOEXEC, attributes) })
}

/// From now on this process is looked at in `proc`, made by [`mount`].
pub(crate) fn use_own(proc: &OwnedFd) -> io::Result<()> {
    let _ = OWN.set(open_at(proc.as_raw_fd(), "self")?);
    Ok(())
}

// linux/mount.h
const FSOPEN_CLOEXEC: libc::c_uint = 1;
const FSMOUNT_CLOEXEC: libc::c_uint = 1;
const FSCONFIG_SET_STRING: libc::c_uint = 1;
const FSCONFIG_CMD_CREATE: libc::c_uint = 6;

/// fsconfig(2).
fn configure(context: &OwnedFd, command: libc::c_uint, parameter: Option<(&CStr, &CStr)>) -> io::Result<()> {
    let pointer = |text: Option<&CStr>| text.map_or(std::ptr::null(), CStr::as_ptr);
    let (key, value) = (pointer(parameter.map(|(key, _)| key)), pointer(parameter.map(|(_, value)| value)));
    // SAFETY: key and value are C strings or null, as the command wants.
    let result = unsafe { libc::syscall(libc::SYS_fsconfig, context.as_raw_fd(), command, key, value, 0) };
    ok(result as libc::c_int)
}

fn open_at(dir: RawFd, name: &str) -> io::Result<File> {
    let name = CString::new(name)?;
    // SAFETY: a C string.
    let fd = unsafe { libc::openat(dir, name.as_ptr(), libc::O_RDONLY | libc::O_CLOEXEC) };
    new_fd(fd.into()).map(File::from)
}

fn new_fd(result: libc::c_long) -> io::Result<OwnedFd> {
    ok(result as libc::c_int)?;
    // SAFETY: the kernel has just made it for us.
    Ok(unsafe { OwnedFd::from_raw_fd(result as RawFd) })
}
