//! What a sandbox's directory says of it, for who looks at it from outside.

use std::{
    io,
    time::{SystemTime, UNIX_EPOCH},
};

use super::{Plan, SandboxDir, SandboxError};
use crate::{
    cgroup::HostCgroup,
    process_id::ProcessId,
    state::{self, Phase, State},
};

/// The sandbox's record. It goes with the directory.
pub(super) struct Record {
    state: State,
    dir: std::path::PathBuf,
}

impl Record {
    /// Writes the first one, before there is a monitor.
    pub(super) fn begin(plan: &Plan, dir: &SandboxDir, cgroup: &HostCgroup) -> Result<Self, SandboxError> {
        let failed = |source: io::Error| SandboxError::Directory { path: dir.path().to_owned(), source };
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        let state = State {
            id: plan.id.clone(),
            namespace: plan.namespace.clone(),
            phase: Phase::Starting,
            bundle: plan.bundle.clone(),
            shim: ProcessId::of_self().map_err(failed)?,
            monitor: None,
            created_ms: u64::try_from(now.as_millis()).unwrap_or(u64::MAX),
            vcpus: plan.size.vcpus,
            memory_mib: plan.size.memory_mib,
            cgroups: cgroup.paths().clone(),
            timeline: Vec::new(),
            not_applied: plan.not_applied.clone(),
        };
        state.write(dir.path()).map_err(failed)?;
        Ok(Self { state, dir: dir.path().to_owned() })
    }

    /// Changes it; a reader sees the old or the new one whole.
    pub(super) fn change(&mut self, change: impl FnOnce(&mut State)) {
        change(&mut self.state);
        if let Err(error) = self.state.write(&self.dir) {
            log::warn!("writing {}: {error}", self.dir.join(state::FILE).display());
        }
    }
}
