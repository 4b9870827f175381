//! How large a machine is: the container's limits, and what the guest itself
//! needs beside it.

use rvm_protocol::agent::Resources;

use crate::{cgroup::DEFAULT_PERIOD_US, config::Guest};

/// What kernel and agent use, in MiB: their text and data, and what a running
/// container costs the kernel outside its own memory limit.
const FIXED_OVERHEAD_MIB: u64 = 48;
/// The kernel keeps 64 bytes for each page of 4096, and page tables beside.
const OVERHEAD_PER_MEMORY: u64 = 32;

/// The most memory a monitor gives its machine, in MiB.
const MAX_MEMORY_MIB: u64 = 1 << 20;
/// Memory is plugged in by so many MiB: blocks of Linux's.
const HOTPLUG_STEP_MIB: u64 = 128;

/// What the machine of a sandbox has.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Size {
    /// Virtual CPUs.
    pub vcpus: u8,
    /// Memory in MiB.
    pub memory_mib: u64,
}

/// What the host has.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct HostSize {
    /// CPUs this process may run on.
    pub cpus: u64,
    /// Memory in MiB.
    pub memory_mib: u64,
}

impl HostSize {
    /// Of this host; what cannot be found out limits nothing.
    pub fn read() -> Self {
        let cpus = std::thread::available_parallelism().map_or(u64::MAX, |cpus| cpus.get() as u64);
        // SAFETY: sysconf(3) takes a number and returns one.
        let pages = unsafe { libc::sysconf(libc::_SC_PHYS_PAGES) };
        // SAFETY: as above.
        let page = unsafe { libc::sysconf(libc::_SC_PAGESIZE) };
        let bytes = u64::try_from(pages).ok().zip(u64::try_from(page).ok()).map(|(a, b)| a.saturating_mul(b));
        Self { cpus, memory_mib: bytes.map_or(u64::MAX, |bytes| bytes >> 20) }
    }
}

impl Size {
    /// For a container with `resources`: as large as its limits need, and as the
    /// configuration says where it has none.
    pub fn of(resources: &Resources, guest: &Guest, host: HostSize) -> Self {
        Self { vcpus: vcpus(resources, guest, host), memory_mib: memory_mib(resources, guest, host) }
    }
}

/// What a machine's memory may become.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Room {
    /// MiB it starts with.
    pub boot_mib: u64,
    /// MiB that can be plugged in beside that.
    pub hotplug_mib: u64,
}

impl Room {
    /// All of the host's memory: what the guest does not touch, the host does not
    /// give.
    pub fn of(size: Size, host: HostSize) -> Self {
        let most = host.memory_mib.min(MAX_MEMORY_MIB);
        let rest = most.saturating_sub(size.memory_mib);
        Self { boot_mib: size.memory_mib, hotplug_mib: rest - rest % HOTPLUG_STEP_MIB }
    }

    /// MiB that have to be plugged in so that a container may use `limit` bytes;
    /// `None` where there is not so much.
    pub fn plugged_for(self, limit: i64) -> Option<u64> {
        let limit = u64::try_from(limit).ok()?;
        let missing = with_overhead(limit.div_ceil(1 << 20)).saturating_sub(self.boot_mib);
        missing.checked_next_multiple_of(HOTPLUG_STEP_MIB).filter(|plugged| *plugged <= self.hotplug_mib)
    }
}

/// Enough memory for the limit, and never less than configured, so that a limit
/// can be raised up to there; what the guest does not touch, the host does not
/// give. A limit above the host's memory is none.
fn memory_mib(resources: &Resources, guest: &Guest, host: HostSize) -> u64 {
    let limit = resources.memory_max.and_then(|limit| u64::try_from(limit).ok()).filter(|limit| *limit > 0);
    let Some(limit) = limit else { return guest.memory_mib };
    with_overhead(limit.div_ceil(1 << 20)).min(host.memory_mib).max(guest.memory_mib)
}

/// A limit of so many MiB, and what the guest needs beside it.
fn with_overhead(limit_mib: u64) -> u64 {
    limit_mib.saturating_add(FIXED_OVERHEAD_MIB).saturating_add(limit_mib / OVERHEAD_PER_MEMORY)
}

/// As many as the quota can keep busy, as the list of CPUs has, as the host has.
fn vcpus(resources: &Resources, guest: &Guest, host: HostSize) -> u8 {
    let by_quota = quota_cpus(resources);
    let by_list = count(&resources.cpus);
    let wanted = match (by_quota, by_list) {
        (Some(quota), Some(list)) => quota.min(list),
        (Some(only), None) | (None, Some(only)) => only,
        (None, None) => return guest.vcpus,
    };
    u8::try_from(wanted.min(host.cpus).max(1)).unwrap_or(u8::MAX - 1).min(u8::MAX - 1)
}

