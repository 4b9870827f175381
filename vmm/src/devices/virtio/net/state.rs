//! What a snapshot keeps of an interface. Frames under way are not part of it.

use serde::{Deserialize, Serialize};

use super::filter::Filter;

/// State of a [`Net`](super::Net).
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct NetState {
    /// The address it was made with.
    pub(super) mac: [u8; 6],
    /// Queue pairs it was made with.
    pub(super) queue_pairs: u8,
    /// MTU it was made with.
    pub(super) mtu: u16,
    /// Whether the link is up.
    pub(super) link: bool,
    /// The driver's filter, with the address it has now.
    pub(super) filter: Filter,
    /// Queue pairs the driver uses.
    pub(super) pairs: u16,
    /// What the driver takes unfinished, as features.
    pub(super) offloads: u64,
}
