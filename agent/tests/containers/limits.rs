//! What must hold of a container's cgroup. The controllers of this machine's
//! hierarchy may be few: those of memory, cpu and io are tried in a guest, by
//! the end-to-end tests.

use std::{fs, time::Duration};

use protobuf::MessageField;
use rvm_agent::error::Error;
use rvm_protocol::agent::{
    ContainerRef, CreateContainerRequest, DeviceRule, NamespaceType, Process, Resources,
    SignalProcessRequest, UpdateResourcesRequest, WaitOomRequest,
};
use tokio::io::AsyncReadExt;

use crate::fixture::{Machine, container, program, read_until, reference, shell};

fn rule(allow: bool, kind: &str, major: Option<u32>, access: &str) -> DeviceRule {
    DeviceRule { allow, type_: kind.into(), major, access: access.into(), ..Default::default() }
}

fn with_resources(id: &str, process: Process, resources: Resources) -> CreateContainerRequest {
    let mut request = container(id, process);
    request.resources = MessageField::some(resources);
    request
}

fn update(id: &str, resources: Resources) -> UpdateResourcesRequest {
    UpdateResourcesRequest {
        container_id: id.into(),
        resources: MessageField::some(resources),
        ..Default::default()
    }
}

fn id_of(container: &str) -> ContainerRef {
    ContainerRef { container_id: container.into(), ..Default::default() }
}

fn kill(machine: &Machine, container: &str, all: bool) {
    let process = MessageField::some(reference(container, ""));
    let request = SignalProcessRequest { process, signal: libc::SIGKILL as u32, all, ..Default::default() };
    machine.sandbox.signal_process(&request).unwrap();
}

/// No driver has this major number (it is for local use): who may open such a
/// device learns that, who may not is told so first.
const NOBODYS: u32 = 241;

pub async fn devices_are_filtered(machine: &Machine) {
    let script = format!("mknod /tmp/x c {NOBODYS} 7 && cat /tmp/x; echo > /dev/null && echo fine");
    let run = async |rules: Vec<DeviceRule>| {
        let resources = Resources { device_rules: rules, ..Default::default() };
        let output = machine.run_request(with_resources("devices", shell(&script), resources)).await.unwrap();
        assert_eq!((output.code, output.stdout.as_str()), (0, "fine\n"), "{output:?}");
        output.stderr
    };
    let none = rule(false, "a", None, "rwm");
    let all = rule(true, "a", None, "rwm");
    let forbidden = "cat: /tmp/x: Operation not permitted\n";
    let allowed = "cat: /tmp/x: No such device or address\n";
    assert_eq!(run(vec![]).await, forbidden);
    assert_eq!(run(vec![none.clone()]).await, forbidden);
    assert_eq!(run(vec![none.clone(), rule(true, "c", Some(NOBODYS), "rw")]).await, allowed);
    assert_eq!(run(vec![none.clone(), rule(true, "b", Some(NOBODYS), "rw")]).await, forbidden);
    assert_eq!(run(vec![none.clone(), rule(true, "c", Some(NOBODYS), "w")]).await, forbidden);
    assert_eq!(run(vec![all.clone()]).await, allowed);
    assert_eq!(run(vec![all.clone(), rule(false, "c", Some(NOBODYS), "r")]).await, forbidden);
    let no_node = run(vec![all, rule(false, "c", Some(NOBODYS), "m")]).await;
    assert_eq!(no_node, "mknod: /tmp/x: Operation not permitted\n");

    // An update replaces the filter of what runs.
    let resources = Resources { device_rules: vec![none.clone()], ..Default::default() };
    let script = format!("mknod /tmp/x c {NOBODYS} 7; sleep 1000");
    let running = machine.create(with_resources("devices", shell(&script), resources)).await.unwrap();
    running.start().await.unwrap();
    let look = async |exec: &str| {
        let script = "until [ -e /tmp/x ]; do :; done; cat /tmp/x";
        let mut added = machine.create_exec("devices", exec, shell(script)).unwrap();
        added.start().await.unwrap();
        added.finish().await.stderr
    };
    assert_eq!(look("before").await, forbidden);
    let allow = Resources {
        device_rules: vec![none.clone(), rule(true, "c", Some(NOBODYS), "r")],
        ..Default::default()
    };
    machine.sandbox.update_resources(&update("devices", allow)).unwrap();
    assert_eq!(look("allowed").await, allowed);
    let forbid = Resources { device_rules: vec![none], ..Default::default() };
    machine.sandbox.update_resources(&update("devices", forbid)).unwrap();
    assert_eq!(look("after").await, forbidden);
    kill(machine, "devices", true);
    running.wait().await;
    running.delete().await.unwrap();
}

