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

/// Counts how often a tracepoint is passed, by one of its numbers, while it exists.
pub struct Histogram {
    trigger: PathBuf,
    wanted: String,
}

impl Histogram {
    /// Starts to count `event`, by its field `key`, where `filter` holds.
    pub fn count(event: &str, key: &str, filter: Option<&str>) -> Result<Self> {
        let trigger = Path::new(TRACEFS).join("events").join(event).join("trigger");
        let filter = filter.map(|filter| format!(" if {filter}")).unwrap_or_default();
        let counter = Self { trigger, wanted: format!("hist:keys={key}{filter}") };
        write(&counter.trigger, &counter.wanted).with_context(|| format!("a histogram of {event}"))?;
        Ok(counter)
    }

    /// So far, by the key.
    pub fn counts(&self) -> Result<BTreeMap<u64, u64>> {
        let text = read_to_string(self.trigger.with_file_name("hist")).context("reading the histogram")?;
        Ok(parse(&text))
    }
}

impl Drop for Histogram {
    fn drop(&mut self) {
        let _ = write(&self.trigger, format!("!{}", self.wanted));
    }
}

/// Counts returns to user space by reason while it exists, of all VMs: let one run at a time.
pub struct UserspaceExits(Histogram);

impl UserspaceExits {
    /// Starts to count.
    pub fn count() -> Result<Self> {
        Histogram::count("kvm/kvm_userspace_exit", "reason", None).map(Self)
    }

    /// So far, by reason.
    pub fn by_reason(&self) -> Result<BTreeMap<String, u64>> {
        let named = |(reason, count)| (reason_name(reason), count);
        Ok(self.0.counts()?.into_iter().map(named).collect())
    }
}

/// Lines such as `{ reason:          2 } hitcount:        280` (Documentation/trace/histogram.rst).
fn parse(text: &str) -> BTreeMap<u64, u64> {
    let mut counts = BTreeMap::new();
    for line in text.lines() {
        let words: Vec<&str> = line.split_whitespace().collect();
        let ["{", _, key, "}", "hitcount:", count] = words[..] else { continue };
        let (Ok(key), Ok(count)) = (key.parse(), count.parse::<u64>()) else { continue };
        *counts.entry(key).or_default() += count;
    }
    counts
}

/// `KVM_EXIT_*` (Documentation/virt/kvm/api.rst) of those that occur.
fn reason_name(reason: u64) -> String {
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
        let expected = [(2, 280), (6, 12)];
        assert_eq!(parse(text), BTreeMap::from(expected));
    }
}
