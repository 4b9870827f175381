//! The device as the transport and its owner see it.

use std::io;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use virtio_bindings::virtio_ring::{VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC};
use vm_memory::GuestMemoryRegion;

use super::blocks::Blocks;
use super::registers::Registers;
use super::worker::MemWorker;
use super::{BLOCK_BYTES, DEVICE_TYPE, QUEUE_SIZE};
use crate::devices::virtio::ring::Ring;
use crate::devices::virtio::{ActivateError, Activation, Interrupt, VirtioDevice, read_config_bytes};
use crate::jail::Duty;
use crate::memory::{GuestRam, Room};

/// "Memory that is not plugged must not be accessed" (section 5.15.3): there is
/// nothing behind it to read, as in a crash dump.
const VIRTIO_MEM_F_UNPLUGGED_INACCESSIBLE: u32 = 1;

/// The memory device.
pub struct Mem {
    pub(super) shared: Arc<Shared>,
}

/// What device, thread and owner share. The vCPUs see the registers alone.
pub(super) struct Shared {
    pub(super) memory: GuestRam,
    /// Which of its regions is meant.
    pub(super) room: Room,
    pub(super) registers: Registers,
    blocks: Mutex<Blocks>,
    /// Of a device that is active.
    changed: Mutex<Option<Arc<dyn Interrupt>>>,
}

impl Shared {
    /// Of the device's thread, while there is one.
    pub(super) fn blocks(&self) -> MutexGuard<'_, Blocks> {
        self.blocks.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn changed(&self) -> MutexGuard<'_, Option<Arc<dyn Interrupt>>> {
        self.changed.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The owner's side of a [`Mem`].
#[derive(Clone)]
pub struct MemControl(Arc<Shared>);

impl MemControl {
    /// Tells the guest to have `requested` bytes plugged, within the first
    /// `usable` of the region.
    pub fn request(&self, usable: u64, requested: u64) -> io::Result<()> {
        self.0.registers.request(usable, requested);
        // A driver that comes later reads it anyway.
        self.0.changed().as_ref().map_or(Ok(()), |interrupt| interrupt.trigger())
    }

    /// Bytes the guest has plugged.
    pub fn plugged_bytes(&self) -> u64 {
        self.0.registers.plugged()
    }
}

impl Mem {
    /// A device for a region `memory` can grow into, not active.
    pub fn new(memory: &GuestRam, room: Room) -> Self {
        let region = memory.growing(room).map(|region| (region.start_addr().0, region.mapped()));
        let (start, size) = region.unwrap_or_default();
        let shared = Shared {
            memory: memory.clone(),
            room,
            registers: Registers::new(start, size),
            blocks: Mutex::new(Blocks::new(size / BLOCK_BYTES)),
            changed: Mutex::new(None),
        };
        Self { shared: Arc::new(shared) }
    }

    /// For its owner.
    pub fn control(&self) -> MemControl {
        MemControl(Arc::clone(&self.shared))
    }
}

impl VirtioDevice for Mem {
    fn device_type(&self) -> u32 {
        DEVICE_TYPE
    }

    fn name(&self) -> &str {
        "mem"
    }

    fn queue_sizes(&self) -> &[u16] {
        &[QUEUE_SIZE]
    }

    fn features(&self) -> u64 {
        1 << VIRTIO_RING_F_EVENT_IDX
            | 1 << VIRTIO_RING_F_INDIRECT_DESC
            | 1 << VIRTIO_MEM_F_UNPLUGGED_INACCESSIBLE
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        read_config_bytes(&self.shared.registers.config(), offset, data);
    }

    fn config_generation(&self) -> u8 {
        self.shared.registers.generation()
    }

    fn duty(&self) -> Duty {
        Duty::Memory
    }

    fn activate(&mut self, activation: Activation) -> Result<(), ActivateError> {
        let Activation { memory, queues, features, config_interrupt, threads } = activation;
        let queue = queues.into_iter().next().flatten().ok_or(ActivateError::MissingQueue(0))?;
        let worker = MemWorker { memory, ring: Ring::new(queue, features), shared: Arc::clone(&self.shared) };
        threads.start(worker).map_err(ActivateError::Worker)?;
        *self.shared.changed() = Some(config_interrupt);
        Ok(())
    }

    /// What is plugged stays (section 5.15.5.1): the driver that comes next sees
    /// it and unplugs it.
    fn reset(&mut self) {
        *self.shared.changed() = None;
    }
}

#[cfg(test)]
mod tests {
    use vm_memory::{Bytes, GuestAddress};

    use super::*;
    use crate::devices::virtio::test_queue::{DATA, TestQueue, WRITE};
    use crate::memory::{self, Resident, Shape};

