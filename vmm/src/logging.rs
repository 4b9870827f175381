//! Log lines on stderr, one per record: `LEVEL rvm-vmm[ID]: message`.
//!
//! The shim keeps the monitor's stderr; it adds the time.

use std::io::Write;

use log::{LevelFilter, Log, Metadata, Record};

struct StderrLogger {
    id: String,
}

impl Log for StderrLogger {
    fn enabled(&self, metadata: &Metadata<'_>) -> bool {
        // The FUSE decoder logs what the guest sends: a guest could fill the disk.
        metadata.level() <= log::max_level() && !metadata.target().starts_with("fuse_backend_rs")
    }

    fn log(&self, record: &Record<'_>) {
        if self.enabled(record.metadata()) {
            let line = format!("{} rvm-vmm[{}]: {}\n", record.level(), self.id, record.args());
            // Nobody is left to tell when stderr is gone.
            let _ = std::io::stderr().write_all(line.as_bytes());
        }
    }

    fn flush(&self) {}
}

/// Starts logging for sandbox `id`; a second call has no effect.
pub fn init(id: &str, level: LevelFilter) {
    if log::set_boxed_logger(Box::new(StderrLogger { id: id.to_owned() })).is_ok() {
        log::set_max_level(level);
    }
}
