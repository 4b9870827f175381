//! What the host lets a machine have: the container's limits, and what the
//! machine itself needs on top.

use std::{fs, io, path::Path};

use rvm_protocol::agent::Resources;

use super::{
    CgroupError, Hierarchies,
    hierarchy::{Hierarchy, Version},
};
use crate::huge_pages;

/// The monitor's own memory, beside the guest's.
const MONITOR_BYTES: u64 = 64 << 20;
/// And per byte of the guest's one such part for the pages of the host's files that it
/// reads and writes: what may wait there to be written is a fifth of what may be there.
const FILES_PART: u64 = 8;
/// Shortest quota the kernel takes, in microseconds (kernel/sched/core.c).
const MIN_QUOTA_US: i64 = 1000;
/// The kernel's default period, in microseconds.
pub const DEFAULT_PERIOD_US: u64 = 100_000;

/// Limits of a machine; what is `None` is left as it is.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Ceiling {
    memory_max: Option<u64>,
    memory_low: Option<i64>,
    cpu_weight: Option<u64>,
    /// Microseconds per period; negative: none.
    cpu_quota: Option<(i64, u64)>,
    cpus: String,
    mems: String,
    /// Bytes of the host's huge pages.
    hugetlb_max: Option<u64>,
}

impl Ceiling {
    /// For a container with `resources` in a machine of `memory_mib`.
    pub fn of(resources: &Resources, memory_mib: u64) -> Self {
        let limited = |value: &i64| *value > 0;
        Self {
            // The machine's whole memory: the guest's kernel keeps the container
            // within its own part of it.
            memory_max: resources
                .memory_max
                .filter(limited)
                .and_then(|_| Self::memory(memory_mib).memory_max),
            memory_low: resources.memory_low.filter(limited),
            cpu_weight: resources.cpu_weight,
            cpu_quota: resources.cpu_quota_us.map(|quota| {
                let period = resources.cpu_period_us.unwrap_or(DEFAULT_PERIOD_US);
                (if quota > 0 { with_reserve(quota) } else { -1 }, period)
            }),
            cpus: resources.cpus.clone(),
            mems: resources.mems.clone(),
            hugetlb_max: None,
        }
    }

    /// For the memory of a machine of `memory_mib` alone.
    pub fn memory(memory_mib: u64) -> Self {
        let guest = memory_mib << 20;
        let memory_max = guest.saturating_add(guest / FILES_PART).saturating_add(MONITOR_BYTES);
        Self { memory_max: Some(memory_max), ..Self::default() }
    }

    /// What lifts its quota of processor time, if it has one, while the machine boots: what runs there then is ours alone.
    pub fn lifted_quota(&self) -> Option<Self> {
        let (_, period) = self.cpu_quota.filter(|(quota, _)| *quota >= 0)?;
        Some(Self { cpu_quota: Some((-1, period)), ..Self::default() })
    }

    /// And for so many of the host's huge pages of 2 MiB.
    #[must_use]
    pub fn with_huge_pages(self, count: u64) -> Self {
        Self { hugetlb_max: Some(count.saturating_mul(huge_pages::BYTES)), ..self }
    }

    /// Writes the limits into the cgroup `relative` of each hierarchy.
    pub(super) fn apply(&self, hierarchies: &Hierarchies, relative: &Path) -> Result<(), CgroupError> {
        for hierarchy in &hierarchies.all {
            let dir = hierarchy.root.join(relative);
            match hierarchy.version {
                Version::V2 => self.apply_v2(&dir, hierarchies)?,
                Version::V1 => self.apply_v1(&dir, hierarchy)?,
            }
        }
        Ok(())
    }

    fn apply_v2(&self, dir: &Path, hierarchies: &Hierarchies) -> Result<(), CgroupError> {
        // On a hybrid host v1 has the controller.
        let here = |controller: &str| hierarchies.v1(controller).is_none();
        if here("memory") {
            set(dir, "memory.max", "linux.resources.memory.limit", self.memory_max)?;
            set(dir, "memory.low", "linux.resources.memory.reservation", self.memory_low)?;
        }
        if here("cpu") {
            set(dir, "cpu.weight", "linux.resources.cpu.shares", self.cpu_weight)?;
            let quota = self.cpu_quota.map(|(quota, period)| match quota {
                0.. => format!("{quota} {period}"),
                _ => format!("max {period}"),
            });
            set(dir, "cpu.max", "linux.resources.cpu.quota", quota)?;
        }
        if here("hugetlb") {
            set_hugetlb(dir, "hugetlb.2MB.max", self.hugetlb_max)?;
        }
        if here("cpuset") {
            set(dir, "cpuset.cpus", "linux.resources.cpu.cpus", named(&self.cpus))?;
            set(dir, "cpuset.mems", "linux.resources.cpu.mems", named(&self.mems))?;
        }
        Ok(())
    }

