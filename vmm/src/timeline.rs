//! When each step of the start was reached.
//!
//! Zero is the monitor's exec. The parent can say when that was
//! (`RVM_EXEC_BOOTTIME_NS`, `CLOCK_BOOTTIME` in nanoseconds); else the process's
//! CPU time until now stands for the time since exec, which is right as long as
//! the process never waited: at the start of `main` it has done nothing but be
//! loaded. `/proc/self/stat` counts in 10 ms, coarser than the whole start.

use std::sync::Mutex;

/// Environment variable with the time of exec.
pub const EXEC_TIME_ENV: &str = "RVM_EXEC_BOOTTIME_NS";

/// Steps of the start with their times.
#[derive(Debug)]
pub struct Timeline {
    exec_ns: u64,
    steps: Mutex<Vec<(&'static str, u64)>>,
}

impl Timeline {
    /// A timeline of this process; call it first in `main`.
    pub fn from_exec() -> Self {
        let now = clock_ns(libc::CLOCK_BOOTTIME);
        let told = std::env::var(EXEC_TIME_ENV).ok().and_then(|v| v.parse().ok());
        let exec_ns = told
            .filter(|&t| t <= now)
            .unwrap_or_else(|| now.saturating_sub(clock_ns(libc::CLOCK_PROCESS_CPUTIME_ID)));
        let timeline = Self { exec_ns, steps: Mutex::new(Vec::with_capacity(16)) };
        timeline.reached("main");
        timeline
    }

    /// Notes that `step` has just been reached.
    pub fn reached(&self, step: &'static str) {
        let us = clock_ns(libc::CLOCK_BOOTTIME).saturating_sub(self.exec_ns) / 1000;
        if let Ok(mut steps) = self.steps.lock() {
            steps.push((step, us));
        }
    }

    /// The steps so far, in order, in microseconds since exec.
    pub fn steps_us(&self) -> Vec<(String, u64)> {
        let steps = self.steps.lock().map(|s| s.clone()).unwrap_or_default();
        steps.into_iter().map(|(name, us)| (name.to_owned(), us)).collect()
    }
}

fn clock_ns(clock: libc::clockid_t) -> u64 {
    let mut time = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: `time` is a valid timespec for the call to fill; both clocks always exist.
    unsafe { libc::clock_gettime(clock, &mut time) };
    time.tv_sec as u64 * 1_000_000_000 + time.tv_nsec as u64
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn steps_are_in_order_and_count_from_exec() {
        let timeline = Timeline::from_exec();
        timeline.reached("a");
        timeline.reached("b");
        let steps = timeline.steps_us();
        let names: Vec<_> = steps.iter().map(|(n, _)| n.as_str()).collect();
        assert_eq!(names, ["main", "a", "b"]);
        assert!(steps.windows(2).all(|w| w[0].1 <= w[1].1), "{steps:?}");
    }
}
