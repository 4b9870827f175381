//! What a thread can call of the kernel once the monitor is shut in (seccomp(2)): what its
//! duty takes ([`calls`](super::calls)). Any other call ends the monitor.
//!
//! Most of the others the jail refuses anyway. But each is a part of the host's kernel that a guest
//! which has taken the monitor over would look for a fault in.

use std::collections::BTreeMap;
use std::io;
use std::sync::atomic::{AtomicBool, Ordering};

use libc::c_long;
use seccompiler::SeccompCmpArgLen::Dword;
use seccompiler::SeccompCmpOp::MaskedEq;
use seccompiler::{
    BackendError, BpfProgram, SeccompAction, SeccompCondition, SeccompFilter, SeccompRule, TargetArch,
};

use super::calls::{Call, Duty, LOOKED_FOR, Only, building};
use crate::process::ok;

/// Whether the threads of this process have filters.
static IN_FORCE: AtomicBool = AtomicBool::new(false);

/// Whether the process is shut in for good: filters are the last step.
pub fn is_in_force() -> bool {
    IN_FORCE.load(Ordering::Relaxed)
}

/// Leaves this thread, and those it starts, what any of them calls. Needs `no_new_privs`.
pub(super) fn begin() -> io::Result<()> {
    // First what is called for every exit of a vCPU.
    let everything = building().chain(Duty::ALL.into_iter().flat_map(Duty::calls));
    // Its flags are in memory, where no filter sees them; the C library uses clone() then.
    install(&refusing(libc::SYS_clone3, libc::ENOSYS).map_err(io::Error::other)?)?;
    install(&allowing(everything).map_err(io::Error::other)?)?;
    IN_FORCE.store(true, Ordering::Relaxed);
    Ok(())
}

/// Leaves this thread what its duty takes, where filters are in force.
pub(super) fn narrow(duty: Duty) -> io::Result<()> {
    if !is_in_force() {
        return Ok(());
    }
    let looked_for = (duty != Duty::Files).then_some(LOOKED_FOR);
    if let Some(Call { number, .. }) = looked_for {
        install(&refusing(number, libc::ENOENT).map_err(io::Error::other)?)?;
    }
    install(&allowing(duty.calls().chain(looked_for)).map_err(io::Error::other)?)
}

/// A program that lets these calls through.
fn allowing(calls: impl Iterator<Item = Call>) -> Result<BpfProgram, BackendError> {
    // Rules of a call are alternatives; one without rules is allowed whatever its arguments.
    let mut rules: BTreeMap<c_long, Option<Vec<SeccompRule>>> = BTreeMap::new();
    for Call { number, only } in calls {
        let known = rules.entry(number).or_insert_with(|| Some(Vec::new()));
        match (self::rules(only)?, known.as_mut()) {
            (Some(more), Some(known)) => known.extend(more),
            (None, _) => *known = None,
            (Some(_), None) => {}
        }
    }
    let rules = rules.into_iter().map(|(number, rules)| (number, rules.unwrap_or_default())).collect();
    SeccompFilter::new(rules, SeccompAction::KillProcess, SeccompAction::Allow, TargetArch::x86_64)?
        .try_into()
}

/// The rules that say which of a call is allowed; none where all of it is.
fn rules(only: Only) -> Result<Option<Vec<SeccompRule>>, BackendError> {
    let rule = |argument, mask: u32, value: u32| {
        SeccompRule::new(vec![SeccompCondition::new(argument, Dword, MaskedEq(mask.into()), value.into())?])
    };
    Ok(Some(match only {
        Only::Any => return Ok(None),
        Only::These(argument, mask, values) => {
            values.iter().map(|&value| rule(argument, mask, value)).collect::<Result<_, _>>()?
        }
        Only::Without(argument, bits) => vec![rule(argument, bits, 0)?],
        Only::With(argument, bits) => vec![rule(argument, bits, bits)?],
    }))
}

/// A program by which a call fails with an error number.
fn refusing(call: c_long, error: libc::c_int) -> Result<BpfProgram, BackendError> {
    let calls = BTreeMap::from([(call, Vec::new())]);
    let refused = SeccompAction::Errno(error.cast_unsigned());
    SeccompFilter::new(calls, SeccompAction::Allow, refused, TargetArch::x86_64)?.try_into()
}

fn install(program: &BpfProgram) -> io::Result<()> {
    let len = u16::try_from(program.len()).map_err(io::Error::other)?;
    let program = libc::sock_fprog { len, filter: program.as_ptr().cast_mut().cast() };
    // What a filter is to keep apart is not in one process with what it is kept from: nothing is
    // gained by having the processor guess less.
    let flags = libc::SECCOMP_FILTER_FLAG_SPEC_ALLOW;
    // SAFETY: a program of the length it says, which the kernel copies.
    let result =
        unsafe { libc::syscall(libc::SYS_seccomp, libc::SECCOMP_SET_MODE_FILTER, flags, &raw const program) };
    ok(result as libc::c_int)
}
