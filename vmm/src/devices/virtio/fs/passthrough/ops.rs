//! The operations, one per FUSE opcode. Those left out are answered ENOSYS,
//! and the guest's kernel then does without: locks stay within the guest,
//! ACCESS is not asked again, `copy_file_range` becomes read and write.

use std::ffi::CStr;
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::atomic::Ordering;
use std::time::Duration;

use fuse_backend_rs::abi::fuse_abi::{CreateIn, FOPEN_IN_KILL_SUIDGID, WRITE_KILL_PRIV, WriteIn};
use fuse_backend_rs::api::filesystem::{
    Context, DirEntry, Entry, FileSystem, FsOptions, GetxattrReply, ListxattrReply, OpenOptions,
    SetattrValid, ZeroCopyWriter,
};

use super::super::MAX_IO_BYTES;
use super::files::{Dirent, OpenFile};
use super::inodes::Inode;
use super::nodes;
use super::sys::{self, ActingFor, Lent};
use super::xattrs::{self, Found};
use super::{MAX_DIR_BYTES, Passthrough, Seen, component};

/// `fallocate(2)` modes FUSE knows.
const ALLOCATE_MODES: i32 =
    libc::FALLOC_FL_KEEP_SIZE | libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_ZERO_RANGE;

fn errno<T>(number: i32) -> io::Result<T> {
    Err(io::Error::from_raw_os_error(number))
}

/// An offset or length as the host's kernel takes it.
fn signed(value: u64) -> io::Result<i64> {
    i64::try_from(value).or_else(|_| errno(libc::EINVAL))
}

/// Takes set-user-id and set-group-id off a file somebody without the right
/// to keep them is about to write.
fn kill_privileges(fd: BorrowedFd<'_>) -> io::Result<()> {
    let mode = sys::mode(fd)?;
    let group = if mode & libc::S_IXGRP != 0 { libc::S_ISGID } else { 0 };
    let killed = mode & !(libc::S_ISUID | group);
    if killed == mode { Ok(()) } else { sys::chmod(fd, killed & 0o7777) }
}

impl Passthrough {
    fn attributes(&self, inode: &Inode) -> io::Result<(libc::stat64, Duration)> {
        let path = self.path_fd(inode)?;
        let mut stat = sys::stat(path.as_fd(), c"")?;
        nodes::restore(path.as_fd(), &mut stat.attr);
        let timeout = self.attributes_timeout(inode.is_immutable(), inode.is_alone(), &stat.attr);
        Ok((stat.attr, timeout))
    }

    /// The same of an open file, which is asked without being opened again.
    fn attributes_of_open(&self, id: u64, file: &OpenFile) -> io::Result<(libc::stat64, Duration)> {
        let attr = sys::stat(file.fd(), c"")?.attr;
        let alone = self.inodes.get(id).is_ok_and(|inode| inode.is_alone());
        Ok((attr, self.attributes_timeout(false, alone, &attr)))
    }

