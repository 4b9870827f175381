//! The files the guest knows, by node id.
//!
//! A node holds no descriptor where the host's file system gives file handles,
//! so that a guest may know any number of files. Where it does not, a node of
//! an immutable share is its parent and its name, which do not change; only
//! otherwise it is an `O_PATH` descriptor.

use std::collections::HashMap;
use std::ffi::{CStr, CString};
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};

use fuse_backend_rs::api::filesystem::ROOT_ID;

use super::sys::{self, Fd, FileHandle, Stat};

/// What tells one file from another.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
struct Key {
    mount: u64,
    file: FileId,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
enum FileId {
    Handle(Arc<FileHandle>),
    /// Unique while the file is held open, or while nothing changes.
    Number {
        dev: u64,
        ino: u64,
    },
}

/// How to get at a file.
enum Place {
    Handle { mount: Arc<Mount>, handle: Arc<FileHandle> },
    Name { parent: Arc<Inode>, name: CString },
    Fd(OwnedFd),
}

/// An open file of a mount, by which handles of that mount are opened.
pub(super) struct Mount(OwnedFd);

/// A file the guest knows.
pub(super) struct Inode {
    key: Key,
    place: Place,
    /// Its type, `S_IFMT` bits of its mode.
    kind: u32,
}

impl Inode {
    /// Whether it may be opened: opening anything else has effects of its own.
    pub(super) fn is_file_or_dir(&self) -> bool {
        matches!(self.kind, libc::S_IFREG | libc::S_IFDIR)
    }

    /// The mount it was reached through.
    pub(super) fn mount(&self) -> u64 {
        self.key.mount
    }

    /// A descriptor that stands for it, not open for data.
    pub(super) fn path_fd(&self) -> io::Result<Fd<'_>> {
        match &self.place {
            Place::Fd(fd) => Ok(Fd::Borrowed(fd.as_fd())),
            Place::Handle { mount, handle } => {
                sys::open_handle(mount.0.as_fd(), handle, libc::O_PATH).map(Fd::Owned)
            }
            Place::Name { parent, name } => {
                let dir = parent.path_fd()?;
                sys::open_at(dir.as_fd(), name, libc::O_PATH, 0).map(Fd::Owned)
            }
        }
    }

    /// Opens it.
    pub(super) fn open(&self, flags: i32) -> io::Result<OwnedFd> {
        if !self.is_file_or_dir() {
            return Err(io::Error::from_raw_os_error(libc::ENXIO));
        }
        match &self.place {
            Place::Fd(fd) => sys::reopen(fd.as_fd(), flags),
            Place::Handle { mount, handle } => sys::open_handle(mount.0.as_fd(), handle, flags),
            Place::Name { parent, name } => sys::open_at(parent.path_fd()?.as_fd(), name, flags, 0),
        }
    }
}

struct Known {
    inode: Arc<Inode>,
    /// Times the guest was told of it and has not forgotten it.
    lookups: u64,
}

#[derive(Default)]
struct Tables {
    by_id: HashMap<u64, Known>,
    by_key: HashMap<Key, u64>,
}

/// All files the guest knows.
pub(super) struct Inodes {
    tables: Mutex<Tables>,
    mounts: Mutex<HashMap<u64, Weak<Mount>>>,
    /// The tree does not change.
    immutable: bool,
    next: std::sync::atomic::AtomicU64,
}

/// A file found in a directory, and its attributes.
pub(super) struct Found {
    pub id: u64,
    pub stat: Stat,
}

impl Inodes {
    /// Knows nothing but `root`.
    pub(super) fn new(root: OwnedFd, immutable: bool) -> io::Result<Self> {
        let stat = sys::stat(root.as_fd(), c"")?;
        let inode = Inode { key: number(&stat), kind: libc::S_IFDIR, place: Place::Fd(root) };
        let mut tables = Tables::default();
        tables.by_key.insert(inode.key.clone(), ROOT_ID);
        tables.by_id.insert(ROOT_ID, Known { inode: Arc::new(inode), lookups: 1 });
        Ok(Self {
            tables: Mutex::new(tables),
            mounts: Mutex::default(),
            immutable,
            next: std::sync::atomic::AtomicU64::new(ROOT_ID + 1),
        })
    }

    fn tables(&self) -> MutexGuard<'_, Tables> {
        self.tables.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The file of a node id.
    pub(super) fn get(&self, id: u64) -> io::Result<Arc<Inode>> {
        let tables = self.tables();
        let known = tables.by_id.get(&id).ok_or_else(|| io::Error::from_raw_os_error(libc::EBADF))?;
        Ok(Arc::clone(&known.inode))
    }

