//! Log lines on stderr, one per record: `LEVEL rvm-vmm[ID]: message`.
//!
//! The shim keeps the monitor's stderr; it adds the time. Much of what is worth
//! a line is caused by the guest, which can cause it for ever: there is a budget
//! of lines, and what exceeds it is only counted.

use std::io::Write;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use log::{LevelFilter, Log, Metadata, Record};

/// Lines that may come at once.
const BURST: u32 = 200;
/// Time in which the budget grows by a line.
const PER_LINE: Duration = Duration::from_secs(10);

/// Says a line on stderr, also before there is a log. Whoever would hear it may be gone, which is no reason to end otherwise.
pub fn say(line: &str) {
    let line = format!("rvm-vmm: {}\n", line.replace('\n', " "));
    let _ = std::io::stderr().write_all(line.as_bytes());
}

struct StderrLogger {
    id: String,
    budget: Mutex<Budget>,
}

struct Budget {
    lines: u32,
    filled: Instant,
    suppressed: u64,
}

impl Budget {
    fn new(now: Instant) -> Self {
        Self { lines: BURST, filled: now, suppressed: 0 }
    }

    /// Takes a line out of the budget: how many were suppressed before it, or
    /// `None` where this one is.
    fn take(&mut self, now: Instant) -> Option<u64> {
        let due = now.saturating_duration_since(self.filled).as_secs() / PER_LINE.as_secs();
        if due > 0 {
            self.lines = u32::try_from(due).map_or(BURST, |due| BURST.min(self.lines.saturating_add(due)));
            self.filled = now;
        }
        if self.lines == 0 {
            self.suppressed += 1;
            return None;
        }
        self.lines -= 1;
        Some(std::mem::take(&mut self.suppressed))
    }
}

impl Log for StderrLogger {
    fn enabled(&self, metadata: &Metadata<'_>) -> bool {
        // The FUSE decoder's lines are about messages of the guest, which are
        // answered to the guest: they would use up the budget of our own.
        metadata.level() <= log::max_level() && !metadata.target().starts_with("fuse_backend_rs")
    }

    fn log(&self, record: &Record<'_>) {
        if !self.enabled(record.metadata()) {
            return;
        }
        let taken = self.budget.lock().unwrap_or_else(PoisonError::into_inner).take(Instant::now());
        let Some(suppressed) = taken else { return };
        let before = match suppressed {
            0 => String::new(),
            count => format!("({count} lines suppressed) "),
        };
        let line = format!("{} rvm-vmm[{}]: {before}{}\n", record.level(), self.id, record.args());
        // Nobody is left to tell when stderr is gone.
        let _ = std::io::stderr().write_all(line.as_bytes());
    }

    fn flush(&self) {}
}

/// Starts logging for sandbox `id`; a second call has no effect.
pub fn init(id: &str, level: LevelFilter) {
    let budget = Mutex::new(Budget::new(Instant::now()));
    if log::set_boxed_logger(Box::new(StderrLogger { id: id.to_owned(), budget })).is_ok() {
        log::set_max_level(level);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn endless_lines_are_counted_instead_of_written() {
        let start = Instant::now();
        let mut budget = Budget::new(start);
        let written = (0..10_000).filter(|_| budget.take(start).is_some()).count();
        assert_eq!(written, BURST as usize);
        assert_eq!(budget.take(start + PER_LINE), Some(10_000 - u64::from(BURST)));
        assert_eq!(budget.take(start + PER_LINE), None);
        let later = start + PER_LINE * (BURST * 10);
        assert_eq!((0..10_000).filter(|_| budget.take(later).is_some()).count(), BURST as usize);
    }
}