    /// Makes something called `name` in `parent` for a process of the guest and
    /// looks it up.
    fn make(
        &self,
        ctx: &Context,
        parent: u64,
        name: &CStr,
        umask: u32,
        make: impl FnOnce(BorrowedFd<'_>) -> io::Result<()>,
    ) -> io::Result<Entry> {
        let name = component(name)?;
        let parent = self.inodes.get(parent)?;
        let dir = parent.path_fd()?;
        let acting = ActingFor::new(ctx.uid, ctx.gid, umask)?;
        make(dir.as_fd())?;
        // Root may not be let look for it on another host's server.
        let _acting = (!parent.is_local()).then_some(acting);
        self.find(&parent, dir.as_fd(), name)
    }

    /// Makes a file without a name in `parent` for a process of the guest, open
    /// (`O_TMPFILE`); `link` may name it later.
    pub fn make_nameless(
        &self,
        uid: u32,
        gid: u32,
        parent: u64,
        args: &CreateIn,
    ) -> io::Result<(Entry, u64, OpenOptions)> {
        self.change()?;
        let parent = self.inodes.get(parent)?;
        let flags = args.flags.cast_signed();
        const KEPT: i32 = libc::O_ACCMODE | libc::O_EXCL | libc::O_APPEND | libc::O_SYNC | libc::O_DSYNC;
        let file = {
            let dir = parent.path_fd()?;
            let _acting = ActingFor::new(uid, gid, args.umask)?;
            sys::open_at(dir.as_fd(), c".", libc::O_TMPFILE | flags & KEPT, args.mode & 0o7777)?
        };
        let found = self.inodes.found_open(&parent, c"", sys::reopen(file.as_fd(), libc::O_PATH)?)?;
        let opened = self.inodes.get(found.id).and_then(|inode| {
            let handle = self.handles.add_file(found.id, OpenFile::new(file, flags & libc::O_APPEND != 0))?;
            Ok((handle, self.open_options(&inode, flags & !libc::O_DIRECTORY)))
        });
        match opened {
            Ok((handle, options)) => Ok((self.entry(&parent, &found), handle, options)),
            Err(error) => {
                self.inodes.forget([(found.id, 1)]);
                Err(error)
            }
        }
    }

    fn resize(&self, inode: &Inode, id: u64, handle: Option<u64>, size: i64, kill: bool) -> io::Result<()> {
        let file = match handle {
            Some(handle) => self.handles.file(id, handle)?,
            None => std::sync::Arc::new(OpenFile::new(
                self.open_inode(inode, libc::O_WRONLY | libc::O_NONBLOCK)?,
                false,
            )),
        };
        if kill {
            kill_privileges(file.fd())?;
        }
        Lent::new(file.fd()).file().set_len(u64::try_from(size).or_else(|_| errno(libc::EINVAL))?)
    }

    /// Opens a file; returns its handle, and what the guest's page cache may do with it.
    pub fn open_file(&self, id: u64, flags: u32, fuse_flags: u32) -> io::Result<(u64, OpenOptions)> {
        if self.no_open.load(Ordering::Relaxed) {
            return Err(io::Error::from_raw_os_error(libc::ENOSYS));
        }
        let inode = self.inodes.get(id)?;
        if fuse_flags & FOPEN_IN_KILL_SUIDGID != 0 && flags.cast_signed() & libc::O_TRUNC != 0 {
            self.change()?;
            kill_privileges(self.path_fd(&inode)?.as_fd())?;
        }
        let file = self.open_for(&inode, flags)?;
        let handle = self.handles.add_file(id, file)?;
        let flags = flags.cast_signed() & !libc::O_DIRECTORY;
        Ok((handle, self.open_options(&inode, flags)))
    }

    /// Has `write` write data to an open file: given the file, how much at most, and at which offset, it says how much
    /// it was. Says what the file was before and is afterwards, too, where that is asked for (`look`) and costs nothing:
    /// a network's file system that is asked for times sends what was written to its server, and waits for it.
    pub fn write_file(
        &self,
        id: u64,
        args: &WriteIn,
        look: bool,
        write: impl FnOnce(&mut File, usize, u64) -> io::Result<usize>,
    ) -> io::Result<(usize, Option<Seen>)> {
        self.change()?;
        let file = self.handles.file(id, args.fh)?;
        let look = look && self.inodes.get(id).is_ok_and(|inode| inode.is_local());
        let before = look.then(|| sys::stat(file.fd(), c"").ok()).flatten();
        file.set_append(args.flags.cast_signed() & libc::O_APPEND != 0)?;
        if args.fuse_flags & WRITE_KILL_PRIV != 0 {
            kill_privileges(file.fd())?;
        }
        let size = args.size.min(MAX_IO_BYTES) as usize;
        let size = write(Lent::new(file.fd()).file(), size, signed(args.offset)?.cast_unsigned())?;
        // What was written is written, whatever becomes of the look.
        let seen = before.and_then(|sys::Stat { attr: before, .. }| {
            let (after, timeout) = self.attributes_of_open(id, &file).ok()?;
            Some(Seen { mtime: (before.st_mtime, before.st_mtime_nsec), after, timeout })
        });
        Ok((size, seen))
    }

    /// Has `read` read a file that was just opened; nothing is read where that may take long.
    pub fn content(
        &self,
        id: u64,
        handle: u64,
        read: impl FnOnce(&mut File) -> io::Result<usize>,
    ) -> io::Result<usize> {
        match self.inodes.get(id)?.is_local() {
            true => read(Lent::new(self.handles.file(id, handle)?.fd()).file()),
            false => Ok(0),
        }
    }
}

impl FileSystem for Passthrough {
    type Inode = u64;
    type Handle = u64;

