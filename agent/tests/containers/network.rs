//! The sandbox's network namespace, with veths where a guest has virtio-net.

use std::{collections::HashMap, net::IpAddr, process::Command};

use rvm_agent::{
    error::{Step, StepError, StepResult},
    sandbox::network::{Link, Slots},
};
use rvm_protocol::{
    agent::{
        Address, Capabilities, Interface, NamespaceType, Neighbour, NextHop, Process, Route, Rule,
        SyncNetworkRequest,
    },
    guest::NET_SLOTS,
};

use crate::fixture::{Machine, Running, container, read_until, shell};

/// The interface of slot N is the one with this number and N.
const FIRST_INDEX: u32 = 100;
const NET_ADMIN_AND_RAW: u64 = 1 << 12 | 1 << 13;

/// veths that are told apart by their numbers, which they keep when they move.
#[derive(Debug)]
pub struct Veths;

fn run(program: &[&str]) -> StepResult<()> {
    let done = Command::new(program[0]).args(&program[1..]).output().step(|| "run a program")?;
    match done.status.success() {
        true => Ok(()),
        false => Err(StepError::Refused(format!("{program:?}: {}", String::from_utf8_lossy(&done.stderr)))),
    }
}

impl Slots for Veths {
    fn find<'a>(&self, slot: u32, links: &'a [Link]) -> StepResult<Option<&'a Link>> {
        Ok(links.iter().find(|link| link.index == FIRST_INDEX + slot))
    }

    /// What was plugged in meanwhile: the one of slot 26.
    fn scan(&self) -> StepResult<()> {
        // The child that looks is in the sandbox's namespace, devices come in the agent's.
        let agents = format!("--net=/proc/{}/ns/net", nix::unistd::getppid());
        let add = "ip link add name plugged26 index 126 type veth peer name peer26";
        run(&["nsenter", &agents, "sh", "-c", add])
    }

    fn keep_only(&self, slots: &[u32]) -> StepResult<()> {
        // As of PCI functions, wherever they are; here they are inside.
        for slot in NET_SLOTS.map(u32::from).filter(|slot| !slots.contains(slot)) {
            // It is no error that there is none.
            let _ = run(&["ip", "link", "del", "dev", &format!("if{}", FIRST_INDEX + slot)]);
        }
        Ok(())
    }
}

fn octets(address: &str) -> Vec<u8> {
    match address.parse().unwrap() {
        IpAddr::V4(address) => address.octets().to_vec(),
        IpAddr::V6(address) => address.octets().to_vec(),
    }
}

fn address(text: &str) -> Address {
    let (address, length) = text.split_once('/').unwrap();
    let local = octets(address);
    let broadcast = match local.as_slice() {
        [a, b, c, _] => vec![*a, *b, *c, 255],
        _ => vec![],
    };
    let scope = if address.starts_with("fe80") { libc::RT_SCOPE_LINK } else { 0 };
    Address {
        address: local,
        prefix_len: length.parse().unwrap(),
        broadcast,
        scope: scope.into(),
        ..Default::default()
    }
}

fn interface(slot: u32, name: &str, addresses: &[&str]) -> Interface {
    Interface {
        slot,
        name: name.into(),
        mac: vec![2, 0x52, 0x56, 0x4d, 0, slot as u8],
        mtu: 1400,
        up: true,
        flags: libc::IFF_MULTICAST as u32,
        alias: format!("rvm-test-{slot}"),
        addresses: addresses.iter().map(|text| address(text)).collect(),
        ..Default::default()
    }
}

fn hop(interface: &str, gateway: &str) -> NextHop {
    let gateway = if gateway.is_empty() { vec![] } else { octets(gateway) };
    NextHop { interface: interface.into(), gateway, ..Default::default() }
}

fn route(destination: &str, gateway: &str, interface: &str) -> Route {
    let (start, length) = destination.split_once('/').unwrap();
    let is_v6 = start.contains(':');
    Route {
        family: if is_v6 { libc::AF_INET6 } else { libc::AF_INET } as u32,
        table: 254,
        destination: octets(start),
        destination_len: length.parse().unwrap(),
        next_hops: vec![hop(interface, gateway)],
        type_: libc::RTN_UNICAST.into(),
        protocol: libc::RTPROT_BOOT.into(),
        scope: if gateway.is_empty() && !is_v6 { libc::RT_SCOPE_LINK.into() } else { 0 },
        metric: if is_v6 { 1024 } else { 0 },
        ..Default::default()
    }
}

/// As the kernel makes it with an address.
fn prefix_route(destination: &str, interface: &str, source: &str) -> Route {
    let mut route = route(destination, "", interface);
    route.protocol = libc::RTPROT_KERNEL.into();
    match source {
        "" => route.metric = 256,
        source => route.preferred_source = octets(source),
    }
    route
}

