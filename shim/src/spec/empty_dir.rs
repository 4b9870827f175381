//! `emptyDir` volumes on the host's disk. All containers of a pod share one, each the whole or a `subPath` of it, which
//! kubelet mounts at a place of its own: in the guest they are one file system, so that sockets, locks and mappings are
//! shared as well.

use std::{
    fs::{self, Metadata},
    io,
    os::unix::fs::MetadataExt,
    path::{Component, Path, PathBuf},
};

use nix::sys::statvfs::statvfs;

use crate::mountinfo::MountTable;

/// The directory of kubelet's that holds those of a pod, in `pods/UID/volumes`.
pub(super) const KIND: &str = "kubernetes.io~empty-dir";

/// Where the whole is of what `source` is a part of, and that part's path in it; `None` where `source` is no such part.
pub(super) fn whole(mounts: &MountTable, source: &Path) -> Option<(PathBuf, String)> {
    let source = fs::canonicalize(source).ok()?;
    let (place, path) = find(mounts, &source)?;
    let part = place.join(&path);
    // What is mounted there may be something else by now, or be mounted otherwise.
    let is_same = is_same(fs::symlink_metadata(&part), fs::symlink_metadata(&source))
        && statvfs(&part).ok()?.flags() == statvfs(&source).ok()?.flags();
    is_same.then_some((place, path))
}

fn is_same(one: io::Result<Metadata>, other: io::Result<Metadata>) -> bool {
    let identity = |found: Metadata| (found.dev(), found.ino());
    one.ok().map(identity).is_some_and(|one| other.ok().map(identity) == Some(one))
}

fn find(mounts: &MountTable, source: &Path) -> Option<(PathBuf, String)> {
    let (of, inside) = mounts.holding(source)?;
    let parts: Vec<Component<'_>> = inside.components().collect();
    let at = parts.windows(4).position(|four| {
        let [pods, _, volumes, kind] = four else { return false };
        pods.as_os_str() == "pods" && volumes.as_os_str() == "volumes" && kind.as_os_str() == KIND
    })?;
    // The volume's own name follows.
    let (top, path) = parts.split_at_checked(at + 5)?;
    let (top, path): (PathBuf, PathBuf) = (top.iter().collect(), path.iter().collect());
    if path.as_os_str().is_empty() {
        return None;
    }
    let place = mounts.iter().filter(|mounted| mounted.device == of.device).find_map(|mounted| {
        let place = mounted.place.join(top.strip_prefix(&mounted.root).ok()?);
        let (found, inside) = mounts.holding(&place)?;
        (found.device == of.device && inside == top).then_some(place)
    })?;
    Some((place, path.to_str()?.to_owned()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_part_is_of_its_volume_wherever_it_is_mounted() {
        let table = MountTable::parse(
            "30 1 8:1 / / rw - ext4 /dev/sda1 rw\n\
             31 30 8:2 /data /k rw - ext4 /dev/sda2 rw\n\
             32 31 8:2 /data/pods/p/volumes/kubernetes.io~empty-dir/cache/a/b /k/pods/p/volume-subpaths/cache/one/0 rw - ext4 /dev/sda2 rw\n\
             33 31 8:2 /data/pods/p/volumes/kubernetes.io~csi/claim/a /k/pods/p/volume-subpaths/claim/one/0 rw - ext4 /dev/sda2 rw\n\
             34 30 8:3 /pods/q/volumes/kubernetes.io~empty-dir/cache/a /elsewhere rw - ext4 /dev/sda3 rw\n",
        );
        let of = |path: &str| find(&table, Path::new(path));
        let top = "/k/pods/p/volumes/kubernetes.io~empty-dir/cache";
        let part = |path: &str| Some((PathBuf::from(top), path.to_owned()));
        assert_eq!(of("/k/pods/p/volume-subpaths/cache/one/0"), part("a/b"));
        assert_eq!(of("/k/pods/p/volumes/kubernetes.io~empty-dir/cache/a"), part("a"));
        // The whole, another kind of volume, and one whose whole is nowhere to be seen.
        for other in [top, "/k/pods/p/volume-subpaths/claim/one/0", "/elsewhere", "/k/pods/p", "/"] {
            assert_eq!(of(other), None, "{other}");
        }
    }
}
