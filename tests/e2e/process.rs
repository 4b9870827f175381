//! What a container's processes are: users, namespaces, privileges, filters,
//! priorities, and the hooks that run beside them.
//!
//! Bundles of our own: `ctr` knows few of these fields, and drops what it does
//! not know.

use anyhow::{Context, Result, ensure};
use rvm_tests::{
    bundle::Bundle,
    case,
    ctr::Run,
    job::{Finished, Input},
    scale,
    world::{World, shell},
};
use serde_json::{Value, json};

/// Where a container's users begin on the outside.
const FIRST: u32 = 100_000;

/// What `ctr` writes, for a shell script in a bundle.
fn script_spec(world: &World, bundle: &Bundle, script: &str) -> Result<Value> {
    let spec = world.ctr().run(&["oci", "spec"], scale::command())?.success()?;
    let mut spec: Value = serde_json::from_slice(&spec.stdout)?;
    spec["root"] = json!({"path": bundle.rootfs(), "readonly": false});
    spec["process"]["env"] = json!(["PATH=/bin:/usr/bin:/sbin:/usr/sbin"]);
    spec["process"]["args"] = json!(["sh", "-c", script]);
    Ok(spec)
}

fn run(world: &World, bundle: &Bundle, spec: &Value) -> Result<Finished> {
    bundle.run(world, spec.to_string().as_bytes())
}

fn add_namespace(spec: &mut Value, kind: &str) -> Result<()> {
    let namespaces = spec["linux"]["namespaces"].as_array_mut().context("no namespaces")?;
    namespaces.push(json!({"type": kind}));
    Ok(())
}

fn in_user_namespace(spec: &mut Value) -> Result<()> {
    add_namespace(spec, "user")?;
    let mappings = json!([{"containerID": 0, "hostID": FIRST, "size": 65536}]);
    spec["linux"]["uidMappings"] = mappings.clone();
    spec["linux"]["gidMappings"] = mappings;
    Ok(())
}

#[test]
fn user_namespace() {
    case(|world| {
        let bundle = Bundle::new(world)?.owned_by(FIRST)?;
        let script = "tr -s ' ' < /proc/self/uid_map; id -u; id -G; hostname; echo $$; \
                      touch /etc/mine && stat -c '%u %a' /etc/mine /etc /dev /dev/pts /dev/null; \
                      head -c 3 /dev/zero | wc -c; echo gone > /dev/null; echo again > /dev/stdout; \
                      ulimit -Hn; cat /proc/self/oom_score_adj; cat /proc/sys/net/ipv4/ip_unprivileged_port_start; \
                      for m in proc sys dev/mqueue sys/fs/cgroup; do grep -q \" /$m \" /proc/self/mounts && echo $m; done; \
                      mount -t tmpfs none /mnt 2>/dev/null || echo no mount; \
                      mknod /dev/kmem c 1 2 2>/dev/null || echo no node; \
                      chown 70000 /etc/mine 2>/dev/null || echo no such user";
        let mut spec = script_spec(world, &bundle, script)?;
        in_user_namespace(&mut spec)?;
        spec["hostname"] = "mapped".into();
        let cgroup = json!({
            "destination": "/sys/fs/cgroup", "type": "cgroup", "source": "cgroup", "options": ["nosuid", "noexec", "nodev", "ro"]
        });
        spec["mounts"].as_array_mut().context("no mounts")?.push(cgroup);
        spec["process"]["user"] = json!({"uid": 0, "gid": 0, "additionalGids": [7]});
        spec["process"]["oomScoreAdj"] = (-77).into();
        spec["process"]["rlimits"] = json!([{"type": "RLIMIT_NOFILE", "soft": 1000, "hard": 1_000_000}]);
        spec["linux"]["sysctl"] = json!({"net.ipv4.ip_unprivileged_port_start": "80"});
        let finished = run(world, &bundle, &spec)?.success()?;
        let expected = " 0 100000 65536\n0\n0 7\nmapped\n1\n0 644\n0 755\n0 755\n0 755\n65534 666\n\
                        3\nagain\n1000000\n-77\n80\nproc\nsys\ndev/mqueue\nsys/fs/cgroup\n\
                        no mount\nno node\nno such user\n";
        ensure!(finished.text() == expected, "{finished}");
        let outside =
            shell(&format!("stat -c %u {}/etc/mine || echo not on the host", bundle.rootfs().display()))?;
        println!("on the host: {outside}");

        // Who is not mapped cannot be.
        spec["process"]["user"]["uid"] = 70_000.into();
        let refused = run(world, &bundle, &spec)?;
        ensure!(refused.code() != 0, "{refused}");
        if world.stage().is_rvm() {
            ensure!(refused.errors().contains("process.user.uid"), "{refused}");
        }
        Ok(())
    });
}

