//! A driver for tests: rings in guest memory, served by the real device thread.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering, fence};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use virtio_bindings::virtio_ring::{VRING_DESC_F_NEXT, VRING_DESC_F_WRITE};
use virtio_queue::desc::{RawDescriptor, split::Descriptor};
use virtio_queue::{Queue, QueueT};
use vm_memory::{Bytes, GuestAddress};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::worker::Threads;
use super::{Activation, ActiveQueue, Interrupt, VirtioDevice};
use crate::jail::Duty;
use crate::memory::GuestRam;

/// Device-writable buffer.
pub const WRITE: u16 = VRING_DESC_F_WRITE as u16;
const NEXT: u16 = VRING_DESC_F_NEXT as u16;
const INDIRECT: u16 = virtio_bindings::virtio_ring::VRING_DESC_F_INDIRECT as u16;

/// Descriptors per queue.
pub const SIZE: u16 = 64;
/// Where tests put their buffers: above the rings.
pub const DATA: u64 = 0x1_0000;
/// Guest memory in bytes.
pub const MEMORY: usize = 32 << 20;
const QUEUE_STRIDE: u64 = 0x2000;
const PATIENCE: Duration = Duration::from_secs(10);

struct Bell(EventFd);

impl Interrupt for Bell {
    fn trigger(&self) -> io::Result<()> {
        self.0.write(1)
    }
}

struct Side {
    next_descriptor: u16,
    avail: u16,
    used: u16,
    kick: EventFd,
    bell: Arc<Bell>,
}

impl Side {
    fn new() -> Self {
        Self {
            next_descriptor: 0,
            avail: 0,
            used: 0,
            kick: EventFd::new(EFD_NONBLOCK).unwrap(),
            bell: Arc::new(Bell(EventFd::new(EFD_NONBLOCK).unwrap())),
        }
    }
}

/// The driver's side of a device's queues.
pub struct TestQueue {
    pub memory: GuestRam,
    sides: Vec<Side>,
    config: Arc<Bell>,
    /// More than any device has.
    threads: Threads,
}

impl TestQueue {
    pub fn new() -> Self {
        Self::of(Duty::Files)
    }

    /// Those of a device with threads of that duty.
    fn of(duty: Duty) -> Self {
        Self::with(GuestRam::from_ranges(&[(GuestAddress(0), MEMORY)]), duty)
    }

    /// Rings in the first [`DATA`] bytes of `memory`.
    pub fn in_memory(memory: GuestRam) -> Self {
        Self::with(memory, Duty::Files)
    }

    fn with(memory: GuestRam, duty: Duty) -> Self {
        let config = Arc::new(Bell(EventFd::new(EFD_NONBLOCK).unwrap()));
        Self { memory, sides: Vec::new(), config, threads: Threads::new("test", 8, duty).unwrap() }
    }

    /// Those of `device`, which is active with `features`; its threads have that duty, and are started by one that has
    /// done `before`.
    pub fn activated(
        device: &mut impl VirtioDevice,
        features: u64,
        duty: Duty,
        before: impl FnOnce() + Send,
    ) -> Self {
        let start = || {
            before();
            // The threads are born with the queues.
            let mut queue = Self::of(duty);
            device.activate(queue.activation(device.queue_sizes().len(), features)).unwrap();
            queue
        };
        std::thread::scope(|scope| scope.spawn(start).join()).unwrap()
    }

    /// Sets up `queues` queues as a driver does before DRIVER_OK.
    pub fn activation(&mut self, queues: usize, features: u64) -> Activation {
        self.sides = (0..queues).map(|_| Side::new()).collect();
        let active = (0..queues).map(|index| Some(self.active(index))).collect();
        let config_interrupt: Arc<dyn Interrupt> = Arc::clone(&self.config) as _;
        self.threads.begin(Arc::clone(&config_interrupt));
        let (memory, threads) = (self.memory.clone(), self.threads.clone());
        Activation { memory, queues: active, features, config_interrupt, threads }
    }

