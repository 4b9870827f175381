//! What one idle sandbox costs its host: shim and monitor without the guest's
//! memory, and what the guest has touched of it.

use std::{fs::read_to_string, path::Path};

use anyhow::{Context, Result};
use rvm_tests::{sandbox::Sandbox, scale, stage::Stage, world::World};
use serde_json::{Value, json};

use crate::monitor::metrics;

/// vCPUs and memory in MiB.
const SIZES: [(u8, u64); 4] = [(1, 128), (1, 1024), (4, 128), (4, 1024)];

/// Starts one container of each size and looks.
pub fn measure(stage: Stage) -> Result<Value> {
    let world = World::new(stage)?;
    let mut sizes = Vec::new();
    for (vcpus, memory_mib) in SIZES {
        let config = world.config();
        let config = config.set("guest", "vcpus", &vcpus.to_string());
        world.set_config(&config.set("guest", "memory_mib", &memory_mib.to_string()))?;
        let ctr = world.ctr();
        let run = ctr.container("memory").detached();
        run.run(&["sleep", "100000"])?.success()?;
        let sandbox = Sandbox::find(world.stage(), &run.id)?;
        let counted = metrics(&sandbox.dir().join("vmm.sock"))?;
        let shim = Smaps::read(sandbox.shim.pid, &world.stage().kernel())?;
        let monitor = Smaps::read(sandbox.monitor.pid, &world.stage().kernel())?;
        eprintln!(
            "{vcpus} vCPUs, {memory_mib} MiB: shim {} KiB, monitor {} KiB, guest touched {} KiB",
            shim.own_pss_kib,
            monitor.own_pss_kib,
            counted.memory_resident_bytes / 1024
        );
        sizes.push(json!({
            "vcpus": vcpus,
            "memory_mib": memory_mib,
            "shim_pss_kib": shim.own_pss_kib,
            "monitor_pss_kib": monitor.own_pss_kib,
            "guest_touched_kib": counted.memory_resident_bytes / 1024,
            "guest_mappings_rss_kib": monitor.guest_rss_kib,
        }));
        ctr.run(&["task", "kill", "-s", "SIGKILL", &run.id], scale::command())?.success()?;
        world.events(|events| events.wait_for("/tasks/exit", &run.id, scale::container()))?;
        ctr.remove(&run.id)?;
        sandbox.wait_until_gone(scale::command())?;
    }
    Ok(Value::Array(sizes))
}

/// A process's memory, that of its guest apart.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Smaps {
    /// Proportional set size of all mappings that are not the guest's.
    own_pss_kib: u64,
    /// Resident size of the guest's.
    guest_rss_kib: u64,
}

impl Smaps {
    fn read(pid: libc::pid_t, kernel: &Path) -> Result<Self> {
        let path = format!("/proc/{pid}/smaps");
        let text = read_to_string(&path).with_context(|| format!("reading {path}"))?;
        Ok(Self::parse(&text, &kernel.to_string_lossy()))
    }

    /// A guest's memory is the only file without a name that is mapped shared, and
    /// its kernel is mapped from its file (proc_pid_smaps(5)).
    fn parse(text: &str, kernel: &str) -> Self {
        let mut smaps = Self::default();
        let mut guest = false;
        for line in text.lines() {
            let mut words = line.split_whitespace();
            let first = words.next().unwrap_or_default();
            if first.contains('-') && !first.ends_with(':') {
                let shared = words.next().is_some_and(|permissions| permissions.ends_with('s'));
                guest = shared && line.ends_with(" (deleted)") || line.ends_with(kernel);
                continue;
            }
            let kib: u64 = words.next().and_then(|word| word.parse().ok()).unwrap_or(0);
            match (first, guest) {
                ("Pss:", false) => smaps.own_pss_kib += kib,
                ("Rss:", true) => smaps.guest_rss_kib += kib,
                _ => {}
            }
        }
        smaps
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_guests_memory_is_not_its_monitors() {
        let text = "\
7f00-7f10 rw-s 00000000 00:2a 7 /#7 (deleted)
Rss:                 900 kB
Pss:                 900 kB
7f10-7f20 rw-p 00000000 08:01 8 /usr/share/rvm/vmlinux
Rss:                  80 kB
Pss:                  40 kB
7f20-7f30 rw-s 00000000 00:0e 9 anon_inode:kvm-vcpu:0
Rss:                   8 kB
Pss:                   8 kB
7f30-7f40 rw-p 00000000 00:00 0 [heap]
Rss:                  12 kB
Pss:                  10 kB
VmFlags: rd wr mr mw me ac
";
        assert_eq!(
            Smaps::parse(text, "/usr/share/rvm/vmlinux"),
            Smaps { own_pss_kib: 18, guest_rss_kib: 980 }
        );
    }
}
