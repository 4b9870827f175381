//! Against this machine's own kernel, in namespaces of their own.

use std::{
    fs::File,
    io::{Read, Write},
    os::fd::{AsRawFd, OwnedFd},
    process::Command,
    time::Duration,
};

use super::*;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

/// A machine that does what it is told, or fails at one of the calls.
#[derive(Default)]
struct Told {
    calls: Mutex<Vec<String>>,
    /// Fails at the call that begins like this.
    fails: Mutex<Option<&'static str>>,
    taps: Mutex<Vec<OwnedFd>>,
    last: Mutex<Option<SyncNetworkRequest>>,
    /// Where it is listened, once a test has made it.
    dir: Mutex<Option<PathBuf>>,
}

impl Told {
    fn call(&self, call: String) -> bool {
        let fails = self.fails.lock().unwrap().is_some_and(|prefix| call.starts_with(prefix));
        self.calls.lock().unwrap().push(call);
        fails
    }

    fn calls(&self) -> Vec<String> {
        std::mem::take(&mut self.calls.lock().unwrap())
    }
}

impl Machine for Told {
    async fn add_net(
        &self,
        net: &NetConfig,
        taps: &[BorrowedFd<'_>],
        _: &[BorrowedFd<'_>],
    ) -> Result<(), MonitorError> {
        if self.call(format!("add {}", net.slot)) {
            return Err(MonitorError::Refused("no".into()));
        }
        let kept = taps.iter().map(|tap| tap.try_clone_to_owned().unwrap());
        self.taps.lock().unwrap().extend(kept);
        Ok(())
    }

    async fn remove_net(&self, slot: u8) -> Result<(), MonitorError> {
        self.call(format!("remove {slot}"));
        self.taps.lock().unwrap().clear();
        Ok(())
    }

    fn listen(&self, port: u32) -> Result<UnixListener, VsockError> {
        self.call(format!("listen {port}"));
        let dir = self.dir.lock().unwrap();
        Ok(UnixListener::bind(dir.as_ref().unwrap().join(port.to_string())).unwrap())
    }

    async fn apply(&self, wanted: &SyncNetworkRequest) -> Result<(), AgentError> {
        let names: Vec<_> = wanted.interfaces.iter().map(|interface| interface.name.as_str()).collect();
        if self.call(format!("apply {}", names.join(" "))) {
            return Err(AgentError::Refused { code: ttrpc::Code::INTERNAL, message: "no".into() });
        }
        *self.last.lock().unwrap() = Some(wanted.clone());
        Ok(())
    }
}

fn network() -> Arc<Network> {
    let settings = config::Config::defaults().unwrap().network;
    Arc::new(Network::open(None, 1, &settings).unwrap())
}

/// Runs programs in a namespace, one a line, and returns what they print.
fn run(namespace: &Namespace, lines: &str) -> String {
    let run = || {
        let output = Command::new("sh").args(["-ec", lines]).output().unwrap();
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(output.status.success(), "{lines}: {said}");
        String::from_utf8_lossy(&output.stdout).into_owned()
    };
    namespace.run(run).unwrap()
}

fn path_of(namespace: &Namespace) -> PathBuf {
    format!("/proc/{}/fd/{}", std::process::id(), std::os::fd::AsFd::as_fd(namespace).as_raw_fd()).into()
}

/// `eth0` in the network, and its other end, `far`, in the namespace that is returned.
fn with_eth0(network: &Network) -> Namespace {
    let far = Namespace::new().unwrap();
    let path = path_of(&far);
    run(
        network.namespace(),
        &format!(
            "ip link add eth0 address 02:00:00:00:00:07 type veth peer name far netns {}
             ip link set eth0 up; ip address add 10.9.0.2/24 dev eth0",
            path.display()
        ),
    );
    run(&far, "ip link set far up; ip address add 10.9.0.1/24 dev far");
    far
}

/// What is there of ours: taps and filters.
fn ours(namespace: &Namespace) -> String {
    run(
        namespace,
        "ip -o link show | grep -o 'rvm-tap[0-9]*' | sort -u || true
         for link in $(ip -o link | sed 's/^[0-9]*: //; s/[:@].*//'); do
             tc qdisc show dev $link 2>/dev/null | grep -o clsact || true
         done",
    )
}

#[tokio::test]
async fn an_interface_without_a_queue_stays_without() {
    let (network, machine) = (network(), Told::default());
    let _far = with_eth0(&network);
    run(network.namespace(), "ip link set eth0 txqueuelen 0");
    network.sync(&machine).await.unwrap();
    assert_eq!(machine.calls(), ["add 24", "apply lo eth0"]);
    assert_eq!(ours(network.namespace()).matches("clsact").count(), 2);
    let shown = run(network.namespace(), "ip -o link show eth0");
    assert!(!shown.contains("qlen"), "{shown}");
    network.sync(&machine).await.unwrap();
    assert_eq!(machine.calls(), [""; 0], "nothing has changed");
}

#[tokio::test]
async fn frames_pass_and_the_namespaces_own_stack_sees_none() {
    let (network, machine) = (network(), Told::default());
    let far = with_eth0(&network);
    network.sync(&machine).await.unwrap();
    assert_eq!(machine.calls(), ["add 24", "apply lo eth0"]);
    // Nobody but the guest answers for the address, which stays where it was.
    let asked = far.run(|| Command::new("ping").args(["-c1", "-W1", "10.9.0.2"]).output().unwrap());
    assert!(!asked.unwrap().status.success());
    assert!(run(network.namespace(), "ip -o address show dev eth0").contains("10.9.0.2/24"));

    let mut tap = File::from(machine.taps.lock().unwrap().pop().unwrap());
    let mut request = vec![0; 10];
    request.extend([0xff; 6]);
    request.extend([2, 0, 0, 0, 0, 7, 8, 6, 0, 1, 8, 0, 6, 4, 0, 1]);
    request.extend([2, 0, 0, 0, 0, 7, 10, 9, 0, 2, 0, 0, 0, 0, 0, 0, 10, 9, 0, 1]);
    tap.write_all(&request).unwrap();
    loop {
        let mut ready = [PollFd::new(std::os::fd::AsFd::as_fd(&tap), PollFlags::POLLIN)];
        let limit = PollTimeout::try_from(Duration::from_secs(10)).unwrap();
        assert_eq!(poll(&mut ready, limit).unwrap(), 1, "no answer");
        let mut frame = [0; 2048];
        let length = tap.read(&mut frame).unwrap();
        // An ARP answer, for us, of 10.9.0.1.
        let frame = &frame[10..length];
        if frame[12..14] == [8, 6] && frame[21] == 2 {
            assert_eq!((&frame[..6], &frame[28..32]), (&[2, 0, 0, 0, 0, 7][..], &[10, 9, 0, 1][..]));
            break;
        }
    }
    drop(tap);
    network.close();
    assert_eq!(ours(network.namespace()), "");
    // The interface is the namespace's own again.
    run(&far, "ping -c1 -W5 10.9.0.2");
}

#[tokio::test]
async fn the_guest_is_told_all_and_only_what_changed() {
    let (network, machine) = (network(), Told::default());
    network.sync(&machine).await.unwrap();
    assert_eq!(machine.calls(), Vec::<String>::new(), "lo alone is nothing to tell of");
    let _far = with_eth0(&network);
    run(
        network.namespace(),
        "ip link set eth0 mtu 1400 alias outside
         ip address add fd09::2/64 dev eth0 nodad
         echo 2 > /proc/sys/net/ipv4/conf/eth0/arp_ignore; echo 511 > /proc/sys/net/core/somaxconn
         ip route add default via 10.9.0.1
         ip route add 10.8.0.0/16 via 10.7.0.1 dev eth0 onlink metric 7 src 10.9.0.2 mtu 1300
         ip -6 route add default via fd09::1
         ip route add blackhole 10.6.0.0/16
         ip route add 10.5.0.0/16 nexthop via 10.9.0.1 weight 2 nexthop via 10.9.0.3
         ip rule add from 10.9.0.2 fwmark 7/15 table 100 priority 500
         ip neighbour add 10.9.0.9 lladdr 02:00:00:00:00:09 dev eth0 nud permanent",
    );
    network.sync(&machine).await.unwrap();
    let told = machine.last.lock().unwrap().clone().unwrap();
    let eth0 = &told.interfaces[1];
    assert_eq!((eth0.slot, eth0.name.as_str(), eth0.mtu, eth0.up), (24, "eth0", 1400, true));
    assert_eq!((eth0.mac.as_slice(), eth0.alias.as_str()), (&[2, 0, 0, 0, 0, 7][..], "outside"));
    let has = |address: &[u8], prefix_len| {
        eth0.addresses.iter().any(|found| found.address == address && found.prefix_len == prefix_len)
    };
    assert!(has(&[10, 9, 0, 2], 24), "{:?}", eth0.addresses);
    assert!(has(&"fd09::2".parse::<std::net::Ipv6Addr>().unwrap().octets(), 64), "{:?}", eth0.addresses);
    let route = |destination: &[u8]| {
        let found = told.routes.iter().find(|route| route.destination == destination && route.table == 254);
        found.unwrap_or_else(|| panic!("{destination:?} in {:?}", told.routes)).clone()
    };
    let default = route(&[]);
    assert_eq!(
        (default.next_hops[0].gateway.as_slice(), default.next_hops[0].interface.as_str()),
        (&[10, 9, 0, 1][..], "eth0")
    );
    let far = route(&[10, 8, 0, 0]);
    assert_eq!((far.metric, far.metrics.get(&2), far.next_hops[0].on_link), (7, Some(&1300), true));
    assert_eq!(far.preferred_source, [10, 9, 0, 2]);
    assert_eq!((route(&[10, 6, 0, 0]).type_, route(&[10, 6, 0, 0]).next_hops.len()), (6, 0));
    let several = route(&[10, 5, 0, 0]).next_hops;
    assert_eq!(several.iter().map(|hop| hop.weight).collect::<Vec<_>>(), [2, 1]);
    let rule = told.rules.iter().find(|rule| rule.priority == 500).unwrap();
    assert_eq!((rule.table, rule.mark, rule.mark_mask, rule.source_len), (100, 7, 15, 32));
    let parameter = |path: &str| told.sysctl.get(path).map(String::as_str);
    assert_eq!(parameter("core/somaxconn"), Some("511"));
    assert_eq!(parameter("ipv4/conf/eth0/arp_ignore"), Some("2"));
    assert_eq!(told.neighbours.len(), 1);
    assert_eq!((&told.neighbours[0].interface, told.neighbours[0].address[3]), (&"eth0".to_owned(), 9));

    machine.calls();
    network.sync(&machine).await.unwrap();
    assert_eq!(machine.calls(), Vec::<String>::new(), "nothing has changed");
    // The tap's MTU goes with the interface's.
    run(network.namespace(), "ip link set eth0 down; ip link set eth0 name net1 mtu 9000 up");
    network.sync(&machine).await.unwrap();
    assert_eq!(machine.calls(), ["apply lo net1"]);
    assert!(run(network.namespace(), "ip link show rvm-tap24").contains("mtu 9000"));
    run(network.namespace(), "ip link del net1");
    network.sync(&machine).await.unwrap();
    assert_eq!(machine.calls(), ["apply lo", "remove 24"]);
    assert_eq!(ours(network.namespace()), "");
}

#[tokio::test]
async fn whatever_fails_leaves_nothing_and_can_be_done_again() {
    let (network, machine) = (network(), Told::default());
    let _far = with_eth0(&network);
    let _other = {
        let other = Namespace::new().unwrap();
        let path = path_of(&other);
        let add = format!("ip link add eth1 type veth peer name far netns {}", path.display());
        run(network.namespace(), &add);
        other
    };
    for (call, calls) in [
        ("add 24", &["add 24"][..]),
        ("add 25", &["add 24", "add 25", "remove 24"]),
        ("apply", &["add 24", "add 25", "apply lo eth0 eth1", "remove 24", "remove 25"]),
    ] {
        *machine.fails.lock().unwrap() = Some(call);
        network.sync(&machine).await.unwrap_err();
        assert_eq!(machine.calls(), calls);
        assert_eq!(ours(network.namespace()), "", "{call}");
    }
    *machine.fails.lock().unwrap() = None;
    // In the kernel: filters in a block that several interfaces share are not this one's.
    run(network.namespace(), "tc qdisc add dev eth1 ingress_block 7 clsact");
    let error = network.sync(&machine).await.unwrap_err().to_string();
    assert!(error.contains("eth1"), "{error}");
    assert_eq!(ours(network.namespace()), "clsact\n", "somebody's own stays");
    run(network.namespace(), "tc qdisc del dev eth1 clsact");
    machine.calls();
    network.sync(&machine).await.unwrap();
    assert_eq!(machine.calls(), ["add 24", "add 25", "apply lo eth0 eth1"]);
}

#[tokio::test]
async fn many_set_ups_leave_nothing() {
    let namespace = Namespace::new().unwrap();
    let path = path_of(&namespace);
    let other = Namespace::new().unwrap();
    run(&namespace, &format!("ip link add eth0 type veth peer name far netns {}", path_of(&other).display()));
    let settings = config::Config::defaults().unwrap().network;
    let wanted = HostNetwork { field: "linux.namespaces[1].path".into(), path };
    for nth in 0..200 {
        let network = Arc::new(Network::open(Some(&wanted), 1, &settings).unwrap());
        let machine = Told::default();
        match nth % 2 {
            // A program that another test starts has the last tap until it is executed.
            0 => {
                while let Err(error) = network.prepare() {
                    assert!(matches!(error, NetworkError::InUse), "{error}");
                }
            }
            _ => {
                while let Err(error) = network.sync(&machine).await {
                    assert!(matches!(error, NetworkError::InUse), "{error}");
                }
            }
        }
        assert_eq!(network.inherited().len(), 1);
        network.close();
    }
    assert_eq!(ours(&namespace), "");
    assert_eq!(run(&namespace, "ip -o link | wc -l").trim(), "2");
}

#[tokio::test]
async fn a_namespace_has_one_sandbox_and_what_a_killed_one_left_is_taken_off() {
    let (first, machine) = (network(), Told::default());
    let _far = with_eth0(&first);
    first.sync(&machine).await.unwrap();
    let path = path_of(first.namespace());
    let settings = config::Config::defaults().unwrap().network;
    let wanted = HostNetwork { field: "linux.namespaces[1].path".into(), path: path.clone() };
    let second = Arc::new(Network::open(Some(&wanted), 1, &settings).unwrap());
    assert!(matches!(second.sync(&machine).await, Err(NetworkError::InUse)));
    assert!(matches!(second.prepare(), Err(NetworkError::InUse)));
    // While the first one lives its filters stay.
    clean_up(&path).unwrap();
    assert!(ours(first.namespace()).contains("clsact"));
    // Killed: its descriptors close, and nothing else happens.
    for (_, mut carried) in std::mem::take(&mut first.state().carried) {
        carried.redirects.clear();
    }
    machine.taps.lock().unwrap().clear();
    assert_eq!(ours(first.namespace()), "clsact\n");
    clean_up(&path).unwrap();
    assert_eq!(ours(first.namespace()), "");
    second.prepare().unwrap();
    assert_eq!(second.inherited().len(), 1);
    second.close();
    assert_eq!(ours(first.namespace()), "");
}

#[tokio::test]
async fn what_cannot_be_carried_is_named_unless_nobody_uses_it() {
    let refused = |lines: &str| {
        let network = network();
        run(network.namespace(), lines);
        network.prepare().err().map(|error| error.to_string()).unwrap_or_default()
    };
    let tun = refused("ip tuntap add dev vpn0 mode tun; ip link set vpn0 up");
    assert!(
        tun.starts_with("interface \"vpn0\" of the network namespace cannot be the guest's: tun"),
        "{tun}"
    );
    assert_eq!(refused("ip tuntap add dev vpn0 mode tun"), "");
    let stacked =
        refused("ip link add br0 type bridge; ip link add mv0 link br0 type macvlan; ip link set mv0 up");
    assert!(stacked.contains("\"mv0\"") && stacked.contains("macvlan on br0"), "{stacked}");
    let many = refused("for n in 0 1 2 3 4 5 6 7 8; do ip link add br$n type bridge; done");
    assert_eq!(many, "interface \"br8\": a machine has at most 8 interfaces");
    let settings = config::Config::defaults().unwrap().network;
    let open = |path: &str| {
        let wanted = HostNetwork { field: "linux.namespaces[1].path".into(), path: path.into() };
        Network::open(Some(&wanted), 1, &settings).err().unwrap().to_string()
    };
    let host = open("/proc/self/ns/net");
    assert!(host.starts_with("linux.namespaces[1].path: /proc/self/ns/net: is the host's network"), "{host}");
    assert!(open("/proc/self/ns/uts").ends_with("is no network namespace"));
    assert!(open("/proc/self/status").ends_with("is no network namespace"));
    assert!(open("/nonexistent").contains("No such file"));
}

#[tokio::test]
async fn changes_are_told_together() {
    let network = network();
    let mut watch = Watch::begin(&network).unwrap();
    let moment = Duration::from_millis(50);
    assert!(tokio::time::timeout(moment, watch.changed()).await.is_err());
    run(
        network.namespace(),
        "ip link add br0 type bridge; ip link set br0 up; ip address add 10.9.0.2/24 dev br0",
    );
    tokio::time::timeout(Duration::from_secs(10), watch.changed()).await.unwrap().unwrap();
    assert!(tokio::time::timeout(moment, watch.changed()).await.is_err(), "all of it was told");
}

/// A name server in the namespace and one beyond its interface: what the guest asks
/// reaches the one, what the other answers reaches who has asked in the namespace.
#[tokio::test]
async fn dockers_name_server_hears_the_guest_and_others_answers() {
    use std::net::{TcpListener, UdpSocket};

    use rvm_protocol::guest::{RESOLVER_ADDRESS, RESOLVER_DATAGRAM_PORT, RESOLVER_STREAM_PORT};
    use tokio::io::{AsyncReadExt, AsyncWriteExt};

    let (network, machine) = (network(), Told::default());
    let dir = tempfile::tempdir().unwrap();
    let guest = |port: u32| tokio::net::UnixStream::connect(dir.path().join(port.to_string()));
    *machine.dir.lock().unwrap() = Some(dir.path().to_owned());
    let far = with_eth0(&network);
    network.sync(&machine).await.unwrap();
    assert!(!machine.last.lock().unwrap().as_ref().unwrap().resolver);

    let at = (RESOLVER_ADDRESS, 53);
    let bind = || (UdpSocket::bind(at).unwrap(), TcpListener::bind(at).unwrap());
    let (datagrams, streams) = network.namespace().run(bind).unwrap();
    machine.calls();
    network.sync(&machine).await.unwrap();
    let listened = format!("listen {RESOLVER_DATAGRAM_PORT}");
    assert_eq!(machine.calls(), [&listened, &format!("listen {RESOLVER_STREAM_PORT}"), "apply lo eth0"]);
    assert!(machine.last.lock().unwrap().as_ref().unwrap().resolver);

    let mut asking = guest(RESOLVER_DATAGRAM_PORT).await.unwrap();
    asking.write_all(b"\0\x03who").await.unwrap();
    let answering = spawn_blocking(move || {
        let mut query = [0; 16];
        let (length, from) = datagrams.recv_from(&mut query).unwrap();
        datagrams.send_to(b"you", from).unwrap();
        query[..length].to_vec()
    });
    assert_eq!(answering.await.unwrap(), b"who");
    let mut answer = [0; 5];
    asking.read_exact(&mut answer).await.unwrap();
    assert_eq!(&answer, b"\0\x03you");

    let mut asking = guest(RESOLVER_STREAM_PORT).await.unwrap();
    let accepting = spawn_blocking(move || {
        let (mut stream, _) = streams.accept().unwrap();
        stream.write_all(b"you").unwrap();
    });
    let mut answer = String::new();
    asking.read_to_string(&mut answer).await.unwrap();
    accepting.await.unwrap();
    assert_eq!(answer, "you");

    // As Docker's asks others: from within the namespace.
    let beyond = far.run(|| UdpSocket::bind(("10.9.0.1", 53)).unwrap()).unwrap();
    let inside = network.namespace().run(|| UdpSocket::bind(("10.9.0.2", 0)).unwrap()).unwrap();
    for socket in [&beyond, &inside] {
        socket.set_read_timeout(Some(Duration::from_secs(10))).unwrap();
    }
    inside.connect(("10.9.0.1", 53)).unwrap();
    inside.send(b"who").unwrap();
    let mut buffer = [0; 16];
    let (_, from) = beyond.recv_from(&mut buffer).unwrap();
    beyond.send_to(b"you", from).unwrap();
    assert_eq!(inside.recv(&mut buffer).unwrap(), 3);
    // The guest hears what is answered to itself.
    let mut tap = File::from(machine.taps.lock().unwrap().pop().unwrap());
    beyond.send_to(b"guest's own", ("10.9.0.2", 7)).unwrap();
    loop {
        let mut ready = [PollFd::new(std::os::fd::AsFd::as_fd(&tap), PollFlags::POLLIN)];
        assert_eq!(poll(&mut ready, PollTimeout::from(10_000_u16)).unwrap(), 1, "the guest hears nothing");
        let mut frame = [0; 2048];
        let length = tap.read(&mut frame).unwrap();
        assert!(!frame[..length].ends_with(b"you"), "the guest hears others' answers");
        if frame[..length].ends_with(b"guest's own") {
            break;
        }
    }
    // dockerd may be gone for a while.
    network.sync(&machine).await.unwrap();
    assert!(machine.calls().is_empty());
    drop(tap);
    machine.taps.lock().unwrap().clear();
    network.close();
    assert_eq!(ours(network.namespace()), "");
}
