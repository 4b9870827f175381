//! The container's root file system: the image's layers below, the container's
//! own changes above, and nothing else in sight.

use std::{
    fs,
    os::{
        fd::AsFd,
        unix::fs::{MetadataExt, chown},
    },
    path::{Path, PathBuf},
};

use nix::{
    errno::Errno,
    fcntl::AT_FDCWD,
    mount::{MntFlags, MsFlags, mount, umount2},
    sys::{
        stat::{SFlag, UtimensatFlags, fstat, makedev, utimensat},
        time::TimeSpec,
    },
    unistd::{fchdir, pivot_root},
};
use rvm_protocol::{
    agent::{self, blob::Place},
    guest::IMAGES_DIR,
};

use super::paths::{Root, kind};
use crate::{
    error::{Error, Step, StepResult, check_relative},
    init::mounts::MOUNT_POINT,
    storage::{Layer, Scratch, images, share},
    sys::{
        mount::{Attributes, FsContext, attach, clone_tree, open_path, set_attributes},
        pci,
    },
};

/// A root file system to be mounted.
#[derive(Debug)]
pub struct Rootfs {
    base: Base,
    readonly: bool,
    /// Propagation, and whether of the mounts below too.
    propagation: (u64, bool),
    masked: Vec<String>,
    readonly_paths: Vec<String>,
}

#[derive(Debug)]
enum Base {
    /// The image's layers, and what differs from them in the guest.
    Layers { lower: Lower, layer: Layer },
    /// A root of the host's, written to as it is.
    Volume(PathBuf),
}

/// Bytes for the paths of layers: all options of mount(2) fit into a page.
const ROOM_FOR_LOWER: usize = 3 << 10;

/// The image's layers, read-only.
#[derive(Debug)]
enum Lower {
    /// Merged, in the share.
    Shared(PathBuf),
    /// File systems of this guest's, topmost first, by their names.
    Images(Vec<String>),
}

/// Checks the part of a request that describes the root file system.
pub fn check(request: &agent::CreateContainerRequest) -> Result<(), Error> {
    check_relative("rootfs.share_path", &request.rootfs.share_path)?;
    check_images(&request.rootfs)?;
    if request.rootfs.on_volumes && !request.rootfs.images.is_empty() {
        return Err(Error::invalid("rootfs.images", "are of a root that is not on volumes"));
    }
    // These end a path in OverlayFS's mount options.
    if request.rootfs.share_path.contains([':', ',', '\\']) {
        return Err(Error::invalid("rootfs.share_path", "must not contain ':', ',' or '\\'"));
    }
    propagation(&request.rootfs.propagation)?;
    for (field, paths) in
        [("masked_paths", &request.masked_paths), ("readonly_paths", &request.readonly_paths)]
    {
        for (index, path) in paths.iter().enumerate() {
            if !path.starts_with('/') || path.contains('\0') {
                return Err(Error::invalid(
                    format!("{field}[{index}]"),
                    format!("{path:?} must be absolute"),
                ));
            }
        }
    }
    Ok(())
}

/// Checks what is said of images: their names are those of the places where they are mounted, and where they
/// are ends up in a mount's options.
pub fn check_images(rootfs: &agent::Rootfs) -> Result<(), Error> {
    let plain = |byte: u8| byte.is_ascii_lowercase() || byte.is_ascii_digit() || byte == b'-';
    for (index, image) in rootfs.images.iter().enumerate() {
        let wrong = |field: &str, reason: String| {
            Err(Error::invalid(format!("rootfs.images[{index}].{field}"), reason))
        };
        if image.name.is_empty() || !image.name.bytes().all(plain) {
            return wrong("name", format!("{:?}: must be of a-z, 0-9 and '-'", image.name));
        }
        if image.blobs.is_empty() {
            return wrong("blobs", "is empty; an image is in something".into());
        }
        for (number, blob) in image.blobs.iter().enumerate() {
            let field = format!("blobs[{number}]");
            match &blob.place {
                Some(Place::DiskSerial(serial)) if !serial.is_empty() => {}
                Some(Place::PmemSlot(slot)) if *slot < pci::SLOTS => {}
                Some(Place::PmemSlot(slot)) => {
                    return wrong(&field, format!("slot {slot}: must be below {}", pci::SLOTS));
                }
                Some(Place::Volume(path)) => {
                    check_relative(&format!("rootfs.images[{index}].{field}.volume"), path)?;
                    if path.contains([',', '\\']) {
                        return wrong(&field, format!("{path:?} must not contain ',' or '\\'"));
                    }
                }
                // `Place` is generated and open to additions.
                _ => return wrong(&field, "is nowhere".into()),
            }
        }
    }
    Ok(())
}

