//! Where containers' files come from and go to: the shares, images of layers, and
//! each container's scratch.

use std::{os::fd::AsFd, path::Path};

use nix::{fcntl::AT_FDCWD, mount::MsFlags};
use rvm_protocol::guest::SCRATCH_DIR;

use crate::{
    error::{Step, StepResult},
    init::mounts::make_dir,
    sys::mount::{Attributes, attach, clone_tree, open_path, set_attributes},
};

mod block;
pub mod images;
pub mod scratch;
pub mod share;

pub use block::BlockDevice;
pub use images::Images;
pub use scratch::{Layer, Scratch};

/// Makes the place where scratches are mounted.
pub fn prepare() -> StepResult<()> {
    place(Path::new(SCRATCH_DIR))
}

/// Makes a place where disks are mounted. It is a shared mount: where a
/// container that is being made has a copy of what is mounted here, that goes as
/// soon as it is unmounted here, and the device is free.
fn place(place: &Path) -> StepResult<()> {
    let step = || format!("prepare {place:?}");
    make_dir(place)?;
    let mount = clone_tree(AT_FDCWD, place, false).step(step)?;
    attach(&mount, open_path(place).step(step)?).step(step)?;
    let shared = Attributes { propagation: MsFlags::MS_SHARED.bits(), ..Attributes::default() };
    set_attributes(mount.as_fd(), shared, false).step(step)
}
