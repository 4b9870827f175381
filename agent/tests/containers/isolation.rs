//! Namespaces: user, time, joined ones.

use std::{fs, os::unix::fs::MetadataExt, path::Path};

use protobuf::MessageField;
use rvm_protocol::agent::{
    ContainerRef, CreateContainerRequest, IdMapping, NamespaceType, Process, TimeOffset, User,
};

use crate::{
    cases::signal,
    fixture::{Machine, Running, container, mount_of, namespace, program, read_until, shell},
};

/// Where the containers' users begin on the outside.
const FIRST: u32 = 100_000;

fn in_user_namespace(id: &str, process: Process) -> CreateContainerRequest {
    let mut request = container(id, process);
    let mapping = IdMapping { container_id: 0, host_id: FIRST, size: 65536, ..Default::default() };
    request.uid_mappings.push(mapping.clone());
    request.gid_mappings.push(mapping);
    request.namespaces.push(namespace(NamespaceType::USER));
    request
}

/// The first process's pid outside.
fn pid_of(machine: &Machine, id: &str) -> u32 {
    let reference = ContainerRef { container_id: id.into(), ..Default::default() };
    machine.sandbox.list_processes(&reference).unwrap()[0].pid
}

async fn end(machine: &Machine, id: &str, running: Running) {
    machine.sandbox.signal_process(&signal(id, libc::SIGKILL, false)).unwrap();
    running.wait().await;
    running.delete().await.unwrap();
}

