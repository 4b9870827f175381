//! virtio-pmem, memory that lasts (virtio 1.2, section 5.19): here a file of the host's that the
//! guest sees as memory it can only read, so that all guests of a host read the same pages of
//! its page cache.
//!
//! The device itself says where that is ([`crate::memory::windows`]), and answers requests to
//! make writes durable, of which there are none: what a guest writes there ends as an access to device
//! memory that belongs to no device.

mod device;
mod worker;

pub use device::Pmem;

/// Device type (section 5.19.1).
pub const DEVICE_TYPE: u32 = virtio_bindings::virtio_ids::VIRTIO_ID_PMEM;
/// Requests in flight.
pub const QUEUE_SIZE: u16 = 16;

/// `VIRTIO_PMEM_REQ_TYPE_FLUSH` (section 5.19.6).
const REQUEST_FLUSH: u32 = 0;
/// `VIRTIO_PMEM_RESP_TYPE_OK`.
const RESPONSE_OK: u32 = 0;
/// `VIRTIO_PMEM_RESP_TYPE_EIO`.
const RESPONSE_EIO: u32 = 1;
