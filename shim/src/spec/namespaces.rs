//! `linux.namespaces`, and what belongs to the user and the time namespace.

use std::{
    collections::HashMap,
    fs,
    os::unix::fs::MetadataExt,
    path::{Path, PathBuf},
};

use oci_spec::runtime::{self as oci, LinuxNamespaceType as Kind};
use rvm_protocol::agent::{CreateContainerRequest, IdMapping, Namespace, NamespaceType, TimeOffset, User};

use super::{HostNamespace, Pinned, Pod, SpecError, path_text, pod::is_sandboxs};
use crate::{container::GUEST_PIDS_FROM, holder};

/// Most mappings a user namespace takes (user_namespaces(7)).
const MAX_MAPPINGS: usize = 340;

/// Adds the namespaces with their mappings and offsets to `container`.
pub(super) fn translate(
    linux: &oci::Linux,
    pod: &Pod,
    container: &mut CreateContainerRequest,
) -> Result<(), SpecError> {
    container.namespaces = namespaces(linux.namespaces().as_deref().unwrap_or_default(), pod)?;
    container.uid_mappings = mappings("linux.uidMappings", linux.uid_mappings())?;
    container.gid_mappings = mappings("linux.gidMappings", linux.gid_mappings())?;
    check_user_namespace(pod, container)?;
    container.time_offsets = time_offsets(linux.time_offsets())?;
    if !container.time_offsets.is_empty() && !is_new(container, NamespaceType::TIME) {
        return Err(SpecError::field(
            "linux.timeOffsets",
            "needs a new \"time\" namespace in linux.namespaces",
        ));
    }
    Ok(())
}

/// Whether the container has a namespace of this type apart from the guest's.
pub(super) fn has(container: &CreateContainerRequest, kind: NamespaceType) -> bool {
    find(&container.namespaces, kind).is_some()
}

/// Whether the container gets a namespace of this type of its own.
fn is_new(container: &CreateContainerRequest, kind: NamespaceType) -> bool {
    find(&container.namespaces, kind).is_some_and(|namespace| namespace.path.is_empty() && !namespace.sandbox)
}

fn find(namespaces: &[Namespace], kind: NamespaceType) -> Option<&Namespace> {
    namespaces.iter().find(|namespace| namespace.type_ == kind.into())
}

/// Makes the new ones that a pod's containers share the sandbox's.
pub(super) fn hold(namespaces: &mut [Namespace]) {
    for namespace in namespaces.iter_mut().filter(|namespace| namespace.path.is_empty()) {
        namespace.sandbox = namespace.type_.enum_value().is_ok_and(is_sandboxs);
    }
}

/// The user namespace that owns what a sandbox holds.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Users {
    /// How its users are mapped.
    pub uids: Vec<IdMapping>,
    /// Its groups.
    pub gids: Vec<IdMapping>,
    /// Device and inode of the host's one in whose place it is, where there is one.
    pub host: Option<(u64, u64)>,
}

impl Users {
    fn take_from(container: &mut CreateContainerRequest) -> Self {
        let (uids, gids) = (&mut container.uid_mappings, &mut container.gid_mappings);
        Self { uids: std::mem::take(uids), gids: std::mem::take(gids), host: None }
    }
}

/// Makes the user namespace of a pod's first container the sandbox's.
pub(super) fn hold_users(linux: &oci::Linux, container: &mut CreateContainerRequest) -> Option<Users> {
    if !is_new(container, NamespaceType::USER) {
        return None;
    }
    hold_one(container, NamespaceType::USER);
    let mut given = linux.namespaces().iter().flatten();
    let path = given.find(|namespace| namespace.typ() == Kind::User).and_then(|user| user.path().as_deref());
    Some(Users { host: path.and_then(|path| identity(path).ok()), ..Users::take_from(container) })
}

