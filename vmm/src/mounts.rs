//! Mounts that are at no place.

use std::ffi::{CStr, CString};
use std::fs::OpenOptions;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

use crate::process::{ok, owned};

/// The directory `dir`, from which no way leads up and in which nothing can be made or
/// removed: a mount of it, read-only and at no place (open_tree(2), Linux 5.12). Sockets in it
/// can be connected to. Who may not mount gets the directory itself.
pub(crate) fn view(dir: &Path) -> io::Result<OwnedFd> {
    let path = CString::new(dir.as_os_str().as_bytes())?;
    let flags = libc::OPEN_TREE_CLONE | libc::OPEN_TREE_CLOEXEC;
    // SAFETY: a C string and flags.
    let cloned = owned(unsafe { libc::syscall(libc::SYS_open_tree, libc::AT_FDCWD, path.as_ptr(), flags) });
    let view = match cloned {
        Err(error) if error.raw_os_error() == Some(libc::EPERM) => {
            let flags = libc::O_PATH | libc::O_DIRECTORY;
            return Ok(OpenOptions::new().read(true).custom_flags(flags).open(dir)?.into());
        }
        cloned => cloned?,
    };
    let attributes = libc::mount_attr {
        attr_set: libc::MOUNT_ATTR_RDONLY
            | libc::MOUNT_ATTR_NOSUID
            | libc::MOUNT_ATTR_NODEV
            | libc::MOUNT_ATTR_NOEXEC,
        attr_clr: 0,
        propagation: libc::MS_PRIVATE,
        userns_fd: 0,
    };
    // SAFETY: a C string and a mount_attr of the size given, which the kernel reads.
    let set = unsafe {
        libc::syscall(
            libc::SYS_mount_setattr,
            view.as_raw_fd(),
            c"".as_ptr(),
            libc::AT_EMPTY_PATH,
            &raw const attributes,
            size_of::<libc::mount_attr>(),
        )
    };
    ok(set as libc::c_int)?;
    Ok(view)
}

/// A new file system with these options, mounted (fsopen(2), Linux 5.2).
pub(crate) fn new_file_system(
    kind: &CStr,
    options: &[(&CStr, &CStr)],
    attributes: u64,
) -> io::Result<OwnedFd> {
    // SAFETY: a C string and flags.
    let context = owned(unsafe { libc::syscall(libc::SYS_fsopen, kind.as_ptr(), libc::FSOPEN_CLOEXEC) })?;
    for (key, value) in options {
        configure(&context, libc::FSCONFIG_SET_STRING, key.as_ptr(), value.as_ptr())?;
    }
    configure(&context, libc::FSCONFIG_CMD_CREATE, std::ptr::null(), std::ptr::null())?;
    let (context, flags) = (context.as_raw_fd(), libc::FSMOUNT_CLOEXEC);
    // SAFETY: an open descriptor, and flags.
    owned(unsafe { libc::syscall(libc::SYS_fsmount, context, flags, attributes) })
}

/// fsconfig(2); both pointers are to C strings or null.
fn configure(
    context: &OwnedFd,
    command: libc::c_uint,
    key: *const libc::c_char,
    value: *const libc::c_char,
) -> io::Result<()> {
    // SAFETY: the callers' strings outlive the call.
    let set = unsafe { libc::syscall(libc::SYS_fsconfig, context.as_raw_fd(), command, key, value, 0) };
    ok(set as libc::c_int)
}
