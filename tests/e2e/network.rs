//! A container's network: what CNI plugins, hooks and others put into its namespace
//! on the host is what it has, and the host's side is as under runc.

use std::{
    fs::File,
    io::{Read, Write},
    net::TcpListener,
    os::fd::AsRawFd,
    thread,
    time::Instant,
};

use anyhow::{Context, Result, anyhow, bail, ensure};
use nix::{
    sched::{CloneFlags, setns},
    sys::socket::{Shutdown, shutdown},
};
use rvm_tests::{
    bundle, case,
    cni::{ForCtr, Namespace, Network},
    ctr::{Ctr, Run, remove_clients_fifos},
    host,
    job::{Finished, Input},
    sandbox::Sandbox,
    scale,
    task::Shim,
    world::shell,
};
use serde_json::{Value, json};

fn exec(ctr: &Ctr, id: &str, script: &str) -> Result<String> {
    let job = ctr.exec(id, &[], &["sh", "-c", script], Input::Nothing)?;
    Ok(job.finish(scale::container())?.success()?.text())
}

fn says(refused: &Finished, text: &str) -> Result<()> {
    ensure!(refused.code() != 0 && refused.errors().contains(text), "not {text:?}: {refused}");
    Ok(())
}

/// The guest has let go of an interface a moment before the monitor has.
fn until_same(before: &str, now: impl Fn() -> Result<String>) -> Result<()> {
    let until = Instant::now() + scale::command();
    loop {
        let after = now()?;
        if after == before {
            return Ok(());
        }
        ensure!(Instant::now() < until, "{after} instead of {before}");
        thread::sleep(scale::seconds(0.01));
    }
}

/// A detached container in a network namespace that was prepared.
fn started(ctr: &Ctr, prefix: &str, namespace: &Namespace, script: &str) -> Result<Run> {
    let run = ctr.container(prefix).detached().with(&["--with-ns", &namespace.option()]);
    run.run(&["sh", "-c", script])?.success()?;
    Ok(run)
}

/// A chain as Kubernetes' and Docker's networks are made of, its results kept with the tests' files.
pub fn chain() -> Value {
    json!([
        {"type": "bridge", "bridge": "rvmbr0", "isGateway": true, "ipMasq": true, "hairpinMode": true, "mtu": 1400, "macspoofchk": true,
         "ipam": {"type": "host-local", "dataDir": "/run/rvm-tests/cni",
                  "ranges": [[{"subnet": "10.88.7.0/24"}], [{"subnet": "fd88:7::/64"}]],
                  "routes": [{"dst": "0.0.0.0/0"}, {"dst": "::/0"}]}},
        {"type": "portmap", "capabilities": {"portMappings": true}, "snat": true},
        {"type": "firewall"},
        {"type": "bandwidth", "ingressRate": RATE, "ingressBurst": BURST, "egressRate": RATE, "egressBurst": BURST},
        {"type": "tuning", "sysctl": {"net.core.somaxconn": "511"}}
    ])
}

/// Bits a second that a chain lets pass each way, and bits at once.
const RATE: u64 = 32_000_000;
const BURST: u64 = 800_000;
/// Bytes to be fetched, and seconds they take at least at that rate.
const LARGE: &str = "6000000";
const LARGE_TAKES: f64 = 1.3;

/// Sends with addresses that were not given to it, then with its own.
const SPOOF: &str = "
passes() { ping -c 1 -W 5 $2 10.88.7.1 > /dev/null 2>&1 && echo $1: passed || echo $1: dropped; }
mac=$(cat /sys/class/net/eth0/address)
ip link set eth0 address 02:00:00:00:00:66
passes 'another address of its link'
ip link set eth0 address $mac
ip address add 10.88.7.250/24 dev eth0
passes 'another address of its network' '-I 10.88.7.250'
ip address del 10.88.7.250/24 dev eth0
passes 'its own again'
";