/// What is put into its network namespace is its own there: it may change it, and serve at any port.
#[test]
fn the_network_of_a_user_namespace() {
    case(|world| {
        let bundle = Bundle::new(world)?.owned_by(FIRST)?;
        let script = "ip -o address show dev eth0 | grep -o 10.67.0.2/16; ping -c 1 -W 5 10.67.0.1 > /dev/null && echo reached; \
                      ip link set eth0 mtu 1400 && cat /sys/class/net/eth0/mtu; \
                      ip address add 10.67.0.3/16 dev eth0 && ping -c 1 -W 5 -I 10.67.0.3 10.67.0.1 > /dev/null && echo its own; \
                      httpd -p 80 -h / && echo served";
        let mut spec = script_spec(world, &bundle, script)?;
        in_user_namespace(&mut spec)?;
        let may = json!(["CAP_NET_ADMIN", "CAP_NET_BIND_SERVICE", "CAP_NET_RAW", "CAP_SETGID", "CAP_SETUID"]);
        spec["process"]["capabilities"] = json!({"bounding": may, "effective": may, "permitted": may});
        let hook = "pid=$(sed 's/.*\"pid\": *\\([0-9]*\\).*/\\1/')
            ip link add rvm-user0 type veth peer name eth0 netns $pid; ip link set rvm-user0 up
            ip address add 10.67.0.1/16 dev rvm-user0
            nsenter -t $pid -n sh -ec 'ip link set eth0 up; ip address add 10.67.0.2/16 dev eth0'";
        spec["hooks"] = json!({"createRuntime": [{"path": "/bin/sh", "args": ["sh", "-ec", hook],
                               "env": ["PATH=/usr/sbin:/usr/bin:/sbin:/bin"]}]});
        let path = world.write_file("network.json", spec.to_string())?;
        let finished = world.ctr().container("userns").with(&["--config", &path]).run(&[])?.success()?;
        std::fs::remove_file(path)?;
        ensure!(finished.text() == "10.67.0.2/16\nreached\n1400\nits own\nserved\n", "{finished}");
        shell("ip link delete rvm-user0 2> /dev/null || true").map(drop)
    });
}

#[test]
fn exec_and_terminal_in_a_user_namespace() {
    case(|world| {
        let bundle = Bundle::new(world)?.owned_by(FIRST)?;
        let mut spec = script_spec(world, &bundle, "sleep 100000")?;
        in_user_namespace(&mut spec)?;
        let path = world.write_file("userns.json", spec.to_string())?;
        let ctr = world.ctr();
        let run: Run = ctr.container("userns").with(&["--config", &path]).detached();
        run.run(&[])?.success()?;
        let script = "id -u; tr -s ' ' < /proc/self/uid_map; echo hi > /dev/stdout; \
                      for n in user pid mnt net; do test $(readlink /proc/1/ns/$n) = $(readlink /proc/self/ns/$n) && echo $n; done";
        let exec = ctr.exec(&run.id, &[], &["sh", "-c", script], Input::Nothing)?;
        let finished = exec.finish(scale::container())?.success()?;
        ensure!(finished.text() == "0\n 0 100000 65536\nhi\nuser\npid\nmnt\nnet\n", "{finished}");
        let script = "stat -c %u $(tty); id -u";
        let exec =
            ctr.exec(&run.id, &["--tty", "--user", "33"], &["sh", "-c", script], Input::Terminal(80, 24))?;
        let finished = exec.finish(scale::container())?.success()?;
        let text = finished.text();
        let words: Vec<&str> = text.split_whitespace().collect();
        ensure!(words == ["33", "33"], "{finished}");
        world.end(&run.id)?;
        std::fs::remove_file(path)?;
        Ok(())
    });
}

