//! What this sandbox sees of the host's files over virtio-fs: containers' layers
//! and their volumes, one file system each.
//!
//! In both, what the host has mounted is a mount here too, which the kernel makes
//! when somebody walks into it: a file system of its own with its own device
//! number. It has to be unmounted when its container goes, or else the guest
//! keeps what it knows of it, and the host its files open.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    path::{Path, PathBuf},
};

use nix::{
    errno::Errno,
    mount::{MntFlags, MsFlags},
    sys::stat::{major, minor, stat},
};
use rvm_protocol::{
    agent,
    guest::{LAYERS_DIR, VOLUMES_DIR},
};

use crate::{
    error::{Step, StepResult},
    init::mounts::make_dir,
};

/// The most the monitor gives in one answer to READ, and enough for a disk of the host's.
const READ_AHEAD_KIB: u32 = 1024;

/// Mounts both. No `nosuid` or `nodev`: bind mounts of volumes inherit the flags
/// of this mount, and theirs are the spec's to choose.
pub fn mount(layers_tag: &str, volumes_tag: &str) -> StepResult<()> {
    for (tag, target, flags) in
        [(layers_tag, LAYERS_DIR, MsFlags::MS_RDONLY), (volumes_tag, VOLUMES_DIR, MsFlags::empty())]
    {
        make_dir(Path::new(target))?;
        nix::mount::mount(Some(tag), target, Some("virtiofs"), flags, None::<&str>)
            .step(|| format!("mount virtio-fs {tag:?}"))?;
        read_ahead(Path::new(target));
    }
    Ok(())
}

/// Lets the kernel ask for as much at once as one request carries; by itself it
/// stays at 128 KiB. File systems mounted below have it from this one.
pub(super) fn read_ahead(mounted: &Path) {
    let set = || -> std::io::Result<()> {
        let device = stat(mounted)?.st_dev;
        let file = format!("/sys/class/bdi/{}:{}/read_ahead_kb", major(device), minor(device));
        fs::write(file, READ_AHEAD_KIB.to_string())
    };
    if let Err(error) = set() {
        log::warn!("read ahead in {mounted:?}: {error}");
    }
}

/// The layers at `relative`, which has been checked, mounted: OverlayFS takes no
/// place whose mount is still to be made.
pub fn layers(relative: &str) -> StepResult<PathBuf> {
    let path = Path::new(LAYERS_DIR).join(relative);
    // Walking through it, which the last component alone is not, makes it.
    fs::metadata(path.join(".")).step(|| format!("find the image's layers at {path:?}"))?;
    Ok(path)
}

/// The volume at `relative`, which has been checked.
pub fn volume(relative: &str) -> PathBuf {
    Path::new(VOLUMES_DIR).join(relative)
}

/// Which containers use what of the shares.
#[derive(Debug, Default)]
pub struct Users {
    /// By volume, that is, by entry of the volumes' root.
    volumes: BTreeMap<String, BTreeSet<String>>,
    /// Where a container's layers are, or its root among the volumes.
    roots: BTreeMap<String, PathBuf>,
}

impl Users {
    /// Takes note of what `request` asks for.
    pub fn add(&mut self, request: &agent::CreateContainerRequest) {
        let container = &request.container_id;
        let dir = match (request.rootfs.on_volumes, request.rootfs.images.is_empty()) {
            (true, _) => Some(VOLUMES_DIR),
            (false, true) => Some(LAYERS_DIR),
            (false, false) => None,
        };
        self.roots.extend(dir.map(|dir| (container.clone(), Path::new(dir).join(container))));
        let mounts =
            request.mounts.iter().filter(|mount| mount.from_share).map(|mount| mount.source.as_str());
        let blobs = request.rootfs.images.iter().flat_map(|image| &image.blobs);
        let images = blobs.filter_map(|blob| match &blob.place {
            Some(agent::blob::Place::Volume(path)) => Some(path.as_str()),
            _ => None,
        });
        for path in mounts.chain(images) {
            let volume = path.split('/').next().unwrap_or_default();
            self.volumes.entry(volume.to_owned()).or_default().insert(container.clone());
        }
    }

    /// Lets go of a container's layers, of its root among the volumes, and of the volumes that no other one uses.
    /// Returns what is to be unmounted ([`unmount_all`]).
    pub fn release(&mut self, container: &str) -> Vec<PathBuf> {
        let mut gone: Vec<PathBuf> = self.roots.remove(container).into_iter().collect();
        self.volumes.retain(|volume, users| {
            if users.remove(container) && users.is_empty() {
                gone.push(Path::new(VOLUMES_DIR).join(volume));
            }
            !users.is_empty()
        });
        gone
    }
}

/// Unmounts what no container uses any more. To find it is to ask the host, one of whose file systems may not answer.
pub fn unmount_all(targets: &[PathBuf]) {
    targets.iter().for_each(|target| unmount(target));
}

/// Unmounts both.
pub fn release() {
    for dir in [LAYERS_DIR, VOLUMES_DIR] {
        unmount(Path::new(dir));
    }
}

/// With everything below it. Nothing is lost if it stays: all has been written out.
fn unmount(target: &Path) {
    match nix::mount::umount2(target, MntFlags::MNT_DETACH | MntFlags::UMOUNT_NOFOLLOW) {
        // Nothing there, or nobody has walked into it.
        Ok(()) | Err(Errno::ENOENT | Errno::EINVAL) => {}
        Err(errno) => log::warn!("unmount {target:?}: {errno}"),
    }
}
