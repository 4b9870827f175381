//! The file behind the device.

use std::fs::{File, OpenOptions, TryLockError};
use std::io::{self, Seek, SeekFrom};
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileExt, FileTypeExt};
use std::path::Path;
use std::time::{Duration, Instant};

use vmm_sys_util::fallocate::{FallocateMode, fallocate};

use super::{BlkError, SECTOR_BYTES};
use crate::devices::virtio::buffers::GuestBuffers;

/// Zeroes written at once where the host cannot do it by `fallocate`.
static ZEROES: [u8; 64 << 10] = [0; 64 << 10];

/// How long what the guest writes waits for room on the host's file system. Not longer: a
/// process that waits for its write cannot be killed.
const ROOM_LIMIT: Duration = Duration::from_secs(60);
/// How often it is looked whether there is room.
const ROOM_LOOK: Duration = Duration::from_millis(100);

/// A disk: a file, its size when it was opened, and whether it may be written.
#[derive(Debug)]
pub struct Disk {
    file: File,
    sectors: u64,
    readonly: bool,
}

impl Disk {
    /// Opens the file at a configured path.
    pub fn open(path: &Path, readonly: bool) -> Result<Self, BlkError> {
        let file = OpenOptions::new()
            .read(true)
            .write(!readonly)
            .open(path)
            .map_err(|source| BlkError::Open { path: path.to_owned(), readonly, source })?;
        Self::new(file, readonly)
    }

    /// A disk on an open file, to which nothing is written if it is `readonly`.
    pub fn new(mut file: File, readonly: bool) -> Result<Self, BlkError> {
        let kind = file.metadata().map_err(BlkError::Measure)?.file_type();
        if !kind.is_file() && !kind.is_block_device() {
            return Err(BlkError::NotADisk);
        }
        check_access(&file, readonly)?;
        // Two guests that write to one file system destroy it.
        if kind.is_file() && !readonly && matches!(file.try_lock(), Err(TryLockError::WouldBlock)) {
            return Err(BlkError::InUse);
        }
        let bytes = file.seek(SeekFrom::End(0)).map_err(BlkError::Measure)?;
        if bytes < SECTOR_BYTES {
            return Err(BlkError::TooSmall(bytes));
        }
        Ok(Self { file, sectors: bytes / SECTOR_BYTES, readonly })
    }

    /// Size in sectors; a last incomplete one is not seen.
    pub fn sectors(&self) -> u64 {
        self.sectors
    }

    /// Whether writes are refused.
    pub fn readonly(&self) -> bool {
        self.readonly
    }

    /// The byte at which a range of sectors starts, if all of it is on the disk.
    pub fn range(&self, sector: u64, sectors: u64) -> Option<u64> {
        let end = sector.checked_add(sectors)?;
        // `end` is at most the size in sectors, so that bytes fit 64 bits.
        (end <= self.sectors).then(|| sector * SECTOR_BYTES)
    }

    /// Fills all of `buffers` from byte `offset` on.
    pub fn read(&self, mut buffers: GuestBuffers<'_>, mut offset: u64) -> io::Result<()> {
        while !buffers.is_empty() {
            let iovecs = buffers.iovecs();
            let count = iovecs.len() as libc::c_int;
            // SAFETY: the iovecs are mapped guest memory that outlives the call;
            // guest memory may change under anyone's hands.
            let moved =
                unsafe { libc::preadv(self.file.as_raw_fd(), iovecs.as_ptr(), count, offset.cast_signed()) };
            offset += advance(&mut buffers, moved, io::ErrorKind::UnexpectedEof)?;
        }
        Ok(())
    }

    /// Writes all of `buffers` from byte `offset` on; waits for room as long as `go_on`.
    pub fn write(
        &self,
        mut buffers: GuestBuffers<'_>,
        mut offset: u64,
        go_on: &dyn Fn() -> bool,
    ) -> io::Result<()> {
        while !buffers.is_empty() {
            offset += with_room(go_on, || {
                let iovecs = buffers.iovecs();
                let count = iovecs.len() as libc::c_int;
                let at = offset.cast_signed();
                // SAFETY: as for reading.
                let moved = unsafe { libc::pwritev(self.file.as_raw_fd(), iovecs.as_ptr(), count, at) };
                advance(&mut buffers, moved, io::ErrorKind::WriteZero)
            })?;
        }
        Ok(())
    }

    /// Makes what was written durable.
    pub fn flush(&self) -> io::Result<()> {
        self.file.sync_data()
    }

    /// Gives a range back to the host; it reads as zeroes afterwards.
    pub fn discard(&self, offset: u64, bytes: u64) -> io::Result<()> {
        self.allocate(FallocateMode::PunchHole, offset, bytes)
    }

    /// Zeroes a range as long as `go_on`, giving it back to the host where `unmap` allows that.
    pub fn write_zeroes(
        &self,
        offset: u64,
        bytes: u64,
        unmap: bool,
        go_on: &dyn Fn() -> bool,
    ) -> io::Result<()> {
        let mode = || if unmap { FallocateMode::PunchHole } else { FallocateMode::ZeroRange };
        match with_room(go_on, || self.allocate(mode(), offset, bytes)) {
            Err(error) if error.raw_os_error() == Some(libc::EOPNOTSUPP) => self.fill(offset, bytes, go_on),
            done => done,
        }
    }

    fn allocate(&self, mode: FallocateMode, offset: u64, bytes: u64) -> io::Result<()> {
        if bytes == 0 {
            return Ok(());
        }
        Ok(fallocate(&self.file, mode, true, offset, bytes)?)
    }

