//! How a container's processes end: it is waited for, told once, and what is left of
//! them goes.

use std::{
    sync::{Arc, atomic::Ordering},
    time::Duration,
};

use containerd_shim_protos::events::task::TaskExit;
use rvm_protocol::agent::ExitStatus;
use tokio::time::{sleep, timeout};

use super::{Container, KILL_TIMEOUT};
use crate::{
    agent::process_ref,
    error::Error,
    events::timestamp,
    process::{Exit, Phase, Process},
    state,
};

/// Output that has not moved for this long after its process's end is held open
/// by another process, or nobody reads it.
const DRAIN_QUIET: Duration = Duration::from_millis(500);
/// The longest an exit waits for output.
const DRAIN_LIMIT: Duration = Duration::from_secs(10);
/// How long the first process's exit waits for those of the others, which end with
/// it.
const EXECS_LIMIT: Duration = Duration::from_secs(10);
/// Between two attempts to reach an agent whose connection was lost.
const RECONNECT_AFTER: Duration = Duration::from_millis(500);

impl Container {
    /// Forgets an ended exec and returns how it ended.
    pub async fn delete_exec(&self, exec_id: &str) -> Result<(u32, Exit), Error> {
        let process = self.process(exec_id)?;
        // One that is being started is deleted, or refused, when it is known what became of that.
        let _starting = process.starting.lock().await;
        let exit = match process.phase() {
            Phase::Running => {
                return Err(Error::FailedPrecondition(format!("exec {exec_id} is still running")));
            }
            Phase::Created => {
                // Who waits for it waits for nothing; it never ran, so there is
                // no exit to tell the others.
                let exit = Exit::now(0);
                process.set_exited(exit, || {});
                exit
            }
            Phase::Stopped(exit) => exit,
        };
        self.release_io(&process).await;
        self.execs().remove(exec_id);
        if let Err(error) = self.sandbox.agent().delete(&process_ref(&self.id, exec_id)).await
            && !error.is_not_found()
            && self.init.exited().is_none()
        {
            log::warn!("{}/{}: forgetting exec {exec_id}: {error}", self.namespace, self.id);
        }
        Ok((process.pid(), exit))
    }

    /// Makes sure that the container has ended and returns how. A container that
    /// was never started is ended by this; a running one is refused.
    pub async fn end(&self) -> Result<(u32, Exit), Error> {
        let exit = match self.init.phase() {
            Phase::Running => {
                return Err(Error::FailedPrecondition(format!(
                    "container {} is still running; it has to be stopped before it is deleted",
                    self.id
                )));
            }
            Phase::Created => {
                self.kill("", libc::SIGKILL as u32, true).await?;
                match timeout(KILL_TIMEOUT, self.init.wait()).await {
                    Ok(exit) => exit.unwrap_or_else(|| Exit::now(Exit::KILLED)),
                    Err(_) => {
                        self.sandbox.kill();
                        self.init.wait().await.unwrap_or_else(|| Exit::now(Exit::KILLED))
                    }
                }
            }
            Phase::Stopped(exit) => exit,
        };
        let execs: Vec<_> = self.execs().values().cloned().collect();
        for process in execs.iter().chain([&self.init]) {
            self.release_io(process).await;
        }
        Ok((self.init.pid(), exit))
    }

    /// Ends an exec of which it is not known whether it was started.
    pub(super) async fn give_up(self: Arc<Self>, process: Arc<Process>) {
        tokio::select! {
            () = self.kill_or_forget(&process) => {}
            _ = self.sandbox.ended() => {}
        }
        self.follow(process).await;
    }

    /// Sees to it that an exec does not run, however long the agent takes to answer.
    async fn kill_or_forget(&self, process: &Process) {
        let reference = process_ref(&self.id, &process.exec_id);
        loop {
            let agent = self.sandbox.agent();
            let error = match agent.signal(reference.clone(), libc::SIGKILL as u32, false).await {
                // It has not been started. Forgotten, it never will be.
                Err(error) if error.is_failed_precondition() => match agent.delete(&reference).await {
                    Err(error) => error,
                    Ok(()) => return,
                },
                Err(error) => error,
                Ok(()) => return,
            };
            log::debug!("{}/{} exec {}: {error}", self.namespace, self.id, process.exec_id);
            if !error.is_unanswered() && !error.is_failed_precondition() {
                return;
            }
            sleep(RECONNECT_AFTER).await;
        }
    }

