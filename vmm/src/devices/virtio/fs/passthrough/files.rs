//! What the guest has open: files and directories by handle, and, where it
//! opens nothing because nothing changes, the ones it used last.

use std::collections::{BTreeMap, VecDeque};
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::sys::{self, Fd};

/// Bytes of directory read from the host at once.
const DIRENT_BYTES: usize = 32 << 10;
/// Fixed part of `struct linux_dirent64`: ino, offset, length, type.
const DIRENT_HEADER: usize = 19;

/// An open file.
pub(super) struct OpenFile {
    fd: Arc<OwnedFd>,
    append: AtomicBool,
}

impl OpenFile {
    pub(super) fn new(fd: OwnedFd, append: bool) -> Self {
        Self { fd: Arc::new(fd), append: AtomicBool::new(append) }
    }

    pub(super) fn fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }

    /// Follows a change of `O_APPEND` after the file was opened.
    pub(super) fn set_append(&self, append: bool) -> io::Result<()> {
        if self.append.swap(append, Ordering::Relaxed) != append {
            sys::set_append(self.fd(), append)?;
        }
        Ok(())
    }
}

/// A directory being read: entries fetched from the host and not yet given to
/// the guest are kept, since it asks for few at a time.
pub(super) struct DirStream {
    fd: Arc<OwnedFd>,
    buffer: Vec<u8>,
    /// Start of the next entry in `buffer`.
    at: usize,
    /// Offset by which the guest asks for that entry.
    offset: u64,
    /// Where the host's descriptor stands.
    host_offset: u64,
}

/// A directory entry.
pub(super) struct Dirent<'a> {
    pub ino: u64,
    /// Offset of the entry after it.
    pub next: u64,
    pub kind: u32,
    /// Without its final NUL.
    pub name: &'a std::ffi::CStr,
}

impl DirStream {
    pub(super) fn new(fd: OwnedFd) -> Self {
        Self { fd: Arc::new(fd), buffer: Vec::new(), at: 0, offset: 0, host_offset: 0 }
    }

    pub(super) fn fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }

    /// Offset of the entry that comes next.
    pub(super) fn offset(&self) -> u64 {
        self.offset
    }

    /// Gives the entries from `offset` on to `take` until it wants no more.
    pub(super) fn read(
        &mut self,
        offset: u64,
        mut take: impl FnMut(BorrowedFd<'_>, Dirent<'_>) -> io::Result<bool>,
    ) -> io::Result<()> {
        // The start is always read afresh: that is what rewinding means.
        if offset != self.offset || offset == 0 {
            self.buffer.clear();
            self.at = 0;
            self.offset = offset;
        }
        loop {
            if self.at >= self.buffer.len() && !self.fetch()? {
                return Ok(());
            }
            let Some((entry, len)) = parse(self.buffer.get(self.at..).unwrap_or(&[])) else {
                return Err(io::ErrorKind::InvalidData.into());
            };
            let next = entry.next;
            if !take(self.fd.as_fd(), entry)? {
                return Ok(());
            }
            self.at += len;
            self.offset = next;
        }
    }

    fn fetch(&mut self) -> io::Result<bool> {
        if self.host_offset != self.offset || self.offset == 0 {
            sys::seek(self.fd.as_fd(), self.offset.cast_signed(), libc::SEEK_SET)?;
        }
        self.buffer.resize(DIRENT_BYTES, 0);
        let fetched = sys::get_dents(self.fd.as_fd(), &mut self.buffer);
        self.buffer.truncate(*fetched.as_ref().unwrap_or(&0));
        self.at = 0;
        let mut rest = self.buffer.as_slice();
        while let Some((entry, len)) = parse(rest) {
            self.host_offset = entry.next;
            rest = rest.get(len..).unwrap_or(&[]);
        }
        Ok(fetched? > 0)
    }
}

/// The first entry of `bytes` and its length.
fn parse(bytes: &[u8]) -> Option<(Dirent<'_>, usize)> {
    let field = |start: usize| bytes.get(start..start + 8)?.try_into().ok().map(u64::from_ne_bytes);
    let len = usize::from(u16::from_ne_bytes([*bytes.get(16)?, *bytes.get(17)?]));
    let name = std::ffi::CStr::from_bytes_until_nul(bytes.get(DIRENT_HEADER..len)?).ok()?;
    Some((Dirent { ino: field(0)?, next: field(8)?, kind: (*bytes.get(18)?).into(), name }, len))
}

/// What one handle of the guest stands for.
#[derive(Clone)]
enum Open {
    File(Arc<OpenFile>),
    /// And its descriptor, for which nobody waits until it has been read.
    Dir(Arc<Mutex<DirStream>>, Arc<OwnedFd>),
}

/// The guest's open files and directories.
pub(super) struct Handles {
    /// By node id and handle.
    open: Mutex<BTreeMap<(u64, u64), Open>>,
    next: AtomicU64,
    limit: usize,
}

impl Handles {
    /// None; at most `limit` at a time.
    pub(super) fn new(limit: usize) -> Self {
        Self { open: Mutex::default(), next: AtomicU64::new(1), limit }
    }

    fn lock(&self) -> MutexGuard<'_, BTreeMap<(u64, u64), Open>> {
        self.open.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn insert(&self, id: u64, open: Open) -> io::Result<u64> {
        let mut table = self.lock();
        if table.len() >= self.limit {
            return Err(io::Error::from_raw_os_error(libc::ENFILE));
        }
        let handle = self.next.fetch_add(1, Ordering::Relaxed);
        table.insert((id, handle), open);
        Ok(handle)
    }

    /// A handle for a file of node `id`.
    pub(super) fn add_file(&self, id: u64, file: OpenFile) -> io::Result<u64> {
        self.insert(id, Open::File(Arc::new(file)))
    }

