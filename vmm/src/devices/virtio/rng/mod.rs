//! virtio-rng, the entropy device (virtio 1.2, section 5.4).
//!
//! The guest's kernel has its own generator; it asks this device a few times,
//! early, so that keys made right after boot do not depend on `rdrand` alone.
//! One queue; a request is a device-writable buffer, filled from the host's
//! `getrandom(2)`.

mod device;
mod state;
mod worker;

use thiserror::Error;

use super::ring::RingError;

pub use device::Rng;
pub use state::RngState;

/// Device type (section 5.4.1).
pub const DEVICE_TYPE: u32 = virtio_bindings::virtio_ids::VIRTIO_ID_RNG;
/// Requests in flight: Linux has one.
pub const QUEUE_SIZE: u16 = 16;
/// Bytes given per request, however large its buffer: Linux asks for at most
/// 64 at a time, and a guest must not keep the host's generator busy with one
/// descriptor. A driver handles a short answer (section 5.4.6.1).
pub const MAX_REQUEST_BYTES: usize = 4096;

/// Why the device stops serving.
#[derive(Debug, Error)]
pub enum RngError {
    /// The queue cannot be used any more.
    #[error(transparent)]
    Ring(#[from] RingError),
}