    const REQUEST: u64 = DATA;
    const ANSWER: u64 = DATA + 0x100;
    const PLUG: u16 = 0;
    const UNPLUG: u16 = 1;
    const UNPLUG_ALL: u16 = 2;
    const STATE: u16 = 3;
    const ACK: u16 = 0;
    const NACK: u16 = 1;
    const ERROR: u16 = 3;
    const MIB: u64 = 1 << 20;
    const SHAPE: Shape = Shape { boot: 32 * MIB, more: 1 << 30, hugetlb: 0, window: 0, huge_pages: false };

    struct Rig {
        queue: TestQueue,
        memory: GuestRam,
        start: u64,
        mem: Mem,
    }

    impl Rig {
        /// 256 MiB are usable, 128 asked for.
        fn new() -> Self {
            let memory = memory::create_shaped(SHAPE).unwrap();
            memory.grant(Room::Memory, 256 * MIB);
            let start = memory.growing(Room::Memory).unwrap().start_addr().0;
            let mut mem = Mem::new(&memory, Room::Memory);
            mem.control().request(256 * MIB, 128 * MIB).unwrap();
            let mut queue = TestQueue::new();
            let features = mem.features();
            mem.activate(queue.activation(1, features)).unwrap();
            Self { queue, memory, start, mem }
        }

        /// The answer's type and state.
        fn ask(&mut self, kind: u16, block: u64, count: u16) -> (u16, u16) {
            let address = self.start + block * BLOCK_BYTES;
            self.ask_at(kind, address, count)
        }

        fn ask_at(&mut self, kind: u16, address: u64, count: u16) -> (u16, u16) {
            let mut request = u64::from(kind).to_le_bytes().to_vec();
            request.extend(address.to_le_bytes());
            request.extend(u64::from(count).to_le_bytes());
            self.queue.write(REQUEST, &request);
            self.queue.write(ANSWER, &[0xee; 10]);
            self.queue.send(0, &[(REQUEST, 24, 0), (ANSWER, 10, WRITE)]);
            assert_eq!(self.queue.wait_used(0), 10);
            let answer = self.queue.read(ANSWER, 10);
            assert_eq!(answer[2..8], [0; 6]);
            (u16::from_le_bytes([answer[0], answer[1]]), u16::from_le_bytes([answer[8], answer[9]]))
        }

        fn config(&self, offset: u64) -> u64 {
            let mut bytes = [0; 8];
            self.mem.read_config(offset, &mut bytes);
            u64::from_le_bytes(bytes)
        }
    }

    #[test]
    fn blocks_come_and_go_with_their_pages() {
        let mut rig = Rig::new();
        assert_eq!([0, 8, 16, 24].map(|at| rig.config(at)), [BLOCK_BYTES, 0, rig.start, 1 << 30]);
        assert_eq!([32, 40, 48, 56].map(|at| rig.config(at)), [256 * MIB, 0, 128 * MIB, 0]);
        assert_eq!(rig.ask(PLUG, 64, 64), (ACK, 0));
        assert_eq!((rig.config(40), rig.mem.control().plugged_bytes()), (128 * MIB, 128 * MIB));
        assert_eq!(rig.ask(PLUG, 0, 1).0, NACK);

        let first = GuestAddress(rig.start + 64 * BLOCK_BYTES);
        let second = GuestAddress(first.0 + BLOCK_BYTES);
        let resident = Resident::open().unwrap();
        let before = resident.bytes(&rig.memory).unwrap();
        rig.memory.write_obj(7u64, first).unwrap();
        rig.memory.write_obj(8u64, second).unwrap();
        assert_eq!(rig.ask(UNPLUG, 64, 1), (ACK, 0));
        assert_eq!(rig.memory.read_obj::<u64>(second).unwrap(), 8);
        assert_eq!(resident.bytes(&rig.memory).unwrap() - before, 4096);
        assert_eq!(rig.memory.read_obj::<u64>(first).unwrap(), 0);
        assert_eq!(
            [(64, 1), (65, 63), (63, 3)].map(|(b, n)| rig.ask(STATE, b, n)),
            [(ACK, 1), (ACK, 0), (ACK, 2)]
        );
        assert_eq!(rig.ask(UNPLUG_ALL, 0, 0), (ACK, 0));
        assert_eq!((rig.config(40), rig.ask(STATE, 0, 128)), (0, (ACK, 1)));
        assert_eq!(rig.memory.read_obj::<u64>(second).unwrap(), 0);
    }

