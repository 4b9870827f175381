//! The device as the transport sees it.

use serde_json::Value;
use virtio_bindings::virtio_ring::VIRTIO_RING_F_EVENT_IDX;

use super::worker::BalloonWorker;
use super::{DEVICE_TYPE, QUEUE_SIZE, REPORTING};
use crate::devices::virtio::ring::Ring;
use crate::devices::virtio::{ActivateError, Activation, StateError, VirtioDevice};
use crate::jail::Duty;

/// `VIRTIO_BALLOON_F_PAGE_REPORTING` (section 5.5.3).
const PAGE_REPORTING: u64 = 1 << 5;

/// A balloon that stays empty.
#[derive(Debug, Default)]
pub struct Balloon;

impl VirtioDevice for Balloon {
    fn device_type(&self) -> u32 {
        DEVICE_TYPE
    }

    fn name(&self) -> &str {
        "balloon"
    }

    /// Pages for the balloon, pages out of it, of which there are none, and pages that are free.
    fn queue_sizes(&self) -> &[u16] {
        &[QUEUE_SIZE; REPORTING + 1]
    }

    fn features(&self) -> u64 {
        1 << VIRTIO_RING_F_EVENT_IDX | PAGE_REPORTING
    }

    /// No page is asked for, and none is had.
    fn read_config(&self, _offset: u64, data: &mut [u8]) {
        data.fill(0);
    }

    fn duty(&self) -> Duty {
        Duty::Balloon
    }

    fn activate(&mut self, activation: Activation) -> Result<(), ActivateError> {
        let Activation { memory, queues, features, threads, .. } = activation;
        if features & PAGE_REPORTING == 0 {
            return Ok(());
        }
        let queue =
            queues.into_iter().nth(REPORTING).flatten().ok_or(ActivateError::MissingQueue(REPORTING))?;
        let ring = Ring::new(queue, features);
        threads.start(BalloonWorker { memory, ring }).map_err(ActivateError::Worker)
    }

    /// There is nothing to it: what was given back reads as zeroes.
    fn save(&self) -> Result<Value, StateError> {
        Ok(Value::Null)
    }

    fn restore(&mut self, _state: Value) -> Result<(), StateError> {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use vm_memory::{Bytes, GuestAddress, GuestMemoryRegion};

    use super::*;
    use crate::devices::virtio::test_queue::{DATA, TestQueue, WRITE};
    use crate::memory::{self, GuestRam, Resident, Room, Shape};

    const MIB: u64 = 1 << 20;
    const BLOCK: u64 = 2 * MIB;

    struct Rig {
        queue: TestQueue,
        device: Balloon,
        memory: GuestRam,
    }

    impl Rig {
        fn new() -> Self {
            let shape = Shape { boot: 64 * MIB, more: 256 * MIB, ..Shape::default() };
            let memory = memory::create_shaped(shape).unwrap();
            memory.grant(Room::Memory, 128 * MIB);
            let mut rig = Self { queue: TestQueue::in_memory(memory.clone()), device: Balloon, memory };
            rig.activate();
            rig
        }

        fn activate(&mut self) {
            let features = self.device.features();
            self.device.activate(self.queue.activation(REPORTING + 1, features)).unwrap();
        }

        fn growing(&self) -> u64 {
            self.memory.growing(Room::Memory).unwrap().start_addr().0
        }

        fn tell(&mut self, ranges: &[(u64, u32)]) {
            let chain: Vec<_> = ranges.iter().map(|&(start, bytes)| (start, bytes, WRITE)).collect();
            self.queue.send(REPORTING, &chain);
            assert_eq!(self.queue.wait_used(REPORTING), 0);
        }

        fn fill(&self, start: u64) {
            self.memory.write_slice(&[7; BLOCK as usize], GuestAddress(start)).unwrap();
        }

        fn resident(&self) -> u64 {
            Resident::open().unwrap().bytes(&self.memory).unwrap()
        }

        fn byte(&self, at: u64) -> u8 {
            self.memory.read_obj(GuestAddress(at)).unwrap()
        }
    }

    #[test]
    fn what_is_told_to_be_free_is_the_hosts_and_nothing_beside_it() {
        let mut rig = Rig::new();
        let (boot, more) = (16 * MIB, rig.growing());
        // The rings' own pages.
        rig.tell(&[(boot, 0)]);
        let before = rig.resident();
        [boot, boot + BLOCK, boot + 2 * BLOCK, more, more + BLOCK].iter().for_each(|at| rig.fill(*at));
        assert_eq!(rig.resident() - before, 5 * BLOCK);
        rig.tell(&[(boot + BLOCK, BLOCK as u32), (more, BLOCK as u32)]);
        assert_eq!(rig.resident() - before, 3 * BLOCK);
        let bytes = [boot + BLOCK - 1, boot + BLOCK, boot + 2 * BLOCK - 1, boot + 2 * BLOCK];
        assert_eq!(bytes.map(|at| rig.byte(at)), [7, 0, 0, 7]);
        assert_eq!([more, more + BLOCK].map(|at| rig.byte(at)), [0, 7]);
        // It is there again when it is used.
        rig.fill(boot + BLOCK);
        assert_eq!(rig.byte(boot + BLOCK), 7);
    }

    #[test]
    fn what_is_not_memory_is_passed_over() {
        let mut rig = Rig::new();
        let (boot, more) = (16 * MIB, rig.growing());
        [boot, more].iter().for_each(|at| rig.fill(*at));
        rig.tell(&[
            (64 * MIB, BLOCK as u32),
            (64 * MIB - BLOCK, 2 * BLOCK as u32),
            (more + 128 * MIB, BLOCK as u32),
            (more + 126 * MIB, 2 * BLOCK as u32),
            (u64::MAX - 4095, 8192),
            (u64::MAX, u32::MAX),
            (boot, 0),
            (boot, 4095),
            (boot + 1, 4096),
        ]);
        assert_eq!([boot, boot + 4095, more].map(|at| rig.byte(at)), [7; 3]);
        rig.tell(&[(more, BLOCK as u32)]);
        assert_eq!(rig.byte(more), 0, "what follows is done");
    }

    #[test]
    fn a_loop_ends_and_a_broken_ring_is_the_end_until_a_reset() {
        let mut rig = Rig::new();
        rig.queue.send_loop(REPORTING, DATA, 0);
        assert_eq!(rig.queue.wait_used(REPORTING), 0);
        rig.queue.break_ring(REPORTING);
        rig.queue.reset();
        rig.activate();
        let boot = 16 * MIB;
        rig.fill(boot);
        rig.tell(&[(boot, BLOCK as u32)]);
        assert_eq!(rig.byte(boot), 0);
    }

    #[test]
    fn a_driver_that_does_not_report_needs_no_queue_for_it() {
        let mut queue = TestQueue::new();
        Balloon.activate(queue.activation(2, 0)).unwrap();
        let missing = Balloon.activate(queue.activation(2, PAGE_REPORTING));
        assert!(matches!(missing, Err(ActivateError::MissingQueue(REPORTING))));
        let mut config = [0xee; 16];
        Balloon.read_config(0, &mut config);
        assert_eq!(config, [0; 16]);
    }
}
