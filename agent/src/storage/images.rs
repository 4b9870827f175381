//! Images of layers: one file system for all containers that have the same.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    os::unix::fs::FileTypeExt,
    path::{Path, PathBuf},
};

use nix::{
    errno::Errno,
    mount::{MntFlags, MsFlags},
};
use rvm_protocol::{
    agent::{self, blob::Place},
    guest::IMAGES_DIR,
    loop_device,
};
use tokio::sync::Mutex;

use super::{
    block::BlockDevice,
    place,
    share::{read_ahead, volume},
};
use crate::{
    error::{Error, Step, StepError, StepResult},
    helper::{self, Outcome},
    init::mounts::make_dir,
    reaper::Reaper,
    sys::device_mapper,
};

/// The images that are mounted; held while one is mounted, so that two containers at once do not
/// mount it twice.
#[derive(Debug, Default)]
pub struct Images(Mutex<Mounted>);

#[derive(Debug, Default)]
struct Mounted {
    /// Whether there is a place for them.
    prepared: bool,
    /// Who has which, by its name.
    users: BTreeMap<String, BTreeSet<String>>,
}

/// Where the image of this name, which has been checked, is mounted.
pub fn path(name: &str) -> PathBuf {
    Path::new(IMAGES_DIR).join(name)
}

impl Images {
    /// Mounts the images a container is to have, where no other one has them yet. What was mounted so far
    /// when one of them fails goes by [`Images::release`].
    pub async fn mount(&self, all: &[agent::Image], container: &str, reaper: &Reaper) -> Result<(), Error> {
        if all.is_empty() {
            return Ok(());
        }
        let mut images = self.0.lock().await;
        if !images.prepared {
            place(Path::new(IMAGES_DIR))?;
            images.prepared = true;
        }
        for image in all {
            let name = &image.name;
            if !images.users.contains_key(name) {
                let target = path(name);
                make_dir(&target)?;
                // In a helper: what it is in is the host's, and may be slow.
                let mount = || mount_at(image, &target).map(|()| Outcome::default());
                if let Err(error) = helper::run(reaper, "mount an image", mount).await {
                    // The error at hand is the one to tell.
                    let _ = fs::remove_dir(&target);
                    return Err(match is_of_the_image(&error, image) {
                        true => Error::Image(error),
                        false => error.into(),
                    });
                }
            }
            images.users.entry(name.clone()).or_default().insert(container.to_owned());
        }
        Ok(())
    }

    /// Lets go of a container's images, and unmounts those that no other one has.
    pub async fn release(&self, container: &str) {
        self.0.lock().await.users.retain(|name, users| {
            if users.remove(container) && users.is_empty() {
                unmount(&path(name));
            }
            !users.is_empty()
        });
    }
}

/// Whether the image is to blame, and not what this guest has too little of, or does not know. One that is checked as it is read fails
/// in many ways.
fn is_of_the_image(error: &StepError, image: &agent::Image) -> bool {
    match error {
        StepError::Kernel { errno: Errno::ENOMEM, .. } => false,
        StepError::Kernel {
            errno: Errno::EINVAL | Errno::EUCLEAN | Errno::EOPNOTSUPP | Errno::EBADMSG,
            ..
        } => true,
        StepError::Kernel { .. } | StepError::Refused(_) => image.verity.is_some(),
    }
}

fn mount_at(image: &agent::Image, target: &Path) -> StepResult<()> {
    let serials = image.blobs.iter().filter_map(|blob| match &blob.place {
        Some(Place::DiskSerial(serial)) => Some(serial.as_str()),
        _ => None,
    });
    BlockDevice::find_all(serials)?;
    let paths = image.blobs.iter().map(file).collect::<StepResult<Vec<_>>>()?;
    let devices = paths.iter().skip(1).map(|path| format!("device={}", path.display()));
    let options = devices.collect::<Vec<_>>().join(",");
    let is_memory = |blob: &agent::Blob| matches!(blob.place, Some(Place::PmemSlot(_)));
    let source = paths.first().ok_or_else(|| StepError::Refused("an image is in nothing".into()))?;
    let checked = image.verity.as_ref().map(|verity| checked(&image.name, source, verity)).transpose()?;
    // Files are read where they lie (DAX), so the pages of the host's page cache are the only ones; what is checked is a copy.
    if checked.is_none() && image.blobs.iter().all(is_memory) {
        let dax = ["dax=always", options.as_str()].join(",");
        // A kernel that cannot do that has the reason to tell, if that is not why.
        return mount(source, target, dax.trim_end_matches(',')).or_else(|_| mount(source, target, &options));
    }
    // Open until it is mounted.
    let source = checked.as_ref().map_or(source, |(_open, path)| path);
    mount(source, target, &options)?;
    read_ahead(target);
    Ok(())
}

/// The device that checks what is read of the one at `source`, or of the file (dm-verity).
fn checked(name: &str, source: &Path, verity: &agent::Verity) -> StepResult<(fs::File, PathBuf)> {
    let step = || format!("check the image {name:?} by its root hash {:?}", verity.root_hash);
    if !device_mapper::is_there() {
        return Err(StepError::Refused(format!(
            "{}: this kernel has no device mapper (CONFIG_DM_VERITY)",
            step()
        )));
    }
    // In the share it is a file.
    let is_device = fs::metadata(source).step(step)?.file_type().is_block_device();
    let (_open, device) = match is_device {
        true => (None, source.to_owned()),
        false => {
            let (open, path) =
                fs::File::open(source).and_then(|file| loop_device::readonly(&file)).step(step)?;
            (Some(open), PathBuf::from(path))
        }
    };
    let agent::Verity { format, data_block_bytes, hash_block_bytes, data_blocks, hash_start, .. } = verity;
    let salt = if verity.salt.is_empty() { "-" } else { &verity.salt };
    let parameters = format!(
        "{format} {0} {0} {data_block_bytes} {hash_block_bytes} {data_blocks} {hash_start} {1} {2} {salt}",
        device.display(),
        verity.algorithm,
        verity.root_hash,
    );
    let sectors = data_blocks.saturating_mul((*data_block_bytes).into()) / 512;
    // One that was unmounted may still be open; this is a process of its own, whose number others have not.
    let device_name = format!("{name}-{}", std::process::id());
    device_mapper::device(&device_name, "verity", &parameters, sectors).step(step)
}

/// Where it is in this guest.
fn file(blob: &agent::Blob) -> StepResult<PathBuf> {
    match &blob.place {
        Some(Place::DiskSerial(serial)) => BlockDevice::with_serial(serial).map(|device| device.path),
        Some(Place::PmemSlot(slot)) => BlockDevice::in_slot(*slot).map(|device| device.path),
        Some(Place::Volume(path)) => Ok(volume(path)),
        // Checked before; `Place` is generated and open to additions.
        _ => Err(StepError::Refused("an image is nowhere".into())),
    }
}

fn mount(source: &Path, target: &Path, options: &str) -> StepResult<()> {
    nix::mount::mount(Some(source), target, Some("erofs"), MsFlags::MS_RDONLY, Some(options))
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
