//! The system calls the server needs, safe to use and typed.
//!
//! Names are relative to a descriptor and never followed if they are symbolic
//! links. Where a call only takes a path, [`FdName`] names a descriptor in
//! `/proc/self/fd`, which every thread of the server has as its working
//! directory (see [`enter_server_thread`]).

use std::cell::Cell;
use std::ffi::{CStr, CString};
use std::fs::File;
use std::io;
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, IntoRawFd, OwnedFd, RawFd};
use std::sync::Arc;

use crate::process::owned;
use crate::procfs;

fn check(result: libc::c_int) -> io::Result<libc::c_int> {
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(result) }
}

fn check_len(result: libc::ssize_t) -> io::Result<usize> {
    usize::try_from(result).map_err(|_| io::Error::last_os_error())
}

/// Gives the calling thread a umask and working directory of its own, the
/// latter at `proc_self_fd`, and keeps its capabilities when it acts for
/// another user: the guest has checked what that user may do, and knows his
/// supplementary groups, which the host does not.
pub(super) fn enter_server_thread(proc_self_fd: BorrowedFd<'_>) -> io::Result<()> {
    // SAFETY: touches no memory.
    check(unsafe { libc::unshare(libc::CLONE_FS) })?;
    // SAFETY: touches no memory.
    check(unsafe { libc::fchdir(proc_self_fd.as_raw_fd()) })?;
    // SAFETY: touches no memory.
    if unsafe { libc::prctl(libc::PR_GET_SECUREBITS) } & libc::SECBIT_NO_SETUID_FIXUP != 0 {
        return Ok(());
    }
    // SAFETY: touches no memory.
    let kept = unsafe { libc::prctl(libc::PR_SET_SECUREBITS, libc::SECBIT_NO_SETUID_FIXUP) };
    if kept < 0 {
        log::debug!("fs: capabilities are lost when acting for a user: {}", io::Error::last_os_error());
    }
    Ok(())
}

/// A descriptor's name in `/proc/self/fd`.
pub(super) struct FdName(CString);

impl FdName {
    pub(super) fn new(fd: BorrowedFd<'_>) -> io::Result<Self> {
        Ok(Self(CString::new(fd.as_raw_fd().to_string())?))
    }

    fn as_ptr(&self) -> *const libc::c_char {
        self.0.as_ptr()
    }
}

/// `openat(2)`, never following a symbolic link.
pub(super) fn open_at(dir: BorrowedFd<'_>, name: &CStr, flags: i32, mode: u32) -> io::Result<OwnedFd> {
    let flags = flags | libc::O_NOFOLLOW | libc::O_CLOEXEC;
    // SAFETY: `name` is a C string.
    owned(unsafe { libc::openat(dir.as_raw_fd(), name.as_ptr(), flags, mode) }.into())
}

/// Opens what an `O_PATH` descriptor stands for.
pub(super) fn reopen(fd: BorrowedFd<'_>, flags: i32) -> io::Result<OwnedFd> {
    let name = FdName::new(fd)?;
    // SAFETY: `name` is a C string.
    owned(unsafe { libc::open(name.as_ptr(), flags | libc::O_CLOEXEC) }.into())
}

/// Attributes of a file and the mount it was reached through.
#[derive(Clone, Copy)]
pub(super) struct Stat {
    pub attr: libc::stat64,
    pub mount: u64,
}

