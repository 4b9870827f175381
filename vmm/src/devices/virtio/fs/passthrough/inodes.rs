//! The files the guest knows, by node id.
//!
//! A node of an immutable mount is its parent and its name, which do not change. One of a
//! mount that the host may take off again is the name under which it was seen last, as a
//! descriptor would keep the mount. Any other is an `O_PATH` descriptor: a file handle would
//! be none, but to open by handle takes a capability over the whole host, which a monitor
//! that is shut in has not.

use std::collections::HashMap;
use std::ffi::{CStr, CString};
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};

use fuse_backend_rs::api::filesystem::ROOT_ID;

use super::mounts::{Anchor, Key, Mount, key};
use super::sys::{self, Fd, Stat};
use super::{Policy, nodes};

/// Names from a file up to a directory that is held, at most: as many as a path has (`PATH_MAX`, of which each takes
/// two bytes). A guest can nest more of them, and each of its requests would look all of them up again.
const MAX_NAMES: usize = libc::PATH_MAX as usize / 2;

/// How to get at a file.
enum Place {
    /// Where it stays.
    Name(Sighting),
    /// Where it was seen last. It may have gone from there: then it is stale, and the
    /// guest looks its name up again.
    Seen(Mutex<Sighting>),
    Fd(OwnedFd),
    /// The root of the share, always held.
    Root(OwnedFd),
    /// Nobody knows it any more ([`Inode::drop`]).
    Gone,
}

#[derive(Clone)]
struct Sighting {
    parent: Arc<Inode>,
    name: CString,
}

/// A file the guest knows.
pub(super) struct Inode {
    id: u64,
    key: Key,
    place: Place,
    mount: Arc<Mount>,
    /// Its type, `S_IFMT` bits of its mode.
    kind: u32,
    /// It is a file, and a mount of its own.
    alone: bool,
    /// It is known to have no `security.capability`.
    no_capability: AtomicBool,
}

impl Inode {
    /// Its node id.
    pub(super) fn id(&self) -> u64 {
        self.id
    }

    /// Whether it may be opened: opening anything else has effects of its own.
    pub(super) fn is_file_or_dir(&self) -> bool {
        matches!(self.kind, libc::S_IFREG | libc::S_IFDIR)
    }

    /// Whether it is a device node, or a whiteout.
    pub(super) fn is_device(&self) -> bool {
        matches!(self.kind, libc::S_IFCHR | libc::S_IFBLK)
    }

    /// Whether what is in it is known by the names it was seen under last.
    pub(super) fn is_followed(&self) -> bool {
        self.mount.is_followed()
    }

    /// Whether it was found to have no `security.capability`; only of what is
    /// immutable.
    pub(super) fn lacks_capability(&self) -> bool {
        self.no_capability.load(Ordering::Relaxed)
    }

    /// Remembers that for the next time.
    pub(super) fn note_no_capability(&self) {
        self.no_capability.store(true, Ordering::Relaxed);
    }

    /// Whether it is the root of the share.
    pub(super) fn is_root(&self) -> bool {
        matches!(self.place, Place::Root(_))
    }

    /// Writes what its file system holds to the host's disk.
    pub(super) fn sync_fs(&self) -> io::Result<()> {
        sys::sync_fs(self.mount.anchor()?.as_fd()).map_err(|error| match error.raw_os_error() {
            // It is not really open, as its server refused that.
            Some(libc::EBADF) => io::Error::from_raw_os_error(libc::EACCES),
            _ => error,
        })
    }

    /// Whether it is a file that is a mount of its own, as a volume of one file is.
    pub(super) fn is_alone(&self) -> bool {
        self.alone
    }

    /// Whether neither host nor guest changes it, or what is in it.
    pub(super) fn is_immutable(&self) -> bool {
        self.mount.immutable
    }

    /// Whether nobody but this host's kernel has a say when it is opened, read or closed.
    pub(super) fn is_local(&self) -> bool {
        self.mount.local
    }