/// Bytes and packets received and sent by `eth0`: as the container's statistics say, and as the host's
/// interface has counted.
fn counts(namespace: &Namespace, id: &str) -> Result<[[u64; 4]; 2]> {
    let told = Shim::of(id)?.networks()?;
    let told = told.get("eth0").with_context(|| format!("no eth0 in {told:?}"))?;
    let counted =
        namespace.run("cd /sys/class/net/eth0/statistics; cat rx_bytes rx_packets tx_bytes tx_packets")?;
    let counted: Vec<u64> = counted.lines().map(str::parse).collect::<Result<_, _>>()?;
    Ok([*told, counted.try_into().map_err(|counted| anyhow!("{counted:?}"))?])
}

/// What a chain leaves on a host with its last container gone.
pub const TIDY: &str = "rm -rf /run/rvm-tests/cni /run/xtables.lock";

/// A second network, of frames of 9000 bytes.
fn jumbo() -> Value {
    json!([{"type": "bridge", "bridge": "rvmbr9", "mtu": 9000,
            "ipam": {"type": "host-local", "dataDir": "/run/rvm-tests/cni",
                     "ranges": [[{"subnet": "10.89.7.0/24"}], [{"subnet": "fd89:7::/64"}]]}}])
}

/// One end of the networks: a namespace, what was mapped to it and the results of the plugins.
struct End {
    name: &'static str,
    namespace: Namespace,
    mapped: Value,
    added: Value,
    v4: String,
    v6: String,
    jumbo: Option<Value>,
}

impl End {
    fn new(name: &'static str, (chain, jumbo): (&Network, Option<&Network>), mapped: Value) -> Result<Self> {
        let namespace = Namespace::new(name)?;
        let added = chain.add(name, &namespace, "eth0", &mapped)?;
        let jumbo = jumbo.map(|network| network.add(name, &namespace, "net1", &json!({}))).transpose()?;
        let (v4, v6) = addresses(&added)?;
        Ok(Self { name, namespace, mapped, added, v4, v6, jumbo })
    }

    /// Starts a server in it that says its name.
    fn serve(&self, ctr: &Ctr) -> Result<Run> {
        let Self { name, namespace, .. } = self;
        let script = format!(
            "mkdir /srv && echo {name} > /srv/index.html && head -c {LARGE} /dev/zero > /srv/large && \
             exec httpd -f -p 80 -h /srv"
        );
        let may = ["--cap-add", "CAP_NET_ADMIN"];
        let run = ctr.container(name).detached().with(&["--with-ns", &namespace.option()]).with(&may);
        run.run(&["sh", "-c", &script])?.success()?;
        Ok(run)
    }

    /// What is seen of it on the host.
    fn seen(&self) -> Result<String> {
        self.namespace.run(
            "for link in lo eth0; do cd /sys/class/net/$link; cat address mtu flags ifindex iflink; done
             ip -o address show dev eth0; ip route; ip -6 route show dev eth0; ip rule; ip neighbour show nud permanent",
        )
    }

    fn delete(&self, chain: &Network, jumbo: &Network) -> Result<()> {
        let Self { name, namespace, mapped, added, .. } = self;
        if let Some(added) = &self.jumbo {
            jumbo.delete(name, namespace, "net1", (&json!({}), added))?;
        }
        chain.delete(name, namespace, "eth0", (mapped, added))
    }
}

/// The addresses a result tells of, without their prefixes.
fn addresses(result: &Value) -> Result<(String, String)> {
    let address = |n: usize| -> Result<String> {
        let text = result["ips"][n]["address"].as_str().with_context(|| format!("no address in {result}"))?;
        Ok(text.split('/').next().unwrap_or(text).to_owned())
    };
    Ok((address(0)?, address(1)?))
}

/// A second namespace plays the internet; nothing in it knows the way to a container.
struct Internet {
    namespace: Namespace,
    listener: TcpListener,
    server: Option<thread::JoinHandle<()>>,
}

