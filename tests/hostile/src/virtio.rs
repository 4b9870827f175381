//! A virtio device, driven step by step: each of them may be the wrong one.

use std::sync::atomic::{Ordering, fence};
use std::time::{Duration, Instant};

use virtio_bindings::virtio_config::{
    VIRTIO_CONFIG_S_ACKNOWLEDGE, VIRTIO_CONFIG_S_DRIVER, VIRTIO_CONFIG_S_DRIVER_OK,
    VIRTIO_CONFIG_S_FEATURES_OK, VIRTIO_F_VERSION_1,
};
use virtio_bindings::virtio_ring::{VIRTIO_RING_F_INDIRECT_DESC, VRING_DESC_F_INDIRECT};

use crate::Result;
use crate::memory::{Memory, Piece};
use crate::pci::{Found, Function};

// The common configuration structure (virtio 1.2, 4.1.4.3).
const DEVICE_FEATURE_SELECT: usize = 0x00;
const DEVICE_FEATURE: usize = 0x04;
const DRIVER_FEATURE_SELECT: usize = 0x08;
const DRIVER_FEATURE: usize = 0x0c;
const NUM_QUEUES: usize = 0x12;
const STATUS: usize = 0x14;
const QUEUE_SELECT: usize = 0x16;
const QUEUE_SIZE: usize = 0x18;
const QUEUE_ENABLE: usize = 0x1c;
const QUEUE_ADDRESSES: usize = 0x20;

/// How long a reset may take.
const RESET: Duration = Duration::from_secs(60);

/// Bytes of a descriptor.
const DESCRIPTOR: usize = 16;

/// A device without a driver but this.
pub struct Device {
    /// The function.
    pub function: Function,
    common: usize,
    specific: usize,
    notify: usize,
    notify_multiplier: usize,
}

/// Buffers of a request.
#[derive(Clone, Copy)]
pub struct Descriptor {
    /// Guest physical address.
    pub address: u64,
    /// Bytes.
    pub len: u32,
    /// `VRING_DESC_F_*`.
    pub flags: u16,
    /// The next one's number.
    pub next: u16,
}

/// One queue: the places of its rings, and how far they are.
pub struct Queue {
    /// Entries.
    pub size: u16,
    /// Its table.
    pub descriptors: Piece,
    /// The driver's ring.
    pub available: Piece,
    /// The device's ring.
    pub used: Piece,
    offered: u16,
    seen: u16,
}

impl Device {
    /// Takes a device from its driver, and resets it.
    pub fn take(found: &Found) -> Result<Self> {
        let function = found.take()?;
        let ((common, _), (specific, _)) = (function.structure(1)?, function.structure(4)?);
        let (notify, multiplier) = function.structure(2)?;
        let notify_multiplier = multiplier as usize;
        let device = Self { function, common, specific, notify, notify_multiplier };
        device.reset()?;
        Ok(device)
    }

    /// The device's own configuration.
    pub fn config(&self, len: usize) -> Vec<u8> {
        (0..len).map(|at| self.function.get(self.specific + at)).collect()
    }

    /// Its status.
    pub fn status(&self) -> u8 {
        self.function.get(self.common + STATUS)
    }

    /// Writes the status.
    pub fn set_status(&self, status: u8) {
        self.function.put(self.common + STATUS, status);
    }

    /// Resets it and waits until that is done.
    pub fn reset(&self) -> Result<()> {
        self.set_status(0);
        let started = Instant::now();
        while self.status() != 0 {
            if started.elapsed() > RESET {
                return Err("the device is not reset".into());
            }
        }
        Ok(())
    }

    /// Features that it offers.
    pub fn offers(&self) -> u64 {
        let half = |select: u32| -> u64 {
            self.function.put(self.common + DEVICE_FEATURE_SELECT, select);
            self.function.get::<u32>(self.common + DEVICE_FEATURE).into()
        };
        half(0) | half(1) << 32
    }

    /// Agrees on features.
    pub fn negotiate(&self, features: u64) {
        self.set_status((VIRTIO_CONFIG_S_ACKNOWLEDGE | VIRTIO_CONFIG_S_DRIVER) as u8);
        for select in 0..2u32 {
            self.function.put(self.common + DRIVER_FEATURE_SELECT, select);
            self.function.put(self.common + DRIVER_FEATURE, (features >> (32 * select)) as u32);
        }
        self.set_status(self.status() | VIRTIO_CONFIG_S_FEATURES_OK as u8);
    }

    /// Agrees on what every device here has: version 1, and indirect tables where there are any.
    pub fn negotiate_plainly(&self) {
        self.negotiate(1 << VIRTIO_F_VERSION_1 | self.offers() & 1 << VIRTIO_RING_F_INDIRECT_DESC);
    }

    /// How many queues it has.
    pub fn queues(&self) -> u16 {
        self.function.get(self.common + NUM_QUEUES)
    }

