//! A virtio-fs server, asked directly: any message at all, as many bytes long as one likes.

use std::time::Duration;

use virtio_bindings::virtio_ring::{VRING_DESC_F_NEXT, VRING_DESC_F_WRITE};

use crate::Result;
use crate::memory::{Memory, Piece};
use crate::pci;
use crate::virtio::{Descriptor, Device, Queue};

/// Type of virtio device.
pub const KIND: u16 = 26;
/// The tree's root.
pub const ROOT: u64 = 1;
/// The first queue for requests.
pub const REQUESTS: u16 = 1;

/// Opcodes (`linux/fuse.h`).
pub mod opcode {
    pub const LOOKUP: u32 = 1;
    pub const SETATTR: u32 = 4;
    pub const SYMLINK: u32 = 6;
    pub const MKNOD: u32 = 8;
    pub const MKDIR: u32 = 9;
    pub const UNLINK: u32 = 10;
    pub const RMDIR: u32 = 11;
    pub const RENAME: u32 = 12;
    pub const LINK: u32 = 13;
    pub const OPEN: u32 = 14;
    pub const READ: u32 = 15;
    pub const WRITE: u32 = 16;
    pub const SETXATTR: u32 = 21;
    pub const GETXATTR: u32 = 22;
    pub const LISTXATTR: u32 = 23;
    pub const INIT: u32 = 26;
    pub const OPENDIR: u32 = 27;
    pub const READDIR: u32 = 28;
    pub const CREATE: u32 = 35;
    pub const IOCTL: u32 = 39;
    pub const BATCH_FORGET: u32 = 42;
    pub const TMPFILE: u32 = 51;
}

/// Bytes of a message's header.
pub const IN_HEADER: usize = 40;
/// Bytes of an answer's header.
pub const OUT_HEADER: usize = 16;
/// Room for a message, and for an answer.
const ROOM: usize = 16 << 10;
/// How long an answer may take; a message of 65,535 buffers takes seconds in an emulated machine.
const PATIENCE: Duration = Duration::from_secs(120);

/// The driver of one share.
pub struct Share {
    /// Its device.
    pub device: Device,
    /// Its queues.
    pub queues: Vec<Queue>,
    message: Piece,
    answer: Piece,
}

/// Every share of the machine with its tag, taken from its driver and started.
pub fn shares(memory: &mut Memory) -> Result<Vec<(String, Share)>> {
    let mut shares = Vec::new();
    for found in pci::all()?.iter().filter(|found| found.kind == KIND) {
        let device = Device::take(found)?;
        let tag = device.config(36);
        let tag: Vec<u8> = tag.into_iter().take_while(|byte| *byte != 0).collect();
        let queues = device.start(memory)?;
        let mut share = Share { device, queues, message: memory.take(ROOM)?, answer: memory.take(ROOM)? };
        share.init()?;
        shares.push((String::from_utf8(tag)?, share));
    }
    if shares.is_empty() { Err("no share".into()) } else { Ok(shares) }
}

/// A message's header and what follows it.
pub fn message(opcode: u32, node: u64, body: &[u8], len: usize) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(IN_HEADER + body.len());
    bytes.extend(u32::try_from(len).unwrap_or(u32::MAX).to_le_bytes());
    bytes.extend(opcode.to_le_bytes());
    bytes.extend(7u64.to_le_bytes());
    bytes.extend(node.to_le_bytes());
    // Of root's.
    bytes.extend([0; 16]);
    bytes.extend(body);
    bytes
}

/// Numbers, one behind the other.
pub fn words(words: &[u32]) -> Vec<u8> {
    words.iter().flat_map(|word| word.to_le_bytes()).collect()
}

impl Share {
    /// The first message of a session.
    pub fn init(&mut self) -> Result<()> {
        let answer = self.ask(opcode::INIT, 0, &words(&[7, 33, 1 << 17, 0]))?;
        answer.map(drop).map_err(|error| format!("INIT: {error}").into())
    }

