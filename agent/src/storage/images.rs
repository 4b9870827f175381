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
use rvm_protocol::guest::IMAGES_DIR;
use tokio::sync::Mutex;

use super::{block::BlockDevice, share::read_ahead};
use crate::{
    error::{Step, StepResult},
    helper::{self, Outcome},
    init::mounts::make_dir,
    reaper::Reaper,
};

/// The images that are mounted, by their devices' serials, and who has them; held while one is
/// mounted, so that two containers at once do not mount it twice.
#[derive(Debug, Default)]
pub struct Images(Mutex<BTreeMap<String, BTreeSet<String>>>);

/// Where the image on the device with this serial, which has been checked, is mounted.
pub fn path(serial: &str) -> PathBuf {
    Path::new(IMAGES_DIR).join(serial)
}

impl Images {
    /// Mounts the image a container is to have, where no other one has it yet.
    pub async fn mount(&self, serial: &str, container: &str, reaper: &Reaper) -> StepResult<()> {
        let mut images = self.0.lock().await;
        if !images.contains_key(serial) {
            let target = path(serial);
            make_dir(&target)?;
            // In a helper: the disk is the host's, and may be slow.
            let mount = || {
                BlockDevice::find_all([serial])?;
                let device = BlockDevice::with_serial(serial)?;
                nix::mount::mount(
                    Some(&device.path),
                    &target,
                    Some("erofs"),
                    MsFlags::MS_RDONLY,
                    None::<&str>,
                )
                .step(|| format!("mount the image {serial:?}"))?;
                read_ahead(&target);
                Ok(Outcome::default())
            };
            if let Err(error) = helper::run(reaper, "mount an image", mount).await {
                // The error at hand is the one to tell.
                let _ = fs::remove_dir(&target);
                return Err(error);
            }
        }
        images.entry(serial.to_owned()).or_default().insert(container.to_owned());
        Ok(())
    }

    /// Lets go of a container's image, and unmounts it where no other one has it.
    pub async fn release(&self, container: &str) {
        self.0.lock().await.retain(|serial, users| {
            if users.remove(container) && users.is_empty() {
                unmount(&path(serial));
            }
            !users.is_empty()
        });
    }
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
