//! The statistics of a container in the form containerd's clients read:
//! `io.containerd.cgroups.v2.Metrics`.
//!
//! The numbers come from the guest and are as true as it is. Whatever it sends,
//! what goes on from here has its size and its types.

use std::collections::HashMap;

use containerd_shim_protos::cgroups_v2::metrics::{
    CPUStat, HugeTlbStat, IOEntry, IOStat, MemoryEvents, MemoryStat, Metrics, NetworkStat, PSIData, PSIStats,
    PidsStat,
};
use protobuf::{Message, MessageField, well_known_types::any::Any};
use rvm_protocol::agent::{ContainerStats, NetworkStats};

const TYPE_URL: &str = "io.containerd.cgroups.v2.Metrics";
/// Most block devices, page sizes and network interfaces told.
const MAX_ENTRIES: usize = 64;
/// Longest name of an interface (`IFNAMSIZ`) or a page size.
const MAX_NAME_LEN: usize = 16;

/// The message as containerd passes it on.
pub fn encode(stats: &ContainerStats) -> Any {
    let value = metrics(stats).write_to_bytes().unwrap_or_default();
    Any { type_url: TYPE_URL.into(), value, ..Default::default() }
}

fn metrics(stats: &ContainerStats) -> Metrics {
    let files = Files(&stats.files);
    Metrics {
        pids: MessageField::some(PidsStat {
            current: files.number("pids.current"),
            limit: files.number("pids.max"),
            ..Default::default()
        }),
        cpu: MessageField::some(cpu(&files)),
        memory: MessageField::some(memory(&files)),
        io: MessageField::some(IOStat {
            usage: files.text("io.stat").lines().filter_map(io_entry).take(MAX_ENTRIES).collect(),
            psi: files.pressure("io.pressure"),
            ..Default::default()
        }),
        hugetlb: huge_pages(&files),
        memory_events: MessageField::some(memory_events(&files)),
        network: stats.networks.iter().take(MAX_ENTRIES).filter_map(network).collect(),
        ..Default::default()
    }
}

/// The cgroup's files.
struct Files<'a>(&'a HashMap<String, String>);

impl Files<'_> {
    fn text(&self, name: &str) -> &str {
        self.0.get(name).map_or("", String::as_str)
    }

    /// A file of one number.
    fn number(&self, name: &str) -> u64 {
        number(self.text(name))
    }

    /// A file of keys and numbers.
    fn keys(&self, name: &str) -> HashMap<&str, u64> {
        let pairs = self.text(name).lines().filter_map(|line| line.split_once(' '));
        pairs.map(|(key, value)| (key, number(value))).collect()
    }

    /// A file of `some avg10=0.00 avg60=0.00 avg300=0.00 total=0`, and `full` the same.
    fn pressure(&self, name: &str) -> MessageField<PSIStats> {
        let line = |kind: &str| {
            let line = self.text(name).lines().find_map(|line| line.strip_prefix(kind));
            line.map(pressure).into()
        };
        let stats = PSIStats { some: line("some "), full: line("full "), ..Default::default() };
        Some(stats).filter(|stats| stats.some.is_some() || stats.full.is_some()).into()
    }
}

/// No limit is the largest number, as for containerd.
fn number(text: &str) -> u64 {
    match text.trim() {
        "max" => u64::MAX,
        text => text.parse().unwrap_or(0),
    }
}

fn pressure(line: &str) -> PSIData {
    let value = |key: &str| line.split(' ').find_map(|pair| pair.strip_prefix(key)?.strip_prefix('='));
    let average = |key| value(key).and_then(|text| text.parse().ok()).filter(|value: &f64| value.is_finite());
    PSIData {
        avg10: average("avg10").unwrap_or(0.0),
        avg60: average("avg60").unwrap_or(0.0),
        avg300: average("avg300").unwrap_or(0.0),
        total: value("total").map_or(0, number),
        ..Default::default()
    }
}

fn cpu(files: &Files) -> CPUStat {
    let stat = files.keys("cpu.stat");
    let get = |key: &str| stat.get(key).copied().unwrap_or(0);
    CPUStat {
        usage_usec: get("usage_usec"),
        user_usec: get("user_usec"),
        system_usec: get("system_usec"),
        nr_periods: get("nr_periods"),
        nr_throttled: get("nr_throttled"),
        throttled_usec: get("throttled_usec"),
        nr_bursts: get("nr_bursts"),
        burst_usec: get("burst_usec"),
        psi: files.pressure("cpu.pressure"),
        ..Default::default()
    }
}

