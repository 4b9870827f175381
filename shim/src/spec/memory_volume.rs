//! Memory volumes of pods, which kubelet makes for `emptyDir: {medium: Memory}`: a tmpfs of the host, or for `HugePages`
//! a hugetlbfs, known by the place it is mounted at. What a pod's containers share needs none of the host's memory, nor its answers: the guest
//! has one of its own, of the same size and owner.

use std::{
    fs::{self, Metadata},
    os::unix::fs::{MetadataExt, PermissionsExt},
    path::{Path, PathBuf},
};

use nix::sys::statfs::{HUGETLBFS_MAGIC, TMPFS_MAGIC, statfs};
use rvm_protocol::agent::{FileOwner, MemoryVolume};

use super::empty_dir::KIND;
use crate::{huge_pages, mountinfo::MountTable, user_namespace::IdMap};

/// How many directories of one are looked at, and how deep: kubelet has made one for each `subPath`.
const MOST: usize = 64;
const DEEPEST: u32 = 8;

/// What `source` is of a memory volume, and that one's name; `None` where it is of none, or where the host has put
/// files into it. Its owners are as `idmap` has them seen: in the guest nobody else sees it.
pub(super) fn at(
    mounts: &MountTable,
    source: &Path,
    idmap: Option<&IdMap>,
) -> Option<(String, MemoryVolume)> {
    let size = statfs(source).ok()?;
    let huge_pages = match size.filesystem_type() {
        TMPFS_MAGIC => false,
        HUGETLBFS_MAGIC if u64::try_from(size.block_size()).ok()? == huge_pages::BYTES => true,
        _ => return None,
    };
    let source = fs::canonicalize(source).ok().filter(|source| source.is_dir())?;
    let (top, device, path) = find(mounts, &source)?;
    if !has_only_directories(&top, 0, &mut 0) {
        return None;
    }
    let volume = MemoryVolume {
        bytes: size.blocks().saturating_mul(u64::try_from(size.block_size()).ok()?),
        top: Some(owner(&top.metadata().ok()?, idmap)?).into(),
        path,
        huge_pages,
        owner: Some(owner(&source.metadata().ok()?, idmap)?).into(),
        ..Default::default()
    };
    Some((device.replace(':', "-"), volume))
}

/// Where the volume that `source` is of is mounted, its device, and where in it that is.
fn find(mounts: &MountTable, source: &Path) -> Option<(PathBuf, String, String)> {
    let (of, path) = mounts.holding(source)?;
    let top = mounts.iter().find(|mounted| {
        mounted.device == of.device
            && mounted.root == Path::new("/")
            && mounted.place.parent().and_then(Path::file_name).is_some_and(|name| name == KIND)
    })?;
    let path = path.strip_prefix("/").ok()?.to_str()?.to_owned();
    Some((top.place.clone(), of.device.clone(), path))
}

fn has_only_directories(dir: &Path, depth: u32, seen: &mut usize) -> bool {
    let Ok(entries) = fs::read_dir(dir) else { return false };
    entries.into_iter().all(|entry| {
        *seen += 1;
        let Ok(entry) = entry else { return false };
        *seen <= MOST
            && depth < DEEPEST
            && entry.file_type().is_ok_and(|kind| kind.is_dir())
            && has_only_directories(&entry.path(), depth + 1, seen)
    })
}

fn owner(found: &Metadata, idmap: Option<&IdMap>) -> Option<FileOwner> {
    let (uid, gid) = match idmap {
        None => (found.uid(), found.gid()),
        Some(idmap) => idmap.outside(found.uid(), found.gid())?,
    };
    Some(FileOwner { mode: found.permissions().mode() & 0o7777, uid, gid, ..Default::default() })
}

#[cfg(test)]
mod tests {
    use super::*;

    const TABLE: &str = "\
        30 1 8:1 / / rw - ext4 /dev/sda1 rw\n\
        31 30 0:40 / /k/pods/p/volumes/kubernetes.io~empty-dir/cache rw - tmpfs tmpfs rw\n\
        32 30 0:40 /a/b /k/pods/p/volume-subpaths/cache/one/0 rw - tmpfs tmpfs rw\n\
        33 30 0:41 / /k/pods/p/volumes/kubernetes.io~secret/token rw - tmpfs tmpfs rw\n\
        34 30 0:42 / /run rw - tmpfs tmpfs rw\n\
        torn\n";

    #[test]
    fn a_volume_and_a_directory_of_it_are_one() {
        let of = |path: &str| {
            find(&MountTable::parse(TABLE), Path::new(path)).map(|(_, device, path)| (device, path))
        };
        let volume = |path: &str| Some(("0:40".to_owned(), path.to_owned()));
        assert_eq!(of("/k/pods/p/volumes/kubernetes.io~empty-dir/cache"), volume(""));
        assert_eq!(of("/k/pods/p/volumes/kubernetes.io~empty-dir/cache/a"), volume("a"));
        assert_eq!(of("/k/pods/p/volume-subpaths/cache/one/0"), volume("a/b"));
        assert_eq!(of("/k/pods/p/volume-subpaths/cache/one/0/c"), volume("a/b/c"));
        for other in ["/k/pods/p/volumes/kubernetes.io~secret/token", "/run/x", "/etc"] {
            assert_eq!(of(other), None, "{other}");
        }
    }

    #[test]
    fn what_the_host_has_put_files_into_is_the_hosts() {
        let dir = tempfile::tempdir().unwrap();
        let only = || has_only_directories(dir.path(), 0, &mut 0);
        assert!(only());
        fs::create_dir_all(dir.path().join("a/b")).unwrap();
        assert!(only());
        std::os::unix::fs::symlink("a", dir.path().join("link")).unwrap();
        assert!(!only());
        fs::remove_file(dir.path().join("link")).unwrap();
        fs::write(dir.path().join("a/b/file"), "").unwrap();
        assert!(!only());
        fs::remove_file(dir.path().join("a/b/file")).unwrap();
        for n in 0..MOST {
            fs::create_dir(dir.path().join(format!("{n}"))).unwrap();
        }
        assert!(!only(), "more than are looked at");
    }
}
