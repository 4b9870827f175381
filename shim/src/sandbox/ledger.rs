//! What the containers of a sandbox ask of its machine, and what that comes to.
//!
//! The sum of claims is again a [`Resources`]: what holds one container to its
//! limits on the host holds several.

use std::collections::{BTreeMap, BTreeSet};

use rvm_protocol::agent::Resources;

use super::plan::{HostSize, Size, with_overhead};
use crate::{
    cgroup::DEFAULT_PERIOD_US,
    config::Guest,
    huge_pages,
    spec::{Announced, Bundle, Role},
};

/// Most CPUs of one list that are looked at: more than a guest can have.
const MAX_LISTED: usize = 1024;
/// `cpu.weight` of a cgroup that nobody gave one, and the most one can have.
const DEFAULT_WEIGHT: u64 = 100;
const MAX_WEIGHT: u64 = 10_000;

/// Huge pages of 2 MiB, as limits name them.
const HUGE_PAGE_SIZE: &str = "2MB";
/// Those in a block of 128 MiB, in which memory is plugged in.
const HUGE_PAGES_OF_BLOCK: u64 = 64;

/// What one container asks of the machine.
#[derive(Clone, Debug, Default)]
pub struct Claim {
    /// Its limits.
    resources: Resources,
    /// Bytes the machine has to have for it: its last limit, also when that was
    /// lifted, as it may use so much by then.
    memory: Option<u64>,
    /// Huge pages of 2 MiB it may use.
    huge_pages: u64,
    /// Whether it holds a pod's namespaces and does no work of its own.
    holds_only: bool,
    /// What others will claim that join it.
    announced: Announced,
}

impl Claim {
    /// Of the container in a bundle.
    pub fn of(bundle: &Bundle) -> Self {
        let holds_only = bundle.role == Role::Sandbox;
        let mut claim = Self { holds_only, announced: bundle.announced, ..Self::default() };
        claim.change(&bundle.container.resources);
        claim
    }

    /// Of a pod before its containers.
    pub fn of_pod(announced: Announced) -> Self {
        Self { holds_only: true, announced, ..Self::default() }
    }

    /// With the limits that `changed` sets; the others stay.
    #[must_use]
    pub fn with(&self, changed: &Resources) -> Self {
        let mut claim = self.clone();
        claim.change(changed);
        claim
    }

    fn change(&mut self, changed: &Resources) {
        let Self { resources, memory, huge_pages, .. } = self;
        if let Some(limit) = changed.memory_max {
            resources.memory_max = Some(limit);
            *memory = u64::try_from(limit).ok().filter(|limit| *limit > 0).or(*memory);
        }
        if !changed.hugepage_limits.is_empty() {
            let limits = changed.hugepage_limits.iter().filter(|limit| limit.page_size == HUGE_PAGE_SIZE);
            *huge_pages = limits.map(|limit| limit.limit / huge_pages::BYTES).max().unwrap_or_default();
        }
        resources.memory_low = changed.memory_low.or(resources.memory_low);
        resources.cpu_weight = changed.cpu_weight.or(resources.cpu_weight);
        resources.cpu_quota_us = changed.cpu_quota_us.or(resources.cpu_quota_us);
        resources.cpu_period_us = changed.cpu_period_us.or(resources.cpu_period_us);
        for (old, new) in [(&mut resources.cpus, &changed.cpus), (&mut resources.mems, &changed.mems)] {
            if !new.is_empty() {
                old.clone_from(new);
            }
        }
    }

    /// Bytes of memory it asks for.
    pub fn memory_limit(&self) -> Option<u64> {
        self.memory
    }

    /// CPUs its quota can keep busy.
    fn quota_cpus(&self) -> Option<u64> {
        let (quota, period) = self.quota()?;
        Some(quota.div_ceil(period))
    }

    /// Microseconds and their period.
    fn quota(&self) -> Option<(u64, u64)> {
        let quota = u64::try_from(self.resources.cpu_quota_us?).ok().filter(|quota| *quota > 0)?;
        let period = self.resources.cpu_period_us.filter(|period| *period > 0).unwrap_or(DEFAULT_PERIOD_US);
        Some((quota, period))
    }

