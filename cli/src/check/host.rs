//! What the host's kernel has to offer beside KVM.

use std::{
    error::Error,
    ffi::CStr,
    fs::{self, File},
    io,
    os::fd::{FromRawFd, OwnedFd},
};

use nix::sys::{
    statfs::{self, CGROUP2_SUPER_MAGIC},
    utsname::uname,
};

use rvm_shim::user_namespace::{IdMap, user_namespace};

use super::Check;

/// Oldest kernel of a host: every root file system is made with
/// `mount_setattr(2)`.
const OLDEST_LINUX: (u32, u32) = (5, 12);

/// The host's kernel version.
pub(super) fn linux() -> Check {
    let name = "linux";
    let release = uname().map(|names| names.release().to_string_lossy().into_owned()).unwrap_or_default();
    let detail = format!("Linux {release} {}", std::env::consts::ARCH);
    if std::env::consts::ARCH != "x86_64" {
        return Check::missing(name, detail, "rvm runs on x86_64 alone");
    }
    if is_new_enough(&release) {
        return Check::ok(name, detail);
    }
    let (major, minor) = OLDEST_LINUX;
    Check::missing(name, detail, format!("rvm needs Linux {major}.{minor} or later"))
}

fn is_new_enough(release: &str) -> bool {
    version(release).is_some_and(|version| version >= OLDEST_LINUX)
}

fn version(release: &str) -> Option<(u32, u32)> {
    let mut numbers = release.split(|c: char| !c.is_ascii_digit());
    Some((numbers.next()?.parse().ok()?, numbers.next()?.parse().ok()?))
}

/// The shim merges an image's layers with OverlayFS. Opening a file system
/// context loads the module as a mount would.
pub(super) fn overlayfs() -> Check {
    let name = "overlayfs";
    match fsopen(c"overlay") {
        Ok(_) => Check::ok(name, "the kernel has it"),
        // Without CAP_SYS_ADMIN, or in a container that filters the call.
        Err(error) if matches!(error.raw_os_error(), Some(libc::EPERM | libc::ENOSYS)) => {
            if fs::read_to_string("/proc/filesystems").is_ok_and(|list| list.contains("\toverlay\n")) {
                Check::ok(name, "the kernel has it")
            } else {
                Check::missing(name, "not in /proc/filesystems", "modprobe overlay, or run this as root")
            }
        }
        Err(error) => Check::missing(name, error.to_string(), "modprobe overlay"),
    }
}

/// `fsopen(2)`.
fn fsopen(file_system: &CStr) -> io::Result<OwnedFd> {
    // SAFETY: the string is NUL-terminated and outlives the call.
    let fd = unsafe { libc::syscall(libc::SYS_fsopen, file_system.as_ptr(), libc::FSOPEN_CLOEXEC) };
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the kernel has just returned this descriptor, nobody else owns it.
    Ok(unsafe { OwnedFd::from_raw_fd(fd as i32) })
}

/// Where the host's cgroup v2 hierarchy is mounted, if anywhere.
pub(super) fn cgroup_v2() -> Check {
    let name = "cgroup-v2";
    let at = |path: &str| statfs::statfs(path).is_ok_and(|fs| fs.filesystem_type() == CGROUP2_SUPER_MAGIC);
    if at("/sys/fs/cgroup") {
        return Check::ok(name, "at /sys/fs/cgroup");
    }
    let remedy = "limits of sandboxes on this host are v1's; systemd.unified_cgroup_hierarchy=1 changes that";
    if at("/sys/fs/cgroup/unified") {
        Check::optional(name, "beside v1, at /sys/fs/cgroup/unified", remedy)
    } else {
        Check::optional(name, "not mounted", remedy)
    }
}

/// Interfaces of containers with a network.
pub(super) fn tun() -> Check {
    device("tun", "/dev/net/tun", "modprobe tun: containers with a network need it")
}

/// Packets between guest and host without the monitor in between.
pub(super) fn vhost_net() -> Check {
    device("vhost-net", "/dev/vhost-net", "modprobe vhost_net: networks are faster with it")
}

/// What carries frames between an interface and its tap, tried in a namespace of its own.
pub(super) fn tc() -> Check {
    tried(
        "tc",
        rvm_shim::sandbox::try_network(),
        "clsact, u32 and mirred",
        "modprobe -a tun sch_ingress cls_u32 act_mirred, or run this as root: containers with a network need them",
    )
}

/// What leads who dials 127.0.0.1 in a sandbox's network namespace into the guest, tried in one of
/// its own.
pub(super) fn loopback() -> Check {
    tried(
        "loopback",
        rvm_shim::relay::try_out(),
        "BPF programs look up sockets",
        "Linux 5.9 or later with CONFIG_BPF_SYSCALL and CONFIG_BPF_STREAM_PARSER, or run this as root: kubectl port-forward needs it, \
         rvmctl port-forward does not",
    )
}

/// What leaves the monitor no power over the host, tried.
pub(super) fn user_namespaces() -> Check {
    tried(
        "user-namespaces",
        IdMap::identity().and_then(|map| user_namespace(&map)).map(drop),
        "the monitor gets one without power over the host",
        "sysctl user.max_user_namespaces, or run this as root: without them the monitor keeps some of the host's capabilities",
    )
}

/// What keeps a monitor that was taken over from writing what it was lent for reading.
pub(super) fn landlock() -> Check {
    let name = "landlock";
    match rvm_vmm::jail::has_landlock() {
        true => Check::ok(name, "files the monitor was not given cannot be opened"),
        false => Check::optional(
            name,
            "not there",
            "Linux 5.19 or later with landlock in its lsm= list: a wall less around the monitor without it",
        ),
    }
}

/// What some containers need, tried: `works` where it does, else the error and the remedy.
fn tried<E: Error>(name: &'static str, result: Result<(), E>, works: &str, remedy: &str) -> Check {
    match result {
        Ok(()) => Check::ok(name, works),
        Err(error) => Check::optional(name, error.to_string(), remedy),
    }
}

/// An optional device counts when it opens: its node may be there without the
/// module.
fn device(name: &'static str, path: &str, remedy: &str) -> Check {
    match File::options().read(true).write(true).open(path) {
        Ok(_) => Check::ok(name, path),
        Err(error) if error.kind() == io::ErrorKind::PermissionDenied => {
            Check::optional(name, format!("{path}: {error}"), "run this as root")
        }
        Err(error) => Check::optional(name, format!("{path}: {error}"), remedy),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions_compare_as_numbers() {
        assert_eq!(version("6.18.44-fc-v657"), Some((6, 18)));
        assert_eq!(version("5.9"), Some((5, 9)));
        assert_eq!(version("5.10.0-30-amd64"), Some((5, 10)));
        assert_eq!(version("linux"), None);
        for (release, enough) in
            [("5.10.0-30-amd64", false), ("5.12", true), ("6.1.0-40", true), ("linux", false)]
        {
            assert_eq!(is_new_enough(release), enough, "{release}");
        }
    }

    #[test]
    fn a_file_system_no_kernel_has_is_told_apart() {
        assert!(fsopen(c"no-such-file-system").is_err());
    }
}
