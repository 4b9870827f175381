//! `process.scheduler`: the attributes of sched_setattr(2).

use oci_spec::runtime::{self as oci, LinuxSchedulerFlag as Flag, LinuxSchedulerPolicy as Policy};
use rvm_protocol::agent::Scheduler;

use super::SpecError;

/// Checks the attributes against their policy; `at` is their path.
pub(super) fn translate(at: &str, scheduler: &oci::Scheduler) -> Result<Scheduler, SpecError> {
    let policy = match scheduler.policy() {
        Policy::SchedOther => libc::SCHED_OTHER,
        Policy::SchedFifo => libc::SCHED_FIFO,
        Policy::SchedRr => libc::SCHED_RR,
        Policy::SchedBatch => libc::SCHED_BATCH,
        Policy::SchedIdle => libc::SCHED_IDLE,
        Policy::SchedDeadline => libc::SCHED_DEADLINE,
        Policy::SchedIso => {
            return Err(SpecError::unsupported(
                format!("{at}.policy"),
                "Linux reserves SCHED_ISO without having it",
            ));
        }
    };
    let realtime = matches!(scheduler.policy(), Policy::SchedFifo | Policy::SchedRr);
    let deadline = *scheduler.policy() == Policy::SchedDeadline;
    let nice = scheduler.nice().unwrap_or(0);
    if !(-20..=19).contains(&nice) {
        return Err(SpecError::field(format!("{at}.nice"), format!("must be -20 to 19, is {nice}")));
    }
    let priority = scheduler.priority().unwrap_or(0);
    if realtime && !(1..=99).contains(&priority) {
        return Err(SpecError::field(
            format!("{at}.priority"),
            format!("must be 1 to 99 with SCHED_FIFO and SCHED_RR, is {priority}"),
        ));
    }
    if !realtime && priority != 0 {
        return Err(SpecError::field(
            format!("{at}.priority"),
            format!("is for SCHED_FIFO and SCHED_RR only, is {priority}"),
        ));
    }
    let [runtime, due, period] =
        [scheduler.runtime(), scheduler.deadline(), scheduler.period()].map(|value| value.unwrap_or(0));
    for (value, name) in [(runtime, "runtime"), (due, "deadline"), (period, "period")] {
        if value != 0 && !deadline {
            return Err(SpecError::field(format!("{at}.{name}"), "is for SCHED_DEADLINE only"));
        }
    }
    let flags = scheduler.flags().iter().flatten().fold(0, |flags, flag| flags | bit(*flag));
    Ok(Scheduler {
        policy: policy.cast_unsigned(),
        nice,
        priority,
        flags,
        runtime,
        deadline: due,
        period,
        ..Default::default()
    })
}

/// linux/sched.h
fn bit(flag: Flag) -> u64 {
    match flag {
        Flag::SchedResetOnFork => 0x01,
        Flag::SchedFlagReclaim => 0x02,
        Flag::SchedFlagDLOverrun => 0x04,
        Flag::SchedFlagKeepPolicy => 0x08,
        Flag::SchedFlagKeepParams => 0x10,
        Flag::SchedFlagUtilClampMin => 0x20,
        Flag::SchedFlagUtilClampMax => 0x40,
    }
}
