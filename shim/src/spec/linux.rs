//! `linux`: devices, paths, kernel parameters, and what has files of its own.

use std::path::{Component, Path};

use oci_spec::runtime::{self as oci, LinuxDeviceType, LinuxPersonalityDomain};
use rvm_protocol::agent::{CreateContainerRequest, Device, Seccomp};

use super::{HostDisk, Pod, SpecError, absolute_path, disks, labels, namespaces, path_text, resources, text};
use crate::{
    config::Compat,
    seccomp::{self, SeccompError},
};

/// What the names of systemd's slices end in.
const SLICE: &str = ".slice";

/// Adds what `linux` says to `container`, which has its process already.
pub(super) fn translate(
    linux: &oci::Linux,
    compat: &Compat,
    pod: &Pod,
    container: &mut CreateContainerRequest,
    disks: &mut Vec<HostDisk>,
    not_applied: &mut Vec<String>,
) -> Result<(), SpecError> {
    refuse_unsupported(linux)?;
    labels::selinux("linux.mountLabel", linux.mount_label(), compat, not_applied)?;
    namespaces::translate(linux, pod, container)?;
    container.rootfs.mut_or_insert_default().propagation = propagation(linux.rootfs_propagation())?;
    container.masked_paths = paths("linux.maskedPaths", linux.masked_paths())?;
    container.readonly_paths = paths("linux.readonlyPaths", linux.readonly_paths())?;
    for (key, value) in linux.sysctl().iter().flatten() {
        let field = format!("linux.sysctl[{key:?}]");
        if key.is_empty() || key.contains("..") || key.starts_with('/') {
            return Err(SpecError::field(field, "must be a kernel parameter's name, as in sysctl(8)"));
        }
        container.sysctl.insert(text(&field, Some(key))?, text(&field, Some(value))?);
    }
    let rules = linux.resources().as_ref().and_then(|resources| resources.devices().as_deref());
    let rules = rules.unwrap_or_default();
    // A privileged container is given all the host has, not what it needs.
    let chosen = !allows_everything(rules);
    let (devices, left_out): (Vec<_>, Vec<_>) = (linux.devices().iter().flatten().enumerate())
        .partition(|(_, device)| chosen || is_in_every_kernel(device));
    if !left_out.is_empty() {
        not_applied.push("linux.devices".into());
    }
    for (n, device) in devices {
        let at = format!("linux.devices[{n}]");
        let mut message = self::device(&at, device)?;
        if message.type_ == "b" {
            let disk = HostDisk::with_number(&at, message.major, message.minor)?;
            let readonly = disk.readonly || !disks::may_write(rules, message.major, message.minor);
            message.block_serial = disk.serial();
            disks::add(disks, HostDisk { readonly, ..disk });
        }
        container.devices.push(message);
    }
    let resources = linux.resources().clone().unwrap_or_default();
    let resources = resources::translate("linux.resources", &resources, &container.devices, not_applied)?;
    container.resources = Some(resources).into();
    container.seccomp = linux.seccomp().as_ref().map(seccomp).transpose()?.into();
    container.personality = linux.personality().as_ref().map(personality).transpose()?;
    Ok(())
}

fn refuse_unsupported(linux: &oci::Linux) -> Result<(), SpecError> {
    for (present, field, reason) in [
        (
            linux.net_devices().iter().flatten().next().is_some(),
            "linux.netDevices",
            "an interface of the host cannot be moved into a guest",
        ),
        (linux.intel_rdt().is_some(), "linux.intelRdt", "the guest has no resctrl file system"),
        (linux.memory_policy().is_some(), "linux.memoryPolicy", "the guest has one memory node"),
    ] {
        if present {
            return Err(SpecError::unsupported(field, reason));
        }
    }
    Ok(())
}

/// The compiled profile.
fn seccomp(profile: &oci::LinuxSeccomp) -> Result<Seccomp, SpecError> {
    const FIELD: &str = "linux.seccomp";
    seccomp::compile(profile).map_err(|error| match error {
        SeccompError::Field { field, problem } => SpecError::field(format!("{FIELD}.{field}"), problem),
        SeccompError::Unsupported { field, reason } => {
            SpecError::unsupported(format!("{FIELD}.{field}"), reason)
        }
        error @ SeccompError::TooLong { .. } => SpecError::field(FIELD, error.to_string()),
    })
}

/// The argument of personality(2).
fn personality(personality: &oci::LinuxPersonality) -> Result<u32, SpecError> {
    if personality.flags().iter().flatten().next().is_some() {
        return Err(SpecError::unsupported("linux.personality.flags", "no flag is defined"));
    }
    // linux/personality.h
    Ok(match personality.domain() {
        LinuxPersonalityDomain::PerLinux => 0,
        LinuxPersonalityDomain::PerLinux32 => 8,
    })
}

fn propagation(value: &Option<String>) -> Result<String, SpecError> {
    match value.as_deref().unwrap_or_default() {
        "" => Ok(String::new()),
        mode @ ("private" | "slave" | "shared" | "unbindable" | "rprivate" | "rslave" | "rshared"
        | "runbindable") => Ok(mode.into()),
        other => Err(SpecError::field(
            "linux.rootfsPropagation",
            format!("must be private, slave, shared or unbindable, is {other:?}"),
        )),
    }
}