    /// A descriptor that stands for it, not open for data. Without recursion: how deep it lies the guest says, and
    /// names that were seen one after another, while the host renamed, may be a circle.
    pub(super) fn path_fd(&self) -> io::Result<Fd<'_>> {
        if let Some(fd) = self.held() {
            return Ok(fd);
        }
        let (mut way, mut next) = (Vec::new(), self.sighting());
        let top = loop {
            way.push(next.filter(|_| way.len() < MAX_NAMES).ok_or_else(stale)?);
            let parent = way.last().map(|at: &Sighting| &at.parent);
            match parent.and_then(|parent| parent.held()) {
                Some(fd) => break fd,
                None => next = parent.and_then(|parent| parent.sighting()),
            }
        };
        let mut opened: Option<Fd<'static>> = None;
        for (index, at) in way.iter().enumerate().rev() {
            let below = index.checked_sub(1).and_then(|below| way.get(below));
            let inode = below.map_or(self, |below| &*below.parent);
            let dir = opened.as_ref().map_or(top.as_fd(), Fd::as_fd);
            opened = Some(inode.open_in(dir, &at.name)?);
        }
        opened.ok_or_else(stale)
    }

    /// What of it is open anyway.
    fn held(&self) -> Option<Fd<'_>> {
        match &self.place {
            Place::Fd(fd) | Place::Root(fd) => Some(Fd::Borrowed(fd.as_fd())),
            Place::Name(_) => self.mount.dirs.get(&self.id).map(Fd::Shared),
            Place::Seen(_) | Place::Gone => None,
        }
    }

    /// Where it is, unless it is held.
    fn sighting(&self) -> Option<Sighting> {
        match &self.place {
            Place::Name(at) => Some(at.clone()),
            Place::Seen(at) => Some(at.lock().unwrap_or_else(PoisonError::into_inner).clone()),
            Place::Fd(_) | Place::Root(_) | Place::Gone => None,
        }
    }

    /// Opens what is called `name` in `dir`, its parent, if it is this file.
    fn open_in(&self, dir: BorrowedFd<'_>, name: &CStr) -> io::Result<Fd<'static>> {
        let opened = sys::open_at(dir, name, libc::O_PATH, 0);
        if let Place::Seen(_) = self.place {
            let fd = opened.map_err(|error| match error.raw_os_error() {
                Some(libc::ENOENT | libc::ENOTDIR) => stale(),
                _ => error,
            })?;
            let stat = sys::stat(fd.as_fd(), c"")?;
            let is_it = stat.mount == self.mount.id && key(&self.mount, &stat) == self.key;
            return if is_it { Ok(Fd::Owned(fd)) } else { Err(stale()) };
        }
        let fd = opened?;
        if self.kind != libc::S_IFDIR {
            return Ok(Fd::Owned(fd));
        }
        let fd = Arc::new(fd);
        self.mount.dirs.put(self.id, Arc::clone(&fd));
        Ok(Fd::Shared(fd))
    }

    /// The directory it is in, unless it is held.
    fn parent(&self) -> Option<Arc<Inode>> {
        match &self.place {
            Place::Name(at) => Some(Arc::clone(&at.parent)),
            Place::Seen(at) => Some(Arc::clone(&at.lock().unwrap_or_else(PoisonError::into_inner).parent)),
            Place::Fd(_) | Place::Root(_) | Place::Gone => None,
        }
    }

    fn is_in(&self, parent: &Arc<Inode>) -> bool {
        self.parent().is_some_and(|known| Arc::ptr_eq(&known, parent))
    }

    /// Whether it is `other`, or was seen somewhere below it; also where it lies too deep to say.
    fn is_within(&self, other: &Self) -> bool {
        let (mut id, mut next) = (self.id, self.parent());
        for _ in 0..MAX_NAMES {
            match next {
                _ if id == other.id => return true,
                Some(parent) => (id, next) = (parent.id, parent.parent()),
                None => return false,
            }
        }
        true
    }

    /// Opens it.
    pub(super) fn open(&self, flags: i32) -> io::Result<OwnedFd> {
        if !self.is_file_or_dir() {
            return Err(io::Error::from_raw_os_error(libc::ENXIO));
        }
        match &self.place {
            Place::Fd(fd) | Place::Root(fd) => sys::reopen(fd.as_fd(), flags),
            Place::Name(at) => sys::open_at(at.parent.path_fd()?.as_fd(), &at.name, flags, 0),
            Place::Seen(_) | Place::Gone => sys::reopen(self.path_fd()?.as_fd(), flags),
        }
    }

    /// Takes it from its place; the directory it was in.
    fn leave(&mut self) -> Option<Arc<Inode>> {
        match std::mem::replace(&mut self.place, Place::Gone) {
            Place::Name(at) => Some(at.parent),
            Place::Seen(at) => Some(at.into_inner().unwrap_or_else(PoisonError::into_inner).parent),
            Place::Fd(_) | Place::Root(_) | Place::Gone => None,
        }
    }
}

impl Drop for Inode {
    /// Those above it that nobody else knows go one after another, not each within the one below.
    fn drop(&mut self) {
        let mut next = self.leave();
        while let Some(parent) = next {
            next = Arc::into_inner(parent).and_then(|mut parent| parent.leave());
        }
    }
}