pub async fn user_namespace(machine: &Machine) {
    let volume = Path::new(rvm_protocol::guest::VOLUMES_DIR).join("volume");
    fs::create_dir_all(&volume).unwrap();
    fs::set_permissions(&volume, std::os::unix::fs::PermissionsExt::from_mode(0o777)).unwrap();
    let script = "tr -s ' ' < /proc/self/uid_map; id -u; id -G; hostname; echo pid=$$; \
                  stat -c '%u' /dev /dev/pts /dev/shm /dev/null /etc/passwd; \
                  head -c 3 /dev/zero | od -An -c; echo gone > /dev/null; echo again > /dev/stdout; \
                  touch /run/mine /volume/ours && stat -c %u /run/mine; touch /etc/x || echo refused; \
                  cat /proc/sys/net/ipv4/ip_unprivileged_port_start; tail -1 /proc/self/cgroup; \
                  stat -f -c %T /proc /sys /sys/fs/cgroup /dev/mqueue; \
                  wc -c < /proc/version; sleep 1000 & exec cat";
    let process = Process {
        stdin: true,
        user: MessageField::some(User { additional_gids: vec![7], ..Default::default() }),
        rlimits: vec![rvm_protocol::agent::Rlimit {
            resource: libc::RLIMIT_NOFILE,
            soft: 300,
            hard: 400,
            ..Default::default()
        }],
        ..shell(script)
    };
    let mut request = in_user_namespace("userns", process);
    let mut mount = mount_of("/volume", "bind", "volume", &["rbind", "rw"]);
    mount.from_share = true;
    // Below /run, which the container's root may write to.
    mount.destination = "/run/volume".into();
    request.mounts.push(mount);
    request.process.mut_or_insert_default().args[2] = script.replace("/volume/ours", "/run/volume/ours");
    request.sysctl.insert("net.ipv4.ip_unprivileged_port_start".into(), "80".into());
    let mut running = machine.create(request).await.unwrap();
    running.start().await.unwrap();
    let mut stdout = running.stdout.take().unwrap();
    let seen = read_until(&mut stdout, "mqueue\n0\n").await;
    let expected = "ok\n 0 100000 65536\n0\n0 7\ninside\npid=1\n0\n0\n0\n65534\n65534\n  \\0  \\0  \\0\n\
                    again\n0\nrefused\n80\n0::/\nproc\nsysfs\ncgroup2fs\nmqueue\n0\n";
    assert_eq!(seen, expected);
    assert_eq!(fs::metadata(volume.join("ours")).unwrap().uid(), FIRST);
    let outside = pid_of(machine, "userns");
    let link = |pid: &str| fs::read_link(format!("/proc/{pid}/ns/user")).unwrap();
    assert_ne!(link(&outside.to_string()), link("self"));
    let limits = fs::read_to_string(format!("/proc/{outside}/limits")).unwrap();
    assert!(limits.lines().any(|line| {
        line.split_whitespace().collect::<Vec<_>>()[..5] == ["Max", "open", "files", "300", "400"]
    }));

    let process = Process {
        user: MessageField::some(User { uid: 33, gid: 34, ..Default::default() }),
        ..shell(
            "id -u; id -g; readlink /proc/self/ns/user; echo hi > /dev/stdout; grep CapBnd /proc/self/status",
        )
    };
    let mut added = machine.create_exec("userns", "e", process).unwrap();
    added.start().await.unwrap();
    let output = added.finish().await;
    let expected =
        format!("33\n34\n{}\nhi\nCapBnd:\t00000000a80425fb\n", link(&outside.to_string()).display());
    assert_eq!(output.stdout, expected, "{}", output.stderr);

    let terminal = Process {
        terminal: true,
        ..shell("tty; stat -c %u $(tty); grep flags /proc/self/fdinfo/0; ls /proc/self/fd | wc -l; stty size")
    };
    let mut added = machine.create_exec("userns", "t", terminal).unwrap();
    let mut terminal = added.terminal.take().unwrap();
    added.start().await.unwrap();
    assert_eq!(
        read_until(&mut terminal, "91\r\n").await,
        "ok\n/dev/pts/0\r\n0\r\nflags:\t0100002\r\n4\r\n17 91\r\n"
    );
    added.wait().await;

    let stranger = User { uid: 70_000, ..Default::default() };
    let process = Process { user: MessageField::some(stranger), ..shell("") };
    let error = machine.create_exec("userns", "s", process).map(|_| ()).unwrap_err().to_string();
    assert_eq!(error, "process.user.uid: 70000 is not mapped in the user namespace");
    end(machine, "userns", running).await;
    fs::remove_dir_all(&volume).unwrap();

    // Whatever fails in either child is told, and nothing is left.
    // The last connections' tasks may still be about to end.
    tokio::time::sleep(std::time::Duration::from_millis(50)).await;
    let descriptors = || fs::read_dir("/proc/self/fd").unwrap().count();
    let before = descriptors();
    let mut request = in_user_namespace("userns", shell(""));
    request.mounts.push(mount_of("/run/x", "bind", "/nonexistent", &["bind"]));
    let error = machine.create(request).await.map(|_| ()).unwrap_err().to_string();
    let expected = "]: bind mount \"/nonexistent\" at \"/run/x\": no such file or directory";
    assert!(error.starts_with("mounts[") && error.ends_with(expected), "{error}");
    let error = machine.create(in_user_namespace("userns", program(&["nope"]))).await.map(|_| ());
    assert_eq!(error.unwrap_err().to_string(), "exec: \"nope\": executable file not found in $PATH");
    assert_eq!(descriptors(), before);

    let mut request =
        in_user_namespace("userns", Process { terminal: true, ..shell("stat -c %u /dev/console") });
    request.process.mut_or_insert_default().user.mut_or_insert_default().uid = 5;
    let mut running = machine.create(request).await.unwrap();
    let mut terminal = running.terminal.take().unwrap();
    running.start().await.unwrap();
    assert_eq!(read_until(&mut terminal, "\r\n").await, "ok\n5\r\n");
    running.wait().await;
    running.delete().await.unwrap();
}

