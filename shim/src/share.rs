//! What a sandbox's guest sees of the host's files over virtio-fs: two trees.
//!
//! `layers/<id>` is a container's root file system below its own writes: read-only
//! and constant, so that the guest keeps what it has read for good. `volumes/_<n>`
//! is something that containers' specs bind from the host, which may change: one
//! for all of them that have the same ([`volumes`]). `volumes/<id>/rootfs` is the
//! root of a container whose writes go to the host.
//!
//! The trees are skeletons of mount points, tmpfs of their own that the server
//! sees read-only: a guest changes nothing in them, whatever it asks for. The
//! shim makes its mount points through a second, writable mount that is at no
//! place. All of it is in a mount namespace of the monitor's, in which nothing else is.

mod volumes;

use std::{
    collections::BTreeMap,
    fs, io,
    os::fd::AsRawFd,
    path::{Path, PathBuf},
    sync::Arc,
};

use nix::{
    fcntl::{OFlag, openat},
    mount::MsFlags,
    sys::stat::{Mode, mkdirat},
};

use volumes::Volumes;

use crate::{
    ids::Ids,
    image::{Blob, Image, Origin},
    mount::{self, Namespace, Tree},
    rootfs::{self, Access, Layer, RootfsError},
    spec::{Bundle, Volume},
};

/// The share's directory, which is the monitor's root directory: another one than the root of the mount namespace that it
/// is in, as the kernel lets nobody make a user namespace who sees a part of his mounts alone (unshare(2)).
const TOP: &str = "/share";
/// The tree of layers, in the share's directory.
pub const LAYERS: &str = "layers";
/// The tree of volumes, in the share's directory.
pub const VOLUMES: &str = "volumes";