fn memory(files: &Files) -> MemoryStat {
    let stat = files.keys("memory.stat");
    let get = |key: &str| stat.get(key).copied().unwrap_or(0);
    // Linux 5.9 split these by what was refaulted.
    let both = |key: &str| get(&format!("{key}_anon")).saturating_add(get(&format!("{key}_file")));
    MemoryStat {
        anon: get("anon"),
        file: get("file"),
        kernel_stack: get("kernel_stack"),
        slab: get("slab"),
        sock: get("sock"),
        shmem: get("shmem"),
        file_mapped: get("file_mapped"),
        file_dirty: get("file_dirty"),
        file_writeback: get("file_writeback"),
        anon_thp: get("anon_thp"),
        inactive_anon: get("inactive_anon"),
        active_anon: get("active_anon"),
        inactive_file: get("inactive_file"),
        active_file: get("active_file"),
        unevictable: get("unevictable"),
        slab_reclaimable: get("slab_reclaimable"),
        slab_unreclaimable: get("slab_unreclaimable"),
        pgfault: get("pgfault"),
        pgmajfault: get("pgmajfault"),
        workingset_refault: both("workingset_refault"),
        workingset_activate: both("workingset_activate"),
        workingset_nodereclaim: get("workingset_nodereclaim"),
        pgrefill: get("pgrefill"),
        pgscan: get("pgscan"),
        pgsteal: get("pgsteal"),
        pgactivate: get("pgactivate"),
        pgdeactivate: get("pgdeactivate"),
        pglazyfree: get("pglazyfree"),
        pglazyfreed: get("pglazyfreed"),
        thp_fault_alloc: get("thp_fault_alloc"),
        thp_collapse_alloc: get("thp_collapse_alloc"),
        usage: files.number("memory.current"),
        usage_limit: files.number("memory.max"),
        swap_usage: files.number("memory.swap.current"),
        swap_limit: files.number("memory.swap.max"),
        max_usage: files.number("memory.peak"),
        swap_max_usage: files.number("memory.swap.peak"),
        psi: files.pressure("memory.pressure"),
        ..Default::default()
    }
}

fn memory_events(files: &Files) -> MemoryEvents {
    let events = files.keys("memory.events");
    let get = |key: &str| events.get(key).copied().unwrap_or(0);
    MemoryEvents {
        low: get("low"),
        high: get("high"),
        max: get("max"),
        oom: get("oom"),
        oom_kill: get("oom_kill"),
        oom_group_kill: get("oom_group_kill"),
        ..Default::default()
    }
}

/// A line of `io.stat`: `254:0 rbytes=1 wbytes=2 rios=3 wios=4 dbytes=0 dios=0`.
fn io_entry(line: &str) -> Option<IOEntry> {
    let (device, values) = line.split_once(' ')?;
    let (major, minor) = device.split_once(':')?;
    let value = |key: &str| {
        values.split(' ').find_map(|pair| pair.strip_prefix(key)?.strip_prefix('=')).map_or(0, number)
    };
    Some(IOEntry {
        major: major.parse().ok()?,
        minor: minor.parse().ok()?,
        rbytes: value("rbytes"),
        wbytes: value("wbytes"),
        rios: value("rios"),
        wios: value("wios"),
        ..Default::default()
    })
}

fn huge_pages(files: &Files) -> Vec<HugeTlbStat> {
    let size = |name: &str| Some(name.strip_prefix("hugetlb.")?.strip_suffix(".current")?.to_owned());
    let mut sizes: Vec<String> =
        files.0.keys().filter_map(|name| size(name)).filter(|size| is_name(size)).take(MAX_ENTRIES).collect();
    sizes.sort_unstable();
    sizes
        .into_iter()
        .map(|pagesize| HugeTlbStat {
            current: files.number(&format!("hugetlb.{pagesize}.current")),
            max: files.number(&format!("hugetlb.{pagesize}.max")),
            failcnt: files.keys(&format!("hugetlb.{pagesize}.events")).get("max").copied().unwrap_or(0),
            pagesize,
            ..Default::default()
        })
        .collect()
}