/// Leaves the mappings of the sandbox's user namespace to it, which a client says again with each container.
pub(super) fn leave_users(container: &mut CreateContainerRequest) {
    if !is_new(container, NamespaceType::USER) {
        Users::take_from(container);
    }
}

fn identity(path: &Path) -> std::io::Result<(u64, u64)> {
    fs::metadata(path).map(|found| (found.dev(), found.ino()))
}

fn hold_one(container: &mut CreateContainerRequest, kind: NamespaceType) {
    let held = container.namespaces.iter_mut().filter(|namespace| namespace.type_ == kind.into());
    held.for_each(|namespace| namespace.sandbox |= namespace.path.is_empty());
}

/// Makes the new network of a container that is alone the sandbox's, which has
/// what somebody puts into the namespace on the host. It is its user namespace's, where
/// that is new as well: that one is the sandbox's then, and its mappings are returned.
pub(super) fn hold_network(container: &mut CreateContainerRequest) -> Option<Users> {
    let is_network_new = is_new(container, NamespaceType::NETWORK);
    let is_user_new = is_new(container, NamespaceType::USER);
    hold_one(container, NamespaceType::NETWORK);
    if !(is_network_new && is_user_new) {
        return None;
    }
    hold_one(container, NamespaceType::USER);
    Some(Users::take_from(container))
}

/// A network namespace of the host that somebody has prepared.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct HostNetwork {
    /// The field that names it.
    pub field: String,
    /// Where it is.
    pub path: PathBuf,
}

/// The one that a sandbox made for this container is to have; none where it gets
/// a new one.
pub(super) fn host_network(linux: &oci::Linux) -> Option<HostNetwork> {
    let mut namespaces = linux.namespaces().iter().flatten().enumerate();
    let (n, network) = namespaces.find(|(_, namespace)| namespace.typ() == Kind::Network)?;
    let path = network.path().clone().filter(|path| !path.as_os_str().is_empty())?;
    Some(HostNetwork { field: format!("linux.namespaces[{n}].path"), path })
}

fn namespaces(namespaces: &[oci::LinuxNamespace], pod: &Pod) -> Result<Vec<Namespace>, SpecError> {
    let mut out: Vec<Namespace> = Vec::with_capacity(namespaces.len());
    for (n, namespace) in namespaces.iter().enumerate() {
        let at = format!("linux.namespaces[{n}]");
        let (kind, link) = match namespace.typ() {
            Kind::Pid => (NamespaceType::PID, "pid"),
            Kind::Network => (NamespaceType::NETWORK, "net"),
            Kind::Mount => (NamespaceType::MOUNT, "mnt"),
            Kind::Ipc => (NamespaceType::IPC, "ipc"),
            Kind::Uts => (NamespaceType::UTS, "uts"),
            Kind::User => (NamespaceType::USER, "user"),
            Kind::Cgroup => (NamespaceType::CGROUP, "cgroup"),
            Kind::Time => (NamespaceType::TIME, "time"),
        };
        if find(&out, kind).is_some() {
            return Err(SpecError::field(
                format!("{at}.type"),
                format!("{} is there twice", namespace.typ()),
            ));
        }
        out.push(match namespace.path().as_deref().filter(|path| !path.as_os_str().is_empty()) {
            None => Namespace { type_: kind.into(), ..Default::default() },
            Some(path) => joined(&format!("{at}.path"), path, (kind, link), pod)?,
        });
    }
    if find(&out, NamespaceType::MOUNT).is_none() {
        return Err(SpecError::field("linux.namespaces", "must hold a \"mount\" namespace"));
    }
    if find(&out, NamespaceType::NETWORK).is_none() {
        return Err(SpecError::unsupported(
            "linux.namespaces",
            "without a \"network\" namespace the container would share the host's network, which a microVM cannot; \
             add {\"type\": \"network\"} (ctr: no --net-host; Docker: another --network than host; \
             Kubernetes: hostNetwork: false)",
        ));
    }
    Ok(out)
}

