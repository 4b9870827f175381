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
//!
//! ```text
//!   rx ring <- muxer <- connection <- readv    Unix socket
//!   tx ring -> muxer -> connection -> sendmsg  Unix socket
//!                            \-> backlog, where the host does not read
//! ```
//!
//! Ends are passed on as they come, each direction by itself: `shutdown(2)` on
//! one side is SHUTDOWN on the other, and only after everything sent before it.
//!
//! Bounds: bytes the guest may have under way per connection
//! ([`WINDOW_BYTES`], which is also the largest backlog), connections
//! ([`MAX_CONNECTIONS`], [`MAX_CONNECTIONS_OF_GUEST`]), refusals waiting for room in the rx ring
//! ([`MAX_REFUSALS`]), the `CONNECT` line ([`MAX_LINE_BYTES`]). A connection
//! whose host side does not read, or whose guest gives no credit, holds up no
//! other. The event queue carries a transport reset to a guest that was restored:
//! its connections were the saved machine's.

mod connection;
mod device;
mod muxer;
mod packet;
mod state;
#[cfg(test)]
mod tests;
mod worker;

use std::io;
use std::path::PathBuf;

use thiserror::Error;

use super::ring::RingError;

pub use device::Vsock;
pub use state::VsockState;

/// Device type (section 5.10.1).
pub const DEVICE_TYPE: u32 = virtio_bindings::virtio_ids::VIRTIO_ID_VSOCK;
/// Sizes of the rx, tx and event queues.
pub const QUEUE_SIZES: [u16; 3] = [256, 256, 16];
/// The host's address (section 5.10.4).
pub const HOST_CID: u64 = 2;
/// Bytes of one connection the guest may send before the host's program has
/// taken them: what Linux grants its peers, too.
pub const WINDOW_BYTES: u32 = 256 << 10;
/// Connections, those being made and those being drained included: up to three for each
/// process of a container, and thousands of these may run.
pub const MAX_CONNECTIONS: usize = 4096;
/// Where there are so many, the guest makes no more: it cannot take all of them,
/// and a program of the host's that does not read costs a backlog for each.
pub const MAX_CONNECTIONS_OF_GUEST: usize = 512;
/// Packets without a connection to the guest that wait for room in the rx
/// ring; beyond it the guest's packets wait, too.
pub const MAX_REFUSALS: usize = 256;
/// Longest line a host program may greet with; `CONNECT 4294967295\n` has 19.
pub const MAX_LINE_BYTES: usize = 32;
/// Guest buffers filled by one read: Linux offers pieces of 4 KiB.
pub const MAX_BURST: usize = 16;
/// Host ports given to connections the host makes: out of the way of ports
/// programs listen on.
pub const HOST_PORTS: std::ops::Range<u32> = 1 << 30..1 << 31;

/// Bytes of `sockaddr_un.sun_path`, without its final NUL.
const SUN_PATH_BYTES: usize = 107;
/// Bytes appended to the socket's path for a host port: `_` and ten digits.
const PORT_SUFFIX_BYTES: usize = 11;

/// Why the device cannot be made, or why it stops serving.
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
    /// A queue cannot be used any more.
    #[error(transparent)]
    Ring(#[from] RingError),
}
