//! The FUSE server: what the guest asks of its file system, done to a directory
//! tree of the host.
//!
//! `fuse-backend-rs` decodes messages and encodes answers; this is its
//! [`FileSystem`]. Rules it keeps whatever the guest sends:
//!
//! - A name is one component: never empty, `.`, `..` or with a `/` in it, and
//!   never followed if it is a symbolic link. Links are the guest's to resolve.
//! - Nothing but files and directories is ever opened: a device or a FIFO put
//!   into a volume has no effect on the host.
//! - A share that is configured read-only answers every change with EROFS
//!   before anything else of the request is looked at.
//! - Lengths the guest asks for are bounded before memory is allocated, open
//!   files by [`Policy::max_open_files`].
//!
//! The guest's kernel checks permissions and resolves paths
//! (`default_permissions`); a process of the guest that makes a file owns it,
//! with its uid as it is (see [`sys::ActingFor`]).

mod files;
mod inodes;
mod mounts;
mod nodes;
mod ops;
mod sys;
mod xattrs;

use std::ffi::CStr;
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, PoisonError};
use std::time::Duration;

use fuse_backend_rs::abi::fuse_abi::ATTR_SUBMOUNT;
use fuse_backend_rs::api::filesystem::{Entry, FsOptions, OpenOptions};

use crate::procfs;
use files::{DirStream, Handles, OpenFile, Recent};
use inodes::{Found, Inode, Inodes};
use sys::{ActingFor, Fd};

/// How long the guest may keep what does not change.
const FOR_EVER: Duration = Duration::from_secs(86_400);
/// How long it may keep what the host may change.
const A_MOMENT: Duration = Duration::from_secs(1);
/// Bytes of a file that one request reads whole.
const READ_AT_ONCE: i64 = 128 << 10;
/// Files kept open for a guest that opens nothing itself.
const RECENT_FILES: usize = 64;
/// Directories kept open for it between two requests for entries.
const RECENT_DIRS: usize = 16;
/// Files and directories the guest may have open, however many the host allows.
const MAX_OPEN_FILES: usize = 32 << 10;
/// Bytes of directory entries in one answer.
const MAX_DIR_BYTES: u32 = 1 << 20;
/// Our guest kernel's `FOPEN_RELEASE_UNANSWERED`: a file is closed without an answer, which nobody waits for. Others
/// know nothing of it and wait.
// SAFETY: the type stands for 32 bits, all of which the guest is sent.
const UNANSWERED: OpenOptions = unsafe { OpenOptions::from_bits_unchecked(1 << 31) };
/// Its `FOPEN_DIR_SHORT_IS_LAST`: where an answer with entries has room for another one, they were the last.
// SAFETY: as above.
const SHORT_IS_LAST: OpenOptions = unsafe { OpenOptions::from_bits_unchecked(1 << 30) };
/// `FOPEN_NOFLUSH`: the guest does not ask at each `close` what became of what was written (FLUSH).
// SAFETY: as above.
const NO_FLUSH: OpenOptions = unsafe { OpenOptions::from_bits_unchecked(1 << 5) };

/// How a share is served.
#[derive(Clone, Copy, Debug)]
pub struct Policy {
    /// Every change is refused.
    pub readonly: bool,
    /// Nobody changes the tree while it is shared.
    pub constant: bool,
    /// Files and directories the guest may have open at a time.
    pub max_open_files: usize,
}

impl Policy {
    /// Takes all descriptors the process can have, and half of them for open
    /// files; the rest is for inodes and for everything else the process does.
    pub fn new(readonly: bool, constant: bool) -> io::Result<Self> {
        let limit = usize::try_from(sys::raise_descriptor_limit()?).unwrap_or(usize::MAX);
        Ok(Self { readonly, constant, max_open_files: MAX_OPEN_FILES.min(limit / 2) })
    }
}

