//! Everything that is wrong with a chain, a ring or the order of a start, on each
//! queue of each device; then the shares have to serve as they should.

use std::time::Duration;

use virtio_bindings::virtio_ring::{VRING_DESC_F_INDIRECT, VRING_DESC_F_NEXT, VRING_DESC_F_WRITE};

use crate::Result;
use crate::fuse;
use crate::memory::{Memory, Piece};
use crate::out::say;
use crate::pci;
use crate::virtio::{Descriptor, Device, Queue};

const NEXT: u16 = VRING_DESC_F_NEXT as u16;
const WRITE: u16 = VRING_DESC_F_WRITE as u16;
const INDIRECT: u16 = VRING_DESC_F_INDIRECT as u16;

/// How long a device may look at what is wrong.
const LOOK: Duration = Duration::from_millis(10);

/// Memory that chains are made of.
struct Pieces {
    buffer: Piece,
    table: Piece,
}

pub fn run() -> Result<()> {
    let mut memory = Memory::new()?;
    let pieces = Pieces { buffer: memory.take(64 << 10)?, table: memory.take(1 << 20)? };
    let all = pci::all()?;
    say("attacking");
    for found in &all {
        let device = Device::take(found)?;
        let mut queues = device.start(&mut memory)?;
        for index in 0..queues.len() {
            for malformed in MALFORMED.map(|(_, malformed)| malformed) {
                device.reset()?;
                device.restart(&mut queues);
                malformed(&mut queues[index], &pieces);
                device.notify(index as u16);
                queues[index].wait_used(LOOK);
            }
        }
        for wrong in WRONG_STARTS.map(|(_, wrong)| wrong) {
            device.reset()?;
            queues.iter_mut().for_each(Queue::clear);
            wrong(&device, &queues);
            for index in 0..queues.len() as u16 + 1 {
                device.notify(index);
            }
        }
        device.reset()?;
        say(&format!("device {}: {} queues", found.kind, queues.len()));
    }
    // They serve still.
    for (tag, mut share) in fuse::shares(&mut memory)? {
        share.look_up(fuse::ROOT, "file")?.map_err(|error| format!("{tag}: LOOKUP: error {error}"))?;
    }
    say("finished");
    Ok(())
}

type Malformed = fn(&mut Queue, &Pieces);

