//! Idmapped mounts, tried on a file system that holds containers' layers: the
//! kernel may have them and the file system may not.

use std::{
    io,
    os::{
        fd::{AsRawFd, FromRawFd, OwnedFd},
        unix::ffi::OsStrExt,
    },
    path::Path,
};

use nix::sys::statfs;
use rvm_shim::user_namespace::{IdMap, IdRange, user_namespace};

use super::Check;

/// Tries an idmapped mount of `dir`; nothing is attached anywhere.
pub(super) fn check(dir: &Path) -> Check {
    let name = "idmapped-mounts";
    match try_idmapped_mount(dir) {
        Ok(()) => Check::ok(name, format!("on the file system of {} ({})", dir.display(), kind_of(dir))),
        Err(error) if error.raw_os_error() == Some(libc::EPERM) => {
            Check::optional(name, format!("not tried: {error}"), "run this as root")
        }
        Err(error) => Check::optional(
            name,
            format!("not on the file system of {} ({}): {error}", dir.display(), kind_of(dir)),
            "rvm works without; a file system that has them (ext4, xfs, btrfs) isolates better",
        ),
    }
}

fn try_idmapped_mount(dir: &Path) -> io::Result<()> {
    let unprivileged = vec![IdRange { inside: 0, outside: 100_000, count: 65_536 }];
    let user_namespace = user_namespace(&IdMap { uids: unprivileged.clone(), gids: unprivileged })?;
    let tree = open_tree_clone(dir)?;
    let attributes = libc::mount_attr {
        attr_set: libc::MOUNT_ATTR_IDMAP,
        attr_clr: 0,
        propagation: 0,
        userns_fd: user_namespace.as_raw_fd() as u64,
    };
    // SAFETY: path and attributes outlive the call, the size is the structure's.
    let result = unsafe {
        libc::syscall(
            libc::SYS_mount_setattr,
            tree.as_raw_fd(),
            c"".as_ptr(),
            libc::AT_EMPTY_PATH,
            &attributes,
            size_of::<libc::mount_attr>(),
        )
    };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

/// A detached copy of the mount at `dir`, gone with its descriptor.
fn open_tree_clone(dir: &Path) -> io::Result<OwnedFd> {
    let path = std::ffi::CString::new(dir.as_os_str().as_bytes())?;
    let flags = libc::OPEN_TREE_CLONE | libc::OPEN_TREE_CLOEXEC;
    // SAFETY: the path is NUL-terminated and outlives the call.
    let fd = unsafe { libc::syscall(libc::SYS_open_tree, libc::AT_FDCWD, path.as_ptr(), flags) };
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the kernel has just returned this descriptor, nobody else owns it.
    Ok(unsafe { OwnedFd::from_raw_fd(fd as i32) })
}

/// The usual name of the file system at `dir`, or its magic number.
fn kind_of(dir: &Path) -> String {
    let Ok(fs) = statfs::statfs(dir) else { return "unknown".to_owned() };
    match fs.filesystem_type() {
        statfs::EXT4_SUPER_MAGIC => "ext4".to_owned(),
        statfs::XFS_SUPER_MAGIC => "xfs".to_owned(),
        statfs::BTRFS_SUPER_MAGIC => "btrfs".to_owned(),
        statfs::OVERLAYFS_SUPER_MAGIC => "overlay".to_owned(),
        statfs::TMPFS_MAGIC => "tmpfs".to_owned(),
        other => format!("{:#x}", other.0),
    }
}
