//! A receive ring of vsock that is never empty, of buffers in which no packet has
//! room, while the device has packets to deliver.

use virtio_bindings::virtio_ring::VRING_DESC_F_WRITE;

use super::Rounds;
use crate::Result;
use crate::memory::Memory;
use crate::pci;
use crate::virtio::{Descriptor, Device, Queue};

/// Type of virtio device.
const VSOCK: u16 = 19;
const RECEIVE: usize = 0;
const SEND: usize = 1;
/// This guest, and its host.
const GUEST_CID: u64 = 3;
const HOST_CID: u64 = 2;
/// Nobody listens there: each request is answered by a refusal.
const PORT: u32 = 9999;
/// What makes one round.
const REFILLS: u32 = 1 << 12;
/// Looks at the ring that find it as it was.
const STANDSTILL: u32 = 1 << 12;

pub fn run() -> Result<()> {
    let mut memory = Memory::new()?;
    let vsock = pci::all()?.into_iter().find(|found| found.kind == VSOCK).ok_or("no vsock")?;
    let device = Device::take(&vsock)?;
    let mut queues = device.start(&mut memory)?;
    let useless = memory.take(4096)?;
    let packet = memory.take(4096)?;
    request(&packet, 5000);
    let send = &mut queues[SEND];
    for index in 0..send.size {
        let descriptor = Descriptor { address: packet.physical, len: 44, flags: 0, next: 0 };
        Queue::describe(&send.descriptors, usize::from(index), descriptor);
        send.offer(index);
    }
    let receive = &mut queues[RECEIVE];
    let flags = VRING_DESC_F_WRITE as u16;
    for index in 0..receive.size {
        let descriptor = Descriptor { address: useless.physical, len: 1, flags, next: 0 };
        Queue::describe(&receive.descriptors, usize::from(index), descriptor);
        receive.offer(index);
    }
    device.notify(SEND as u16);
    device.notify(RECEIVE as u16);
    let mut rounds = Rounds::start();
    let (mut next, mut refilled, mut idle) = (0, 0, 0);
    loop {
        let receive = &mut queues[RECEIVE];
        let before = refilled;
        while receive.outstanding() < receive.size {
            receive.offer(next);
            next = (next + 1) % receive.size;
            refilled += 1;
        }
        // To notify leaves the guest, and meanwhile the device could empty the ring: only once it
        // takes nothing any more, as it may have found it empty.
        idle = if refilled > before { 0 } else { idle + 1 };
        if idle == STANDSTILL {
            idle = 0;
            device.notify(RECEIVE as u16);
        }
        if refilled >= REFILLS {
            refilled = 0;
            rounds.next();
        }
    }
}

/// A request for a connection (`struct virtio_vsock_hdr`).
fn request(packet: &crate::memory::Piece, port: u32) {
    const STREAM: u16 = 1;
    const REQUEST: u16 = 1;
    packet.put(0, GUEST_CID);
    packet.put(8, HOST_CID);
    packet.put(16, port);
    packet.put(20, PORT);
    packet.put(28, STREAM);
    packet.put(30, REQUEST);
    packet.put(36, 1u32 << 16);
}
