//! A guest's FUSE client, made by hand.

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use rvm_protocol::vmm::{CachePolicy, ShareConfig};
use tempfile::TempDir;

use super::super::Fs;
use crate::devices::virtio::VirtioDevice;
use crate::devices::virtio::test_queue::{DATA, TestQueue, WRITE};
use crate::jail::Duty;

pub(super) const LOOKUP: u32 = 1;
pub(super) const FORGET: u32 = 2;
pub(super) const GETATTR: u32 = 3;
pub(super) const SETATTR: u32 = 4;
pub(super) const READLINK: u32 = 5;
pub(super) const SYMLINK: u32 = 6;
pub(super) const MKNOD: u32 = 8;
pub(super) const MKDIR: u32 = 9;
pub(super) const UNLINK: u32 = 10;
pub(super) const RMDIR: u32 = 11;
pub(super) const RENAME: u32 = 12;
pub(super) const LINK: u32 = 13;
pub(super) const OPEN: u32 = 14;
pub(super) const READ: u32 = 15;
pub(super) const WRITE_OP: u32 = 16;
pub(super) const STATFS: u32 = 17;
pub(super) const RELEASE: u32 = 18;
pub(super) const FSYNC: u32 = 20;
pub(super) const SETXATTR: u32 = 21;
pub(super) const GETXATTR: u32 = 22;
pub(super) const LISTXATTR: u32 = 23;
pub(super) const REMOVEXATTR: u32 = 24;
pub(super) const FLUSH: u32 = 25;
pub(super) const INIT: u32 = 26;
pub(super) const OPENDIR: u32 = 27;
pub(super) const READDIR: u32 = 28;
pub(super) const RELEASEDIR: u32 = 29;
pub(super) const CREATE: u32 = 35;
pub(super) const DESTROY: u32 = 38;
pub(super) const BATCH_FORGET: u32 = 42;
pub(super) const FALLOCATE: u32 = 43;
pub(super) const READDIRPLUS: u32 = 44;
pub(super) const RENAME2: u32 = 45;
pub(super) const LSEEK: u32 = 46;
pub(super) const IOCTL: u32 = 39;
pub(super) const SYNCFS: u32 = 50;
pub(super) const TMPFILE: u32 = 51;

pub(super) const ROOT: u64 = 1;
pub(super) const IN_HEADER: usize = 40;
pub(super) const OUT_HEADER: usize = 16;
pub(super) const ENTRY_BYTES: usize = 128;
pub(super) const OPEN_BYTES: usize = 16;
pub(super) const ANSWER: u64 = DATA + 0x20_0000;
pub(super) const ANSWER_BYTES: u32 = 0x20_0000;
pub(super) const NO_OPEN: u32 = 1 << 17;
pub(super) const NO_OPENDIR: u32 = 1 << 24;

/// Every feature but the extension of the message itself.
pub(super) const OFFERED: u32 = !(1 << 30);

/// A guest's FUSE client.
pub(super) struct Client {
    pub(super) queue: TestQueue,
    pub(super) dir: TempDir,
    pub(super) uid: u32,
    pub(super) gid: u32,
}

pub(super) fn share(dir: &Path, readonly: bool, cache: CachePolicy) -> ShareConfig {
    ShareConfig { tag: "rvm".to_owned(), dir: dir.to_owned(), readonly, cache }
}

/// Concatenates little-endian words.
pub(super) fn words(words: &[u32]) -> Vec<u8> {
    words.iter().flat_map(|word| word.to_le_bytes()).collect()
}

pub(super) fn name(name: &str) -> Vec<u8> {
    [name.as_bytes(), b"\0"].concat()
}

pub(super) fn u64_at(bytes: &[u8], at: usize) -> u64 {
    u64::from_le_bytes(bytes[at..at + 8].try_into().unwrap())
}

pub(super) fn u32_at(bytes: &[u8], at: usize) -> u32 {
    u32::from_le_bytes(bytes[at..at + 4].try_into().unwrap())
}

/// Where a `fuse_entry_out` has the mode and the device number.
pub(super) const ENTRY_MODE: usize = 100;
pub(super) const ENTRY_RDEV: usize = 116;

pub(super) fn read_body(handle: u64, offset: u64, size: u32) -> Vec<u8> {
    [handle.to_le_bytes().as_slice(), &offset.to_le_bytes(), &words(&[size, 0, 0, 0, 0, 0])].concat()
}

pub(super) fn write_body(handle: u64, offset: u64, flags: i32, data: &[u8]) -> Vec<u8> {
    let tail = words(&[data.len() as u32, 0, 0, 0, flags as u32, 0]);
    [handle.to_le_bytes().as_slice(), &offset.to_le_bytes(), &tail, data].concat()
}

pub(super) fn flush_body(handle: u64) -> Vec<u8> {
    [handle.to_le_bytes(), [0; 8], [0; 8]].concat()
}

/// The entries of an answer: name, node, and the offset of the one after it.
pub(super) fn entries(op: u32, answer: &[u8]) -> Vec<((String, u64), u64)> {
    let plus = if op == READDIRPLUS { ENTRY_BYTES } else { 0 };
    let (mut found, mut rest) = (Vec::new(), answer);
    while !rest.is_empty() {
        let node = if plus > 0 { u64_at(rest, 0) } else { 0 };
        let dirent = &rest[plus..];
        let len = u32_at(dirent, 16) as usize;
        let name = String::from_utf8(dirent[24..24 + len].to_vec()).unwrap();
        found.push(((name, node), u64_at(dirent, 8)));
        rest = &dirent[(24 + len).next_multiple_of(8)..];
    }
    found
}

