//! What a specification says of the pod its container belongs to, in the
//! annotations of containerd's CRI plugin and of CRI-O.

use std::{
    collections::HashMap,
    path::{Path, PathBuf},
};

use nix::sys::statfs::{TMPFS_MAGIC, statfs};
use rvm_protocol::agent::{Namespace, NamespaceType};
use serde::Deserialize;

use super::{CONFIG_FILE, SpecError, Users, from_json, read};
use crate::{cgroup::DEFAULT_PERIOD_US, name};

/// `sandbox` or `container`, and the pod's id, as containerd and CRI-O write them.
pub(super) const KEYS: [(&str, &str); 2] = [
    ("io.kubernetes.cri.container-type", "io.kubernetes.cri.sandbox-id"),
    ("io.kubernetes.cri-o.ContainerType", "io.kubernetes.cri-o.SandboxID"),
];

/// What containerd says of a pod's resources with the container that holds it: the sum over its containers, as
/// kubelet reckons it.
const MEMORY: &str = "io.kubernetes.cri.sandbox-memory";
const CPU_QUOTA: &str = "io.kubernetes.cri.sandbox-cpu-quota";
const CPU_PERIOD: &str = "io.kubernetes.cri.sandbox-cpu-period";

/// What the containers of a pod will ask for, as far as that is said before they come.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Announced {
    /// Bytes of memory.
    pub memory: Option<u64>,
    /// CPUs that can be kept busy.
    pub cpus: Option<u64>,
}

impl Announced {
    /// What `annotations` say; of nothing and less nothing is said.
    pub(super) fn of(annotations: &HashMap<String, String>) -> Result<Self, SpecError> {
        let number = |key: &str| {
            let Some(text) = annotations.get(key).filter(|text| !text.is_empty()) else { return Ok(None) };
            let number: i64 = text.parse().map_err(|_| {
                SpecError::field(format!("annotations[{key:?}]"), format!("must be a number, is {text:?}"))
            })?;
            Ok(u64::try_from(number).ok().filter(|number| *number > 0))
        };
        let period = number(CPU_PERIOD)?.unwrap_or(DEFAULT_PERIOD_US);
        let cpus = number(CPU_QUOTA)?.map(|quota| quota.div_ceil(period));
        Ok(Self { memory: number(MEMORY)?, cpus })
    }
}

/// What a container is to its sandbox.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum Role {
    /// It has one of its own.
    #[default]
    Alone,
    /// It holds a pod's: others will join it.
    Sandbox,
    /// It joins one that runs.
    Member {
        /// The id of the container that holds it.
        sandbox: String,
    },
}

impl Role {
    /// What `annotations` say.
    pub(super) fn of(annotations: &HashMap<String, String>) -> Result<Self, SpecError> {
        for (kind, id) in KEYS {
            let at = |key: &str| format!("annotations[{key:?}]");
            match annotations.get(kind).map(String::as_str) {
                None | Some("") => {}
                Some("sandbox") => return Ok(Self::Sandbox),
                Some("container") => {
                    let sandbox = annotations.get(id).filter(|id| !id.is_empty()).ok_or_else(|| {
                        SpecError::field(
                            at(id),
                            format!("is missing; it names the sandbox that {kind} tells of"),
                        )
                    })?;
                    name::check("the sandbox", sandbox)
                        .map_err(|error| SpecError::field(at(id), error.to_string()))?;
                    return Ok(Self::Member { sandbox: sandbox.clone() });
                }
                Some(other) => {
                    let problem = format!("must be \"sandbox\" or \"container\", is {other:?}");
                    return Err(SpecError::field(at(kind), problem));
                }
            }
        }
        Ok(Self::Alone)
    }
}

/// Files of a pod in `/etc` of its containers.
pub const HOST_FILES: [&str; 3] = ["hostname", "hosts", "resolv.conf"];

