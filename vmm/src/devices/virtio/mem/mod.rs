//! virtio-mem, memory that is plugged into the running machine (virtio 1.2,
//! section 5.15).
//!
//! The device stands for a region of guest memory behind what the machine
//! started with ([`GuestRam::growing`](crate::memory::GuestRam::growing)). Its
//! owner says how much of it the guest should have; the guest's driver then asks
//! for blocks, or gives blocks back, until that is reached, and decides which.
//! A block that is given back loses its pages on the host. One of the host's huge
//! pages is taken from its pool when it is plugged, so that no access of the
//! guest's can find the pool empty.
//!
//! One queue; every field of a request is the guest's word: addresses are
//! checked against the usable region, a block is plugged or unplugged once, and
//! never more is plugged than was asked for. What keeps a guest that does not
//! ask from using the memory all the same is not this device but KVM, which is
//! not given it before ([`crate::hotplug`]).

mod blocks;
mod device;
mod registers;
mod request;
mod state;
mod worker;

use thiserror::Error;

use super::ring::RingError;

pub use device::{Mem, MemControl};
pub use state::MemState;

/// Device type (section 5.15.1).
pub const DEVICE_TYPE: u32 = virtio_bindings::virtio_ids::VIRTIO_ID_MEM;
/// Requests in flight: Linux has one.
pub const QUEUE_SIZE: u16 = 16;
/// What is plugged and unplugged at once: the smallest piece Linux takes out of
/// its memory (a page block), and a large page of the CPU's.
pub const BLOCK_BYTES: u64 = 2 << 20;

/// Why the device stops serving.
#[derive(Debug, Error)]
pub enum MemError {
    /// The queue cannot be used any more.
    #[error(transparent)]
    Ring(#[from] RingError),
}