    fn init(&self, capable: FsOptions) -> io::Result<FsOptions> {
        // A guest that mounts again knows nothing of what it knew before.
        self.forget_all();
        Ok(self.options(capable))
    }

    fn destroy(&self) {
        self.forget_all();
    }

    fn lookup(&self, _ctx: &Context, parent: u64, name: &CStr) -> io::Result<Entry> {
        let name = component(name)?;
        let parent = self.inodes.get(parent)?;
        match self.find(&parent, parent.path_fd()?.as_fd(), name) {
            // Node id 0 lets the guest remember that there is nothing.
            Err(error)
                if error.raw_os_error() == Some(libc::ENOENT)
                    && parent.is_immutable()
                    && !parent.is_root() =>
            {
                Ok(Entry { entry_timeout: self.timeout(true), ..Entry::default() })
            }
            found => found,
        }
    }

    fn forget(&self, ctx: &Context, inode: u64, count: u64) {
        self.batch_forget(ctx, vec![(inode, count)]);
    }

    fn batch_forget(&self, _ctx: &Context, requests: Vec<(u64, u64)>) {
        if self.no_open.load(Ordering::Relaxed) {
            self.recent_files.remove_if(|id| requests.iter().any(|(forgotten, _)| forgotten == id));
        }
        self.inodes.forget(requests);
    }

    fn getattr(
        &self,
        _ctx: &Context,
        inode: u64,
        handle: Option<u64>,
    ) -> io::Result<(libc::stat64, Duration)> {
        match handle.map(|handle| self.handles.file(inode, handle)) {
            Some(Ok(file)) => self.attributes_of_open(inode, &file),
            _ => self.attributes(&*self.inodes.get(inode)?),
        }
    }

    fn setattr(
        &self,
        _ctx: &Context,
        id: u64,
        attr: libc::stat64,
        handle: Option<u64>,
        valid: SetattrValid,
    ) -> io::Result<(libc::stat64, Duration)> {
        self.change()?;
        let inode = self.inodes.get(id)?;
        let path = self.path_fd(&inode)?;
        let fd = path.as_fd();
        if valid.contains(SetattrValid::MODE) {
            sys::chmod(fd, attr.st_mode & 0o7777)?;
        }
        if valid.intersects(SetattrValid::UID | SetattrValid::GID) {
            let uid = valid.contains(SetattrValid::UID).then_some(attr.st_uid);
            let gid = valid.contains(SetattrValid::GID).then_some(attr.st_gid);
            if inode.is_device() { nodes::chown(fd, uid, gid) } else { sys::chown(fd, uid, gid) }?;
        }
        if valid.contains(SetattrValid::SIZE) {
            self.resize(&inode, id, handle, attr.st_size, valid.contains(SetattrValid::KILL_SUIDGID))?;
        }
        if valid.intersects(SetattrValid::ATIME | SetattrValid::MTIME) {
            let time = |set, now, tv_sec, tv_nsec| match (valid.contains(set), valid.contains(now)) {
                (_, true) => libc::timespec { tv_sec: 0, tv_nsec: libc::UTIME_NOW },
                (true, false) => libc::timespec { tv_sec, tv_nsec },
                (false, false) => libc::timespec { tv_sec: 0, tv_nsec: libc::UTIME_OMIT },
            };
            let times = [
                time(SetattrValid::ATIME, SetattrValid::ATIME_NOW, attr.st_atime, attr.st_atime_nsec),
                time(SetattrValid::MTIME, SetattrValid::MTIME_NOW, attr.st_mtime, attr.st_mtime_nsec),
            ];
            sys::set_times(fd, &times)?;
        }
        self.attributes(&inode)
    }

