//! Resource limits, scheduling, I/O priority and CPUs of a process.
//!
//! Inside a user namespace nobody may raise a limit or claim a priority: limits
//! are raised before it is entered, priorities set by the agent from outside.

use nix::{
    errno::Errno,
    sched::{CpuSet, sched_setaffinity},
    unistd::Pid,
};
use rvm_protocol::agent;

use crate::error::{Error, Step, StepError, StepResult};

/// Resources the kernel knows (`RLIM_NLIMITS`).
const RESOURCES: u32 = 16;
/// Highest class of ioprio_set(2), `IOPRIO_CLASS_IDLE`, and levels within one.
const IO_CLASSES: u32 = 3;
const IO_LEVELS: u32 = 8;
/// `IOPRIO_CLASS_SHIFT` and `IOPRIO_WHO_PROCESS`.
const IO_CLASS_SHIFT: u32 = 13;
const IO_WHO_PROCESS: i32 = 1;

/// The kernel's `struct sched_attr` in its first version (sched_setattr(2)).
#[repr(C)]
struct SchedAttr {
    size: u32,
    policy: u32,
    flags: u64,
    nice: i32,
    priority: u32,
    runtime: u64,
    deadline: u64,
    period: u64,
}

/// Checks what this module applies.
pub fn check(field: &str, process: &agent::Process) -> Result<(), Error> {
    for (index, limit) in process.rlimits.iter().enumerate() {
        let field = |name: &str| format!("{field}.rlimits[{index}].{name}");
        if limit.resource >= RESOURCES {
            return Err(Error::invalid(
                field("resource"),
                format!("{} must be below {RESOURCES}", limit.resource),
            ));
        }
        if limit.soft > limit.hard {
            return Err(Error::invalid(
                field("soft"),
                format!("{} must be at most hard, {}", limit.soft, limit.hard),
            ));
        }
    }
    if let Some(io) = process.io_priority.as_ref()
        && (io.class > IO_CLASSES || io.priority >= IO_LEVELS)
    {
        let reason = format!("class must be at most {IO_CLASSES} and priority below {IO_LEVELS}");
        return Err(Error::invalid(format!("{field}.io_priority"), reason));
    }
    if let Some(scheduler) = process.scheduler.as_ref()
        && scheduler.priority < 0
    {
        return Err(Error::invalid(format!("{field}.scheduler.priority"), "must not be negative"));
    }
    for (name, cpus) in [("initial_cpus", &process.initial_cpus), ("final_cpus", &process.final_cpus)] {
        cpu_set(cpus).map_err(|reason| Error::invalid(format!("{field}.{name}"), reason))?;
    }
    Ok(())
}

/// Raises hard limits that are below what is asked for, while that is allowed;
/// the limits themselves come last.
pub fn raise_limits(process: &agent::Process) -> StepResult<()> {
    for limit in &process.rlimits {
        let mut now = libc::rlimit { rlim_cur: 0, rlim_max: 0 };
        // SAFETY: `now` is a valid rlimit for the call to fill in.
        let result = unsafe { libc::getrlimit(limit.resource as _, &raw mut now) };
        Errno::result(result).step(|| format!("read resource limit {}", limit.resource))?;
        if now.rlim_max < limit.hard {
            set_limit(limit.resource, now.rlim_cur, limit.hard)?;
        }
    }
    Ok(())
}

/// Applies the limits to this process.
pub fn apply_limits(process: &agent::Process) -> StepResult<()> {
    process.rlimits.iter().try_for_each(|limit| set_limit(limit.resource, limit.soft, limit.hard))
}

fn set_limit(resource: u32, soft: u64, hard: u64) -> StepResult<()> {
    let value = libc::rlimit { rlim_cur: soft, rlim_max: hard };
    // SAFETY: `value` is a valid rlimit that outlives the call.
    let result = unsafe { libc::setrlimit(resource as _, &raw const value) };
    Errno::result(result)
        .map(drop)
        .step(|| format!("set resource limit {resource} to {soft} (soft) and {hard} (hard)"))
}

/// Applies scheduling and I/O priority to a process that waits for its start.
pub fn apply(pid: Pid, process: &agent::Process) -> StepResult<()> {
    if let Some(io) = process.io_priority.as_ref() {
        let priority = (io.class << IO_CLASS_SHIFT) | io.priority;
        // SAFETY: takes integers only.
        let result = unsafe { libc::syscall(libc::SYS_ioprio_set, IO_WHO_PROCESS, pid.as_raw(), priority) };
        Errno::result(result).step(|| format!("set I/O priority {} of class {}", io.priority, io.class))?;
    }
    match process.scheduler.as_ref() {
        Some(scheduler) => set_scheduler(pid, scheduler),
        None => Ok(()),
    }
}

