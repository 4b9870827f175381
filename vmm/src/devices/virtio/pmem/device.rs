//! The device as the transport sees it.

use std::ops::Range;

use virtio_bindings::virtio_ring::{VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC};

use super::worker::PmemWorker;
use super::{DEVICE_TYPE, QUEUE_SIZE};
use crate::devices::virtio::ring::Ring;
use crate::devices::virtio::{ActivateError, Activation, VirtioDevice, read_config_bytes};
use crate::jail::Duty;

/// Bytes of `struct virtio_pmem_config` (section 5.19.4).
const CONFIG_BYTES: usize = 16;

/// A file as memory.
#[derive(Debug)]
pub struct Pmem {
    /// Where it is, and how many bytes, whole pages of 2 MiB.
    config: [u8; CONFIG_BYTES],
}

impl Pmem {
    /// A device for what the guest has at `addresses`, not active.
    pub fn new(addresses: Range<u64>) -> Self {
        let mut config = [0; CONFIG_BYTES];
        let (start, size) = config.split_at_mut(CONFIG_BYTES / 2);
        start.copy_from_slice(&addresses.start.to_le_bytes());
        size.copy_from_slice(&addresses.end.saturating_sub(addresses.start).to_le_bytes());
        Self { config }
    }
}

impl VirtioDevice for Pmem {
    fn device_type(&self) -> u32 {
        DEVICE_TYPE
    }

    fn name(&self) -> &str {
        "pmem"
    }

    fn queue_sizes(&self) -> &[u16] {
        &[QUEUE_SIZE]
    }

    fn features(&self) -> u64 {
        1 << VIRTIO_RING_F_EVENT_IDX | 1 << VIRTIO_RING_F_INDIRECT_DESC
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        read_config_bytes(&self.config, offset, data);
    }

    fn duty(&self) -> Duty {
        Duty::Pmem
    }

    fn activate(&mut self, activation: Activation) -> Result<(), ActivateError> {
        let Activation { memory, queues, features, threads, .. } = activation;
        let queue = queues.into_iter().next().flatten().ok_or(ActivateError::MissingQueue(0))?;
        threads.start(PmemWorker { memory, ring: Ring::new(queue, features) }).map_err(ActivateError::Worker)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::devices::virtio::test_queue::{DATA, TestQueue, WRITE};

    const REQUEST: u64 = DATA;
    const RESPONSE: u64 = DATA + 0x1000;

    struct Rig {
        queue: TestQueue,
        device: Pmem,
    }

    impl Rig {
        fn new() -> Self {
            let mut queue = TestQueue::new();
            let mut device = Pmem::new(4 << 30..(4 << 30) + (2 << 20));
            let features = device.features();
            device.activate(queue.activation(1, features)).unwrap();
            Self { queue, device }
        }

        /// What a request is answered, and how many bytes that was.
        fn request(&mut self, bytes: &[u8]) -> (u32, u32) {
            self.queue.write(REQUEST, bytes);
            self.queue.write(RESPONSE, &[0xee; 4]);
            self.queue.send(0, &[(REQUEST, bytes.len() as u32, 0), (RESPONSE, 4, WRITE)]);
            let written = self.queue.wait_used(0);
            (u32::from_le_bytes(self.queue.read(RESPONSE, 4).try_into().unwrap()), written)
        }
    }

    #[test]
    fn the_guest_reads_where_it_is() {
        let device = Pmem::new(4 << 30..(4 << 30) + (6 << 20));
        let mut config = [0xff; 20];
        device.read_config(0, &mut config);
        assert_eq!(config[..8], (4_u64 << 30).to_le_bytes());
        assert_eq!(config[8..16], (6_u64 << 20).to_le_bytes());
        assert_eq!(config[16..], [0; 4]);
        device.read_config(u64::MAX, &mut config);
        assert_eq!(config, [0; 20]);
    }

    #[test]
    fn a_flush_is_answered_and_anything_else_is_an_error() {
        let mut rig = Rig::new();
        assert_eq!(rig.request(&0_u32.to_le_bytes()), (0, 4));
        assert_eq!(rig.request(&[0; 64]), (0, 4));
        for other in [&1_u32.to_le_bytes()[..], &u32::MAX.to_le_bytes(), &[0; 3]] {
            assert_eq!(rig.request(other), (1, 4), "{other:?}");
        }
    }

    #[test]
    fn malformed_chains_are_answered_and_the_next_request_is_served() {
        let mut rig = Rig::new();
        let answers: [&[(u64, u32, u16)]; 4] = [
            &[(REQUEST, 4, 0)],
            &[(u64::MAX, 4, 0), (RESPONSE, 4, WRITE)],
            // The file itself is no place for either.
            &[(4 << 30, 4, 0), (RESPONSE, 4, WRITE)],
            &[(REQUEST, 4, 0), (4 << 30, 4, WRITE)],
        ];
        for chain in answers {
            rig.queue.send(0, chain);
            assert_eq!(rig.queue.wait_used(0), 0, "{chain:?}");
        }
        rig.queue.send(0, &[(REQUEST, 4, 0), (RESPONSE, 2, WRITE)]);
        assert_eq!(rig.queue.wait_used(0), 2);
        assert_eq!(rig.request(&[0; 4]), (0, 4));
    }

    #[test]
    fn a_broken_ring_stops_the_device_until_reset() {
        let mut rig = Rig::new();
        rig.queue.break_ring(0);
        rig.queue.reset();
        let features = rig.device.features();
        rig.device.activate(rig.queue.activation(1, features)).unwrap();
        assert_eq!(rig.request(&[0; 4]), (0, 4));
    }

    #[test]
    fn it_is_no_part_of_a_snapshot() {
        assert_eq!(Rig::new().device.save().unwrap_err().to_string(), "a pmem device cannot be saved");
    }
}