/// Whether a directory seen in `parent` is to be a file system of its own in the guest: it is on another mount, or its
/// numbers are of another series than its parent's, as those of each subvolume of Btrfs are. Two files with one number
/// and one device are taken for one by whatever asks for that (`tar`, `rsync -H`, `find -xdev`).
fn is_submount(parent: &Inode, mount: &Mount, stat: &Stat) -> bool {
    let is_dir = stat.attr.st_mode & libc::S_IFMT == libc::S_IFDIR;
    is_dir && (mount.id != parent.mount.id || stat.attr.st_dev != parent.key.dev)
}

pub(super) fn stale() -> io::Error {
    io::Error::from_raw_os_error(libc::ESTALE)
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
    /// The file system of the root.
    root_dev: u64,
    policy: Policy,
    next: AtomicU64,
}

/// Where a file was found: by its name, which stays, or held open meanwhile.
enum At<'a> {
    Name { parent: &'a Arc<Inode>, name: &'a CStr },
    Fd { parent: &'a Arc<Inode>, name: &'a CStr, fd: OwnedFd },
}

/// A file found in a directory, and its attributes.
pub(super) struct Found {
    pub id: u64,
    pub stat: Stat,
    /// Whether its attributes and content do not change.
    pub immutable: bool,
    /// [`Inode::is_alone`].
    pub is_alone: bool,
    /// [`is_submount`].
    pub is_submount: bool,
}