    /// Looks `name` up in `dir`, which is `parent`; counts as one lookup.
    pub(super) fn look_up(&self, parent: &Arc<Inode>, dir: BorrowedFd<'_>, name: &CStr) -> io::Result<Found> {
        // Nothing can come between two calls by name where nothing changes.
        let fd = if self.immutable { None } else { Some(sys::open_at(dir, name, libc::O_PATH, 0)?) };
        let (at, path) = match &fd {
            Some(fd) => (fd.as_fd(), c""),
            None => (dir, name),
        };
        let stat = sys::stat(at, path)?;
        let handle = sys::handle_of(at, path)?.map(Arc::new);
        let key = match &handle {
            Some(handle) => Key { mount: stat.mount, file: FileId::Handle(Arc::clone(handle)) },
            None => number(&stat),
        };
        if let Some(id) = self.known(&key) {
            return Ok(Found { id, stat });
        }
        // A file whose handle cannot be opened is known by its number.
        let (key, place) = match handle.and_then(|handle| self.openable(parent, at, path, &stat, handle)) {
            Some((mount, handle)) => (key, Place::Handle { mount, handle }),
            None => {
                let key = number(&stat);
                if let Some(id) = self.known(&key) {
                    return Ok(Found { id, stat });
                }
                let place = match fd {
                    Some(fd) => Place::Fd(fd),
                    None => Place::Name { parent: Arc::clone(parent), name: name.to_owned() },
                };
                (key, place)
            }
        };
        let inode = Inode { key, place, kind: stat.attr.st_mode & libc::S_IFMT };
        Ok(Found { id: self.insert(inode), stat })
    }

    /// The node id of a file the guest knows already; counts as one lookup.
    fn known(&self, key: &Key) -> Option<u64> {
        let mut tables = self.tables();
        let id = *tables.by_key.get(key)?;
        let known = tables.by_id.get_mut(&id)?;
        known.lookups = known.lookups.saturating_add(1);
        Some(id)
    }

    fn insert(&self, inode: Inode) -> u64 {
        let mut tables = self.tables();
        // Another thread may have been faster.
        if let Some(id) = tables.by_key.get(&inode.key).copied()
            && let Some(known) = tables.by_id.get_mut(&id)
        {
            known.lookups = known.lookups.saturating_add(1);
            return id;
        }
        let id = self.next.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
        tables.by_key.insert(inode.key.clone(), id);
        tables.by_id.insert(id, Known { inode: Arc::new(inode), lookups: 1 });
        id
    }

    /// Takes back `count` lookups; the root is never forgotten.
    pub(super) fn forget(&self, forgotten: impl IntoIterator<Item = (u64, u64)>) {
        let mut gone = Vec::new();
        let mut tables = self.tables();
        for (id, count) in forgotten {
            let Some(known) = tables.by_id.get_mut(&id).filter(|_| id != ROOT_ID) else { continue };
            known.lookups = known.lookups.saturating_sub(count);
            if known.lookups == 0
                && let Some(known) = tables.by_id.remove(&id)
            {
                tables.by_key.remove(&known.inode.key);
                gone.push(known);
            }
        }
        // Descriptors are closed without the lock.
        drop(tables);
        drop(gone);
    }

    /// Forgets everything but the root.
    pub(super) fn clear(&self) {
        let ids: Vec<(u64, u64)> = self.tables().by_id.keys().map(|id| (*id, u64::MAX)).collect();
        self.forget(ids);
    }

    /// The mount by which `handle` can be opened, if it can.
    fn openable(
        &self,
        parent: &Arc<Inode>,
        at: BorrowedFd<'_>,
        path: &CStr,
        stat: &Stat,
        handle: Arc<FileHandle>,
    ) -> Option<(Arc<Mount>, Arc<FileHandle>)> {
        let mut mounts = self.mounts.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(mount) = mounts.get(&stat.mount).and_then(Weak::upgrade) {
            return Some((mount, handle));
        }
        let mount = open_mount(parent, at, path, stat).map(Mount).map(Arc::new).ok()?;
        // Being able to make handles does not mean being able to open them: that
        // takes CAP_DAC_READ_SEARCH, and a file system that decodes them.
        sys::open_handle(mount.0.as_fd(), &handle, libc::O_PATH).ok()?;
        mounts.retain(|_, mount| mount.strong_count() > 0);
        mounts.insert(stat.mount, Arc::downgrade(&mount));
        Some((mount, handle))
    }
}

/// Opens some file of the mount: the one found, or its parent if that is on the
/// same mount and the one found is neither file nor directory.
fn open_mount(parent: &Inode, at: BorrowedFd<'_>, path: &CStr, stat: &Stat) -> io::Result<OwnedFd> {
    match stat.attr.st_mode & libc::S_IFMT {
        libc::S_IFREG | libc::S_IFDIR if path.is_empty() => sys::reopen(at, libc::O_RDONLY),
        libc::S_IFREG | libc::S_IFDIR => sys::open_at(at, path, libc::O_RDONLY, 0),
        _ if parent.mount() == stat.mount => parent.open(libc::O_RDONLY),
        _ => Err(io::Error::from_raw_os_error(libc::EOPNOTSUPP)),
    }
}

fn number(stat: &Stat) -> Key {
    Key { mount: stat.mount, file: FileId::Number { dev: stat.attr.st_dev, ino: stat.attr.st_ino } }
}
