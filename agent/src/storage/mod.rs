//! Where containers' files come from and go to: the shares, and each
//! container's scratch.

mod block;
pub mod scratch;
pub mod share;

pub use block::BlockDevice;
pub use scratch::{Layer, Scratch};
