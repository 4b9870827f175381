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
use rvm_protocol::agent;

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
    Layers { lower: PathBuf, layer: Layer },
    /// A root of the host's, written to as it is.
    Volume(PathBuf),
}

/// Checks the part of a request that describes the root file system.
pub fn check(request: &agent::CreateContainerRequest) -> Result<(), Error> {
    check_relative("rootfs.share_path", &request.rootfs.share_path)?;
    if !request.rootfs.image_serial.is_empty() {
        check_image(&request.rootfs)?;
        if request.rootfs.on_volumes {
            return Err(Error::invalid("rootfs.image_serial", "is of a root that is not on volumes"));
        }
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

/// Checks what is said of an image: its serial names the place where it is mounted.
pub fn check_image(rootfs: &agent::Rootfs) -> Result<(), Error> {
    let plain = |byte: u8| byte.is_ascii_lowercase() || byte.is_ascii_digit() || byte == b'-';
    let (serial, slot) = (&rootfs.image_serial, rootfs.image_slot.unwrap_or_default());
    if !serial.bytes().all(plain) {
        return Err(Error::invalid(
            "rootfs.image_serial",
            format!("{serial:?}: must be of a-z, 0-9 and '-'"),
        ));
    }
    if slot >= pci::SLOTS {
        return Err(Error::invalid("rootfs.image_slot", format!("{slot}: must be below {}", pci::SLOTS)));
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
        let base = match (request.rootfs.on_volumes, request.rootfs.image_serial.as_str()) {
            (true, _) => Base::Volume(share::volume(path)),
            (false, "") => Base::Layers { lower: share::layers(path)?, layer: scratch.layer().clone() },
            (false, image) => Base::Layers { lower: images::path(image), layer: scratch.layer().clone() },
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

fn mount_overlay(lower: &Path, layer: &Layer) -> StepResult<()> {
    if layer.fresh {
        copy_attributes(lower, &layer.upper).step(|| "copy the attributes of the image's root")?;
    }
    let options = format!(
        "lowerdir={},upperdir={},workdir={}",
        lower.display(),
        layer.upper.display(),
        layer.work.display()
    );
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