    /// CPUs of the host it may run on; none: all.
    fn cpus(&self) -> Option<BTreeSet<u64>> {
        listed(&self.resources.cpus)
    }
}

/// The claims on one machine.
#[derive(Clone, Debug)]
pub struct Ledger {
    /// What a container has that claims nothing.
    base: Size,
    host: HostSize,
    claims: BTreeMap<String, Claim>,
    /// Huge pages that a pod may have in all, where its cgroup on the host says so.
    pod_huge_pages: Option<u64>,
    /// The guest's CPUs that stand for the host's.
    guest_cpus: BTreeMap<u64, u8>,
    /// What the host was told last.
    told: Resources,
}

impl Ledger {
    /// Of a machine nobody claims anything of.
    pub fn new(guest: &Guest, host: HostSize) -> Self {
        Self {
            base: Size { vcpus: guest.vcpus, memory_mib: guest.memory_mib },
            host,
            claims: BTreeMap::new(),
            pod_huge_pages: None,
            guest_cpus: BTreeMap::new(),
            told: Resources::default(),
        }
    }

    /// What the container claims.
    pub fn claim(&self, container: &str) -> Option<&Claim> {
        self.claims.get(container)
    }

    /// Enters a container, or what it claims from now on.
    pub fn set(&mut self, container: &str, claim: Claim) {
        self.claims.insert(container.to_owned(), claim);
    }

    /// Strikes a container off.
    pub fn remove(&mut self, container: &str) {
        self.claims.remove(container);
        let used: BTreeSet<u64> = self.claims.values().filter_map(Claim::cpus).flatten().collect();
        self.guest_cpus.retain(|host, _| used.contains(host));
    }

    /// Those that do work.
    fn working(&self) -> impl Iterator<Item = &Claim> {
        self.claims.values().filter(|claim| !claim.holds_only)
    }

    /// How large the machine has to be: all limits, and what the configuration
    /// gives those that have none, once for all of them. Never less than is
    /// configured, so that a limit can be raised up to there; what the guest does
    /// not touch, the host does not give. A limit above the host's memory is none.
    /// Nor less than is announced: then nothing has to be plugged in when that is claimed.
    pub fn size(&self) -> Size {
        Size { vcpus: self.vcpus(), memory_mib: self.memory_mib() }
    }

    fn memory_mib(&self) -> u64 {
        self.wanted_memory_mib().min(self.host.memory_mib).max(self.base.memory_mib)
    }

    /// The same without regard to what the host has.
    pub fn wanted_memory_mib(&self) -> u64 {
        let limits = self.claims.values().filter_map(|claim| claim.memory);
        let sum = limits.fold(0_u64, |sum, limit| sum.saturating_add(limit.div_ceil(1 << 20)));
        let announced =
            self.announced(|of| of.memory).map_or(0, |bytes| with_overhead(bytes.div_ceil(1 << 20)));
        if sum == 0 {
            return self.base.memory_mib.max(announced);
        }
        let shared =
            if self.working().any(|claim| claim.memory.is_none()) { self.base.memory_mib } else { 0 };
        // The kernel's descriptors of pages are in ordinary memory: 2 MiB for each block plugged in.
        let descriptors = self.huge_pages().div_ceil(HUGE_PAGES_OF_BLOCK).saturating_mul(2);
        with_overhead(sum).saturating_add(shared).saturating_add(descriptors).max(announced)
    }

    /// The host's huge pages the machine has to have: what its pod may use, where that is known,
    /// or its containers. On a host without any they are a limit, and claim nothing.
    pub fn huge_pages(&self) -> u64 {
        if self.host.huge_pages == 0 {
            return 0;
        }
        let sum = || self.claims.values().fold(0_u64, |sum, claim| sum.saturating_add(claim.huge_pages));
        self.pod_huge_pages.unwrap_or_else(sum)
    }

    /// Notes what the cgroup above the sandbox's allows, where that is a pod's.
    pub fn set_huge_pages_above(&mut self, limit: Option<u64>) {
        let is_pod = self.claims.values().any(|claim| claim.holds_only);
        self.pod_huge_pages = limit.filter(|_| is_pod);
    }

