//! The scratch: the file system that holds a container's writable layer.

use std::{
    fs,
    io::ErrorKind,
    path::{Path, PathBuf},
};

use nix::{
    errno::Errno,
    mount::{MntFlags, MsFlags},
};
use rvm_protocol::{
    agent::{self, scratch::Backing},
    guest::SCRATCH_DIR,
};

use super::block::BlockDevice;
use crate::{
    error::{Step, StepResult},
    init::mounts::make_dir,
};

/// What was deleted is given back to the host; the host's file is sparse, so its
/// inode tables read as zeroes and need not be written.
const EXT4_OPTIONS: &str = "discard,noinit_itable";

/// A container's scratch, mounted from before the container is made until it is
/// deleted.
#[derive(Debug)]
pub struct Scratch {
    target: PathBuf,
    /// Number of the block device it is on; none where it is in memory.
    device: Option<u64>,
    layer: Layer,
}

/// A container's writable layer, as OverlayFS wants it.
#[derive(Clone, Debug)]
pub struct Layer {
    /// What differs from the image.
    pub upper: PathBuf,
    /// OverlayFS's own, on the same file system.
    pub work: PathBuf,
    /// Whether `upper` was made just now.
    pub fresh: bool,
}

impl Scratch {
    /// Mounts the scratch of a container.
    pub fn mount(container_id: &str, scratch: &agent::Scratch) -> StepResult<Self> {
        let target = Path::new(SCRATCH_DIR).join(container_id);
        make_dir(&target)?;
        let device = match &scratch.backing {
            Some(Backing::BlockSerial(serial)) => BlockDevice::with_serial(serial).and_then(|device| {
                mount_at(&device.path, &target, "ext4", MsFlags::MS_NOATIME, EXT4_OPTIONS)?;
                Ok(Some(nix::sys::stat::makedev(device.major.into(), device.minor.into())))
            }),
            Some(Backing::TmpfsBytes(bytes)) if *bytes > 0 => {
                mount_tmpfs(&target, &format!("mode=0700,size={bytes}")).map(|()| None)
            }
            // `Backing` is generated and open to additions. 0 bytes leave the
            // kernel's default limit.
            Some(_) | None => mount_tmpfs(&target, "mode=0700").map(|()| None),
        };
        let device = device.inspect_err(|_| drop(fs::remove_dir(&target)))?;
        match Layer::below(&target) {
            Ok(layer) => Ok(Self { target, device, layer }),
            Err(error) => {
                // The error at hand is the one to tell.
                let _ = unmount(&target);
                Err(error)
            }
        }
    }

    /// That of a container whose writes go to the host.
    pub fn none() -> Self {
        let layer = Layer { upper: PathBuf::new(), work: PathBuf::new(), fresh: true };
        Self { target: PathBuf::new(), device: None, layer }
    }

    /// Number of the block device it is on; none where it is in memory.
    pub fn device(&self) -> Option<u64> {
        self.device
    }

    /// The container's writable layer. One that is on a block device comes back
    /// with it: the device belongs to the container's snapshot on the host.
    pub fn layer(&self) -> &Layer {
        &self.layer
    }

    /// Unmounts it, which writes everything out.
    pub fn unmount(&self) -> StepResult<()> {
        unmount(&self.target)
    }

    /// Unmounts it when its container came to nothing, without the layer that
    /// was made for it.
    pub fn discard(&self) -> StepResult<()> {
        // Memory goes as it is unmounted.
        if self.layer.fresh && self.device.is_some() {
            let upper = &self.layer.upper;
            fs::remove_dir_all(upper).step(|| format!("remove the writable layer {upper:?}"))?;
        }
        self.unmount()
    }

    /// Unmounts it, or at least leaves the file system clean.
    pub fn release(&self) {
        let Err(error) = self.unmount() else { return };
        // A process may still hold it; read-only is as good for the journal.
        log::debug!("{error}");
        let read_only = MsFlags::MS_REMOUNT | MsFlags::MS_RDONLY;
        if let Err(errno) =
            nix::mount::mount(None::<&str>, &self.target, None::<&str>, read_only, None::<&str>)
        {
            log::debug!("make the scratch read-only: {errno}");
        }
    }
}

impl Layer {
    /// The one in `dir`, made if it does not exist.
    fn below(dir: &Path) -> StepResult<Self> {
        let (upper, work) = (dir.join("upper"), dir.join("work"));
        let fresh = !upper.exists();
        make_dir(&upper)?;
        make_dir(&work)?;
        Ok(Self { upper, work, fresh })
    }
}

fn unmount(target: &Path) -> StepResult<()> {
    let step = || format!("unmount the scratch {target:?}");
    match nix::mount::umount2(target, MntFlags::empty()) {
        // It was not mounted any more.
        Ok(()) | Err(Errno::EINVAL | Errno::ENOENT) => {}
        Err(errno) => return Err(errno).step(step),
    }
    match fs::remove_dir(target) {
        Err(error) if error.kind() != ErrorKind::NotFound => Err(error).step(step),
        _ => Ok(()),
    }
}

fn mount_tmpfs(target: &Path, options: &str) -> StepResult<()> {
    mount_at(Path::new("scratch"), target, "tmpfs", MsFlags::empty(), options)
}

fn mount_at(source: &Path, target: &Path, fs_type: &str, flags: MsFlags, options: &str) -> StepResult<()> {
    nix::mount::mount(Some(source), target, Some(fs_type), flags, Some(options))
        .step(|| format!("mount the scratch, {fs_type} on {source:?}"))
}
