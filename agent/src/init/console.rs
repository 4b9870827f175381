//! Log lines and panics, to the console and so to the host's log of it.

use std::io::Write;

use log::{LevelFilter, Log, Metadata, Record};

use super::shutdown;
use crate::sys::process;

/// Kernel parameters the kernel does not know and that hold a `=` become
/// environment variables of its first process: `RVM_LOG=debug`.
const LEVEL_VARIABLE: &str = "RVM_LOG";

/// Standard error is the console: the kernel opened it for us. Not `/dev/kmsg`,
/// whose lines a quiet console does not print; every line costs the host an
/// exit per character, so the default level is a quiet one.
struct Console;

impl Log for Console {
    fn enabled(&self, metadata: &Metadata<'_>) -> bool {
        metadata.level() <= log::max_level()
    }

    fn log(&self, record: &Record<'_>) {
        if self.enabled(record.metadata()) {
            let level = record.level().as_str().to_ascii_lowercase();
            write_line(&format!("{level}: {}", record.args()));
        }
    }

    fn flush(&self) {}
}

/// Writes a line stamped as the kernel stamps its own.
fn write_line(text: &str) {
    let now = nix::time::clock_gettime(nix::time::ClockId::CLOCK_BOOTTIME);
    let (seconds, micros) = now.map_or((0, 0), |now| (now.tv_sec(), now.tv_nsec() / 1000));
    let line = format!("[{seconds:5}.{micros:06}] rvm-agent: {text}\n");
    // There is nowhere else to complain to.
    let _ = std::io::stderr().write_all(line.as_bytes());
}

/// The console level of a guest that boots (`loglevel` of its command line).
const BOOT_LEVEL: &str = "3";
/// Errors, and what is worse.
const ERROR_LEVEL: &str = "4";

/// Lets the kernel's errors onto the console too, as long as nobody has asked for
/// another level. While it boots they would only be what this CPU cannot do.
pub fn show_kernel_errors() -> std::io::Result<()> {
    const LEVELS: &str = "/proc/sys/kernel/printk";
    let levels = std::fs::read_to_string(LEVELS)?;
    if levels.split_whitespace().next() == Some(BOOT_LEVEL) {
        std::fs::write(LEVELS, ERROR_LEVEL)?;
    }
    Ok(())
}

/// Sends log lines to the console and makes a panic reboot the VM.
pub fn install() {
    let level = std::env::var(LEVEL_VARIABLE).ok();
    let level = level.and_then(|level| level.parse().ok()).unwrap_or(LevelFilter::Warn);
    // Fails only when called twice, and then the first call stands.
    if log::set_logger(&Console).is_ok() {
        log::set_max_level(level);
    }
    std::panic::set_hook(Box::new(|panic| {
        write_line(&format!("{panic}"));
        if process::in_child() {
            // Only this child is lost; its parent sees the channel close.
            process::exit_child(125);
        }
        shutdown::reboot()
    }));
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_boot_level_is_the_command_lines() {
        let loglevel = format!("loglevel={BOOT_LEVEL}");
        assert!(rvm_protocol::guest::DEFAULT_CMDLINE.split(' ').any(|word| word == loglevel));
    }
}