    fn readlink(&self, _ctx: &Context, inode: u64) -> io::Result<Vec<u8>> {
        sys::read_link(self.inodes.get(inode)?.path_fd()?.as_fd())
    }

    fn symlink(&self, ctx: &Context, linkname: &CStr, parent: u64, name: &CStr) -> io::Result<Entry> {
        self.change()?;
        self.make(ctx, parent, name, 0, |dir| sys::symlink(linkname, dir, name))
    }

    fn mknod(
        &self,
        ctx: &Context,
        parent: u64,
        name: &CStr,
        mode: u32,
        rdev: u32,
        umask: u32,
    ) -> io::Result<Entry> {
        self.change()?;
        self.make(ctx, parent, name, umask, |dir| match nodes::is_device(mode, rdev) {
            true => nodes::make(dir, name, mode, rdev),
            false => sys::mknod(dir, name, mode, 0),
        })
    }

    fn mkdir(&self, ctx: &Context, parent: u64, name: &CStr, mode: u32, umask: u32) -> io::Result<Entry> {
        self.change()?;
        self.make(ctx, parent, name, umask, |dir| sys::mkdir(dir, name, mode))
    }

    fn unlink(&self, _ctx: &Context, parent: u64, name: &CStr) -> io::Result<()> {
        self.change()?;
        let name = component(name)?;
        sys::unlink(self.inodes.get(parent)?.path_fd()?.as_fd(), name, 0)
    }

    fn rmdir(&self, _ctx: &Context, parent: u64, name: &CStr) -> io::Result<()> {
        self.change()?;
        let name = component(name)?;
        sys::unlink(self.inodes.get(parent)?.path_fd()?.as_fd(), name, libc::AT_REMOVEDIR)
    }

    fn rename(
        &self,
        _ctx: &Context,
        olddir: u64,
        oldname: &CStr,
        newdir: u64,
        newname: &CStr,
        flags: u32,
    ) -> io::Result<()> {
        self.change()?;
        let (oldname, newname) = (component(oldname)?, component(newname)?);
        let (from, to) = (self.inodes.get(olddir)?, self.inodes.get(newdir)?);
        let (old, new) = (from.path_fd()?, to.path_fd()?);
        sys::rename(old.as_fd(), oldname, new.as_fd(), newname, flags)?;
        if to.is_followed() {
            // What is known by its name is known by the new one.
            for (parent, dir, name) in [(&to, &new, newname), (&from, &old, oldname)] {
                if let Ok(found) = self.inodes.look_up(parent, dir.as_fd(), name) {
                    self.inodes.forget([(found.id, 1)]);
                }
            }
        }
        Ok(())
    }

    fn link(&self, _ctx: &Context, inode: u64, newparent: u64, newname: &CStr) -> io::Result<Entry> {
        self.change()?;
        let newname = component(newname)?;
        let (inode, parent) = (self.inodes.get(inode)?, self.inodes.get(newparent)?);
        let dir = parent.path_fd()?;
        sys::link(inode.path_fd()?.as_fd(), dir.as_fd(), newname)?;
        self.find(&parent, dir.as_fd(), newname)
    }