fn propagation(name: &str) -> Result<(u64, bool), Error> {
    let flag = match name {
        "" => return Ok((0, false)),
        "private" | "rprivate" => MsFlags::MS_PRIVATE,
        "slave" | "rslave" => MsFlags::MS_SLAVE,
        "shared" | "rshared" => MsFlags::MS_SHARED,
        "unbindable" | "runbindable" => MsFlags::MS_UNBINDABLE,
        _ => {
            let reason = format!("{name:?} must be \"private\", \"slave\", \"shared\" or \"unbindable\"");
            return Err(Error::invalid("rootfs.propagation", reason));
        }
    };
    Ok((flag.bits(), name.starts_with('r')))
}

impl Rootfs {
    /// A root file system as asked for by a request that passed [`check`].
    pub fn new(request: &agent::CreateContainerRequest, scratch: &Scratch) -> Result<Self, Error> {
        let path = &request.rootfs.share_path;
        let images = &request.rootfs.images;
        let lower = match images.as_slice() {
            _ if request.rootfs.on_volumes => None,
            [] => Some(Lower::Shared(share::layers(path)?)),
            images => Some(Lower::Images(images.iter().map(|image| image.name.clone()).collect())),
        };
        let base = match lower {
            None => Base::Volume(share::volume(path)),
            Some(lower) => Base::Layers { lower, layer: scratch.layer().clone() },
        };
        Ok(Self {
            base,
            readonly: request.rootfs.readonly,
            propagation: propagation(&request.rootfs.propagation)?,
            masked: request.masked_paths.clone(),
            readonly_paths: request.readonly_paths.clone(),
        })
    }

    /// Mounts it in the current, new mount namespace.
    pub fn mount(&self) -> StepResult<Root> {
        // Nothing mounted from here on reaches the agent.
        let old = open_path(Path::new("/")).step(|| "open the guest's root")?;
        let slave = Attributes { propagation: MsFlags::MS_SLAVE.bits(), ..Attributes::default() };
        set_attributes(old.as_fd(), slave, true).step(|| "detach the mount namespace")?;

        match &self.base {
            Base::Layers { lower, layer } => mount_overlay(lower, layer)?,
            Base::Volume(path) => {
                let step = || format!("mount the root file system {path:?}");
                let tree = clone_tree(AT_FDCWD, path, true).step(step)?;
                attach(tree, open_path(Path::new(MOUNT_POINT)).step(step)?).step(step)?;
            }
        }
        Root::open(Path::new(MOUNT_POINT)).step(|| "open the root file system")
    }

    /// Last changes, after which less can be done to it: masked and read-only
    /// paths, the root's own read-only flag and propagation.
    pub fn protect(&self) -> StepResult<()> {
        let root = Root::open(Path::new("/")).step(|| "open the root file system")?;
        for path in &self.readonly_paths {
            make_readonly(&root, Path::new(path)).step(|| format!("make {path:?} read-only"))?;
        }
        for path in &self.masked {
            mask(&root, Path::new(path)).step(|| format!("mask {path:?}"))?;
        }
        let (propagation, recursive) = self.propagation;
        if propagation != 0 {
            let attributes = Attributes { propagation, ..Attributes::default() };
            set_attributes(root.as_fd(), attributes, recursive)
                .step(|| "set the propagation of the root file system")?;
        }
        if self.readonly {
            set_attributes(root.as_fd(), Attributes::READ_ONLY, false)
                .step(|| "make the root file system read-only")?;
        }
        Ok(())
    }
}

impl Lower {
    /// The directory whose attributes the root has.
    fn top(&self) -> PathBuf {
        match self {
            Self::Shared(path) => path.clone(),
            Self::Images(names) => names.first().map(|name| images::path(name)).unwrap_or_default(),
        }
    }
}