const MALFORMED: [(&str, Malformed); 22] = [
    ("a loop", |queue, pieces| {
        describe(queue, 0, pieces.buffer.physical, 64, NEXT, 1);
        describe(queue, 1, pieces.buffer.physical, 64, NEXT, 0);
        queue.offer(0);
    }),
    ("itself", |queue, pieces| {
        describe(queue, 0, pieces.buffer.physical, 64, NEXT | WRITE, 0);
        queue.offer(0);
    }),
    ("out of the table", |queue, pieces| {
        describe(queue, 0, pieces.buffer.physical, 64, NEXT, queue.size);
        queue.offer(0);
    }),
    ("over the end of all addresses", |queue, _| {
        describe(queue, 0, u64::MAX - 3, 64, WRITE, 0);
        queue.offer(0);
    }),
    ("outside memory", |queue, _| {
        describe(queue, 0, 1 << 46, u32::MAX, 0, 0);
        queue.offer(0);
    }),
    ("the whole of memory and more", |queue, _| {
        describe(queue, 0, 0, u32::MAX, 0, 0);
        queue.offer(0);
    }),
    ("a device's registers", |queue, _| {
        describe(queue, 0, 0xc000_0000, 4096, WRITE, 0);
        queue.offer(0);
    }),
    ("a writable buffer first", |queue, pieces| {
        describe(queue, 0, pieces.buffer.physical, 64, NEXT | WRITE, 1);
        describe(queue, 1, pieces.buffer.physical, 64, 0, 0);
        queue.offer(0);
    }),
    ("no bytes", |queue, pieces| {
        describe(queue, 0, pieces.buffer.physical, 0, NEXT, 1);
        describe(queue, 1, pieces.buffer.physical, 0, WRITE, 0);
        queue.offer(0);
    }),
    ("readable only", |queue, pieces| {
        describe(queue, 0, pieces.buffer.physical, 4096, 0, 0);
        queue.offer(0);
    }),
    ("a table cut off", |queue, pieces| {
        describe(queue, 0, pieces.table.physical, 17, INDIRECT, 0);
        queue.offer(0);
    }),
    ("an empty table", |queue, pieces| {
        describe(queue, 0, pieces.table.physical, 0, INDIRECT, 0);
        queue.offer(0);
    }),
    ("a table outside memory", |queue, _| {
        describe(queue, 0, u64::MAX - 15, 160, INDIRECT, 0);
        queue.offer(0);
    }),
    ("a table of 4 GiB", |queue, pieces| {
        describe(queue, 0, pieces.table.physical, !15, INDIRECT, 0);
        queue.offer(0);
    }),
    ("a table in a table", |queue, pieces| {
        let inner = Descriptor { address: pieces.table.physical, len: 1 << 20, flags: INDIRECT, next: 0 };
        Queue::describe(&pieces.table, 0, inner);
        queue.refer(0, &pieces.table, 1);
        queue.offer(0);
    }),
    ("a table that is its own end", |queue, pieces| {
        for index in 0..65_535 {
            let address = pieces.buffer.physical;
            let next = if index == 65_534 { 0 } else { index as u16 + 1 };
            Queue::describe(&pieces.table, index, Descriptor { address, len: 65_536, flags: NEXT, next });
        }
        queue.refer(0, &pieces.table, 65_535);
        queue.offer(0);
    }),
    ("writable everywhere", |queue, pieces| {
        for index in 0..4096 {
            let flags = if index == 4095 { WRITE } else { NEXT | WRITE };
            let (address, next) = (pieces.buffer.physical, index as u16 + 1);
            Queue::describe(&pieces.table, index, Descriptor { address, len: 65_536, flags, next });
        }
        queue.refer(0, &pieces.table, 4096);
        queue.offer(0);
    }),
    ("no such head", |queue, _| {
        queue.offer(queue.size);
        queue.offer(u16::MAX);
    }),
    ("more than the ring holds", |queue, _| queue.available.put(2, queue.size + 1)),
    ("half of all numbers ahead", |queue, _| queue.available.put(2, 0x8000u16)),
    ("a step back", |queue, _| queue.available.put(2, u16::MAX)),
    ("the same one all the time", |queue, pieces| {
        describe(queue, 0, pieces.buffer.physical, 4096, WRITE, 0);
        for _ in 0..queue.size {
            queue.offer(0);
        }
    }),
];

type WrongStart = fn(&Device, &[Queue]);

const WRONG_STARTS: [(&str, WrongStart); 9] = [
    ("no negotiation", |device, _| device.drive()),
    ("no queue", |device, _| {
        device.negotiate_plainly();
        device.drive();
    }),
    ("every feature", |device, _| {
        device.negotiate(u64::MAX);
        device.drive();
    }),
    ("rings outside memory", |device, queues| {
        device.negotiate_plainly();
        enable_all(device, queues, |_| [1 << 46, 1 << 47, 1 << 48]);
        device.drive();
    }),
    ("rings over the end of all addresses", |device, queues| {
        device.negotiate_plainly();
        enable_all(device, queues, |_| [!15, !1, !3]);
        device.drive();
    }),
    ("rings that are not aligned", |device, queues| {
        device.negotiate_plainly();
        enable_all(device, queues, |queue| queue.addresses().map(|address| address + 1));
        device.drive();
    }),
    ("one place for all three", |device, queues| {
        device.negotiate_plainly();
        enable_all(device, queues, |queue| [queue.used.physical; 3]);
        device.drive();
    }),
    ("other queues under the device's hands", |device, queues| {
        device.negotiate_plainly();
        enable_all(device, queues, Queue::addresses);
        device.drive();
        enable_all(device, queues, |_| [1 << 46; 3]);
    }),
    ("driven, given up and driven again", |device, queues| {
        device.negotiate_plainly();
        enable_all(device, queues, Queue::addresses);
        for status in [0x8f, 0xff, 0x40, 0x0f, 0x80, 0x0f] {
            device.set_status(status);
        }
    }),
];

fn enable_all(device: &Device, queues: &[Queue], addresses: impl Fn(&Queue) -> [u64; 3]) {
    for (index, queue) in queues.iter().enumerate() {
        device.enable(index as u16, queue.size, addresses(queue));
    }
}

fn describe(queue: &Queue, index: usize, address: u64, len: u32, flags: u16, next: u16) {
    Queue::describe(&queue.descriptors, index, Descriptor { address, len, flags, next });
}