/// A directory tree, served.
pub struct Passthrough {
    policy: Policy,
    inodes: Inodes,
    handles: Handles,
    /// By node id; used where the guest opens nothing itself.
    recent_files: Recent<u64, Arc<OpenFile>>,
    /// By node id and the offset that comes next.
    recent_dirs: Recent<(u64, u64), DirStream>,
    /// The guest opens neither files nor directories: FUSE_NO_OPEN_SUPPORT and
    /// FUSE_NO_OPENDIR_SUPPORT were agreed on.
    no_open: AtomicBool,
    no_opendir: AtomicBool,
    /// The guest is told which directories are mounts, and mounts them.
    submounts: AtomicBool,
    proc_self_fd: File,
}

/// What a file was right before it was written to, and is right after.
#[derive(Debug)]
pub struct Seen {
    /// When its content had been modified last: seconds and nanoseconds.
    pub mtime: (i64, i64),
    /// Its attributes afterwards.
    pub after: libc::stat64,
    /// How long they may be kept.
    pub timeout: Duration,
}

impl Passthrough {
    /// Serves the tree below `root`.
    pub fn new(root: OwnedFd, policy: Policy) -> io::Result<Self> {
        Ok(Self {
            policy,
            inodes: Inodes::new(root, policy)?,
            handles: Handles::new(policy.max_open_files),
            recent_files: Recent::new(RECENT_FILES),
            recent_dirs: Recent::new(RECENT_DIRS),
            no_open: AtomicBool::new(false),
            no_opendir: AtomicBool::new(false),
            submounts: AtomicBool::new(false),
            proc_self_fd: procfs::open("fd")?,
        })
    }

    /// Prepares the calling thread to serve; without it no request may be.
    pub fn enter_thread(&self) -> io::Result<()> {
        sys::enter_server_thread(self.proc_self_fd.as_fd())
    }

    /// The FUSE features the server wants of those the guest offers.
    fn options(&self, offered: FsOptions) -> FsOptions {
        let mut wanted = FsOptions::ASYNC_READ
            | FsOptions::BIG_WRITES
            | FsOptions::MAX_PAGES
            | FsOptions::ATOMIC_O_TRUNC
            | FsOptions::PARALLEL_DIROPS
            | FsOptions::DO_READDIRPLUS
            | FsOptions::CACHE_SYMLINKS
            | FsOptions::DONT_MASK
            | FsOptions::POSIX_ACL
            | FsOptions::HANDLE_KILLPRIV_V2
            | FsOptions::SUBMOUNTS;
        if !self.policy.constant {
            wanted |= FsOptions::AUTO_INVAL_DATA;
        }
        if self.policy.readonly && self.policy.constant {
            wanted |= FsOptions::ZERO_MESSAGE_OPEN | FsOptions::ZERO_MESSAGE_OPENDIR;
        }
        let agreed = wanted & offered;
        self.no_open.store(agreed.contains(FsOptions::ZERO_MESSAGE_OPEN), Ordering::Relaxed);
        self.no_opendir.store(agreed.contains(FsOptions::ZERO_MESSAGE_OPENDIR), Ordering::Relaxed);
        self.submounts.store(agreed.contains(FsOptions::SUBMOUNTS), Ordering::Relaxed);
        agreed
    }

    /// Forgets what the guest knows and has open.
    fn forget_all(&self) {
        self.handles.clear();
        self.recent_files.remove_if(|_| true);
        self.recent_dirs.remove_if(|_| true);
        self.inodes.clear();
    }

    /// Refuses changes of a read-only share.
    fn change(&self) -> io::Result<()> {
        if self.policy.readonly { Err(io::Error::from_raw_os_error(libc::EROFS)) } else { Ok(()) }
    }

    fn timeout(&self, immutable: bool) -> Duration {
        if immutable || self.policy.constant { FOR_EVER } else { A_MOMENT }
    }

    /// How long attributes may be kept. A file that is a mount of its own and read in one go
    /// is one of configuration (`/etc/resolv.conf`), which whoever made the container writes
    /// anew when its network changes, often right before its process reads it: with the size
    /// of a moment ago that one would read it cut off.
    fn attributes_timeout(&self, immutable: bool, alone: bool, attr: &libc::stat64) -> Duration {
        match self.timeout(immutable) {
            A_MOMENT if alone && attr.st_size <= READ_AT_ONCE => Duration::ZERO,
            usual => usual,
        }
    }

