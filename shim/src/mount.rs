//! mount(2) as the share needs it.

use std::{
    ffi::{CStr, CString},
    fs::File,
    io,
    os::{
        fd::{AsRawFd, FromRawFd, OwnedFd, RawFd},
        unix::ffi::OsStrExt,
    },
    path::Path,
    sync::OnceLock,
};

use nix::{
    errno::Errno,
    mount::{MntFlags, MsFlags, mount, umount2},
    sched::{CloneFlags, setns, unshare},
};

use crate::user_namespace::{IdMap, user_namespace};

/// Gives the process a mount namespace of its own: the host's mounts keep
/// arriving in it, none of its own leave it, and all of them end with the last
/// process in it. Must be called before threads are started.
pub fn isolate() -> io::Result<()> {
    let host = File::open("/proc/self/ns/mnt")?;
    unshare(CloneFlags::CLONE_NEWNS)?;
    mount(None::<&str>, "/", None::<&str>, MsFlags::MS_REC | MsFlags::MS_SLAVE, None::<&str>)?;
    // Once left, it stays the host's.
    let _ = HOST.set(host);
    Ok(())
}

/// The mount namespace that [`isolate`] has left; none where it was not called.
pub fn of_the_host() -> Option<&'static File> {
    HOST.get()
}

static HOST: OnceLock<File> = OnceLock::new();

/// As [`bind`], of what is at `source` in the host's mount namespace. That one's mounts arrive in ours only where they
/// are shared: below what is private there (CRI-O's storage, on its own choice) we have what was mounted when we left.
pub fn bind_of_the_host(source: &Path, target: &Path, recursive: bool) -> io::Result<()> {
    let Some(host) = of_the_host() else { return bind(source, target, recursive) };
    let cloning = || {
        // Of this thread alone.
        unshare(CloneFlags::CLONE_FS)?;
        setns(host, CloneFlags::CLONE_NEWNS)?;
        clone_tree(source, recursive)
    };
    let cloned = std::thread::scope(|scope| scope.spawn(cloning).join());
    // A panic there is a fault of ours.
    let tree = cloned.unwrap_or_else(|panic| std::panic::resume_unwind(panic))?;
    let slave = libc::mount_attr { attr_set: 0, attr_clr: 0, propagation: libc::MS_SLAVE, userns_fd: 0 };
    let deep = if recursive { libc::AT_RECURSIVE } else { 0 };
    set_attr(tree.as_raw_fd(), c"", libc::AT_EMPTY_PATH | deep, &slave)?;
    attach(&tree, target)
}

/// Binds `source` (what a symlink there points to) to `target`, which must
/// exist and be of the same kind.
pub fn bind(source: &Path, target: &Path, recursive: bool) -> io::Result<()> {
    let flags = if recursive { MsFlags::MS_BIND | MsFlags::MS_REC } else { MsFlags::MS_BIND };
    Ok(mount(Some(source), target, None::<&str>, flags, None::<&str>)?)
}

/// As [`bind`], with ids mapped: what the file system says is one of the inner ids
/// is seen as the outer one. Where `all`, in every mount below too
/// (mount_setattr(2), `MOUNT_ATTR_IDMAP`).
pub fn bind_idmapped(
    source: &Path,
    target: &Path,
    recursive: bool,
    idmap: &IdMap,
    all: bool,
) -> io::Result<()> {
    let user_namespace = user_namespace(idmap)?;
    let tree = clone_tree(source, recursive)?;
    let deep = |yes| if yes { libc::AT_RECURSIVE } else { 0 };
    let attributes = libc::mount_attr {
        attr_set: libc::MOUNT_ATTR_IDMAP,
        attr_clr: 0,
        propagation: 0,
        userns_fd: user_namespace.as_raw_fd().unsigned_abs().into(),
    };
    set_attr(tree.as_raw_fd(), c"", libc::AT_EMPTY_PATH | deep(all), &attributes)?;
    attach(&tree, target)
}