impl Internet {
    /// One with a server that answers with where it was asked from.
    fn new() -> Result<Self> {
        let namespace = Namespace::new("rvm-internet")?;
        shell(
            "ip link add rvmnet0 type veth peer name eth0 netns rvm-internet; ip link set rvmnet0 up
             ip address add 198.51.100.1/24 dev rvmnet0; ip address add 2001:db8:51::1/64 dev rvmnet0 nodad",
        )?;
        namespace.run(
            "ip link set eth0 up; ip address add 198.51.100.2/24 dev eth0
             ip address add 2001:db8:51::2/64 dev eth0 nodad",
        )?;
        let inside = File::open(namespace.path())?;
        let listen = || {
            setns(inside, CloneFlags::CLONE_NEWNET)?;
            TcpListener::bind("[::]:80").context("listen in the internet")
        };
        let listener =
            thread::scope(|scope| scope.spawn(listen).join().map_err(|_| anyhow!("a panic")).flatten())?;
        let accepting = listener.try_clone()?;
        let server = thread::spawn(move || {
            while let Ok((mut client, peer)) = accepting.accept() {
                // Who goes away without an answer is told so by what it lacks.
                let asked = client.read(&mut [0; 4096]);
                let _ = asked.and_then(|_| writeln!(client, "{}", peer.ip().to_canonical()));
            }
        });
        Ok(Self { namespace, listener, server: Some(server) })
    }
}

impl Drop for Internet {
    fn drop(&mut self) {
        // Whoever accepts returns.
        let _ = shutdown(self.listener.as_raw_fd(), Shutdown::Both);
        if let Some(server) = self.server.take() {
            let _ = server.join();
        }
        let _ = shell("ip link delete rvmnet0");
    }
}

