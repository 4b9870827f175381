//! The mounts the guest knows files of.

use std::ffi::{CStr, CString};
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;

use super::Policy;
use super::files::Recent;
use super::inodes::{Inode, stale};
use super::sys::{self, Fd, Stat};

/// Directories of one mount that are kept open.
const RECENT_DIRS: usize = 64;

/// What tells one file from another.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) struct Key {
    /// [`Mount::number`].
    pub(super) mount: u64,
    pub(super) dev: u64,
    /// Unique while the file is held open, or while nothing changes.
    pub(super) ino: u64,
}

/// Some open file of a mount, by which its file system is written out.
pub(super) enum Anchor {
    /// Of a mount that was made for the guest.
    Held(OwnedFd),
    /// Of one below a volume, that the host may unmount at any time: it is found
    /// again each time, as what is held open cannot be unmounted.
    Found { parent: Arc<Inode>, name: CString },
}

/// A mount the guest knows files of.
pub(super) struct Mount {
    /// The kernel's number. It is given to another once the mount is gone, which
    /// one that is held is not.
    pub(super) id: u64,
    /// Our own, which no other gets.
    pub(super) number: u64,
    /// Its file system.
    pub(super) dev: u64,
    anchor: Anchor,
    /// Nobody changes anything in it.
    pub(super) immutable: bool,
    /// [`sys::is_local`].
    pub(super) local: bool,
    /// Directories found by name and used last, so that what is deep below is not
    /// looked for from the root each time. By node id.
    pub(super) dirs: Recent<u64, Arc<OwnedFd>>,
}

impl Mount {
    /// The mount of `file`, an `O_PATH` descriptor; `again` is how to find it
    /// where it is not to be held.
    pub(super) fn open(
        policy: Policy,
        number: u64,
        file: BorrowedFd<'_>,
        stat: &Stat,
        again: Option<Anchor>,
    ) -> io::Result<Self> {
        let held = anchor(file, stat)?;
        let readonly = policy.readonly || sys::is_readonly(file)?;
        let immutable = policy.constant && readonly || sys::is_layers(file, stat.mount);
        let local = sys::is_local(file);
        let anchor = again.unwrap_or(Anchor::Held(held));
        let dirs = Recent::new(RECENT_DIRS);
        Ok(Self { id: stat.mount, number, dev: stat.attr.st_dev, anchor, immutable, local, dirs })
    }

    /// Whether its files are known by the names they were seen under last.
    pub(super) fn is_followed(&self) -> bool {
        !self.immutable && matches!(self.anchor, Anchor::Found { .. })
    }

    /// Whether it is the one found there now, and not another with its id.
    pub(super) fn is_at(&self, place: &Arc<Inode>, at: &CStr, stat: &Stat) -> bool {
        match &self.anchor {
            Anchor::Held(_) => true,
            Anchor::Found { parent, name } => {
                Arc::ptr_eq(parent, place) && name.as_c_str() == at && self.dev == stat.attr.st_dev
            }
        }
    }

    pub(super) fn anchor(&self) -> io::Result<Fd<'_>> {
        let (parent, name) = match &self.anchor {
            Anchor::Held(fd) => return Ok(Fd::Borrowed(fd.as_fd())),
            Anchor::Found { parent, name } => (parent, name),
        };
        let file = sys::open_at(parent.path_fd()?.as_fd(), name, libc::O_PATH, 0)?;
        let stat = sys::stat(file.as_fd(), c"")?;
        if stat.mount != self.id {
            return Err(stale());
        }
        anchor(file.as_fd(), &stat).map(Fd::Owned)
    }
}

/// A file system is written out by a file that is really open, which nothing but files and
/// directories may be.
fn anchor(file: BorrowedFd<'_>, stat: &Stat) -> io::Result<OwnedFd> {
    let opened = match stat.attr.st_mode & libc::S_IFMT {
        libc::S_IFDIR => sys::open_at(file, c".", libc::O_RDONLY | libc::O_DIRECTORY, 0),
        libc::S_IFREG => sys::reopen(file, libc::O_RDONLY | libc::O_NONBLOCK),
        _ => file.try_clone_to_owned(),
    };
    match opened {
        // Who may read it may not be root, if it is on another host.
        Err(error) if error.kind() == io::ErrorKind::PermissionDenied => file.try_clone_to_owned(),
        opened => opened,
    }
}

pub(super) fn key(mount: &Mount, stat: &Stat) -> Key {
    Key { mount: mount.number, dev: stat.attr.st_dev, ino: stat.attr.st_ino }
}