/// Refuses a pod that is to have the host's processes or its ipc: its first container, that of the sandbox, has a
/// namespace of either kind unless the host's is meant.
pub(super) fn refuse_the_hosts(container: &CreateContainerRequest) -> Result<(), SpecError> {
    for (kind, name, what, field) in [
        (NamespaceType::PID, "pid", "processes", "hostPID"),
        (NamespaceType::IPC, "ipc", "System V objects and /dev/shm", "hostIPC"),
    ] {
        if !has(container, kind) {
            return Err(SpecError::unsupported(
                "linux.namespaces",
                format!(
                    "without a \"{name}\" namespace the pod would share the host's {what}, which a microVM cannot \
                     (Kubernetes: {field}: false)"
                ),
            ));
        }
    }
    Ok(())
}

/// A namespace to join: the sandbox's, or one of a process in the guest, by the
/// pid it is known by on the host.
fn joined(
    at: &str,
    path: &Path,
    (kind, link): (NamespaceType, &str),
    pod: &Pod,
) -> Result<Namespace, SpecError> {
    let given = path_text(at, path)?;
    let pid_and_link = given.strip_prefix("/proc/").and_then(|rest| rest.split_once("/ns/"));
    let found = pid_and_link.and_then(|(pid, named)| {
        let pid = pid.parse::<u32>().ok()?;
        let namespace = match pid.checked_sub(GUEST_PIDS_FROM) {
            // 1 is the agent.
            Some(pid) if pid > 1 => {
                Namespace { type_: kind.into(), path: format!("/proc/{pid}/ns/{link}"), ..Default::default() }
            }
            Some(_) => return None,
            None => pod.namespace(pid, kind, link)?,
        };
        Some((namespace, named))
    });
    if let Some((namespace, named)) = found {
        if named != link {
            return Err(SpecError::field(
                at,
                format!("is not of the namespace's type, must end in /ns/{link}, is {given:?}"),
            ));
        }
        return Ok(namespace);
    }
    let reason = match link {
        "net" if is_holders(path) => format!(
            "{given} is the network of a container in another machine, which two machines cannot share; \
             let both join one network (Docker: --network container: only under one kernel), or one pod"
        ),
        "net" => return sandboxs_network(at, path, pod),
        "user" => return users_of_the_host(at, path, pod),
        "ipc" | "uts" if pod.pinned.any() => return pinned_one(at, path, (kind, link), pod),
        "ipc" | "pid" => format!(
            "{given} is a namespace of the host's kernel, which the container does not run on; containers of \
             one pod share theirs (Docker: --{link} container: only under one kernel)"
        ),
        _ => format!("{given} is a namespace of the host's kernel, which the container does not run on"),
    };
    Err(SpecError::unsupported(at, reason))
}

/// Whether the namespace is looked for at the process that stands for a container
/// of rvm's; one of the same sandbox has been found before.
fn is_holders(path: &Path) -> bool {
    let comm = path.parent().and_then(Path::parent).map(|process| process.join("comm"));
    comm.and_then(|comm| std::fs::read(comm).ok())
        .is_some_and(|comm| comm.trim_ascii_end() == holder::NAME.to_bytes())
}

/// A network namespace of the host: that of a sandbox to be, or of the one that is.
fn sandboxs_network(at: &str, path: &Path, pod: &Pod) -> Result<Namespace, SpecError> {
    if let Some(identity) = pod.network {
        let found = fs::metadata(path).map_err(|error| SpecError::field(at, error.to_string()))?;
        if (found.dev(), found.ino()) != identity {
            let reason = format!(
                "{} is not the network namespace of the sandbox, which its containers share",
                path.display()
            );
            return Err(SpecError::unsupported(at, reason));
        }
    }
    Ok(Namespace { type_: NamespaceType::NETWORK.into(), sandbox: true, ..Default::default() })
}

