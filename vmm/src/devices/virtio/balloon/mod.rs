//! virtio-balloon (virtio 1.2, section 5.5), for the one thing of it that costs a guest nothing: it tells which
//! pages it has free (section 5.5.6.7), and the host has them back until they are used again.
//!
//! The balloon itself stays empty: memory comes and goes by virtio-mem
//! ([`mem`](super::mem)), and no guest is pressed for what it uses.
//!
//! A range is the guest's word. What it tells of is inside its own memory or nothing happens, and what
//! it loses by a lie is its own.

mod device;
mod worker;

pub use device::Balloon;

/// Device type (section 5.5.1).
pub const DEVICE_TYPE: u32 = virtio_bindings::virtio_ids::VIRTIO_ID_BALLOON;
/// Buffers in flight: Linux tells of this many ranges at once, each by a descriptor, and does
/// without a device of fewer.
pub const QUEUE_SIZE: u16 = 32;
/// The queue on which free pages are told. The specification numbers it 4 whether or not the others
/// before it are there (section 5.5.2); Linux, like all devices that serve it, counts those that are.
const REPORTING: usize = 2;
