//! Where containers' files come from and go to: the share and the scratch.

mod block;
mod scratch;
mod share;

use std::path::{Path, PathBuf};

pub use block::BlockDevice;
use rvm_protocol::{agent, guest};
pub use scratch::{Layer, Scratch};

use crate::error::StepResult;

/// The sandbox's storage.
#[derive(Debug)]
pub struct Storage {
    scratch: Scratch,
}

impl Storage {
    /// Mounts the share now and the scratch when first needed.
    pub fn set_up(share_tag: &str, scratch: &agent::Scratch) -> StepResult<Self> {
        share::mount(share_tag, Path::new(guest::SHARE_DIR))?;
        Ok(Self::with_share_in_place(scratch))
    }

    /// Storage whose share is in place already.
    pub fn with_share_in_place(scratch: &agent::Scratch) -> Self {
        Self { scratch: Scratch::new(scratch.backing.as_ref(), PathBuf::from(guest::SCRATCH_DIR)) }
    }

    /// A path of the share as the guest sees it; `relative` has been checked.
    pub fn share_path(&self, relative: &str) -> PathBuf {
        Path::new(guest::SHARE_DIR).join(relative)
    }

    /// The writable layer of a container, made if it does not exist.
    pub fn layer(&mut self, container_id: &str) -> StepResult<Layer> {
        self.scratch.layer(container_id)
    }

    /// Number of the block device the scratch is on; none where it is in memory.
    pub fn scratch_device(&mut self) -> StepResult<Option<u64>> {
        self.scratch.device()
    }

    /// Lets go of a deleted container's writable layer.
    pub fn release_layer(&self, container_id: &str) -> StepResult<()> {
        self.scratch.release_layer(container_id)
    }

    /// Removes the writable layer made for a container that came to nothing.
    pub fn remove_layer(&self, container_id: &str) -> StepResult<()> {
        self.scratch.remove_layer(container_id)
    }

    /// Writes everything out and unmounts.
    pub fn release(&mut self) {
        nix::unistd::sync();
        self.scratch.release();
        share::release(Path::new(guest::SHARE_DIR));
    }
}
