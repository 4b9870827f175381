//! A driver that does what an input says: queues of any layout, chains of any shape, messages that
//! are nearly right.

use std::cell::RefCell;
use std::io;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use rvm_vmm::devices::virtio::worker::Threads;
use rvm_vmm::devices::virtio::{Activation, ActiveQueue, Interrupt, VirtioDevice};
use rvm_vmm::jail::Duty;
use rvm_vmm::memory::{self, GuestRam};
use virtio_queue::desc::{RawDescriptor, split::Descriptor};
use virtio_queue::{Queue, QueueT};
use vm_memory::{Bytes, GuestAddress};
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use crate::input::Input;

/// Guest memory in bytes.
const MEMORY: u64 = 2 << 20;
/// Entries of a queue.
const SIZE: u16 = 16;
/// What a queue has of memory: descriptors, then available, then used.
const QUEUE: u64 = 0x1000;
/// Where buffers are.
const DATA: u64 = 0x1_0000;
/// Where a file is lent that has become shorter since, so that whoever touches it dies.
const WINDOW: u64 = 4 << 30;
/// What of memory is as it was for the next input.
const CLEARED: usize = 0x4_0000;
/// Threads, of which no device has more.
const THREADS: usize = 8;
/// How long an answer is waited for: most come at once, some never.
const PATIENCE: Duration = Duration::from_millis(2);
/// How long a device may take to let go of its queues.
const STOP: Duration = Duration::from_secs(10);
/// Steps of one input.
const STEPS: usize = 24;

const NEXT: u16 = 1;
const WRITE: u16 = 2;
const INDIRECT: u16 = 4;

/// Counts.
struct Bell(EventFd);

impl Interrupt for Bell {
    fn trigger(&self) -> io::Result<()> {
        // Full is rung.
        let _ = self.0.write(1);
        Ok(())
    }
}

/// What is made once: memory and threads.
struct Ground {
    memory: GuestRam,
    threads: Threads,
}

thread_local! {
    static GROUND: RefCell<Option<Ground>> = const { RefCell::new(None) };
}

fn ground() -> Option<(GuestRam, Threads)> {
    GROUND.with_borrow_mut(|ground| {
        if ground.is_none() {
            let shape = memory::Shape { boot: MEMORY, window: 128 << 20, ..memory::Shape::default() };
            let memory = memory::create_shaped(shape).ok()?;
            let file = tempfile::tempfile().ok()?;
            file.set_len(0x8000).ok()?;
            let (window, bytes) = memory.map(&file).ok()?;
            memory.lend(window, bytes);
            assert_eq!(memory.windows().first()?.start(), GuestAddress(WINDOW));
            file.set_len(0x1000).ok()?;
            let threads = Threads::new("fuzz", THREADS, Duty::Files).ok()?;
            *ground = Some(Ground { memory, threads });
        }
        ground.as_ref().map(|ground| (ground.memory.clone(), ground.threads.clone()))
    })
}

/// What a device is given to read: the beginning of a request.
pub type Message = fn(&mut Input<'_>) -> Vec<u8>;

/// A queue as the driver sees it.
struct Side {
    kick: EventFd,
    offered: u16,
    descriptor: u16,
    /// Whether what is offered there is to come back.
    answers: bool,
}

/// Has a driver do to `device` what `data` says. Queues `answering` give back what they are given.
pub fn drive(device: &mut dyn VirtioDevice, answering: &[usize], message: Message, data: &[u8]) {
    let Some((memory, threads)) = ground() else { return };
    let mut input = Input::new(data);
    let _ = memory.write_slice(&vec![0; CLEARED], GuestAddress(0));
    let bell = Arc::new(Bell(match EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC) {
        Ok(event) => event,
        Err(_) => return,
    }));
    let Some(mut driver) = Driver::start(device, &memory, &threads, &bell, answering, &mut input) else {
        return;
    };
    for _ in 0..STEPS {
        if input.is_over() {
            break;
        }
        match input.u8() % 16 {
            0..=9 => driver.request(message, &mut input),
            10 => driver.scribble(&mut input),
            11 => {
                let offset = u64::from(input.u16()) % 0x200;
                let length = usize::from(input.u8() % 9);
                let bytes = input.bytes(length);
                device.write_config(offset, bytes);
                device.read_config(offset, &mut vec![0; length]);
            }
            12 => driver.sides.iter().for_each(|side| drop(side.kick.write(1))),
            13 => driver.settle(&threads),
            14 => {
                driver.index(&mut input);
                driver.settle(&threads);
            }
            _ => {
                stop(device, &threads);
                match Driver::start(device, &memory, &threads, &bell, answering, &mut input) {
                    Some(again) => driver = again,
                    None => return,
                }
            }
        }
    }
    driver.settle(&threads);
    stop(device, &threads);
}