/// An ipc or uts namespace that was made on the host for the pod.
fn pinned_one(
    at: &str,
    path: &Path,
    (kind, link): (NamespaceType, &str),
    pod: &Pod,
) -> Result<Namespace, SpecError> {
    let of = |path: &Path| identity(path).map_err(|error| SpecError::field(at, error.to_string()));
    let identity = of(path)?;
    let reason = match &pod.pinned {
        Pinned::Those(known) if !known.contains(&HostNamespace { kind, identity }) => {
            "is not the namespace that the pod was made with, which its containers share"
        }
        _ if identity == of(&Path::new("/proc/self/ns").join(link))? => {
            "is the host's, which a microVM cannot share (Kubernetes: hostIPC: false, hostNetwork: false)"
        }
        _ => return Ok(Namespace { type_: kind.into(), sandbox: true, ..Default::default() }),
    };
    Err(SpecError::unsupported(at, format!("{} {reason}", path.display())))
}

/// Those of a pod's first container that [`Pinned`] is about.
pub(super) fn pinned(linux: &oci::Linux) -> Vec<HostNamespace> {
    let given = linux.namespaces().iter().flatten().filter_map(|namespace| {
        let kind = match namespace.typ() {
            Kind::Ipc => NamespaceType::IPC,
            Kind::Uts => NamespaceType::UTS,
            _ => return None,
        };
        let identity = identity(namespace.path().as_deref()?).ok()?;
        Some(HostNamespace { kind, identity })
    });
    given.collect()
}

/// A user namespace of the host: in its place a new one of the guest's, with the mappings that come with it, which is
/// the sandbox's for those that join.
fn users_of_the_host(at: &str, path: &Path, pod: &Pod) -> Result<Namespace, SpecError> {
    let found = identity(path).map_err(|error| SpecError::field(at, error.to_string()))?;
    let of = |sandbox| Namespace { type_: NamespaceType::USER.into(), sandbox, ..Default::default() };
    let reason = match (pod.monitor, &pod.users) {
        (None, _) => return Ok(of(false)),
        (Some(_), Some(users)) if users.host.is_none_or(|host| host == found) => return Ok(of(true)),
        (Some(_), Some(_)) => "is not the user namespace of the sandbox, which its containers share",
        (Some(_), None) => "is a user namespace, and the sandbox was made without one",
    };
    Err(SpecError::unsupported(at, format!("{} {reason}", path.display())))
}

/// Id mappings, checked as the kernel would.
pub(super) fn mappings(
    field: &str,
    mappings: &Option<Vec<oci::LinuxIdMapping>>,
) -> Result<Vec<IdMapping>, SpecError> {
    let mappings = mappings.as_deref().unwrap_or_default();
    if mappings.len() > MAX_MAPPINGS {
        return Err(SpecError::field(field, format!("must have at most {MAX_MAPPINGS} entries")));
    }
    let end = |from: u32, size: u32| u64::from(from) + u64::from(size);
    for (n, new) in mappings.iter().enumerate() {
        let at = format!("{field}[{n}]");
        if new.size() == 0 {
            return Err(SpecError::field(format!("{at}.size"), "must be at least 1, is 0"));
        }
        // The last id means "no id".
        let most = u64::from(u32::MAX);
        if end(new.container_id(), new.size()) > most || end(new.host_id(), new.size()) > most {
            return Err(SpecError::field(
                format!("{at}.size"),
                format!("goes beyond the last id, is {}", new.size()),
            ));
        }
        for old in &mappings[..n] {
            let overlap =
                |a: u32, b: u32| u64::from(a) < end(b, old.size()) && u64::from(b) < end(a, new.size());
            if overlap(new.container_id(), old.container_id()) {
                return Err(SpecError::field(
                    format!("{at}.containerID"),
                    "maps ids that another entry maps",
                ));
            }
            if overlap(new.host_id(), old.host_id()) {
                return Err(SpecError::field(
                    format!("{at}.hostID"),
                    "maps to ids that another entry maps to",
                ));
            }
        }
    }
    Ok(mappings
        .iter()
        .map(|mapping| IdMapping {
            container_id: mapping.container_id(),
            host_id: mapping.host_id(),
            size: mapping.size(),
            ..Default::default()
        })
        .collect())
}