    fn entry(&self, parent: &Inode, found: &Found) -> Entry {
        let submount = found.is_submount && self.submounts.load(Ordering::Relaxed);
        Entry {
            inode: found.id,
            generation: 0,
            attr: found.stat.attr,
            attr_flags: if submount { ATTR_SUBMOUNT } else { 0 },
            attr_timeout: self.attributes_timeout(found.immutable, found.is_alone, &found.stat.attr),
            // What is in the root comes and goes with containers, whatever the
            // rest does; not keeping it lets the guest forget what has gone.
            entry_timeout: if parent.is_root() {
                Duration::ZERO
            } else {
                self.timeout(parent.is_immutable())
            },
        }
    }

    fn find(&self, parent: &Arc<Inode>, dir: BorrowedFd<'_>, name: &CStr) -> io::Result<Entry> {
        self.inodes.look_up(parent, dir, name).map(|found| self.entry(parent, &found))
    }

    /// The same of an entry of the directory.
    fn find_entry(
        &self,
        parent: &Arc<Inode>,
        dir: BorrowedFd<'_>,
        name: &CStr,
        ino: u64,
    ) -> io::Result<Entry> {
        self.inodes.look_up_entry(parent, dir, name, ino).map(|found| self.entry(parent, &found))
    }

    /// What of the guest's flags concerns the host: the guest has resolved, created and locked
    /// already, and direct I/O is between it and its own page cache.
    const OPEN_FLAGS: i32 = libc::O_ACCMODE | libc::O_TRUNC | libc::O_APPEND | libc::O_SYNC | libc::O_DSYNC;

