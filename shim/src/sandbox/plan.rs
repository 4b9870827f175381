//! What machine a sandbox gets: how large it starts, how large it may become, and
//! where on the host it counts.

use std::{
    collections::HashMap,
    path::{Path, PathBuf},
};

use rvm_protocol::vmm::MAX_VCPUS;

use super::ledger::{Claim, Ledger};
use crate::{
    config::Guest,
    huge_pages,
    spec::{Bundle, HostNamespace, HostNetwork, PodConfig, Role, Shm, Users},
};

/// What kernel and agent use, in MiB: their text and data, and what a running
/// container costs the kernel outside its own memory limit.
const FIXED_OVERHEAD_MIB: u64 = 48;
/// The kernel keeps 64 bytes for each page of 4096, and page tables beside.
const OVERHEAD_PER_MEMORY: u64 = 32;

/// What containerd's CRI plugin gives a pause container: a pod's machine goes after what is in the others.
const POD_OOM_SCORE_ADJ: i32 = -998;

/// The most memory a monitor gives its machine, in MiB.
const MAX_MEMORY_MIB: u64 = 1 << 20;
/// Memory is plugged in by so many MiB: blocks of Linux's.
const HOTPLUG_STEP_MIB: u64 = 128;

/// What machine a sandbox gets.
#[derive(Debug)]
pub struct Plan {
    /// containerd's namespace.
    pub namespace: String,
    /// The sandbox's id.
    pub id: String,
    /// The container it is made for.
    pub first: String,
    /// That one's bundle.
    pub bundle: PathBuf,
    /// Where on the host the machine is accounted for, as in `linux.cgroupsPath`.
    pub cgroup_path: String,
    /// Fields of that container's specification that have no effect.
    pub not_applied: Vec<String>,
    /// The network namespace of the host that it is to have; none for a new one.
    pub network: Option<HostNetwork>,
    /// Namespaces of the host in whose place it has its own.
    pub pinned: Vec<HostNamespace>,
    /// The `/dev/shm` that its containers share.
    pub shm: Option<Shm>,
    /// The user namespace that owns what the sandbox holds; none for the guest's.
    pub users: Option<Users>,
    /// What it starts with.
    pub size: Size,
    /// How many vCPUs it may come to have.
    pub max_vcpus: u8,
    /// What its memory may become.
    pub room: Room,
    /// Its host name; none: the host's.
    pub hostname: Option<String>,
    /// Whether it has a pid namespace that its containers share.
    pub shared_pid: bool,
    /// Kernel parameters of the namespaces that it holds.
    pub sysctl: HashMap<String, String>,
    /// How soon the host's kernel takes the monitor when memory runs out: as the
    /// first container's process says, else like any process that nobody protects.
    pub oom_score_adj: i32,
    /// With the first container's claim in it.
    pub(super) ledger: Ledger,
}

impl Plan {
    /// For the sandbox `id` that is made for the container in `bundle`: as large
    /// as that one asks for. A pod's machine can have as many CPUs as the host;
    /// that of a container alone has those it starts with.
    pub fn of(namespace: &str, id: &str, bundle: &Bundle, guest: &Guest) -> Self {
        let host = HostSize::read();
        let mut ledger = Ledger::new(guest, host);
        ledger.set(&bundle.container.container_id, Claim::of(bundle));
        let size = ledger.size();
        let most = match bundle.role {
            Role::Sandbox => u8::try_from(host.cpus).unwrap_or(MAX_VCPUS),
            Role::Alone | Role::Member { .. } => size.vcpus,
        };
        Self {
            namespace: namespace.to_owned(),
            id: id.to_owned(),
            first: bundle.container.container_id.clone(),
            bundle: bundle.dir.clone(),
            cgroup_path: bundle.container.cgroup_path.clone(),
            not_applied: bundle.not_applied.clone(),
            network: bundle.network.clone(),
            pinned: bundle.pinned.clone(),
            shm: bundle.shm.clone(),
            users: bundle.users.clone(),
            size,
            max_vcpus: most.max(size.vcpus),
            room: Room::of(size, host),
            hostname: None,
            shared_pid: false,
            sysctl: HashMap::new(),
            oom_score_adj: bundle.container.process.oom_score_adj.unwrap_or_default(),
            ledger,
        }
    }

