//! Settings of the guest as a whole.

use nix::{
    sys::time::TimeSpec,
    time::{ClockId, clock_settime},
    unistd::sethostname,
};

use crate::error::{Error, Step};

/// Longest host name the kernel takes (`__NEW_UTS_LEN`).
pub const HOST_NAME_MAX: usize = 64;

/// Sets the wall clock, in nanoseconds since the epoch.
pub fn clock(wall_clock_ns: i64) -> Result<(), Error> {
    if wall_clock_ns <= 0 {
        return Err(Error::invalid("wall_clock_ns", "must be the time since the epoch in nanoseconds"));
    }
    let time = TimeSpec::new(wall_clock_ns / 1_000_000_000, wall_clock_ns % 1_000_000_000);
    Ok(clock_settime(ClockId::CLOCK_REALTIME, time).step(|| "set the wall clock")?)
}

/// Sets the guest's host name, where one is given.
pub fn hostname(name: &str) -> Result<(), Error> {
    check_name("hostname", name)?;
    if !name.is_empty() {
        sethostname(name).step(|| format!("set the host name {name:?}"))?;
    }
    Ok(())
}

/// Checks a host or domain name, which may be empty.
pub fn check_name(field: &str, name: &str) -> Result<(), Error> {
    if name.len() > HOST_NAME_MAX || name.contains('\0') {
        return Err(Error::invalid(
            field,
            format!("{name:?} must have at most {HOST_NAME_MAX} bytes and no NUL"),
        ));
    }
    Ok(())
}
