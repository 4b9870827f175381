//! Sandboxes of this host, as their directories below the state directory show
//! them.

use std::{
    fs::File,
    io,
    path::{Path, PathBuf},
    time::Duration,
};

use rvm_protocol::vmm::Metrics;
use rvm_shim::{
    state::{self, State},
    vmm,
};

/// How long a monitor may take to answer: it does so from its own thread,
/// whatever the guest does.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(2);

/// Why a sandbox cannot be shown.
#[derive(Debug, thiserror::Error)]
pub enum SandboxError {
    /// The state directory cannot be read.
    #[error("{}: {source}", path.display())]
    Read {
        /// What was read.
        path: PathBuf,
        /// Why not.
        #[source]
        source: io::Error,
    },
    /// There is none of this name.
    #[error("no sandbox {name} below {}", state_dir.display())]
    Unknown {
        /// As given.
        name: String,
        /// Where it was looked for.
        state_dir: PathBuf,
    },
    /// There are several.
    #[error("{name} could be any of {}", candidates.join(", "))]
    Ambiguous {
        /// As given.
        name: String,
        /// What would be right.
        candidates: Vec<String>,
    },
    /// The monitor does not do what it was asked.
    #[error("{id}: {reason}")]
    Monitor {
        /// The sandbox.
        id: String,
        /// What happened.
        reason: String,
    },
}

/// One sandbox.
#[derive(Clone, Debug)]
pub struct Sandbox {
    /// containerd's namespace.
    pub namespace: String,
    /// The id within it.
    pub id: String,
    /// Its directory.
    pub dir: PathBuf,
    /// What it says of itself, or why that cannot be read.
    pub state: Result<State, String>,
}

/// All sandboxes, sorted by namespace and id; none where there is no state
/// directory.
pub fn list(state_dir: &Path) -> Result<Vec<Sandbox>, SandboxError> {
    let found =
        state::list(state_dir).map_err(|source| SandboxError::Read { path: state_dir.to_owned(), source })?;
    let name = |path: Option<&Path>| Some(path?.file_name()?.to_string_lossy().into_owned());
    Ok(found
        .into_iter()
        .filter_map(|found| {
            Some(Sandbox {
                namespace: name(found.dir.parent())?,
                id: name(Some(&found.dir))?,
                dir: found.dir,
                state: found.state,
            })
        })
        .collect())
}

/// The sandbox `name` means: `NAMESPACE/ID`, or an id or the beginning of one
/// where that is unique.
pub fn find(state_dir: &Path, name: &str) -> Result<Sandbox, SandboxError> {
    choose(list(state_dir)?, state_dir, name)
}

fn choose(sandboxes: Vec<Sandbox>, state_dir: &Path, name: &str) -> Result<Sandbox, SandboxError> {
    let (namespace, id) = match name.split_once('/') {
        Some((namespace, id)) => (Some(namespace), id),
        None => (None, name),
    };
    let (exact, begun): (Vec<_>, Vec<_>) = sandboxes
        .into_iter()
        .filter(|sandbox| namespace.is_none_or(|namespace| sandbox.namespace == namespace))
        .filter(|sandbox| !id.is_empty() && sandbox.id.starts_with(id))
        .partition(|sandbox| sandbox.id == id);
    let mut candidates = if exact.is_empty() { begun } else { exact };
    match (candidates.pop(), candidates.is_empty()) {
        (None, _) => Err(SandboxError::Unknown { name: name.to_owned(), state_dir: state_dir.to_owned() }),
        (Some(sandbox), true) => Ok(sandbox),
        (Some(last), false) => Err(SandboxError::Ambiguous {
            name: name.to_owned(),
            candidates: candidates.iter().chain([&last]).map(Sandbox::full_name).collect(),
        }),
    }
}

impl Sandbox {
    /// `NAMESPACE/ID`.
    pub fn full_name(&self) -> String {
        format!("{}/{}", self.namespace, self.id)
    }

    /// The monitor's pid.
    pub fn monitor(&self) -> Result<u32, SandboxError> {
        let failed = |reason: String| SandboxError::Monitor { id: self.full_name(), reason };
        let state = self.state.as_ref().map_err(|error| failed(error.clone()))?;
        let monitor = state.monitor.filter(|monitor| monitor.is_alive());
        Ok(monitor.ok_or_else(|| failed("has no running monitor".into()))?.pid)
    }

