//! The agent's own view of the file system.
//!
//! Little is mounted: the root is the initramfs, already writable and in
//! memory, and containers bring their own `/dev/pts`, `/dev/shm` and `/run`.

use std::path::Path;

use nix::{
    errno::Errno,
    fcntl::AT_FDCWD,
    mount::MsFlags,
    sys::stat::Mode,
    unistd::{chroot, fchdir, mkdir},
};

use super::Error;
use crate::{
    error,
    sys::mount::{attach, clone_tree},
};

/// Where the guest's cgroup v2 hierarchy is.
pub const CGROUP_ROOT: &str = "/sys/fs/cgroup";

/// Where a container's root file system is mounted before it becomes the root.
/// One place serves all: each container has its own mount namespace.
pub const MOUNT_POINT: &str = "/run/rvm/rootfs";

/// `pivot_root(2)` refuses to replace the initramfs itself, so the agent, and
/// with it every container's mount namespace, gets a second mount of it on top.
pub fn make_root_pivotable() -> Result<(), Error> {
    let pivotable = || {
        let root = clone_tree(AT_FDCWD, Path::new("/"), true)?;
        let old =
            nix::fcntl::open("/", nix::fcntl::OFlag::O_PATH | nix::fcntl::OFlag::O_CLOEXEC, Mode::empty())?;
        attach(&root, &old)?;
        fchdir(&root)?;
        chroot(".")
    };
    pivotable().map_err(|source| Error::Kernel { step: "make the root file system replaceable", source })
}

/// Mounts what the kernel itself provides.
pub fn mount_kernel_file_systems() -> Result<(), Error> {
    let quiet = MsFlags::MS_NOSUID | MsFlags::MS_NODEV | MsFlags::MS_NOEXEC;
    mount("proc", "/proc", quiet, "", "mount /proc")?;
    mount("sysfs", "/sys", quiet, "", "mount /sys")?;
    mount("devtmpfs", "/dev", MsFlags::MS_NOSUID, "", "mount /dev")?;
    // As systemd mounts it on a host: a container cannot raise the limits set
    // on it from outside, and memory protection reaches what is below.
    mount("cgroup2", CGROUP_ROOT, quiet, "nsdelegate,memory_recursiveprot", "mount the cgroup hierarchy")
}

fn mount(fs_type: &str, target: &str, flags: MsFlags, data: &str, step: &'static str) -> Result<(), Error> {
    match mkdir(target, Mode::from_bits_truncate(0o755)) {
        Ok(()) | Err(Errno::EEXIST) => {}
        Err(source) => return Err(Error::Kernel { step, source }),
    }
    match nix::mount::mount(Some(fs_type), target, Some(fs_type), flags, Some(data)) {
        // A kernel with CONFIG_DEVTMPFS_MOUNT may have been faster.
        Ok(()) | Err(Errno::EBUSY) => Ok(()),
        Err(source) => Err(Error::Kernel { step, source }),
    }
}

/// Makes the places containers and the sandbox are mounted at.
pub fn make_directories() -> Result<(), Error> {
    std::fs::create_dir_all(MOUNT_POINT).map_err(|source| Error::Io { step: "create directories", source })
}

/// Makes a directory of the agent's own, and those above it.
pub fn make_dir(path: &Path) -> error::StepResult<()> {
    use error::Step as _;
    std::fs::create_dir_all(path).step(|| format!("create directory {path:?}"))
}
