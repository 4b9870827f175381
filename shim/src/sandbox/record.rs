//! What a sandbox's directory says of it, for who looks at it from outside.

use std::{
    collections::BTreeMap,
    fs, io,
    path::{Path, PathBuf},
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use serde::{Deserialize, Serialize};

use super::{Plan, SandboxDir, SandboxError};
use crate::{
    cgroup::HostCgroup,
    ids::Ids,
    process_id::ProcessId,
    state::{self, Phase, State},
};

/// Name of the directory with the records of the containers that have joined.
pub(super) const MEMBERS: &str = "containers";

/// A container that has joined a sandbox, as `containers/ID.json` tells of it.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Member {
    /// Its id.
    pub id: String,
    /// Its bundle.
    pub bundle: PathBuf,
    /// What it is doing.
    pub phase: Phase,
    /// The process on the host that stands for it.
    pub holder: ProcessId,
    /// Milliseconds since the epoch.
    pub created_ms: u64,
}

impl Member {
    /// Those of the sandbox in `dir`, sorted by id.
    pub fn list(dir: &Path) -> Vec<Self> {
        let files = fs::read_dir(dir.join(MEMBERS)).into_iter().flatten().flatten();
        let read = |path: PathBuf| serde_json::from_slice::<Self>(&fs::read(path).ok()?).ok();
        let mut found: Vec<_> = files
            .map(|entry| entry.path())
            .filter(|path| path.extension().is_some_and(|extension| extension == "json"))
            .filter_map(read)
            .collect();
        found.sort_by(|a, b| a.id.cmp(&b.id));
        found
    }

    /// How long it has been there.
    pub fn age(&self) -> Duration {
        state::since(self.created_ms)
    }

    fn write(&self, dir: &Path) -> io::Result<()> {
        let path = dir.join(MEMBERS).join(format!("{}.json", self.id));
        let new = path.with_extension("new");
        fs::write(&new, serde_json::to_vec(self)?)?;
        fs::rename(&new, path)
    }
}

fn now_ms() -> u64 {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    u64::try_from(now.as_millis()).unwrap_or(u64::MAX)
}

/// The sandbox's record. It goes with the directory.
pub(super) struct Record {
    state: State,
    members: BTreeMap<String, Member>,
    dir: PathBuf,
}

impl Record {
    /// Writes the first one, before there is a monitor.
    pub(super) fn begin(
        plan: &Plan,
        dir: &SandboxDir,
        cgroup: &HostCgroup,
        ids: &Ids,
    ) -> Result<Self, SandboxError> {
        let failed = |source: io::Error| SandboxError::Directory { path: dir.path().to_owned(), source };
        let state = State {
            id: plan.id.clone(),
            namespace: plan.namespace.clone(),
            phase: Phase::Starting,
            bundle: plan.bundle.clone(),
            shim: ProcessId::of_self().map_err(failed)?,
            monitor: None,
            created_ms: now_ms(),
            vcpus: plan.size.vcpus,
            memory_mib: plan.size.memory_mib,
            cgroups: cgroup.paths().clone(),
            network: plan.network.as_ref().map(|network| network.path.clone()),
            timeline: Vec::new(),
            not_applied: plan.not_applied.clone(),
            ids: ids.to_string(),
        };
        state.write(dir.path()).map_err(failed)?;
        Ok(Self { state, members: BTreeMap::new(), dir: dir.path().to_owned() })
    }

    /// Changes it; a reader sees the old or the new one whole.
    pub(super) fn change(&mut self, change: impl FnOnce(&mut State)) {
        change(&mut self.state);
        if let Err(error) = self.state.write(&self.dir) {
            log::warn!("writing {}: {error}", self.dir.join(state::FILE).display());
        }
    }
    /// Notes a container that joins; nobody but who looks from outside needs it.
    pub(super) fn add_member(&mut self, id: &str, bundle: &Path, holder: ProcessId) {
        let member = Member {
            id: id.to_owned(),
            bundle: bundle.to_owned(),
            phase: Phase::Created,
            holder,
            created_ms: now_ms(),
        };
        let dir = self.dir.join(MEMBERS);
        if let Err(error) = fs::create_dir_all(&dir).and_then(|()| member.write(&self.dir)) {
            log::warn!("{}: {error}", dir.display());
        }
        self.members.insert(id.to_owned(), member);
    }

    /// Changes what is said of one.
    pub(super) fn change_member(&mut self, id: &str, change: impl FnOnce(&mut Member)) {
        let Some(member) = self.members.get_mut(id) else { return };
        change(member);
        if let Err(error) = member.write(&self.dir) {
            log::warn!("{}: {error}", self.dir.join(MEMBERS).display());
        }
    }

    /// Forgets one.
    pub(super) fn remove_member(&mut self, id: &str) {
        if self.members.remove(id).is_some() {
            let _ = fs::remove_file(self.dir.join(MEMBERS).join(format!("{id}.json")));
        }
    }
}
