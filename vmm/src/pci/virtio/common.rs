//! The common configuration structure (virtio 1.2, 4.1.4.3) and the order in
//! which a driver may go through it (3.1.1).

use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicU16, Ordering};

use serde::{Deserialize, Serialize};
use virtio_bindings::virtio_config::VIRTIO_F_VERSION_1;

use super::NO_VECTOR;

/// Device status bits (2.1).
pub mod status {
    /// The driver's feature selection is complete.
    pub const FEATURES_OK: u8 = 8;
    /// The driver drives.
    pub const DRIVER_OK: u8 = 4;
    /// Only a reset helps.
    pub const NEEDS_RESET: u8 = 64;
    /// The driver has given up.
    pub const FAILED: u8 = 128;
}

/// Size of the structure without the optional fields at its end.
pub const SIZE: u32 = 0x38;

/// Registers that only hold a value until the status is written or another
/// register read: everything but the status.
pub const POSTED: [Range<u64>; 2] = [DEVICE_FEATURE_SELECT..DEVICE_STATUS, QUEUE_SELECT..END];

const DEVICE_FEATURE_SELECT: u64 = 0x00;
const DEVICE_FEATURE: u64 = 0x04;
const DRIVER_FEATURE_SELECT: u64 = 0x08;
const DRIVER_FEATURE: u64 = 0x0c;
const CONFIG_VECTOR: u64 = 0x10;
const NUM_QUEUES: u64 = 0x12;
const DEVICE_STATUS: u64 = 0x14;
const CONFIG_GENERATION: u64 = 0x15;
const QUEUE_SELECT: u64 = 0x16;
const QUEUE_SIZE: u64 = 0x18;
const QUEUE_VECTOR: u64 = 0x1a;
const QUEUE_ENABLE: u64 = 0x1c;
const QUEUE_NOTIFY_OFFSET: u64 = 0x1e;
const QUEUE_DESCRIPTORS: u64 = 0x20;
const QUEUE_DRIVER: u64 = 0x28;
const QUEUE_DEVICE: u64 = 0x30;
const END: u64 = SIZE as u64;

/// What the driver says about a queue.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct QueueSetup {
    /// Entries, at most the device's maximum.
    pub size: u16,
    /// In use.
    pub enabled: bool,
    /// Guest address of the descriptor table.
    pub descriptors: u64,
    /// Guest address of the driver area (available ring).
    pub driver: u64,
    /// Guest address of the device area (used ring).
    pub device: u64,
}

/// Everything negotiated, apart from the device's own state.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct TransportState {
    status: u8,
    device_feature_select: u32,
    driver_feature_select: u32,
    driver_features: u64,
    queue_select: u16,
    queues: Vec<QueueSetup>,
    /// Vector for configuration changes, then one per queue.
    vectors: Vec<u16>,
}

/// What a write asks the transport to do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Action {
    /// Nothing more.
    None,
    /// Reset the device.
    Reset,
    /// Start the device.
    Activate,
}

/// The structure's registers.
pub struct CommonConfig {
    offered: u64,
    maximum_sizes: Vec<u16>,
    /// Vectors the function's MSI-X table has.
    vector_count: u16,
    state: TransportState,
    /// The vectors of `state` while it is not saved; interrupts look them up here.
    vectors: Arc<[AtomicU16]>,
    /// The device's own, which it is asked for.
    config_generation: u8,
}

impl CommonConfig {
    /// Registers of a device that offers `features` beside VIRTIO_F_VERSION_1.
    pub fn new(features: u64, queue_sizes: &[u16], vector_count: u16) -> Self {
        let vectors = (0..=queue_sizes.len()).map(|_| AtomicU16::new(NO_VECTOR)).collect();
        Self {
            offered: features | 1 << VIRTIO_F_VERSION_1,
            maximum_sizes: queue_sizes.to_vec(),
            vector_count,
            state: reset_state(queue_sizes),
            vectors,
            config_generation: 0,
        }
    }

    /// Sets what the driver reads next as the device's configuration's generation.
    pub fn set_config_generation(&mut self, generation: u8) {
        self.config_generation = generation;
    }

    /// Back to what the registers were before the driver came.
    pub fn reset(&mut self) {
        self.state = reset_state(&self.maximum_sizes);
        self.vectors.iter().for_each(|v| v.store(NO_VECTOR, Ordering::Relaxed));
    }

    /// What was negotiated.
    pub fn save(&self) -> TransportState {
        let vectors = self.vectors.iter().map(|v| v.load(Ordering::Relaxed)).collect();
        TransportState { vectors, ..self.state.clone() }
    }