pub async fn a_paused_container_stands_still(machine: &Machine) {
    let script = "while :; do echo tick; sleep 0.01; done";
    let mut running = machine.create(container("paused", shell(script))).await.unwrap();
    // What does not run cannot be paused.
    assert!(matches!(machine.sandbox.pause(&id_of("paused")).await, Err(Error::Precondition(_))));
    running.start().await.unwrap();
    let mut stdout = running.stdout.take().unwrap();
    for _ in 0..3 {
        read_until(&mut stdout, "tick").await;
        machine.sandbox.pause(&id_of("paused")).await.unwrap();
        // What was written before is on its way; after that, nothing comes.
        let mut buffer = [0; 4096];
        let moment = Duration::from_millis(300);
        while let Ok(read) = tokio::time::timeout(moment, stdout.read(&mut buffer)).await {
            assert!(read.unwrap() < buffer.len(), "it goes on");
        }
        let added = machine.create_exec("paused", "added", program(&["true"])).unwrap();
        let error = added.start().await.unwrap_err().to_string();
        assert_eq!(error, "container \"paused\" is paused");
        added.delete().await.unwrap();
        machine.sandbox.resume(&id_of("paused")).unwrap();
        read_until(&mut stdout, "tick").await;
    }
    kill(machine, "paused", false);
    running.wait().await;
    running.delete().await.unwrap();
}

pub async fn a_paused_container_can_be_killed(machine: &Machine) {
    for (own_pids, all) in [(true, false), (true, true), (false, true)] {
        let mut request = container("killed", shell("sleep 1000 & sleep 1001"));
        if !own_pids {
            request.namespaces.retain(|namespace| namespace.type_ != NamespaceType::PID.into());
        }
        let running = machine.create(request).await.unwrap();
        running.start().await.unwrap();
        machine.sandbox.pause(&id_of("killed")).await.unwrap();
        kill(machine, "killed", all);
        assert_eq!(running.wait().await.code, 137, "{own_pids} {all}");
        running.delete().await.unwrap();
    }
}

pub async fn limits_are_applied_and_changed(machine: &Machine) {
    let unified = |value: &str| [("cgroup.max.depth".to_owned(), value.to_owned())].into();
    let process = shell("cat /sys/fs/cgroup/cgroup.max.depth; sleep 1000");
    let resources = Resources { unified: unified("7"), ..Default::default() };
    let mut running = machine.create(with_resources("limits", process, resources)).await.unwrap();
    running.start().await.unwrap();
    let mut stdout = running.stdout.take().unwrap();
    read_until(&mut stdout, "7\n").await;
    let file = format!("/sys/fs/cgroup{}/cgroup.max.depth", container("limits", shell("")).cgroup_path);
    for value in ["9", "max", "1"] {
        let resources = Resources { unified: unified(value), ..Default::default() };
        machine.sandbox.update_resources(&update("limits", resources)).unwrap();
        assert_eq!(fs::read_to_string(&file).unwrap().trim(), value);
    }
    // One that fails leaves what was.
    let resources = Resources {
        unified: [
            ("cgroup.max.depth".to_owned(), "5".to_owned()),
            ("cgroup.max.descendants".to_owned(), "many".to_owned()),
        ]
        .into(),
        ..Default::default()
    };
    let error = machine.sandbox.update_resources(&update("limits", resources)).unwrap_err().to_string();
    assert_eq!(
        error,
        "resources.unified[\"cgroup.max.descendants\"]: write \"many\" to cgroup.max.descendants: invalid argument"
    );
    assert_eq!(fs::read_to_string(&file).unwrap().trim(), "1");
    kill(machine, "limits", false);
    running.wait().await;
    running.delete().await.unwrap();
}

