//! Idmapped mounts, tried on a file system that holds containers' layers: the
//! kernel may have them and the file system may not.

use std::{
    fs,
    io::{self, Read, Write},
    os::{
        fd::{AsRawFd, FromRawFd, OwnedFd},
        unix::ffi::OsStrExt,
    },
    path::Path,
};

use nix::{
    sched::{CloneFlags, unshare},
    sys::{signal::Signal, statfs, wait::waitpid},
    unistd::{ForkResult, Pid, fork, pipe},
};

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
    let user_namespace = user_namespace()?;
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

/// A user namespace that maps its root to an unprivileged range, made by a
/// child that lives until the namespace is open.
fn user_namespace() -> io::Result<OwnedFd> {
    let (ready_read, ready_write) = pipe()?;
    let (release_read, release_write) = pipe()?;
    // SAFETY: until it exits the child calls nothing but unshare, close, write,
    // read and _exit, none of which allocates or takes a lock.
    match unsafe { fork() }? {
        ForkResult::Child => {
            drop((ready_read, release_write));
            let made = unshare(CloneFlags::CLONE_NEWUSER).is_ok();
            let _ = nix::unistd::write(&ready_write, &[u8::from(made)]);
            let _ = nix::unistd::read(&release_read, &mut [0]);
            // SAFETY: ends the child without running the parent's handlers.
            unsafe { libc::_exit(0) }
        }
        ForkResult::Parent { child } => {
            drop((ready_write, release_read));
            let result = map_and_open(child, fs::File::from(ready_read));
            drop(release_write);
            // The child may be stopped or slow; it holds nothing worth waiting for.
            let _ = nix::sys::signal::kill(child, Signal::SIGKILL);
            let _ = waitpid(child, None);
            result
        }
    }
}

fn map_and_open(child: Pid, mut ready: fs::File) -> io::Result<OwnedFd> {
    let mut made = [0];
    ready.read_exact(&mut made)?;
    if made != [1] {
        return Err(io::Error::from_raw_os_error(libc::EPERM));
    }
    for map in ["uid_map", "gid_map"] {
        let mut file = fs::File::options().write(true).open(format!("/proc/{child}/{map}"))?;
        file.write_all(b"0 100000 65536\n")?;
    }
    Ok(fs::File::open(format!("/proc/{child}/ns/user"))?.into())
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