    /// Continues from a saved state of a device with as many queues; false where
    /// it is another's.
    pub fn restore(&mut self, state: TransportState) -> bool {
        let sizes = state.queues.iter().zip(&self.maximum_sizes);
        let fits = state.queues.len() == self.maximum_sizes.len()
            && state.vectors.len() == self.vectors.len()
            && sizes.clone().all(|(queue, most)| queue.size.is_power_of_two() && queue.size <= *most)
            && (state.status & status::FEATURES_OK == 0 || self.accepts(state.driver_features));
        if !fits {
            return false;
        }
        for (vector, saved) in self.vectors.iter().zip(&state.vectors) {
            vector.store(*saved, Ordering::Relaxed);
        }
        self.state = state;
        true
    }

    /// Whether the driver drives and has not been told to reset.
    pub fn is_driven(&self) -> bool {
        self.state.status & (status::DRIVER_OK | status::NEEDS_RESET | status::FAILED) == status::DRIVER_OK
    }

    /// Features both sides agreed on.
    pub fn features(&self) -> u64 {
        self.state.driver_features
    }

    /// The queues as the driver set them up.
    pub fn queues(&self) -> &[QueueSetup] {
        &self.state.queues
    }

    /// Vector numbers: configuration changes first, then the queues.
    pub fn vectors(&self) -> Arc<[AtomicU16]> {
        Arc::clone(&self.vectors)
    }

    /// Tells the driver that only a reset helps.
    pub fn set_needs_reset(&mut self) {
        self.state.status |= status::NEEDS_RESET;
    }

    /// Reads a field; anything that is not a whole field reads as 0.
    pub fn read(&self, offset: u64, data: &mut [u8]) {
        let value = self.field(offset, data.len()).to_le_bytes();
        data.fill(0);
        for (to, from) in data.iter_mut().zip(value) {
            *to = from;
        }
    }

    fn field(&self, offset: u64, len: usize) -> u64 {
        let state = &self.state;
        let queue = state.queues.get(usize::from(state.queue_select));
        let vector = |index: usize| self.vectors.get(index).map_or(NO_VECTOR, |v| v.load(Ordering::Relaxed));
        match (offset, len) {
            (DEVICE_FEATURE_SELECT, 4) => state.device_feature_select.into(),
            (DEVICE_FEATURE, 4) => half(self.offered, state.device_feature_select).into(),
            (DRIVER_FEATURE_SELECT, 4) => state.driver_feature_select.into(),
            (DRIVER_FEATURE, 4) => half(state.driver_features, state.driver_feature_select).into(),
            (CONFIG_VECTOR, 2) => vector(0).into(),
            (NUM_QUEUES, 2) => state.queues.len() as u64,
            (DEVICE_STATUS, 1) => state.status.into(),
            (CONFIG_GENERATION, 1) => self.config_generation.into(),
            (QUEUE_SELECT, 2) => state.queue_select.into(),
            (QUEUE_SIZE, 2) => queue.map_or(0, |q| q.size).into(),
            (QUEUE_VECTOR, 2) => vector(usize::from(state.queue_select) + 1).into(),
            (QUEUE_ENABLE, 2) => queue.is_some_and(|q| q.enabled).into(),
            (QUEUE_NOTIFY_OFFSET, 2) => state.queue_select.into(),
            (QUEUE_DESCRIPTORS..END, 4) if offset.is_multiple_of(4) => {
                let address = queue.map_or(0, |q| match offset & !7 {
                    QUEUE_DRIVER => q.driver,
                    QUEUE_DEVICE => q.device,
                    _ => q.descriptors,
                });
                half(address, u32::from(offset & 4 != 0)).into()
            }
            _ => 0,
        }
    }

    /// Writes a field; anything that is not a whole field is ignored.
    pub fn write(&mut self, offset: u64, data: &[u8]) -> Action {
        let mut value = [0; 4];
        let Some(bytes) = value.get_mut(..data.len()) else { return Action::None };
        bytes.copy_from_slice(data);
        let value = u32::from_le_bytes(value);
        let word = value as u16;
        match (offset, data.len()) {
            (DEVICE_FEATURE_SELECT, 4) => self.state.device_feature_select = value,
            (DRIVER_FEATURE_SELECT, 4) => self.state.driver_feature_select = value,
            (DRIVER_FEATURE, 4) if self.state.status & status::FEATURES_OK == 0 => {
                set_half(&mut self.state.driver_features, self.state.driver_feature_select, value);
            }
            (CONFIG_VECTOR, 2) => self.set_vector(0, word),
            (QUEUE_VECTOR, 2) => self.set_vector(usize::from(self.state.queue_select) + 1, word),
            (DEVICE_STATUS, 1) => return self.write_status(value as u8),
            (QUEUE_SELECT, 2) => self.state.queue_select = word,
            (QUEUE_SIZE..END, _) => self.write_queue(offset, data.len(), value),
            _ => {}
        }
        Action::None
    }