/// `statx(2)` of `name` in `dir`, or of `dir` itself if `name` is empty.
pub(super) fn stat(dir: BorrowedFd<'_>, name: &CStr) -> io::Result<Stat> {
    let from = statx(dir, name, libc::STATX_BASIC_STATS | libc::STATX_MNT_ID)?;
    // SAFETY: any bytes are valid.
    let mut attr: libc::stat64 = unsafe { std::mem::zeroed() };
    attr.st_dev = libc::makedev(from.stx_dev_major, from.stx_dev_minor);
    attr.st_ino = from.stx_ino;
    attr.st_nlink = from.stx_nlink.into();
    attr.st_mode = from.stx_mode.into();
    attr.st_uid = from.stx_uid;
    attr.st_gid = from.stx_gid;
    attr.st_rdev = libc::makedev(from.stx_rdev_major, from.stx_rdev_minor);
    attr.st_size = from.stx_size.cast_signed();
    attr.st_blksize = from.stx_blksize.into();
    attr.st_blocks = from.stx_blocks.cast_signed();
    attr.st_atime = from.stx_atime.tv_sec;
    attr.st_atime_nsec = from.stx_atime.tv_nsec.into();
    attr.st_mtime = from.stx_mtime.tv_sec;
    attr.st_mtime_nsec = from.stx_mtime.tv_nsec.into();
    attr.st_ctime = from.stx_ctime.tv_sec;
    attr.st_ctime_nsec = from.stx_ctime.tv_nsec.into();
    Ok(Stat { attr, mount: from.stx_mnt_id })
}

/// Type and permissions of a file. A network's file system that is asked for times first sends what was written.
pub(super) fn mode(fd: BorrowedFd<'_>) -> io::Result<u32> {
    Ok(statx(fd, c"", libc::STATX_TYPE | libc::STATX_MODE)?.stx_mode.into())
}

fn statx(dir: BorrowedFd<'_>, name: &CStr, mask: u32) -> io::Result<libc::statx> {
    let mut buffer = MaybeUninit::<libc::statx>::zeroed();
    let flags = libc::AT_EMPTY_PATH | libc::AT_SYMLINK_NOFOLLOW | libc::AT_NO_AUTOMOUNT;
    // SAFETY: `name` is a C string, `buffer` has room for a statx.
    check(unsafe { libc::statx(dir.as_raw_fd(), name.as_ptr(), flags, mask, buffer.as_mut_ptr()) })?;
    // SAFETY: it was zeroed and then filled; any bytes are valid.
    Ok(unsafe { buffer.assume_init() })
}

/// `readlinkat(2)` of an `O_PATH` descriptor.
pub(super) fn read_link(fd: BorrowedFd<'_>) -> io::Result<Vec<u8>> {
    let mut target = vec![0; libc::PATH_MAX as usize];
    // SAFETY: the kernel writes at most `target.len()` bytes.
    let len = check_len(unsafe {
        libc::readlinkat(fd.as_raw_fd(), c"".as_ptr(), target.as_mut_ptr().cast(), target.len())
    })?;
    target.truncate(len);
    Ok(target)
}

/// Fills `buffer` with `struct linux_dirent64`; returns its length, 0 at the end.
pub(super) fn get_dents(fd: BorrowedFd<'_>, buffer: &mut [u8]) -> io::Result<usize> {
    // SAFETY: the kernel writes at most `buffer.len()` bytes.
    let len =
        unsafe { libc::syscall(libc::SYS_getdents64, fd.as_raw_fd(), buffer.as_mut_ptr(), buffer.len()) };
    check_len(len as libc::ssize_t)
}

/// `lseek(2)`.
pub(super) fn seek(fd: BorrowedFd<'_>, offset: i64, whence: i32) -> io::Result<u64> {
    // SAFETY: touches no memory.
    let at = unsafe { libc::lseek64(fd.as_raw_fd(), offset, whence) };
    u64::try_from(at).map_err(|_| io::Error::last_os_error())
}

/// `mkdirat(2)`.
pub(super) fn mkdir(dir: BorrowedFd<'_>, name: &CStr, mode: u32) -> io::Result<()> {
    // SAFETY: `name` is a C string.
    check(unsafe { libc::mkdirat(dir.as_raw_fd(), name.as_ptr(), mode) }).map(drop)
}

/// `mknodat(2)`.
pub(super) fn mknod(dir: BorrowedFd<'_>, name: &CStr, mode: u32, device: u64) -> io::Result<()> {
    // SAFETY: `name` is a C string.
    check(unsafe { libc::mknodat(dir.as_raw_fd(), name.as_ptr(), mode, device) }).map(drop)
}

