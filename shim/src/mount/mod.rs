//! mount(2) and its younger relatives, as the share needs them.

mod lent;
mod namespace;

use std::{
    ffi::{CStr, CString},
    fs::File,
    io,
    os::{
        fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd},
        unix::ffi::OsStrExt,
    },
    path::Path,
};

use nix::{
    errno::Errno,
    mount::{MntFlags, MsFlags, mount, umount2},
    sched::{CloneFlags, unshare},
};

pub use lent::lend;
pub use namespace::{Namespace, staged, staged_at};

/// A mount that is at no place yet, perhaps with others below it. It goes with its value, unless it
/// has been attached.
#[derive(Debug)]
pub struct Tree(OwnedFd);

impl Tree {
    /// A second mount of what is at `source` (what a symlink there points to), with everything that is mounted
    /// below it where `recursive` (open_tree(2), Linux 5.2). What is mounted there later arrives in it; what is mounted in
    /// it stays there.
    pub fn of(source: &Path, recursive: bool) -> io::Result<Self> {
        let path = CString::new(source.as_os_str().as_bytes())?;
        let deep = if recursive { libc::AT_RECURSIVE.cast_unsigned() } else { 0 };
        let flags = libc::OPEN_TREE_CLONE | libc::OPEN_TREE_CLOEXEC | deep;
        // SAFETY: `path` is a C string that outlives the call.
        let fd = unsafe { libc::syscall(libc::SYS_open_tree, libc::AT_FDCWD, path.as_ptr(), flags) };
        let tree = Self(descriptor(fd)?);
        tree.set(&attributes((0, 0), libc::MS_SLAVE), recursive)?;
        Ok(tree)
    }

    /// A new overlay, read-only where said so, with paths in the options counted from the working directory
    /// (fsopen(2), Linux 5.2). None where an option is one that the kernel takes by mount(2) alone.
    pub fn overlay(options: &[String], readonly: bool) -> Option<io::Result<Self>> {
        // What fsconfig(2) takes, and a comma that older kernels would take for the next option.
        const LONGEST: usize = 255;
        let is_taken = |option: &String| {
            let value = option.split_once('=').map_or("", |(_, value)| value);
            value.len() <= LONGEST && !option.contains(',') && !option.contains('\0')
        };
        options.iter().all(is_taken).then(|| Self::new_overlay(options, readonly))
    }

    fn new_overlay(options: &[String], readonly: bool) -> io::Result<Self> {
        // SAFETY: a C string and flags.
        let context = descriptor(unsafe {
            libc::syscall(libc::SYS_fsopen, c"overlay".as_ptr(), libc::FSOPEN_CLOEXEC)
        })?;
        for option in options {
            match option.split_once('=') {
                Some((key, value)) => configure(&context, libc::FSCONFIG_SET_STRING, Some(key), Some(value))?,
                None => configure(&context, libc::FSCONFIG_SET_FLAG, Some(option), None)?,
            }
        }
        if readonly {
            configure(&context, libc::FSCONFIG_SET_FLAG, Some("ro"), None)?;
        }
        configure(&context, libc::FSCONFIG_CMD_CREATE, None, None)?;
        let attributes = if readonly { libc::MOUNT_ATTR_RDONLY } else { 0 };
        let (context, flags) = (context.as_raw_fd(), libc::FSMOUNT_CLOEXEC);
        // SAFETY: an open descriptor, and flags.
        descriptor(unsafe { libc::syscall(libc::SYS_fsmount, context, flags, attributes) }).map(Self)
    }

    /// Maps ids: what the file system says is one of the ids inside `users`, a user namespace, is seen as the one
    /// outside. Where `all`, in every mount below too (mount_setattr(2), `MOUNT_ATTR_IDMAP`).
    pub fn map_ids(&self, users: BorrowedFd, all: bool) -> io::Result<()> {
        let userns_fd = users.as_raw_fd().unsigned_abs().into();
        let attr_set = libc::MOUNT_ATTR_IDMAP;
        self.set(&libc::mount_attr { attr_set, attr_clr: 0, propagation: 0, userns_fd }, all)
    }

    /// Makes it read-only, with every mount below it where `recursive`.
    pub fn make_readonly(&self, recursive: bool) -> io::Result<()> {
        self.set(&attributes((libc::MOUNT_ATTR_RDONLY, 0), 0), recursive)
    }