    fn apply_v1(&self, dir: &Path, hierarchy: &Hierarchy) -> Result<(), CgroupError> {
        let has = |controller: &str| hierarchy.controllers.iter().any(|name| name == controller);
        if has("memory") {
            set(dir, "memory.limit_in_bytes", "linux.resources.memory.limit", self.memory_max)?;
            set(dir, "memory.soft_limit_in_bytes", "linux.resources.memory.reservation", self.memory_low)?;
        }
        if has("cpu") {
            set(dir, "cpu.shares", "linux.resources.cpu.shares", self.cpu_weight.map(shares))?;
            if let Some((quota, period)) = self.cpu_quota {
                set(dir, "cpu.cfs_period_us", "linux.resources.cpu.period", Some(period))?;
                set(dir, "cpu.cfs_quota_us", "linux.resources.cpu.quota", Some(quota))?;
            }
        }
        if has("hugetlb") {
            set_hugetlb(dir, "hugetlb.2MB.limit_in_bytes", self.hugetlb_max)?;
        }
        if has("cpuset") {
            set(dir, "cpuset.cpus", "linux.resources.cpu.cpus", named(&self.cpus))?;
            set(dir, "cpuset.mems", "linux.resources.cpu.mems", named(&self.mems))?;
        }
        Ok(())
    }
}

/// A quarter more than the guest enforces: for the monitor's threads, and so
/// that the two limits do not throttle in turn.
fn with_reserve(quota: i64) -> i64 {
    quota.saturating_add(quota / 4).max(MIN_QUOTA_US)
}

/// v2's weight as v1's shares: the inverse of what the specification's shares
/// were converted with, but for the rounding of small ones.
fn shares(weight: u64) -> u64 {
    let exponent = (weight.clamp(1, 10_000) as f64).log10() + 7.0 / 34.0;
    let log = ((125.0f64 * 125.0 + 4.0 * 612.0 * exponent).sqrt() - 125.0) / 2.0;
    (log.exp2().round() as u64).clamp(2, 262_144)
}

fn named(list: &str) -> Option<&str> {
    Some(list).filter(|list| !list.is_empty())
}

/// Where the controller is not enabled the host's administrator holds nobody to such limits.
fn set_hugetlb(dir: &Path, file: &str, value: Option<u64>) -> Result<(), CgroupError> {
    let value = value.filter(|_| dir.join(file).exists());
    set(dir, file, "linux.resources.hugepageLimits", value)
}

fn set(dir: &Path, file: &str, field: &'static str, value: Option<impl ToString>) -> Result<(), CgroupError> {
    let Some(value) = value.map(|value| value.to_string()) else { return Ok(()) };
    let path = dir.join(file);
    fs::write(&path, &value).map_err(|source| {
        let source = match source.kind() {
            // The file of a controller that is not enabled here.
            io::ErrorKind::NotFound => io::Error::other("the controller is not available in this cgroup"),
            _ => source,
        };
        CgroupError::Limit { field, path, value, source }
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_machine_gets_more_than_the_container() {
        let resources = Resources {
            memory_max: Some(256 << 20),
            cpu_quota_us: Some(50_000),
            cpu_period_us: Some(100_000),
            ..Default::default()
        };
        let ceiling = Ceiling::of(&resources, 320);
        assert_eq!(ceiling.memory_max, Some((320 + 40 + 64) << 20));
        assert_eq!(ceiling.cpu_quota, Some((62_500, 100_000)));
        let lifted = Ceiling { cpu_quota: Some((-1, 100_000)), ..Default::default() };
        assert_eq!(ceiling.lifted_quota(), Some(lifted));
    }

    #[test]
    fn no_limit_stays_none() {
        let resources = Resources { memory_max: Some(-1), cpu_quota_us: Some(-1), ..Default::default() };
        let ceiling = Ceiling::of(&resources, 512);
        assert_eq!(ceiling.memory_max, None);
        assert_eq!(ceiling.cpu_quota, Some((-1, 100_000)));
        assert_eq!(ceiling.lifted_quota(), None);
        assert_eq!(Ceiling::of(&Resources::default(), 512), Ceiling::default());
    }

    #[test]
    fn weights_become_the_shares_they_came_from() {
        for (weight, expected) in [(0, 2), (1, 2), (100, 1024), (10_000, 262_144), (u64::MAX, 262_144)] {
            assert_eq!(shares(weight), expected);
        }
    }
}