pub(super) fn is_mapped(mappings: &[IdMapping], id: u32) -> bool {
    mappings
        .iter()
        .any(|mapping| id.checked_sub(mapping.container_id).is_some_and(|offset| offset < mapping.size))
}

/// Mappings are those of a new user namespace, and who runs in it is mapped.
fn check_user_namespace(pod: &Pod, container: &CreateContainerRequest) -> Result<(), SpecError> {
    let new = is_new(container, NamespaceType::USER);
    let joins = find(&container.namespaces, NamespaceType::USER).is_some_and(|user| user.sandbox);
    let sandboxs = pod.users.as_ref().filter(|_| joins);
    for (mappings, sandboxs, field) in [
        (&container.uid_mappings, sandboxs.map(|users| &users.uids), "linux.uidMappings"),
        (&container.gid_mappings, sandboxs.map(|users| &users.gids), "linux.gidMappings"),
    ] {
        if let Some(sandboxs) = sandboxs.filter(|sandboxs| !mappings.is_empty() && *sandboxs != mappings) {
            let map = |map: &IdMapping| format!("{}:{}:{}", map.container_id, map.host_id, map.size);
            let sandboxs: Vec<String> = sandboxs.iter().map(map).collect();
            let problem = format!("must be those of the sandbox, {}", sandboxs.join(", "));
            return Err(SpecError::field(field, problem));
        }
        if !new && sandboxs.is_none() && !mappings.is_empty() {
            return Err(SpecError::field(field, "needs a new \"user\" namespace in linux.namespaces"));
        }
        if new && !is_mapped(mappings, 0) {
            return Err(SpecError::field(
                field,
                "must map id 0 of the container, which owns what is mounted in its user namespace",
            ));
        }
    }
    if new {
        check_user(container, container.process.user.get_or_default())?;
    }
    Ok(())
}

fn check_user(container: &CreateContainerRequest, user: &User) -> Result<(), SpecError> {
    let unmapped = |field: String, id: u32, list: &str| {
        Err(SpecError::field(field, format!("{id} is not mapped by {list}")))
    };
    if !is_mapped(&container.uid_mappings, user.uid) {
        return unmapped("process.user.uid".into(), user.uid, "linux.uidMappings");
    }
    if !is_mapped(&container.gid_mappings, user.gid) {
        return unmapped("process.user.gid".into(), user.gid, "linux.gidMappings");
    }
    for (n, gid) in user.additional_gids.iter().enumerate() {
        if !is_mapped(&container.gid_mappings, *gid) {
            return unmapped(format!("process.user.additionalGids[{n}]"), *gid, "linux.gidMappings");
        }
    }
    Ok(())
}

fn time_offsets(
    offsets: &Option<HashMap<String, oci::LinuxTimeOffset>>,
) -> Result<Vec<TimeOffset>, SpecError> {
    let mut out = Vec::new();
    for (clock, offset) in offsets.iter().flatten() {
        let at = format!("linux.timeOffsets[{clock:?}]");
        if !["monotonic", "boottime"].contains(&clock.as_str()) {
            return Err(SpecError::field(at, "must be of the clock \"monotonic\" or \"boottime\""));
        }
        let nanosecs = offset.nanosecs().unwrap_or(0);
        if nanosecs >= 1_000_000_000 {
            return Err(SpecError::field(
                format!("{at}.nanosecs"),
                format!("must be below 1000000000, is {nanosecs}"),
            ));
        }
        let secs = offset.secs().unwrap_or(0);
        out.push(TimeOffset { clock: clock.clone(), secs, nanosecs, ..Default::default() });
    }
    // The map has no order of its own.
    out.sort_by(|a, b| a.clock.cmp(&b.clock));
    Ok(out)
}
