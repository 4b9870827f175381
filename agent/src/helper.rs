//! Work that may take any time, done by a child while the agent goes on: the
//! agent has one thread, and a disk that does not answer must not be the end of
//! all containers.
//!
//! A child, not a thread: see the crate's invariants.

use std::os::fd::{AsFd, AsRawFd, OwnedFd, RawFd};

use crate::{
    channel,
    error::{Step, StepResult},
    reaper::{Reaper, ended},
    sys::process::{close_all_except, fork},
};

/// What comes back from the child.
#[derive(Debug, Default)]
pub struct Outcome {
    /// An answer to whatever was asked.
    pub flag: bool,
    /// Something the child opened or made.
    pub fd: Option<OwnedFd>,
}

/// Runs `work` in a child; `what` names it in errors. The child has the agent's
/// privileges and namespaces but none of its descriptors, so `work` is given
/// paths. It is done even if nobody waits for it any more.
pub async fn run(
    reaper: &Reaper,
    what: &str,
    work: impl FnOnce() -> StepResult<Outcome>,
) -> StepResult<Outcome> {
    run_keeping(reaper, what, &[], work).await
}

/// See [`run`]; the child has these descriptors of the agent's too.
pub async fn run_keeping(
    reaper: &Reaper,
    what: &str,
    keep: &[RawFd],
    work: impl FnOnce() -> StepResult<Outcome>,
) -> StepResult<Outcome> {
    let (child, outcome) = {
        let (parent, channel) = channel::pair()?;
        let child = fork(0, || match in_child(&channel, keep, work) {
            Ok(()) => 0,
            Err(error) => {
                channel.failed(&error);
                1
            }
        });
        (child.step(|| format!("create a process to {what}"))?, parent)
    };
    let exit = reaper.watch(child.pid);
    let outcome = outcome.done(what).await;
    ended(exit).await;
    outcome.map(|(flag, fd)| Outcome { flag, fd })
}

fn in_child(
    channel: &channel::Child,
    keep: &[RawFd],
    work: impl FnOnce() -> StepResult<Outcome>,
) -> StepResult<()> {
    let keep = [keep, &[channel.as_fd().as_raw_fd()]].concat();
    close_all_except(&keep).step(|| "close descriptors")?;
    let Outcome { flag, fd } = work()?;
    channel.done(flag, fd.as_ref().map(AsFd::as_fd))
}