impl Client {
    pub(super) fn new(readonly: bool, cache: CachePolicy) -> Self {
        Self::over(tempfile::tempdir().unwrap(), readonly, cache)
    }

    pub(super) fn over(dir: TempDir, readonly: bool, cache: CachePolicy) -> Self {
        let device = Fs::new(&share(dir.path(), readonly, cache)).unwrap().with_request_queues(2);
        Self::with(device, dir)
    }

    pub(super) fn with(device: Fs, dir: TempDir) -> Self {
        Self::with_threads(device, dir, || ())
    }

    /// The same, whose server's threads are started by one that has done `before`.
    pub(super) fn with_threads(mut device: Fs, dir: TempDir, before: impl FnOnce() + Send) -> Self {
        let features = device.features();
        let queue = TestQueue::activated(&mut device, features, Duty::Files, before);
        // Files are made for whoever runs the tests.
        let (uid, gid) = (fs::metadata(dir.path()).unwrap().uid(), fs::metadata(dir.path()).unwrap().gid());
        let mut client = Self { queue, dir, uid, gid };
        let (error, _) = client.call(INIT, 0, &words(&[7, 38, 1 << 17, OFFERED]));
        assert_eq!(error, 0);
        client
    }

    pub(super) fn path(&self, name: &str) -> std::path::PathBuf {
        self.dir.path().join(name)
    }

    pub(super) fn header(&self, op: u32, node: u64, body: usize) -> Vec<u8> {
        let mut bytes = words(&[(IN_HEADER + body) as u32, op]);
        bytes.extend(0x1234_u64.to_le_bytes());
        bytes.extend(node.to_le_bytes());
        bytes.extend(words(&[self.uid, self.gid, 1, 0]));
        bytes
    }

    /// Sends a request; returns the error number and what follows the header.
    pub(super) fn call(&mut self, op: u32, node: u64, body: &[u8]) -> (i32, Vec<u8>) {
        self.call_on(1, op, node, body)
    }

    pub(super) fn call_on(&mut self, queue: usize, op: u32, node: u64, body: &[u8]) -> (i32, Vec<u8>) {
        self.call_with_room(queue, op, node, body, ANSWER_BYTES)
    }

    pub(super) fn call_with_room(
        &mut self,
        queue: usize,
        op: u32,
        node: u64,
        body: &[u8],
        room: u32,
    ) -> (i32, Vec<u8>) {
        let message = [self.header(op, node, body.len()).as_slice(), body].concat();
        self.queue.write(DATA, &message);
        self.queue.write(ANSWER, &[0; OUT_HEADER]);
        // Header and body apart, as Linux sends them.
        let mut chain = vec![(DATA, IN_HEADER as u32, 0)];
        if !body.is_empty() {
            chain.push((DATA + IN_HEADER as u64, body.len() as u32, 0));
        }
        chain.push((ANSWER, room, WRITE));
        self.queue.send(queue, &chain);
        let len = self.queue.wait_used(queue) as usize;
        self.answer(len)
    }

    pub(super) fn answer(&self, len: usize) -> (i32, Vec<u8>) {
        let bytes = self.queue.read(ANSWER, len.max(OUT_HEADER));
        if len >= OUT_HEADER {
            assert_eq!(u32_at(&bytes, 0) as usize, len);
            assert_eq!(u64_at(&bytes, 8), 0x1234);
        }
        (-(u32_at(&bytes, 4) as i32), bytes[OUT_HEADER..].to_vec())
    }

    pub(super) fn lookup(&mut self, parent: u64, file: &str) -> Result<u64, i32> {
        match self.call(LOOKUP, parent, &name(file)) {
            (0, entry) => Ok(u64_at(&entry, 0)),
            (error, _) => Err(error),
        }
    }

    pub(super) fn open(&mut self, node: u64, flags: i32) -> Result<u64, i32> {
        self.open_with(node, flags, 0).map(|(handle, _)| handle)
    }

    /// Opens a file with room for as much of its content.
    pub(super) fn open_with(&mut self, node: u64, flags: i32, room: u32) -> Result<(u64, Vec<u8>), i32> {
        let room = (OUT_HEADER + OPEN_BYTES) as u32 + room;
        match self.call_with_room(1, OPEN, node, &words(&[flags as u32, 0]), room) {
            (0, open) => Ok((u64_at(&open, 0), open[OPEN_BYTES..].to_vec())),
            (error, _) => Err(error),
        }
    }

    pub(super) fn create(&mut self, file: &str, mode: u32, umask: u32) -> (u64, u64) {
        let body = [words(&[libc::O_RDWR as u32, mode, umask, 0]), name(file)].concat();
        let (error, answer) = self.call(CREATE, ROOT, &body);
        assert_eq!(error, 0);
        (u64_at(&answer, 0), u64_at(&answer, ENTRY_BYTES))
    }

    /// The names in a directory, asked for in pieces of `size` bytes.
    pub(super) fn names(&mut self, op: u32, node: u64, handle: u64, size: u32) -> Vec<(String, u64)> {
        let (mut found, mut offset) = (Vec::new(), 0);
        loop {
            let (error, bytes) = self.call(op, node, &read_body(handle, offset, size));
            assert_eq!(error, 0);
            if bytes.is_empty() {
                return found;
            }
            for (entry, next) in entries(op, &bytes) {
                offset = next;
                found.push(entry);
            }
        }
    }

    /// The root directory, open.
    pub(super) fn root_dir(&mut self) -> u64 {
        let (error, dir) = self.call(OPENDIR, ROOT, &words(&[0, 0]));
        assert_eq!(error, 0);
        u64_at(&dir, 0)
    }
}