/// What a specification may refer to in the sandbox its container comes to.
#[derive(Clone, Debug, Default)]
pub struct Pod {
    /// The process on the host that the sandbox's own namespaces are found by.
    pub monitor: Option<u32>,
    /// The containers in it.
    pub neighbours: Vec<Neighbour>,
    /// What the containers' `/dev/shm` is on the host, where they share one.
    pub shm: Option<Shm>,
    /// Device and inode of the sandbox's network namespace on the host.
    pub network: Option<(u64, u64)>,
    /// The sandbox's user namespace, where it has one.
    pub users: Option<Users>,
    /// Whether the sandbox has a pid namespace that its containers share.
    pub shared_pid: bool,
    /// Which namespaces that somebody has made on the host for a pod are taken for the sandbox's.
    pub pinned: Pinned,
    /// Where [`HOST_FILES`] are on the host, where no client makes them.
    pub files: Option<PathBuf>,
}

/// Namespaces that CRI-O has made for a pod on the host before its first container, and keeps at paths of their own
/// (`/var/run/ipcns/...`). Nothing of the host is in them; the sandbox has its own in their place.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum Pinned {
    /// None are taken.
    #[default]
    Refused,
    /// Any: the sandbox is being made.
    Any,
    /// Those it was made with.
    Those(Vec<HostNamespace>),
}

impl Pinned {
    /// Whether one may be named.
    pub(super) fn any(&self) -> bool {
        match self {
            Self::Refused => false,
            Self::Any => true,
            Self::Those(known) => !known.is_empty(),
        }
    }
}

/// A namespace of the host's kernel.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct HostNamespace {
    /// Its type.
    pub kind: NamespaceType,
    /// Its device and inode.
    pub identity: (u64, u64),
}

/// A container in the same sandbox.
#[derive(Clone, Debug)]
pub struct Neighbour {
    /// The pid it is known by on the host.
    pub pid: u32,
    /// Its first process's in the guest.
    pub guest_pid: u32,
    /// Its namespaces.
    pub namespaces: Vec<Namespace>,
}

impl Pod {
    /// The namespace that `/proc/PID/ns/...` of the host stands for; `None` where
    /// nothing of the sandbox has that pid.
    pub(super) fn namespace(&self, pid: u32, kind: NamespaceType, link: &str) -> Option<Namespace> {
        let of =
            |path: String, sandbox| Namespace { type_: kind.into(), path, sandbox, ..Default::default() };
        if self.monitor == Some(pid) {
            let held = is_sandboxs(kind)
                || kind == NamespaceType::PID && self.shared_pid
                || kind == NamespaceType::USER && self.users.is_some();
            return held.then(|| of(String::new(), true));
        }
        let neighbour = self.neighbours.iter().find(|neighbour| neighbour.pid == pid)?;
        let its = neighbour.namespaces.iter().find(|namespace| namespace.type_ == kind.into());
        Some(match its {
            Some(joined) if joined.sandbox || !joined.path.is_empty() => joined.clone(),
            // A new one, or the guest's.
            _ => of(format!("/proc/{}/ns/{link}", neighbour.guest_pid), false),
        })
    }
}

/// Whether the agent holds a namespace of this type for a sandbox's containers.
pub(super) fn is_sandboxs(kind: NamespaceType) -> bool {
    matches!(kind, NamespaceType::NETWORK | NamespaceType::IPC | NamespaceType::UTS)
}

/// A pod's `/dev/shm` on the host, in whose place its containers share the guest's.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Shm {
    /// Where it is.
    pub source: PathBuf,
    /// Its size.
    pub bytes: u64,
}

impl Shm {
    /// Where containers find it.
    pub(super) const DESTINATION: &str = "/dev/shm";

    /// What is at `source`, where that is a tmpfs made for a pod and not the host's
    /// own.
    pub(super) fn at(source: &Path) -> Option<Self> {
        let found = statfs(source).ok().filter(|found| found.filesystem_type() == TMPFS_MAGIC)?;
        if source == Path::new(Self::DESTINATION) {
            return None;
        }
        let size = u64::try_from(found.block_size()).ok()?;
        Some(Self { source: source.to_owned(), bytes: found.blocks().saturating_mul(size) })
    }
}

