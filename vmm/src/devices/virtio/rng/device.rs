//! The entropy device as the transport sees it.

use serde_json::Value;
use virtio_bindings::virtio_ring::{VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC};

use super::worker::RngWorker;
use super::{DEVICE_TYPE, QUEUE_SIZE, RngState};
use crate::devices::virtio::ring::Ring;
use crate::devices::virtio::{ActivateError, Activation, StateError, VirtioDevice};

/// The entropy device.
#[derive(Debug, Default)]
pub struct Rng;

impl Rng {
    /// A device, not active.
    pub fn new() -> Self {
        Self
    }
}

impl VirtioDevice for Rng {
    fn device_type(&self) -> u32 {
        DEVICE_TYPE
    }

    fn name(&self) -> &str {
        "rng"
    }

    fn queue_sizes(&self) -> &[u16] {
        &[QUEUE_SIZE]
    }

    fn features(&self) -> u64 {
        1 << VIRTIO_RING_F_EVENT_IDX | 1 << VIRTIO_RING_F_INDIRECT_DESC
    }

    fn save(&self) -> Result<Value, StateError> {
        Ok(serde_json::to_value(RngState {})?)
    }

    fn restore(&mut self, state: Value) -> Result<(), StateError> {
        let RngState {} = serde_json::from_value(state)?;
        Ok(())
    }

    /// The device has no configuration space.
    fn read_config(&self, _offset: u64, data: &mut [u8]) {
        data.fill(0);
    }

    fn activate(&mut self, activation: Activation) -> Result<(), ActivateError> {
        let Activation { memory, queues, features, threads, .. } = activation;
        let queue = queues.into_iter().next().flatten().ok_or(ActivateError::MissingQueue(0))?;
        let worker = RngWorker::new(memory, Ring::new(queue, features));
        threads.start(worker).map_err(ActivateError::Worker)
    }
}
