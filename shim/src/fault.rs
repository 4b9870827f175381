//! Faults at chosen points, for tests: a build without the feature `faults` has nothing of it.
//!
//! What shims do passes points, which are counted over all processes of a shim. A plan, `N SIGNAL VICTIM` in the file that
//! `RVM_FAULT` names, says at which of them a signal is sent, and to whom: `shim`, `monitor`, or a process by its id. Just before
//! it is, the plan is renamed `FILE.done`, and then is the id of that process. `FILE.passed` has a line for each point.

#[cfg(feature = "faults")]
pub use planned::{monitor_is, point};

/// Nothing is planned.
#[cfg(not(feature = "faults"))]
pub fn point(_name: impl std::fmt::Display) {}

/// Nothing is planned for it.
#[cfg(not(feature = "faults"))]
pub fn monitor_is(_pid: u32) {}

#[cfg(feature = "faults")]
mod planned {
    use std::{
        fs::{self, File},
        io::{Seek, Write},
        path::PathBuf,
        sync::{
            OnceLock,
            atomic::{AtomicI32, Ordering},
        },
    };

    use nix::{
        sys::signal::{Signal, kill},
        unistd::{Pid, getpid},
    };

    /// Names the plan's file.
    const VARIABLE: &str = "RVM_FAULT";
    /// Bytes of a line of what was passed, so that its place tells its number.
    const LINE: usize = 64;

    static FILE: OnceLock<Option<PathBuf>> = OnceLock::new();
    static MONITOR: AtomicI32 = AtomicI32::new(0);

    /// Says which process the monitor is.
    pub fn monitor_is(pid: u32) {
        MONITOR.store(pid.cast_signed(), Ordering::Relaxed);
    }

    /// Passes a point.
    pub fn point(name: impl std::fmt::Display) {
        let file = FILE.get_or_init(|| std::env::var_os(VARIABLE).map(PathBuf::from));
        // No plan is the usual case.
        let Some(file) = file.as_ref().filter(|file| file.exists()) else { return };
        if let Some((signal, victim)) = due(file, &name.to_string())
            && fs::write(file, victim.to_string()).is_ok()
            && fs::rename(file, file.with_extension("done")).is_ok()
        {
            let _ = kill(victim, signal);
        }
    }

    /// Counts the point; what is planned for it.
    fn due(file: &PathBuf, name: &str) -> Option<(Signal, Pid)> {
        let mut passed =
            File::options().create(true).append(true).open(file.with_extension("passed")).ok()?;
        let line = format!("{name:<width$.width$}\n", width = LINE - 1);
        passed.write_all(line.as_bytes()).ok()?;
        let number = passed.stream_position().ok()? / u64::try_from(LINE).ok()?;
        let plan = fs::read_to_string(file).ok()?;
        let mut words = plan.split_whitespace();
        words.next()?.parse::<u64>().ok().filter(|at| *at == number)?;
        let signal = Signal::try_from(words.next()?.parse::<i32>().ok()?).ok()?;
        let victim = match words.next()? {
            "shim" => getpid(),
            "monitor" => Pid::from_raw(MONITOR.load(Ordering::Relaxed)),
            pid => Pid::from_raw(pid.parse().ok()?),
        };
        // Nobody, where there is none yet; 0 would be the process group.
        (victim.as_raw() > 1).then_some((signal, victim))
    }
}
