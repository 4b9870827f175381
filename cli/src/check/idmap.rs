//! Idmapped mounts, tried on a file system that holds containers' layers: the
//! kernel may have them and the file system may not.

use std::path::Path;

use nix::sys::statfs;
use rvm_shim::ids;

use super::Check;

/// Tries an idmapped mount of `dir`; nothing is attached anywhere.
pub(super) fn check(dir: &Path) -> Check {
    let name = "idmapped-mounts";
    match ids::try_out(dir) {
        Ok(()) => Check::ok(
            name,
            format!(
                "on the file system of {} ({}): monitors of single containers have ids of their own",
                dir.display(),
                kind_of(dir)
            ),
        ),
        Err(error) if error.raw_os_error() == Some(libc::EPERM) => {
            Check::optional(name, format!("not tried: {error}"), "run this as root")
        }
        Err(error) => Check::optional(
            name,
            format!("not on the file system of {} ({}): {error}", dir.display(), kind_of(dir)),
            "monitors act with the host's ids, without power over anything; a file system that has them (ext4, xfs, btrfs) isolates better",
        ),
    }
}

/// The usual name of the file system at `dir`, or its magic number.
fn kind_of(dir: &Path) -> String {
    let Ok(fs) = statfs::statfs(dir) else { return "unknown".to_owned() };
    match fs.filesystem_type() {
        statfs::EXT4_SUPER_MAGIC => "ext4".to_owned(),
        statfs::XFS_SUPER_MAGIC => "xfs".to_owned(),
        statfs::BTRFS_SUPER_MAGIC => "btrfs".to_owned(),
        statfs::OVERLAYFS_SUPER_MAGIC => "overlay".to_owned(),
        statfs::TMPFS_MAGIC => "tmpfs".to_owned(),
        other => format!("{:#x}", other.0),
    }
}
