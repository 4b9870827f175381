//! A container and its processes.
//!
//! Where to read on: [`create`] is the sequence that makes a container,
//! [`enter`] the one that adds a process to it, [`child`] what both share.

pub mod attributes;
pub mod capabilities;
pub mod cgroup;
pub mod child;
pub mod create;
pub mod devices;
pub mod enter;
pub mod hooks;
pub mod keyring;
pub mod mounts;
pub mod namespaces;
pub mod paths;
pub mod process;
pub mod program;
pub mod rootfs;
pub mod seccomp;
pub mod shared;
pub mod sysctl;
pub mod terminal;
pub mod user;
pub mod userns;

use std::{
    collections::HashMap,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use nix::sys::signal::Signal;
use rvm_protocol::agent;
use tokio::{sync::watch, time::timeout};

use self::{
    cgroup::{Cgroup, limits::Limits, stats},
    child::Common,
    create::Plan,
    process::Process,
};
use crate::{
    channel,
    error::{Error, Step, StepError, StepResult},
    io::{ChildEnds, Streams},
    reaper::{ExitReceiver, Reaper, ended},
    storage::Scratch,
    sys::process::adopt,
};

/// How long a killed process may take to end. Only one that waits in the kernel
/// for a device or a file system that does not answer takes any time at all.
const DEATH_LIMIT: Duration = Duration::from_secs(30);

/// One container.
#[derive(Debug)]
pub struct Container {
    id: String,
    cgroup: Cgroup,
    own_pids: bool,
    common: Arc<Common>,
    scratch: Arc<Scratch>,
    first: Arc<Process>,
    added: Mutex<HashMap<String, Added>>,
    removed: watch::Sender<bool>,
}

/// A process added by `CreateExec`.
#[derive(Debug)]
struct Added {
    process: Arc<Process>,
    /// Until it is started.
    ends: Option<ChildEnds>,
}

/// The first process of a container on its way to being ready.
#[derive(Debug)]
pub struct Preparing {
    channel: channel::Parent,
    /// Whether another child goes on in its place.
    moves: bool,
    exit: ExitReceiver,
}

/// Waits until a process waits before `execve`. Only then, or when it never
/// will, is it known whose end its end is.
async fn get_ready(
    process: &Process,
    preparing: Preparing,
    reaper: &Reaper,
) -> (StepResult<()>, ExitReceiver) {
    let Preparing { channel, moves, mut exit } = preparing;
    let adopt = |pid| {
        // Before any `await`: until then the process is there, even if it has ended.
        let child = adopt(pid).step(|| "find the process that was created")?;
        exit = reaper.watch(pid);
        Ok(child)
    };
    let ready = process.ready(channel, moves, adopt).await;
    (ready, exit)
}

impl Container {
    /// Makes a container's cgroup and first process. The process still has to
    /// become [`ready`](Self::ready).
    pub fn create(
        id: &str,
        plan: &Plan,
        scratch: Arc<Scratch>,
        reaper: &Reaper,
    ) -> Result<(Arc<Self>, Preparing), Error> {
        let (streams, ends) = Streams::new(plan.process())?;
        let cgroup = Cgroup::create(plan.cgroup_path())?;
        let limited =
            plan.limits().apply(&cgroup).and_then(|()| Ok(cgroup.limit_above(plan.pids_max_above())?));
        let (child, channel) = match limited.and_then(|()| Ok(plan.spawn(&cgroup, &ends)?)) {
            Ok(spawned) => spawned,
            Err(error) => {
                // The cgroup is as new as it is empty; the error at hand is the one to tell.
                let _ = cgroup.remove();
                return Err(error);
            }
        };
        let exit = reaper.watch(child.pid);
        let first = Arc::new(Process::new(plan.process().clone(), streams));
        first.spawned(child, plan.moves());
        let container = Arc::new(Self {
            id: id.to_owned(),
            cgroup,
            own_pids: plan.has_own_pids(),
            common: Arc::clone(plan.common()),
            scratch,
            first,
            added: Mutex::default(),
            removed: watch::Sender::new(false),
        });
        Ok((container, Preparing { channel, moves: plan.moves(), exit }))
    }

    /// The end of the first process is the end of the container: of a pid
    /// namespace of its own the kernel sees to that, else we do.
    async fn end_with_first(self: Arc<Self>, exit: ExitReceiver) {
        let Some(exit) = ended(exit).await else { return };
        if !self.own_pids
            && let Err(error) = self.kill_all().await
        {
            log::error!("container {}: {error}", self.id);
        }
        self.first.set_exited(exit);
    }

    async fn kill_all(&self) -> StepResult<()> {
        self.cgroup.kill()?;
        match timeout(DEATH_LIMIT, self.cgroup.empty()).await {
            Ok(empty) => empty,
            Err(_) => Err(StepError::Refused(format!(
                "killed processes are still there after {} s: {}",
                DEATH_LIMIT.as_secs(),
                self.cgroup.describe_processes()
            ))),
        }
    }

    /// As [`kill_all`](Self::kill_all), and until the first process is collected.
    async fn end(&self) -> StepResult<()> {
        self.kill_all().await?;
        let ended = timeout(DEATH_LIMIT, self.first.wait()).await;
        ended.map(drop).map_err(|_| {
            let reason = "its first process, which was killed, is still there";
            StepError::Refused(format!("{reason} after {} s", DEATH_LIMIT.as_secs()))
        })
    }

    fn added(&self) -> MutexGuard<'_, HashMap<String, Added>> {
        // One thread: a poisoned lock means a panic, and that rebooted the VM.
        self.added.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits until the first process waits before `execve`.
    pub async fn ready(self: &Arc<Self>, preparing: Preparing, reaper: &Reaper) -> StepResult<()> {
        let (ready, exit) = get_ready(&self.first, preparing, reaper).await;
        let ready = ready.map_err(|error| match self.cgroup.oom_kills() {
            0 => error,
            _ => StepError::Refused(
                "linux.resources.memory.limit: is too low: there was no memory to create the container"
                    .into(),
            ),
        });
        tokio::spawn(Arc::clone(self).end_with_first(exit));
        ready
    }

    /// The first process, or the one added as `exec_id`.
    pub fn process(&self, exec_id: &str) -> Result<Arc<Process>, Error> {
        if exec_id.is_empty() {
            return Ok(Arc::clone(&self.first));
        }
        match self.added().get(exec_id) {
            Some(added) => Ok(Arc::clone(&added.process)),
            None => Err(Error::NotFound(format!("no such exec: {exec_id:?} in container {:?}", self.id))),
        }
    }

    /// Registers a process to be added. One that names no capabilities has those
    /// of the first process.
    pub fn add(&self, exec_id: &str, mut spec: agent::Process) -> Result<(), Error> {
        if self.first.exited().is_some() {
            return Err(Error::Precondition(format!("container {:?} has stopped", self.id)));
        }
        if self.added().contains_key(exec_id) {
            return Err(Error::AlreadyExists(format!("exec {exec_id:?} exists in container {:?}", self.id)));
        }
        if let Some(ids) = &self.common.ids {
            ids.check_user("process.user", &spec.user)?;
        }
        if spec.capabilities.is_none() {
            spec.capabilities = self.first.spec.capabilities.clone();
        }
        let (streams, ends) = Streams::new(&spec)?;
        let process = Arc::new(Process::new(spec, streams));
        self.added().insert(exec_id.to_owned(), Added { process, ends: Some(ends) });
        Ok(())
    }

    /// Runs the program of a process. Returns its pid in the guest's root pid namespace.
    pub async fn start(&self, exec_id: &str, reaper: &Reaper) -> Result<u32, Error> {
        let process = self.process(exec_id)?;
        if !exec_id.is_empty() {
            if self.first.is_preparing() {
                return Err(Error::Precondition(format!("container {:?} is being created", self.id)));
            }
            if self.cgroup.is_frozen() {
                return Err(Error::Precondition(format!("container {:?} is paused", self.id)));
            }
            let ends = self.added().get_mut(exec_id).and_then(|added| added.ends.take());
            let ends = ends
                .ok_or_else(|| Error::Precondition(format!("exec {exec_id:?} has been started already")))?;
            let preparing = self.spawn_added(&process, ends, reaper)?;
            let (ready, exit) = get_ready(&process, preparing, reaper).await;
            let ending = Arc::clone(&process);
            tokio::spawn(async move {
                if let Some(exit) = ended(exit).await {
                    ending.set_exited(exit);
                }
            });
            ready?;
        }
        process.start().await
    }

    fn spawn_added(&self, process: &Process, ends: ChildEnds, reaper: &Reaper) -> Result<Preparing, Error> {
        let stopped = || Error::Precondition(format!("container {:?} has stopped", self.id));
        let spawned = self
            .first
            .with_child(|first| enter::spawn_into(first, &self.cgroup, &process.spec, &self.common, &ends));
        let (child, channel) = spawned.ok_or_else(stopped)??;
        let exit = reaper.watch(child.pid);
        process.spawned(child, true);
        Ok(Preparing { channel, moves: true, exit })
    }

    /// Sends a signal to one process, or to all of the container.
    pub fn signal(&self, exec_id: &str, signal: i32, all: bool) -> Result<(), Error> {
        let process = self.process(exec_id)?;
        if !all {
            return process.signal(signal);
        }
        if signal == Signal::SIGKILL as i32 {
            return Ok(self.cgroup.kill()?);
        }
        for pid in self.cgroup.processes()? {
            // SAFETY: kill(2) takes integers. One that ended meanwhile needs no signal.
            unsafe { libc::kill(pid.as_raw(), signal) };
        }
        Ok(())
    }

    /// The container's processes, with the exec id of those that were added.
    pub fn processes(&self) -> Result<Vec<agent::ProcessInfo>, Error> {
        let added: HashMap<i32, String> = self
            .added()
            .iter()
            .filter_map(|(exec_id, added)| Some((added.process.pid()?.as_raw(), exec_id.clone())))
            .collect();
        let info = |pid: nix::unistd::Pid| agent::ProcessInfo {
            pid: pid.as_raw().unsigned_abs(),
            exec_id: added.get(&pid.as_raw()).cloned().unwrap_or_default(),
            ..Default::default()
        };
        Ok(self.cgroup.processes()?.into_iter().map(info).collect())
    }

    /// Stops its processes where they are.
    pub async fn pause(&self) -> Result<(), Error> {
        if self.first.pid().is_none() || self.first.is_preparing() || self.first.is_created() {
            return Err(Error::Precondition(format!("container {:?} is not running", self.id)));
        }
        Ok(self.cgroup.freeze().await?)
    }

    /// Lets its processes go on.
    pub fn resume(&self) -> Result<(), Error> {
        Ok(self.cgroup.thaw()?)
    }

    /// Changes its limits that are set.
    pub fn update(&self, resources: &agent::Resources) -> Result<(), Error> {
        Limits::plan("resources", resources, &self.scratch)?.update(&self.cgroup)
    }

    /// Where what it writes goes.
    pub fn scratch(&self) -> &Scratch {
        &self.scratch
    }

    /// What it has used.
    pub fn stats(&self) -> Result<agent::ContainerStats, Error> {
        let networks = self.first.pid().map(stats::networks).transpose()?.unwrap_or_default();
        Ok(agent::ContainerStats { files: self.cgroup.stats(), networks, ..Default::default() })
    }

    /// How many of its processes the kernel has killed for want of memory.
    pub fn oom_kills(&self) -> u64 {
        self.cgroup.oom_kills()
    }

    /// Waits until that are more than `known`.
    pub async fn more_oom_kills(&self, known: u64) -> Result<u64, Error> {
        let mut removed = self.removed.subscribe();
        tokio::select! {
            kills = self.cgroup.more_oom_kills(known) => Ok(kills?),
            _ = removed.wait_for(|removed| *removed) => {
                Err(Error::NotFound(format!("container {:?} was removed", self.id)))
            }
        }
    }

    /// Forgets an added process that has ended, was never started, or could not be.
    pub fn remove_added(&self, exec_id: &str) -> Result<(), Error> {
        let process = self.process(exec_id)?;
        if process.pid().is_some() {
            return Err(Error::Precondition(format!("exec {exec_id:?} is running")));
        }
        self.added().remove(exec_id);
        Ok(())
    }

    /// Whether it may be removed: it has stopped or has never been started.
    pub fn check_removable(&self) -> Result<(), Error> {
        if self.first.exited().is_some() || self.first.is_created() {
            return Ok(());
        }
        Err(Error::Precondition(format!("container {:?} is running", self.id)))
    }

    /// Ends what is left of it and removes its cgroup.
    pub async fn remove(&self) -> StepResult<()> {
        // Not where it went before and what came after that failed.
        if self.cgroup.exists() {
            self.end().await?;
            self.cgroup.remove()?;
        }
        self.removed.send_replace(true);
        Ok(())
    }
}