/// Why a container's part of the share cannot be made.
#[derive(Debug, thiserror::Error)]
pub enum ShareError {
    /// The root file system.
    #[error(transparent)]
    Rootfs(#[from] RootfsError),
    /// Something the spec binds from the host.
    #[error("{field}: {}: {source}", path.display())]
    Volume {
        /// The field that asked for it.
        field: String,
        /// The path of the host.
        path: PathBuf,
        /// Why not.
        #[source]
        source: io::Error,
    },
    /// Something no guest could use.
    #[error("{field}: {}: {problem}", path.display())]
    Useless {
        /// The field that asked for it.
        field: String,
        /// The path of the host.
        path: PathBuf,
        /// Why.
        problem: &'static str,
    },
    /// The mount namespace.
    #[error("making the share's mount namespace: {0} (it takes root)")]
    Namespace(#[source] io::Error),
    /// A directory of the share.
    #[error("the share's {}: {source}", path.display())]
    Directory {
        /// The directory.
        path: PathBuf,
        /// Why not.
        #[source]
        source: io::Error,
    },
}

/// The share of one sandbox. Dropping it takes every mount off again.
#[derive(Debug)]
pub struct Share {
    namespace: Arc<Namespace>,
    layers: Skeleton,
    volumes: Volumes,
    /// Where mounts are for a moment.
    stage: PathBuf,
    ids: Ids,
}

impl Share {
    /// Makes it, with nothing in either tree, for a monitor with these `ids`. `stage` is a directory that lasts as long,
    /// and stays as it is.
    pub fn create(stage: &Path, ids: Ids) -> Result<Self, ShareError> {
        let namespace =
            Namespace::create(stage, Path::new(TOP), &[LAYERS, VOLUMES]).map_err(ShareError::Namespace)?;
        let namespace = Arc::new(namespace);
        Ok(Self {
            layers: Skeleton::create(namespace.clone(), LAYERS)?,
            volumes: Volumes::new(Skeleton::create(namespace.clone(), VOLUMES)?),
            namespace,
            stage: stage.to_owned(),
            ids,
        })
    }

    /// Who its files' owners are seen as.
    pub fn ids(&self) -> &Ids {
        &self.ids
    }

    /// The mount namespace that it is in.
    pub fn namespace(&self) -> &Arc<Namespace> {
        &self.namespace
    }

    /// Adds a container: its layers, where it has no images of them, and what its spec binds; of images those that
    /// are to be shared. On an error what was mounted so far stays until [`Share::remove`].
    pub fn add(
        &self,
        bundle: &Bundle,
        layers: &[Layer],
        images: Option<&[Image]>,
    ) -> Result<Added, ShareError> {
        let (root, id) = (&bundle.container.rootfs, &bundle.container.container_id);
        let users = self.ids.users();
        if root.on_volumes {
            let skeleton = self.volumes.skeleton();
            // A mount of its own, which the guest unmounts with the root.
            skeleton.make_mount(id)?;
            let target = skeleton.make_dir(&root.share_path)?;
            let mounts = rootfs::mounts(layers, &bundle.root, Access::Writable, &self.stage, users)?;
            skeleton.attach(&mounts, &target)?;
        } else if images.is_none_or(<[Image]>::is_empty) {
            let target = self.layers.make_dir(&root.share_path)?;
            // No images are an empty root.
            if images.is_none() {
                let mounts = rootfs::mounts(layers, &bundle.root, Access::ReadOnly, &self.stage, users)?;
                self.layers.attach(&mounts, &target)?;
            }
        }
        let mut added = Added::default();
        for image in images.into_iter().flatten().filter(|image| image.shared) {
            for blob in &image.blobs {
                added
                    .files
                    .insert(blob.serial.clone(), self.volumes.add(id, &volume_of(image, blob), users)?);
            }
        }
        for volume in &bundle.volumes {
            added.sources.push((volume.mount, self.volumes.add(id, volume, users)?));
        }
        Ok(added)
    }

    /// Takes a container's mounts off; nothing is left of it in either tree.
    pub fn remove(&self, id: &str) {
        self.layers.remove(id);
        self.volumes.remove(id);
    }
}

/// What the agent finds below the volumes.
#[derive(Debug, Default)]
pub struct Added {
    /// A container's mounts: their numbers, and their sources.
    pub sources: Vec<(usize, String)>,
    /// Files of its images, by their serials.
    pub files: BTreeMap<String, String>,
}

/// A file of an image, which the guest reads only.
fn volume_of(image: &Image, blob: &Blob) -> Volume {
    let field = match image.origin {
        Origin::Maker => "image".to_owned(),
        Origin::Mount(index) => format!("rootfs[{index}]"),
    };
    Volume {
        field,
        mount: usize::MAX,
        source: blob.path.clone(),
        submounts: Vec::new(),
        recursive: false,
        readonly: true,
        readonly_below: false,
        follows_host: false,
        idmap: None,
    }
}

/// A tree of mount points: a tmpfs of its own, mounted read-only.
#[derive(Debug)]
struct Skeleton {
    namespace: Arc<Namespace>,
    /// Its place there.
    dir: PathBuf,
    /// The same file system, writable, at no place. Nothing that is mounted on
    /// the other mount can be reached through it.
    writable: Tree,
}

impl Skeleton {
    /// Makes it at the directory `name` in the share's.
    fn create(namespace: Arc<Namespace>, name: &str) -> Result<Self, ShareError> {
        let dir = Path::new(TOP).join(name);
        let made = namespace.within(|| {
            // Directories and empty files take inodes only.
            mount::mount_fs("tmpfs", "rvm", &dir, MsFlags::empty(), Some("mode=755,size=64k"))?;
            let writable = Tree::of(&dir, false)?;
            mount::make_readonly(&dir)?;
            Ok(writable)
        });
        match made {
            Ok(writable) => Ok(Self { namespace, dir, writable }),
            Err(source) => Err(ShareError::Directory { path: dir, source }),
        }
    }

    /// The path of `name` in the namespace.
    fn path(&self, name: &str) -> PathBuf {
        self.dir.join(name)
    }

    /// Puts mounts to `target`, one on top of the other.
    fn attach(&self, mounts: &[Tree], target: &Path) -> Result<(), ShareError> {
        let all = || mounts.iter().try_for_each(|tree| tree.attach(target));
        let failed = |source| ShareError::Directory { path: target.to_owned(), source };
        self.namespace.within(all).map_err(failed)
    }

    fn made(&self, name: &str, result: nix::Result<()>) -> Result<PathBuf, ShareError> {
        let path = self.path(name);
        match result {
            Ok(()) => Ok(path),
            Err(errno) => Err(ShareError::Directory { path, source: errno.into() }),
        }
    }

    /// Lets what is mounted at `name` be written to, and nothing that is mounted below it.
    fn make_writable(&self, name: &str) -> io::Result<()> {
        self.namespace.within(|| mount::make_writable(&self.path(name)))
    }

    /// Makes a directory to mount on.
    fn make_dir(&self, name: &str) -> Result<PathBuf, ShareError> {
        self.made(name, mkdirat(&self.writable, name, Mode::from_bits_truncate(0o755)))
    }

    /// Makes an empty file to mount on.
    fn make_file(&self, name: &str) -> Result<PathBuf, ShareError> {
        let flags = OFlag::O_CREAT | OFlag::O_EXCL | OFlag::O_WRONLY | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC;
        self.made(name, openat(&self.writable, name, flags, Mode::from_bits_truncate(0o644)).map(drop))
    }

    /// Makes a directory that is a mount of itself, as read-only as the tree.
    fn make_mount(&self, name: &str) -> Result<PathBuf, ShareError> {
        let path = self.make_dir(name)?;
        match self.namespace.within(|| Tree::of(&path, false)?.attach(&path)) {
            Ok(()) => Ok(path),
            Err(source) => Err(ShareError::Directory { path, source }),
        }
    }

    /// Takes off what is mounted at and below `name`, and removes it.
    fn remove(&self, name: &str) {
        let path = self.path(name);
        self.detach(&path);
        let below_writable = format!("/proc/self/fd/{}/{name}", self.writable.as_raw_fd());
        match fs::remove_dir_all(below_writable) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                log::warn!("{} stays: {error}", path.display());
            }
            _ => {}
        }
    }
}

