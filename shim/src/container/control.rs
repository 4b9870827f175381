//! What is done with a container as a whole while it runs: it is paused, its
//! limits are changed, what it uses is told, and what it lacked.

use std::{
    sync::{Arc, PoisonError, atomic::Ordering},
    time::Duration,
};

use containerd_shim_protos::events::task::{TaskOOM, TaskPaused, TaskResumed};
use protobuf::well_known_types::any::Any;

use super::{Container, log_not_applied};
use crate::{error::Error, metrics, process::Phase, spec, state};

/// Between two events that tell of memory that ran out: a container may start
/// anew what is killed, for ever.
const OOM_EVENT_INTERVAL: Duration = Duration::from_millis(100);

impl Container {
    /// Whether its processes stand still.
    pub fn is_paused(&self) -> bool {
        self.paused.load(Ordering::Relaxed)
    }

    /// Refuses what only a container that runs, and is or is not paused, can do.
    fn check_paused(&self, wanted: bool, doing: &str) -> Result<(), Error> {
        let state = match self.init.phase() {
            Phase::Created => "created",
            Phase::Stopped(_) => "stopped",
            Phase::Running if self.is_paused() == wanted => return Ok(()),
            Phase::Running if wanted => "running",
            Phase::Running => "paused",
        };
        Err(Error::FailedPrecondition(format!("cannot {doing} a {state} container")))
    }

    /// Stops its processes where they are.
    pub async fn pause(&self) -> Result<(), Error> {
        let _changing = self.changing.lock().await;
        self.check_paused(false, "pause")?;
        self.sandbox.agent().pause(&self.id).await?;
        self.paused.store(true, Ordering::Relaxed);
        self.events.publish(TaskPaused { container_id: self.id.clone(), ..Default::default() });
        self.sandbox.set_phase(&self.id, state::Phase::Paused);
        Ok(())
    }

    /// Lets its processes go on.
    pub async fn resume(&self) -> Result<(), Error> {
        let _changing = self.changing.lock().await;
        self.check_paused(true, "resume")?;
        self.sandbox.agent().resume(&self.id).await?;
        self.sandbox.clock().resumed();
        self.paused.store(false, Ordering::Relaxed);
        self.events.publish(TaskResumed { container_id: self.id.clone(), ..Default::default() });
        self.sandbox.set_phase(&self.id, state::Phase::Running);
        Ok(())
    }

    /// Changes the limits that `json`, a `LinuxResources`, sets.
    pub async fn update(&self, json: &[u8]) -> Result<(), Error> {
        let (mut resources, not_applied) = spec::resources(json, &self.block_devices)?;
        if self.init.exited().is_some() {
            return Err(Error::FailedPrecondition("cannot update a stopped container".into()));
        }
        log_not_applied(&format!("{}/{} update", self.namespace, self.id), &not_applied);
        let _changing = self.changing.lock().await;
        // What is inside fits into what is around it all the time: the machine
        // grows before its container does, and shrinks after it.
        let update = self.sandbox.update_begun(&self.id, &resources).await?;
        resources.cpus = self.sandbox.guest_cpus(&resources.cpus);
        let updated = self.sandbox.agent().update(&self.id, resources).await;
        let told = self.sandbox.update_done(update, updated.is_ok()).await;
        updated?;
        Ok(told?)
    }

    /// What it has used, as containerd's clients read it.
    pub async fn stats(&self) -> Result<Any, Error> {
        Ok(metrics::encode(&self.sandbox.agent().stats(&self.id).await?))
    }

    /// Tells of processes killed for want of memory until the container is gone.
    pub(super) async fn watch_oom_kills(self: Arc<Self>) {
        loop {
            let known = *self.oom_kills.lock().unwrap_or_else(PoisonError::into_inner);
            match self.sandbox.agent().wait_oom(&self.id, known).await {
                Ok(kills) if kills > known => self.note_oom_kills(kills),
                Ok(kills) => return log::warn!("{}: the guest told {kills} kills for news", self.id),
                Err(error) => return log::debug!("{}: waiting for OOM kills: {error}", self.id),
            }
            tokio::time::sleep(OOM_EVENT_INTERVAL).await;
        }
    }

    /// Tells that there are more kills than were known, if so.
    pub(super) fn note_oom_kills(&self, kills: u64) {
        let mut known = self.oom_kills.lock().unwrap_or_else(PoisonError::into_inner);
        if kills > *known {
            *known = kills;
            self.publish_oom();
        }
    }

    /// Tells that something was killed for want of memory.
    pub(super) fn publish_oom(&self) {
        self.events.publish(TaskOOM { container_id: self.id.clone(), ..Default::default() });
    }
}