pub async fn user_namespace_joined(machine: &Machine) {
    let pause = in_user_namespace("pause", program(&["sleep", "1000"]));
    let pause = machine.create(pause).await.unwrap();
    pause.start().await.unwrap();
    let pid = pid_of(machine, "pause");
    let script = "echo pid=$$; id -u; tr -s ' ' < /proc/self/uid_map; readlink /proc/self/ns/user /proc/self/ns/ipc; \
                  stat -f -c %T /proc; echo hi > /dev/stdout";
    let process =
        Process { user: MessageField::some(User { uid: 3, ..Default::default() }), ..shell(script) };
    let mut request = container("member", process);
    request.namespaces.push(namespace(NamespaceType::USER));
    for namespace in &mut request.namespaces {
        match namespace.type_.enum_value() {
            Ok(NamespaceType::USER) => namespace.path = format!("/proc/{pid}/ns/user"),
            Ok(NamespaceType::IPC) => namespace.path = format!("/proc/{pid}/ns/ipc"),
            Ok(NamespaceType::NETWORK) => namespace.path = format!("/proc/{pid}/ns/net"),
            Ok(NamespaceType::UTS) => namespace.path = format!("/proc/{pid}/ns/uts"),
            _ => {}
        }
    }
    let link = |name: &str| fs::read_link(format!("/proc/{pid}/ns/{name}")).unwrap().display().to_string();
    let expected = format!("pid=1\n3\n 0 100000 65536\n{}\n{}\nproc\nhi\n", link("user"), link("ipc"));
    let output = machine.run_request(request.clone()).await.unwrap();
    assert_eq!(output.stdout, expected, "{}", output.stderr);

    // The pid namespace as well: its processes are in sight.
    for namespace in &mut request.namespaces {
        if namespace.type_ == NamespaceType::PID.into() {
            namespace.path = format!("/proc/{pid}/ns/pid");
        }
    }
    request.process.mut_or_insert_default().args[2] = "tr '\\0' ' ' < /proc/1/cmdline".into();
    let output = machine.run_request(request).await.unwrap();
    assert_eq!(output.stdout, "sleep 1000 ", "{}", output.stderr);
    end(machine, "pause", pause).await;
}

pub async fn time_namespace(machine: &Machine) {
    for user in [false, true] {
        let script = "cut -d. -f1 /proc/uptime; readlink /proc/1/ns/time; exec sleep 1000";
        let mut request = match user {
            true => in_user_namespace("time", shell(script)),
            false => container("time", shell(script)),
        };
        request.namespaces.push(namespace(NamespaceType::TIME));
        request.time_offsets.push(TimeOffset {
            clock: "boottime".into(),
            secs: 1_000_000_000,
            nanosecs: 7,
            ..Default::default()
        });
        let mut running = machine.create(request).await.unwrap();
        running.start().await.unwrap();
        let mut stdout = running.stdout.take().unwrap();
        let seen = read_until(&mut stdout, "]\n").await;
        let mut lines = seen.lines().skip(1);
        let uptime: u64 = lines.next().unwrap().parse().unwrap();
        assert!(uptime >= 1_000_000_000, "{uptime}");
        let own = fs::read_link("/proc/self/ns/time").unwrap().display().to_string();
        assert_ne!(lines.next().unwrap(), own);

        let mut added = machine.create_exec("time", "e", shell("cut -d. -f1 /proc/uptime")).unwrap();
        added.start().await.unwrap();
        let output = added.finish().await;
        assert!(output.stdout.trim().parse::<u64>().unwrap() >= uptime, "{output:?}");
        end(machine, "time", running).await;
    }
}

pub async fn namespaces_differ(machine: &Machine) {
    let mut all = Vec::new();
    let mut running = Vec::new();
    for id in ["one", "two"] {
        let mut request = in_user_namespace(id, program(&["sleep", "1000"]));
        request.namespaces.push(namespace(NamespaceType::TIME));
        let one = machine.create(request).await.unwrap();
        one.start().await.unwrap();
        running.push((id, one));
        let mut added =
            machine.create_exec(id, "e", shell("cd /proc/1/ns; for n in *; do readlink $n; done")).unwrap();
        added.start().await.unwrap();
        let output = added.finish().await;
        let mut seen: Vec<String> = output.stdout.lines().map(str::to_owned).collect();
        seen.sort();
        seen.dedup();
        // cgroup, ipc, mnt, net, pid, time, user, uts
        assert_eq!(seen.len(), 8, "{output:?}");
        all.extend(seen);
    }
    let own = fs::read_dir("/proc/self/ns").unwrap();
    all.extend(own.map(|entry| fs::read_link(entry.unwrap().path()).unwrap().display().to_string()));
    all.sort();
    all.dedup();
    assert_eq!(all.len(), 24, "{all:?}");
    for (id, one) in running {
        end(machine, id, one).await;
    }
}
