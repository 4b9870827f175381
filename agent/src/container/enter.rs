//! Adding a process to a container that exists.

use std::os::fd::{AsFd, AsRawFd, BorrowedFd};

use nix::errno::Errno;
use rvm_protocol::agent;

use super::{
    attributes,
    cgroup::{Cgroup, cgroup_of},
    channel,
    child::{self, Common, GivenUp},
    keyring,
    namespaces::{born_in, enter_all_of},
    terminal, user, userns,
};
use crate::{
    error::{Step, StepError, StepResult},
    io::ChildEnds,
    sys::process::{Child, spawn},
};

/// Makes a process in the container whose first process `first` stands for. It
/// prepares itself and then waits.
pub fn spawn_into(
    first: &Child,
    cgroup: &Cgroup,
    process: &agent::Process,
    common: &Common,
    ends: &ChildEnds,
) -> StepResult<(Child, channel::Parent)> {
    let (parent, channel) = channel::pair()?;
    let child = born_in(Some(first.pidfd.as_fd()), || {
        let spawn_in = |cgroup| {
            let body = || added_process(first.pidfd.as_fd(), process, common, &channel, ends);
            spawn(cgroup, 0, || child::run(&channel, body))
        };
        let child = match spawn_in(cgroup.dir()) {
            // The container has made cgroups of its own with controllers, so
            // its top one takes no processes any more; its first process has
            // found a place.
            Err(Errno::EBUSY) => spawn_in(cgroup_of(first.pid)?.as_fd()),
            child => child,
        };
        match child {
            // What the kernel says of a pid namespace whose PID 1 has ended.
            Err(Errno::ENOMEM) => {
                Err(StepError::Refused("create a process: the container has stopped".into()))
            }
            child => child.step(|| "create a process"),
        }
    })?;
    Ok((child, parent))
}

/// In the child: from a copy of the agent to the program.
fn added_process(
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