    /// Whether the host has any.
    pub fn host_has_huge_pages(&self) -> bool {
        self.host.huge_pages > 0
    }

    fn announced(&self, what: fn(&Announced) -> Option<u64>) -> Option<u64> {
        self.claims.values().filter_map(|claim| what(&claim.announced)).max()
    }

    /// As many as the quotas can keep busy, as the lists of CPUs have, as the host
    /// has, and none fewer than stand for a CPU of the host.
    fn vcpus(&self) -> u8 {
        let (mut by_quota, mut by_list, mut list) = (0_u64, 0_u64, BTreeSet::new());
        let (mut limited, mut unlimited) = (false, self.claims.is_empty());
        for claim in self.claims.values() {
            match (claim.quota_cpus(), claim.cpus()) {
                (None, None) => {
                    unlimited |= !claim.holds_only;
                    continue;
                }
                (Some(quota), None) => by_quota = by_quota.saturating_add(quota),
                (quota, Some(cpus)) => {
                    by_list = by_list.saturating_add(quota.unwrap_or(u64::MAX).min(cpus.len() as u64));
                    list.extend(cpus);
                }
            }
            limited = true;
        }
        let announced = self.announced(|of| of.cpus);
        limited |= announced.is_some();
        let listed = by_list.min(list.len() as u64);
        let wanted = by_quota.saturating_add(listed).max(announced.unwrap_or(0)).min(self.host.cpus).max(1);
        let wanted = u8::try_from(wanted).unwrap_or(u8::MAX - 1).min(u8::MAX - 1);
        let base = if limited && !unlimited { 0 } else { self.base.vcpus };
        let used = self.guest_cpus.values().max().map_or(0, |last| last.saturating_add(1));
        match limited {
            true => wanted.max(base).max(used),
            false => self.base.vcpus.max(used),
        }
    }

    /// The guest's CPUs, of the first `vcpus`, that stand for a container's list
    /// of the host's: each for one of the host's as long as there are enough.
    /// Which CPUs of the host they run on is the host's cgroup's to say.
    pub fn guest_cpus(&mut self, list: &str, vcpus: u8) -> String {
        let Some(cpus) = listed(list).filter(|_| vcpus > 0) else { return String::new() };
        let mut guest = BTreeSet::new();
        for host in cpus {
            let known = self.guest_cpus.get(&host).copied().filter(|cpu| *cpu < vcpus);
            let cpu = known.unwrap_or_else(|| self.least_used(vcpus));
            self.guest_cpus.insert(host, cpu);
            guest.insert(u64::from(cpu));
        }
        written(&guest)
    }

    fn least_used(&self, vcpus: u8) -> u8 {
        let uses = |cpu: u8| self.guest_cpus.values().filter(|used| **used == cpu).count();
        (0..vcpus).min_by_key(|cpu| uses(*cpu)).unwrap_or(0)
    }

