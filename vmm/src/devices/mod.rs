//! Devices of the machine.

pub mod legacy;
pub mod virtio;