fn network(stats: &NetworkStats) -> Option<NetworkStat> {
    is_name(&stats.name).then(|| NetworkStat {
        name: stats.name.clone(),
        rx_bytes: stats.rx_bytes,
        rx_packets: stats.rx_packets,
        rx_errors: stats.rx_errors,
        rx_dropped: stats.rx_dropped,
        tx_bytes: stats.tx_bytes,
        tx_packets: stats.tx_packets,
        tx_errors: stats.tx_errors,
        tx_dropped: stats.tx_dropped,
        ..Default::default()
    })
}

/// Nothing that could disturb a terminal.
fn is_name(text: &str) -> bool {
    !text.is_empty() && text.len() <= MAX_NAME_LEN && text.chars().all(|c| c.is_ascii_graphic())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn stats(files: &[(&str, &str)]) -> ContainerStats {
        let files = files.iter().map(|(name, content)| ((*name).to_owned(), (*content).to_owned())).collect();
        ContainerStats { files, ..Default::default() }
    }

    #[test]
    fn files_become_the_fields_clients_read() {
        let any = encode(&stats(&[
            ("pids.current", "3\n"),
            ("pids.max", "max\n"),
            ("cpu.stat", "usage_usec 10\nuser_usec 7\nsystem_usec 3\nnr_throttled 2\n"),
            ("cpu.pressure", "some avg10=1.50 avg60=0.00 avg300=0.00 total=77\nfull avg10=0.00 total=5\n"),
            ("memory.current", "4096\n"),
            ("memory.max", "268435456\n"),
            ("memory.stat", "anon 1\nfile 2\nworkingset_refault_anon 3\nworkingset_refault_file 4\n"),
            ("memory.events", "low 0\nhigh 0\nmax 9\noom 2\noom_kill 1\noom_group_kill 0\n"),
            ("io.stat", "254:0 rbytes=1 wbytes=2 rios=3 wios=4 dbytes=5 dios=6\n254:16 \n"),
            ("hugetlb.2MB.current", "0\n"),
            ("hugetlb.2MB.max", "max\n"),
            ("hugetlb.2MB.events", "max 6\n"),
        ]));
        assert_eq!(any.type_url, "io.containerd.cgroups.v2.Metrics");
        let metrics = Metrics::parse_from_bytes(&any.value).unwrap();
        assert_eq!((metrics.pids.current, metrics.pids.limit), (3, u64::MAX));
        assert_eq!((metrics.cpu.usage_usec, metrics.cpu.nr_throttled), (10, 2));
        assert_eq!((metrics.cpu.psi.some.avg10, metrics.cpu.psi.some.total), (1.5, 77));
        assert_eq!(metrics.cpu.psi.full.total, 5);
        assert_eq!((metrics.memory.usage, metrics.memory.usage_limit), (4096, 268_435_456));
        assert_eq!((metrics.memory.anon, metrics.memory.workingset_refault), (1, 7));
        assert_eq!((metrics.memory_events.oom, metrics.memory_events.oom_kill), (2, 1));
        let io = &metrics.io.usage[0];
        assert_eq!((io.major, io.minor, io.rbytes, io.wios), (254, 0, 1, 4));
        let huge = &metrics.hugetlb[0];
        assert_eq!((huge.pagesize.as_str(), huge.max, huge.failcnt), ("2MB", u64::MAX, 6));
        assert!(metrics.network.is_empty());
    }

    #[test]
    fn a_hostile_guest_fills_nothing_up() {
        let mut hostile = stats(&[
            ("memory.current", "-1\n"),
            ("memory.max", "999999999999999999999999\n"),
            ("memory.stat", "anon\nfile x\n \n"),
            ("cpu.pressure", "some avg10=NaN avg60=inf total=-1\n"),
            ("hugetlb.\x1b[2J.current", "1\n"),
            ("hugetlb..current", "1\n"),
            ("unknown", "1\n"),
        ]);
        hostile.files.insert("io.stat".into(), "1:1 rbytes=1\n".repeat(100_000));
        let name = |name: &str| NetworkStats { name: name.into(), ..Default::default() };
        hostile.networks = vec![name("eth0\n"), name(&"x".repeat(1000)), name(""), name("eth0")];
        let metrics = metrics(&hostile);
        assert_eq!((metrics.memory.usage, metrics.memory.usage_limit), (0, 0));
        assert_eq!((metrics.cpu.psi.some.avg10, metrics.cpu.psi.some.total), (0.0, 0));
        assert_eq!(metrics.io.usage.len(), MAX_ENTRIES);
        assert!(metrics.hugetlb.is_empty());
        assert_eq!(metrics.network.len(), 1);
    }
}