fn rule(priority: u32, table: u32) -> Rule {
    let protocol = if priority == 0 || priority > 32000 { libc::RTPROT_KERNEL } else { libc::RTPROT_STATIC };
    Rule {
        family: libc::AF_INET as u32,
        priority,
        table,
        action: 1,
        protocol: protocol.into(),
        ..Default::default()
    }
}

/// What a bridge and host-local make of a pod, both families, and more.
fn pod() -> SyncNetworkRequest {
    let mut multipath = route("10.77.0.0/16", "10.9.0.7", "eth0");
    multipath.next_hops.push(NextHop { weight: 3, ..hop("eth0", "10.9.0.8") });
    let mut blackhole = route("10.66.0.0/16", "", "eth0");
    blackhole.type_ = libc::RTN_BLACKHOLE.into();
    blackhole.scope = 0;
    blackhole.next_hops.clear();
    let mut slow = route("10.55.0.0/16", "10.9.0.1", "eth0");
    slow.metrics = HashMap::from([(2, 1200)]);
    slow.metric = 7;
    let mut on_link = route("10.44.0.0/16", "192.0.2.1", "eth0");
    on_link.next_hops[0].on_link = true;
    on_link.table = 1000;
    let mut marked = rule(1000, 1000);
    marked.mark = 0x10;
    marked.mark_mask = 0xff;
    SyncNetworkRequest {
        interfaces: vec![interface(
            24,
            "eth0",
            &["10.9.0.2/24", "10.9.0.3/24", "fd00:9::2/64", "fe80::52:56ff:fe4d:18/64"],
        )],
        routes: vec![
            // Not in an order in which they can be made.
            route("0.0.0.0/0", "10.9.0.1", "eth0"),
            multipath,
            blackhole,
            slow,
            on_link,
            prefix_route("10.9.0.0/24", "eth0", "10.9.0.2"),
            route("::/0", "fd00:9::1", "eth0"),
            prefix_route("fd00:9::/64", "eth0", ""),
            prefix_route("fe80::/64", "eth0", ""),
        ],
        rules: vec![rule(0, 255), marked, rule(32766, 254), rule(32767, 253)],
        neighbours: vec![Neighbour {
            interface: "eth0".into(),
            address: octets("10.9.0.1"),
            mac: vec![2, 0, 0, 0, 0, 1],
            ..Default::default()
        }],
        sysctl: HashMap::from([
            ("ipv4/conf/eth0/rp_filter".into(), "2".into()),
            ("ipv4/ip_unprivileged_port_start".into(), "80".into()),
            ("ipv6/conf/eth0/accept_dad".into(), "1".into()),
            ("ipv4/no_such_parameter".into(), "1".into()),
        ]),
        ..Default::default()
    }
}

fn with_capabilities(mut process: Process) -> Process {
    let all = process.capabilities.mut_or_insert_default();
    *all = Capabilities {
        bounding: all.bounding | NET_ADMIN_AND_RAW,
        effective: all.effective | NET_ADMIN_AND_RAW,
        permitted: all.permitted | NET_ADMIN_AND_RAW,
        ..Default::default()
    };
    process
}

/// Runs a script where the sandbox's interfaces come from.
async fn outside(machine: &Machine, script: &str) -> String {
    let mut request = container("outside", with_capabilities(shell(script)));
    request.namespaces.retain(|namespace| namespace.type_ != NamespaceType::NETWORK.into());
    let output = machine.run_request(request).await.unwrap();
    assert_eq!((output.code, output.stderr.as_str()), (0, ""), "{script}: {output:?}");
    output.stdout
}

/// Runs a script in the sandbox's network namespace.
async fn inside(machine: &Machine, script: &str) -> String {
    let mut request = container("inside", with_capabilities(shell(script)));
    for namespace in &mut request.namespaces {
        namespace.sandbox = namespace.type_ == NamespaceType::NETWORK.into();
    }
    let output = machine.run_request(request).await.unwrap();
    assert_eq!((output.code, output.stderr.as_str()), (0, ""), "{script}: {output:?}");
    output.stdout
}

async fn sync(machine: &Machine, request: &SyncNetworkRequest) {
    machine.sandbox.sync_network(request).await.unwrap();
}

async fn refused(machine: &Machine, request: &SyncNetworkRequest) -> String {
    machine.sandbox.sync_network(request).await.unwrap_err().to_string()
}

const PLUG_24: &str =
    "ip link add name plugged24 index 124 type veth peer name peer24; ip link set peer24 up";
/// Blanks at ends of lines are iproute2's.
const SHOW: &str = "for what in '-4 route show table all' '-6 route show table all' rule neigh; do \
     ip $what | grep -Ev 'table local|^::1 dev lo|linkdown$' ; done | sed 's/ *$//'";

