//! What containers of one sandbox share, and what they must not see of how they
//! are made.

use std::time::Duration;

use protobuf::MessageField;
use rvm_agent::error::Error;
use rvm_protocol::agent::{
    CreateContainerRequest, FileOwner, MemoryVolume, Mount, Namespace, NamespaceType, Process,
};

use crate::{
    cases::signal,
    fixture::{Machine, Running, SYSCTL, container, namespace, program, read_until, shell},
};

const CAP_SYS_PTRACE: u32 = 19;
const SHARED: [NamespaceType; 3] = [NamespaceType::NETWORK, NamespaceType::IPC, NamespaceType::UTS];

/// A container that joins these namespaces of the sandbox, and its `/dev/shm`.
fn member(id: &str, process: Process, joined: &[NamespaceType]) -> CreateContainerRequest {
    let mut request = container(id, process);
    request.hostname.clear();
    for namespace in &mut request.namespaces {
        namespace.sandbox = joined.iter().any(|kind| namespace.type_ == (*kind).into());
    }
    let shm = request.mounts.iter_mut().find(|mount| mount.destination == "/dev/shm").unwrap();
    *shm = Mount {
        destination: "/dev/shm".into(),
        type_: "bind".into(),
        source: "shm".into(),
        options: ["rbind", "nosuid", "noexec", "nodev"].map(str::to_owned).into(),
        from_sandbox: true,
        ..Default::default()
    };
    request
}

async fn end(machine: &Machine, id: &str, running: Running) {
    machine.sandbox.signal_process(&signal(id, libc::SIGKILL, false)).unwrap();
    running.wait().await;
    running.delete().await.unwrap();
}

async fn exec(machine: &Machine, container: &str, script: &str) -> String {
    let mut added = machine.create_exec(container, "look", shell(script)).unwrap();
    added.start().await.unwrap();
    let output = added.finish().await;
    added.delete().await.unwrap();
    format!("{}{}", output.stdout, output.stderr)
}

pub async fn namespaces_of_the_sandbox(machine: &Machine) {
    const LOOK: &str = "for n in net ipc uts; do readlink /proc/self/ns/$n; done";
    let own = exec_namespaces();
    let one = machine.create(member("one", program(&["sleep", "1000"]), &SHARED)).await.unwrap();
    one.start().await.unwrap();
    let two = machine.create(member("two", program(&["sleep", "1000"]), &SHARED)).await.unwrap();
    two.start().await.unwrap();
    let (first, second) = (exec(machine, "one", LOOK).await, exec(machine, "two", LOOK).await);
    assert_eq!(first, second);
    assert!(first.lines().all(|line| !own.contains(&line.to_owned())), "not the guest's: {first} {own:?}");

    // The name, the loopback interface and what lies in /dev/shm are the same.
    let host = nix::unistd::gethostname().unwrap().into_string().unwrap();
    assert_eq!(exec(machine, "one", "hostname").await.trim(), host);
    assert_eq!(exec(machine, "one", "cat /sys/class/net/lo/flags").await.trim(), "0x9");
    assert_eq!(exec(machine, "one", "echo hello > /dev/shm/x; stat -f -c %b /dev/shm").await.trim(), "16384");
    assert_eq!(exec(machine, "two", "cat /dev/shm/x; grep -c ' /dev/shm ' /proc/mounts").await, "hello\n1\n");
    for (name, value) in SYSCTL {
        let file = format!("/proc/sys/{}", name.replace('.', "/"));
        assert_eq!(exec(machine, "two", &format!("cat {file}")).await.trim(), value, "{name}");
        assert_ne!(std::fs::read_to_string(file).unwrap().trim(), value, "{name} of the guest");
    }
    end(machine, "one", one).await;
    assert_eq!(exec(machine, "two", "cat /dev/shm/x; rm /dev/shm/x").await, "hello\n", "it is the sandbox's");

    // Who does not ask for it has its own.
    let own_shm = machine.run("alone", &format!("{LOOK}; ls /dev/shm")).await;
    assert!(own_shm.stdout.lines().all(|line| !second.contains(line)), "{own_shm:?}");
    end(machine, "two", two).await;
}

