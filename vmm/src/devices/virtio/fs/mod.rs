//! virtio-fs (virtio 1.2, section 5.11): a directory tree of the host, served
//! to the guest as a FUSE file system on the device's own threads.
//!
//! A request is a descriptor chain with a FUSE message and room for the
//! answer; data goes between the file and guest memory with `preadv` and
//! `pwritev`. The server itself is in [`passthrough`].

mod device;
mod message;
mod meter;
mod passthrough;
#[cfg(any(test, feature = "record"))]
mod record;
mod state;
#[cfg(test)]
mod tests;
#[cfg(any(test, feature = "record"))]
mod trace;
mod worker;

use std::io;
use std::path::PathBuf;

use thiserror::Error;

use super::ring::RingError;

pub use device::Fs;
pub use meter::FsMeter;
pub use state::FsState;

/// Device type (section 5.11.1).
pub const DEVICE_TYPE: u32 = virtio_bindings::virtio_ids::VIRTIO_ID_FS;
/// Size of the high-priority queue.
pub const HIPRIO_QUEUE_SIZE: u16 = 256;
/// Size of each queue of requests. The guest sends no more pages at once than fit in it with their
/// headers: [`MAX_IO_BYTES`] are 256.
pub const QUEUE_SIZE: u16 = 512;
/// Bytes of the tag in the configuration space (section 5.11.4).
pub const TAG_BYTES: usize = 36;
/// Request queues, and threads serving them, of one share at most.
pub const MAX_REQUEST_QUEUES: u16 = 4;

/// Bytes of a file moved by one request: what the guest is told at INIT.
const MAX_IO_BYTES: u32 = 1 << 20;

/// Why a share cannot be served, or why its device stops.
#[derive(Debug, Error)]
pub enum FsError {
    /// The configured tag is empty or too long.
    #[error("shares: tag {0:?} must have 1 to {TAG_BYTES} bytes and no NUL")]
    Tag(String),
    /// The directory could not be opened.
    #[error("shares: dir {path:?} cannot be opened as a directory")]
    Open {
        /// The configured path.
        path: PathBuf,
        /// The host's reason.
        #[source]
        source: io::Error,
    },
    /// The server could not be set up.
    #[error("shares: dir {path:?} cannot be served")]
    Serve {
        /// The configured path.
        path: PathBuf,
        /// The host's reason.
        #[source]
        source: io::Error,
    },
    /// The directory cannot be served.
    #[error("shares: the directory cannot be served")]
    Share(#[source] io::Error),
    /// A snapshot was taken with a share of another tag.
    #[error("shares: tag {0:?} is not that of the snapshot, {1:?}")]
    OtherTag(String, String),
    /// A queue cannot be used any more.
    #[error(transparent)]
    Ring(#[from] RingError),
}