impl Inodes {
    /// Knows nothing but `root`.
    pub(super) fn new(root: OwnedFd, policy: Policy) -> io::Result<Self> {
        let stat = sys::stat(root.as_fd(), c"")?;
        let mount = Arc::new(Mount::open(policy, 0, root.as_fd(), &stat, None)?);
        let mounts = HashMap::from([(stat.mount, Arc::downgrade(&mount))]);
        let inode = Inode {
            id: ROOT_ID,
            key: key(&mount, &stat),
            kind: libc::S_IFDIR,
            alone: false,
            place: Place::Root(root),
            mount,
            no_capability: AtomicBool::new(false),
        };
        let mut tables = Tables::default();
        tables.by_key.insert(inode.key, ROOT_ID);
        tables.by_id.insert(ROOT_ID, Known { inode: Arc::new(inode), lookups: 1 });
        Ok(Self {
            tables: Mutex::new(tables),
            mounts: Mutex::new(mounts),
            root_dev: stat.attr.st_dev,
            policy,
            next: AtomicU64::new(ROOT_ID + 1),
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
        if parent.mount.immutable {
            // Nothing can come between two calls by name where nothing changes.
            let stat = sys::stat(dir, name)?;
            if stat.mount == parent.mount.id {
                return self.found(parent, Arc::clone(&parent.mount), At::Name { parent, name }, stat);
            }
        } else if let Some(found) = self.held(parent, sys::stat(dir, name)?) {
            return Ok(found);
        }
        self.found_open(parent, name, sys::open_at(dir, name, libc::O_PATH, 0)?)
    }

    /// The same of a name read from the directory, of a file that has this number there.
    pub(super) fn look_up_entry(
        &self,
        parent: &Arc<Inode>,
        dir: BorrowedFd<'_>,
        name: &CStr,
        ino: u64,
    ) -> io::Result<Found> {
        let key = Key { ino, ..parent.key };
        if parent.mount.immutable || self.tables().by_key.contains_key(&key) {
            return self.look_up(parent, dir, name);
        }
        self.found_open(parent, name, sys::open_at(dir, name, libc::O_PATH, 0)?)
    }

    /// Files the guest knows.
    pub(super) fn count(&self) -> usize {
        self.tables().by_id.len()
    }

    /// A file seen in `parent` that is held open, and so is the one with its number: it need not be opened to be
    /// known again.
    fn held(&self, parent: &Inode, stat: Stat) -> Option<Found> {
        let mount = &parent.mount;
        let kind = stat.attr.st_mode & libc::S_IFMT;
        // Whether it is a device the guest has made has to be read.
        if stat.mount != mount.id || mount.is_followed() || kind == libc::S_IFCHR {
            return None;
        }
        let mut tables = self.tables();
        let id = *tables.by_key.get(&key(mount, &stat))?;
        let known = tables.by_id.get_mut(&id)?;
        if known.inode.kind != kind || !matches!(known.inode.place, Place::Fd(_)) {
            return None;
        }
        known.lookups = known.lookups.saturating_add(1);
        let is_submount = is_submount(parent, mount, &stat);
        Some(Found { id, stat, immutable: false, is_alone: false, is_submount })
    }

    /// The same of the file `name` of `parent` that is open already, with `O_PATH`.
    pub(super) fn found_open(&self, parent: &Arc<Inode>, name: &CStr, fd: OwnedFd) -> io::Result<Found> {
        let mut stat = sys::stat(fd.as_fd(), c"")?;
        nodes::restore(fd.as_fd(), &mut stat.attr);
        let mount = match stat.mount == parent.mount.id {
            true => Arc::clone(&parent.mount),
            false => self.mount(parent, name, fd.as_fd(), &stat)?,
        };
        self.found(parent, mount, At::Fd { parent, name, fd }, stat)
    }

    fn found(&self, parent: &Inode, mount: Arc<Mount>, at: At<'_>, stat: Stat) -> io::Result<Found> {
        let immutable = mount.immutable;
        let key = key(&mount, &stat);
        let kind = stat.attr.st_mode & libc::S_IFMT;
        let is_submount = is_submount(parent, &mount, &stat);
        let is_alone = mount.id != parent.mount.id && kind == libc::S_IFREG;
        let id = match self.known(&key, kind, &at) {
            Some(id) => id,
            None => {
                let place = match at {
                    At::Name { parent, name } => {
                        Place::Name(Sighting { parent: Arc::clone(parent), name: name.to_owned() })
                    }
                    // A file without a name is held.
                    At::Fd { parent, name, .. } if mount.is_followed() && !name.is_empty() => {
                        Place::Seen(Mutex::new(Sighting {
                            parent: Arc::clone(parent),
                            name: name.to_owned(),
                        }))
                    }
                    At::Fd { fd, .. } => Place::Fd(fd),
                };
                let id = self.next.fetch_add(1, Ordering::Relaxed);
                self.insert(Inode {
                    id,
                    key,
                    place,
                    mount,
                    kind,
                    alone: is_alone,
                    no_capability: AtomicBool::new(false),
                })
            }
        };
        Ok(Found { id, stat, immutable, is_alone, is_submount })
    }

    /// The node id of a file the guest knows already, which was seen at this place now;
    /// counts as one lookup.
    fn known(&self, key: &Key, kind: u32, at: &At<'_>) -> Option<u64> {
        let mut tables = self.tables();
        let id = *tables.by_key.get(key)?;
        let known = tables.by_id.get_mut(&id)?;
        if known.inode.kind != kind {
            // The number of a file that is gone was given to another.
            tables.by_key.remove(key);
            return None;
        }
        known.lookups = known.lookups.saturating_add(1);
        if let (Place::Seen(seen), At::Fd { parent, name, .. }) = (&known.inode.place, at)
            && !name.is_empty()
            // What was found below what it contains itself was moved meanwhile. A circle would never be forgotten: it is
            // stale until it is looked up again. Places change here alone, one at a time, as the tables are locked.
            && (kind != libc::S_IFDIR || known.inode.is_in(parent) || !parent.is_within(&known.inode))
        {
            let sighting = Sighting { parent: Arc::clone(parent), name: (*name).to_owned() };
            let old = std::mem::replace(&mut *seen.lock().unwrap_or_else(PoisonError::into_inner), sighting);
            // Its parent may be forgotten with it, which takes no lock.
            drop(tables);
            drop(old);
        }
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
        let id = inode.id;
        tables.by_key.insert(inode.key, id);
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
                if tables.by_key.get(&known.inode.key) == Some(&id) {
                    tables.by_key.remove(&known.inode.key);
                }
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

    /// The mount of a file found at the end of another one.
    fn mount(
        &self,
        parent: &Arc<Inode>,
        name: &CStr,
        file: BorrowedFd<'_>,
        stat: &Stat,
    ) -> io::Result<Arc<Mount>> {
        let mut mounts = self.mounts.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(mount) = mounts.get(&stat.mount).and_then(Weak::upgrade)
            && mount.is_at(parent, name, stat)
        {
            return Ok(mount);
        }
        let again = (parent.mount.dev != self.root_dev)
            .then(|| Anchor::Found { parent: Arc::clone(parent), name: name.to_owned() });
        let number = self.next.fetch_add(1, Ordering::Relaxed);
        let mount = Arc::new(Mount::open(self.policy, number, file, stat, again)?);
        mounts.retain(|_, mount| mount.strong_count() > 0);
        mounts.insert(stat.mount, Arc::downgrade(&mount));
        Ok(mount)
    }
}

#[cfg(test)]
mod tests;
