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
    helper::{self, Outcome},
    init::mounts::make_dir,
    reaper::Reaper,
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
    pub async fn mount(container_id: &str, scratch: &agent::Scratch, reaper: &Reaper) -> StepResult<Self> {
        let target = Path::new(SCRATCH_DIR).join(container_id);
        make_dir(&target)?;
        let mounted = match &scratch.backing {
            Some(Backing::BlockSerial(serial)) => Self::mount_block(&target, serial, reaper).await,
            Some(Backing::TmpfsBytes(bytes)) if *bytes > 0 => {
                Self::mount_tmpfs(&target, &format!("mode=0700,size={bytes}"))
            }
            // `Backing` is generated and open to additions. 0 bytes leave the
            // kernel's default limit.
            Some(_) | None => Self::mount_tmpfs(&target, "mode=0700"),
        };
        mounted.inspect_err(|_| {
            // The error at hand is the one to tell.
            let _ = unmount(&target);
        })
    }

    /// In a helper: the device is the host's, whose disk may be slow, and its
    /// journal may have to be replayed.
    async fn mount_block(target: &Path, serial: &str, reaper: &Reaper) -> StepResult<Self> {
        let mount = || {
            BlockDevice::find_all([serial])?;
            let device = BlockDevice::with_serial(serial)?;
            mount_at(&device.path, target, "ext4", MsFlags::MS_NOATIME, EXT4_OPTIONS)?;
            let layer = Layer::below(target)?;
            Ok(Outcome { flag: layer.fresh, fd: None })
        };
        let fresh = helper::run(reaper, "mount the scratch", mount).await?.flag;
        let device = BlockDevice::with_serial(serial)?;
        let device = nix::sys::stat::makedev(device.major.into(), device.minor.into());
        Ok(Self { target: target.to_owned(), device: Some(device), layer: Layer::at(target, fresh) })
    }

    fn mount_tmpfs(target: &Path, options: &str) -> StepResult<Self> {
        mount_at(Path::new("scratch"), target, "tmpfs", MsFlags::empty(), options)?;
        Ok(Self { target: target.to_owned(), device: None, layer: Layer::below(target)? })
    }

    fn is_none(&self) -> bool {
        self.target.as_os_str().is_empty()
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

    /// Unmounts it, which writes everything out and takes as long as that takes.
    pub async fn unmount(&self, reaper: &Reaper) -> StepResult<()> {
        if self.is_none() {
            return Ok(());
        }
        let unmount = || unmount(&self.target).map(|()| Outcome::default());
        helper::run(reaper, "unmount the scratch", unmount).await.map(drop)
    }

    /// Unmounts it when its container came to nothing, without the layer that
    /// was made for it.
    pub async fn discard(&self, reaper: &Reaper) -> StepResult<()> {
        if self.is_none() {
            return Ok(());
        }
        let discard = || {
            // Memory goes as it is unmounted.
            if self.layer.fresh && self.device.is_some() {
                let upper = &self.layer.upper;
                fs::remove_dir_all(upper).step(|| format!("remove the writable layer {upper:?}"))?;
            }
            unmount(&self.target).map(|()| Outcome::default())
        };
        helper::run(reaper, "discard the scratch", discard).await.map(drop)
    }

    /// Unmounts it, or at least leaves the file system clean, in whatever time
    /// that takes.
    pub fn release(&self) {
        let Err(error) = unmount(&self.target) else { return };
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
        let layer = Self::at(dir, !dir.join("upper").exists());
        make_dir(&layer.upper)?;
        make_dir(&layer.work)?;
        Ok(layer)
    }

    fn at(dir: &Path, fresh: bool) -> Self {
        Self { upper: dir.join("upper"), work: dir.join("work"), fresh }
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

fn mount_at(source: &Path, target: &Path, fs_type: &str, flags: MsFlags, options: &str) -> StepResult<()> {
    nix::mount::mount(Some(source), target, Some(fs_type), flags, Some(options))
        .step(|| format!("mount the scratch, {fs_type} on {source:?}"))
}
