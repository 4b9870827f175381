//! The OCI runtime specification's JSON, checked and turned into the agent's
//! messages.
//!
//! Nothing else parses it. Every field of a spec ends in one of three ways:
//! it becomes part of a message, it is refused with an error that names it, or
//! it is listed in [`Bundle::not_applied`] (see docs/decisions/0603).

mod disks;
mod empty_dir;
mod hooks;
mod labels;
mod linux;
mod memory_volume;
mod mounts;
mod namespaces;
mod pod;
mod pod_config;
mod process;
pub(crate) mod resources;
mod scheduling;
mod submounts;
#[cfg(test)]
mod tests;
mod writes;

use std::{
    collections::HashMap,
    fs, io,
    path::{Path, PathBuf},
};

use oci_spec::runtime::Spec;
use rvm_protocol::agent::{CreateContainerRequest, Device, NamespaceType, Process, Resources};
use serde::de::DeserializeOwned;
use serde_json::Value;

use crate::config::{Compat, Writes};

pub use disks::HostDisk;
pub use hooks::{Hook, HostHooks};
pub use labels::DEFAULT_PROFILES;
pub(crate) use mounts::MOUNT_OPTIONS;
pub use mounts::Volume;
pub use namespaces::{HostNetwork, Users};
pub use pod::{Announced, HOST_FILES, HostNamespace, Neighbour, Pinned, Pod, Role, Shm, role_in};
pub use pod_config::PodConfig;
pub(crate) use process::CAPABILITIES;

/// Name of the specification in a bundle.
const CONFIG_FILE: &str = "config.json";
/// What every flag of sched_setattr(2) begins with in a specification.
const SCHEDULER_FLAG: &str = "SCHED_FLAG_";
/// Largest specification read: containerd's own limit for a message is 16 MiB.
const MAX_CONFIG_LEN: u64 = 16 << 20;

/// Why a specification is refused.
#[derive(Debug, thiserror::Error)]
pub enum SpecError {
    /// The file cannot be read.
    #[error("{}: {source}", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// Why not.
        #[source]
        source: io::Error,
    },
    /// Not JSON, or not of the specification's types.
    #[error("{what}: {field}: {source}")]
    Json {
        /// Which document.
        what: String,
        /// The field, or "." where none was reached.
        field: String,
        /// What the parser says.
        #[source]
        source: serde_json::Error,
    },
    /// A field whose value cannot be used.
    #[error("{field}: {problem}")]
    Field {
        /// Its path, for example `process.args[0]`.
        field: String,
        /// What is wrong and what would be right.
        problem: String,
    },
    /// A field that asks for something rvm does not do.
    #[error("{field}: not supported: {reason}")]
    Unsupported {
        /// Its path.
        field: String,
        /// Why, and what to do instead where there is something.
        reason: String,
    },
}

impl SpecError {
    fn field(field: impl Into<String>, problem: impl Into<String>) -> Self {
        Self::Field { field: field.into(), problem: problem.into() }
    }

    fn unsupported(field: impl Into<String>, reason: impl Into<String>) -> Self {
        Self::Unsupported { field: field.into(), reason: reason.into() }
    }
}

/// One container as its bundle describes it.
#[derive(Clone, Debug)]
pub struct Bundle {
    /// The bundle's directory.
    pub dir: PathBuf,
    /// The root file system where containerd hands over no mounts.
    pub root: PathBuf,
    /// What the container is to its sandbox.
    pub role: Role,
    /// What others will ask for that join it.
    pub announced: Announced,
    /// The `/dev/shm` it shares with others.
    pub shm: Option<Shm>,
    /// The user namespace that is to own what a sandbox made for it holds; none for the
    /// guest's.
    pub users: Option<Users>,
    /// The network namespace of the host that a sandbox made for it is to have; none
    /// where it gets a new one.
    pub network: Option<HostNetwork>,
    /// The namespaces of the host in whose place it has its own, where it holds a pod.
    pub pinned: Vec<HostNamespace>,
    /// What the agent is asked for; the process's streams are still unset.
    pub container: CreateContainerRequest,
    /// Whether `linux.cgroupsPath` names a unit of systemd's.
    pub systemd_cgroup: bool,
    /// What has to be in the container's part of the share.
    pub volumes: Vec<Volume>,
    /// Block devices of the host that the guest gets.
    pub disks: Vec<HostDisk>,
    /// What runs on the host when the container is created, started and deleted.
    pub hooks: HostHooks,
    /// The specification's version, for the state that hooks are given.
    pub oci_version: String,
    /// Where what it writes goes; see [`Bundle::settle_writes`].
    pub writes: Option<Writes>,
    /// The specification's annotations.
    pub annotations: HashMap<String, String>,
    /// Fields that were accepted and have no effect.
    pub not_applied: Vec<String>,
}

