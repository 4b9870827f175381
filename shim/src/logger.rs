//! Logging to the FIFO containerd collects its shims' logs from.

use std::{
    fs::{File, OpenOptions},
    io::{self, Write},
    os::unix::fs::OpenOptionsExt,
    path::Path,
    time::{SystemTime, UNIX_EPOCH},
};

use log::{Level, LevelFilter, Log, Metadata, Record};

/// The FIFO's name in the bundle.
pub const FIFO: &str = "log";

struct Logger {
    /// Written in single writes, each shorter than PIPE_BUF or torn at worst.
    file: File,
    sandbox: String,
}

/// Logs to the FIFO in `bundle`. A containerd that does not read it loses lines
/// and holds nobody up.
pub fn init(bundle: &Path, sandbox: String, level: LevelFilter) -> io::Result<()> {
    let file = OpenOptions::new().write(true).custom_flags(libc::O_NONBLOCK).open(bundle.join(FIFO))?;
    log::set_boxed_logger(Box::new(Logger { file, sandbox })).map_err(io::Error::other)?;
    log::set_max_level(level);
    Ok(())
}

impl Log for Logger {
    fn enabled(&self, metadata: &Metadata) -> bool {
        // ttrpc reports every refused request as an error of its own.
        let noisy = metadata.target().starts_with("ttrpc");
        metadata.level() <= log::max_level() && (!noisy || log::max_level() == LevelFilter::Trace)
    }

    fn log(&self, record: &Record) {
        if self.enabled(record.metadata()) {
            let line = format_line(SystemTime::now(), record.level(), &self.sandbox, record.args());
            let _ = (&self.file).write_all(line.as_bytes());
        }
    }

    fn flush(&self) {}
}

/// containerd's own form (logfmt); the message is quoted, so that nothing in it
/// looks like another line.
fn format_line(at: SystemTime, level: Level, sandbox: &str, message: &std::fmt::Arguments) -> String {
    let level = match level {
        Level::Warn => "warning",
        Level::Error => "error",
        Level::Info => "info",
        Level::Debug => "debug",
        Level::Trace => "trace",
    };
    let message = serde_json::to_string(&message.to_string()).unwrap_or_default();
    format!("time=\"{}\" level={level} msg={message} runtime=io.rvm.v2 sandbox={sandbox}\n", rfc3339(at))
}

/// `2026-01-31T12:00:00.000000000Z`.
fn rfc3339(at: SystemTime) -> String {
    let since = at.duration_since(UNIX_EPOCH).unwrap_or_default();
    let (days, second) = (since.as_secs() / 86_400, since.as_secs() % 86_400);
    let (year, month, day) = civil(days);
    format!(
        "{year:04}-{month:02}-{day:02}T{:02}:{:02}:{:02}.{:09}Z",
        second / 3600,
        second / 60 % 60,
        second % 60,
        since.subsec_nanos()
    )
}

/// Year, month and day of a day since the epoch, counted in eras of 400 years
/// that begin on the first of March.
fn civil(days: u64) -> (u64, u64, u64) {
    let days = days + 719_468;
    let (era, day_of_era) = (days / 146_097, days % 146_097);
    let year_of_era = (day_of_era - day_of_era / 1460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
    let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let shifted = (5 * day_of_year + 2) / 153;
    let day = day_of_year - (153 * shifted + 2) / 5 + 1;
    let month = if shifted < 10 { shifted + 3 } else { shifted - 9 };
    (era * 400 + year_of_era + u64::from(month <= 2), month, day)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;

    #[test]
    fn dates() {
        for (seconds, text) in [
            (0, "1970-01-01T00:00:00.000000000Z"),
            (951_782_400, "2000-02-29T00:00:00.000000000Z"),
            (1_709_251_199, "2024-02-29T23:59:59.000000000Z"),
            (4_102_444_800, "2100-01-01T00:00:00.000000000Z"),
        ] {
            assert_eq!(rfc3339(UNIX_EPOCH + Duration::from_secs(seconds)), text);
        }
    }

    #[test]
    fn a_message_cannot_pretend_to_be_a_line() {
        let line = format_line(UNIX_EPOCH, Level::Info, "default/web", &format_args!("a\"\nlevel=error"));
        assert_eq!(
            line,
            "time=\"1970-01-01T00:00:00.000000000Z\" level=info msg=\"a\\\"\\nlevel=error\" \
             runtime=io.rvm.v2 sandbox=default/web\n"
        );
    }
}