fn quota_cpus(resources: &Resources) -> Option<u64> {
    let quota = u64::try_from(resources.cpu_quota_us?).ok().filter(|quota| *quota > 0)?;
    let period = resources.cpu_period_us.filter(|period| *period > 0).unwrap_or(DEFAULT_PERIOD_US);
    Some(quota.div_ceil(period))
}

/// How many CPUs a list such as `0-3,8` names; none where it is empty or not one.
pub fn count(list: &str) -> Option<u64> {
    let mut count = 0_u64;
    for part in list.trim().split(',').filter(|part| !part.is_empty()) {
        let (first, last) = part.split_once('-').unwrap_or((part, part));
        let (first, last) = (first.trim().parse::<u64>().ok()?, last.trim().parse::<u64>().ok()?);
        count = count.saturating_add(last.checked_sub(first)?.saturating_add(1));
    }
    Some(count).filter(|count| *count > 0)
}

/// The guest's CPUs that stand for a list of the host's: as many, from the first.
/// Which CPUs of the host they run on is the host's cgroup's to say.
pub fn guest_cpus(list: &str, vcpus: u8) -> String {
    match count(list).map(|count| count.min(u64::from(vcpus))) {
        None => String::new(),
        Some(1) => "0".into(),
        Some(count) => format!("0-{}", count - 1),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::Config;

    const HOST: HostSize = HostSize { cpus: 8, memory_mib: 16 << 10 };

    fn size(resources: &Resources) -> Size {
        let mut guest = Config::defaults().unwrap().guest;
        (guest.vcpus, guest.memory_mib) = (2, 512);
        Size::of(resources, &guest, HOST)
    }

    #[test]
    fn without_limits_the_configuration_holds() {
        let expected = Size { vcpus: 2, memory_mib: 512 };
        assert_eq!(size(&Resources::default()), expected);
        let unlimited = Resources { memory_max: Some(-1), cpu_quota_us: Some(-1), ..Default::default() };
        assert_eq!(size(&unlimited), expected);
    }

    #[test]
    fn a_memory_limit_is_the_container_s_and_the_guest_s_comes_on_top() {
        let of = |bytes: i64| size(&Resources { memory_max: Some(bytes), ..Default::default() }).memory_mib;
        assert_eq!(of(1024 << 20), 1024 + 48 + 32);
        assert_eq!(of((1024 << 20) + 1), 1025 + 48 + 32);
        assert_eq!(of(256 << 20), 512);
        assert_eq!(of(i64::MAX), HOST.memory_mib);
    }

    #[test]
    fn a_raised_limit_is_plugged_in_beside_what_there_is() {
        let room = |boot_mib| Room::of(Size { vcpus: 1, memory_mib: boot_mib }, HOST);
        assert_eq!(room(512), Room { boot_mib: 512, hotplug_mib: (16 << 10) - 512 });
        assert_eq!(room(1000).hotplug_mib, 15_360, "whole blocks");
        assert_eq!(room(HOST.memory_mib).hotplug_mib, 0);
        assert_eq!(room(u64::MAX).hotplug_mib, 0);
        let unknown = HostSize { memory_mib: u64::MAX, ..HOST };
        assert_eq!(Room::of(Size { vcpus: 1, memory_mib: 512 }, unknown).hotplug_mib, (1 << 20) - 512);

        let room = room(512);
        for (mib, plugged) in
            [(0, 0), (64, 0), (450, 0), (451, 128), (512, 128), (1536, 1152), (15_000, 15_104)]
        {
            assert_eq!(room.plugged_for(mib << 20), Some(plugged), "{mib}");
        }
        assert_eq!([16 << 30, i64::MAX, -1].map(|limit| room.plugged_for(limit)), [None; 3]);
    }

    #[test]
    fn as_many_cpus_as_can_be_used() {
        let of = |quota: i64, period: Option<u64>, cpus: &str| {
            let resources = Resources {
                cpu_quota_us: Some(quota),
                cpu_period_us: period,
                cpus: cpus.into(),
                ..Default::default()
            };
            size(&resources).vcpus
        };
        assert_eq!(of(50_000, Some(100_000), ""), 1);
        assert_eq!(of(150_000, None, ""), 2);
        assert_eq!(of(400_000, Some(100_000), "1,3"), 2);
        assert_eq!(of(-1, None, "4-6"), 3);
        assert_eq!(of(9_000_000, Some(100_000), ""), 8);
        assert_eq!(of(1_000, Some(0), ""), 1);
    }

    #[test]
    fn the_guest_s_cpus_are_counted_from_zero() {
        assert_eq!(guest_cpus("2-3,7", 3), "0-2");
        assert_eq!(guest_cpus("5", 1), "0");
        assert_eq!(guest_cpus("0-7", 2), "0-1");
        assert_eq!(guest_cpus("", 4), "");
        assert_eq!(guest_cpus("x", 4), "");
    }
}