impl Bundle {
    /// Reads and checks `dir/config.json` for the container `id`.
    pub fn load(dir: &Path, id: &str, compat: &Compat) -> Result<Self, SpecError> {
        Self::load_in(&Pod::default(), dir, id, compat)
    }

    /// The same for a container that comes to a sandbox in which there are others.
    pub fn load_in(pod: &Pod, dir: &Path, id: &str, compat: &Compat) -> Result<Self, SpecError> {
        translate(dir, id, &from_json(CONFIG_FILE, &read(dir)?)?, compat, pod)
    }

    /// Checks a specification that has been read.
    pub fn parse(dir: &Path, id: &str, json: &[u8], compat: &Compat) -> Result<Self, SpecError> {
        let spec: Spec = from_json(CONFIG_FILE, json)?;
        translate(dir, id, &spec, compat, &Pod::default())
    }

    /// Refuses what the guest's `kernel` could not mount, before a machine is
    /// booted for it.
    pub fn check_file_systems(&self, kernel: &Path) -> Result<(), SpecError> {
        mounts::check_file_systems(&self.container, kernel)
    }
}

/// The specification in the bundle `dir`, as it is.
fn read(dir: &Path) -> Result<Vec<u8>, SpecError> {
    let path = dir.join(CONFIG_FILE);
    let read = |source| SpecError::Read { path: path.clone(), source };
    if fs::metadata(&path).map_err(read)?.len() > MAX_CONFIG_LEN {
        return Err(SpecError::field(
            path.display().to_string(),
            format!("must not be larger than {MAX_CONFIG_LEN} bytes"),
        ));
    }
    fs::read(&path).map_err(read)
}

/// The process of an exec, as containerd passes it.
pub fn exec_process(json: &[u8], compat: &Compat) -> Result<(Process, Vec<String>), SpecError> {
    let mut not_applied = Vec::new();
    let process = process::translate("process", &from_json("exec", json)?, compat, &mut not_applied)?;
    Ok((process, not_applied))
}

/// Limits a running container is to be given, as containerd passes them. The
/// `devices` are the container's.
pub fn resources(json: &[u8], devices: &[Device]) -> Result<(Resources, Vec<String>), SpecError> {
    let mut not_applied = Vec::new();
    let resources =
        resources::translate("resources", &from_json("update", json)?, devices, &mut not_applied)?;
    Ok((resources, not_applied))
}

fn from_json<T: DeserializeOwned>(what: &str, json: &[u8]) -> Result<T, SpecError> {
    let failed = |error: serde_path_to_error::Error<serde_json::Error>| SpecError::Json {
        what: what.to_owned(),
        field: error.path().to_string(),
        source: error.into_inner(),
    };
    // An array would be taken for a structure with the fields in order.
    if json.trim_ascii_start().first().is_some_and(|first| *first == b'[') {
        return Err(SpecError::field(what, "must be a JSON object, is an array"));
    }
    if json.windows(SCHEDULER_FLAG.len()).any(|text| text == SCHEDULER_FLAG.as_bytes()) {
        let mut document: Value =
            serde_path_to_error::deserialize(&mut serde_json::Deserializer::from_slice(json))
                .map_err(failed)?;
        rename_scheduler_flags(&mut document);
        return serde_path_to_error::deserialize(document).map_err(failed);
    }
    serde_path_to_error::deserialize(&mut serde_json::Deserializer::from_slice(json)).map_err(failed)
}

/// oci-spec 0.10 knows two of the specification's flags by other names.
fn rename_scheduler_flags(document: &mut Value) {
    let process = match document.get("process") {
        Some(_) => &mut document["process"],
        None => document,
    };
    let flags = process.pointer_mut("/scheduler/flags").and_then(Value::as_array_mut);
    for flag in flags.into_iter().flatten() {
        match flag.as_str() {
            Some("SCHED_FLAG_RESET_ON_FORK") => *flag = "SCHED_RESET_ON_FORK".into(),
            Some("SCHED_FLAG_DL_OVERRUN") => *flag = "SCHED_FLAG_D_L_OVERRUN".into(),
            _ => {}
        }
    }
}