    fn create(
        &self,
        ctx: &Context,
        parent: u64,
        name: &CStr,
        args: CreateIn,
    ) -> io::Result<(Entry, Option<u64>, OpenOptions, Option<u32>)> {
        self.change()?;
        let name = component(name)?;
        let flags = args.flags.cast_signed();
        let parent = self.inodes.get(parent)?;
        let dir = parent.path_fd()?;
        let made = {
            let _acting = ActingFor::new(ctx.uid, ctx.gid, args.umask)?;
            let flags = flags & Self::OPEN_FLAGS | libc::O_CREAT | libc::O_EXCL;
            sys::open_at(dir.as_fd(), name, flags, args.mode & 0o7777)
        };
        let (found, file) = match made {
            Ok(file) => {
                let path = sys::reopen(file.as_fd(), libc::O_PATH)?;
                let found = self.inodes.found_open(&parent, name, path)?;
                (found, Ok(OpenFile::new(file, flags & libc::O_APPEND != 0)))
            }
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists && flags & libc::O_EXCL == 0 => {
                let found = self.inodes.look_up(&parent, dir.as_fd(), name)?;
                let file = self.inodes.get(found.id).and_then(|inode| self.open_for(&inode, args.flags));
                (found, file)
            }
            Err(error) => return Err(error),
        };
        let opened = file.and_then(|file| {
            let inode = self.inodes.get(found.id)?;
            Ok((
                self.handles.add_file(found.id, file)?,
                self.open_options(&inode, flags & !libc::O_DIRECTORY),
            ))
        });
        match opened {
            Ok((handle, options)) => Ok((self.entry(&parent, &found), Some(handle), options, None)),
            Err(error) => {
                // The guest is not told of the entry.
                self.inodes.forget([(found.id, 1)]);
                Err(error)
            }
        }
    }

    fn read(
        &self,
        _ctx: &Context,
        inode: u64,
        handle: u64,
        w: &mut dyn ZeroCopyWriter,
        size: u32,
        offset: u64,
        _lock_owner: Option<u64>,
        _flags: u32,
    ) -> io::Result<usize> {
        let file = self.file(inode, handle)?;
        let size = (size.min(MAX_IO_BYTES) as usize).min(w.available_bytes());
        w.write_from(Lent::new(file.fd()).file(), size, signed(offset)?.cast_unsigned())
    }

    fn flush(&self, _ctx: &Context, inode: u64, handle: u64, _lock_owner: u64) -> io::Result<()> {
        self.flush_file(inode, handle)
    }

    fn fsync(&self, _ctx: &Context, inode: u64, datasync: bool, handle: u64) -> io::Result<()> {
        if self.policy.readonly {
            return Ok(());
        }
        let file = self.handles.file(inode, handle)?;
        let mut lent = Lent::new(file.fd());
        if datasync { lent.file().sync_data() } else { lent.file().sync_all() }
    }

    fn fsyncdir(&self, _ctx: &Context, inode: u64, _datasync: bool, _handle: u64) -> io::Result<()> {
        if self.policy.readonly {
            return Ok(());
        }
        let dir = self.open_dir(&*self.inodes.get(inode)?)?;
        Lent::new(dir.fd()).file().sync_all()
    }

    fn fallocate(
        &self,
        _ctx: &Context,
        inode: u64,
        handle: u64,
        mode: u32,
        offset: u64,
        length: u64,
    ) -> io::Result<()> {
        self.change()?;
        let file = self.handles.file(inode, handle)?;
        let mode = mode.cast_signed();
        if mode & !ALLOCATE_MODES != 0 {
            return errno(libc::EOPNOTSUPP);
        }
        sys::allocate(file.fd(), mode, signed(offset)?, signed(length)?)
    }

    fn lseek(&self, _ctx: &Context, inode: u64, handle: u64, offset: u64, whence: u32) -> io::Result<u64> {
        let whence = whence.cast_signed();
        // The rest is the guest's own business.
        if !matches!(whence, libc::SEEK_DATA | libc::SEEK_HOLE) {
            return errno(libc::EINVAL);
        }
        sys::seek(self.file(inode, handle)?.fd(), signed(offset)?, whence)
    }

    fn statfs(&self, _ctx: &Context, inode: u64) -> io::Result<libc::statvfs64> {
        sys::stat_fs(self.path_fd(&*self.inodes.get(inode)?)?.as_fd())
    }

    fn opendir(&self, _ctx: &Context, id: u64, _flags: u32) -> io::Result<(Option<u64>, OpenOptions)> {
        if self.no_opendir.load(Ordering::Relaxed) {
            return errno(libc::ENOSYS);
        }
        let inode = self.inodes.get(id)?;
        let handle = self.handles.add_dir(id, self.open_dir(&inode)?)?;
        Ok((Some(handle), self.open_options(&inode, libc::O_RDONLY | libc::O_DIRECTORY)))
    }