/// The role of the container in the bundle `dir`, of whose specification nothing
/// else is looked at; alone where there is none.
pub fn role_in(dir: &Path) -> Result<Role, SpecError> {
    #[derive(Deserialize)]
    struct Annotated {
        #[serde(default)]
        annotations: Option<HashMap<String, String>>,
    }
    let text = match read(dir) {
        Err(SpecError::Read { source, .. }) if source.kind() == std::io::ErrorKind::NotFound => {
            return Ok(Role::Alone);
        }
        text => text?,
    };
    let found: Annotated = from_json(CONFIG_FILE, &text)?;
    Role::of(&found.annotations.unwrap_or_default())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn role(annotations: &[(&str, &str)]) -> Result<Role, String> {
        let annotations = annotations.iter().map(|(key, value)| ((*key).into(), (*value).into())).collect();
        Role::of(&annotations).map_err(|error| error.to_string())
    }

    #[test]
    fn both_kinds_of_annotations_are_read() {
        for (kind, id) in KEYS {
            assert_eq!(role(&[(kind, "sandbox"), (id, "pod")]).unwrap(), Role::Sandbox);
            assert_eq!(
                role(&[(kind, "container"), (id, "pod")]).unwrap(),
                Role::Member { sandbox: "pod".into() }
            );
            let error = role(&[(kind, "container")]).unwrap_err();
            assert!(error.starts_with(&format!("annotations[{id:?}]: is missing")), "{error}");
            let error = role(&[(kind, "container"), (id, "../pod")]).unwrap_err();
            assert!(
                error.starts_with(&format!("annotations[{id:?}]: the sandbox: \"../pod\" must be")),
                "{error}"
            );
            let error = role(&[(kind, "vm")]).unwrap_err();
            assert!(error.starts_with(&format!("annotations[{kind:?}]: must be")), "{error}");
        }
        assert_eq!(role(&[("io.kubernetes.cri.sandbox-id", "pod")]).unwrap(), Role::Alone);
    }

    #[test]
    fn what_a_pod_will_use_is_read() {
        let of = |annotations: &[(&str, &str)]| {
            let annotations =
                annotations.iter().map(|(key, value)| ((*key).into(), (*value).into())).collect();
            Announced::of(&annotations).map_err(|error| error.to_string())
        };
        assert_eq!(of(&[]).unwrap(), Announced::default());
        let said = of(&[(MEMORY, "1073741824"), (CPU_QUOTA, "250000"), (CPU_PERIOD, "100000")]).unwrap();
        assert_eq!(said, Announced { memory: Some(1 << 30), cpus: Some(3) });
        assert_eq!(of(&[(CPU_QUOTA, "150000")]).unwrap().cpus, Some(2));
        // As containerd writes that there is no limit.
        assert_eq!(of(&[(MEMORY, "0"), (CPU_QUOTA, "-1"), (CPU_PERIOD, "0")]).unwrap(), Announced::default());
        let error = of(&[(MEMORY, "1Gi")]).unwrap_err();
        assert_eq!(error, format!("annotations[{MEMORY:?}]: must be a number, is \"1Gi\""));
        assert!(of(&[(CPU_QUOTA, "9223372036854775808")]).is_err());
    }

    #[test]
    fn a_bundle_is_looked_at_for_nothing_else() {
        let dir = tempfile::tempdir().unwrap();
        assert_eq!(role_in(dir.path()).unwrap(), Role::Alone);
        std::fs::write(
            dir.path().join(CONFIG_FILE),
            r#"{"ociVersion": 7, "annotations": {"io.kubernetes.cri.container-type": "container",
                "io.kubernetes.cri.sandbox-id": "pod"}}"#,
        )
        .unwrap();
        assert_eq!(role_in(dir.path()).unwrap(), Role::Member { sandbox: "pod".into() });
        std::fs::write(dir.path().join(CONFIG_FILE), "{").unwrap();
        assert!(role_in(dir.path()).is_err());
    }
}