pub async fn memory_volumes_of_the_sandbox(machine: &Machine) {
    let volume = |path: &str, options: &[&str]| Mount {
        destination: "/volume".into(),
        type_: "bind".into(),
        source: "0-77".into(),
        options: [&["rbind"], options].concat().into_iter().map(str::to_owned).collect(),
        from_sandbox: true,
        memory: MessageField::some(MemoryVolume {
            bytes: 1 << 20,
            top: MessageField::some(FileOwner { mode: 0o2770, uid: 7, gid: 8, ..Default::default() }),
            path: path.into(),
            owner: MessageField::some(FileOwner { mode: 0o711, uid: 9, gid: 10, ..Default::default() }),
            ..Default::default()
        }),
        ..Default::default()
    };
    let with = |id: &str, mount: Mount| {
        let mut request = container(id, program(&["sleep", "1000"]));
        request.mounts.push(mount);
        request
    };
    let one = machine.create(with("one", volume("", &["nosuid"]))).await.unwrap();
    one.start().await.unwrap();
    let look = "stat -c '%a %u %g' /volume; stat -f -c '%T %b' /volume; grep ' /volume ' /proc/mounts | grep -c nosuid";
    assert_eq!(exec(machine, "one", look).await, "2770 7 8\ntmpfs 256\n1\n");
    exec(machine, "one", "echo hello > /volume/file; mkdir /volume/sub; ln -s /../../etc /volume/out").await;
    let two = machine.create(with("two", volume("sub", &["ro"]))).await.unwrap();
    two.start().await.unwrap();
    exec(machine, "one", "echo below > /volume/sub/file").await;
    let look = "cat /volume/file; echo no 2>/dev/null > /volume/new || echo read-only";
    assert_eq!(exec(machine, "two", look).await, "below\nread-only\n");
    end(machine, "two", two).await;
    // What is missing is made, with its owner, and no link leads out.
    let three = machine.create(with("three", volume("out/made", &[]))).await.unwrap();
    three.start().await.unwrap();
    assert_eq!(exec(machine, "three", "stat -c '%a %u %g' /volume").await, "711 9 10\n");
    assert_eq!(exec(machine, "one", "ls /volume/etc").await, "made\n");
    end(machine, "three", three).await;
    end(machine, "one", one).await;
    let again = machine.create(with("again", volume("", &[]))).await.unwrap();
    again.start().await.unwrap();
    assert_eq!(exec(machine, "again", "cat /volume/file").await, "hello\n", "it is the sandbox's");
    end(machine, "again", again).await;
    for (source, path, expected) in [
        ("../x", "", "source: \"../x\" must consist of"),
        ("x", "../etc", "memory.path: \"../etc\" must not contain \"..\""),
        ("x", "/etc", "memory.path: \"/etc\" must be a relative path"),
    ] {
        let mount = Mount { source: source.into(), ..volume(path, &[]) };
        let error = machine.create(with("x", mount)).await.err().unwrap().to_string();
        assert!(error.contains(expected), "{error}");
    }
}

fn exec_namespaces() -> Vec<String> {
    let name = |kind| std::fs::read_link(format!("/proc/self/ns/{kind}")).unwrap();
    ["net", "ipc", "uts"].map(|kind| name(kind).to_string_lossy().into_owned()).into()
}