/// What the installed runc is too old for, all in one container.
#[test]
fn attributes() {
    case(|world| {
        let bundle = Bundle::new(world)?;
        let script = "uname -m; umask; cat /proc/self/oom_score_adj; ulimit -Sn; ulimit -Hn; touch /made; stat -c %a /made; \
                      awk '{print $19, $41}' /proc/self/stat; ionice -p $$; cat /proc/sys/kernel/domainname; \
                      cut -d. -f1 /proc/uptime; readlink /proc/self/ns/time";
        let mut spec = script_spec(world, &bundle, script)?;
        spec["process"]["user"] = json!({"uid": 0, "gid": 0, "umask": 0o027});
        spec["process"]["oomScoreAdj"] = (-500).into();
        spec["process"]["rlimits"] = json!([{"type": "RLIMIT_NOFILE", "soft": 2000, "hard": 1_000_000}]);
        spec["linux"]["personality"] = json!({"domain": "LINUX32"});
        let since_1_1 = world.stage().is_rvm();
        if since_1_1 {
            spec["process"]["ioPriority"] = json!({"class": "IOPRIO_CLASS_RT", "priority": 3});
            spec["process"]["scheduler"] = json!({"policy": "SCHED_FIFO", "priority": 7});
            spec["domainname"] = "example".into();
            add_namespace(&mut spec, "time")?;
            spec["linux"]["timeOffsets"] = json!({"boottime": {"secs": 1_000_000_000, "nanosecs": 5}});
        }
        let finished = run(world, &bundle, &spec)?.success()?;
        let text = finished.text();
        let lines: Vec<&str> = text.lines().collect();
        ensure!(lines[..6] == ["i686", "0027", "-500", "2000", "1000000", "640"], "{finished}");
        if since_1_1 {
            ensure!(lines[6..9] == ["0 1", "realtime: prio 3", "example"], "{finished}");
            ensure!(lines[9].parse::<u64>()? >= 1_000_000_000, "{finished}");
            // include/linux/proc_ns.h: the guest's own.
            ensure!(lines[10] != "time:[4026531834]", "{finished}");
        }
        Ok(())
    });
}

#[test]
fn seccomp() {
    case(|world| {
        let bundle = Bundle::new(world)?;
        let script = "mkdir /x; chmod 700 /etc 2>/dev/null; echo $?; grep -E '^(Seccomp|NoNewPrivs):' /proc/self/status";
        for no_new_privileges in [true, false] {
            let mut spec = script_spec(world, &bundle, script)?;
            spec["process"]["noNewPrivileges"] = no_new_privileges.into();
            spec["linux"]["seccomp"] = json!({
                "defaultAction": "SCMP_ACT_ALLOW",
                "architectures": ["SCMP_ARCH_X86_64", "SCMP_ARCH_X86"],
                "syscalls": [
                    {"names": ["mkdir", "mkdirat"], "action": "SCMP_ACT_ERRNO", "errnoRet": libc::ENOMEDIUM},
                    // Mode 0700 alone.
                    {
                        "names": ["chmod"],
                        "action": "SCMP_ACT_ERRNO",
                        "args": [{"index": 1, "value": 0o700, "op": "SCMP_CMP_EQ"}]
                    }
                ]
            });
            let finished = run(world, &bundle, &spec)?.success()?;
            let expected = format!("1\nNoNewPrivs:\t{}\nSeccomp:\t2\n", u8::from(no_new_privileges));
            ensure!(finished.text() == expected, "{finished}");
            ensure!(finished.errors().contains("No medium found"), "{finished}");
        }
        Ok(())
    });
}

