//! What a snapshot keeps of the device: nothing beyond its presence.

use serde::{Deserialize, Serialize};

/// State of a [`Rng`](super::Rng).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RngState {}
