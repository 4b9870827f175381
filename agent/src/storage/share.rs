//! The share: the host directory tree this sandbox sees over virtio-fs.

use std::path::Path;

use nix::mount::{MntFlags, MsFlags};

use crate::{
    error::{Step, StepResult},
    init::mounts::make_dir,
};

/// Mounts the share with this tag. No `nosuid` or `nodev`: bind mounts of
/// volumes inherit the flags of this mount, and theirs are the spec's to choose.
pub fn mount(tag: &str, target: &Path) -> StepResult<()> {
    make_dir(target)?;
    nix::mount::mount(Some(tag), target, Some("virtiofs"), MsFlags::empty(), None::<&str>)
        .step(|| format!("mount the virtio-fs share {tag:?}"))
}

/// Unmounts the share.
pub fn release(target: &Path) {
    // Nothing is lost if it stays: everything has been written out.
    if let Err(errno) = nix::mount::umount2(target, MntFlags::MNT_DETACH) {
        log::debug!("unmount the share: {errno}");
    }
}