    /// Stops the device's threads, as the transport does before a reset.
    pub fn stop(&self) {
        self.threads.stop();
        assert!(self.threads.wait(Instant::now() + PATIENCE));
    }

    /// Whether the device has said, since the last call, that its configuration changed.
    pub fn config_changed(&self) -> bool {
        self.config.0.read().is_ok()
    }

    fn active(&self, index: usize) -> ActiveQueue {
        let mut queue = Queue::new(SIZE).unwrap();
        queue.set_size(SIZE);
        queue.set_desc_table_address(Some(desc(index) as u32), Some(0));
        queue.set_avail_ring_address(Some(avail(index) as u32), Some(0));
        queue.set_used_ring_address(Some(used(index) as u32), Some(0));
        queue.set_ready(true);
        let side = &self.sides[index];
        ActiveQueue {
            queue,
            kick: side.kick.try_clone().unwrap(),
            interrupt: Arc::clone(&side.bell) as _,
            asked: self.threads.asked(),
            progress: Arc::default(),
        }
    }

    /// Stops the device and clears the rings as a driver does after a reset.
    pub fn reset(&mut self) {
        self.stop();
        self.memory.write_slice(&vec![0; DATA as usize], GuestAddress(0)).unwrap();
    }

    /// Makes one request available and kicks; returns its head.
    pub fn send(&mut self, queue: usize, buffers: &[(u64, u32, u16)]) -> u16 {
        let head = self.send_quietly(queue, buffers);
        self.kick(queue);
        head
    }

    /// Makes one request available that the device is not told of; returns its head.
    pub fn send_quietly(&mut self, queue: usize, buffers: &[(u64, u32, u16)]) -> u16 {
        let head = self.sides[queue].next_descriptor;
        for (position, &(addr, len, flags)) in buffers.iter().enumerate() {
            let index = (head + position as u16) % SIZE;
            let last = position + 1 == buffers.len();
            let flags = if last { flags } else { flags | NEXT };
            self.descriptor(queue, index, addr, len, flags, (index + 1) % SIZE);
        }
        self.sides[queue].next_descriptor = (head + buffers.len() as u16) % SIZE;
        self.offer(queue, head);
        head
    }

    /// Tells the device of what is available.
    pub fn kick(&self, queue: usize) {
        self.sides[queue].kick.write(1).unwrap();
    }

    /// Makes a chain available whose two descriptors point at each other.
    pub fn send_loop(&mut self, queue: usize, addr: u64, flags: u16) {
        let head = self.sides[queue].next_descriptor;
        let second = (head + 1) % SIZE;
        self.descriptor(queue, head, addr, 16, flags | NEXT, second);
        self.descriptor(queue, second, addr, 16, flags | NEXT, head);
        self.sides[queue].next_descriptor = (head + 2) % SIZE;
        self.offer(queue, head);
        self.sides[queue].kick.write(1).unwrap();
    }

    /// Makes a chain of `buffers` available through an indirect table at `table`.
    pub fn send_indirect(&mut self, queue: usize, table: u64, buffers: &[(u64, u32, u16)]) {
        for (position, &(addr, len, flags)) in buffers.iter().enumerate() {
            let last = position + 1 == buffers.len();
            let flags = if last { flags } else { flags | NEXT };
            let raw: RawDescriptor = Descriptor::new(addr, len, flags, position as u16 + 1).into();
            self.memory.write_obj(raw, GuestAddress(table + 16 * position as u64)).unwrap();
        }
        self.send(queue, &[(table, 16 * buffers.len() as u32, INDIRECT)]);
    }

    fn descriptor(&self, queue: usize, index: u16, addr: u64, len: u32, flags: u16, next: u16) {
        let raw: RawDescriptor = Descriptor::new(addr, len, flags, next).into();
        self.memory.write_obj(raw, GuestAddress(desc(queue) + 16 * u64::from(index))).unwrap();
    }

    fn offer(&mut self, queue: usize, head: u16) {
        let side = &mut self.sides[queue];
        let slot = GuestAddress(avail(queue) + 4 + 2 * u64::from(side.avail % SIZE));
        self.memory.write_obj(head, slot).unwrap();
        side.avail = side.avail.wrapping_add(1);
        self.memory.store(side.avail, GuestAddress(avail(queue) + 2), Ordering::Release).unwrap();
    }