    /// Delivers what is left of a process's output and lets go of its FIFOs.
    async fn release_io(&self, process: &Process) {
        if let Some(io) = process.io() {
            io.drain(DRAIN_QUIET, DRAIN_LIMIT).await;
        }
        process.drop_io();
    }

    /// Ends the container when somebody ends the process that stands for it.
    pub(super) async fn follow_holder(self: Arc<Self>) {
        tokio::select! {
            _ = self.init.wait() => return,
            () = self.holder.killed() => {}
        }
        if self.init.exited().is_none() {
            log::warn!("{}/{}: its process on the host was killed", self.namespace, self.id);
            if let Err(error) = self.kill("", libc::SIGKILL as u32, true).await {
                log::debug!("{}/{}: {error}", self.namespace, self.id);
            }
        }
    }

    /// Waits for a process's end and tells it, once: by the agent, or by the
    /// end of the machine.
    pub(super) async fn follow(self: Arc<Self>, process: Arc<Process>) {
        let mut label = format!("{}/{}", self.namespace, self.id);
        if !process.exec_id.is_empty() {
            label = format!("{label} exec {}", process.exec_id);
        }
        let (exit, oom_kills) = match self.exit_of(&process).await {
            Ok(status) => (Exit::now(status.exit_code), status.oom_kills),
            Err(reason) => {
                log::error!("{label}: {reason}");
                if process.exec_id.is_empty() && self.sandbox.killed_for_memory() {
                    self.publish_oom();
                }
                (Exit::now(Exit::KILLED), 0)
            }
        };
        if let Some(io) = process.io() {
            io.drain(DRAIN_QUIET, DRAIN_LIMIT).await;
        }
        if process.exec_id.is_empty() {
            self.execs_ended().await;
        }
        // The start is told first, however soon the end comes.
        let _starting = process.starting.lock().await;
        // And why it ended before that it did: clients call it OOMKilled by the order.
        self.note_oom_kills(oom_kills);
        if process.exec_id.is_empty() {
            self.paused.store(false, Ordering::Relaxed);
            // Who is told of the end finds the pid gone.
            self.holder.end();
        }
        let id = if process.exec_id.is_empty() { self.id.clone() } else { process.exec_id.clone() };
        process.set_exited(exit, || {
            self.events.publish(TaskExit {
                container_id: self.id.clone(),
                id,
                pid: process.pid(),
                exit_status: exit.status,
                exited_at: Some(timestamp(exit.at)).into(),
                ..Default::default()
            });
        });
        if process.exec_id.is_empty() {
            self.sandbox.set_phase(&self.id, state::Phase::Stopped);
        }
    }

    /// Waits for the exits of what was started beside the first process and ended
    /// with it, so that its exit is the last one told.
    async fn execs_ended(&self) {
        let running = |process: &Arc<Process>| process.phase() == Phase::Running;
        let execs: Vec<_> = self.execs().values().filter(|process| running(process)).cloned().collect();
        let ended = async {
            for exec in execs {
                exec.wait().await;
            }
        };
        if timeout(EXECS_LIMIT, ended).await.is_err() {
            log::warn!("{}/{}: an exec outlives the container", self.namespace, self.id);
        }
    }

    /// How a process ended. Nothing but the machine's end is taken for one: where
    /// the agent does not answer any more, it is asked again.
    async fn exit_of(&self, process: &Process) -> Result<ExitStatus, String> {
        let reference = process_ref(&self.id, &process.exec_id);
        let asked = async {
            loop {
                match self.sandbox.agent().wait(&reference).await {
                    Ok(status) => return Ok(status),
                    Err(error) if error.is_unanswered() => {
                        let (namespace, id) = (&self.namespace, &self.id);
                        log::warn!("{namespace}/{id}: waiting for {:?}: {error}", process.exec_id);
                        sleep(RECONNECT_AFTER).await;
                    }
                    // It has lost track of the process.
                    Err(error) => return Err(error.to_string()),
                }
            }
        };
        tokio::select! {
            biased;
            result = asked => result,
            reason = self.sandbox.ended() => Err(format!("ended with its machine: {reason}")),
        }
    }
}