/// `symlinkat(2)`.
pub(super) fn symlink(target: &CStr, dir: BorrowedFd<'_>, name: &CStr) -> io::Result<()> {
    // SAFETY: both are C strings.
    check(unsafe { libc::symlinkat(target.as_ptr(), dir.as_raw_fd(), name.as_ptr()) }).map(drop)
}

/// `linkat(2)` of an `O_PATH` descriptor, by its name: `AT_EMPTY_PATH` takes a capability
/// over the whole host.
pub(super) fn link(fd: BorrowedFd<'_>, dir: BorrowedFd<'_>, name: &CStr) -> io::Result<()> {
    let from = FdName::new(fd)?;
    let (to, flags) = (dir.as_raw_fd(), libc::AT_SYMLINK_FOLLOW);
    // SAFETY: both are C strings.
    check(unsafe { libc::linkat(libc::AT_FDCWD, from.as_ptr(), to, name.as_ptr(), flags) }).map(drop)
}

/// `unlinkat(2)`.
pub(super) fn unlink(dir: BorrowedFd<'_>, name: &CStr, flags: i32) -> io::Result<()> {
    // SAFETY: `name` is a C string.
    check(unsafe { libc::unlinkat(dir.as_raw_fd(), name.as_ptr(), flags) }).map(drop)
}

/// `renameat2(2)`.
pub(super) fn rename(
    from: BorrowedFd<'_>,
    old: &CStr,
    to: BorrowedFd<'_>,
    new: &CStr,
    flags: u32,
) -> io::Result<()> {
    // SAFETY: both are C strings.
    check(unsafe { libc::renameat2(from.as_raw_fd(), old.as_ptr(), to.as_raw_fd(), new.as_ptr(), flags) })
        .map(drop)
}

/// `chmod(2)` of any descriptor.
pub(super) fn chmod(fd: BorrowedFd<'_>, mode: u32) -> io::Result<()> {
    let name = FdName::new(fd)?;
    // SAFETY: `name` is a C string.
    check(unsafe { libc::chmod(name.as_ptr(), mode) }).map(drop)
}

/// `fchownat(2)` of any descriptor; `None` leaves an id as it is.
pub(super) fn chown(fd: BorrowedFd<'_>, uid: Option<u32>, gid: Option<u32>) -> io::Result<()> {
    let (uid, gid) = (uid.unwrap_or(u32::MAX), gid.unwrap_or(u32::MAX));
    let flags = libc::AT_EMPTY_PATH | libc::AT_SYMLINK_NOFOLLOW;
    // SAFETY: the name is a C string.
    check(unsafe { libc::fchownat(fd.as_raw_fd(), c"".as_ptr(), uid, gid, flags) }).map(drop)
}

/// `utimensat(2)` of any descriptor.
pub(super) fn set_times(fd: BorrowedFd<'_>, times: &[libc::timespec; 2]) -> io::Result<()> {
    let name = FdName::new(fd)?;
    // SAFETY: `name` is a C string, `times` two timespecs.
    check(unsafe { libc::utimensat(libc::AT_FDCWD, name.as_ptr(), times.as_ptr(), 0) }).map(drop)
}

/// `fallocate(2)`.
pub(super) fn allocate(fd: BorrowedFd<'_>, mode: i32, offset: i64, len: i64) -> io::Result<()> {
    // SAFETY: touches no memory.
    check(unsafe { libc::fallocate64(fd.as_raw_fd(), mode, offset, len) }).map(drop)
}