    /// A descriptor that stands for a file. One that is known by its place may have gone from there, or be nowhere any
    /// more: as long as the guest has it open, it is that.
    fn path_fd<'a>(&self, inode: &'a Inode) -> io::Result<Fd<'a>> {
        inode.path_fd().or_else(|error| self.instead(inode, error))
    }

    /// Opens it.
    fn open_inode(&self, inode: &Inode, flags: i32) -> io::Result<OwnedFd> {
        inode.open(flags).or_else(|error| sys::reopen(self.instead(inode, error)?.as_fd(), flags))
    }

    fn instead(&self, inode: &Inode, error: io::Error) -> io::Result<Fd<'static>> {
        match error.raw_os_error() {
            Some(libc::ESTALE) => self.handles.any(inode.id()).ok_or(error),
            _ => Err(error),
        }
    }

    /// Opens a file for the guest's `flags`, as far as they concern the host.
    fn open_for(&self, inode: &Inode, flags: u32) -> io::Result<OpenFile> {
        let flags = flags.cast_signed();
        if flags & libc::O_ACCMODE != libc::O_RDONLY || flags & libc::O_TRUNC != 0 {
            self.change()?;
        }
        // Opening never waits, e.g. for a lease to be broken.
        let fd = self.open_inode(inode, flags & Self::OPEN_FLAGS | libc::O_NONBLOCK)?;
        Ok(OpenFile::new(fd, flags & libc::O_APPEND != 0))
    }

    /// The open file of a request: by its handle, or the recently used one.
    fn file(&self, id: u64, handle: u64) -> io::Result<Arc<OpenFile>> {
        if !self.no_open.load(Ordering::Relaxed) {
            return self.handles.file(id, handle);
        }
        if let Some(file) = self.recent_files.get(&id) {
            return Ok(file);
        }
        let file = Arc::new(self.open_for(&*self.inodes.get(id)?, libc::O_RDONLY.cast_unsigned())?);
        self.recent_files.put(id, Arc::clone(&file));
        Ok(file)
    }

    /// What became of what was written to an open file. Where the file system is this host's own, the answers to WRITE
    /// have said it.
    fn flush_file(&self, id: u64, handle: u64) -> io::Result<()> {
        if self.no_open.load(Ordering::Relaxed) {
            // There are no handles, and the guest asks no more.
            return Err(io::Error::from_raw_os_error(libc::ENOSYS));
        }
        let file = self.handles.file(id, handle)?;
        if self.inodes.get(id)?.is_local() { Ok(()) } else { sys::flush(file.fd()) }
    }

    /// Has `act` done in the name of a user of the guest, where that can make a difference: a server on another host
    /// grants him what it does not grant root (`root_squash`, the default of NFS exports).
    pub fn for_user<T>(&self, id: u64, uid: u32, gid: u32, act: impl FnOnce() -> T) -> Option<T> {
        if uid == 0 || self.inodes.get(id).ok()?.is_local() {
            return None;
        }
        let _acting = ActingFor::user(uid, gid).ok()?;
        Some(act())
    }

    /// Closes what the guest has open as `handle` of a node.
    pub fn close(&self, id: u64, handle: u64) -> io::Result<()> {
        self.handles.release(id, handle)
    }

    /// Writes what the host's file system of a node holds to its disk.
    pub fn sync_fs(&self, id: u64) -> io::Result<()> {
        if self.policy.readonly { Ok(()) } else { self.inodes.get(id)?.sync_fs() }
    }

    fn open_dir(&self, inode: &Inode) -> io::Result<DirStream> {
        self.open_inode(inode, libc::O_RDONLY | libc::O_DIRECTORY).map(DirStream::new)
    }

    /// Gives directory entries from `offset` on to `take` until it wants no more.
    fn read_dir(
        &self,
        id: u64,
        handle: u64,
        offset: u64,
        take: &mut dyn FnMut(BorrowedFd<'_>, files::Dirent<'_>) -> io::Result<bool>,
    ) -> io::Result<()> {
        if !self.no_opendir.load(Ordering::Relaxed) {
            let dir = self.handles.dir(id, handle)?;
            let mut dir = dir.lock().unwrap_or_else(PoisonError::into_inner);
            return dir.read(offset, take);
        }
        let mut dir = match self.recent_dirs.take(&(id, offset)).filter(|_| offset != 0) {
            Some(dir) => dir,
            None => self.open_dir(&*self.inodes.get(id)?)?,
        };
        let mut taken = false;
        let result = dir.read(offset, |fd, entry| {
            let more = take(fd, entry)?;
            taken |= more;
            Ok(more)
        });
        // At the end of the directory nothing follows.
        if result.is_ok() && taken {
            self.recent_dirs.put((id, dir.offset()), dir);
        }
        result
    }

    /// What the guest's page cache may do with a file or directory it opens, whether it waits for it to be closed,
    /// and whether it asks what became of what was written. `flags` are those it is opened with.
    ///
    /// Another host's server may keep a `close` for as long as it likes, whatever the file was open for. A thread that
    /// does what nobody waits for has another one's request in hand, and would keep that too.
    fn open_options(&self, inode: &Inode, flags: i32) -> OpenOptions {
        let cache = match (self.policy.constant || inode.is_immutable(), flags & libc::O_DIRECTORY != 0) {
            (true, true) => OpenOptions::KEEP_CACHE | OpenOptions::CACHE_DIR,
            (true, false) => OpenOptions::KEEP_CACHE,
            (false, true) => SHORT_IS_LAST,
            (false, false) => OpenOptions::empty(),
        };
        // Closing what was not written to says nothing.
        match (inode.is_local(), flags & libc::O_ACCMODE == libc::O_RDONLY) {
            (true, _) => cache | UNANSWERED | NO_FLUSH,
            (false, true) => cache | NO_FLUSH,
            (false, false) => cache,
        }
    }
}

/// Refuses names that are not one component.
fn component(name: &CStr) -> io::Result<&CStr> {
    match name.to_bytes() {
        b"" | b"." | b".." => Err(io::Error::from_raw_os_error(libc::EINVAL)),
        bytes if bytes.contains(&b'/') => Err(io::Error::from_raw_os_error(libc::EINVAL)),
        _ => Ok(name),
    }
}