    /// Cuts it off from mounts the host makes later, with every mount below it where `recursive`.
    pub fn seal(&self, recursive: bool) -> io::Result<()> {
        self.set(&attributes((0, 0), libc::MS_PRIVATE), recursive)
    }

    fn set(&self, attributes: &libc::mount_attr, recursive: bool) -> io::Result<()> {
        let deep = if recursive { libc::AT_RECURSIVE } else { 0 };
        set_attr(self.0.as_raw_fd(), c"", libc::AT_EMPTY_PATH | deep, attributes)
    }

    /// Puts it to `target`, a path in the calling thread's mount namespace, where it stays.
    pub fn attach(&self, target: &Path) -> io::Result<()> {
        let target = CString::new(target.as_os_str().as_bytes())?;
        // SAFETY: both paths are C strings that outlive the call.
        let moved = unsafe {
            libc::syscall(
                libc::SYS_move_mount,
                self.0.as_raw_fd(),
                c"".as_ptr(),
                libc::AT_FDCWD,
                target.as_ptr(),
                libc::MOVE_MOUNT_F_EMPTY_PATH,
            )
        };
        if moved == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
    }
}

impl AsFd for Tree {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

impl AsRawFd for Tree {
    fn as_raw_fd(&self) -> RawFd {
        self.0.as_raw_fd()
    }
}

/// What a system call has returned.
fn descriptor(returned: libc::c_long) -> io::Result<OwnedFd> {
    if returned < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the kernel has just returned this descriptor, nobody else owns it.
    Ok(unsafe { OwnedFd::from_raw_fd(returned as RawFd) })
}

fn configure(
    context: &OwnedFd,
    command: libc::c_uint,
    key: Option<&str>,
    value: Option<&str>,
) -> io::Result<()> {
    let (key, value) = (key.map(CString::new).transpose()?, value.map(CString::new).transpose()?);
    let pointer = |text: &Option<CString>| text.as_ref().map_or(std::ptr::null(), |text| text.as_ptr());
    // SAFETY: C strings that outlive the call, or null.
    let set = unsafe {
        libc::syscall(libc::SYS_fsconfig, context.as_raw_fd(), command, pointer(&key), pointer(&value), 0)
    };
    if set == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

fn attributes((attr_set, attr_clr): (u64, u64), propagation: u64) -> libc::mount_attr {
    libc::mount_attr { attr_set, attr_clr, propagation, userns_fd: 0 }
}

/// Does `work` on a thread whose working directory is `dir`.
pub fn from<T: Send>(dir: &Path, work: impl FnOnce() -> io::Result<T> + Send) -> io::Result<T> {
    namespace::apart(|| {
        unshare(CloneFlags::CLONE_FS)?;
        std::env::set_current_dir(dir)?;
        work()
    })
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

/// Makes the mount at `target` read-only.
pub fn make_readonly(target: &Path) -> io::Result<()> {
    set_attributes(target, (libc::MOUNT_ATTR_RDONLY, 0))
}

/// Lets the mount at `target`, and none below it, be written to.
pub fn make_writable(target: &Path) -> io::Result<()> {
    set_attributes(target, (0, libc::MOUNT_ATTR_RDONLY))
}

/// Of the two sets of attributes one is set, the other one cleared.
fn set_attributes(target: &Path, changed: (u64, u64)) -> io::Result<()> {
    let path = CString::new(target.as_os_str().as_bytes())?;
    set_attr(libc::AT_FDCWD, &path, 0, &attributes(changed, 0))
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
    /// What `path` leads to (statx(2), `STATX_MNT_ID`: Linux 5.8). A file system's server is not asked for it.
    pub fn of(path: &Path) -> io::Result<Self> {
        let path = CString::new(path.as_os_str().as_bytes())?;
        let mut found = std::mem::MaybeUninit::<libc::statx>::uninit();
        // SAFETY: `path` is a C string that outlives the call, and `found` has room for a statx.
        let result = unsafe {
            libc::statx(
                libc::AT_FDCWD,
                path.as_ptr(),
                libc::AT_STATX_DONT_SYNC,
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

    /// Whether both are seen by one mount.
    pub fn is_on_the_mount_of(&self, other: &Self) -> bool {
        self.mount == other.mount
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