pub async fn wrong_limits_are_refused_by_field(machine: &Machine) {
    let unified =
        |name: &str| Resources { unified: [(name.to_owned(), "x".to_owned())].into(), ..Default::default() };
    let io = Resources { io_limits: vec![Default::default()], ..Default::default() };
    for (resources, expected) in [
        (unified("../x"), "resources.unified[\"../x\"]: must be the name of a file, without \"/\""),
        (
            unified("no.such"),
            "resources.unified[\"no.such\"]: the guest's kernel has no cgroup file \"no.such\"",
        ),
        (
            unified("cgroup.max.depth"),
            "resources.unified[\"cgroup.max.depth\"]: write \"x\" to cgroup.max.depth: invalid argument",
        ),
        (
            Resources { device_rules: vec![rule(true, "x", None, "r")], ..Default::default() },
            "resources.device_rules[0].type: \"x\" must be \"a\", \"b\" or \"c\"",
        ),
        (
            io,
            "resources.io_limits[0].serial: the scratch is in memory, whose rate nothing limits; one on a block device can be limited",
        ),
    ] {
        let request = with_resources("wrong", shell(""), resources);
        let error = machine.create(request).await.map(|_| ()).unwrap_err();
        assert_eq!(error.to_string(), expected);
        assert!(matches!(error, Error::Invalid { .. }));
        // The id, its cgroup and its layer are free again.
        assert_eq!(machine.run("wrong", "exit 3").await.code, 3);
    }
}

pub async fn statistics(machine: &Machine) {
    let running = machine.create(container("stats", program(&["sleep", "1000"]))).await.unwrap();
    running.start().await.unwrap();
    let stats = machine.sandbox.stats(&id_of("stats")).unwrap();
    assert!(stats.files["cpu.stat"].starts_with("usage_usec "), "{:?}", stats.files);
    let names: Vec<&str> = stats.networks.iter().map(|network| network.name.as_str()).collect();
    assert_eq!(names, ["lo"], "the interfaces of the container, not of the machine");
    // Waiting for what never comes ends with the container.
    let sandbox = std::sync::Arc::clone(&machine.sandbox);
    let waiting = tokio::spawn(async move {
        let request = WaitOomRequest { container_id: "stats".into(), ..Default::default() };
        sandbox.wait_oom(&request).await
    });
    tokio::task::yield_now().await;
    kill(machine, "stats", false);
    running.wait().await;
    let stats = machine.sandbox.stats(&id_of("stats")).unwrap();
    assert!(stats.networks.is_empty() && stats.files.contains_key("cpu.stat"));
    running.delete().await.unwrap();
    let has_memory = fs::read_to_string("/sys/fs/cgroup/cgroup.controllers").unwrap().contains("memory");
    let answer = waiting.await.unwrap();
    assert!(!has_memory || matches!(answer, Err(Error::NotFound(_))), "{answer:?}");
    assert!(machine.sandbox.stats(&id_of("stats")).is_err());
}

pub async fn the_hierarchy_as_seen_inside(machine: &Machine) {
    let look =
        "cat /proc/self/cgroup; cd /sys/fs/cgroup; stat -f -c %T .; touch x 2>/dev/null || echo read-only";
    let output = machine.run("own", &format!("{look}; grep -c . cgroup.procs")).await;
    let lines: Vec<&str> = output.stdout.lines().filter(|line| !line.contains(":name=")).collect();
    assert!(lines.contains(&"0::/"), "{output:?}");
    assert_eq!(&lines[lines.len() - 3..], ["cgroup2fs", "read-only", "2"], "{output:?}");

    // Without a namespace of its own it sees the guest's hierarchy, as with runc.
    let path = container("guests", shell("")).cgroup_path;
    let options = || {
        let mounts = fs::read_to_string("/proc/self/mountinfo").unwrap();
        mounts.lines().filter(|line| line.contains(" /sys/fs/cgroup ")).map(str::to_owned).collect::<Vec<_>>()
    };
    let before = options();
    let mut request = container("guests", shell(&format!("{look}; grep -c . .{path}/cgroup.procs")));
    request.namespaces.retain(|namespace| namespace.type_ != NamespaceType::CGROUP.into());
    let output = machine.run_request(request).await.unwrap();
    assert!(output.stdout.contains(&format!("0::{path}\n")), "{output:?}");
    assert!(output.stdout.ends_with("cgroup2fs\nread-only\n2\n"), "{output:?}");
    assert_eq!(options(), before, "the hierarchy's options are the machine's");
}
