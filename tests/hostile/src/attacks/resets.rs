//! A device is told to reset in the middle of all the work its queue has room for.

use std::time::Duration;

use virtio_bindings::virtio_blk::VIRTIO_BLK_T_WRITE_ZEROES;
use virtio_bindings::virtio_ring::{VRING_DESC_F_NEXT, VRING_DESC_F_WRITE};

use super::Rounds;
use crate::Result;
use crate::fuse::{self, REQUESTS, ROOT, message, opcode};
use crate::memory::{Memory, Piece};
use crate::pci;
use crate::virtio::{Descriptor, Device, Queue};

/// Type of virtio device.
const DISK: u16 = 2;
/// Sectors of one range of zeroes: the most a device takes.
const SECTORS: u32 = 64 << 10;
/// Ranges in one request: what was allowed once.
const RANGES: usize = 32;
/// Bytes of one read, by pieces of [`PIECE`].
const PIECES: usize = 16;
const PIECE: usize = 1 << 20;
/// How long a device may be at work before it is reset.
const WORK: Duration = Duration::from_millis(20);

const NEXT: u16 = VRING_DESC_F_NEXT as u16;
const WRITE: u16 = VRING_DESC_F_WRITE as u16;

pub fn run() -> Result<()> {
    let mut memory = Memory::new()?;
    let mut shares = fuse::shares(&mut memory)?;
    let (_, share) = shares.first_mut().ok_or("no share")?;
    let reads = reads(&mut memory)?;
    let disk = pci::all()?.into_iter().find(|found| found.kind == DISK).ok_or("no disk")?;
    let disk = Device::take(&disk)?;
    let mut disk_queues = disk.start(&mut memory)?;
    let zeroes = [zeroes(&mut memory, 1)?, zeroes(&mut memory, RANGES)?];
    let mut rounds = Rounds::start();
    loop {
        reset(&disk, 0, &mut disk_queues, &zeroes)?;
        disk.restart(&mut disk_queues);
        // The file is another one in each session.
        let file = share.look_up(ROOT, "file")?.map_err(|error| format!("LOOKUP file: error {error}"))?;
        let opened = share.open(opcode::OPEN, file, 0)?;
        let handle = opened.map_err(|error| format!("OPEN file: error {error}"))?;
        let body = fuse::read_body(handle, (PIECES * PIECE) as u32);
        reads.head.write(0, &message(opcode::READ, file, &body, fuse::IN_HEADER + body.len()));
        reset(&share.device, REQUESTS, &mut share.queues, std::slice::from_ref(&reads.request))?;
        share.device.restart(&mut share.queues);
        share.init()?;
        rounds.next();
    }
}

/// Fills a queue with these requests in turn, lets the device begin, and resets it.
fn reset(device: &Device, index: u16, queues: &mut [Queue], requests: &[Request]) -> Result<()> {
    let queue = queues.get_mut(usize::from(index)).ok_or("no such queue")?;
    for (number, request) in (0..queue.size).zip(requests.iter().cycle()) {
        queue.refer(usize::from(number), &request.table, request.count);
        queue.offer(number);
    }
    device.notify(index);
    std::thread::sleep(WORK);
    device.reset()
}

/// An indirect table, which any number of descriptors may refer to.
struct Request {
    table: Piece,
    count: usize,
}

impl Request {
    fn new(memory: &mut Memory, buffers: &[(Piece, u16)]) -> Result<Self> {
        let table = memory.take(16 * buffers.len())?;
        for (index, (piece, flags)) in buffers.iter().enumerate() {
            let last = index + 1 == buffers.len();
            let flags = if last { *flags } else { flags | NEXT };
            let (len, next) = (piece.len as u32, index as u16 + 1);
            Queue::describe(&table, index, Descriptor { address: piece.physical, len, flags, next });
        }
        Ok(Self { table, count: buffers.len() })
    }
}

struct Reads {
    head: Piece,
    request: Request,
}

/// READs whose answers are one piece of memory several times.
fn reads(memory: &mut Memory) -> Result<Reads> {
    let head = memory.take(4096)?.part(0, fuse::IN_HEADER + 40);
    let header = memory.take(4096)?.part(0, fuse::OUT_HEADER);
    let data = memory.take(PIECE)?;
    let mut buffers = vec![(head, 0), (header, WRITE)];
    buffers.extend([(data, WRITE); PIECES]);
    Ok(Reads { head, request: Request::new(memory, &buffers)? })
}

/// Zeroes for the whole disk, several times, which the host has to write one by one.
fn zeroes(memory: &mut Memory, ranges: usize) -> Result<Request> {
    let request = memory.take(4096)?.part(0, 16 + 16 * ranges);
    request.put(0, VIRTIO_BLK_T_WRITE_ZEROES);
    for range in 0..ranges {
        request.put(16 + 16 * range + 8, SECTORS);
    }
    let status = memory.take(4096)?.part(0, 1);
    Request::new(memory, &[(request, 0), (status, WRITE)])
}
