//! The directory tree a sandbox's guest sees over virtio-fs.
//!
//! Each container has a directory in it, `<id>/rootfs` with its layers and
//! `<id>/mounts/<n>` with what its spec binds from the host. All of it is mounts
//! in a namespace that only the shim and the monitor are in.

use std::{
    fs, io,
    os::unix::fs::{DirBuilderExt, FileTypeExt},
    path::{Path, PathBuf},
};

use crate::{
    mount,
    rootfs::{self, Layer, RootfsError},
    spec::{Bundle, Volume},
    user_namespace::user_namespace,
};

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
    /// A directory of the share.
    #[error("{}: {source}", path.display())]
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
    dir: PathBuf,
    /// Mount points, in the order they were mounted on.
    mounted: Vec<PathBuf>,
}

impl Share {
    /// Makes the share's directory.
    pub fn create(dir: PathBuf) -> Result<Self, ShareError> {
        make_dir(&dir)?;
        Ok(Self { dir, mounted: Vec::new() })
    }

    /// Adds a container: its layers, and what its spec binds. On an error what
    /// was mounted so far stays until [`Share::remove`].
    pub fn add(&mut self, bundle: &Bundle, layers: &[Layer]) -> Result<(), ShareError> {
        let rootfs = self.dir.join(&bundle.container.rootfs.share_path);
        make_dir(&rootfs)?;
        let mounted = &mut self.mounted;
        rootfs::mount_readonly(layers, &bundle.root, &rootfs, || mounted.push(rootfs.clone()))?;
        for volume in &bundle.volumes {
            self.add_volume(volume)?;
        }
        Ok(())
    }

    fn add_volume(&mut self, volume: &Volume) -> Result<(), ShareError> {
        let failed =
            |source| ShareError::Volume { field: volume.field.clone(), path: volume.source.clone(), source };
        let kind = fs::metadata(&volume.source).map_err(failed)?.file_type();
        let useless = if kind.is_socket() {
            Some("is a socket of the host; only a process of the host could answer on it")
        } else if kind.is_fifo() {
            Some("is a named pipe of the host; no process of the host could be at its other end")
        } else if kind.is_block_device() {
            Some("is a block device of the host; linux.devices gives one to a container")
        } else {
            None
        };
        if let Some(problem) = useless {
            return Err(ShareError::Useless {
                field: volume.field.clone(),
                path: volume.source.clone(),
                problem,
            });
        }
        let target = self.dir.join(&volume.share_path);
        if kind.is_dir() {
            make_dir(&target)?;
        } else {
            make_dir(target.parent().unwrap_or(&self.dir))?;
            fs::File::create_new(&target).map_err(failed)?;
        }
        match &volume.idmap {
            None => mount::bind(&volume.source, &target, volume.recursive),
            Some((map, all)) => user_namespace(map).and_then(|namespace| {
                mount::bind_idmapped(&volume.source, &target, volume.recursive, &namespace, *all)
            }),
        }
        .map_err(failed)?;
        self.mounted.push(target.clone());
        if volume.readonly {
            mount::seal_readonly(&target, volume.recursive)
        } else {
            mount::seal(&target, volume.recursive)
        }
        .map_err(failed)
    }

    /// Takes a container's mounts off and removes its directory.
    pub fn remove(&mut self, id: &str) {
        let dir = self.dir.join(id);
        self.detach(&dir);
        remove_mount_points(&dir);
    }

    fn detach(&mut self, below: &Path) {
        for target in self.mounted.iter().rev().filter(|target| target.starts_with(below)) {
            if let Err(error) = mount::detach(target) {
                log::warn!("unmounting {}: {error}", target.display());
            }
        }
        self.mounted.retain(|target| !target.starts_with(below));
    }
}

impl Drop for Share {
    fn drop(&mut self) {
        let dir = self.dir.clone();
        self.detach(&dir);
        remove_dir(&dir);
    }
}

fn make_dir(path: &Path) -> Result<(), ShareError> {
    fs::DirBuilder::new()
        .recursive(true)
        .mode(0o755)
        .create(path)
        .map_err(|source| ShareError::Directory { path: path.to_owned(), source })
}

/// Removes a container's directory in the share. Only the mount points
/// themselves are removed, and only while they are empty: were a mount still on
/// one, what is below it would be somebody's data.
pub(crate) fn remove_mount_points(container: &Path) {
    let mounts = container.join("mounts");
    for entry in fs::read_dir(&mounts).into_iter().flatten().flatten() {
        remove_mount_point(&entry.path());
    }
    for path in [&mounts, &container.join("rootfs"), container] {
        remove_mount_point(path);
    }
}

fn remove_mount_point(path: &Path) {
    let Ok(found) = fs::symlink_metadata(path) else { return };
    let result = if found.is_dir() {
        fs::remove_dir(path)
    } else if found.is_file() && found.len() == 0 {
        fs::remove_file(path)
    } else {
        Err(io::Error::other("is neither an empty directory nor an empty file"))
    };
    if let Err(error) = result {
        log::warn!("{} stays: {error}", path.display());
    }
}

/// Removes the share's directory with every container's in it.
pub(crate) fn remove_dir(share: &Path) {
    for entry in fs::read_dir(share).into_iter().flatten().flatten() {
        remove_mount_points(&entry.path());
    }
    remove_mount_point(share);
}
