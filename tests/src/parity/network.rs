//! The bundle of a network: what a namespace that somebody has prepared looks like to a container in it.

use std::{collections::BTreeMap, path::Path};

use anyhow::{Context, Result};
use serde_json::Value;

use super::place::Place;
use crate::{cni::Namespace, job::Input, programs, scale, world::shell};

/// What new interfaces begin with: nothing that takes its time.
const PARAMETERS: &str = "
sysctl -qw net.ipv6.conf.default.dad_transmits=0 net.ipv6.conf.all.dad_transmits=0 net.core.somaxconn=511
sysctl -qw net.ipv4.ip_local_port_range='20000 30000' net.ipv4.ping_group_range='0 5' net.ipv4.tcp_fin_timeout=33
";
const INTERFACES: &str = "
ip link add rvmparity0 type veth peer name eth0 address 02:00:00:00:00:11 netns rvm-parity
ip link add rvmparity1 type veth peer name net1 address 02:00:00:00:00:12 netns rvm-parity
ip link set rvmparity0 up; ip link set rvmparity1 mtu 9000 up
";
/// Everything that can be said of them and of where they lead.
const SETTINGS: &str = "
ip link set eth0 mtu 1400 alias outside up
ip link set net1 mtu 9000 txqueuelen 77 up
ip address add 10.77.5.2/24 brd + dev eth0; ip address add 10.77.5.3/32 scope link dev eth0
ip address add fd77:5::2/64 nodad dev eth0; ip address add 10.78.5.2/24 dev net1
ip route add default via 10.77.5.1; ip -6 route add default via fd77:5::1
ip route add 10.8.0.0/16 via 10.7.0.1 dev eth0 onlink metric 7 src 10.77.5.2 mtu 1300
ip route add blackhole 10.6.0.0/16; ip route add 10.9.0.0/16 dev net1 scope link table 100
ip route add 10.5.0.0/16 nexthop via 10.77.5.1 weight 2 nexthop via 10.78.5.1
ip rule add from 10.77.5.2 fwmark 7/15 table 100 priority 500; ip -6 rule add to fd99::/64 prohibit priority 501
ip neighbour add 10.77.5.9 lladdr 02:00:00:00:00:09 dev eth0 nud permanent
sysctl -qw net.ipv4.conf.eth0.arp_ignore=2 net.ipv4.conf.net1.rp_filter=2 net.ipv6.conf.net1.accept_ra=0
";

/// Lists that `ip -j` gives, and the fields that tell their entries apart.
const LISTS: [(&str, &str, &[&str]); 7] = [
    ("link", "link", &["ifname"]),
    ("addr", "addr", &["ifname"]),
    ("route", "route show table all", &["dst", "table", "metric", "dev", "type"]),
    ("route6", "-6 route show table all", &["dst", "table", "metric", "dev", "type"]),
    ("rule", "rule", &["priority"]),
    ("rule6", "-6 rule", &["priority"]),
    ("neigh", "neigh show nud permanent", &["dst", "dev"]),
];

/// Files below `/proc/net` whose text is compared.
const FILES: [&str; 5] = ["route", "if_inet6", "arp", "dev_mcast", "fib_trie"];

/// Where the container has ip(8).
const DIR: &str = "/net";

/// Runs it in a namespace made for it.
///
/// # Errors
/// When it cannot be prepared, or the container does not exit with 0.
pub fn run(place: &Place<'_>) -> Result<String> {
    let namespace = Namespace::new("rvm-parity")?;
    let result = run_in(place, &namespace);
    shell("for n in 0 1; do ip link delete rvmparity$n 2>/dev/null || true; done")?;
    result
}

fn run_in(place: &Place<'_>, namespace: &Namespace) -> Result<String> {
    namespace.run(PARAMETERS)?;
    shell(INTERFACES)?;
    namespace.run(SETTINGS)?;
    let ip = place.file("ip");
    let program = shell("command -v ip")?;
    programs::copy(Path::new(program.trim()), &ip, DIR)?;
    let mut script = String::new();
    for (name, command, _) in LISTS {
        script += &format!("echo \"@ {name} $({DIR}/ip -j {command})\"\n");
    }
    script += "for file in /proc/net/*; do [ -f $file ] && echo \"file.${file##*/} = there\"; done\n";
    for file in FILES {
        script += &format!("echo \"file.{file}.text = $(sort /proc/net/{file} | tr '\\n' '|')\"\n");
    }
    // A line each, `FILE:LINE`; what must not be read is left out.
    script += "grep -rs '' /proc/sys/net | sed 's|^/proc/sys/|sysctl.|; s|:| = |'\n";
    let mount = format!("type=bind,src={},dst={DIR},options=rbind:ro", ip.display());
    let run = place.container().with(&["--with-ns", &namespace.option(), "--mount", &mount]);
    let job = run.start(&["sh", "-c", &script], Input::Nothing)?;
    let text = job.finish(scale::container())?.success()?.text();
    let mut lines = String::new();
    for line in text.lines() {
        match line.strip_prefix("@ ").and_then(|line| line.split_once(' ')) {
            Some((name, list)) => {
                let of_name = LISTS.iter().find(|list| list.0 == name).context("an unknown list")?;
                let list = serde_json::from_str(list).with_context(|| format!("{name}: {list:?}"))?;
                lines += &flat(name, of_name.2, &list);
            }
            None => lines += &format!("{line}\n"),
        }
    }
    Ok(lines)
}

/// A line for each field of each entry of a list.
fn flat(name: &str, identity: &[&str], list: &Value) -> String {
    let mut lines = String::new();
    let mut seen = BTreeMap::new();
    for entry in list.as_array().into_iter().flatten() {
        let text = |value: &Value| value.as_str().map_or_else(|| value.to_string(), str::to_owned);
        let parts: Vec<String> = identity.iter().filter_map(|field| entry.get(field)).map(text).collect();
        let who = parts.join(",");
        let nth = seen.entry(who.clone()).and_modify(|nth| *nth += 1).or_insert(1);
        let who = if *nth > 1 { format!("{who}#{nth}") } else { who };
        for (field, value) in entry.as_object().into_iter().flatten() {
            match value.as_array() {
                // An interface's addresses, a route's next hops.
                Some(parts) => {
                    for (n, part) in parts.iter().enumerate() {
                        lines += &format!("{name}.{who}.{field}.{n} = {part}\n");
                    }
                }
                None => lines += &format!("{name}.{who}.{field} = {}\n", text(value)),
            }
        }
    }
    lines
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn a_list_is_lines() {
        let list = json!([
            { "ifname": "eth0", "mtu": 1400, "flags": ["UP"], "addr_info": [{ "local": "10.0.0.2" }] },
            { "ifname": "eth0", "mtu": 1 },
        ]);
        let expected = "addr.eth0.addr_info.0 = {\"local\":\"10.0.0.2\"}\naddr.eth0.flags.0 = \"UP\"\n\
                        addr.eth0.ifname = eth0\naddr.eth0.mtu = 1400\naddr.eth0#2.ifname = eth0\naddr.eth0#2.mtu = 1\n";
        assert_eq!(flat("addr", &["ifname"], &list), expected);
    }
}
