//! virtio-blk, the block device (virtio 1.2, section 5.2).
//!
//! One disk is a raw file or a block device of the host. A queue for each vCPU,
//! up to [`MAX_QUEUES`], and [`THREADS`] threads that each serve all of them: so many
//! requests are with the host at once, and what is written durably (FLUSH is
//! `fdatasync`, so the guest's file system keeps its promises across a crash of the
//! host) or waits for a slow disk holds up no other. Data goes between the file and
//! guest memory with `preadv`/`pwritev`, without a copy in the monitor. Writes are in the
//! host's page cache when answered.
//!
//! Everything in a request is the guest's word: sector arithmetic is checked
//! against the capacity, lengths are whole sectors and at most
//! [`MAX_REQUEST_BYTES`], and a disk configured read-only is opened read-only
//! and refuses writes whatever the driver negotiated.

mod device;
mod disk;
mod request;
mod state;
mod worker;

use std::io;
use std::path::PathBuf;

use thiserror::Error;

use super::ring::RingError;

pub use device::Blk;
pub use state::BlkState;

/// Device type (section 5.2.1).
pub const DEVICE_TYPE: u32 = virtio_bindings::virtio_ids::VIRTIO_ID_BLOCK;
/// Requests in flight.
pub const QUEUE_SIZE: u16 = 256;
/// Queues, at most; one for each vCPU.
pub const MAX_QUEUES: u16 = 4;
/// Requests of a disk that are with the host at once.
pub const THREADS: usize = 4;
/// Unit of all addresses and lengths on the wire (section 5.2.2).
pub const SECTOR_BYTES: u64 = 512;
/// Pieces of data in one request: what fits a chain beside header and status.
pub const SEG_MAX: u32 = QUEUE_SIZE as u32 - 2;
/// Bytes in one piece of data.
pub const SIZE_MAX: u32 = 64 << 10;
/// Bytes one request may move: what a driver that respects [`SEG_MAX`] and
/// [`SIZE_MAX`] can ask for. Bounds the time the device's thread is away.
pub const MAX_REQUEST_BYTES: usize = SEG_MAX as usize * SIZE_MAX as usize;
/// Sectors one discard may name: the host only drops extents, 4 GiB at a time.
pub const MAX_DISCARD_SECTORS: u32 = 8 << 20;
/// Sectors one write-zeroes may name, 32 MiB in one range: a host file system
/// without `fallocate` has them written one by one.
pub const MAX_WRITE_ZEROES_SECTORS: u32 = 64 << 10;
/// Ranges in one discard.
pub const MAX_RANGES: u32 = 32;
/// Length of the serial the guest reads (section 5.2.6, VIRTIO_BLK_T_GET_ID).
pub const SERIAL_BYTES: usize = 20;

/// Why a disk cannot be used, or why its device stops serving.
#[derive(Debug, Error)]
pub enum BlkError {
    /// The configured serial is empty or too long.
    #[error("serial {0:?} must have 1 to {SERIAL_BYTES} bytes of printable ASCII")]
    Serial(String),
    /// The file could not be opened.
    #[error("path {path:?} cannot be opened{}", if *.readonly { "" } else { " for writing" })]
    Open {
        /// The configured path.
        path: PathBuf,
        /// Whether it was opened for reading only.
        readonly: bool,
        /// The host's reason.
        #[source]
        source: io::Error,
    },
    /// The file could not be measured.
    #[error("its size cannot be told")]
    Measure(#[source] io::Error),
    /// It is something else.
    #[error("it must be a regular file or a block device")]
    NotADisk,
    /// Its descriptor is not open for what the guest may do.
    #[error("its descriptor is not open for {0}")]
    Access(&'static str),
    /// Another monitor writes to it.
    #[error("it is in use by another virtual machine")]
    InUse,
    /// There is no room for a single sector.
    #[error("it has {0} bytes; a disk needs at least {SECTOR_BYTES}")]
    TooSmall(u64),
    /// The queue cannot be used any more.
    #[error(transparent)]
    Ring(#[from] RingError),
}