fn set_scheduler(pid: Pid, scheduler: &agent::Scheduler) -> StepResult<()> {
    let attr = SchedAttr {
        size: size_of::<SchedAttr>() as u32,
        policy: scheduler.policy,
        flags: scheduler.flags,
        nice: scheduler.nice,
        priority: scheduler.priority.unsigned_abs(),
        runtime: scheduler.runtime,
        deadline: scheduler.deadline,
        period: scheduler.period,
    };
    // SAFETY: `attr` is a valid struct of the size it names and outlives the call.
    let result = unsafe { libc::syscall(libc::SYS_sched_setattr, pid.as_raw(), &raw const attr, 0) };
    Errno::result(result).map(drop).step(|| {
        format!(
            "set scheduler policy {} with nice {} and priority {}",
            scheduler.policy, scheduler.nice, scheduler.priority
        )
    })
}

/// The CPUs an added process starts on. Those its cgroup does not have are no
/// error: it is born in that cgroup, where runc has yet to move it there.
pub fn start_on(cpus: &str) -> StepResult<()> {
    match run_on(cpus) {
        Err(StepError::Kernel { errno: Errno::EINVAL, .. }) => Ok(()),
        result => result,
    }
}

/// The CPUs this process runs on from here on; empty: as before.
pub fn run_on(cpus: &str) -> StepResult<()> {
    match cpu_set(cpus).map_err(StepError::Refused)? {
        Some(set) => sched_setaffinity(Pid::from_raw(0), &set).step(|| format!("run on CPUs {cpus:?}")),
        None => Ok(()),
    }
}

/// Reads a list such as `0-3,7`.
fn cpu_set(list: &str) -> Result<Option<CpuSet>, String> {
    if list.is_empty() {
        return Ok(None);
    }
    let wrong = || format!("{list:?} must be a list of CPUs such as \"0-3,7\"");
    let number = |text: &str| text.trim().parse::<usize>().map_err(|_| wrong());
    let mut set = CpuSet::new();
    for part in list.split(',') {
        let (first, last) = part.split_once('-').unwrap_or((part, part));
        let (first, last) = (number(first)?, number(last)?);
        if first > last || last >= CpuSet::count() {
            return Err(wrong());
        }
        for cpu in first..=last {
            set.set(cpu).map_err(|_| wrong())?;
        }
    }
    Ok(Some(set))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn limits_are_checked_by_field() {
        let process = |resource, soft, hard| agent::Process {
            rlimits: vec![agent::Rlimit { resource, soft, hard, ..Default::default() }],
            ..Default::default()
        };
        assert!(check("process", &process(7, 1024, 4096)).is_ok());
        assert_eq!(
            check("process", &process(7, 2, 1)).unwrap_err().to_string(),
            "process.rlimits[0].soft: 2 must be at most hard, 1"
        );
        assert_eq!(
            check("process", &process(16, 0, 0)).unwrap_err().to_string(),
            "process.rlimits[0].resource: 16 must be below 16"
        );
    }

    #[test]
    fn lists_of_cpus() {
        let cpus = |list| {
            cpu_set(list).map(|set| {
                let set = set.unwrap_or_default();
                (0..CpuSet::count()).filter(|cpu| set.is_set(*cpu).unwrap()).collect::<Vec<_>>()
            })
        };
        assert_eq!(cpus("0-2,7"), Ok(vec![0, 1, 2, 7]));
        assert_eq!(cpus(""), Ok(vec![]));
        for list in ["x", "3-1", "1,", "-1", "0-100000", "99999999999999999999"] {
            assert_eq!(cpus(list), Err(format!("{list:?} must be a list of CPUs such as \"0-3,7\"")));
            let process = agent::Process { final_cpus: list.into(), ..Default::default() };
            assert!(check("p", &process).unwrap_err().to_string().starts_with("p.final_cpus: "));
        }
    }

    #[test]
    fn priorities_are_checked_by_field() {
        let io = |class, priority| agent::Process {
            io_priority: Some(agent::IoPriority { class, priority, ..Default::default() }).into(),
            ..Default::default()
        };
        assert!(check("p", &io(2, 7)).is_ok());
        for (class, priority) in [(4, 0), (1, 8)] {
            let error = check("p", &io(class, priority)).unwrap_err().to_string();
            assert_eq!(error, "p.io_priority: class must be at most 3 and priority below 8");
        }
    }
}
