//! Memory that is plugged into the running guest, and taken out again.
//!
//! virtio-mem's driver does the work, at the host's word. What is left to do is
//! to find the device when it is plugged in, to say what its memory is to be
//! used for, and to tell when it is there.

use std::{
    fs,
    sync::OnceLock,
    time::{Duration, Instant},
};

use tokio::time::timeout;

use crate::{
    error::{Step, StepError, StepResult},
    helper::{self, Outcome},
    reaper::Reaper,
    sys::{pci, uevent::Uevents},
};

/// What becomes of new memory: it is used at once ...
const ONLINE: (&str, &str) = ("/sys/devices/system/memory/auto_online_blocks", "online");
/// ... three quarters of it for what can be moved elsewhere, and so can be taken
/// out again. The kernel's own data grows with memory, its page descriptors
/// before all; with nothing for that but what it started with, a small guest
/// could not become a large one.
const POLICY: (&str, &str) = ("/sys/module/memory_hotplug/parameters/online_policy", "auto-movable");
const MEMINFO: &str = "/proc/meminfo";
/// The pages of 2 MiB that the kernel keeps ready for hugetlbfs.
const HUGE_PAGES: &str = "/sys/kernel/mm/hugepages/hugepages-2048kB/nr_hugepages";

/// The kernel tells of each block of 128 MiB that comes or goes, but not of
/// parts of one: those are looked for this often.
const LOOK_AGAIN: Duration = Duration::from_millis(100);
/// Nothing has come for so long: it will not, the kernel has no memory to manage
/// more with, or no driver.
const NOTHING_COMES: Duration = Duration::from_secs(10);
/// Nothing has gone for so long: the rest is in use. The driver tries again
/// after most of a minute, nobody waits for that.
const NOTHING_GOES: Duration = Duration::from_secs(3);

/// The guest's memory.
#[derive(Debug, Default)]
pub struct Memory {
    /// Bytes of it before the first was plugged in.
    boot: OnceLock<u64>,
}

impl Memory {
    /// Waits until `wanted` bytes are plugged in and used, or nothing more comes or
    /// goes; returns how many are.
    pub async fn wait_for(&self, wanted: u64, reaper: &Reaper) -> StepResult<u64> {
        // First, so that nothing is missed.
        let uevents = Uevents::open().step(|| "listen for the kernel's events")?;
        let boot = self.boot(reaper).await?;
        let start = plugged(boot)?;
        let reached = |now: u64| if start < wanted { now >= wanted } else { now <= wanted };
        let patience = if start < wanted { NOTHING_COMES } else { NOTHING_GOES };
        let (mut last, mut changed) = (start, Instant::now());
        loop {
            let now = plugged(boot)?;
            if now != last {
                (last, changed) = (now, Instant::now());
            }
            if reached(now) || changed.elapsed() >= patience {
                return Ok(now);
            }
            if let Ok(heard) = timeout(LOOK_AGAIN, uevents.any()).await {
                heard.step(|| "listen for the kernel's events")?;
            }
        }
    }

    /// What the guest started with; looks for the device the first time.
    async fn boot(&self, reaper: &Reaper) -> StepResult<u64> {
        if let Some(boot) = self.boot.get() {
            return Ok(*boot);
        }
        let boot = total()?;
        for (file, value) in [ONLINE, POLICY] {
            fs::write(file, value).step(|| format!("write {value:?} to {file}"))?;
        }
        helper::run(reaper, "look for plugged memory", || pci::rescan().map(|()| Outcome::default())).await?;
        Ok(*self.boot.get_or_init(|| boot))
    }
}

/// Has the kernel keep so many huge pages ready, as far as it can. It takes them first where
/// memory can be moved: that was plugged in, and the host's huge pages are behind it.
pub fn set_huge_pages(count: u64) -> StepResult<()> {
    fs::write(HUGE_PAGES, count.to_string()).step(|| format!("write {count} to {HUGE_PAGES}"))
}

/// How many it keeps.
pub fn huge_pages() -> StepResult<u64> {
    let text = fs::read_to_string(HUGE_PAGES).step(|| format!("read {HUGE_PAGES}"))?;
    text.trim().parse().map_err(|_| StepError::Refused(format!("{HUGE_PAGES} is {text:?}")))
}

fn plugged(boot: u64) -> StepResult<u64> {
    Ok(total()?.saturating_sub(boot))
}

/// Bytes of memory the kernel manages.
fn total() -> StepResult<u64> {
    let text = fs::read_to_string(MEMINFO).step(|| format!("read {MEMINFO}"))?;
    mem_total(&text).ok_or_else(|| StepError::Refused(format!("{MEMINFO} has no MemTotal")))
}

fn mem_total(meminfo: &str) -> Option<u64> {
    let value = meminfo.lines().find_map(|line| line.strip_prefix("MemTotal:"))?;
    value.trim().strip_suffix(" kB")?.parse::<u64>().ok()?.checked_mul(1024)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memory_is_counted_in_bytes() {
        let text = "MemTotal:         490336 kB\nMemFree:          470000 kB\n";
        assert_eq!(mem_total(text), Some(490_336 * 1024));
        assert_eq!(mem_total("MemFree: 1 kB\n"), None);
        assert_eq!(mem_total("MemTotal: x kB\n"), None);
        assert!(total().unwrap() > 0);
    }
}