/// Sets or clears `O_APPEND`.
pub(super) fn set_append(fd: BorrowedFd<'_>, append: bool) -> io::Result<()> {
    // SAFETY: touches no memory.
    let flags = check(unsafe { libc::fcntl(fd.as_raw_fd(), libc::F_GETFL) })?;
    let flags = if append { flags | libc::O_APPEND } else { flags & !libc::O_APPEND };
    // SAFETY: touches no memory.
    check(unsafe { libc::fcntl(fd.as_raw_fd(), libc::F_SETFL, flags) }).map(drop)
}

/// Has a file system say what became of what was written to an open file: that is the result of `close(2)`, of any of
/// its descriptors.
pub(super) fn flush(fd: BorrowedFd<'_>) -> io::Result<()> {
    // SAFETY: touches no memory.
    let flags = check(unsafe { libc::fcntl(fd.as_raw_fd(), libc::F_GETFL) })?;
    if flags & libc::O_ACCMODE == libc::O_RDONLY {
        return Ok(());
    }
    let other = fd.try_clone_to_owned()?.into_raw_fd();
    // SAFETY: it is nobody else's, and gone whatever the result is.
    check(unsafe { libc::close(other) }).map(drop)
}

/// `syncfs(2)` of the file system of an open file.
pub(super) fn sync_fs(fd: BorrowedFd<'_>) -> io::Result<()> {
    // SAFETY: touches no memory.
    check(unsafe { libc::syncfs(fd.as_raw_fd()) }).map(drop)
}

/// `fstatvfs(3)`.
pub(super) fn stat_fs(fd: BorrowedFd<'_>) -> io::Result<libc::statvfs64> {
    let mut buffer = MaybeUninit::<libc::statvfs64>::zeroed();
    // SAFETY: `buffer` has room for a statvfs64.
    check(unsafe { libc::fstatvfs64(fd.as_raw_fd(), buffer.as_mut_ptr()) })?;
    // SAFETY: it was zeroed and then filled; any bytes are valid.
    Ok(unsafe { buffer.assume_init() })
}

/// Whether the mount a file was reached through is read-only.
pub(super) fn is_readonly(fd: BorrowedFd<'_>) -> io::Result<bool> {
    Ok(stat_fs(fd)?.f_flag & libc::ST_RDONLY != 0)
}

/// Whether a mount is an overlay of layers without an upper one. Neither may
/// be changed while it is mounted, which overlayfs demands of everybody.
pub(super) fn is_layers(fd: BorrowedFd<'_>, mount: u64) -> bool {
    let mut kind = MaybeUninit::<libc::statfs>::zeroed();
    // SAFETY: `kind` has room for a statfs.
    if unsafe { libc::fstatfs(fd.as_raw_fd(), kind.as_mut_ptr()) } != 0 {
        return false;
    }
    // SAFETY: it was zeroed and then filled; any bytes are valid.
    if unsafe { kind.assume_init() }.f_type != libc::OVERLAYFS_SUPER_MAGIC {
        return false;
    }
    let mountinfo = procfs::open("mountinfo").and_then(io::read_to_string).unwrap_or_default();
    mountinfo.lines().any(|line| names_layers(line, mount))
}

/// Whether a line of `/proc/PID/mountinfo` is mount `id` of a read-only file
/// system that has no `upperdir` (proc_pid_mountinfo(5)).
fn names_layers(line: &str, id: u64) -> bool {
    let Some((mount, file_system)) = line.split_once(" - ") else { return false };
    let options = file_system.split(' ').nth(2).unwrap_or("");
    mount.split(' ').next().and_then(|field| field.parse().ok()) == Some(id)
        && options.split(',').any(|option| option == "ro")
        && !options.split(',').any(|option| option.starts_with("upperdir="))
}

/// `getxattr(2)` of any descriptor; `value` empty asks for the length.
pub(super) fn get_xattr(fd: BorrowedFd<'_>, name: &CStr, value: &mut [u8]) -> io::Result<usize> {
    let file = FdName::new(fd)?;
    // SAFETY: C strings; the kernel writes at most `value.len()` bytes.
    check_len(unsafe { libc::getxattr(file.as_ptr(), name.as_ptr(), value.as_mut_ptr().cast(), value.len()) })
}

