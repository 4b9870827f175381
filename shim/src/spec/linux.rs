//! `linux`: namespaces, devices, paths, and the limits this version refuses.

use std::path::{Component, Path};

use oci_spec::runtime::{self as oci, LinuxDeviceType, LinuxNamespaceType as Kind};
use rvm_protocol::agent::{CreateContainerRequest, Device, Namespace, NamespaceType};

use super::{SpecError, absolute_path, path_text, text};

/// Adds what `linux` says to `container`.
pub(super) fn translate(
    linux: &oci::Linux,
    container: &mut CreateContainerRequest,
    not_applied: &mut Vec<String>,
) -> Result<(), SpecError> {
    refuse_unsupported(linux)?;
    if linux.seccomp().is_some() {
        not_applied.push("linux.seccomp".into());
    }
    if linux.mount_label().as_ref().is_some_and(|label| !label.is_empty()) {
        not_applied.push("linux.mountLabel".into());
    }
    if let Some(resources) = linux.resources() {
        check_resources(resources, not_applied)?;
    }
    container.namespaces = namespaces(linux.namespaces().as_deref().unwrap_or_default())?;
    container.rootfs.mut_or_insert_default().propagation = propagation(linux.rootfs_propagation())?;
    container.masked_paths = paths("linux.maskedPaths", linux.masked_paths())?;
    container.readonly_paths = paths("linux.readonlyPaths", linux.readonly_paths())?;
    container.cgroup_path = cgroup_path(&container.container_id, linux.cgroups_path().as_deref())?;
    for (key, value) in linux.sysctl().iter().flatten() {
        let field = format!("linux.sysctl[{key:?}]");
        if key.is_empty() || key.contains("..") || key.starts_with('/') {
            return Err(SpecError::field(field, "must be a kernel parameter's name, as in sysctl(8)"));
        }
        container.sysctl.insert(text(&field, Some(key))?, text(&field, Some(value))?);
    }
    for (n, device) in linux.devices().iter().flatten().enumerate() {
        container.devices.push(self::device(&format!("linux.devices[{n}]"), device)?);
    }
    Ok(())
}

fn refuse_unsupported(linux: &oci::Linux) -> Result<(), SpecError> {
    let mapped = |mappings: &Option<Vec<oci::LinuxIdMapping>>| mappings.iter().flatten().next().is_some();
    for (present, field, reason) in [
        (mapped(linux.uid_mappings()), "linux.uidMappings", "this version has no user namespaces"),
        (mapped(linux.gid_mappings()), "linux.gidMappings", "this version has no user namespaces"),
        (
            linux.net_devices().iter().flatten().next().is_some(),
            "linux.netDevices",
            "an interface of the host cannot be moved into a guest",
        ),
        (linux.intel_rdt().is_some(), "linux.intelRdt", "the guest has no resctrl file system"),
        (linux.memory_policy().is_some(), "linux.memoryPolicy", "the guest has one memory node"),
        (
            linux.time_offsets().iter().flatten().next().is_some(),
            "linux.timeOffsets",
            "this version has no time namespaces",
        ),
    ] {
        if present {
            return Err(SpecError::unsupported(field, reason));
        }
    }
    if let Some(personality) = linux.personality()
        && personality.domain() != oci::LinuxPersonalityDomain::PerLinux
    {
        return Err(SpecError::unsupported("linux.personality.domain", "only LINUX is"));
    }
    Ok(())
}

/// Limits somebody asked for are refused; what runtimes always write is let
/// through.
fn check_resources(resources: &oci::LinuxResources, not_applied: &mut Vec<String>) -> Result<(), SpecError> {
    let memory = resources.memory().unwrap_or_default();
    let cpu = resources.cpu().clone().unwrap_or_default();
    let io = resources.block_io().clone().unwrap_or_default();
    let limits = |value: Option<i64>| value.is_some_and(|value| value > 0);
    let named = |value: &Option<String>| value.as_ref().is_some_and(|value| !value.is_empty());
    fn any<T>(list: &Option<Vec<T>>) -> bool {
        list.iter().flatten().next().is_some()
    }
    for (asked, field) in [
        (limits(memory.limit()), "memory.limit"),
        (limits(memory.reservation()), "memory.reservation"),
        (limits(memory.swap()), "memory.swap"),
        (limits(memory.kernel()), "memory.kernel"),
        (limits(memory.kernel_tcp()), "memory.kernelTCP"),
        (memory.disable_oom_killer() == Some(true), "memory.disableOOMKiller"),
        (limits(cpu.quota()), "cpu.quota"),
        (cpu.burst().is_some_and(|burst| burst > 0), "cpu.burst"),
        (limits(cpu.realtime_runtime()), "cpu.realtimeRuntime"),
        (limits(cpu.idle()), "cpu.idle"),
        (named(cpu.cpus()), "cpu.cpus"),
        (named(cpu.mems()), "cpu.mems"),
        (resources.pids().is_some_and(|pids| pids.limit() > 0), "pids.limit"),
        (io.weight().is_some_and(|weight| weight > 0), "blockIO.weight"),
        (io.leaf_weight().is_some_and(|weight| weight > 0), "blockIO.leafWeight"),
        (any(io.weight_device()), "blockIO.weightDevice"),
        (any(io.throttle_read_bps_device()), "blockIO.throttleReadBpsDevice"),
        (any(io.throttle_write_bps_device()), "blockIO.throttleWriteBpsDevice"),
        (any(io.throttle_read_iops_device()), "blockIO.throttleReadIOPSDevice"),
        (any(io.throttle_write_iops_device()), "blockIO.throttleWriteIOPSDevice"),
        (any(resources.hugepage_limits()), "hugepageLimits"),
        (resources.rdma().iter().flatten().next().is_some(), "rdma"),
        (resources.unified().iter().flatten().next().is_some(), "unified"),
        (
            resources
                .network()
                .as_ref()
                .is_some_and(|net| net.class_id().is_some_and(|id| id > 0) || any(net.priorities())),
            "network",
        ),
    ] {
        if asked {
            return Err(SpecError::unsupported(
                format!("linux.resources.{field}"),
                "this version applies no resource limits",
            ));
        }
    }
    if cpu.shares().is_some_and(|shares| shares > 0) {
        not_applied.push("linux.resources.cpu.shares".into());
    }
    if any(resources.devices()) {
        not_applied.push("linux.resources.devices".into());
    }
    Ok(())
}

