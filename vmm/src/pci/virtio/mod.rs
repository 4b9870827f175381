//! The virtio-pci transport (virtio 1.2, section 4.1), modern devices only.
//!
//! [`common`] is the common configuration structure, what the driver
//! negotiates; [`function`] puts it, the device's own configuration, the
//! notification addresses and MSI-X behind one BAR:
//!
//! ```text
//! 0x0000  common configuration     0x0800  ISR status
//! 0x1000  device configuration     0x2000  notification, 4 bytes per queue
//! 0x3000  MSI-X table              0x3800  MSI-X pending bits
//! ```

pub mod common;
pub mod function;

#[cfg(test)]
mod tests;

/// Size of the BAR.
const BAR_SIZE: u32 = 0x4000;
const COMMON_OFFSET: u64 = 0x0000;
const ISR_OFFSET: u64 = 0x0800;
const DEVICE_OFFSET: u64 = 0x1000;
const NOTIFY_OFFSET: u64 = 0x2000;
const MSIX_TABLE_OFFSET: u64 = 0x3000;
const MSIX_PENDING_OFFSET: u64 = 0x3800;
const BAR_END: u64 = BAR_SIZE as u64;

/// Bytes between the notification addresses of two queues: each has its own, so
/// that KVM tells them apart by address alone.
const NOTIFY_MULTIPLIER: u32 = 4;

/// Most queues a device may have: one vector each and one for configuration
/// changes, as many as the table has room for.
pub const MAX_QUEUES: usize =
    ((MSIX_PENDING_OFFSET - MSIX_TABLE_OFFSET) / crate::pci::msix::ENTRY_SIZE) as usize - 1;

/// "No vector" in the vector registers (4.1.5.1.2).
pub const NO_VECTOR: u16 = 0xffff;