/// `listxattr(2)` of any descriptor; `names` empty asks for the length.
pub(super) fn list_xattr(fd: BorrowedFd<'_>, names: &mut [u8]) -> io::Result<usize> {
    let file = FdName::new(fd)?;
    // SAFETY: a C string; the kernel writes at most `names.len()` bytes.
    check_len(unsafe { libc::listxattr(file.as_ptr(), names.as_mut_ptr().cast(), names.len()) })
}

/// `setxattr(2)` of any descriptor.
pub(super) fn set_xattr(fd: BorrowedFd<'_>, name: &CStr, value: &[u8], flags: i32) -> io::Result<()> {
    let file = FdName::new(fd)?;
    // SAFETY: C strings; the kernel reads `value.len()` bytes.
    check(unsafe { libc::setxattr(file.as_ptr(), name.as_ptr(), value.as_ptr().cast(), value.len(), flags) })
        .map(drop)
}

/// `removexattr(2)` of any descriptor.
pub(super) fn remove_xattr(fd: BorrowedFd<'_>, name: &CStr) -> io::Result<()> {
    let file = FdName::new(fd)?;
    // SAFETY: C strings.
    check(unsafe { libc::removexattr(file.as_ptr(), name.as_ptr()) }).map(drop)
}

/// Raises the process's soft limit of descriptors to the hard one; returns it.
pub(super) fn raise_descriptor_limit() -> io::Result<u64> {
    let mut limit = libc::rlimit { rlim_cur: 0, rlim_max: 0 };
    // SAFETY: `limit` is a whole rlimit.
    check(unsafe { libc::getrlimit(libc::RLIMIT_NOFILE, &raw mut limit) })?;
    let raised = libc::rlimit { rlim_cur: limit.rlim_max, ..limit };
    // SAFETY: `raised` is a whole rlimit.
    match check(unsafe { libc::setrlimit(libc::RLIMIT_NOFILE, &raw const raised) }) {
        Ok(_) => Ok(raised.rlim_cur),
        Err(_) => Ok(limit.rlim_cur),
    }
}

/// Whether a file system is served by this host's kernel alone: closing a file of another one may have what was written
/// sent elsewhere first, or wait for a server that does not answer, and who closes it waits for that.
pub(super) fn is_local(fd: BorrowedFd<'_>) -> bool {
    const LOCAL: [i64; 9] = [
        libc::EXT4_SUPER_MAGIC,
        libc::XFS_SUPER_MAGIC,
        libc::BTRFS_SUPER_MAGIC,
        libc::F2FS_SUPER_MAGIC,
        libc::TMPFS_MAGIC,
        libc::OVERLAYFS_SUPER_MAGIC,
        // ramfs, bcachefs, ZFS
        0x8584_58f6,
        0xca45_1a4e,
        0x2fc1_2fc1,
    ];
    let mut kind = MaybeUninit::<libc::statfs>::zeroed();
    // SAFETY: `kind` has room for a statfs.
    let known = unsafe { libc::fstatfs(fd.as_raw_fd(), kind.as_mut_ptr()) } == 0;
    // SAFETY: it was zeroed and then filled; any bytes are valid.
    known && LOCAL.contains(&unsafe { kind.assume_init() }.f_type)
}

thread_local! {
    /// The calling thread's umask, where it is known.
    static UMASK: Cell<Option<u32>> = const { Cell::new(None) };
    /// The uid and gid it acts for.
    static USER: Cell<(u32, u32)> = const { Cell::new((0, 0)) };
}

/// The calling thread acts for another user while this lives: what it makes is
/// his. Its capabilities stay (see [`enter_server_thread`]).
pub(super) struct ActingFor {
    /// For whom it acts afterwards.
    before: (u32, u32),
}

