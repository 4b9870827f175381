//! A container's network: what CNI plugins, hooks and others put into its namespace
//! on the host is what it has, and the host's side is as under runc.

use anyhow::{Context, Result, ensure};
use rvm_tests::{
    bundle, case,
    cni::{Namespace, Network},
    ctr::{Ctr, Run, remove_clients_fifos},
    job::{Finished, Input},
    sandbox::Sandbox,
    scale,
    world::shell,
};
use serde_json::json;

fn exec(ctr: &Ctr, id: &str, script: &str) -> Result<String> {
    let job = ctr.exec(id, &[], &["sh", "-c", script], Input::Nothing)?;
    Ok(job.finish(scale::container())?.success()?.text())
}

fn says(refused: &Finished, text: &str) -> Result<()> {
    ensure!(refused.code() != 0 && refused.errors().contains(text), "not {text:?}: {refused}");
    Ok(())
}

/// A detached container in a network namespace that was prepared.
fn started(ctr: &Ctr, prefix: &str, namespace: &Namespace, script: &str) -> Result<Run> {
    let run = ctr.container(prefix).detached().with(&["--with-ns", &namespace.option()]);
    run.run(&["sh", "-c", script])?.success()?;
    Ok(run)
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
        let until = std::time::Instant::now() + scale::container();
        while !ours.left()?.is_empty() {
            ensure!(std::time::Instant::now() < until, "left: {}", ours.left()?);
            std::thread::sleep(scale::seconds(0.01));
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
        // Where ctr looks, in this mount namespace alone.
        let (plugins, configuration) = ("/opt/cni/bin", "/etc/cni/net.d");
        shell(&format!(
            "mkdir -p {plugins} {configuration} /run/rvm-tests/net.d
             mount --bind /usr/lib/cni {plugins}; mount --bind /run/rvm-tests/net.d {configuration}"
        ))?;
        let bridge = json!({"type": "bridge", "bridge": "rvmbr2", "isGateway": true,
            "ipam": {"type": "host-local", "dataDir": "/run/rvm-tests/cni",
                     "ranges": [[{"subnet": "10.44.0.0/24"}]], "routes": [{"dst": "0.0.0.0/0"}]}});
        let list = json!({"cniVersion": "0.4.0", "name": "rvm", "plugins": [bridge]});
        std::fs::write("/run/rvm-tests/net.d/10-rvm.conflist", list.to_string())?;
        let finished = world
            .ctr()
            .container("cni")
            .with(&["--cni"])
            .shell("ip address show dev eth0; ip route; ping -c 1 -W 5 10.44.0.1")?;
        shell(&format!(
            "umount {plugins} {configuration}
             ip link delete rvmbr2; rm -rf /run/rvm-tests/net.d /run/rvm-tests/cni /run/xtables.lock"
        ))?;
        let inside = finished.success()?.text();
        println!("{inside}");
        ensure!(inside.contains("inet 10.44.0.") && inside.contains("default via 10.44.0.1"), "{inside}");
        Ok(())
    });
}
