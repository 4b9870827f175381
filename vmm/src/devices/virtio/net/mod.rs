//! virtio-net, a network interface (virtio 1.2, section 5.1), on a tap of the host's.
//!
//! ```text
//!   rx ring <- Receiver    <- readv    tap <- tc redirect <- the interface
//!   tx ring -> Transmitter -> writev   tap -> tc redirect -> the interface
//!   control queue -> Control: filter, offloads, address, queues
//! ```
//!
//! Frames go between the tap and guest memory without a copy in the monitor, with the
//! header virtio and Linux share in front: checksums and segments that one side left
//! to the other stay as they are, and the kernel checks what the guest wrote there.
//! Where the shim passes `/dev/vhost-net` ([`vhost`]), the host's kernel moves the
//! frames and the thread here serves the control queue; if that fails at any step,
//! or later, the thread takes over where the kernel left off.
//!
//! Bounds: frames per round ([`BATCH`]), bytes of a frame ([`MAX_FRAME_BYTES`]), the
//! one frame per queue that is kept when the guest's buffers do not suffice for it,
//! addresses of the filter, changes per second the guest may ask of the host's kernel.
//! When the guest offers no buffers, the tap is not looked at until it does: its own
//! queue fills, and the host's kernel drops what comes after.

mod control;
mod device;
mod filter;
mod limit;
mod receive;
mod state;
mod tap;
#[cfg(test)]
mod tests;
mod transmit;
mod vhost;
mod worker;

use std::io;
use std::sync::atomic::{AtomicU64, Ordering};

use rvm_protocol::guest::NET_SLOTS;
use rvm_protocol::vmm::{MAX_QUEUE_PAIRS, NetConfig, NetCounts, TokenBucket};
use thiserror::Error;

use super::ring::RingError;

pub use device::{Net, NetControl};
pub use state::NetState;

/// Device type (section 5.1.1).
pub const DEVICE_TYPE: u32 = virtio_bindings::virtio_ids::VIRTIO_ID_NET;
/// Requests of each queue that moves frames.
pub const QUEUE_SIZE: u16 = 256;
/// Requests of the control queue: Linux has one.
pub const CONTROL_QUEUE_SIZE: u16 = 64;
/// `struct virtio_net_hdr_v1`, in front of each frame (section 5.1.6).
pub const HEADER_BYTES: usize = 12;
/// Largest frame: the largest IP packet, behind an Ethernet header with two VLAN tags.
pub const MAX_FRAME_BYTES: usize = 14 + 8 + 65_535;
/// Frames moved in one direction before other events are looked at.
pub const BATCH: usize = 256;
/// Smallest MTU a device may tell (section 5.1.4.1).
const MIN_MTU: u16 = 68;

/// Why an interface cannot be made, or why its device stops serving.
#[derive(Debug, Error)]
pub enum NetError {
    /// A value of its configuration.
    #[error("{field}: {problem}")]
    Value {
        /// The field.
        field: &'static str,
        /// What is wrong, and what would be right.
        problem: String,
    },
    /// A descriptor is not that of a tap, or not of such a tap.
    #[error("taps[{index}]: it cannot be used as a tap's queue")]
    Tap {
        /// Which.
        index: usize,
        /// Why not.
        #[source]
        source: io::Error,
    },
    /// The queue cannot be used any more.
    #[error(transparent)]
    Ring(#[from] RingError),
    /// What is ready cannot be waited for.
    #[error("events cannot be waited for")]
    Events(#[source] io::Error),
}

/// Checks a configuration and how many descriptors came with it.
pub(super) fn check(config: &NetConfig, taps: usize, vhost: usize) -> Result<(), NetError> {
    let wrong = |field, problem: String| Err(NetError::Value { field, problem });
    if !NET_SLOTS.contains(&config.slot) {
        let (first, last) = (NET_SLOTS.start, NET_SLOTS.end - 1);
        return wrong("slot", format!("{} given; must be {first} to {last}", config.slot));
    }
    if config.mac[0] & 1 != 0 || config.mac == [0; 6] {
        return wrong("mac", "must be an interface's own address, neither a group's nor zero".into());
    }
    if config.mtu != 0 && config.mtu < MIN_MTU {
        return wrong("mtu", format!("{} given; must be {MIN_MTU} or more, or 0 for any", config.mtu));
    }
    let pairs = config.queue_pairs;
    if !(1..=MAX_QUEUE_PAIRS).contains(&pairs) {
        return wrong("queue_pairs", format!("{pairs} given; must be 1 to {MAX_QUEUE_PAIRS}"));
    }
    if taps != usize::from(pairs) {
        return wrong("taps", format!("{taps} descriptors; must be as many as queue_pairs, {pairs}"));
    }
    if vhost != 0 && vhost != usize::from(pairs) {
        return wrong(
            "vhost",
            format!("{vhost} descriptors; must be none, or as many as queue_pairs, {pairs}"),
        );
    }
    let fills = |bucket: Option<TokenBucket>| bucket.is_none_or(|b| b.per_second > 0 && b.burst > 0);
    for (field, limit) in [("receive", config.receive), ("transmit", config.transmit)] {
        if limit.is_some_and(|limit| !fills(limit.bytes) || !fills(limit.packets)) {
            return wrong(field, "per_second and burst of a bucket must be 1 or more".into());
        }
    }
    Ok(())
}

/// Counters of one direction.
#[derive(Debug, Default)]
struct Counters {
    frames: AtomicU64,
    bytes: AtomicU64,
    dropped: AtomicU64,
    copied: AtomicU64,
    wakeups: AtomicU64,
    interrupts: AtomicU64,
}

impl Counters {
    fn add(&self, counts: NetCounts) {
        let NetCounts { frames, bytes, dropped, copied, wakeups, interrupts } = counts;
        for (counter, count) in [
            (&self.frames, frames),
            (&self.bytes, bytes),
            (&self.dropped, dropped),
            (&self.copied, copied),
            (&self.wakeups, wakeups),
            (&self.interrupts, interrupts),
        ] {
            if count > 0 {
                counter.fetch_add(count, Ordering::Relaxed);
            }
        }
    }

    fn get(&self) -> NetCounts {
        let of = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        NetCounts {
            frames: of(&self.frames),
            bytes: of(&self.bytes),
            dropped: of(&self.dropped),
            copied: of(&self.copied),
            wakeups: of(&self.wakeups),
            interrupts: of(&self.interrupts),
        }
    }
}