fn stop(device: &mut dyn VirtioDevice, threads: &Threads) {
    threads.stop();
    device.reset();
    assert!(threads.wait(Instant::now() + STOP), "the device does not let go of its queues");
}

struct Driver {
    memory: GuestRam,
    sides: Vec<Side>,
}

impl Driver {
    /// Sets the queues up and starts the device; none where it does not start.
    fn start(
        device: &mut dyn VirtioDevice,
        memory: &GuestRam,
        threads: &Threads,
        bell: &Arc<Bell>,
        answering: &[usize],
        input: &mut Input<'_>,
    ) -> Option<Self> {
        let features = device.features() & (!input.u64() | 1 << 32);
        let odd = input.u8();
        let config_interrupt: Arc<dyn Interrupt> = Arc::clone(bell) as _;
        threads.begin(Arc::clone(&config_interrupt));
        let (mut sides, mut queues) = (Vec::new(), Vec::new());
        for index in 0..device.queue_sizes().len() {
            let kick = EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC).ok()?;
            let mut queue = Queue::new(SIZE).ok()?;
            let size = if odd & 1 == 0 { SIZE } else { 1 << (input.u8() % 5) };
            queue.set_size(size);
            let at = index as u64 * QUEUE;
            let mut place = |usual: u64, bit: u8| {
                if odd & bit == 0 { usual } else { u64::from(input.u32() & !0xf) % (MEMORY + 0x100) }
            };
            let (table, avail, used) = (place(at, 2), place(at + 0x800, 4), place(at + 0xc00, 8));
            queue.set_desc_table_address(Some(table as u32), Some(0));
            queue.set_avail_ring_address(Some(avail as u32), Some(0));
            queue.set_used_ring_address(Some(used as u32), Some(0));
            queue.set_ready(true);
            let active = ActiveQueue {
                kick: kick.try_clone().ok()?,
                interrupt: Arc::clone(bell) as _,
                asked: threads.asked(),
                progress: Arc::default(),
                queue,
            };
            // As the transport does.
            let is_there = active.queue.is_valid(memory) && (odd & 16 == 0 || input.u8() & 1 == 0);
            queues.push(is_there.then_some(active));
            sides.push(Side {
                kick,
                offered: 0,
                descriptor: 0,
                answers: answering.contains(&index) && odd & 14 == 0,
            });
        }
        let (memory, threads) = (memory.clone(), threads.clone());
        let of_device = memory.clone();
        device
            .activate(Activation {
                memory: of_device,
                queues,
                features,
                config_interrupt,
                threads: threads.clone(),
            })
            .map_err(|_| stop(device, &threads))
            .ok()?;
        Some(Self { memory, sides })
    }

    /// Makes a chain available: a message, more of anything, and room for an answer.
    fn request(&mut self, message: Message, input: &mut Input<'_>) {
        let count = self.sides.len();
        let queue = usize::from(input.u8()) % count.max(1);
        let shape = input.u8();
        let at = DATA + u64::from(input.u8()) * 0x100;
        let bytes = message(input);
        let _ = self.memory.write_slice(&bytes, GuestAddress(at));
        // More than a page behind an answer is room for the content of a file.
        let room = if shape & 0x10 == 0 { 0x1800 } else { input.u32() };
        let mut buffers = vec![(at, bytes.len() as u32, 0)];
        if shape & 1 != 0 {
            // The message in two.
            let first = u32::from(input.u8()).min(bytes.len() as u32);
            buffers = vec![(at, first, 0), (at + u64::from(first), bytes.len() as u32 - first, 0)];
        }
        if shape & 2 != 0 {
            buffers.push((Self::address(input), input.u32() % 0x2_0000, 0));
        }
        if shape & 4 == 0 {
            buffers.push((at + 0x2000, room, WRITE));
        }
        if shape & 8 != 0 {
            buffers.push((Self::address(input), input.u32(), input.u16() & 7));
        }
        if shape & 0x60 == 0x60 {
            // Everything may be written to.
            buffers.iter_mut().for_each(|buffer| buffer.2 |= WRITE);
        }
        let indirect = shape & 0x80 != 0;
        self.chain(queue, &buffers, indirect, input);
    }

    fn address(input: &mut Input<'_>) -> u64 {
        match input.u8() % 5 {
            0 => DATA + u64::from(input.u16()),
            1 => MEMORY - u64::from(input.u8()),
            2 => u64::MAX - u64::from(input.u8()),
            3 => WINDOW + u64::from(input.u16()),
            _ => input.u64(),
        }
    }

    fn chain(&mut self, queue: usize, buffers: &[(u64, u32, u16)], indirect: bool, input: &mut Input<'_>) {
        let Some(side) = self.sides.get_mut(queue) else { return };
        let table = queue as u64 * QUEUE;
        let descriptor = |at: u64, (addr, len, flags): (u64, u32, u16), next: u16| {
            let raw: RawDescriptor = Descriptor::new(addr, len, flags, next).into();
            let _ = self.memory.write_obj(raw, GuestAddress(at));
        };
        let head = side.descriptor % SIZE;
        let place = DATA - 0x1000;
        for (position, &(addr, len, flags)) in (0_u16..).zip(buffers) {
            let more = usize::from(position) + 1 < buffers.len();
            let flags = if more { flags | NEXT } else { flags };
            if indirect {
                descriptor(place + 16 * u64::from(position), (addr, len, flags), position + 1);
            } else {
                let index = (head + position) % SIZE;
                descriptor(table + 16 * u64::from(index), (addr, len, flags), (index + 1) % SIZE);
            }
        }
        if indirect {
            let length = 16 * buffers.len() as u32 + u32::from(input.u8() % 4 == 3);
            descriptor(table + 16 * u64::from(head), (place, length, INDIRECT), 0);
        }
        side.descriptor = (head + if indirect { 1 } else { buffers.len() as u16 }) % SIZE;
        let slot = table + 0x804 + 2 * u64::from(side.offered % SIZE);
        let _ = self.memory.write_slice(&head.to_le_bytes(), GuestAddress(slot));
        side.offered = side.offered.wrapping_add(1);
        let _ = self.memory.store(side.offered, GuestAddress(table + 0x802), Ordering::Release);
        let _ = side.kick.write(1);
    }

    /// Writes anything anywhere.
    fn scribble(&self, input: &mut Input<'_>) {
        let at = u64::from(input.u32()) % MEMORY;
        let count = usize::from(input.u8());
        let _ = self.memory.write_slice(input.bytes(count), GuestAddress(at));
    }

    /// Says that another number of requests is available.
    fn index(&mut self, input: &mut Input<'_>) {
        let queue = usize::from(input.u8()) % self.sides.len().max(1);
        let Some(side) = self.sides.get_mut(queue) else { return };
        side.offered = input.u16();
        side.answers = false;
        let _ =
            self.memory.store(side.offered, GuestAddress(queue as u64 * QUEUE + 0x802), Ordering::Release);
        let _ = side.kick.write(1);
    }

    /// Waits for what comes back, a little.
    fn settle(&self, threads: &Threads) {
        let until = Instant::now() + PATIENCE;
        let is_due = || {
            (0_u64..).zip(&self.sides).any(|(queue, side)| {
                let used: u16 =
                    self.memory.load(GuestAddress(queue * QUEUE + 0xc02), Ordering::Acquire).unwrap_or(0);
                side.answers && used != side.offered
            })
        };
        while is_due() && !threads.have_failed() && Instant::now() < until {
            std::thread::yield_now();
        }
    }
}