    /// For a pod that has no container yet, with the network namespace at `network`.
    pub fn of_pod(
        namespace: &str,
        id: &str,
        bundle: &Path,
        pod: &PodConfig,
        network: Option<HostNetwork>,
        guest: &Guest,
    ) -> Self {
        let host = HostSize::read();
        let mut ledger = Ledger::new(guest, host);
        ledger.set(id, Claim::of_pod(pod.announced));
        let size = ledger.size();
        Self {
            namespace: namespace.to_owned(),
            id: id.to_owned(),
            first: id.to_owned(),
            bundle: bundle.to_owned(),
            cgroup_path: pod.cgroup.0.clone(),
            not_applied: Vec::new(),
            network,
            pinned: Vec::new(),
            // Its own, wherever a client has its containers look for it.
            shm: None,
            users: pod.users.clone(),
            size,
            max_vcpus: u8::try_from(host.cpus).unwrap_or(MAX_VCPUS).max(size.vcpus),
            room: Room::of(size, host),
            hostname: Some(pod.hostname.clone()).filter(|name| !name.is_empty()),
            shared_pid: pod.shared_pid,
            sysctl: pod.sysctl.clone(),
            oom_score_adj: POD_OOM_SCORE_ADJ,
            ledger,
        }
    }
}

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
    /// Huge pages of 2 MiB.
    pub huge_pages: u64,
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
        Self {
            cpus,
            memory_mib: bytes.map_or(u64::MAX, |bytes| bytes >> 20),
            huge_pages: huge_pages::Pool::read().total,
        }
    }
}

/// What a machine's memory may become.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Room {
    /// MiB it starts with.
    pub boot_mib: u64,
    /// MiB that can be plugged in beside that.
    pub hotplug_mib: u64,
    /// MiB of the host's huge pages that can be.
    pub hugetlb_mib: u64,
}

impl Room {
    /// All of the host's memory, its huge pages apart: what the guest does not touch, the
    /// host does not give.
    pub fn of(size: Size, host: HostSize) -> Self {
        let whole = |mib: u64| mib - mib % HOTPLUG_STEP_MIB;
        let rest = whole(host.memory_mib.min(MAX_MEMORY_MIB).saturating_sub(size.memory_mib));
        let pool_mib = host.huge_pages.saturating_mul(huge_pages::BYTES >> 20);
        let hugetlb_mib = pool_mib.checked_next_multiple_of(HOTPLUG_STEP_MIB).unwrap_or(rest).min(rest);
        Self { boot_mib: size.memory_mib, hotplug_mib: rest - hugetlb_mib, hugetlb_mib }
    }

    /// MiB that have to be plugged in so that the machine has `memory_mib`;
    /// `None` where there is not so much.
    pub fn plugged_for(self, memory_mib: u64) -> Option<u64> {
        let missing = memory_mib.saturating_sub(self.boot_mib);
        missing.checked_next_multiple_of(HOTPLUG_STEP_MIB).filter(|plugged| *plugged <= self.hotplug_mib)
    }
}

/// A limit of so many MiB, and what the guest needs beside it.
pub(super) fn with_overhead(limit_mib: u64) -> u64 {
    limit_mib.saturating_add(FIXED_OVERHEAD_MIB).saturating_add(limit_mib / OVERHEAD_PER_MEMORY)
}

#[cfg(test)]
mod tests {
    use super::*;

    const HOST: HostSize = HostSize { cpus: 8, memory_mib: 16 << 10, huge_pages: 0 };

    #[test]
    fn what_is_missing_is_plugged_in_beside_what_there_is() {
        let room = |boot_mib| Room::of(Size { vcpus: 1, memory_mib: boot_mib }, HOST);
        assert_eq!(room(512), Room { boot_mib: 512, hotplug_mib: (16 << 10) - 512, hugetlb_mib: 0 });
        assert_eq!(room(1000).hotplug_mib, 15_360, "whole blocks");
        assert_eq!(room(HOST.memory_mib).hotplug_mib, 0);
        assert_eq!(room(u64::MAX).hotplug_mib, 0);
        let unknown = HostSize { memory_mib: u64::MAX, ..HOST };
        assert_eq!(Room::of(Size { vcpus: 1, memory_mib: 512 }, unknown).hotplug_mib, (1 << 20) - 512);

        let pool =
            |pages| Room::of(Size { vcpus: 1, memory_mib: 512 }, HostSize { huge_pages: pages, ..HOST });
        assert_eq!(pool(65), Room { boot_mib: 512, hotplug_mib: (16 << 10) - 768, hugetlb_mib: 256 });
        assert_eq!(pool(u64::MAX), Room { boot_mib: 512, hotplug_mib: 0, hugetlb_mib: (16 << 10) - 512 });

        let room = room(512);
        for (limit_mib, plugged) in
            [(0, 0), (64, 0), (450, 0), (451, 128), (512, 128), (1536, 1152), (15_000, 15_104)]
        {
            assert_eq!(room.plugged_for(with_overhead(limit_mib)), Some(plugged), "{limit_mib}");
        }
        assert_eq!([16 << 10, u64::MAX].map(|mib| room.plugged_for(with_overhead(mib))), [None; 2]);
    }
}
