//! `sandbox.json`: what a sandbox's directory says about it, for `rvmctl` and for
//! `delete` after its shim is gone.

use std::{
    fs, io,
    path::{Path, PathBuf},
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use nix::sys::signal::Signal;
use serde::{Deserialize, Serialize};

use crate::{process_id::ProcessId, timeline::Step};

/// The file's name in a sandbox's directory.
pub const FILE: &str = "sandbox.json";

/// One sandbox, as last written by its shim.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct State {
    /// The sandbox's id.
    pub id: String,
    /// containerd's namespace.
    pub namespace: String,
    /// What it is doing.
    pub phase: Phase,
    /// The bundle of the container it was started for.
    pub bundle: PathBuf,
    /// The process that runs it: a shim, or `rvmctl run`.
    pub shim: ProcessId,
    /// The monitor, once there is one.
    pub monitor: Option<ProcessId>,
    /// Milliseconds since the epoch.
    pub created_ms: u64,
    /// The guest's virtual CPUs.
    pub vcpus: u8,
    /// The guest's memory.
    pub memory_mib: u64,
    /// The monitor's cgroups.
    #[serde(default)]
    pub cgroups: crate::cgroup::Paths,
    /// The network namespace somebody else made for it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub network: Option<PathBuf>,
    /// How the start went so far.
    pub timeline: Vec<Step>,
    /// Fields of the specification that have no effect yet.
    #[serde(default)]
    pub not_applied: Vec<String>,
    /// Which of the host's ids the monitor has, in words ([`crate::ids::Ids`]).
    #[serde(default)]
    pub ids: String,
}

/// What a sandbox is doing.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Phase {
    /// Its guest is not ready yet.
    Starting,
    /// It has a container that is not started.
    Created,
    /// Its container was started.
    Running,
    /// Its container stands still.
    Paused,
    /// Its container has ended.
    Stopped,
}

impl State {
    /// Writes the file in `dir`; a reader sees the old or the new one whole.
    pub fn write(&self, dir: &Path) -> io::Result<()> {
        let json = serde_json::to_vec(self)?;
        let file = dir.join(FILE);
        let new = file.with_extension("new");
        fs::write(&new, json)?;
        fs::rename(&new, file)
    }

    /// Reads the file in `dir`.
    pub fn read(dir: &Path) -> io::Result<Self> {
        let json = fs::read(dir.join(FILE))?;
        Ok(serde_json::from_slice(&json)?)
    }

    /// How long the sandbox has been there.
    pub fn age(&self) -> Duration {
        since(self.created_ms)
    }

    /// Whether its shim and its monitor are there.
    pub fn is_alive(&self) -> bool {
        self.shim.is_alive() && self.monitor.is_none_or(|monitor| monitor.is_alive())
    }

    /// Kills what is left of its processes and waits until they are gone.
    pub fn kill(&self) {
        // The shim first: it would otherwise take the monitor's end for news.
        for process in [Some(self.shim), self.monitor].into_iter().flatten() {
            if process.pid == std::process::id() {
                continue;
            }
            if let Err(error) = process.kill_and_wait(Signal::SIGKILL, Duration::from_secs(5)) {
                log::warn!("killing process {}: {error}", process.pid);
            }
        }
    }
}

/// How long ago that was, in milliseconds since the epoch; nothing where it is to come.
pub(crate) fn since(epoch_ms: u64) -> Duration {
    let then = UNIX_EPOCH + Duration::from_millis(epoch_ms);
    SystemTime::now().duration_since(then).unwrap_or_default()
}

/// A sandbox found below the state directory.
#[derive(Clone, Debug)]
pub struct Found {
    /// Its directory.
    pub dir: PathBuf,
    /// What its file says, or why that cannot be read.
    pub state: Result<State, String>,
}

/// The sandboxes below `state_dir`, sorted by namespace and id.
pub fn list(state_dir: &Path) -> io::Result<Vec<Found>> {
    let mut found = Vec::new();
    for namespace in subdirectories(state_dir)? {
        // A namespace's directory goes with its last sandbox, any time.
        for dir in subdirectories(&namespace).unwrap_or_default() {
            match State::read(&dir) {
                Ok(state) => found.push(Found { dir, state: Ok(state) }),
                Err(_) if !dir.exists() => {}
                Err(error) => found.push(Found { dir, state: Err(error.to_string()) }),
            }
        }
    }
    found.sort_by(|a, b| a.dir.cmp(&b.dir));
    Ok(found)
}

fn subdirectories(dir: &Path) -> io::Result<Vec<PathBuf>> {
    let entries = match fs::read_dir(dir) {
        Ok(entries) => entries,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(error) => return Err(error),
    };
    Ok(entries
        .flatten()
        .filter(|entry| entry.file_type().is_ok_and(|kind| kind.is_dir()))
        .map(|entry| entry.path())
        .collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn state() -> State {
        State {
            id: "web".into(),
            namespace: "default".into(),
            phase: Phase::Running,
            bundle: "/b".into(),
            shim: ProcessId::of_self().unwrap(),
            monitor: None,
            created_ms: 1,
            vcpus: 1,
            memory_mib: 128,
            cgroups: Default::default(),
            network: None,
            timeline: vec![Step { name: "spec".into(), ms: 0.5 }],
            not_applied: vec![],
            ids: String::new(),
        }
    }

    #[test]
    fn what_is_written_is_listed() {
        let dir = tempfile::tempdir().unwrap();
        let sandbox = dir.path().join("default/web");
        fs::create_dir_all(&sandbox).unwrap();
        fs::create_dir_all(dir.path().join("other/broken")).unwrap();
        fs::write(dir.path().join("other/broken").join(FILE), "{").unwrap();
        state().write(&sandbox).unwrap();
        let found = list(dir.path()).unwrap();
        assert_eq!(found.len(), 2);
        assert_eq!(found[0].state.as_ref().unwrap(), &state());
        assert!(found[1].state.is_err());
        assert!(list(&dir.path().join("nothing")).unwrap().is_empty());
    }

    #[test]
    fn a_pid_used_by_somebody_else_is_not_alive() {
        let mut state = state();
        assert!(state.is_alive());
        state.shim.start_ticks += 1;
        assert!(!state.is_alive());
    }
}
