//! What KVM itself counts: one VM's statistics in debugfs, and returns of
//! `KVM_RUN` to user space by reason from its tracepoint, the same for every
//! monitor.

use std::{
    collections::BTreeMap,
    fs::{read_dir, read_to_string, write},
    path::{Path, PathBuf},
};

use anyhow::{Context, Result};
use nix::mount::{MsFlags, mount};

const DEBUGFS: &str = "/sys/kernel/debug";
const TRACEFS: &str = "/sys/kernel/tracing";

/// Makes debugfs and tracefs available to this process.
pub fn mount_both() -> Result<()> {
    for (kind, dir, probe) in [("debugfs", DEBUGFS, "kvm"), ("tracefs", TRACEFS, "events")] {
        if !Path::new(dir).join(probe).exists() {
            mount(Some(kind), dir, Some(kind), MsFlags::empty(), None::<&str>)
                .with_context(|| format!("mounting {kind} on {dir}"))?;
        }
    }
    Ok(())
}

/// The counters of a process's VM that are not zero.
pub fn of_vm(pid: libc::pid_t) -> BTreeMap<String, u64> {
    let mut counters = BTreeMap::new();
    let prefix = format!("{pid}-");
    for vm in read_dir(format!("{DEBUGFS}/kvm")).into_iter().flatten().flatten() {
        if !vm.file_name().to_string_lossy().starts_with(&prefix) {
            continue;
        }
        for file in read_dir(vm.path()).into_iter().flatten().flatten() {
            let value = read_to_string(file.path()).ok().and_then(|text| text.trim().parse::<u64>().ok());
            if let Some(value @ 1..) = value {
                counters.insert(file.file_name().to_string_lossy().into_owned(), value);
            }
        }
    }
    counters
}

/// Counts returns to user space by reason while it exists.
pub struct UserspaceExits {
    trigger: PathBuf,
}

impl UserspaceExits {
    /// Starts to count, for all VMs: let one run at a time.
    pub fn count() -> Result<Self> {
        let event = Path::new(TRACEFS).join("events/kvm/kvm_userspace_exit");
        let counter = Self { trigger: event.join("trigger") };
        write(&counter.trigger, "hist:keys=reason").context("a histogram of kvm_userspace_exit")?;
        Ok(counter)
    }

    /// So far, by reason.
    pub fn by_reason(&self) -> Result<BTreeMap<String, u64>> {
        let text = read_to_string(self.trigger.with_file_name("hist")).context("reading the histogram")?;
        Ok(parse(&text))
    }
}

impl Drop for UserspaceExits {
    fn drop(&mut self) {
        let _ = write(&self.trigger, "!hist:keys=reason");
    }
}

/// Lines such as `{ reason:          2 } hitcount:        280` (Documentation/trace/histogram.rst).
fn parse(text: &str) -> BTreeMap<String, u64> {
    let mut counts = BTreeMap::new();
    for line in text.lines() {
        let words: Vec<&str> = line.split_whitespace().collect();
        let ["{", "reason:", reason, "}", "hitcount:", count] = words[..] else { continue };
        let (Ok(reason), Ok(count)) = (reason.parse(), count.parse::<u64>()) else { continue };
        *counts.entry(reason_name(reason)).or_default() += count;
    }
    counts
}

/// `KVM_EXIT_*` (Documentation/virt/kvm/api.rst) of those that occur.
fn reason_name(reason: u32) -> String {
    match reason {
        2 => "io".into(),
        5 => "hlt".into(),
        6 => "mmio".into(),
        7 => "irq_window_open".into(),
        8 => "shutdown".into(),
        10 => "intr".into(),
        17 => "internal_error".into(),
        24 => "system_event".into(),
        other => format!("reason {other}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_histogram() {
        let text = "# event histogram\n#\n# trigger info: hist:keys=reason:vals=hitcount [active]\n#\n\n\
                    { reason:          2 } hitcount:        280\n{ reason:          6 } hitcount:         12\n\n\
                    Totals:\n    Hits: 292\n    Entries: 2\n    Dropped: 0\n";
        let expected = [("io".to_owned(), 280), ("mmio".to_owned(), 12)];
        assert_eq!(parse(text), BTreeMap::from(expected));
    }
}