    /// Under a host without a pool, as under one whose pool is empty, there is none to be had.
    #[test]
    fn a_huge_page_is_the_hosts_from_plug_to_unplug() {
        let pool = |name: &str| {
            let text = std::fs::read_to_string(format!("/sys/kernel/mm/hugepages/hugepages-2048kB/{name}"));
            text.ok().and_then(|text| text.trim().parse::<u64>().ok()).unwrap_or_default()
        };
        let free = || pool("free_hugepages") - pool("resv_hugepages");
        let shape = Shape { more: 0, hugetlb: 256 * MIB, ..SHAPE };
        let Ok(memory) = memory::create_shaped(shape) else {
            assert_eq!(pool("nr_hugepages"), 0);
            return;
        };
        memory.grant(Room::Hugetlb, 128 * MIB);
        let start = memory.growing(Room::Hugetlb).unwrap().start_addr().0;
        let mut mem = Mem::new(&memory, Room::Hugetlb);
        mem.control().request(128 * MIB, 64 * MIB).unwrap();
        let mut queue = TestQueue::new();
        let features = mem.features();
        mem.activate(queue.activation(1, features)).unwrap();
        let before = free();
        let mut rig = Rig { queue, memory, start, mem };
        match before {
            0 => {
                assert_eq!(rig.ask(PLUG, 3, 1).0, NACK);
                assert_eq!((rig.mem.control().plugged_bytes(), rig.ask(STATE, 3, 1)), (0, (ACK, 1)));
            }
            _ => {
                assert_eq!(rig.ask(PLUG, 3, 1), (ACK, 0));
                assert_eq!(free(), before - 1);
                rig.memory.write_obj(7u64, GuestAddress(start + 3 * BLOCK_BYTES)).unwrap();
                assert_eq!((rig.ask(UNPLUG, 3, 1), free()), ((ACK, 0), before));
            }
        }
    }

    #[test]
    fn requests_that_make_no_sense_are_errors_and_change_nothing() {
        let mut rig = Rig::new();
        assert_eq!(rig.ask(PLUG, 4, 4), (ACK, 0));
        for kind in [PLUG, UNPLUG, STATE] {
            for (address, count) in [
                (rig.start, 0),
                (rig.start + 1, 1),
                (rig.start + 4096, 1),
                (rig.start + 256 * MIB, 1),
                (rig.start + 254 * MIB, 2),
                (rig.start, u16::MAX),
                (rig.start - BLOCK_BYTES, 1),
                (0, 1),
                (u64::MAX, u16::MAX),
            ] {
                assert_eq!(rig.ask_at(kind, address, count).0, ERROR, "{kind} {address:#x} {count}");
            }
        }
        assert_eq!(rig.ask(PLUG, 7, 2).0, ERROR, "one of them is plugged");
        assert_eq!(rig.ask(UNPLUG, 7, 2).0, ERROR, "one of them is not");
        assert_eq!(rig.ask(4, 0, 1).0, ERROR);
        assert_eq!(rig.ask(u16::MAX, 0, 1).0, ERROR);
        assert_eq!(rig.ask(STATE, 4, 4), (ACK, 0));
        assert_eq!(rig.mem.control().plugged_bytes(), 8 * MIB);
    }

    #[test]
    fn malformed_chains_are_answered_and_the_next_request_is_served() {
        let mut rig = Rig::new();
        for chain in [
            &[(REQUEST, 24, 0)][..],
            &[(ANSWER, 10, WRITE)],
            &[(REQUEST, 23, 0), (ANSWER, 10, WRITE)],
            &[(REQUEST, 24, 0), (ANSWER, 9, WRITE)],
            &[(u64::MAX - 3, 24, 0), (ANSWER, 10, WRITE)],
            &[(REQUEST, 24, 0), (u64::MAX - 3, 10, WRITE)],
        ] {
            rig.queue.write(REQUEST, &[0; 24]);
            rig.queue.send(0, chain);
            assert_eq!(rig.queue.wait_used(0), 0, "{chain:?}");
        }
        rig.queue.send_loop(0, REQUEST, 0);
        assert_eq!(rig.queue.wait_used(0), 0);
        assert_eq!(rig.ask(PLUG, 0, 1), (ACK, 0));
        rig.queue.break_ring(0);
    }

    #[test]
    fn the_driver_hears_of_another_size_and_what_is_plugged_outlives_it() {
        let mut rig = Rig::new();
        assert_eq!(rig.ask(PLUG, 0, 64), (ACK, 0));
        let generation = rig.mem.config_generation();
        assert!(!rig.queue.config_changed());
        rig.mem.control().request(256 * MIB, 192 * MIB).unwrap();
        assert!(rig.queue.config_changed());
        assert_ne!(rig.mem.config_generation(), generation);
        assert_eq!(rig.ask(PLUG, 64, 32), (ACK, 0));

        rig.queue.stop();
        rig.mem.reset();
        rig.mem.control().request(256 * MIB, 64 * MIB).unwrap();
        assert!(!rig.queue.config_changed(), "nobody listens");
        assert_eq!((rig.config(40), rig.config(48)), (192 * MIB, 64 * MIB));
    }
}