    /// Writes nonsense into the index of available requests and kicks.
    pub fn break_ring(&mut self, queue: usize) {
        self.memory.write_obj(0x7fff_u16, GuestAddress(avail(queue) + 2)).unwrap();
        self.sides[queue].kick.write(1).unwrap();
    }

    /// Offers one buffer of no use again and again, as fast as the device takes it,
    /// until `over` is set.
    pub fn refill_for_ever(&self, queue: usize, over: Arc<AtomicBool>) -> JoinHandle<()> {
        let memory = self.memory.clone();
        // Every entry of the ring is descriptor 0, which the device cannot write to.
        memory.write_slice(&[0; 2 * SIZE as usize], GuestAddress(avail(queue) + 4)).unwrap();
        self.descriptor(queue, 0, DATA, 16, 0, 0);
        let kick = self.sides[queue].kick.try_clone().unwrap();
        std::thread::spawn(move || {
            while !over.load(Ordering::Relaxed) {
                let taken: u16 = memory.load(GuestAddress(used(queue) + 2), Ordering::Acquire).unwrap();
                let offered = taken.wrapping_add(SIZE);
                memory.store(offered, GuestAddress(avail(queue) + 2), Ordering::Release).unwrap();
                kick.write(1).unwrap();
            }
        })
    }

    /// The next used element, head and bytes written, if there is one already.
    pub fn try_used(&mut self, queue: usize) -> Option<(u16, u32)> {
        let side = &mut self.sides[queue];
        // Asks for an interrupt on the next element, where EVENT_IDX is in use.
        self.memory
            .store(side.used, GuestAddress(avail(queue) + 4 + 2 * u64::from(SIZE)), Ordering::Release)
            .unwrap();
        fence(Ordering::SeqCst);
        let index: u16 = self.memory.load(GuestAddress(used(queue) + 2), Ordering::Acquire).unwrap();
        if index == side.used {
            return None;
        }
        let slot = used(queue) + 4 + 8 * u64::from(side.used % SIZE);
        side.used = side.used.wrapping_add(1);
        let head: u32 = self.memory.read_obj(GuestAddress(slot)).unwrap();
        let len: u32 = self.memory.read_obj(GuestAddress(slot + 4)).unwrap();
        Some((head as u16, len))
    }

    /// Waits for the next used element.
    pub fn wait_used_element(&mut self, queue: usize) -> (u16, u32) {
        let deadline = Instant::now() + PATIENCE;
        loop {
            if let Some(element) = self.try_used(queue) {
                return element;
            }
            let left = deadline.saturating_duration_since(Instant::now());
            assert!(!left.is_zero(), "the device did not answer");
            self.wait_bell(queue, left);
        }
    }

    /// Waits for the next request to be used; returns the bytes written.
    pub fn wait_used(&mut self, queue: usize) -> u32 {
        self.wait_used_element(queue).1
    }

    fn wait_bell(&self, queue: usize, patience: Duration) {
        let bell = &self.sides[queue].bell.0;
        let mut poll =
            libc::pollfd { fd: std::os::fd::AsRawFd::as_raw_fd(bell), events: libc::POLLIN, revents: 0 };
        // SAFETY: one valid pollfd.
        unsafe { libc::poll(&raw mut poll, 1, patience.as_millis() as i32) };
        let _ = bell.read();
    }

    pub fn write(&self, addr: u64, bytes: &[u8]) {
        self.memory.write_slice(bytes, GuestAddress(addr)).unwrap();
    }

    pub fn read(&self, addr: u64, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        self.memory.read_slice(&mut bytes, GuestAddress(addr)).unwrap();
        bytes
    }
}

fn desc(queue: usize) -> u64 {
    queue as u64 * QUEUE_STRIDE
}

fn avail(queue: usize) -> u64 {
    desc(queue) + 0x800
}

fn used(queue: usize) -> u64 {
    desc(queue) + 0x1000
}