pub async fn the_network_is_what_the_host_says(machine: &Machine) {
    outside(machine, PLUG_24).await;
    sync(machine, &pod()).await;
    // At once, no address is being looked for.
    let addresses = inside(
        machine,
        "ip link show dev eth0; ip addr show dev eth0 | sed 's/ *$//; s/eth0@if[0-9]*/eth0/'",
    )
    .await;
    let expected = "    inet 10.9.0.2/24 brd 10.9.0.255 scope global eth0
       valid_lft forever preferred_lft forever
    inet 10.9.0.3/24 brd 10.9.0.255 scope global secondary eth0
       valid_lft forever preferred_lft forever
    inet6 fd00:9::2/64 scope global
       valid_lft forever preferred_lft forever
    inet6 fe80::52:56ff:fe4d:18/64 scope link
       valid_lft forever preferred_lft forever
";
    let (link, addresses) = addresses.split_at(addresses.find("    inet ").unwrap());
    assert_eq!(addresses, expected);
    for part in [
        "124: eth0: <BROADCAST,MULTICAST,UP,LOWER_UP> mtu 1400",
        "link/ether 02:52:56:4d:00:18",
        "rvm-test-24",
    ] {
        assert!(link.contains(part), "{part}: {link}");
    }
    let expected = "10.44.0.0/16 via 192.0.2.1 dev eth0 table 1000 onlink
default via 10.9.0.1 dev eth0
10.9.0.0/24 dev eth0 proto kernel scope link src 10.9.0.2
10.55.0.0/16 via 10.9.0.1 dev eth0 metric 7 mtu 1200
blackhole 10.66.0.0/16
10.77.0.0/16
\tnexthop via 10.9.0.7 dev eth0 weight 1
\tnexthop via 10.9.0.8 dev eth0 weight 3
fd00:9::/64 dev eth0 proto kernel metric 256 pref medium
fe80::/64 dev eth0 proto kernel metric 256 pref medium
default via fd00:9::1 dev eth0 metric 1024 pref medium
0:\tfrom all lookup local
1000:\tfrom all fwmark 0x10/0xff lookup 1000 proto static
32766:\tfrom all lookup main
32767:\tfrom all lookup default
10.9.0.1 dev eth0 lladdr 02:00:00:00:00:01 PERMANENT
";
    assert_eq!(inside(machine, SHOW).await, expected);
    let parameters = "cd /proc/sys/net; cat ipv4/conf/eth0/rp_filter ipv4/ip_unprivileged_port_start \
         ipv6/conf/eth0/accept_dad ipv6/conf/all/accept_dad";
    // The second is the pod's own.
    assert_eq!(inside(machine, parameters).await, "2\n81\n1\n0\n");
    // A second time nothing changes, nor does it when it comes back from elsewhere.
    sync(machine, &pod()).await;
    assert_eq!(inside(machine, SHOW).await, expected);
    let mut other = pod();
    other.interfaces[0].addresses.remove(0);
    other.interfaces[0].mtu = 9000;
    other.routes.retain(|route| route.destination_len == 64);
    other.rules.remove(1);
    other.neighbours.clear();
    sync(machine, &other).await;
    let shown = inside(machine, "cat /sys/class/net/eth0/mtu; ip -o -4 addr show dev eth0 | wc -l; ip rule | wc -l; ip neigh; ip -4 route").await;
    assert_eq!(shown, "9000\n1\n3\n");
    sync(machine, &pod()).await;
    assert_eq!(inside(machine, SHOW).await, expected);
    sync(machine, &SyncNetworkRequest::default()).await;
    assert_eq!(inside(machine, "ip -br link | wc -l").await, "1\n");
}

pub async fn interfaces_come_go_and_change_names(machine: &Machine) {
    outside(machine, PLUG_24).await;
    let mut both = pod();
    both.interfaces.push(interface(26, "eth1", &["10.8.0.2/24"]));
    both.routes.push(prefix_route("10.8.0.0/24", "eth1", "10.8.0.2"));
    // The one of slot 26 is found when it is looked for.
    sync(machine, &both).await;
    let look = "ip -br addr | grep -v ^lo | sed 's/@if[0-9]*//; s/fe80[^ ]*//' | awk '{print $1, $3}'";
    assert_eq!(inside(machine, look).await, "eth0 10.9.0.2/24\neth1 10.8.0.2/24\n");
    both.interfaces[0].name = "eth1".into();
    both.interfaces[1].name = "eth0".into();
    for route in both.routes.iter_mut() {
        for hop in &mut route.next_hops {
            hop.interface = if hop.interface == "eth0" { "eth1".into() } else { "eth0".into() };
        }
    }
    both.neighbours[0].interface = "eth1".into();
    both.sysctl.clear();
    sync(machine, &both).await;
    assert_eq!(inside(machine, look).await, "eth1 10.9.0.2/24\neth0 10.8.0.2/24\n");
    assert_eq!(inside(machine, "ip route show default").await, "default via 10.9.0.1 dev eth1 \n");
    both.interfaces.remove(0);
    both.routes.retain(|route| route.next_hops.iter().all(|hop| hop.interface == "eth0") && route.type_ == 1);
    both.rules.clear();
    both.neighbours.clear();
    sync(machine, &both).await;
    assert_eq!(inside(machine, look).await, "eth0 10.8.0.2/24\n");
    both.interfaces[0].slot = 27;
    let error = refused(machine, &both).await;
    assert!(error.starts_with("interface eth0: slot 27: no network interface"), "{error}");
    outside(machine, "ip link del peer26").await;
    sync(machine, &SyncNetworkRequest::default()).await;
    assert_eq!(inside(machine, "ip -br link | wc -l").await, "1\n");
}

