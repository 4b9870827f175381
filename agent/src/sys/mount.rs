//! The mount API of Linux 5.2 and later: mounts as descriptors.
//!
//! A mount made here belongs to no place until [`attach`] puts it at one, and
//! the place is a descriptor too, so no path is ever looked up twice.

use std::{
    ffi::CString,
    os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd},
    path::Path,
};

use nix::{
    NixPath,
    errno::Errno,
    fcntl::{OFlag, open},
    sys::stat::Mode,
};

/// fspick(2) and its command of fsconfig(2), which `libc` lacks.
const FSPICK_CLOEXEC: u32 = 1;
const FSPICK_EMPTY_PATH: u32 = 8;
const FSCONFIG_CMD_RECONFIGURE: u32 = 7;

/// `MOUNT_ATTR_*` changes to a mount (mount_setattr(2)).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Attributes {
    /// Attributes to set.
    pub set: u64,
    /// Attributes to clear; applied before `set`.
    pub clear: u64,
    /// `MS_PRIVATE`, `MS_SLAVE`, `MS_SHARED` or `MS_UNBINDABLE`; 0 leaves it.
    pub propagation: u64,
}

impl Attributes {
    /// Read-only and nothing else.
    pub const READ_ONLY: Self = Self { set: libc::MOUNT_ATTR_RDONLY, clear: 0, propagation: 0 };

    /// Whether there is anything to change.
    pub fn is_empty(self) -> bool {
        self == Self::default()
    }
}

fn owned_fd(result: libc::c_long) -> nix::Result<OwnedFd> {
    let fd = Errno::result(result)?;
    // SAFETY: the system calls of this module return a new descriptor that
    // nobody else owns; descriptors fit in an int.
    Ok(unsafe { OwnedFd::from_raw_fd(fd as i32) })
}

/// A file system being configured (fsopen(2)).
pub struct FsContext(OwnedFd);

impl FsContext {
    /// Starts the configuration of a new file system of this type.
    pub fn new(fs_type: &str) -> nix::Result<Self> {
        let name = CString::new(fs_type).map_err(|_| Errno::EINVAL)?;
        // SAFETY: `name` is a NUL-terminated string that outlives the call.
        let fd = unsafe { libc::syscall(libc::SYS_fsopen, name.as_ptr(), libc::FSOPEN_CLOEXEC) };
        owned_fd(fd).map(Self)
    }

    /// Starts a change of the file system mounted at `mount` (fspick(2)).
    pub fn of_mount(mount: impl AsFd) -> nix::Result<Self> {
        let flags = FSPICK_CLOEXEC | FSPICK_EMPTY_PATH;
        // SAFETY: the path is a NUL-terminated literal.
        let fd = unsafe { libc::syscall(libc::SYS_fspick, mount.as_fd().as_raw_fd(), c"".as_ptr(), flags) };
        owned_fd(fd).map(Self)
    }

    /// Makes a change started by [`FsContext::of_mount`].
    pub fn reconfigure(&self) -> nix::Result<()> {
        self.config(FSCONFIG_CMD_RECONFIGURE, None, None)
    }

    fn config(&self, command: u32, key: Option<&str>, value: Option<&str>) -> nix::Result<()> {
        let key = key.map(CString::new).transpose().map_err(|_| Errno::EINVAL)?;
        let value = value.map(CString::new).transpose().map_err(|_| Errno::EINVAL)?;
        let pointer = |s: &Option<CString>| s.as_ref().map_or(std::ptr::null(), |s| s.as_ptr());
        // SAFETY: both pointers are null or NUL-terminated strings that outlive the call.
        let result = unsafe {
            libc::syscall(libc::SYS_fsconfig, self.0.as_raw_fd(), command, pointer(&key), pointer(&value), 0)
        };
        Errno::result(result).map(drop)
    }

    /// Sets `key=value`, or the flag `key`.
    pub fn set(&self, key: &str, value: Option<&str>) -> nix::Result<()> {
        let command = if value.is_some() { libc::FSCONFIG_SET_STRING } else { libc::FSCONFIG_SET_FLAG };
        self.config(command, Some(key), value)
    }