pub async fn a_pid_namespace_of_the_sandbox(machine: &Machine) {
    let joined = [NamespaceType::PID, NamespaceType::IPC];
    let sleeper = machine.create(member("sleeper", program(&["sleep", "1001"]), &joined)).await.unwrap();
    sleeper.start().await.unwrap();
    let script = "(sh -c 'exec sleep 0.05' &); (exec sleep 1002 &); echo left; exec sleep 1003";
    let mut other = machine.create(member("other", shell(script), &joined)).await.unwrap();
    other.start().await.unwrap();
    read_until(other.stdout.as_mut().unwrap(), "left").await;
    // One sees the other's processes, and an init that is neither's and has nothing.
    let look = "cat /proc/[0-9]*/cmdline 2>/dev/null | tr '\\0' ' ' | grep -o 'sleep 100[0-9]' | sort | tr '\\n' ' '";
    assert_eq!(exec(machine, "sleeper", look).await, "sleep 1001 sleep 1002 sleep 1003 ");
    let init = exec(machine, "sleeper", "grep -E '^(PPid|CapEff|CapBnd|NoNewPrivs)' /proc/1/status").await;
    let nothing = "PPid:\t0\nCapEff:\t0000000000000000\nCapBnd:\t0000000000000000\nNoNewPrivs:\t1\n";
    assert_eq!(init, nothing);
    // What was orphaned belongs to it, and what has ended is collected.
    let orphans = "until ! grep -q '^State:.Z' /proc/[0-9]*/status 2>/dev/null; do sleep 0.05; done; \
                   for p in /proc/[0-9]*; do tr '\\0' ' ' 2>/dev/null < $p/cmdline | grep -q 'sleep 100[2]' && grep PPid $p/status; done";
    assert_eq!(exec(machine, "sleeper", orphans).await, "PPid:\t1\n");

    // The end of a container's first process is the end of that container alone.
    machine.sandbox.signal_process(&signal("other", libc::SIGTERM, false)).unwrap();
    assert_eq!(other.wait().await.code, 128 + libc::SIGTERM as u32);
    other.delete().await.unwrap();
    assert_eq!(exec(machine, "sleeper", look).await, "sleep 1001 ");
    end(machine, "sleeper", sleeper).await;
}

pub async fn what_the_sandbox_does_not_hold(machine: &Machine) {
    let refused = |error: Error, expected: &str| assert_eq!(error.to_string(), expected);
    let mut request = container("x", shell(""));
    request.namespaces.retain(|namespace| namespace.type_ != NamespaceType::CGROUP.into());
    request.namespaces.push(Namespace { sandbox: true, ..namespace(NamespaceType::CGROUP) });
    let error = machine.create(request).await.err().unwrap();
    refused(error, "namespaces[5].sandbox: the sandbox holds no cgroup namespace");
    let mut request = member("x", shell(""), &[]);
    request
        .mounts
        .iter_mut()
        .filter(|mount| mount.from_sandbox)
        .for_each(|mount| mount.source = "run".into());
    let error = machine.create(request).await.err().unwrap();
    refused(error, "mounts[3].source: the sandbox shares \"shm\" only");
}

/// A container that may look into every process it can see, while processes are
/// added to it and to others of its pid namespace: it finds nothing of the
/// agent's, neither files nor the root.
pub async fn nothing_of_the_agent_is_in_sight(machine: &Machine) {
    let own = |name: &str| std::fs::read_link(format!("/proc/self/{name}")).unwrap().display().to_string();
    // The root directory of the agent differs from the container's by what is
    // mounted there.
    std::fs::write("/run/rvm/of-the-agent", "").unwrap();
    let spy = "me=$(readlink /proc/self/ns/mnt); echo spying; while :; do for p in /proc/[0-9]*; do \
               if [ -e $p/root/run/rvm/of-the-agent ]; then echo ROOT $p; fi; \
               m=$(readlink $p/ns/mnt) && [ \"$m\" != \"$me\" ] && [ \"$m\" = AGENT ] && echo MNT $p; \
               for f in $p/fd/*; do case $(readlink $f) in *eventpoll*|*/run/rvm/*|*signalfd*) echo FD $f;; esac; done; \
               done; [ -e /dev/shm/stop ] && break; done; echo end";
    let spy = spy.replace("AGENT", &own("ns/mnt"));
    for joined in [&[][..], &[NamespaceType::PID][..]] {
        let id = if joined.is_empty() { "spy" } else { "spy-in-pod" };
        let mut process = shell(&spy);
        let sets = process.capabilities.mut_or_insert_default();
        for set in [&mut sets.bounding, &mut sets.effective, &mut sets.permitted] {
            *set |= 1 << CAP_SYS_PTRACE;
        }
        let mut running = machine.create(member(id, process, joined)).await.unwrap();
        running.start().await.unwrap();
        let mut stdout = running.stdout.take().unwrap();
        read_until(&mut stdout, "spying\n").await;
        for n in 0..100 {
            let added = machine.create_exec(id, &format!("e{n}"), program(&["true"])).unwrap();
            added.start().await.unwrap();
            added.wait().await;
            added.delete().await.unwrap();
            if !joined.is_empty() && n % 10 == 0 {
                machine.run_request(member("guest", program(&["true"]), joined)).await.unwrap();
            }
        }
        std::fs::write("/run/rvm/shm/stop", "").unwrap();
        let seen =
            tokio::time::timeout(Duration::from_secs(60), read_until(&mut stdout, "end\n")).await.unwrap();
        assert_eq!(seen, "end\n");
        std::fs::remove_file("/run/rvm/shm/stop").unwrap();
        running.wait().await;
        running.delete().await.unwrap();
    }
    std::fs::remove_file("/run/rvm/of-the-agent").unwrap();
}