fn mount_overlay(lower: &Lower, layer: &Layer) -> StepResult<()> {
    if layer.fresh {
        copy_attributes(&lower.top(), &layer.upper).step(|| "copy the attributes of the image's root")?;
    }
    let dirs = match lower {
        Lower::Shared(path) => path.display().to_string(),
        Lower::Images(names) => {
            let paths: Vec<String> =
                names.iter().map(|name| images::path(name).display().to_string()).collect();
            match paths.join(":") {
                paths if paths.len() <= ROOM_FOR_LOWER => paths,
                _ => {
                    std::env::set_current_dir(IMAGES_DIR).step(|| format!("enter {IMAGES_DIR}"))?;
                    names.join(":")
                }
            }
        }
    };
    let options =
        format!("lowerdir={dirs},upperdir={},workdir={}", layer.upper.display(), layer.work.display());
    mount(Some("overlay"), MOUNT_POINT, Some("overlay"), MsFlags::empty(), Some(options.as_str()))
        .step(|| format!("mount the root file system ({options})"))
}

/// A second mount of the root file system, on top of the one that was copied
/// from a mount namespace of another user namespace: what is copied is locked
/// where it is.
pub fn mount_again() -> StepResult<Root> {
    let step = || "take over the root file system";
    let place = Path::new(MOUNT_POINT);
    let again = clone_tree(AT_FDCWD, place, false).step(step)?;
    attach(again, open_path(place).step(step)?).step(step)?;
    Root::open(place).step(step)
}

/// Makes `root` the root of this mount namespace and lets go of the old one.
pub fn pivot(root: &Root) -> StepResult<()> {
    let old = open_path(Path::new("/")).step(|| "open the guest's root")?;
    fchdir(root).step(|| "enter the root file system")?;
    // pivot_root(".", ".") puts the old root on top of the new one, from where
    // it is then taken away: no directory for it is needed in the image.
    pivot_root(".", ".").step(|| "pivot_root")?;
    fchdir(&old).step(|| "return to the guest's root")?;
    umount2(".", MntFlags::MNT_DETACH).step(|| "unmount the guest's root")?;
    std::env::set_current_dir("/").step(|| "enter the root file system")
}

/// The root directory of a container has the mode, owner and times of the
/// image's, though OverlayFS takes them from the upper directory.
fn copy_attributes(from: &Path, to: &Path) -> std::io::Result<()> {
    let metadata = fs::metadata(from)?;
    chown(to, Some(metadata.uid()), Some(metadata.gid()))?;
    fs::set_permissions(to, metadata.permissions())?;
    let atime = TimeSpec::new(metadata.atime(), metadata.atime_nsec());
    let mtime = TimeSpec::new(metadata.mtime(), metadata.mtime_nsec());
    utimensat(AT_FDCWD, to, &atime, &mtime, UtimensatFlags::FollowSymlink)?;
    Ok(())
}

/// Paths a kernel or an image does not have need no protection.
fn existing<T>(found: nix::Result<T>) -> nix::Result<Option<T>> {
    match found {
        Ok(found) => Ok(Some(found)),
        Err(Errno::ENOENT | Errno::ENOTDIR) => Ok(None),
        Err(errno) => Err(errno),
    }
}

fn make_readonly(root: &Root, path: &Path) -> nix::Result<()> {
    let Some(target) = existing(root.find(path))? else { return Ok(()) };
    let clone = clone_tree(&target, Path::new(""), true)?;
    set_attributes(clone.as_fd(), Attributes::READ_ONLY, false)?;
    attach(&clone, &target)
}