    /// A handle for a directory of node `id`.
    pub(super) fn add_dir(&self, id: u64, dir: DirStream) -> io::Result<u64> {
        let fd = Arc::clone(&dir.fd);
        self.insert(id, Open::Dir(Arc::new(Mutex::new(dir)), fd))
    }

    fn get(&self, id: u64, handle: u64) -> io::Result<Open> {
        self.lock().get(&(id, handle)).cloned().ok_or_else(|| io::Error::from_raw_os_error(libc::EBADF))
    }

    /// What is open of a node, whatever for.
    pub(super) fn any(&self, id: u64) -> Option<Fd<'static>> {
        let table = self.lock();
        table.range((id, 0)..=(id, u64::MAX)).next().map(|(_, open)| match open {
            Open::File(file) => Fd::Shared(Arc::clone(&file.fd)),
            Open::Dir(_, fd) => Fd::Shared(Arc::clone(fd)),
        })
    }

    /// The open file a handle stands for.
    pub(super) fn file(&self, id: u64, handle: u64) -> io::Result<Arc<OpenFile>> {
        match self.get(id, handle)? {
            Open::File(file) => Ok(file),
            Open::Dir(..) => Err(io::Error::from_raw_os_error(libc::EISDIR)),
        }
    }

    /// The open directory a handle stands for.
    pub(super) fn dir(&self, id: u64, handle: u64) -> io::Result<Arc<Mutex<DirStream>>> {
        match self.get(id, handle)? {
            Open::Dir(dir, _) => Ok(dir),
            Open::File(_) => Err(io::Error::from_raw_os_error(libc::ENOTDIR)),
        }
    }

    /// Closes a handle.
    pub(super) fn release(&self, id: u64, handle: u64) -> io::Result<()> {
        let closed = self.lock().remove(&(id, handle));
        // It is closed without the lock.
        closed.map(drop).ok_or_else(|| io::Error::from_raw_os_error(libc::EBADF))
    }

    /// Closes all.
    pub(super) fn clear(&self) {
        let closed = std::mem::take(&mut *self.lock());
        drop(closed);
    }
}

/// The last few things used, most recent first.
pub(super) struct Recent<K, V> {
    entries: Mutex<VecDeque<(K, V)>>,
    capacity: usize,
}

impl<K: PartialEq, V> Recent<K, V> {
    pub(super) fn new(capacity: usize) -> Self {
        Self { entries: Mutex::default(), capacity }
    }

    fn lock(&self) -> MutexGuard<'_, VecDeque<(K, V)>> {
        self.entries.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes one out.
    pub(super) fn take(&self, key: &K) -> Option<V> {
        let mut entries = self.lock();
        let at = entries.iter().position(|(other, _)| other == key)?;
        entries.remove(at).map(|(_, value)| value)
    }

    /// A copy of one, which becomes the most recent.
    pub(super) fn get(&self, key: &K) -> Option<V>
    where
        V: Clone,
    {
        let mut entries = self.lock();
        let at = entries.iter().position(|(other, _)| other == key)?;
        if at > 0
            && let Some(found) = entries.remove(at)
        {
            entries.push_front(found);
        }
        entries.front().map(|(_, value)| value.clone())
    }

    /// Puts one in, and the least recent one out if there are too many.
    pub(super) fn put(&self, key: K, value: V) {
        let mut entries = self.lock();
        entries.push_front((key, value));
        let out = if entries.len() > self.capacity { entries.pop_back() } else { None };
        drop(entries);
        drop(out);
    }

    /// Drops those `unwanted` names.
    pub(super) fn remove_if(&self, unwanted: impl Fn(&K) -> bool) {
        self.lock().retain(|(key, _)| !unwanted(key));
    }
}

#[cfg(test)]
mod tests {
    use std::fs::File;

    use super::*;

    fn file() -> OpenFile {
        OpenFile::new(File::open("/dev/null").unwrap().into(), false)
    }

    #[test]
    fn open_files_are_bounded_and_belong_to_their_node() {
        let handles = Handles::new(2);
        let first = handles.add_file(7, file()).unwrap();
        let dir = DirStream::new(File::open("/").unwrap().into());
        let second = handles.add_dir(8, dir).unwrap();
        assert_eq!(handles.add_file(9, file()).unwrap_err().raw_os_error(), Some(libc::ENFILE));
        assert_eq!(handles.file(8, first).err().and_then(|e| e.raw_os_error()), Some(libc::EBADF));
        assert_eq!(handles.file(8, second).err().and_then(|e| e.raw_os_error()), Some(libc::EISDIR));
        assert_eq!(handles.dir(7, first).err().and_then(|e| e.raw_os_error()), Some(libc::ENOTDIR));
        assert!(handles.release(8, first).is_err());
        handles.release(7, first).unwrap();
        assert!(handles.add_file(9, file()).is_ok());
    }

    #[test]
    fn the_least_recent_is_dropped_first() {
        let recent = Recent::new(2);
        recent.put(1, 'a');
        recent.put(2, 'b');
        assert_eq!((recent.get(&1), recent.get(&7)), (Some('a'), None));
        recent.put(3, 'c');
        assert_eq!((recent.take(&2), recent.take(&1), recent.take(&3)), (None, Some('a'), Some('c')));
    }

    #[test]
    fn entries_that_are_cut_off_are_no_entries() {
        let mut entry = [0; 24];
        entry[16] = 24;
        entry[19..22].copy_from_slice(b"abc");
        assert_eq!(parse(&entry).unwrap().0.name, c"abc");
        assert!(parse(&entry[..23]).is_none());
        entry[16] = 19;
        assert!(parse(&entry).is_none());
        assert!(parse(&[]).is_none());
    }
}