    /// Makes the file system and a mount of it with these `MOUNT_ATTR_*`.
    pub fn mount(&self, attributes: u64) -> nix::Result<OwnedFd> {
        self.config(libc::FSCONFIG_CMD_CREATE, None, None)?;
        // SAFETY: no pointers are passed.
        let fd = unsafe {
            libc::syscall(libc::SYS_fsmount, self.0.as_raw_fd(), libc::FSMOUNT_CLOEXEC, attributes)
        };
        owned_fd(fd)
    }

    /// What the file system itself said about the last failure, if anything,
    /// e.g. `tmpfs: Unknown parameter 'sise'`.
    pub fn complaint(&self) -> Option<String> {
        let mut buffer = [0; 1024];
        let mut said = Vec::new();
        // Each read returns one message: a class ("e", "w", "i"), a space, the text.
        while let Ok(length) = nix::unistd::read(&self.0, &mut buffer) {
            let message = String::from_utf8_lossy(buffer.get(..length).unwrap_or_default()).into_owned();
            if let Some(text) = message.strip_prefix("e ") {
                said.push(text.trim_end().to_owned());
            }
        }
        (!said.is_empty()).then(|| said.join("; "))
    }
}

/// Clones the mount at `path` below `dir` (empty: at `dir`), with all mounts
/// below it if `recursive`.
pub fn clone_tree(dir: impl AsFd, path: &Path, recursive: bool) -> nix::Result<OwnedFd> {
    let mut flags = libc::OPEN_TREE_CLONE | libc::OPEN_TREE_CLOEXEC;
    if recursive {
        flags |= libc::AT_RECURSIVE as u32;
    }
    if path.as_os_str().is_empty() {
        flags |= libc::AT_EMPTY_PATH as u32;
    }
    path.with_nix_path(|path| {
        // SAFETY: `path` is a NUL-terminated string that outlives the call.
        let fd = unsafe { libc::syscall(libc::SYS_open_tree, dir.as_fd().as_raw_fd(), path.as_ptr(), flags) };
        owned_fd(fd)
    })?
}

/// Opens what a path of the agent's own leads to, without access to its content.
pub fn open_path(path: &Path) -> nix::Result<OwnedFd> {
    open(path, OFlag::O_PATH | OFlag::O_CLOEXEC, Mode::empty())
}

/// Puts a mount at the place `target` is open at.
pub fn attach(mount: impl AsFd, target: impl AsFd) -> nix::Result<()> {
    // SAFETY: both paths are NUL-terminated literals.
    let result = unsafe {
        libc::syscall(
            libc::SYS_move_mount,
            mount.as_fd().as_raw_fd(),
            c"".as_ptr(),
            target.as_fd().as_raw_fd(),
            c"".as_ptr(),
            libc::MOVE_MOUNT_F_EMPTY_PATH | libc::MOVE_MOUNT_T_EMPTY_PATH,
        )
    };
    Errno::result(result).map(drop)
}

/// Changes attributes of a mount, and of all below it if `recursive`.
pub fn set_attributes(mount: BorrowedFd<'_>, attributes: Attributes, recursive: bool) -> nix::Result<()> {
    let attr = libc::mount_attr {
        attr_set: attributes.set,
        attr_clr: attributes.clear,
        propagation: attributes.propagation,
        userns_fd: 0,
    };
    let flags = libc::AT_EMPTY_PATH | if recursive { libc::AT_RECURSIVE } else { 0 };
    // SAFETY: the path is a literal; `attr` is a valid struct of the size given
    // and outlives the call.
    let result = unsafe {
        libc::syscall(
            libc::SYS_mount_setattr,
            mount.as_raw_fd(),
            c"".as_ptr(),
            flags,
            &raw const attr,
            size_of::<libc::mount_attr>(),
        )
    };
    Errno::result(result).map(drop)
}
