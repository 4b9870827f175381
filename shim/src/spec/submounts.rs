//! What is mounted on the host below a volume, and with which flags.
//!
//! The guest's kernel makes a mount of each when somebody walks into it, with the
//! flags of the mount around it. Under runc each has its own, and those of the
//! specification are only the outermost one's; so the guest is told beforehand.

use std::{collections::BTreeMap, fs, path::Path};

use nix::sys::statvfs::{FsFlags, statvfs};
use rvm_protocol::agent::Submount;

use crate::mountinfo::MountTable;

/// The most that one volume's are told of; the others are found all the same.
const MOST: usize = 1024;
/// The flags that hold in the guest.
const FLAGS: [&str; 4] = ["ro", "nosuid", "nodev", "noexec"];

/// The mounts below `source`, outermost first.
pub(super) fn below(mounts: &MountTable, source: &Path) -> Vec<Submount> {
    let Ok(source) = fs::canonicalize(source) else { return Vec::new() };
    find(mounts, &source)
}

fn find(mounts: &MountTable, source: &Path) -> Vec<Submount> {
    let mut found = BTreeMap::new();
    for mounted in mounts.within(source) {
        let Some(below) = mounted.place.strip_prefix(source).ok().and_then(Path::to_str) else { continue };
        if below.is_empty() {
            continue;
        }
        let options =
            mounted.flags.split(',').filter(|flag| FLAGS.contains(flag)).map(str::to_owned).collect();
        // A later one at the same place covers the earlier.
        found.insert(below.to_owned(), Submount { path: below.to_owned(), options, ..Default::default() });
    }
    // A path sorts before what is below it.
    found.into_values().take(MOST).collect()
}

/// Flags of the mount `source` is on that its volume keeps, unless the
/// specification says otherwise.
pub(super) fn flags_of(source: &Path) -> Vec<String> {
    let Ok(found) = statvfs(source) else { return Vec::new() };
    [(FsFlags::ST_NOSUID, "nosuid"), (FsFlags::ST_NODEV, "nodev"), (FsFlags::ST_NOEXEC, "noexec")]
        .into_iter()
        .filter(|(flag, _)| found.flags().contains(*flag))
        .map(|(_, name)| name.to_owned())
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn mounts_below_and_their_flags() {
        let table = "\
            30 1 8:1 / / rw,relatime shared:1 - ext4 /dev/sda1 rw\n\
            31 30 0:40 / /v rw,relatime - tmpfs tmpfs rw\n\
            33 31 0:42 / /v/a/b ro,nosuid,nodev,relatime - tmpfs tmpfs rw\n\
            32 31 0:41 / /v/a rw,noexec - tmpfs tmpfs rw\n\
            34 31 0:43 / /v/with\\040space rw master:3 - tmpfs tmpfs rw\n\
            35 31 0:44 / /v/a ro - tmpfs tmpfs rw\n\
            36 30 0:45 / /vv rw - tmpfs tmpfs rw\n\
            torn\n";
        let found = find(&MountTable::parse(table), Path::new("/v"));
        let found: Vec<_> =
            found.iter().map(|mount| (mount.path.as_str(), mount.options.join(","))).collect();
        assert_eq!(
            found,
            [("a", "ro".to_owned()), ("a/b", "ro,nosuid,nodev".to_owned()), ("with space", String::new())]
        );
    }
}
