//! The share: the host directory tree this sandbox sees over virtio-fs.

use std::path::{Path, PathBuf};

use nix::mount::{MntFlags, MsFlags};
use rvm_protocol::guest::SHARE_DIR;

use crate::{
    error::{Step, StepResult},
    init::mounts::make_dir,
};

/// Mounts the share with this tag. No `nosuid` or `nodev`: bind mounts of
/// volumes inherit the flags of this mount, and theirs are the spec's to choose.
pub fn mount(tag: &str) -> StepResult<()> {
    let target = Path::new(SHARE_DIR);
    make_dir(target)?;
    nix::mount::mount(Some(tag), target, Some("virtiofs"), MsFlags::empty(), None::<&str>)
        .step(|| format!("mount the virtio-fs share {tag:?}"))
}

/// A path of the share as the guest sees it; `relative` has been checked.
pub fn path(relative: &str) -> PathBuf {
    Path::new(SHARE_DIR).join(relative)
}

/// Unmounts the share.
pub fn release() {
    // Nothing is lost if it stays: everything has been written out.
    if let Err(errno) = nix::mount::umount2(SHARE_DIR, MntFlags::MNT_DETACH) {
        log::debug!("unmount the share: {errno}");
    }
}
