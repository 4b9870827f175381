//! What sandboxes of one host share of its processors and its memory, beside what KVM keeps apart.

use std::fs;

use super::Check;

/// Two guests on two threads of one core share its caches and buffers.
pub(super) fn smt() -> Check {
    let active = fs::read_to_string("/sys/devices/system/cpu/smt/active").unwrap_or_default();
    of_smt(active.trim() == "1", has_core_scheduling())
}

fn of_smt(active: bool, core_scheduling: bool) -> Check {
    let name = "smt";
    if !active {
        return Check::ok(name, "no core is shared: it has one thread, or no more are used");
    }
    let detail = "two sandboxes may run on the threads of one core at a time, and learn of each other there";
    let remedy = if core_scheduling {
        "sched_core = true for containerd's [plugins.\"io.containerd.runtime.v2.task\"], or mitigations=auto,nosmt"
    } else {
        "mitigations=auto,nosmt, or a kernel with CONFIG_SCHED_CORE and sched_core = true for containerd's runtime plugin"
    };
    Check::optional(name, detail, remedy)
}

/// Whether the kernel takes a question for this process's cookie, which most have none of.
fn has_core_scheduling() -> bool {
    let (mut cookie, this) = (0u64, 0);
    // SAFETY: PR_SCHED_CORE_GET writes a u64, which outlives the call.
    let asked = unsafe {
        libc::prctl(
            libc::PR_SCHED_CORE,
            libc::PR_SCHED_CORE_GET,
            this,
            libc::PR_SCHED_CORE_SCOPE_THREAD,
            &raw mut cookie,
        )
    };
    asked == 0
}

/// Who writes to a page that is merged with another's learns by the time it takes.
pub(super) fn ksm() -> Check {
    let run = fs::read_to_string("/sys/kernel/mm/ksm/run").unwrap_or_default();
    of_ksm(run.trim() == "1")
}

fn of_ksm(runs: bool) -> Check {
    let name = "ksm";
    if runs {
        return Check::ok(name, "runs, and merges no page of a guest's: monitors refuse it");
    }
    Check::ok(name, "does not run")
}

/// What a guest keeps in its memory may be on the host's disk.
pub(super) fn swap() -> Check {
    of_swap(&fs::read_to_string("/proc/swaps").unwrap_or_default())
}

fn of_swap(table: &str) -> Check {
    let name = "swap";
    let devices: Vec<&str> =
        table.lines().skip(1).filter_map(|line| line.split_whitespace().next()).collect();
    // zram is memory.
    let disks: Vec<&str> =
        devices.iter().copied().filter(|device| !device.starts_with("/dev/zram")).collect();
    if disks.is_empty() {
        return Check::ok(name, "none on a disk: what is in a guest's memory stays in memory");
    }
    let detail = format!("memory of guests may be written to {}", disks.join(", "));
    let remedy = "swapoff -a, or a key made anew at each start of the host (crypttab: /dev/urandom, swap)";
    Check::optional(name, detail, remedy)
}

#[cfg(test)]
mod tests {
    use super::{super::Status, *};

    #[test]
    fn shared_cores_are_told_with_what_helps_on_this_kernel() {
        assert_eq!(of_smt(false, false).status, Status::Ok);
        assert!(of_smt(true, true).remedy.starts_with("sched_core"));
        assert!(of_smt(true, false).remedy.contains("CONFIG_SCHED_CORE"));
    }

    #[test]
    fn swap_on_disks_is_told_by_name() {
        let head = "Filename\t\t\t\tType\t\tSize\t\tUsed\t\tPriority\n";
        assert_eq!(of_swap(head).status, Status::Ok);
        assert_eq!(of_swap(&format!("{head}/dev/zram0 partition 8388604 0 100\n")).status, Status::Ok);
        let check = of_swap(&format!("{head}/dev/zram0 partition 8 0 1\n/dev/sda2 partition 9 0 -2\n"));
        assert_eq!(check.status, Status::Optional);
        assert!(check.detail.ends_with(" /dev/sda2"), "{check:?}");
    }

    #[test]
    fn ksm_is_told_either_way() {
        assert_ne!(of_ksm(true), of_ksm(false));
    }
}
