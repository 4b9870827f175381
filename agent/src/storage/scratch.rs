//! The scratch: the file system that holds containers' writable layers.

use std::{
    fs,
    io::ErrorKind,
    path::{Path, PathBuf},
};

use nix::mount::{MntFlags, MsFlags};
use rvm_protocol::agent::scratch::Backing;

use super::block::BlockDevice;
use crate::{
    error::{Step, StepResult},
    init::mounts::make_dir,
};

/// What was deleted is given back to the host; the host's file is sparse, so its
/// inode tables read as zeroes and need not be written.
const EXT4_OPTIONS: &str = "discard,noinit_itable";

/// What the scratch is made of.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Kind {
    /// Memory; 0 bytes leaves the kernel's default limit.
    Tmpfs { bytes: u64 },
    /// The ext4 file system on the virtio-blk device with this serial.
    Block { serial: String },
}

/// The scratch, mounted when the first container needs it.
#[derive(Debug)]
pub struct Scratch {
    kind: Kind,
    target: PathBuf,
    mounted: bool,
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
    /// A scratch that will be mounted at `target`.
    pub fn new(backing: Option<&Backing>, target: PathBuf) -> Self {
        let kind = match backing {
            Some(Backing::BlockSerial(serial)) => Kind::Block { serial: serial.clone() },
            Some(Backing::TmpfsBytes(bytes)) => Kind::Tmpfs { bytes: *bytes },
            // `Backing` is generated and open to additions.
            Some(_) | None => Kind::Tmpfs { bytes: 0 },
        };
        Self { kind, target, mounted: false }
    }

    /// The writable layer of a container, made if it does not exist.
    pub fn layer(&mut self, container_id: &str) -> StepResult<Layer> {
        self.mount()?;
        let dir = self.target.join(container_id);
        let (upper, work) = (dir.join("upper"), dir.join("work"));
        let fresh = !upper.exists();
        make_dir(&upper)?;
        make_dir(&work)?;
        Ok(Layer { upper, work, fresh })
    }

    /// Number of the block device it is on; none where it is in memory.
    pub fn device(&mut self) -> StepResult<Option<u64>> {
        self.mount()?;
        let device = nix::sys::stat::stat(&self.target).step(|| "inspect the scratch")?.st_dev;
        // Major 0 is that of file systems without a device.
        Ok(Some(device).filter(|device| nix::sys::stat::major(*device) != 0))
    }

    /// Removes a deleted container's layer from memory. A layer on a block
    /// device stays: the device belongs to the container's snapshot on the
    /// host, comes back when the container is started again, and goes with it.
    pub fn release_layer(&self, container_id: &str) -> StepResult<()> {
        match self.kind {
            Kind::Tmpfs { .. } => self.remove_layer(container_id),
            Kind::Block { .. } => Ok(()),
        }
    }

    /// Removes a container's layer, wherever it is.
    pub fn remove_layer(&self, container_id: &str) -> StepResult<()> {
        match fs::remove_dir_all(self.target.join(container_id)) {
            Err(error) if error.kind() != ErrorKind::NotFound => {
                Err(error).step(|| format!("remove the writable layer of {container_id:?}"))
            }
            _ => Ok(()),
        }
    }

    /// Unmounts it, or at least leaves the file system clean.
    pub fn release(&mut self) {
        if !self.mounted {
            return;
        }
        let Err(errno) = nix::mount::umount2(&self.target, MntFlags::empty()) else { return };
        // A process may still hold it; read-only is as good for the journal.
        log::debug!("unmount the scratch: {errno}");
        let read_only = MsFlags::MS_REMOUNT | MsFlags::MS_RDONLY;
        if let Err(errno) =
            nix::mount::mount(None::<&str>, &self.target, None::<&str>, read_only, None::<&str>)
        {
            log::debug!("make the scratch read-only: {errno}");
        }
    }

    fn mount(&mut self) -> StepResult<()> {
        if self.mounted {
            return Ok(());
        }
        make_dir(&self.target)?;
        match &self.kind {
            Kind::Tmpfs { bytes } => {
                let options =
                    if *bytes == 0 { "mode=0700".into() } else { format!("mode=0700,size={bytes}") };
                mount_at(Path::new("scratch"), &self.target, "tmpfs", MsFlags::empty(), &options)?;
            }
            Kind::Block { serial } => {
                let device = BlockDevice::with_serial(serial)?;
                mount_at(&device.path, &self.target, "ext4", MsFlags::MS_NOATIME, EXT4_OPTIONS)?;
            }
        }
        self.mounted = true;
        Ok(())
    }
}

fn mount_at(source: &Path, target: &Path, fs_type: &str, flags: MsFlags, options: &str) -> StepResult<()> {
    nix::mount::mount(Some(source), target, Some(fs_type), flags, Some(options))
        .step(|| format!("mount the scratch, {fs_type} on {source:?}"))
}
