//! A process of a container as the agent keeps it, from creation to deletion.

use std::sync::{Mutex, MutexGuard, PoisonError};

use nix::{errno::Errno, unistd::Pid};
use rvm_protocol::agent;
use tokio::sync::watch;

use super::attributes;
use crate::{
    channel::{self, Message},
    error::{Error, Step, StepError, StepResult},
    io::Streams,
    reaper::{Exit, ExitReceiver, ended},
    sys::process::{Child, SIGNALS, send_signal},
};

/// A container's first process, or one that was added to it.
#[derive(Debug)]
pub struct Process {
    /// As requested; it has been checked.
    pub spec: agent::Process,
    /// Its standard streams or terminal.
    pub streams: Streams,
    stage: Mutex<Stage>,
    exit: watch::Sender<Option<Exit>>,
}

/// ```text
///  Registered ──spawn──> Spawned ──ready──> Created ──start──> Started
///       └─────> Preceded ──moved──^
/// ```
/// Whether it has ended is told by `exit`: it may do so at any point after spawn.
#[derive(Debug)]
enum Stage {
    /// No process yet.
    Registered,
    /// A child makes another one in its place, which `signals` are for: bit n - 1 for signal n.
    Preceded { by: Child, signals: u64 },
    /// The child is preparing itself.
    Spawned(Child),
    /// The child waits just before `execve`.
    Created(Child, channel::Parent),
    /// The program runs, or could not be run.
    Started(Child),
}

/// Where a signal is in a set of them; nowhere if it is none.
fn bit(signal: u32) -> u64 {
    signal.checked_sub(1).and_then(|bit| 1u64.checked_shl(bit)).unwrap_or(0)
}

fn unexpected(said: &Message) -> StepError {
    StepError::Refused(format!("the child says something out of turn: {said:?}"))
}

impl Process {
    /// A process that is yet to be spawned.
    pub fn new(spec: agent::Process, streams: Streams) -> Self {
        Self { spec, streams, stage: Mutex::new(Stage::Registered), exit: watch::channel(None).0 }
    }

    fn stage(&self) -> MutexGuard<'_, Stage> {
        // One thread: a poisoned lock means a panic, and that rebooted the VM.
        self.stage.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether its child has not got as far as waiting for the start.
    pub fn is_preparing(&self) -> bool {
        matches!(*self.stage(), Stage::Preceded { .. } | Stage::Spawned(_))
    }

    /// Whether it waits for [`start`](Self::start).
    pub fn is_created(&self) -> bool {
        matches!(*self.stage(), Stage::Created(..))
    }

    /// Notes the child that prepares itself to be this process, or where it
    /// `moves`, one that will take its place.
    pub fn spawned(&self, child: Child, moves: bool) {
        *self.stage() = if moves { Stage::Preceded { by: child, signals: 0 } } else { Stage::Spawned(child) };
    }

    /// Notes the child that takes the place of the one before, and passes on the
    /// signals that process was sent.
    fn moved(&self, child: Child) -> StepResult<()> {
        let mut stage = self.stage();
        let signals = if let Stage::Preceded { signals, .. } = *stage { signals } else { 0 };
        for signal in (1..=SIGNALS).filter(|signal| signals & bit(*signal) != 0) {
            match send_signal(&child.pidfd, signal as i32) {
                // It has ended already, which is told in its turn.
                Ok(()) | Err(Errno::ESRCH) => {}
                failed => failed.step(|| format!("send signal {signal}"))?,
            }
        }
        *stage = Stage::Spawned(child);
        Ok(())
    }