    /// The limits the host holds the whole machine to: those of a container alone
    /// as they are; of several their sum, and none where one of them has none.
    /// What was told before and holds no longer is told as lifted.
    pub fn total(&mut self) -> Resources {
        let limited = |value: Option<i64>| value.filter(|value| *value > 0);
        let all = |of: fn(&Claim) -> bool| self.working().all(of) && self.claims.values().any(of);
        let mut total = match self.claims.values().next() {
            Some(only) if self.claims.len() == 1 => only.resources.clone(),
            _ => Resources::default(),
        };
        if self.claims.len() > 1 {
            let sum = |of: fn(&Resources) -> Option<i64>| {
                let values = self.claims.values().filter_map(|claim| limited(of(&claim.resources)));
                values.fold(0_i64, i64::saturating_add)
            };
            if all(|claim| claim.resources.memory_max.is_some_and(|limit| limit > 0)) {
                total.memory_max = Some(sum(|of| of.memory_max));
            }
            total.memory_low = limited(Some(sum(|of| of.memory_low)));
            let weights = self.claims.values().filter_map(|claim| claim.resources.cpu_weight);
            total.cpu_weight = weights.reduce(u64::saturating_add).map(|weight| weight.min(MAX_WEIGHT));
            if all(|claim| claim.quota().is_some()) {
                let per_period = |(quota, period): (u64, u64)| {
                    u64::try_from(u128::from(quota) * u128::from(DEFAULT_PERIOD_US) / u128::from(period))
                        .unwrap_or(u64::MAX)
                };
                let quota = self.claims.values().filter_map(Claim::quota).map(per_period);
                total.cpu_quota_us =
                    Some(i64::try_from(quota.fold(0, u64::saturating_add)).unwrap_or(i64::MAX));
                total.cpu_period_us = Some(DEFAULT_PERIOD_US);
            }
            let union = |of: fn(&Resources) -> &str| {
                let lists: Vec<_> =
                    self.working().map(|claim| listed(of(&claim.resources))).collect::<Option<_>>()?;
                Some(written(&lists.into_iter().flatten().collect())).filter(|list| !list.is_empty())
            };
            total.cpus = union(|of| &of.cpus).unwrap_or_default();
            total.mems = union(|of| &of.mems).unwrap_or_default();
        }
        if total.cpu_weight.is_none() && self.told.cpu_weight.is_some() {
            total.cpu_weight = Some(DEFAULT_WEIGHT);
        }
        if total.cpu_quota_us.is_none() && self.told.cpu_quota_us.is_some() {
            total.cpu_quota_us = Some(-1);
        }
        if total.cpus.is_empty() && !self.told.cpus.is_empty() {
            total.cpus = online_cpus();
        }
        self.told = total.clone();
        total
    }
}

/// The CPUs a machine without a list runs on.
fn online_cpus() -> String {
    let text = std::fs::read_to_string("/sys/devices/system/cpu/online").unwrap_or_default();
    text.trim().to_owned()
}

/// What a list such as `0-3,8` names; none where it is empty or not one.
fn listed(list: &str) -> Option<BTreeSet<u64>> {
    let mut all = BTreeSet::new();
    for part in list.trim().split(',').filter(|part| !part.is_empty()) {
        let (first, last) = part.split_once('-').unwrap_or((part, part));
        let (first, last) = (first.trim().parse::<u64>().ok()?, last.trim().parse::<u64>().ok()?);
        if last < first {
            return None;
        }
        all.extend((first..=last).take(MAX_LISTED));
    }
    Some(all).filter(|all| !all.is_empty())
}

