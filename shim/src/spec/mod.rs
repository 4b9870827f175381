//! The OCI runtime specification's JSON, checked and turned into the agent's
//! messages.
//!
//! Nothing else parses it. Every field of a spec ends in one of three ways:
//! it becomes part of a message, it is refused with an error that names it, or
//! it is listed in [`Bundle::not_applied`] (see docs/decisions/0603).

mod linux;
mod mounts;
mod process;
#[cfg(test)]
mod tests;

use std::{
    fs, io,
    path::{Path, PathBuf},
};

use oci_spec::runtime::Spec;
use rvm_protocol::agent::{CreateContainerRequest, Process};
use serde::de::DeserializeOwned;

pub use mounts::Volume;

/// Name of the specification in a bundle.
const CONFIG_FILE: &str = "config.json";
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
    /// What the agent is asked for; the process's streams are still unset.
    pub container: CreateContainerRequest,
    /// What has to be in the container's part of the share.
    pub volumes: Vec<Volume>,
    /// Fields that were accepted and have no effect yet.
    pub not_applied: Vec<String>,
}

impl Bundle {
    /// Reads and checks `dir/config.json` for the container `id`.
    pub fn load(dir: &Path, id: &str) -> Result<Self, SpecError> {
        let path = dir.join(CONFIG_FILE);
        let read = |source| SpecError::Read { path: path.clone(), source };
        if fs::metadata(&path).map_err(read)?.len() > MAX_CONFIG_LEN {
            return Err(SpecError::field(
                path.display().to_string(),
                format!("must not be larger than {MAX_CONFIG_LEN} bytes"),
            ));
        }
        let text = fs::read(&path).map_err(read)?;
        Self::parse(dir, id, &text)
    }

    /// Checks a specification that has been read.
    pub fn parse(dir: &Path, id: &str, json: &[u8]) -> Result<Self, SpecError> {
        let spec: Spec = from_json(CONFIG_FILE, json)?;
        translate(dir, id, &spec)
    }
}

/// The process of an exec, as containerd passes it.
pub fn exec_process(json: &[u8]) -> Result<(Process, Vec<String>), SpecError> {
    let mut not_applied = Vec::new();
    let process = process::translate("process", &from_json("exec", json)?, &mut not_applied)?;
    Ok((process, not_applied))
}

fn from_json<T: DeserializeOwned>(what: &str, json: &[u8]) -> Result<T, SpecError> {
    let deserializer = &mut serde_json::Deserializer::from_slice(json);
    serde_path_to_error::deserialize(deserializer).map_err(|error| SpecError::Json {
        what: what.to_owned(),
        field: error.path().to_string(),
        source: error.into_inner(),
    })
}

fn translate(dir: &Path, id: &str, spec: &Spec) -> Result<Bundle, SpecError> {
    check_version(spec.version())?;
    refuse_other_platforms(spec)?;
    let mut not_applied = Vec::new();

    let process = spec
        .process()
        .as_ref()
        .ok_or_else(|| SpecError::field("process", "is missing; it says what the container runs"))?;
    let process = process::translate("process", process, &mut not_applied)?;

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
    rootfs.share_path = format!("{id}/rootfs");
    rootfs.readonly = root.readonly().unwrap_or(false);

    let linux = spec.linux().as_ref().ok_or_else(|| {
        SpecError::field("linux", "is missing; it holds at least the namespaces of a Linux container")
    })?;
    linux::translate(linux, &mut container, &mut not_applied)?;
    let volumes =
        mounts::translate(dir, id, spec.mounts().as_deref().unwrap_or_default(), &mut container.mounts)?;

    Ok(Bundle { dir: dir.to_owned(), root: dir.join(root.path()), container, volumes, not_applied })
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
    if let Some(hooks) = spec.hooks() {
        #[allow(deprecated)]
        let kinds = [
            (hooks.prestart(), "prestart"),
            (hooks.create_runtime(), "createRuntime"),
            (hooks.create_container(), "createContainer"),
            (hooks.start_container(), "startContainer"),
            (hooks.poststart(), "poststart"),
            (hooks.poststop(), "poststop"),
        ];
        for (hooks, kind) in kinds {
            if hooks.as_ref().is_some_and(|hooks| !hooks.is_empty()) {
                return Err(SpecError::unsupported(
                    format!("hooks.{kind}"),
                    "this version runs no OCI hooks",
                ));
            }
        }
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