    /// Waits until the child has done everything up to `execve`, or the one it
    /// makes in its place where it `moves`, which `adopt` is told of.
    pub async fn ready(
        &self,
        channel: channel::Parent,
        moves: bool,
        adopt: impl FnOnce(Pid) -> StepResult<Child>,
    ) -> StepResult<()> {
        if moves {
            // The first child is the agent's own; what comes later is said where
            // the container may have a hand in it.
            match channel.hear().await? {
                Message::Moved(pid) => self.moved(adopt(pid)?)?,
                said => return Err(unexpected(&said)),
            }
            channel.adopted()?;
        }
        loop {
            match channel.hear().await? {
                said @ Message::Moved(_) => return Err(unexpected(&said)),
                Message::Terminal(master) => self.streams.set_terminal(master)?,
                Message::Ready => break,
            }
        }
        if let Some(pid) = self.pid() {
            attributes::apply(pid, &self.spec)?;
        }
        let mut stage = self.stage();
        *stage = match std::mem::replace(&mut *stage, Stage::Registered) {
            Stage::Spawned(child) => Stage::Created(child, channel),
            other => other,
        };
        Ok(())
    }

    /// Lets a created process run its program. Returns its pid in the guest's
    /// root pid namespace.
    pub async fn start(&self) -> Result<u32, Error> {
        // As runc has it: what died while it waited cannot be started.
        if self.exited().is_some() {
            return Err(Error::Precondition(channel::STOPPED.into()));
        }
        let (pid, channel) = {
            let mut stage = self.stage();
            match std::mem::replace(&mut *stage, Stage::Registered) {
                Stage::Created(child, channel) => {
                    let pid = child.pid;
                    *stage = Stage::Started(child);
                    (pid, channel)
                }
                other => {
                    *stage = other;
                    return Err(Error::Precondition("the process is not waiting to be started".into()));
                }
            }
        };
        channel.start().await?;
        Ok(pid.as_raw().unsigned_abs())
    }

    /// Sends a signal.
    pub fn signal(&self, signal: i32) -> Result<(), Error> {
        // In the words of Go's os package, by which clients of containerd know it.
        let finished = || Error::NotFound("process already finished".into());
        if self.exited().is_some() {
            return Err(finished());
        }
        match &mut *self.stage() {
            Stage::Registered => Err(Error::Precondition("the process has not been started".into())),
            Stage::Preceded { by, signals } => {
                *signals |= bit(signal.unsigned_abs());
                if signal != libc::SIGKILL {
                    return Ok(());
                }
                // It may wait for what never comes; the other one may be there all the same.
                match send_signal(&by.pidfd, signal) {
                    Err(Errno::ESRCH) => Ok(()),
                    sent => Ok(sent.step(|| "end a process that is being created")?),
                }
            }
            Stage::Spawned(child) | Stage::Created(child, ..) | Stage::Started(child) => {
                match send_signal(&child.pidfd, signal) {
                    Err(Errno::ESRCH) => Err(finished()),
                    sent => Ok(sent.step(|| format!("send signal {signal}"))?),
                }
            }
        }
    }

    /// Its pid in the guest's root pid namespace, and the descriptor that
    /// stands for it, for as long as it runs.
    pub fn with_child<T>(&self, use_child: impl FnOnce(&Child) -> T) -> Option<T> {
        if self.exited().is_some() {
            return None;
        }
        match &*self.stage() {
            Stage::Registered => None,
            Stage::Preceded { by: child, .. }
            | Stage::Spawned(child)
            | Stage::Created(child, ..)
            | Stage::Started(child) => Some(use_child(child)),
        }
    }

    /// Its pid in the guest's root pid namespace while it runs.
    pub fn pid(&self) -> Option<Pid> {
        self.with_child(|child| child.pid)
    }

    /// How it ended, if it has.
    pub fn exited(&self) -> Option<Exit> {
        *self.exit.borrow()
    }

    /// Makes its end known to everyone who waits.
    pub fn set_exited(&self, exit: Exit) {
        self.exit.send_replace(Some(exit));
    }

    /// Resolves once it has ended.
    pub fn exit_receiver(&self) -> ExitReceiver {
        self.exit.subscribe()
    }

    /// Waits for its end.
    pub async fn wait(&self) -> Option<Exit> {
        ended(self.exit_receiver()).await
    }
}