impl Skeleton {
    /// Takes everything off that is mounted at `path`, one on top of the other where the client sent several.
    fn detach(&self, path: &Path) {
        let all = || {
            while mount::detach(path)? {}
            Ok(())
        };
        if let Err(error) = self.namespace.within(all) {
            log::warn!("unmounting {} of a sandbox: {error}", path.display());
        }
    }
}

impl Drop for Skeleton {
    fn drop(&mut self) {
        // With everything below it, whatever the monitor still does; the tmpfs goes with its last mount.
        self.detach(&self.dir);
    }
}

#[cfg(test)]
mod tests {
    use std::sync::OnceLock;

    use super::*;
    use crate::config::{Compat, Writes};

    /// Runs `test` with a directory, in and below which nothing is mounted for anybody else.
    fn apart(test: impl FnOnce(&Path)) {
        let dir = tempfile::tempdir().unwrap();
        test(dir.path());
        let mounts = fs::read_to_string("/proc/self/mountinfo").unwrap();
        assert!(!mounts.contains(dir.path().to_str().unwrap()), "{mounts}");
    }

    /// What the share's directory is from outside.
    fn seen(share: &Share) -> PathBuf {
        format!("/proc/self/fd/{}", share.namespace().top().as_raw_fd()).into()
    }

    fn bundle(dir: &Path, writes: Writes) -> Bundle {
        bundle_of("c1", dir, writes)
    }

    /// A container with a read-write, a read-only and a file volume, in `dir`.
    fn bundle_of(id: &str, dir: &Path, writes: Writes) -> Bundle {
        static SPEC: OnceLock<serde_json::Value> = OnceLock::new();
        let mut spec = SPEC
            .get_or_init(|| {
                serde_json::json!({
                    "ociVersion": "1.0.2",
                    "process": {"args": ["true"], "cwd": "/", "user": {"uid": 0, "gid": 0}},
                    "root": {"path": "root"},
                    "linux": {"namespaces": [{"type": "mount"}, {"type": "network"}, {"type": "pid"}]},
                })
            })
            .clone();
        spec["mounts"] = serde_json::json!([
            {"destination": "/w", "type": "bind", "source": dir.join("w"), "options": ["rbind", "rw"]},
            {"destination": "/r", "type": "bind", "source": dir.join("r"), "options": ["rbind", "ro"]},
            {"destination": "/f", "type": "bind", "source": dir.join("w/file"), "options": ["bind", "rw"]},
        ]);
        for name in ["w", "r", "root"] {
            let _ = fs::create_dir(dir.join(name));
        }
        fs::write(dir.join("w/file"), "content").unwrap();
        let compat = Compat::default();
        let mut bundle = Bundle::parse(dir, id, spec.to_string().as_bytes(), &compat).unwrap();
        bundle.writes = Some(writes);
        bundle.settle_writes(writes, &[]).unwrap();
        bundle
    }

