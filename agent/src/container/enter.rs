//! Adding a process to a container that exists.
//!
//! It takes two children, as runc does it: the first one lets go of everything
//! of the agent's and joins the container's namespaces, all but the pid
//! namespace, into which nobody can move. The second one is born into that, and
//! is the first the container can see: where a process of the container may look
//! into others, it finds the container's own root and nothing of the agent's.

use std::os::fd::{AsFd, AsRawFd, BorrowedFd};

use nix::errno::Errno;
use rvm_protocol::agent;

use super::{
    attributes,
    cgroup::{Cgroup, cgroup_of},
    child::{self, Common, GivenUp},
    keyring,
    namespaces::enter_all_of,
    terminal, user, userns,
};
use crate::{
    channel,
    error::{Step, StepResult},
    io::ChildEnds,
    sys::process::{Child, close_all_except, spawn},
};

/// Makes a process in the container whose first process `first` stands for. It
/// moves ([`channel::Message::Moved`]), prepares itself and then waits.
pub fn spawn_into(
    first: &Child,
    cgroup: &Cgroup,
    process: &agent::Process,
    common: &Common,
    ends: &ChildEnds,
) -> StepResult<(Child, channel::Parent)> {
    let (parent, channel) = channel::pair()?;
    let spawn_in = |cgroup| {
        let body = || from_outside(first.pidfd.as_fd(), process, common, &channel, ends);
        spawn(cgroup, 0, || child::run(&channel, body))
    };
    let child = match spawn_in(cgroup.dir()) {
        // The container has made cgroups of its own with controllers, so its top
        // one takes no processes any more; its first process has found a place.
        Err(Errno::EBUSY) => spawn_in(cgroup_of(first.pid)?.as_fd()),
        child => child,
    };
    Ok((child.step(|| "create a process")?, parent))
}

/// In the first child: from a copy of the agent into the container.
fn from_outside(
    first: BorrowedFd<'_>,
    process: &agent::Process,
    common: &Common,
    channel: &channel::Child,
    ends: &ChildEnds,
) -> StepResult<GivenUp> {
    attributes::start_on(&process.initial_cpus)?;
    child::begin(ends, &[first.as_raw_fd(), channel.as_fd().as_raw_fd()])?;
    user::apply_oom_score(process)?;
    if let Some(ids) = &common.ids {
        ids.own_standard_streams(&process.user)?;
        attributes::raise_limits(process)?;
    }
    enter_all_of(first, common.ids.is_some())?;
    // Not even the descriptor of the first process goes along.
    close_all_except(&[channel.as_fd().as_raw_fd()]).step(|| "close descriptors")?;
    child::hand_over(channel, 0, || added_process(process, common, channel, ends))
}

/// In the second child: to the program.
fn added_process(
    process: &agent::Process,
    common: &Common,
    channel: &channel::Child,
    ends: &ChildEnds,
) -> StepResult<GivenUp> {
    if common.ids.is_some() {
        userns::become_root()?;
    }
    keyring::join_session(&common.container_id)?;
    if process.terminal {
        let terminal = terminal::open_controlling()?;
        channel.terminal(terminal.master.as_fd())?;
    }
    attributes::run_on(&process.final_cpus)?;
    child::finish(process, common, None, ends, channel)
}