fn paths(field: &str, paths: &Option<Vec<String>>) -> Result<Vec<String>, SpecError> {
    paths
        .iter()
        .flatten()
        .enumerate()
        .map(|(n, path)| absolute_path(&format!("{field}[{n}]"), Path::new(path)))
        .collect()
}

/// The container's cgroup below the root, and whether it was spelt as for
/// systemd, `SLICE:PREFIX:NAME`: then it is where systemd would put that unit.
pub(super) fn cgroup_path(id: &str, path: Option<&Path>) -> Result<(String, bool), SpecError> {
    const FIELD: &str = "linux.cgroupsPath";
    let Some(path) = path.filter(|path| !path.as_os_str().is_empty()) else {
        return Ok((format!("/{id}"), false));
    };
    let given = path_text(FIELD, path)?;
    if !given.contains('/')
        && let [slice, prefix, name] = given.split(':').collect::<Vec<_>>()[..]
    {
        let slice = if slice.is_empty() { "system.slice" } else { slice };
        let slices = slices(slice).filter(|_| !name.is_empty()).ok_or_else(|| {
            SpecError::field(
                FIELD,
                format!(
                    "must be SLICE:PREFIX:NAME, the slice like \"a-b.slice\" or \"-.slice\", is {given:?}"
                ),
            )
        })?;
        // What is a slice already is no scope (runc's getUnitName).
        let is_slice = name.ends_with(SLICE);
        let unit = if is_slice { name.to_owned() } else { format!("{prefix}-{name}.scope") };
        return Ok((format!("{slices}/{unit}"), true));
    }
    let mut out = String::new();
    for part in path.components() {
        match part {
            Component::Normal(name) => {
                out.push('/');
                out.push_str(&name.to_string_lossy());
            }
            Component::RootDir | Component::CurDir => {}
            Component::ParentDir | Component::Prefix(_) => {
                return Err(SpecError::field(FIELD, format!("must not contain \"..\", is {given:?}")));
            }
        }
    }
    Ok((if out.is_empty() { format!("/{id}") } else { out }, false))
}

/// Where systemd puts a slice: `a-b.slice` below `a.slice` (systemd.slice(5)),
/// and `-.slice` at the root. `None` for a name it would not take.
fn slices(slice: &str) -> Option<String> {
    let name = slice.strip_suffix(SLICE)?;
    if name == "-" {
        return Some(String::new());
    }
    let mut path = String::new();
    for (at, _) in name.match_indices('-').chain([(name.len(), "")]) {
        let above = &name[..at];
        if above.is_empty() || above.ends_with('-') {
            return None;
        }
        path.push('/');
        path.push_str(above);
        path.push_str(SLICE);
    }
    Some(path)
}

/// Whether the rules end with every device allowed, as those of `--privileged` do.
fn allows_everything(rules: &[oci::LinuxDeviceCgroup]) -> bool {
    let all = |number: Option<i64>| number.is_none_or(|number| number < 0);
    let last = rules.iter().rev().find(|rule| {
        matches!(rule.typ(), None | Some(LinuxDeviceType::A)) && all(rule.major()) && all(rule.minor())
    });
    last.is_some_and(|rule| {
        let access = rule.access().as_deref().unwrap_or_default();
        rule.allow() && (access.is_empty() || "rwm".chars().all(|letter| access.contains(letter)))
    })
}

/// The host's drivers, and with them its numbers, are not the guest's. What every
/// kernel has under one number is the same device on both sides: null, zero, full,
/// random, urandom, tty, ptmx, net/tun, fuse, and pipes.
fn is_in_every_kernel(device: &oci::LinuxDevice) -> bool {
    match device.typ() {
        LinuxDeviceType::P => true,
        LinuxDeviceType::C | LinuxDeviceType::U => {
            let number = (device.major(), device.minor());
            matches!(number, (1, 3 | 5 | 7 | 8 | 9) | (5, 0 | 2) | (10, 200 | 229))
        }
        LinuxDeviceType::B | LinuxDeviceType::A => false,
    }
}

fn device(at: &str, device: &oci::LinuxDevice) -> Result<Device, SpecError> {
    let kind = match device.typ() {
        LinuxDeviceType::C => "c",
        LinuxDeviceType::B => "b",
        LinuxDeviceType::U => "u",
        LinuxDeviceType::P => "p",
        LinuxDeviceType::A => {
            return Err(SpecError::field(format!("{at}.type"), "must be one of c, b, u, p, is \"a\""));
        }
    };
    let number = |name: &str, value: i64| {
        u32::try_from(value).map_err(|_| {
            SpecError::field(format!("{at}.{name}"), format!("must be a device number, is {value}"))
        })
    };
    let path = absolute_path(&format!("{at}.path"), device.path())?;
    // Block devices become virtio-blk ones.
    if kind != "b" && !is_in_every_kernel(device) {
        return Err(SpecError::unsupported(
            at,
            format!("{path} is a character device of the host, whose driver the guest does not have"),
        ));
    }
    Ok(Device {
        path,
        type_: kind.into(),
        major: number("major", device.major())?,
        minor: number("minor", device.minor())?,
        // The type is said by `type`.
        file_mode: device.file_mode().unwrap_or(0o666) & 0o7777,
        uid: device.uid().unwrap_or(0),
        gid: device.gid().unwrap_or(0),
        ..Default::default()
    })
}