pub async fn what_a_container_adds_to_the_network_stays(machine: &Machine) {
    outside(machine, PLUG_24).await;
    sync(machine, &pod()).await;
    let mut process = with_capabilities(shell(
        "ip link add br0 type bridge && ip addr add 172.30.0.1/24 dev br0 && ip link set br0 up && \
         ip addr add 10.9.0.99/32 dev eth0 && ip route add 10.33.0.0/16 via 10.9.0.1 table 77 && \
         ip route add 10.22.0.0/16 via 10.9.0.1 && ip rule add from 10.9.0.99 lookup 77 priority 500 && \
         ip link set eth0 mtu 1300 && echo done; read x",
    ));
    process.stdin = true;
    let mut request = container("own", process);
    for namespace in &mut request.namespaces {
        namespace.sandbox = namespace.type_ == NamespaceType::NETWORK.into();
    }
    let mut running: Running = machine.create(request).await.unwrap();
    running.start().await.unwrap();
    read_until(running.stdout.as_mut().unwrap(), "done").await;
    let look = "ip -br addr show br0 | grep -o 172.30.0.1/24; ip addr show eth0 | grep -o 10.9.0.99/32; \
                ip route show table 77; ip route | grep ^10.22; ip rule | grep ^500; cat /sys/class/net/eth0/mtu";
    let before = inside(machine, look).await;
    assert_eq!(before.lines().count(), 6, "{before}");
    let mut other = pod();
    other.routes.retain(|route| !route.metrics.contains_key(&2));
    other.neighbours.clear();
    sync(machine, &other).await;
    assert_eq!(inside(machine, look).await, before);
    assert_eq!(inside(machine, "ip route show 10.55.0.0/16; ip neigh").await, "");
    drop(running.stdin.take());
    running.wait().await;
    running.delete().await.unwrap();
    let left = "ip link del br0; ip rule del priority 500; ip route flush table 77";
    inside(machine, left).await;
    sync(machine, &SyncNetworkRequest::default()).await;
}

pub async fn a_network_that_cannot_be_names_what(machine: &Machine) {
    outside(machine, PLUG_24).await;
    let mut request = pod();
    request.routes[0].next_hops[0].gateway = octets("192.0.2.77");
    let error = refused(machine, &request).await;
    assert!(error.starts_with("route 0.0.0.0/0 via 192.0.2.77 dev eth0 table 254: "), "{error}");
    let mut request = pod();
    request.interfaces[0].mtu = 70_000;
    let error = refused(machine, &request).await;
    assert!(error.starts_with("interface eth0: mtu 70000: "), "{error}");
    let mut request = pod();
    request.sysctl.insert("ipv4/conf/eth0/rp_filter".into(), "many".into());
    let error = refused(machine, &request).await;
    assert_eq!(error, "sysctl \"ipv4/conf/eth0/rp_filter\": set it to \"many\": invalid argument");
    let mut request = pod();
    request.interfaces[0].mac = vec![1, 0, 0, 0, 0, 1];
    let error = refused(machine, &request).await;
    assert!(error.starts_with("interface eth0: mac 01:00:00:00:00:01: "), "{error}");
    // It can be tried again, and what the failed ones had made goes.
    sync(machine, &pod()).await;
    let mut request = pod();
    request.routes.truncate(0);
    sync(machine, &request).await;
    assert_eq!(inside(machine, "ip -4 route | grep -v proto.kernel || true").await, "");
    let open = std::fs::read_dir("/proc/self/fd").unwrap().count();
    for _ in 0..20 {
        sync(machine, &pod()).await;
    }
    assert_eq!(std::fs::read_dir("/proc/self/fd").unwrap().count(), open);
    sync(machine, &SyncNetworkRequest::default()).await;
    assert_eq!(inside(machine, "ip -br link | wc -l").await, "1\n");
}