/// Puts a mount that is at no place to `target`.
pub fn attach(tree: &OwnedFd, target: &Path) -> io::Result<()> {
    let target = CString::new(target.as_os_str().as_bytes())?;
    // SAFETY: both paths are C strings that outlive the call.
    let moved = unsafe {
        libc::syscall(
            libc::SYS_move_mount,
            tree.as_raw_fd(),
            c"".as_ptr(),
            libc::AT_FDCWD,
            target.as_ptr(),
            libc::MOVE_MOUNT_F_EMPTY_PATH,
        )
    };
    if moved == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// A second mount of what is mounted at `path`, without what is mounted below
/// it. It is at no place and goes with its descriptor.
pub fn clone(path: &Path) -> io::Result<OwnedFd> {
    clone_tree(path, false)
}

fn clone_tree(path: &Path, recursive: bool) -> io::Result<OwnedFd> {
    let path = CString::new(path.as_os_str().as_bytes())?;
    let deep = if recursive { libc::AT_RECURSIVE.cast_unsigned() } else { 0 };
    let flags = libc::OPEN_TREE_CLONE | libc::OPEN_TREE_CLOEXEC | deep;
    // SAFETY: `path` is a C string that outlives the call.
    let fd = unsafe { libc::syscall(libc::SYS_open_tree, libc::AT_FDCWD, path.as_ptr(), flags) };
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the kernel has just returned this descriptor, nobody else owns it.
    Ok(unsafe { OwnedFd::from_raw_fd(fd as i32) })
}

/// Mounts a file system.
pub fn mount_fs(
    kind: &str,
    source: &str,
    target: &Path,
    flags: MsFlags,
    data: Option<&str>,
) -> io::Result<()> {
    Ok(mount(Some(source), target, Some(kind), flags, data)?)
}

/// As [`mount_fs`], with relative paths in `data` counted from `dir`. The
/// process's working directory stays what it is.
pub fn mount_fs_from(
    dir: &Path,
    kind: &str,
    source: &str,
    target: &Path,
    flags: MsFlags,
    data: &str,
) -> io::Result<()> {
    std::thread::scope(|scope| {
        let thread = scope.spawn(|| {
            unshare(CloneFlags::CLONE_FS)?;
            std::env::set_current_dir(dir)?;
            mount_fs(kind, source, target, flags, Some(data))
        });
        thread.join().unwrap_or_else(|_| Err(io::Error::other("the mounting thread ended early")))
    })
}

/// Makes the mount at `target` read-only, with every mount below it where
/// `recursive`, and cuts it off from mounts the host makes later.
pub fn seal_readonly(target: &Path, recursive: bool) -> io::Result<()> {
    set_attributes(target, recursive, (libc::MOUNT_ATTR_RDONLY, 0), libc::MS_PRIVATE)
}

/// Makes the mount at `target` read-only, with every mount below it where
/// `recursive`.
pub fn make_readonly(target: &Path, recursive: bool) -> io::Result<()> {
    set_attributes(target, recursive, (libc::MOUNT_ATTR_RDONLY, 0), 0)
}

/// Lets the mount at `target`, and none below it, be written to.
pub fn make_writable(target: &Path) -> io::Result<()> {
    set_attributes(target, false, (0, libc::MOUNT_ATTR_RDONLY), 0)
}

/// Cuts the mount at `target` off from mounts the host makes later.
pub fn seal(target: &Path, recursive: bool) -> io::Result<()> {
    set_attributes(target, recursive, (0, 0), libc::MS_PRIVATE)
}

/// Of the two sets of attributes one is set, the other one cleared.
fn set_attributes(
    target: &Path,
    recursive: bool,
    attributes: (u64, u64),
    propagation: u64,
) -> io::Result<()> {
    let path = CString::new(target.as_os_str().as_bytes())?;
    let (attr_set, attr_clr) = attributes;
    let attributes = libc::mount_attr { attr_set, attr_clr, propagation, userns_fd: 0 };
    set_attr(libc::AT_FDCWD, &path, if recursive { libc::AT_RECURSIVE } else { 0 }, &attributes)
}

fn set_attr(dir: RawFd, path: &CStr, flags: i32, attributes: &libc::mount_attr) -> io::Result<()> {
    // SAFETY: `path` is a C string and `attributes` a mount_attr of the size
    // given; the kernel reads both during the call and keeps neither
    // (mount_setattr(2), Linux 5.12).
    let result = unsafe {
        libc::syscall(
            libc::SYS_mount_setattr,
            dir,
            path.as_ptr(),
            flags,
            std::ptr::from_ref(attributes),
            size_of::<libc::mount_attr>(),
        )
    };
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// What is at a path.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Identity {
    /// Of its file system: major and minor.
    device: (u32, u32),
    inode: u64,
    /// Of the mount it is seen by, as long as that one lasts.
    mount: u64,
}

impl Identity {
    /// What `path` leads to (statx(2), `STATX_MNT_ID`: Linux 5.8).
    pub fn of(path: &Path) -> io::Result<Self> {
        let path = CString::new(path.as_os_str().as_bytes())?;
        let mut found = std::mem::MaybeUninit::<libc::statx>::uninit();
        // SAFETY: `path` is a C string that outlives the call, and `found` has room for a statx.
        let result = unsafe {
            libc::statx(
                libc::AT_FDCWD,
                path.as_ptr(),
                0,
                libc::STATX_INO | libc::STATX_MNT_ID,
                found.as_mut_ptr(),
            )
        };
        if result != 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: the call succeeded, so the kernel has filled it.
        let found = unsafe { found.assume_init() };
        Ok(Self {
            device: (found.stx_dev_major, found.stx_dev_minor),
            inode: found.stx_ino,
            mount: found.stx_mnt_id,
        })
    }
}

/// Takes the topmost mount off `target` and everything below it; says whether
/// there was one.
pub fn detach(target: &Path) -> io::Result<bool> {
    match umount2(target, MntFlags::MNT_DETACH | MntFlags::UMOUNT_NOFOLLOW) {
        Ok(()) => Ok(true),
        Err(Errno::EINVAL | Errno::ENOENT) => Ok(false),
        Err(error) => Err(error.into()),
    }
}

/// A path that stays short however long `dir`'s is: `sockaddr_un` holds 107
/// bytes and `mount(2)`'s options a page.
pub fn short_path(dir: &File, name: &str) -> std::path::PathBuf {
    format!("/proc/self/fd/{}/{name}", dir.as_raw_fd()).into()
}