    fn readdir(
        &self,
        _ctx: &Context,
        inode: u64,
        handle: u64,
        size: u32,
        offset: u64,
        add_entry: &mut dyn FnMut(DirEntry) -> io::Result<usize>,
    ) -> io::Result<()> {
        if size > MAX_DIR_BYTES {
            return errno(libc::EINVAL);
        }
        self.read_dir(inode, handle, offset, &mut |dir, entry| {
            let mut added = dir_entry(&entry);
            if added.type_ == u32::from(libc::DT_CHR) {
                // It may stand for another type; and overlayfs, which looks for its
                // whiteouts by type, wants to be told for certain.
                added.type_ = nodes::kind(dir, entry.name).map_or(libc::DT_UNKNOWN.into(), |kind| kind >> 12);
            }
            Ok(add_entry(added)? > 0)
        })
    }

    fn readdirplus(
        &self,
        _ctx: &Context,
        id: u64,
        handle: u64,
        size: u32,
        offset: u64,
        add_entry: &mut dyn FnMut(DirEntry, Entry) -> io::Result<usize>,
    ) -> io::Result<()> {
        if size > MAX_DIR_BYTES {
            return errno(libc::EINVAL);
        }
        let parent = self.inodes.get(id)?;
        // Each file that can change is held open as long as the guest knows it: who only lists a
        // large directory is not to use up what there is of that.
        let names_alone = !parent.is_immutable() && self.inodes.count() >= self.policy.max_open_files;
        self.read_dir(id, handle, offset, &mut |dir, entry| {
            // Node id 0: the name alone. The guest knows `.` and `..`, and what
            // has vanished meanwhile it finds out itself.
            let found = component(entry.name)
                .ok()
                .filter(|_| !names_alone)
                .and_then(|name| self.find_entry(&parent, dir, name, entry.ino).ok())
                .unwrap_or_default();
            let mut added = dir_entry(&entry);
            if found.inode != 0 {
                added.type_ = (found.attr.st_mode & libc::S_IFMT) >> 12;
            }
            let added = add_entry(added, found);
            if found.inode != 0 && !matches!(added, Ok(1..)) {
                self.inodes.forget([(found.inode, 1)]);
            }
            Ok(added? > 0)
        })
    }

    fn getxattr(&self, _ctx: &Context, inode: u64, name: &CStr, size: u32) -> io::Result<GetxattrReply> {
        let inode = self.inodes.get(inode)?;
        Ok(match xattrs::get(&inode, || self.path_fd(&inode), name, size)? {
            Found::Len(len) => GetxattrReply::Count(len),
            Found::Bytes(value) => GetxattrReply::Value(value),
        })
    }

    fn listxattr(&self, _ctx: &Context, inode: u64, size: u32) -> io::Result<ListxattrReply> {
        let inode = self.inodes.get(inode)?;
        Ok(match xattrs::list(&inode, || self.path_fd(&inode), size)? {
            Found::Len(len) => ListxattrReply::Count(len),
            Found::Bytes(names) => ListxattrReply::Names(names),
        })
    }

    fn setxattr(&self, _ctx: &Context, inode: u64, name: &CStr, value: &[u8], flags: u32) -> io::Result<()> {
        self.change()?;
        let inode = self.inodes.get(inode)?;
        xattrs::set(&inode, || self.path_fd(&inode), name, value, flags)
    }

    fn removexattr(&self, _ctx: &Context, inode: u64, name: &CStr) -> io::Result<()> {
        self.change()?;
        let inode = self.inodes.get(inode)?;
        xattrs::remove(&inode, || self.path_fd(&inode), name)
    }
}

fn dir_entry<'a>(entry: &Dirent<'a>) -> DirEntry<'a> {
    DirEntry { ino: entry.ino, offset: entry.next, type_: entry.kind, name: entry.name.to_bytes() }
}