    /// The monitor's counters.
    pub fn metrics(&self) -> Result<Metrics, SandboxError> {
        let failed = |reason: String| SandboxError::Monitor { id: self.full_name(), reason };
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .map_err(|error| failed(error.to_string()))?;
        let dir = File::open(&self.dir).map_err(|error| failed(error.to_string()))?;
        runtime.block_on(async {
            match tokio::time::timeout(ANSWER_TIMEOUT, vmm::metrics(&dir)).await {
                Ok(answer) => answer.map_err(|error| failed(error.to_string())),
                Err(_) => Err(failed(format!("no answer within {} s", ANSWER_TIMEOUT.as_secs()))),
            }
        })
    }
}

#[cfg(test)]
mod tests {
    use std::{
        fs,
        io::{BufRead, BufReader, Write},
        os::{fd::AsRawFd, unix::net::UnixListener},
        thread,
    };

    use rvm_protocol::vmm::Response;

    use super::*;

    fn state_dir(sandboxes: &[&str]) -> tempfile::TempDir {
        let dir = tempfile::tempdir().unwrap();
        for sandbox in sandboxes {
            fs::create_dir_all(dir.path().join(sandbox)).unwrap();
        }
        dir
    }

    #[test]
    fn ids_may_be_short_where_they_are_unique() {
        let dir = state_dir(&["default/web", "default/webshop", "k8s.io/web", "k8s.io/0123abcd"]);
        fs::write(dir.path().join("default/file"), "").unwrap();
        let find = |name: &str| find(dir.path(), name).map(|sandbox| sandbox.full_name());
        let error = |name: &str| find(name).unwrap_err().to_string();
        assert_eq!(find("default/web").unwrap(), "default/web");
        assert_eq!(find("webshop").unwrap(), "default/webshop");
        assert_eq!(find("webs").unwrap(), "default/webshop");
        assert_eq!(find("0123").unwrap(), "k8s.io/0123abcd");
        assert_eq!(error("web"), "web could be any of default/web, k8s.io/web");
        assert_eq!(error("db"), format!("no sandbox db below {}", dir.path().display()));
        assert_eq!(error("k8s.io/webs"), format!("no sandbox k8s.io/webs below {}", dir.path().display()));
        for name in ["", "/", "default/", "file", "../default/web"] {
            assert!(error(name).starts_with("no sandbox"), "{name}");
        }
    }

    #[test]
    fn no_state_directory_means_no_sandboxes() {
        assert!(list(Path::new("/nonexistent/rvm")).unwrap().is_empty());
        let error = list(Path::new("/dev/null")).unwrap_err().to_string();
        assert_eq!(error, "/dev/null: Not a directory (os error 20)");
    }

    #[test]
    fn metrics_come_over_the_control_socket_however_long_its_path() {
        let long = format!("default/{}", "x".repeat(120));
        let dir = state_dir(&[&long]);
        let sandbox = find(dir.path(), "x").unwrap();
        // As the monitor does: bound by a relative path.
        let handle = File::open(&sandbox.dir).unwrap();
        let path = format!("/proc/self/fd/{}/vmm.sock", handle.as_raw_fd());
        let listener = UnixListener::bind(path).unwrap();
        let server = thread::spawn(move || {
            let (mut stream, _) = listener.accept().unwrap();
            let mut line = String::new();
            BufReader::new(&stream).read_line(&mut line).unwrap();
            let metrics = Metrics { memory_bytes: 128 << 20, ..Metrics::default() };
            let mut answer = serde_json::to_vec(&Response::Metrics(metrics)).unwrap();
            answer.push(b'\n');
            stream.write_all(&answer).unwrap();
            line
        });
        assert_eq!(sandbox.metrics().unwrap().memory_bytes, 128 << 20);
        assert_eq!(server.join().unwrap(), "{\"request\":\"metrics\"}\n");
        // The listener is gone, its socket is not.
        let error = sandbox.metrics().unwrap_err().to_string();
        assert!(error.ends_with("Connection refused (os error 111)"), "{error}");
    }
}