    /// The host writes them one by one.
    fn fill(&self, mut offset: u64, bytes: u64, go_on: &dyn Fn() -> bool) -> io::Result<()> {
        let end = offset + bytes;
        while offset < end {
            if !go_on() {
                return Err(io::ErrorKind::Interrupted.into());
            }
            let now = (end - offset).min(ZEROES.len() as u64);
            with_room(go_on, || self.file.write_all_at(&ZEROES[..now as usize], offset))?;
            offset += now;
        }
        Ok(())
    }
}

/// Does what takes room on the host's file system, which may be full: a guest has no way to
/// be told so, and takes an error for a broken disk. So it waits for a while, in which the
/// host may get room again, and as long as `go_on`.
fn with_room<T>(go_on: &dyn Fn() -> bool, mut act: impl FnMut() -> io::Result<T>) -> io::Result<T> {
    let mut full_since = None;
    loop {
        let error = match act() {
            Err(error) if matches!(error.raw_os_error(), Some(libc::ENOSPC | libc::EDQUOT)) => error,
            done => return done,
        };
        let since = *full_since.get_or_insert_with(|| {
            log::warn!("disk: {error}; its guest waits for room on the host for {} s", ROOM_LIMIT.as_secs());
            Instant::now()
        });
        if !go_on() || since.elapsed() > ROOM_LIMIT {
            log::error!("disk: {error}");
            return Err(error);
        }
        // Nobody tells when there is room.
        std::thread::sleep(ROOM_LOOK);
    }
}

/// Whoever opened it said what may be done: an O_PATH descriptor can do nothing.
fn check_access(file: &File, readonly: bool) -> Result<(), BlkError> {
    // SAFETY: plain system call on a descriptor we own.
    let flags = unsafe { libc::fcntl(file.as_raw_fd(), libc::F_GETFL) };
    if flags < 0 {
        return Err(BlkError::Measure(io::Error::last_os_error()));
    }
    let mode = flags & libc::O_ACCMODE;
    if flags & libc::O_PATH != 0 || mode == libc::O_WRONLY {
        return Err(BlkError::Access("reading"));
    }
    if !readonly && mode != libc::O_RDWR { Err(BlkError::Access("writing")) } else { Ok(()) }
}

/// Accounts for what one system call moved: an error, nothing at all (`stuck`),
/// or a number of bytes.
fn advance(buffers: &mut GuestBuffers<'_>, moved: isize, stuck: io::ErrorKind) -> io::Result<u64> {
    match usize::try_from(moved) {
        Ok(0) => Err(stuck.into()),
        Ok(count) => {
            buffers.take(count);
            Ok(count as u64)
        }
        Err(_) => match io::Error::last_os_error() {
            error if error.kind() == io::ErrorKind::Interrupted => Ok(0),
            error => Err(error),
        },
    }
}

#[cfg(test)]
mod tests {
    use std::cell::Cell;

    use super::*;

    /// A small tmpfs of the calling thread's own, gone with `run`.
    fn on_a_small_file_system(run: impl FnOnce(&Path) + Send) {
        std::thread::scope(|scope| {
            let thread = scope.spawn(|| {
                // SAFETY: touches no memory.
                if unsafe { libc::unshare(libc::CLONE_NEWNS) } != 0 {
                    return eprintln!("not root: nothing is tried");
                }
                let dir = tempfile::tempdir().unwrap();
                let path = std::ffi::CString::new(dir.path().to_str().unwrap()).unwrap();
                let mount =
                    |source: &std::ffi::CStr, at: &std::ffi::CStr, flags, options: &std::ffi::CStr| {
                        // SAFETY: all of them are C strings that outlive the call.
                        let result = unsafe {
                            libc::mount(
                                source.as_ptr(),
                                at.as_ptr(),
                                source.as_ptr(),
                                flags,
                                options.as_ptr().cast(),
                            )
                        };
                        assert_eq!(result, 0, "{}", io::Error::last_os_error());
                    };
                mount(c"none", c"/", libc::MS_REC | libc::MS_PRIVATE, c"");
                mount(c"tmpfs", &path, 0, c"size=64k");
                run(dir.path());
                // SAFETY: a C string.
                unsafe { libc::umount2(path.as_ptr(), libc::MNT_DETACH) };
            });
            thread.join().unwrap();
        });
    }

    #[test]
    fn a_write_waits_for_room_on_the_host() {
        on_a_small_file_system(|dir| {
            let open =
                |name| File::options().read(true).write(true).create_new(true).open(dir.join(name)).unwrap();
            let (file, other) = (open("disk"), open("other"));
            file.set_len(1 << 20).unwrap();
            other.write_all_at(&[1; 32 << 10], 0).unwrap();
            let disk = Disk::new(file, false).unwrap();
            let asked = Cell::new(0);
            let ask = || asked.replace(asked.get() + 1);
            // Before it writes, and when there is no room: which there is from then on.
            let go_on = || {
                if ask() == 1 {
                    other.set_len(0).unwrap();
                }
                true
            };
            disk.fill(0, 48 << 10, &go_on).unwrap();
            assert_eq!(asked.take(), 2);
            other.write_all_at(&[1; 16 << 10], 0).unwrap();
            let error = disk.fill(48 << 10, 64 << 10, &|| false).unwrap_err();
            assert_eq!(error.kind(), io::ErrorKind::Interrupted, "who is told to stop does not begin");
            let error = disk.fill(48 << 10, 64 << 10, &|| ask() < 2).unwrap_err();
            assert_eq!(error.raw_os_error(), Some(libc::ENOSPC));
        });
    }
}