    fn accepts(&self, features: u64) -> bool {
        features & !self.offered == 0 && features & (1 << VIRTIO_F_VERSION_1) != 0
    }

    fn write_status(&mut self, value: u8) -> Action {
        if value == 0 {
            return Action::Reset;
        }
        let acceptable = self.accepts(self.state.driver_features);
        let state = &mut self.state;
        let mut added = value & !state.status & !status::NEEDS_RESET;
        if added & status::FEATURES_OK != 0 && !acceptable {
            added &= !status::FEATURES_OK;
        }
        let starts = added & status::DRIVER_OK != 0;
        if starts && (state.status | added) & status::FEATURES_OK == 0 {
            // A driver that skipped the negotiation cannot be served.
            state.status |= status::NEEDS_RESET;
        }
        state.status |= added;
        if starts && self.is_driven() { Action::Activate } else { Action::None }
    }

    fn write_queue(&mut self, offset: u64, len: usize, value: u32) {
        let index = usize::from(self.state.queue_select);
        let driven = self.state.status & status::DRIVER_OK != 0;
        let (Some(queue), Some(&maximum)) = (self.state.queues.get_mut(index), self.maximum_sizes.get(index))
        else {
            return;
        };
        // A queue in use does not change under the device.
        if queue.enabled || driven {
            return;
        }
        match (offset, len) {
            (QUEUE_SIZE, 2) => {
                let size = value as u16;
                if size.is_power_of_two() && size <= maximum {
                    queue.size = size;
                }
            }
            (QUEUE_ENABLE, 2) => queue.enabled = value == 1,
            (QUEUE_DESCRIPTORS..END, 4) if offset.is_multiple_of(4) => {
                let address = match offset & !7 {
                    QUEUE_DRIVER => &mut queue.driver,
                    QUEUE_DEVICE => &mut queue.device,
                    _ => &mut queue.descriptors,
                };
                set_half(address, u32::from(offset & 4 != 0), value);
            }
            _ => {}
        }
    }

    fn set_vector(&mut self, index: usize, vector: u16) {
        if let Some(slot) = self.vectors.get(index) {
            let vector = if vector < self.vector_count { vector } else { NO_VECTOR };
            slot.store(vector, Ordering::Relaxed);
        }
    }
}

fn reset_state(queue_sizes: &[u16]) -> TransportState {
    let queue = |&size: &u16| QueueSetup { size, enabled: false, descriptors: 0, driver: 0, device: 0 };
    TransportState {
        status: 0,
        device_feature_select: 0,
        driver_feature_select: 0,
        driver_features: 0,
        queue_select: 0,
        queues: queue_sizes.iter().map(queue).collect(),
        vectors: Vec::new(),
    }
}

/// 32 bits of a 64-bit register; there is nothing beyond.
fn half(value: u64, select: u32) -> u32 {
    match select {
        0 => value as u32,
        1 => (value >> 32) as u32,
        _ => 0,
    }
}