impl ActingFor {
    /// Acts for `uid` and `gid`, with his umask, which stays the thread's: the next one's is nearly always the same.
    pub(super) fn new(uid: u32, gid: u32, umask: u32) -> io::Result<Self> {
        let umask = umask & 0o777;
        if UMASK.replace(Some(umask)) != Some(umask) {
            // SAFETY: touches no memory; the thread's umask is its own.
            unsafe { libc::umask(umask) };
        }
        Self::user(uid, gid)
    }

    /// Acts for `uid` and `gid`, and makes nothing.
    pub(super) fn user(uid: u32, gid: u32) -> io::Result<Self> {
        let acting = Self { before: USER.get() };
        become_user((uid, gid))?;
        Ok(acting)
    }
}

/// Takes on the ids that the thread has not.
fn become_user((uid, gid): (u32, u32)) -> io::Result<()> {
    let (old_uid, old_gid) = USER.get();
    if gid != old_gid {
        set_fs_id(libc::SYS_setfsgid, gid)?;
        USER.set((old_uid, gid));
    }
    if uid != old_uid {
        set_fs_id(libc::SYS_setfsuid, uid)?;
        USER.set((uid, gid));
    }
    Ok(())
}

impl Drop for ActingFor {
    fn drop(&mut self) {
        if let Err(error) = become_user(self.before) {
            // Never go on as somebody else.
            log::error!("fs: cannot act for who it was again: {error}");
            std::process::abort();
        }
    }
}

/// `setfsuid(2)` or `setfsgid(2)`, which do not say whether they succeeded.
/// Raw system calls: per thread.
fn set_fs_id(call: libc::c_long, id: u32) -> io::Result<()> {
    // SAFETY: touches no memory.
    unsafe { libc::syscall(call, id) };
    // SAFETY: touches no memory; an invalid id changes nothing and returns the
    // current one.
    let now = unsafe { libc::syscall(call, u32::MAX) };
    if now == libc::c_long::from(id) { Ok(()) } else { Err(io::Error::from_raw_os_error(libc::EPERM)) }
}

/// A descriptor held for the time of an operation, or only borrowed for it.
pub(super) enum Fd<'a> {
    Owned(OwnedFd),
    Shared(Arc<OwnedFd>),
    Borrowed(BorrowedFd<'a>),
}

impl AsFd for Fd<'_> {
    fn as_fd(&self) -> BorrowedFd<'_> {
        match self {
            Self::Owned(fd) => fd.as_fd(),
            Self::Shared(fd) => fd.as_fd(),
            Self::Borrowed(fd) => *fd,
        }
    }
}

/// A file's descriptor lent to code that wants a [`File`].
pub(super) struct Lent<'a> {
    file: std::mem::ManuallyDrop<File>,
    _owner: std::marker::PhantomData<&'a OwnedFd>,
}

impl<'a> Lent<'a> {
    pub(super) fn new(fd: BorrowedFd<'a>) -> Self {
        let raw: RawFd = fd.as_raw_fd();
        // SAFETY: the descriptor is open for 'a and is not closed here.
        let file = unsafe { File::from_raw_fd(raw) };
        Self { file: std::mem::ManuallyDrop::new(file), _owner: std::marker::PhantomData }
    }

    pub(super) fn file(&mut self) -> &mut File {
        &mut self.file
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_overlay_without_an_upper_layer_is_told_from_the_others() {
        let layers = "66 63 0:40 / /m ro,relatime - overlay o ro,lowerdir=/a:/b,redirect_dir=on";
        assert!(names_layers(layers, 66));
        assert!(!names_layers(layers, 6));
        let bound = "66 63 0:40 / /m ro,relatime - overlay o rw,lowerdir=/a,upperdir=/u,workdir=/w";
        assert!(!names_layers(bound, 66));
        let remounted = "66 63 0:40 / /m ro shared:1 - overlay o ro,lowerdir=/a,upperdir=/u,workdir=/w";
        assert!(!names_layers(remounted, 66));
        assert!(!names_layers("66", 66));
    }
}
