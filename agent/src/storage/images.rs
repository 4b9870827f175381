//! Images of layers: one file system for all containers that have the same.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    path::{Path, PathBuf},
};

use nix::{
    errno::Errno,
    mount::{MntFlags, MsFlags},
};
use rvm_protocol::{agent, guest::IMAGES_DIR};
use tokio::sync::Mutex;

use super::{block::BlockDevice, place, share::read_ahead};
use crate::{
    error::{Step, StepResult},
    helper::{self, Outcome},
    init::mounts::make_dir,
    reaper::Reaper,
};

/// The images that are mounted; held while one is mounted, so that two containers at once do not
/// mount it twice.
#[derive(Debug, Default)]
pub struct Images(Mutex<Mounted>);

#[derive(Debug, Default)]
struct Mounted {
    /// Whether there is a place for them.
    prepared: bool,
    /// Who has which, by its serial.
    users: BTreeMap<String, BTreeSet<String>>,
}

/// Where the image of this serial, which has been checked, is mounted.
pub fn path(serial: &str) -> PathBuf {
    Path::new(IMAGES_DIR).join(serial)
}

impl Images {
    /// Mounts the image a container is to have, where no other one has it yet.
    pub async fn mount(&self, rootfs: &agent::Rootfs, container: &str, reaper: &Reaper) -> StepResult<()> {
        let serial = rootfs.image_serial.as_str();
        let mut images = self.0.lock().await;
        if !images.prepared {
            place(Path::new(IMAGES_DIR))?;
            images.prepared = true;
        }
        if !images.users.contains_key(serial) {
            let target = path(serial);
            make_dir(&target)?;
            // In a helper: the disk is the host's, and may be slow.
            let mount = || {
                match rootfs.image_slot {
                    Some(slot) => mount_memory(&BlockDevice::in_slot(slot)?, &target),
                    None => mount_disk(serial, &target),
                }
                .map(|()| Outcome::default())
            };
            if let Err(error) = helper::run(reaper, "mount an image", mount).await {
                // The error at hand is the one to tell.
                let _ = fs::remove_dir(&target);
                return Err(error);
            }
        }
        images.users.entry(serial.to_owned()).or_default().insert(container.to_owned());
        Ok(())
    }

    /// Lets go of a container's image, and unmounts it where no other one has it.
    pub async fn release(&self, container: &str) {
        self.0.lock().await.users.retain(|serial, users| {
            if users.remove(container) && users.is_empty() {
                unmount(&path(serial));
            }
            !users.is_empty()
        });
    }
}

/// Files are read where they lie (DAX), so the pages of the host's page cache are the only ones.
fn mount_memory(device: &BlockDevice, target: &Path) -> StepResult<()> {
    match mount(device, target, Some("dax=always")) {
        // A kernel that cannot do that has the reason to tell, if that is not why.
        Err(_) => mount(device, target, None),
        done => done,
    }
}

fn mount_disk(serial: &str, target: &Path) -> StepResult<()> {
    BlockDevice::find_all([serial])?;
    mount(&BlockDevice::with_serial(serial)?, target, None)?;
    read_ahead(target);
    Ok(())
}

fn mount(device: &BlockDevice, target: &Path, options: Option<&str>) -> StepResult<()> {
    nix::mount::mount(Some(&device.path), target, Some("erofs"), MsFlags::MS_RDONLY, options)
        .step(|| format!("mount the image {:?}", target.file_name().unwrap_or_default()))
}

/// Whoever still has a file open in it keeps the file system, not the place.
fn unmount(target: &Path) {
    match nix::mount::umount2(target, MntFlags::MNT_DETACH | MntFlags::UMOUNT_NOFOLLOW) {
        Ok(()) | Err(Errno::EINVAL | Errno::ENOENT) => {}
        Err(errno) => log::warn!("unmount {target:?}: {errno}"),
    }
    if let Err(error) = fs::remove_dir(target) {
        log::warn!("remove {target:?}: {error}");
    }
}