/// The other way round.
fn written(all: &BTreeSet<u64>) -> String {
    let mut ranges: Vec<(u64, u64)> = Vec::new();
    for number in all {
        match ranges.last_mut() {
            Some((_, last)) if last.checked_add(1) == Some(*number) => *last = *number,
            _ => ranges.push((*number, *number)),
        }
    }
    let range = |(first, last)| if first == last { format!("{first}") } else { format!("{first}-{last}") };
    ranges.into_iter().map(range).collect::<Vec<_>>().join(",")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::Config;

    const HOST: HostSize = HostSize { cpus: 8, memory_mib: 16 << 10, huge_pages: 0 };
    const MIB: i64 = 1 << 20;

    fn ledger() -> Ledger {
        let mut guest = Config::defaults().unwrap().guest;
        (guest.vcpus, guest.memory_mib) = (2, 512);
        Ledger::new(&guest, HOST)
    }

    fn claim(resources: Resources) -> Claim {
        Claim::default().with(&resources)
    }

    fn pause() -> Claim {
        Claim { holds_only: true, ..Claim::default() }
    }

    fn pod(mib: u64, cpus: u64) -> Claim {
        Claim { announced: Announced { memory: Some(mib << 20), cpus: Some(cpus) }, ..pause() }
    }

    fn memory(mib: i64) -> Claim {
        claim(Resources { memory_max: Some(mib * MIB), ..Default::default() })
    }

    fn quota(quota: i64, period: Option<u64>, cpus: &str) -> Claim {
        let (cpu_quota_us, cpu_period_us) = (Some(quota), period);
        claim(Resources { cpu_quota_us, cpu_period_us, cpus: cpus.into(), ..Default::default() })
    }

    fn size(claims: &[Claim]) -> Size {
        let mut ledger = ledger();
        for (n, claim) in claims.iter().enumerate() {
            ledger.set(&n.to_string(), claim.clone());
        }
        ledger.size()
    }

    #[test]
    fn huge_pages_add_up_where_the_host_has_some() {
        use rvm_protocol::agent::HugepageLimit;
        let limit = |size: &str, limit| HugepageLimit { page_size: size.into(), limit, ..Default::default() };
        let huge = |limits: Vec<HugepageLimit>| {
            let memory_max = Some(1024 * MIB);
            Resources { hugepage_limits: limits, memory_max, ..Default::default() }
        };
        let mut ledger = ledger();
        ledger.set("pause", pause());
        ledger.set("a", claim(huge(vec![limit("1GB", 0), limit("2MB", 5 << 20)])));
        ledger.set("b", claim(huge(vec![limit("2MB", 128 << 20)])));
        assert_eq!(ledger.huge_pages(), 0, "the host has none");
        let without = ledger.wanted_memory_mib();
        ledger.host.huge_pages = 1000;
        assert_eq!((ledger.huge_pages(), ledger.wanted_memory_mib() - without), (2 + 64, 4));
        let other = ledger.claim("b").unwrap().with(&Resources { cpu_weight: Some(7), ..Default::default() });
        ledger.set("b", other.clone());
        assert_eq!(ledger.huge_pages(), 66, "what is not said stays");
        ledger.set("b", other.with(&huge(vec![limit("2MB", u64::MAX)])));
        assert_eq!(ledger.huge_pages(), 2 + u64::MAX / (2 << 20));
        ledger.remove("b");
        assert_eq!(ledger.huge_pages(), 2);
        ledger.set_huge_pages_above(Some(7));
        assert_eq!(ledger.huge_pages(), 7, "the pod's, whatever its containers may use");
        ledger.remove("pause");
        ledger.set_huge_pages_above(Some(7));
        assert_eq!(ledger.huge_pages(), 2, "above a container alone is no pod");
    }

    #[test]
    fn without_limits_the_configuration_holds() {
        let expected = Size { vcpus: 2, memory_mib: 512 };
        assert_eq!(size(&[]), expected);
        assert_eq!(size(&[claim(Resources::default())]), expected);
        let unlimited = Resources { memory_max: Some(-1), cpu_quota_us: Some(-1), ..Default::default() };
        assert_eq!(size(&[claim(unlimited)]), expected);
        assert_eq!(size(&[pause(), Claim::default(), Claim::default()]), expected);
    }

    #[test]
    fn a_memory_limit_is_the_container_s_and_the_guest_s_comes_on_top() {
        let of = |bytes: i64| {
            size(&[claim(Resources { memory_max: Some(bytes), ..Default::default() })]).memory_mib
        };
        assert_eq!(of(1024 * MIB), 1024 + 48 + 32);
        assert_eq!(of(1024 * MIB + 1), 1025 + 48 + 32);
        assert_eq!(of(256 * MIB), 512);
        assert_eq!(of(i64::MAX), HOST.memory_mib);
    }

    #[test]
    fn memory_limits_add_up() {
        assert_eq!(size(&[pause(), memory(256), memory(768)]).memory_mib, 1024 + 48 + 32);
        let with_unlimited = size(&[memory(1024), Claim::default(), Claim::default()]).memory_mib;
        assert_eq!(with_unlimited, 1024 + 48 + 32 + 512);
        assert_eq!(size(&[memory(i64::MAX / MIB), memory(i64::MAX / MIB)]).memory_mib, HOST.memory_mib);
        // What was used under a limit may be used without it.
        let lifted = memory(1024).with(&Resources { memory_max: Some(-1), ..Default::default() });
        assert_eq!(size(&[lifted]).memory_mib, 1024 + 48 + 32);
    }

    #[test]
    fn what_is_announced_is_there_before_it_is_claimed() {
        let announced = Size { vcpus: 3, memory_mib: 1024 + 48 + 32 };
        assert_eq!(size(&[pod(1024, 3)]), announced);
        let half = || {
            let limits =
                Resources { memory_max: Some(512 * MIB), cpu_quota_us: Some(150_000), ..Default::default() };
            claim(limits)
        };
        assert_eq!(size(&[pod(1024, 3), half()]), announced);
        assert_eq!(size(&[pod(1024, 3), half(), half()]).memory_mib, announced.memory_mib);
        assert!(
            size(&[pod(1024, 3), half(), half(), half()]).memory_mib > announced.memory_mib,
            "claimed beyond"
        );
        assert_eq!(size(&[pod(1024, 1), Claim::default()]).vcpus, 2, "no fewer than configured");
        assert_eq!(size(&[pod(1 << 40, 1 << 40)]), Size { vcpus: 8, memory_mib: HOST.memory_mib });
    }

    #[test]
    fn as_many_cpus_as_can_be_used() {
        let of = |a, b, c: &str| size(&[quota(a, b, c)]).vcpus;
        assert_eq!(of(50_000, Some(100_000), ""), 1);
        assert_eq!(of(150_000, None, ""), 2);
        assert_eq!(of(400_000, Some(100_000), "1,3"), 2);
        assert_eq!(of(-1, None, "4-6"), 3);
        assert_eq!(of(9_000_000, Some(100_000), ""), 8);
        assert_eq!(of(1_000, Some(0), ""), 1);
        let half = || quota(50_000, None, "");
        assert_eq!(size(&[pause(), half(), half(), half()]).vcpus, 3);
        assert_eq!(size(&[half(), Claim::default()]).vcpus, 2, "no fewer than configured");
        assert_eq!(size(&[quota(-1, None, "0-1"), quota(-1, None, "1-2")]).vcpus, 3, "1 is there once");
        assert_eq!(size(&[quota(-1, None, "0-1"), quota(300_000, None, "")]).vcpus, 5);
    }

    #[test]
    fn the_guest_s_cpus_are_counted_from_zero() {
        let of = |list, vcpus| ledger().guest_cpus(list, vcpus);
        assert_eq!(of("2-3,7", 3), "0-2");
        assert_eq!(of("5", 1), "0");
        assert_eq!(of("0-7", 2), "0-1");
        assert_eq!(of("0-18446744073709551615", 2), "0-1");
        assert_eq!(of("", 4), "");
        assert_eq!(of("x", 4), "");
        assert_eq!(of("3-1", 4), "");
    }

    #[test]
    fn lists_of_several_containers_do_not_collide() {
        let mut ledger = ledger();
        ledger.set("a", quota(-1, None, "2,3"));
        assert_eq!(ledger.guest_cpus("2,3", ledger.size().vcpus), "0-1");
        ledger.set("b", quota(-1, None, "3,6"));
        assert_eq!(ledger.guest_cpus("3,6", ledger.size().vcpus), "1-2");
        ledger.remove("a");
        assert_eq!(ledger.size().vcpus, 3, "the last one is in use");
        ledger.set("c", quota(-1, None, "0"));
        assert_eq!(ledger.guest_cpus("0", ledger.size().vcpus), "0", "what is free is used again");
        ledger.remove("b");
        ledger.remove("c");
        assert_eq!(ledger.size().vcpus, 2);
    }

    #[test]
    fn the_host_holds_one_as_it_is_and_several_to_their_sum() {
        let mut ledger = ledger();
        let one = Resources {
            memory_max: Some(64 * MIB),
            cpu_weight: Some(50),
            cpu_quota_us: Some(20_000),
            cpu_period_us: Some(50_000),
            cpus: "1".into(),
            ..Default::default()
        };
        ledger.set("a", claim(one.clone()));
        assert_eq!(ledger.total(), one);
        ledger.set("b", claim(Resources { cpu_quota_us: Some(100_000), cpus: "3-4".into(), ..one.clone() }));
        let both = Resources {
            memory_max: Some(128 * MIB),
            cpu_weight: Some(100),
            cpu_quota_us: Some(240_000),
            cpu_period_us: Some(100_000),
            cpus: "1,3-4".into(),
            ..Default::default()
        };
        assert_eq!(ledger.total(), both);
        // One without limits lifts them all.
        ledger.set("c", Claim::default());
        let lifted = ledger.total();
        assert_eq!((lifted.memory_max, lifted.cpu_quota_us), (None, Some(-1)));
        assert_eq!(lifted.cpus, online_cpus());
        ledger.remove("c");
        assert_eq!(ledger.total(), both);
        ledger.remove("b");
        assert_eq!(ledger.total(), one);
    }
}
