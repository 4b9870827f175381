//! virtio-vsock in user space (virtio 1.2, section 5.10): stream sockets
//! between the guest and Unix sockets of the host.
//!
//! A host program connects to the configured Unix socket and writes
//! `CONNECT <port>\n`; once the guest has accepted it reads `OK <port>\n`, and
//! the rest is the stream. A connection the guest makes to host port P arrives
//! at the Unix socket `<socket>_P`, which a host program listens on. The socket
//! exists from [`Vsock::new`] on: a program that connects before the guest's
//! driver is up waits, its request kept by the kernel, and is answered as soon
//! as the driver is there and something in the guest listens or does not.

mod device;

use std::io;
use std::path::PathBuf;

use thiserror::Error;

pub use device::Vsock;

/// Device type (section 5.10.1).
pub const DEVICE_TYPE: u32 = virtio_bindings::virtio_ids::VIRTIO_ID_VSOCK;
/// Sizes of the rx, tx and event queues.
pub const QUEUE_SIZES: [u16; 3] = [256, 256, 16];
/// Bytes of `sockaddr_un.sun_path`, without its final NUL.
const SUN_PATH_BYTES: usize = 107;
/// Bytes appended to the socket's path for a host port: `_` and ten digits.
const PORT_SUFFIX_BYTES: usize = 11;

/// Why the device cannot be made.
#[derive(Debug, Error)]
pub enum VsockError {
    /// The configured CID is reserved.
    #[error("vsock: guest_cid {0} must be 3 or more and below 4294967295")]
    Cid(u32),
    /// The socket's path leaves no room for a port.
    #[error(
        "vsock: socket {path:?} must have at most {} bytes",
        SUN_PATH_BYTES - PORT_SUFFIX_BYTES
    )]
    PathTooLong {
        /// The configured path.
        path: PathBuf,
    },
    /// The socket could not be created.
    #[error("vsock: socket {path:?} cannot be created")]
    Bind {
        /// The configured path.
        path: PathBuf,
        /// The host's reason.
        #[source]
        source: io::Error,
    },
}