    /// Asks, and returns what follows the answer's header, or its error number.
    pub fn ask(&mut self, opcode: u32, node: u64, body: &[u8]) -> Result<std::result::Result<Vec<u8>, i32>> {
        let bytes = message(opcode, node, body, IN_HEADER + body.len());
        self.message.write(0, &bytes);
        let table = self.queues[usize::from(REQUESTS)].descriptors;
        let request = Descriptor {
            address: self.message.physical,
            len: bytes.len() as u32,
            flags: VRING_DESC_F_NEXT as u16,
            next: 1,
        };
        let answer = Descriptor {
            address: self.answer.physical,
            len: self.answer.len as u32,
            flags: VRING_DESC_F_WRITE as u16,
            next: 0,
        };
        Queue::describe(&table, 0, request);
        Queue::describe(&table, 1, answer);
        let len = self.send(0)?;
        let error: i32 = self.answer.get(4);
        let len = (len as usize).min(self.answer.len).max(OUT_HEADER);
        Ok(if error == 0 { Ok(self.answer.read(OUT_HEADER, len - OUT_HEADER)) } else { Err(-error) })
    }

    /// Asks for a name that is not there, and has the answer written anywhere.
    pub fn refused_at(&mut self, physical: u64) -> Result<()> {
        let bytes = message(opcode::LOOKUP, ROOT, b"absent\0", IN_HEADER + 7);
        self.message.write(0, &bytes);
        let table = self.queues[usize::from(REQUESTS)].descriptors;
        let (address, len) = (self.message.physical, bytes.len() as u32);
        Queue::describe(&table, 0, Descriptor { address, len, flags: VRING_DESC_F_NEXT as u16, next: 1 });
        let (address, len) = (physical, OUT_HEADER as u32);
        Queue::describe(&table, 1, Descriptor { address, len, flags: VRING_DESC_F_WRITE as u16, next: 0 });
        self.send(0).map(drop)
    }

    /// Sends the chain that begins with a descriptor; returns the bytes of the answer.
    pub fn send(&mut self, head: u16) -> Result<u32> {
        let queue = &mut self.queues[usize::from(REQUESTS)];
        queue.offer(head);
        self.device.notify(REQUESTS);
        let (_, len) = queue.wait_used(PATIENCE).ok_or("the share does not answer")?;
        Ok(len)
    }

    /// The node of a name in another.
    pub fn look_up(&mut self, parent: u64, name: &str) -> Result<std::result::Result<u64, i32>> {
        let answer = self.ask(opcode::LOOKUP, parent, &[name.as_bytes(), b"\0"].concat())?;
        answer.map(|entry| u64_at(&entry, 0)).transpose_with("LOOKUP")
    }

    /// Opens a file or a directory; its handle.
    pub fn open(&mut self, opcode: u32, node: u64, flags: u32) -> Result<std::result::Result<u64, i32>> {
        let answer = self.ask(opcode, node, &words(&[flags, 0]))?;
        answer.map(|opened| u64_at(&opened, 0)).transpose_with("OPEN")
    }

    /// Names in a directory, without `.` and `..`.
    pub fn list(&mut self, node: u64) -> Result<Vec<String>> {
        let failed = |error: i32| format!("listing node {node}: error {error}");
        let handle = self.open(opcode::OPENDIR, node, 0)?.map_err(failed)?;
        let entries = self.ask(opcode::READDIR, node, &read_body(handle, 8 << 10))?.map_err(failed)?;
        let mut names = Vec::new();
        let mut rest = entries.as_slice();
        while let (Some(head), Some(len)) = (rest.get(..24), rest.get(16..20)) {
            let _ = head;
            let len = u32::from_le_bytes(len.try_into()?) as usize;
            let name = rest.get(24..24 + len).ok_or("an entry is cut off")?;
            names.push(String::from_utf8_lossy(name).into_owned());
            rest = rest.get((24 + len).next_multiple_of(8)..).unwrap_or_default();
        }
        names.retain(|name| name != "." && name != "..");
        Ok(names)
    }
}

/// What READ and READDIR ask for, from the start on.
pub fn read_body(handle: u64, size: u32) -> Vec<u8> {
    [handle.to_le_bytes().as_slice(), &[0; 8], &words(&[size, 0, 0, 0, 0, 0])].concat()
}

fn u64_at(bytes: &[u8], at: usize) -> Option<u64> {
    Some(u64::from_le_bytes(bytes.get(at..at + 8)?.try_into().ok()?))
}

/// An answer that was cut short is none.
trait TransposeWith<T> {
    fn transpose_with(self, what: &str) -> Result<std::result::Result<T, i32>>;
}

impl<T> TransposeWith<T> for std::result::Result<Option<T>, i32> {
    fn transpose_with(self, what: &str) -> Result<std::result::Result<T, i32>> {
        match self {
            Ok(Some(value)) => Ok(Ok(value)),
            Ok(None) => Err(format!("{what} has a short answer").into()),
            Err(error) => Ok(Err(error)),
        }
    }
}
