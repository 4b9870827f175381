//! The guest's wall clock, which follows the host's.

use std::time::Duration;

use nix::{
    errno::Errno,
    sys::time::TimeSpec,
    time::{ClockId, clock_gettime, clock_settime},
};

use crate::error::{Error, Step, StepResult};

/// A difference the clock is not stepped for: it is made to run a little faster
/// or slower until it is made up for, so that time neither jumps nor goes back.
/// The kernel does that by 0.5 ms a second; in the minute between two looks of
/// the host it makes up for this much and more.
const SLEWED: Duration = Duration::from_millis(20);

/// Sets the clock, in nanoseconds since the epoch, whatever it says.
pub fn set(wall_clock_ns: i64) -> Result<(), Error> {
    match wall_clock_ns {
        ..=0 => Err(Error::invalid("wall_clock_ns", "must be the time since the epoch in nanoseconds")),
        _ => Ok(step(wall_clock_ns)?),
    }
}

/// Moves the clock by so many nanoseconds, at once or, where they are few, by and by; returns what it is then.
pub fn adjust(ahead_ns: i64) -> StepResult<i64> {
    if Duration::from_nanos(ahead_ns.unsigned_abs()) > SLEWED {
        log::info!("the wall clock was off by {} ms", ahead_ns / 1_000_000);
        // What is left of an earlier difference must not come on top.
        slew(0)?;
        step(now()?.saturating_add(ahead_ns))?;
    } else if ahead_ns != 0 {
        slew(ahead_ns)?;
    }
    now()
}

fn now() -> StepResult<i64> {
    let now = clock_gettime(ClockId::CLOCK_REALTIME).step(|| "read the wall clock")?;
    Ok(now.tv_sec().saturating_mul(1_000_000_000).saturating_add(now.tv_nsec()))
}

fn step(wall_clock_ns: i64) -> StepResult<()> {
    let time = TimeSpec::new(wall_clock_ns / 1_000_000_000, wall_clock_ns % 1_000_000_000);
    clock_settime(ClockId::CLOCK_REALTIME, time).step(|| "set the wall clock")
}

fn slew(by_ns: i64) -> StepResult<()> {
    let by = libc::timeval { tv_sec: 0, tv_usec: by_ns / 1000 };
    // SAFETY: `by` is a valid timeval that outlives the call; the old one is not asked for.
    let result = unsafe { libc::adjtime(&raw const by, std::ptr::null_mut()) };
    Errno::result(result).map(drop).step(|| "adjust the wall clock")
}