fn translate(dir: &Path, id: &str, spec: &Spec, compat: &Compat, pod: &Pod) -> Result<Bundle, SpecError> {
    check_version(spec.version())?;
    refuse_other_platforms(spec)?;
    let mut not_applied = Vec::new();

    let process = spec
        .process()
        .as_ref()
        .ok_or_else(|| SpecError::field("process", "is missing; it says what the container runs"))?;
    let process = process::translate("process", process, compat, &mut not_applied)?;

    let root = spec
        .root()
        .as_ref()
        .ok_or_else(|| SpecError::field("root", "is missing; root.path names the root file system"))?;
    if root.path().as_os_str().is_empty() {
        return Err(SpecError::field("root.path", "is empty; it names the root file system"));
    }

    let mut container = CreateContainerRequest {
        container_id: id.to_owned(),
        process: Some(process).into(),
        hostname: text("hostname", spec.hostname().as_deref())?,
        domainname: text("domainname", spec.domainname().as_deref())?,
        ..Default::default()
    };
    let rootfs = container.rootfs.mut_or_insert_default();
    rootfs.share_path = id.to_owned();
    rootfs.readonly = root.readonly().unwrap_or(false);

    let linux = spec.linux().as_ref().ok_or_else(|| {
        SpecError::field("linux", "is missing; it holds at least the namespaces of a Linux container")
    })?;
    let (cgroup_path, systemd_cgroup) = linux::cgroup_path(id, linux.cgroups_path().as_deref())?;
    container.cgroup_path = cgroup_path;
    let mut disks = Vec::new();
    let annotations = spec.annotations().clone().unwrap_or_default();
    let role = Role::of(&annotations)?;
    let to_be = Pod { pinned: Pinned::Any, ..Pod::default() };
    let pod = if role == Role::Sandbox { &to_be } else { pod };
    linux::translate(linux, compat, pod, &mut container, &mut disks, &mut not_applied)?;
    for (name, field) in [(&container.hostname, "hostname"), (&container.domainname, "domainname")] {
        if !name.is_empty() && !namespaces::has(&container, NamespaceType::UTS) {
            return Err(SpecError::field(field, "needs a \"uts\" namespace in linux.namespaces"));
        }
    }
    let hooks = hooks::translate(spec, &dir.to_string_lossy(), &mut container)?;
    let announced = match role {
        Role::Sandbox => Announced::of(&annotations)?,
        Role::Alone | Role::Member { .. } => Announced::default(),
    };
    let mounts = spec.mounts().as_deref().unwrap_or_default();
    if role != Role::Alone {
        mounts::refuse_bidirectional(mounts)?;
    }
    let shm = match role {
        Role::Sandbox => mounts::shm(mounts),
        Role::Alone => None,
        Role::Member { .. } if pod.files.is_some() => mounts::shm_of_nobody(mounts),
        Role::Member { .. } => pod.shm.clone(),
    };
    let with_files;
    let mounts = match &pod.files {
        Some(files) if role != Role::Alone => {
            with_files = mounts::with_host_files(mounts, files);
            &with_files[..]
        }
        _ => mounts,
    };
    let from_host = mounts::translate(dir, mounts, shm.as_ref(), &mut container)?;
    let users = match role {
        Role::Sandbox => {
            namespaces::refuse_the_hosts(&container)?;
            namespaces::hold(&mut container.namespaces);
            namespaces::hold_users(linux, &mut container)
        }
        Role::Alone => namespaces::hold_network(&mut container),
        Role::Member { .. } => {
            namespaces::leave_users(&mut container);
            None
        }
    };
    for disk in from_host.disks {
        disks::add(&mut disks, disk);
    }

    Ok(Bundle {
        dir: dir.to_owned(),
        role,
        announced,
        shm,
        users,
        network: namespaces::host_network(linux),
        pinned: namespaces::pinned(linux),
        root: dir.join(root.path()),
        container,
        systemd_cgroup,
        volumes: from_host.volumes,
        disks,
        hooks,
        oci_version: spec.version().clone(),
        writes: writes::of(&annotations)?,
        annotations,
        not_applied,
    })
}

fn check_version(version: &str) -> Result<(), SpecError> {
    if version.starts_with("1.") {
        return Ok(());
    }
    Err(SpecError::field("ociVersion", format!("must be 1.x, is {version:?}")))
}

fn refuse_other_platforms(spec: &Spec) -> Result<(), SpecError> {
    for (present, field) in [
        (spec.windows().is_some(), "windows"),
        (spec.solaris().is_some(), "solaris"),
        (spec.zos().is_some(), "zos"),
    ] {
        if present {
            return Err(SpecError::unsupported(field, "containers are Linux containers"));
        }
    }
    if spec.vm().is_some() {
        return Err(SpecError::unsupported("vm", "the virtual machine is set up by rvm's own configuration"));
    }
    Ok(())
}

/// A string that ends up in a C string in the guest.
fn text(field: impl Into<String>, value: Option<&str>) -> Result<String, SpecError> {
    let value = value.unwrap_or_default();
    if value.contains('\0') {
        return Err(SpecError::field(field, "must not contain a NUL byte"));
    }
    Ok(value.to_owned())
}

/// A path as it goes to the guest.
fn path_text(field: &str, path: &Path) -> Result<String, SpecError> {
    text(field, path.to_str()).and_then(|text| match text.is_empty() && !path.as_os_str().is_empty() {
        true => Err(SpecError::field(field, "must be UTF-8")),
        false => Ok(text),
    })
}

/// A path that has to be absolute.
fn absolute_path(field: &str, path: &Path) -> Result<String, SpecError> {
    let text = path_text(field, path)?;
    if !path.is_absolute() {
        return Err(SpecError::field(field, format!("must be an absolute path, is {text:?}")));
    }
    Ok(text)
}