fn set_half(register: &mut u64, select: u32, value: u32) {
    match select {
        0 => *register = *register & !0xffff_ffff | u64::from(value),
        1 => *register = *register & 0xffff_ffff | u64::from(value) << 32,
        _ => {}
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const OFFERED: u64 = 1 << 28 | 1 << 29 | 0b101;

    fn config() -> CommonConfig {
        CommonConfig::new(OFFERED, &[256, 64], 3)
    }

    fn put(config: &mut CommonConfig, offset: u64, len: usize, value: u32) -> Action {
        config.write(offset, &value.to_le_bytes()[..len])
    }

    fn get(config: &CommonConfig, offset: u64, len: usize) -> u32 {
        let mut data = [0; 4];
        config.read(offset, &mut data[..len]);
        u32::from_le_bytes(data)
    }

    fn accept(config: &mut CommonConfig, features: u64) {
        for select in 0..2 {
            put(config, DRIVER_FEATURE_SELECT, 4, select);
            put(config, DRIVER_FEATURE, 4, half(features, select));
        }
        put(config, DEVICE_STATUS, 1, 3);
        put(config, DEVICE_STATUS, 1, 11);
    }

    /// The order Linux follows: features, queues, DRIVER_OK.
    #[test]
    fn negotiation_ends_in_activation() {
        let mut config = config();
        put(&mut config, DEVICE_FEATURE_SELECT, 4, 1);
        assert_eq!(get(&config, DEVICE_FEATURE, 4), 1, "VIRTIO_F_VERSION_1");
        accept(&mut config, 1 << VIRTIO_F_VERSION_1 | 1 << 29);
        assert_eq!(get(&config, DEVICE_STATUS, 1), 11);
        assert_eq!(get(&config, NUM_QUEUES, 2), 2);
        put(&mut config, QUEUE_SELECT, 2, 1);
        assert_eq!(get(&config, QUEUE_SIZE, 2), 64);
        put(&mut config, QUEUE_SIZE, 2, 32);
        put(&mut config, QUEUE_DRIVER, 4, 0x1000);
        put(&mut config, QUEUE_DRIVER + 4, 4, 1);
        put(&mut config, QUEUE_VECTOR, 2, 2);
        assert_eq!(get(&config, QUEUE_VECTOR, 2), 2);
        put(&mut config, QUEUE_ENABLE, 2, 1);
        assert_eq!(put(&mut config, DEVICE_STATUS, 1, 15), Action::Activate);
        let queue = QueueSetup { size: 32, enabled: true, descriptors: 0, driver: 0x1_0000_1000, device: 0 };
        assert_eq!(config.queues()[1], queue);
        assert_eq!(config.features(), 1 << VIRTIO_F_VERSION_1 | 1 << 29);
        assert_eq!(put(&mut config, DEVICE_STATUS, 1, 15), Action::None, "only once");
        put(&mut config, QUEUE_DRIVER, 4, 0x2000);
        assert_eq!(config.queues()[1], queue, "a queue in use does not change");
        assert_eq!(put(&mut config, DEVICE_STATUS, 1, 0), Action::Reset);
    }

    #[test]
    fn features_not_offered_are_refused() {
        for features in [0, 1 << 29, 1 << VIRTIO_F_VERSION_1 | 1 << 1, u64::MAX] {
            let mut config = config();
            accept(&mut config, features);
            assert_eq!(get(&config, DEVICE_STATUS, 1) as u8 & status::FEATURES_OK, 0, "{features:#x}");
            assert_eq!(put(&mut config, DEVICE_STATUS, 1, 15 & !8), Action::None);
            assert_eq!(get(&config, DEVICE_STATUS, 1) as u8 & status::NEEDS_RESET, status::NEEDS_RESET);
        }
    }

    #[test]
    fn features_are_fixed_once_agreed() {
        let mut config = config();
        accept(&mut config, 1 << VIRTIO_F_VERSION_1);
        put(&mut config, DRIVER_FEATURE_SELECT, 4, 0);
        put(&mut config, DRIVER_FEATURE, 4, u32::MAX);
        assert_eq!(config.features(), 1 << VIRTIO_F_VERSION_1);
    }

    #[test]
    fn wrong_values_change_nothing() {
        let mut config = config();
        for size in [0, 3, 512, 0xffff] {
            put(&mut config, QUEUE_SIZE, 2, size);
            assert_eq!(get(&config, QUEUE_SIZE, 2), 256);
        }
        put(&mut config, QUEUE_VECTOR, 2, 3);
        assert_eq!(get(&config, QUEUE_VECTOR, 2), u32::from(NO_VECTOR));
        put(&mut config, QUEUE_SELECT, 2, 2);
        assert_eq!(get(&config, QUEUE_SIZE, 2), 0, "a queue that does not exist has size 0");
        let before = config.save();
        for offset in 0..0x100 {
            for len in [0, 1, 2, 3, 4, 8] {
                if (offset, len) == (DEVICE_STATUS, 1) || (offset == QUEUE_SELECT && len == 2) {
                    continue;
                }
                config.write(offset, &vec![0; len]);
                config.read(offset, &mut vec![0; len]);
            }
        }
        let after = config.save();
        assert_eq!(after.queues, before.queues);
    }

    #[test]
    fn state_round_trip() {
        let mut first = config();
        accept(&mut first, 1 << VIRTIO_F_VERSION_1 | 0b100);
        put(&mut first, QUEUE_VECTOR, 2, 1);
        put(&mut first, QUEUE_DESCRIPTORS, 4, 0x5000);
        put(&mut first, QUEUE_ENABLE, 2, 1);
        put(&mut first, DEVICE_STATUS, 1, 15);
        let saved = serde_json::to_string(&first.save()).unwrap();
        let mut second = config();
        assert!(second.restore(serde_json::from_str(&saved).unwrap()));
        assert_eq!(second.save(), first.save());
        assert!(second.is_driven());
        assert!(!CommonConfig::new(0, &[1], 2).restore(first.save()));
    }
}