    /// The most entries of a queue.
    pub fn queue_size(&self, index: u16) -> u16 {
        self.function.put(self.common + QUEUE_SELECT, index);
        self.function.get(self.common + QUEUE_SIZE)
    }

    /// Tells it of a queue, wherever that is said to be.
    pub fn enable(&self, index: u16, size: u16, addresses: [u64; 3]) {
        self.function.put(self.common + QUEUE_SELECT, index);
        self.function.put(self.common + QUEUE_SIZE, size);
        for (number, address) in addresses.into_iter().enumerate() {
            let place = self.common + QUEUE_ADDRESSES + 8 * number;
            self.function.put(place, address as u32);
            self.function.put(place + 4, (address >> 32) as u32);
        }
        self.function.put(self.common + QUEUE_ENABLE, 1u16);
    }

    /// Sets up a queue of the largest size, with rings in order.
    pub fn queue(&self, index: u16, memory: &mut Memory) -> Result<Queue> {
        let size = self.queue_size(index);
        let queue = Queue::new(size, memory)?;
        self.enable(index, size, queue.addresses());
        Ok(queue)
    }

    /// Negotiates, sets up every queue, and drives.
    pub fn start(&self, memory: &mut Memory) -> Result<Vec<Queue>> {
        self.negotiate_plainly();
        let queues = (0..self.queues()).map(|index| self.queue(index, memory)).collect::<Result<_>>()?;
        self.drive();
        Ok(queues)
    }

    /// Starts again with the same queues, after a reset.
    pub fn restart(&self, queues: &mut [Queue]) {
        self.negotiate_plainly();
        for (index, queue) in queues.iter_mut().enumerate() {
            queue.clear();
            self.enable(index as u16, queue.size, queue.addresses());
        }
        self.drive();
    }

    /// Says that the driver drives.
    pub fn drive(&self) {
        self.set_status(self.status() | VIRTIO_CONFIG_S_DRIVER_OK as u8);
    }

    /// Tells it to look at a queue.
    pub fn notify(&self, index: u16) {
        self.function.put(self.notify + usize::from(index) * self.notify_multiplier, index);
    }
}

impl Queue {
    /// Rings of `size` entries, in order.
    pub fn new(size: u16, memory: &mut Memory) -> Result<Self> {
        let entries = usize::from(size);
        Ok(Self {
            size,
            descriptors: memory.take(DESCRIPTOR * entries)?,
            available: memory.take(6 + 2 * entries)?,
            used: memory.take(6 + 8 * entries)?,
            offered: 0,
            seen: 0,
        })
    }

    /// Table, driver's and device's ring.
    pub fn addresses(&self) -> [u64; 3] {
        [self.descriptors.physical, self.available.physical, self.used.physical]
    }

    /// As new.
    pub fn clear(&mut self) {
        self.available.put(2, 0u16);
        self.used.put(2, 0u16);
        (self.offered, self.seen) = (0, 0);
    }

    /// Writes a descriptor into a table, this queue's or an indirect one.
    pub fn describe(table: &Piece, index: usize, descriptor: Descriptor) {
        let Descriptor { address, len, flags, next } = descriptor;
        let at = index * DESCRIPTOR;
        table.put(at, address);
        table.put(at + 8, len);
        table.put(at + 12, flags);
        table.put(at + 14, next);
    }

    /// Has descriptor `index` refer to a table of `count` others.
    pub fn refer(&self, index: usize, table: &Piece, count: usize) {
        let descriptor = Descriptor {
            address: table.physical,
            len: (count * DESCRIPTOR) as u32,
            flags: VRING_DESC_F_INDIRECT as u16,
            next: 0,
        };
        Self::describe(&self.descriptors, index, descriptor);
    }

    /// Offers a chain by its first descriptor.
    pub fn offer(&mut self, head: u16) {
        self.available.put(4 + 2 * usize::from(self.offered % self.size), head);
        self.offered = self.offered.wrapping_add(1);
        fence(Ordering::SeqCst);
        self.available.put(2, self.offered);
    }

    /// How many chains are with the device.
    pub fn outstanding(&self) -> u16 {
        self.offered.wrapping_sub(self.used.get(2))
    }

    /// Waits for the next chain that the device returns: its head, and the bytes it says it wrote.
    pub fn wait_used(&mut self, limit: Duration) -> Option<(u32, u32)> {
        let started = Instant::now();
        while self.used.get::<u16>(2) == self.seen {
            if started.elapsed() > limit {
                return None;
            }
            std::thread::yield_now();
        }
        fence(Ordering::SeqCst);
        let at = 4 + 8 * usize::from(self.seen % self.size);
        self.seen = self.seen.wrapping_add(1);
        Some((self.used.get(at), self.used.get(at + 4)))
    }
}
