//! What every child does between `clone3` and `execve`, first process or added.

use std::{
    cell::Cell,
    fs::File,
    io::Read,
    os::fd::{OwnedFd, RawFd},
    path::Path,
};

use nix::{
    errno::Errno,
    fcntl::{OFlag, open},
    sys::stat::{Mode, SFlag, fstat, makedev, umask},
    unistd::{Uid, dup2_stderr, dup2_stdin, dup2_stdout, pipe2, setsid},
};
use rvm_protocol::agent;

use super::{hooks::Hooks, program::Program, seccomp::Filter, user, userns::Ids};
use crate::{
    channel,
    error::{Step, StepError, StepResult},
    io::ChildEnds,
    sys::process::{close_all_except, fork_sibling, reset_signals, restore_descriptor_limit, set_undumpable},
};

/// Exit code of a child that did not get as far as its program. Nobody is told of
/// that of one that has been moved away from.
const NOT_RUN: i32 = 127;

/// Runs `steps`, of which the last is `execve`, and reports the one that fails.
pub fn run(channel: &channel::Child, steps: impl FnOnce() -> StepResult<GivenUp>) -> i32 {
    match steps() {
        Ok(GivenUp) => {}
        Err(error) => channel.failed(&error),
    }
    NOT_RUN
}

/// The agent does not want the program run any more.
#[derive(Debug)]
pub struct GivenUp;

/// The first step of every child: nothing of the agent's is left but what is
/// handed over, and nothing of the child can be reached by what runs in the
/// container already.
pub fn begin(ends: &ChildEnds, keep: &[RawFd]) -> StepResult<()> {
    set_undumpable().step(|| "protect the process")?;
    // Modes are set in full by whoever makes a file.
    umask(Mode::empty());
    setsid().step(|| "create a session")?;
    reset_signals().step(|| "reset signals")?;
    let null =
        || open("/dev/null", OFlag::O_RDWR | OFlag::O_CLOEXEC, Mode::empty()).step(|| "open /dev/null");
    let connect = |end: &Option<OwnedFd>, dup: fn(&OwnedFd) -> nix::Result<()>| {
        match end {
            Some(end) => dup(end),
            None => dup(&null()?),
        }
        .step(|| "connect the standard streams")
    };
    connect(&ends.stdin, |fd| dup2_stdin(fd))?;
    connect(&ends.stdout, |fd| dup2_stdout(fd))?;
    connect(&ends.stderr, |fd| dup2_stderr(fd))?;
    close_all_except(keep).step(|| "close descriptors")?;
    restore_descriptor_limit().step(|| "restore the limit of descriptors")
}

/// Goes on in another child of the agent's, which is born where this process has
/// chosen for its children, and into what `namespaces` says: into a pid namespace
/// that has other processes in it, only once nothing of the agent's is left.
pub fn hand_over(
    channel: &channel::Child,
    namespaces: u64,
    steps: impl FnOnce() -> StepResult<GivenUp>,
) -> StepResult<GivenUp> {
    let step = || "create a process";
    // Closed once the agent knows whom it is to hear from.
    let (wait, go) = pipe2(OFlag::O_CLOEXEC).step(|| "create a pipe")?;
    let go = Cell::new(Some(go));
    let next = fork_sibling(namespaces, || {
        // In the memory of the second child alone.
        drop(go.take());
        run(channel, || {
            File::from(wait).read_to_end(&mut Vec::new()).step(step)?;
            setsid().step(|| "create a session")?;
            steps()
        })
    });
    match next {
        // What the kernel says of a pid namespace whose PID 1 has ended.
        Err(Errno::ENOMEM) => Err(StepError::Refused(format!("{}: the container has stopped", step()))),
        next => channel.moved(next.step(step)?).map(|()| GivenUp),
    }
}

/// What all processes of a container have in common.
#[derive(Debug, Default)]
pub struct Common {
    /// The container's id.
    pub container_id: String,
    /// The filter each of them gets.
    pub filter: Option<Filter>,
    /// For personality(2).
    pub personality: Option<u32>,
    /// Those of the container's user namespace, where it is not the guest's.
    pub ids: Option<Ids>,
}

/// The last steps of every child, in the container's root file system: user,
/// program, and after the agent's word, hooks and `execve`.
pub fn finish(
    process: &agent::Process,
    common: &Common,
    hooks: Option<Hooks<'_>>,
    ends: &ChildEnds,
    channel: &channel::Child,
) -> StepResult<GivenUp> {
    if !process.terminal {
        reopen_null(ends)?;
    }
    user::own_standard_streams(Uid::from_raw(process.user.uid))?;
    set_personality(common.personality)?;
    // As runc does: without no_new_privs loading takes a privilege the process
    // is about to lose; with it, as few system calls as possible come after.
    let (early, late) = match &common.filter {
        Some(filter) if process.no_new_privileges => (None, Some(filter)),
        filter => (filter.as_ref(), None),
    };
    if let Some(filter) = early {
        filter.load()?;
    }
    user::become_user(process, || enter_cwd(&process.cwd))?;
    let program = Program::find(process)?;
    if !channel.ready()? {
        return Ok(GivenUp);
    }
    if let Some(hooks) = hooks {
        hooks.run(None)?;
    }
    if let Some(filter) = late {
        filter.load()?;
    }
    Err(program.run())
}

fn set_personality(personality: Option<u32>) -> StepResult<()> {
    let Some(personality) = personality else { return Ok(()) };
    // SAFETY: takes an integer.
    let result = unsafe { libc::personality(personality.into()) };
    Errno::result(result).map(drop).step(|| format!("set personality {personality:#x}"))
}

/// `/dev/null` of the container instead of the agent's, which has no name there.
/// A container without one keeps the agent's.
fn reopen_null(ends: &ChildEnds) -> StepResult<()> {
    let Ok(null) = open("/dev/null", OFlag::O_RDWR | OFlag::O_CLOEXEC, Mode::empty()) else { return Ok(()) };
    let stat = fstat(&null).step(|| "inspect /dev/null")?;
    if stat.st_mode & SFlag::S_IFMT.bits() != SFlag::S_IFCHR.bits() || stat.st_rdev != makedev(1, 3) {
        return Ok(());
    }
    let step = || "connect the standard streams";
    if ends.stdin.is_none() {
        dup2_stdin(&null).step(step)?;
    }
    if ends.stdout.is_none() {
        dup2_stdout(&null).step(step)?;
    }
    if ends.stderr.is_none() {
        dup2_stderr(&null).step(step)?;
    }
    Ok(())
}

/// `false`: the present user may not enter it.
fn enter_cwd(cwd: &str) -> StepResult<bool> {
    match std::env::set_current_dir(Path::new(cwd)) {
        Err(error) if error.kind() == std::io::ErrorKind::PermissionDenied => Ok(false),
        entered => entered.step(|| user::cwd_step(cwd)).map(|()| true),
    }
}