/// Asks a server, at port 80 or the one that is named, until there is one. (The static busybox's wget looks names of ports
/// up, and dies of that.)
fn ask(address: &str) -> String {
    let to = if address.contains(' ') { address.to_owned() } else { format!("{address} 80") };
    format!(
        "for n in $(seq 20); do
             said=$( (printf 'GET / HTTP/1.0\r\n\r\n'; sleep 0.5) | nc -w 5 {to} | tail -n 1)
             [ -n \"$said\" ] && echo \"$said\" && exit 0; sleep 0.5
         done; exit 1"
    )
}

fn curl(url: &str) -> String {
    format!("curl -sS --max-time 20 --retry 20 --retry-connrefused 'http://{url}'")
}

/// As Kubernetes and Docker connect containers: a bridge with ports of the host mapped,
/// a firewall, limits and masquerading; rvm beside runc.
#[test]
fn a_chain_of_plugins() {
    case(|world| {
        let ctr = world.ctr();
        let forwarding = "net.ipv4.ip_forward net.ipv6.conf.all.forwarding";
        let forwards = shell(&format!("sysctl -n {forwarding}"))?;
        let (chain, jumbo) = (Network::new("rvm-net", chain()), Network::new("rvm-jumbo", jumbo()));
        let internet = Internet::new()?;
        let mapping = json!({"portMappings": [{"hostPort": 8080, "containerPort": 80, "protocol": "tcp"}]});
        let ours = End::new("rvm-a", (&chain, Some(&jumbo)), mapping)?;
        let other = End::new("rvm-b", (&chain, Some(&jumbo)), json!({}))?;
        let runcs = End::new("rvm-runc", (&chain, None), json!({}))?;
        let before = ours.seen()?;

        let run = ours.serve(&ctr)?;
        let second = other.serve(&ctr)?;
        let runc = runcs.serve(&ctr.under("io.containerd.runc.v2"))?;
        // The same interface, addresses, routes and MTU as on the host, where they stay.
        chain.check("rvm-a", &ours.namespace, "eth0", (&ours.mapped, &ours.added))?;
        let after = ours.seen()?;
        ensure!(after == before, "the host's side was {before} and is {after}");
        let inside =
            exec(&ctr, &run.id, "ip address; ip route; ip -6 route; cat /proc/sys/net/core/somaxconn")?;
        println!("{inside}");
        for link in ["eth0", "net1"] {
            let mac = ours.namespace.run(&format!("cat /sys/class/net/{link}/address"))?;
            ensure!(inside.contains(mac.trim()), "no {mac} in {inside}");
        }
        let (v4, v6) = (&ours.v4, &ours.v6);
        for wanted in [
            "mtu 1400",
            "mtu 9000",
            &format!("inet {v4}/24"),
            &format!("inet6 {v6}/64"),
            "default via 10.88.7.1",
            "default via fd88:7::1",
            "\n511\n",
        ] {
            ensure!(inside.contains(wanted), "no {wanted:?} in {inside}");
        }
        ensure!(!inside.contains("tentative"), "{inside}");

        // Each reaches each, by both families.
        let on_host = |script: String| shell(&script);
        let in_internet = |script: String| internet.namespace.run(&script);
        let (in_rvm, in_runc) =
            (|to: &str| exec(&ctr, &run.id, &ask(to)), |to: &str| exec(&ctr, &runc.id, &ask(to)));
        for (what, wanted, said) in [
            ("host to container", "rvm-a", on_host(curl(v4))),
            ("the same by IPv6", "rvm-a", on_host(curl(&format!("[{v6}]")))),
            ("a mapped port, on loopback", "rvm-a", on_host(curl("127.0.0.1:8080"))),
            ("a mapped port, from outside", "rvm-a", in_internet(curl("198.51.100.1:8080"))),
            ("the same by IPv6", "rvm-a", in_internet(curl("[2001:db8:51::1]:8080"))),
            ("a mapped port, from a container", "rvm-a", in_runc("198.51.100.1 8080")),
            ("a mapped port, from the container itself", "rvm-a", in_rvm("198.51.100.1 8080")),
            ("rvm to runc", "rvm-runc", in_rvm(&runcs.v4)),
            ("the same by IPv6", "rvm-runc", in_rvm(&runcs.v6)),
            ("runc to rvm", "rvm-a", in_runc(v4)),
            ("the same by IPv6", "rvm-a", in_runc(v6)),
            ("rvm to rvm", "rvm-b", in_rvm(&other.v4)),
            ("the same by IPv6", "rvm-b", in_rvm(&other.v6)),
            // Nobody out there knows the container's address.
            ("masqueraded", "198.51.100.1", in_rvm("198.51.100.2")),
            ("the same by IPv6", "2001:db8:51::1", in_rvm("2001:db8:51::2")),
        ] {
            let said = said.with_context(|| what.to_owned())?;
            println!("{what}: {}", said.trim());
            ensure!(said.trim() == wanted, "{what}: {said:?}");
        }
        exec(&ctr, &run.id, "ping -c 1 -W 5 10.88.7.1 && ping -c 1 -W 5 fd88:7::1")?;
        // In one piece, from machine to machine.
        let far = addresses(other.jumbo.as_ref().context("no second network")?)?;
        exec(
            &ctr,
            &run.id,
            &format!("ping -c 1 -W 5 -s 8972 {} && ping -c 1 -W 5 -s 8952 {}", far.0, far.1),
        )?;

        let counted = counts(&ours.namespace, &run.id)?;
        // The limits hold in both directions.
        let seconds = shell(&format!("curl -sS -o /dev/null -w '%{{time_total}}' http://{v4}/large"))?;
        ensure!(seconds.trim().parse::<f64>()? > LARGE_TAKES, "from the container: {seconds} s");
        let fetch = format!(
            "start=$(cut -d ' ' -f 1 /proc/uptime); printf 'GET /large HTTP/1.0\r\n\r\n' | nc -w 20 {} 80 | wc -c
             echo $start; cut -d ' ' -f 1 /proc/uptime",
            runcs.v4
        );
        let fetched = exec(&ctr, &run.id, &fetch)?;
        println!("{LARGE} bytes from the container in {seconds} s, to it {}", fetched.replace('\n', " "));
        let numbers: Vec<f64> = fetched.lines().map(str::parse).collect::<Result<_, _>>()?;
        let [bytes, start, end] = numbers[..] else { bail!("{fetched}") };
        ensure!(bytes > LARGE.parse()? && end - start > LARGE_TAKES, "to the container: {fetched}");

        // What the statistics say has come and gone is what the host's interface has counted, but for what
        // neighbours ask one another meanwhile.
        let after = counts(&ours.namespace, &run.id)?;
        println!("before {counted:?}, after {after:?}");
        for n in 0..4 {
            let [told, counted] = [0, 1].map(|which| after[which][n] - counted[which][n]);
            let apart = if n % 2 == 0 { 1000 } else { 10 };
            ensure!(told.abs_diff(counted) <= apart, "{n}: told {told}, counted {counted}");
            ensure!(n % 2 == 1 || counted > 6_000_000, "{after:?}");
        }

        // What is not its own is treated alike by the same plugins.
        let (spoofs, runcs_spoofs) = (exec(&ctr, &run.id, SPOOF)?, exec(&ctr, &runc.id, SPOOF)?);
        println!("spoofed:\n{spoofs}");
        ensure!(spoofs == runcs_spoofs && spoofs.contains("of its link: dropped"), "{spoofs}{runcs_spoofs}");
        ensure!(spoofs.ends_with("its own again: passed\n"), "{spoofs}");

        for id in [&run.id, &second.id, &runc.id] {
            world.end(id)?;
        }
        host::remove_runcs_parent();
        for end in [&ours, &other, &runcs] {
            ensure!(end.namespace.left()?.is_empty(), "{}", end.namespace.left()?);
            end.delete(&chain, &jumbo)?;
        }
        let [v4, v6] = forwards.lines().collect::<Vec<_>>()[..] else { bail!("{forwards}") };
        shell(&format!(
            "ip link delete rvmbr0; ip link delete rvmbr9; {TIDY}
             sysctl -q net.ipv4.ip_forward={v4} net.ipv6.conf.all.forwarding={v6}"
        ))?;
        Ok(())
    });
}

#[test]
fn kinds_of_interfaces() {
    case(|world| {
        let ctr = world.ctr();
        let outside = Namespace::new("rvm-outside")?;
        shell(
            "ip link add rvmup0 mtu 9000 type veth peer name far netns rvm-outside; ip link set rvmup0 up
             ip link add rvmup1 type veth peer name far1 netns rvm-outside; ip link set rvmup1 up",
        )?;
        outside.run(
            "ip link set far mtu 9000 up; ip link set far1 up
             ip address add 10.77.1.1/24 dev far; ip address add 10.77.2.1/24 dev far1
             ip link add link far name far.5 type vlan id 5; ip link set far.5 up; ip address add 10.77.3.1/24 dev far.5",
        )?;
        let ours = Namespace::new("rvm-kinds")?;
        let ipam = |subnet: &str, first: &str| {
            json!({"type": "host-local", "dataDir": "/run/rvm-tests/cni",
                   "ranges": [[{"subnet": subnet, "rangeStart": first}]]})
        };
        for (interface, plugin) in [
            (
                "eth0",
                json!({"type": "ptp", "mtu": 1400, "ipMasq": false, "ipam": ipam("10.77.0.0/24", "10.77.0.9")}),
            ),
            (
                "net1",
                json!({"type": "macvlan", "master": "rvmup0", "mtu": 9000, "ipam": ipam("10.77.1.0/24", "10.77.1.9")}),
            ),
            (
                "net2",
                json!({"type": "ipvlan", "master": "rvmup1", "ipam": ipam("10.77.2.0/24", "10.77.2.9")}),
            ),
            (
                "net3",
                json!({"type": "vlan", "master": "rvmup0", "vlanId": 5, "ipam": ipam("10.77.3.0/24", "10.77.3.9")}),
            ),
        ] {
            Network::new(interface, json!([plugin]))
                .add("kinds", &ours, interface, &json!({}))
                .with_context(|| interface.to_owned())?;
        }
        let run = started(&ctr, "kinds", &ours, "exec sleep 1000000")?;
        let inside = exec(&ctr, &run.id, "ip address")?;
        println!("{inside}");
        for interface in ["eth0", "net1", "net2", "net3"] {
            let mac = ours.run(&format!("cat /sys/class/net/{interface}/address"))?;
            ensure!(
                inside.contains(&format!("{interface}: ")) && inside.contains(mac.trim()),
                "{interface}: {inside}"
            );
        }
        ensure!(inside.contains("mtu 1400") && inside.contains("mtu 9000"), "{inside}");
        // The gateway that ptp makes of the host's end, then the others' far ends.
        let gateway = exec(
            &ctr,
            &run.id,
            "ip route | sed -n 's/^10.77.0.0.*via \\([0-9.]*\\).*/\\1/p; s/^\\(10.77.0.1\\) .*/\\1/p' | head -n 1",
        )?;
        for address in [
            if gateway.trim().is_empty() { "10.77.0.1" } else { gateway.trim() },
            "10.77.1.1",
            "10.77.2.1",
            "10.77.3.1",
        ] {
            exec(&ctr, &run.id, &format!("ping -c 1 -W 5 {address}"))
                .with_context(|| format!("{address} of {inside}"))?;
        }
        // In one piece where the MTU is that large.
        exec(&ctr, &run.id, "ping -c 1 -W 5 -s 8900 10.77.1.1")?;
        ensure!(
            outside.run("ping -c 1 -W 5 -M do -s 8972 10.77.1.9")?.contains("1 received"),
            "no large frames"
        );
        world.end(&run.id)?;
        ensure!(ours.left()?.is_empty(), "{}", ours.left()?);
        drop(ours);
        shell("ip link delete rvmup0; ip link delete rvmup1; rm -r /run/rvm-tests/cni")?;
        Ok(())
    });
}

/// Docker's order: a new namespace, into which a hook puts an interface; others
/// come and go while the container runs.
#[test]
fn interfaces_come_and_go() {
    case(|world| {
        let ctr = world.ctr();
        shell(
            "ip link add rvmbr1 type bridge; ip link set rvmbr1 up; ip address add 10.66.0.1/16 dev rvmbr1",
        )?;
        let plug = |name: &str, address: &str| {
            format!(
                "ip link add rvm-{name} type veth peer name {name} netns $pid
                 ip link set rvm-{name} master rvmbr1 up
                 nsenter -t $pid -n sh -ec 'ip link set {name} up; ip address add {address}/16 dev {name}'"
            )
        };
        let hook = format!(
            "pid=$(sed 's/.*\"pid\": *\\([0-9]*\\).*/\\1/')\n{}\nnsenter -t $pid -n ip route add default via 10.66.0.1",
            plug("eth0", "10.66.0.2")
        );
        let mut spec = bundle::spec(&world.rootfs()?, &["/bin/sleep", "1000000"]);
        spec["hooks"] = json!({"createRuntime": [{"path": "/bin/sh", "args": ["sh", "-ec", hook],
                               "env": ["PATH=/usr/sbin:/usr/bin:/sbin:/bin"]}]});
        spec["process"]["capabilities"] =
            json!({"bounding": ["CAP_NET_RAW"], "effective": ["CAP_NET_RAW"], "permitted": ["CAP_NET_RAW"]});
        let path = world.write_file("network.json", spec.to_string())?;
        let run = ctr.container("hook").detached().with(&["--config", &path]);
        let finished = run.run(&[]);
        std::fs::remove_file(path)?;
        finished?.success()?;
        let inside = exec(&ctr, &run.id, "ip address show dev eth0; ip route")?;
        ensure!(inside.contains("10.66.0.2/16") && inside.contains("default via 10.66.0.1"), "{inside}");
        shell("ping -c 1 -W 5 10.66.0.2")?;

        let holder = ctr.list(&["task", "ls"]);
        let pid = holder
            .iter()
            .find(|line| line.starts_with(&run.id))
            .and_then(|line| line.split_whitespace().nth(1));
        let pid = pid.context("no task")?.to_owned();
        let until = |script: &str| {
            exec(
                &ctr,
                &run.id,
                &format!("for n in $(seq 100); do {script} && exit 0; sleep 0.2; done; ip address; exit 1"),
            )
        };
        shell(&format!("pid={pid}\n{}", plug("eth1", "10.66.0.3")))?;
        until("ip address show dev eth1 2>/dev/null | grep -q 10.66.0.3")?;
        shell("ping -c 1 -W 5 10.66.0.3")?;
        shell(&format!("nsenter -t {pid} -n ip address add 10.66.0.4/16 dev eth0"))?;
        until("ip address show dev eth0 | grep -q 10.66.0.4")?;
        shell("ip link delete rvm-eth1")?;
        until("! ip link show dev eth1 2>/dev/null")?;
        shell("ping -c 1 -W 5 10.66.0.4")?;

        // Twenty more that come and go leave nothing with the monitor, the shim, the namespace or the guest.
        let sandbox = Sandbox::find(world.stage(), &run.id)?;
        let held = || -> Result<String> {
            let (shim, monitor) = (sandbox.shim.pid, sandbox.monitor.pid);
            let there = shell(&format!(
                "ls /proc/{shim}/fd /proc/{monitor}/task | wc -l
                 # Each file of the share that the guest knows is one more.
                 ls -l /proc/{monitor}/fd | grep -vc /share/
                 nsenter -t {pid} -n sh -ec 'ip -o link | wc -l; ip route show table all | wc -l; ip rule | wc -l'"
            ))?;
            let inside =
                "ls /sys/bus/pci/devices | wc -l; ip -o link | wc -l; ip route show table all | wc -l";
            Ok(there + &exec(&ctr, &run.id, inside)?)
        };
        let before = held()?;
        for _ in 0..20 {
            shell(&format!("pid={pid}\n{}", plug("eth1", "10.66.0.5")))?;
            until("ip address show dev eth1 2>/dev/null | grep -q 10.66.0.5")?;
            shell("ip link delete rvm-eth1")?;
            until("! ip link show dev eth1 2>/dev/null")?;
        }
        until_same(&before, held)?;
        world.end(&run.id)?;
        shell("ip link delete rvmbr1; ip link delete rvm-eth0 2>/dev/null || true")?;
        Ok(())
    });
}

#[test]
fn what_cannot_be_and_what_dies_leaves_nothing() {
    case(|world| {
        let ctr = world.ctr();
        let ours = Namespace::new("rvm-refused")?;
        let refused = |option: &str| -> Result<Finished> {
            let run = ctr.container("refused").with(&["--with-ns", option]);
            let finished = run.run(&["true"])?;
            remove_clients_fifos(&run.id)?;
            Ok(finished)
        };
        says(&refused("network:/proc/1/ns/net")?, "is the host's network")?;
        says(&refused("network:/nonexistent")?, "/nonexistent")?;
        ours.run("ip tuntap add dev vpn0 mode tun; ip link set vpn0 up")?;
        says(&refused(&ours.option())?, "interface \"vpn0\" of the network namespace")?;
        ours.run("ip link delete vpn0; ip link add br0 type bridge; ip link set br0 up; ip address add 10.55.0.1/24 dev br0")?;

        let run = started(&ctr, "first", &ours, "exec sleep 1000000")?;
        ensure!(exec(&ctr, &run.id, "ip address show dev br0")?.contains("10.55.0.1/24"), "no br0");
        says(&refused(&ours.option())?, "another sandbox's already")?;
        // Its shim is killed: containerd's `delete` takes off what it left.
        let sandbox = Sandbox::find(world.stage(), &run.id)?;
        shell(&format!("kill -9 {}", sandbox.shim.pid))?;
        world.events(|events| events.wait_for("/tasks/exit", &run.id, scale::container()))?;
        let until = Instant::now() + scale::container();
        while !ours.left()?.is_empty() {
            ensure!(Instant::now() < until, "left: {}", ours.left()?);
            thread::sleep(scale::seconds(0.01));
        }
        ctr.run(&["containers", "rm", &run.id], scale::command())?.success()?;
        remove_clients_fifos(&run.id)?;
        // The namespace is as good as new.
        let again = started(&ctr, "again", &ours, "exec sleep 1000000")?;
        world.end(&again.id)?;
        ensure!(ours.left()?.is_empty(), "{}", ours.left()?);
        Ok(())
    });
}

/// What `ctr run --cni` does: the task is created, plugins put an interface into
/// `/proc/PID/ns/net`, the task is started.
#[test]
fn plugins_between_creation_and_start() {
    case(|world| {
        let network = ForCtr::new(&chain())?;
        let finished = world.ctr().container("cni").with(&["--cni"]).shell(
            "ip address show dev eth0; ip route; ping -c 1 -W 5 10.88.7.1; ping -c 1 -W 5 fd88:7::1",
        )?;
        drop(network);
        shell(&format!("ip link delete rvmbr0; {TIDY}"))?;
        let inside = finished.success()?.text();
        println!("{inside}");
        ensure!(inside.contains("inet 10.88.7.") && inside.contains("default via 10.88.7.1"), "{inside}");
        ensure!(inside.matches(" 0% packet loss").count() == 2, "{inside}");
        Ok(())
    });
}