fn namespaces(namespaces: &[oci::LinuxNamespace]) -> Result<Vec<Namespace>, SpecError> {
    let mut out: Vec<Namespace> = Vec::with_capacity(namespaces.len());
    for (n, namespace) in namespaces.iter().enumerate() {
        let field = format!("linux.namespaces[{n}]");
        if namespace.path().as_ref().is_some_and(|path| !path.as_os_str().is_empty()) {
            return Err(SpecError::unsupported(
                format!("{field}.path"),
                format!(
                    "{} is a namespace of the host's kernel, which the container does not run on",
                    namespace.path().as_deref().unwrap_or(Path::new("")).display()
                ),
            ));
        }
        let kind = match namespace.typ() {
            Kind::Pid => NamespaceType::PID,
            Kind::Network => NamespaceType::NETWORK,
            Kind::Mount => NamespaceType::MOUNT,
            Kind::Ipc => NamespaceType::IPC,
            Kind::Uts => NamespaceType::UTS,
            Kind::Cgroup => NamespaceType::CGROUP,
            Kind::User | Kind::Time => {
                return Err(SpecError::unsupported(
                    field,
                    format!("this version makes no {} namespace", namespace.typ()),
                ));
            }
        };
        if out.iter().any(|other| other.type_ == kind.into()) {
            return Err(SpecError::field(
                format!("{field}.type"),
                format!("{} is there twice", namespace.typ()),
            ));
        }
        out.push(Namespace { type_: kind.into(), ..Default::default() });
    }
    let has = |kind: NamespaceType| out.iter().any(|namespace| namespace.type_ == kind.into());
    if !has(NamespaceType::MOUNT) {
        return Err(SpecError::field("linux.namespaces", "must hold a \"mount\" namespace"));
    }
    if !has(NamespaceType::NETWORK) {
        return Err(SpecError::unsupported(
            "linux.namespaces",
            "without a \"network\" namespace the container would share the host's network, which a microVM cannot",
        ));
    }
    Ok(out)
}

fn propagation(value: &Option<String>) -> Result<String, SpecError> {
    match value.as_deref().unwrap_or_default() {
        "" => Ok(String::new()),
        mode @ ("private" | "slave" | "shared" | "unbindable") => Ok(mode.into()),
        // The recursive forms: a container's tree is made of its own mounts.
        mode @ ("rprivate" | "rslave" | "rshared" | "runbindable") => {
            Ok(mode.trim_start_matches('r').to_owned())
        }
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

/// The container's cgroup below the guest's root: the spec's path, systemd's
/// `slice:prefix:name` spelt as the path systemd would make of it.
fn cgroup_path(id: &str, path: Option<&Path>) -> Result<String, SpecError> {
    const FIELD: &str = "linux.cgroupsPath";
    let Some(path) = path.filter(|path| !path.as_os_str().is_empty()) else {
        return Ok(format!("/{id}"));
    };
    let given = path_text(FIELD, path)?;
    if !given.contains('/')
        && let [slice, prefix, name] = given.split(':').collect::<Vec<_>>()[..]
    {
        if name.is_empty() {
            return Err(SpecError::field(FIELD, format!("must be SLICE:PREFIX:NAME, is {given:?}")));
        }
        let slice = if slice.is_empty() { "system.slice" } else { slice };
        let unit = if prefix.is_empty() { name.to_owned() } else { format!("{prefix}-{name}.scope") };
        return Ok(format!("/{slice}/{unit}"));
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
    Ok(if out.is_empty() { format!("/{id}") } else { out })
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
    // The host's drivers, and with them its numbers, are not the guest's. What
    // every kernel has under one number is the same device on both sides: null,
    // zero, full, random, urandom, tty, ptmx, net/tun, fuse.
    let everywhere = kind == "p"
        || (kind != "b"
            && matches!(
                (device.major(), device.minor()),
                (1, 3 | 5 | 7 | 8 | 9) | (5, 0 | 2) | (10, 200 | 229)
            ));
    if !everywhere {
        return Err(SpecError::unsupported(at, format!("{path} is a device of the host")));
    }
    Ok(Device {
        path,
        type_: kind.into(),
        major: number("major", device.major())?,
        minor: number("minor", device.minor())?,
        file_mode: device.file_mode().unwrap_or(0o666),
        uid: device.uid().unwrap_or(0),
        gid: device.gid().unwrap_or(0),
        ..Default::default()
    })
}
