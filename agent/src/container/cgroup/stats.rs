//! What a container has used: its cgroup's files and its network interfaces.

use std::{
    collections::HashMap,
    fs::{self, File},
    io::Read,
};

use nix::unistd::Pid;
use rvm_protocol::agent::NetworkStats;

use super::{Cgroup, files};
use crate::error::{Step, StepResult};

/// The files clients' statistics are made of; those of huge pages come on top.
const FILES: &[&str] = &[
    "cpu.pressure",
    "cpu.stat",
    "io.pressure",
    "io.stat",
    "memory.current",
    "memory.events",
    "memory.max",
    "memory.peak",
    "memory.pressure",
    "memory.stat",
    "memory.swap.current",
    "memory.swap.max",
    "memory.swap.peak",
    "pids.current",
    "pids.max",
];

/// Longest `/proc/PID/net/dev` read: a container may have made any number of
/// interfaces.
const MAX_NET_DEV_LEN: u64 = 64 * 1024;

impl Cgroup {
    /// Contents of its files by name, without those the kernel does not have.
    pub fn stats(&self) -> HashMap<String, String> {
        let fixed = FILES.iter().map(|name| (*name).to_owned());
        fixed
            .chain(self.huge_page_files())
            .filter_map(|name| {
                let content = files::read(self.dir(), &name).ok()?;
                Some((name, content))
            })
            .collect()
    }

    fn huge_page_files(&self) -> Vec<String> {
        let entries = fs::read_dir(&self.path).into_iter().flatten().flatten();
        let names = entries.filter_map(|entry| entry.file_name().into_string().ok());
        let wanted = |name: &String| {
            let mut parts = name.split('.');
            parts.next() == Some("hugetlb")
                && parts.next().is_some()
                && matches!(parts.next(), Some("current" | "events" | "max"))
                && parts.next().is_none()
        };
        names.filter(wanted).collect()
    }
}

/// Interfaces of the network namespace of a process.
pub fn networks(pid: Pid) -> StepResult<Vec<NetworkStats>> {
    let path = format!("/proc/{pid}/net/dev");
    let mut content = String::new();
    let file = File::open(&path).step(|| format!("open {path}"))?;
    file.take(MAX_NET_DEV_LEN).read_to_string(&mut content).step(|| format!("read {path}"))?;
    Ok(content.lines().filter_map(network).collect())
}

/// One line of `/proc/net/dev` (proc_pid_net(5)); the two of its heading have no
/// colon or no numbers.
fn network(line: &str) -> Option<NetworkStats> {
    let (name, numbers) = line.split_once(':')?;
    let numbers: Vec<u64> = numbers.split_whitespace().map(|n| n.parse().ok()).collect::<Option<_>>()?;
    let [
        rx_bytes,
        rx_packets,
        rx_errors,
        rx_dropped,
        _,
        _,
        _,
        _,
        tx_bytes,
        tx_packets,
        tx_errors,
        tx_dropped,
        ..,
    ] = numbers[..]
    else {
        return None;
    };
    Some(NetworkStats {
        name: name.trim().to_owned(),
        rx_bytes,
        rx_packets,
        rx_errors,
        rx_dropped,
        tx_bytes,
        tx_packets,
        tx_errors,
        tx_dropped,
        ..Default::default()
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn interfaces_of_a_namespace() {
        let heading = "Inter-|   Receive                                                |  Transmit";
        assert_eq!(network(heading), None);
        assert_eq!(network(" face |bytes    packets errs drop fifo frame compressed multicast|bytes"), None);
        let line = "  eth0: 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16";
        let eth0 = network(line).unwrap();
        assert_eq!((eth0.name.as_str(), eth0.rx_bytes, eth0.rx_dropped), ("eth0", 1, 4));
        assert_eq!((eth0.tx_bytes, eth0.tx_packets, eth0.tx_errors, eth0.tx_dropped), (9, 10, 11, 12));
        let own = networks(nix::unistd::getpid()).unwrap();
        assert!(own.iter().any(|interface| interface.name == "lo"), "{own:?}");
    }
}