    /// What the server, who sees the trees as anybody does, can do to a place.
    fn refused(place: &Path) -> bool {
        let readonly =
            |result: io::Result<()>| result.is_err_and(|error| error.raw_os_error() == Some(libc::EROFS));
        readonly(fs::create_dir(place.join("made")))
            && readonly(fs::File::create(place.join("made")).map(drop))
            && readonly(std::os::unix::fs::symlink("/etc", place.join("made")))
            && readonly(fs::set_permissions(place, std::os::unix::fs::PermissionsExt::from_mode(0o777)))
    }

    #[test]
    fn nothing_but_what_is_given_can_be_written_to() {
        apart(|dir| {
            let share = Share::create(dir, Ids::Host(String::new())).unwrap();
            let share_dir = seen(&share);
            for _ in 0..2 {
                let sources = share.add(&bundle(dir, Writes::Guest), &[], None).unwrap().sources;
                let volumes = share_dir.join("volumes");
                let [w, r, f] = [0, 1, 2].map(|n| {
                    assert_eq!(sources[n].0, n);
                    volumes.join(&sources[n].1)
                });
                for sealed in [&share_dir.join("layers"), &share_dir.join("layers/c1"), &volumes, &r] {
                    assert!(refused(sealed), "{sealed:?}");
                }
                assert!(refused(f.parent().unwrap()));
                fs::write(w.join("new"), "new").unwrap();
                assert_eq!(fs::read_to_string(&f).unwrap(), "content");
                fs::write(&f, "changed").unwrap();
                assert_eq!(fs::read_to_string(dir.join("w/file")).unwrap(), "changed");
                share.remove("c1");
                for tree in ["layers", "volumes"] {
                    assert_eq!(fs::read_dir(share_dir.join(tree)).unwrap().count(), 0, "{tree}");
                }
            }
            share.add(&bundle(dir, Writes::Host), &[], None).unwrap();
            fs::write(share_dir.join("volumes/c1/rootfs/new"), "new").unwrap();
            assert!(dir.join("root/new").exists());
            let mounts = fs::read_to_string("/proc/self/mountinfo").unwrap();
            assert!(!mounts.contains(dir.to_str().unwrap()), "{mounts}");
            drop(share);
            // Nothing of the host's went with it.
            assert!(dir.join("w/new").exists() && dir.join("root/new").exists());
        });
    }

    #[test]
    fn what_is_the_same_is_one_volume_as_long_as_anybody_has_it() {
        apart(|dir| {
            let share = Share::create(dir, Ids::Host(String::new())).unwrap();
            let share_dir = seen(&share);
            let volumes = share_dir.join("volumes");
            let add = |id: &str, edit: &dyn Fn(&mut Bundle)| {
                let mut bundle = bundle_of(id, dir, Writes::Guest);
                edit(&mut bundle);
                share.add(&bundle, &[], None).unwrap().sources
            };
            let first = add("c1", &|_| ());
            assert_eq!(add("c2", &|_| ()), first);
            // Written to as soon as one may, and no sooner.
            let readonly = volumes.join(&first[1].1);
            assert!(refused(&readonly));
            assert_eq!(add("c3", &|bundle| bundle.volumes[1].readonly = false), first);
            fs::write(readonly.join("new"), "new").unwrap();
            let apart = add("c4", &|bundle| {
                bundle.volumes[0].recursive = false;
                bundle.volumes[1].readonly_below = true;
            });
            assert!(apart[0] != first[0] && apart[1] != first[1] && apart[2] == first[2]);
            let count = || fs::read_dir(&volumes).unwrap().count();
            assert_eq!(count(), 5);
            for (id, left) in [("c1", 5), ("c3", 5), ("c4", 3), ("c2", 0)] {
                share.remove(id);
                assert_eq!(count(), left, "without {id}");
            }
            assert_ne!(add("c1", &|_| ()), first, "no name is used twice");
        });
    }
}