/// Where rvm resolves a hook's path in the container, runc does on the host.
#[test]
fn hooks_in_the_container() {
    case(|world| {
        if !world.stage().is_rvm() {
            return Ok(());
        }
        let bundle = Bundle::new(world)?;
        let hook = |script: &str, timeout| json!({"path": "/bin/sh", "args": ["sh", "-c", script], "env": ["PATH=/bin"], "timeout": timeout});
        let mut spec = script_spec(world, &bundle, "cat /create; echo; cat /tmp/start; echo; cat /order")?;
        spec["annotations"] = json!({"colour": "dark \"blue\""});
        spec["hooks"] = json!({
            "createContainer": [hook("cat > /create; echo create > /order; chmod 666 /order", 20)],
            "startContainer": [hook("cat > /tmp/start; echo start >> /order", 20)],
        });
        let finished = run(world, &bundle, &spec)?.success()?;
        let text = finished.text();
        let lines: Vec<&str> = text.lines().collect();
        ensure!(lines[2..] == ["create", "start"], "{finished}");
        for (line, status) in [(lines[0], "creating"), (lines[1], "created")] {
            let state: Value = serde_json::from_str(line)?;
            ensure!(state["status"] == status && state["pid"] == 1, "{state}");
            ensure!(state["bundle"] == bundle.dir().to_string_lossy().as_ref(), "{state}");
            ensure!(state["annotations"]["colour"] == "dark \"blue\"", "{state}");
        }

        for (kind, script, timeout, words) in [
            ("createContainer", "echo no luck >&2; exit 9", 20, "exit status 9: no luck"),
            ("createContainer", "sleep 1000", 1, "timed out after 1 s"),
            ("startContainer", "exit 3", 20, "exit status 3"),
        ] {
            spec["hooks"] = json!({kind: [hook(script, timeout)]});
            let failed = run(world, &bundle, &spec)?;
            ensure!(failed.code() != 0 && failed.errors().contains(words), "{failed}");
            ensure!(failed.errors().contains(kind), "{failed}");
        }
        Ok(())
    });
}

#[test]
fn pids_agree_and_many_execs_end() {
    case(|world| {
        let ctr = world.ctr();
        let run = ctr.container("pids").detached();
        run.run(&["sleep", "100000"])?.success()?;
        let job = ctr.exec(&run.id, &[], &["sh", "-c", "echo ready; sleep 100000"], Input::Nothing)?;
        job.wait_for("ready", scale::container())?;
        let listed = ctr.run(&["task", "ps", &run.id], scale::command())?.success()?;
        println!("{}", listed.text());
        world.events(|events| {
            let of = events.of(&run.id)?;
            let pid = |topic| of.iter().find(|event| event.topic == topic).map(|event| event.number("pid"));
            for topic in ["/tasks/start", "/tasks/exec-started"] {
                let pid = pid(topic).with_context(|| format!("no {topic}"))?.to_string();
                let listed = listed.text();
                let mut pids = listed.lines().filter_map(|line| line.split_whitespace().next());
                ensure!(pids.any(|listed| listed == pid), "{topic} says {pid}: {listed}");
            }
            Ok(())
        })?;
        for n in 0..30 {
            let exec = ctr.exec(&run.id, &[], &["sh", "-c", &format!("exit {n}")], Input::Nothing)?;
            exec.finish(scale::container())?.exited(n)?;
        }
        let after = ctr.run(&["task", "ps", &run.id], scale::command())?.success()?;
        ensure!(after.text().lines().count() == listed.text().lines().count(), "{after}");
        // The end of the first process is that of the one that was added, too.
        ctr.run(&["task", "kill", "-s", "SIGKILL", &run.id], scale::command())?.success()?;
        job.finish(scale::container())?.exited(137)?;
        world.events(|events| events.wait_for("/tasks/exit", &run.id, scale::container()))?;
        ctr.remove(&run.id)
    });
}