pub async fn two_hundred_at_once(machine: &Machine) {
    let running = machine.create(container("many", program(&["sleep", "1000"]))).await.unwrap();
    running.start().await.unwrap();
    let mut added = Vec::new();
    for n in 0..200 {
        let mut process = shell("ulimit -n; read x");
        process.stdin = true;
        let one = machine.create_exec("many", &format!("e{n}"), process).unwrap();
        one.start().await.unwrap();
        added.push(one);
    }
    for mut one in added {
        drop(one.stdin.take());
        let output = one.finish().await;
        // What an ordinary process has: the agent's own limit is not theirs.
        let own = nix::sys::resource::getrlimit(nix::sys::resource::Resource::RLIMIT_NOFILE).unwrap();
        assert!(output.stdout.trim().parse::<u64>().unwrap() <= own.0, "{output:?}");
        one.delete().await.unwrap();
    }
    end(machine, "many", running).await;
}

pub async fn a_created_container_that_died_does_not_start(machine: &Machine) {
    let running = machine.create(container("dead", shell("echo never"))).await.unwrap();
    machine.sandbox.signal_process(&signal("dead", libc::SIGKILL, false)).unwrap();
    assert_eq!(running.wait().await.code, 137);
    for _ in 0..2 {
        let error = running.start().await.unwrap_err().to_string();
        assert_eq!(error, "cannot start a container that has stopped");
    }
    running.delete().await.unwrap();
}

pub async fn a_working_directory_that_is_not_there(machine: &Machine) {
    let look = "pwd; stat -c '%a %u %g' . ..";
    for (id, readonly, uid) in [("cwd", false, 0), ("cwd-user", false, 7), ("cwd-readonly", true, 7)] {
        let mut process = shell(look);
        process.cwd = "/nowhere/at/all".into();
        process.user.mut_or_insert_default().uid = uid;
        let mut request = container(id, process);
        request.rootfs.mut_or_insert_default().readonly = readonly;
        let output = machine.run_request(request).await.unwrap();
        assert_eq!(output.stdout, "/nowhere/at/all\n755 0 0\n755 0 0\n", "{id} {output:?}");
    }
    // An added process makes none.
    let running = machine.create(container("cwd-exec", program(&["sleep", "1000"]))).await.unwrap();
    running.start().await.unwrap();
    let mut process = shell(look);
    process.cwd = "/nowhere".into();
    let added = machine.create_exec("cwd-exec", "e", process).unwrap();
    let error = added.start().await.unwrap_err().to_string();
    let expected = "chdir to cwd (\"/nowhere\") set in config.json failed: no such file or directory";
    assert_eq!(error, expected);
    end(machine, "cwd-exec", running).await;
}