fn mask(root: &Root, path: &Path) -> nix::Result<()> {
    let Some(target) = existing(root.find(path))? else { return Ok(()) };
    let cover = if kind(&target)? == SFlag::S_IFDIR {
        let tmpfs = FsContext::new("tmpfs")?;
        tmpfs.set("source", Some("tmpfs"))?;
        tmpfs.set("ro", None)?;
        tmpfs.mount(libc::MOUNT_ATTR_RDONLY)?
    } else {
        // One that an image brought instead would mask nothing.
        let null = clone_tree(root, Path::new("dev/null"), false)?;
        let stat = fstat(&null)?;
        if kind(&null)? != SFlag::S_IFCHR || stat.st_rdev != makedev(1, 3) {
            return Err(Errno::ENODEV);
        }
        null
    };
    attach(&cover, &target)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn request(share_path: &str, propagation: &str, masked: &str) -> agent::CreateContainerRequest {
        let rootfs = agent::Rootfs {
            share_path: share_path.into(),
            propagation: propagation.into(),
            ..Default::default()
        };
        agent::CreateContainerRequest {
            rootfs: protobuf::MessageField::some(rootfs),
            masked_paths: vec![masked.into()],
            ..Default::default()
        }
    }

    #[test]
    fn the_request_is_checked_by_field() {
        assert!(check(&request("c1/rootfs", "rslave", "/proc/kcore")).is_ok());
        for (request, expected) in [
            (request("../x", "", "/a"), "rootfs.share_path: \"../x\" must not contain \"..\""),
            (request("a:b", "", "/a"), "rootfs.share_path: must not contain ':', ',' or '\\'"),
            (
                request("a", "sideways", "/a"),
                "rootfs.propagation: \"sideways\" must be \"private\", \"slave\", \"shared\" or \"unbindable\"",
            ),
            (request("a", "", "proc"), "masked_paths[0]: \"proc\" must be absolute"),
        ] {
            assert_eq!(check(&request).unwrap_err().to_string(), expected);
        }
    }

    #[test]
    fn images_are_checked_by_number() {
        let blob = |place| agent::Blob { place, ..Default::default() };
        let image = |name: &str, blobs| agent::Image { name: name.into(), blobs, ..Default::default() };
        let checked = |images| {
            let mut request = request("c1/rootfs", "", "/a");
            request.rootfs.as_mut().unwrap().images = images;
            check(&request)
        };
        let disk = || blob(Some(Place::DiskSerial("img-1".into())));
        assert!(
            checked(vec![image("img-1", vec![disk(), blob(Some(Place::Volume("_1/file".into())))])]).is_ok()
        );
        for (images, expected) in [
            (vec![image("", vec![disk()])], "rootfs.images[0].name: \"\": must be of a-z, 0-9 and '-'"),
            (vec![image("a/b", vec![disk()])], "rootfs.images[0].name: \"a/b\": must be of a-z, 0-9 and '-'"),
            (vec![image("a", vec![])], "rootfs.images[0].blobs: is empty; an image is in something"),
            (
                vec![image("a", vec![disk()]), image("b", vec![blob(None)])],
                "rootfs.images[1].blobs[0]: is nowhere",
            ),
            (
                vec![image("a", vec![disk(), blob(Some(Place::PmemSlot(32)))])],
                "rootfs.images[0].blobs[1]: slot 32: must be below 32",
            ),
            (
                vec![image("a", vec![blob(Some(Place::Volume("../x".into())))])],
                "rootfs.images[0].blobs[0].volume: \"../x\" must not contain \"..\"",
            ),
            (
                vec![image("a", vec![blob(Some(Place::Volume("a,ro".into())))])],
                "rootfs.images[0].blobs[0]: \"a,ro\" must not contain ',' or '\\'",
            ),
        ] {
            assert_eq!(checked(images).unwrap_err().to_string(), expected);
        }
        let mut both = request("c1/rootfs", "", "/a");
        let rootfs = both.rootfs.as_mut().unwrap();
        (rootfs.images, rootfs.on_volumes) = (vec![image("a", vec![disk()])], true);
        assert_eq!(
            check(&both).unwrap_err().to_string(),
            "rootfs.images: are of a root that is not on volumes"
        );
    }

    #[test]
    fn a_fresh_upper_directory_looks_like_the_image_root() {
        let dir = tempfile::tempdir().unwrap();
        let (lower, upper) = (dir.path().join("lower"), dir.path().join("upper"));
        fs::create_dir(&lower).unwrap();
        fs::create_dir(&upper).unwrap();
        fs::set_permissions(&lower, std::os::unix::fs::PermissionsExt::from_mode(0o1751)).unwrap();
        copy_attributes(&lower, &upper).unwrap();
        let (a, b) = (fs::metadata(&lower).unwrap(), fs::metadata(&upper).unwrap());
        assert_eq!((a.mode(), a.mtime(), a.mtime_nsec()), (b.mode(), b.mtime(), b.mtime_nsec()));
    }
}
