use std::path::Path;

use oci_spec::runtime::Capability;
use rvm_protocol::agent::{CreateContainerRequest, Namespace, NamespaceType, Resources};
use serde_json::{Value, json};

use super::*;

/// What `ctr run` writes, shortened.
fn ctr_spec() -> Value {
    json!({
        "ociVersion": "1.0.2-dev",
        "process": {
            "user": {"uid": 0, "gid": 0, "additionalGids": [0, 10]},
            "args": ["sh", "-c", "exit 42"],
            "env": ["PATH=/bin"],
            "cwd": "/",
            "capabilities": {
                "bounding": ["CAP_CHOWN", "CAP_NET_BIND_SERVICE", "CAP_CHECKPOINT_RESTORE"],
                "effective": ["CAP_CHOWN"],
                "permitted": ["CAP_CHOWN"]
            },
            "rlimits": [{"type": "RLIMIT_NOFILE", "hard": 1024, "soft": 512}],
            "noNewPrivileges": true
        },
        "root": {"path": "rootfs"},
        "hostname": "web",
        "mounts": [
            {"destination": "/proc", "type": "proc", "source": "proc", "options": ["nosuid", "noexec", "nodev"]},
            {"destination": "data", "type": "bind", "source": "/srv/data", "options": ["rbind", "ro"]},
            {"destination": "/etc/hosts", "source": "hosts", "options": ["bind", "ro", "rw"]}
        ],
        "linux": {
            "resources": {
                "devices": [{"allow": false, "access": "rwm"}],
                "memory": {}, "cpu": {"shares": 1024}, "pids": {"limit": 0}
            },
            "cgroupsPath": "/default/web",
            "namespaces": [
                {"type": "pid"}, {"type": "ipc"}, {"type": "uts"}, {"type": "mount"},
                {"type": "network"}, {"type": "cgroup"}
            ],
            "maskedPaths": ["/proc/kcore"],
            "readonlyPaths": ["/proc/sys"]
        }
    })
}

fn load(spec: &Value) -> Result<Bundle, String> {
    load_with(spec, Compat::default())
}

fn load_with(spec: &Value, compat: Compat) -> Result<Bundle, String> {
    let json = spec.to_string();
    Bundle::parse(Path::new("/bundle"), "web", json.as_bytes(), &compat).map_err(|error| error.to_string())
}

/// The spec with `value` at the JSON pointer `at`.
fn changed(at: &str, value: Value) -> Value {
    let mut spec = ctr_spec();
    let (parent, key) = at.rsplit_once('/').unwrap();
    match spec.pointer_mut(parent).unwrap() {
        Value::Object(object) => drop(object.insert(key.into(), value)),
        Value::Array(array) => array[key.parse::<usize>().unwrap()] = value,
        other => panic!("{other}"),
    }
    spec
}

/// The error of the spec with `value` at the JSON pointer `at`.
fn error_with(at: &str, value: Value) -> String {
    load(&changed(at, value)).unwrap_err()
}

/// What the agent is asked for by the spec with `value` at the JSON pointer `at`.
fn request_with(at: &str, value: Value) -> CreateContainerRequest {
    load(&changed(at, value)).unwrap().container
}

#[test]
fn what_ctr_writes_goes_through() {
    let bundle = load(&ctr_spec()).unwrap();
    assert_eq!(bundle.root, Path::new("/bundle/rootfs"));
    assert!(bundle.not_applied.is_empty(), "{:?}", bundle.not_applied);
    let container = &bundle.container;
    assert_eq!((container.container_id.as_str(), container.hostname.as_str()), ("web", "web"));
    assert_eq!(container.rootfs.share_path, "web/rootfs");
    assert!(!container.rootfs.readonly);
    assert_eq!(container.cgroup_path, "/default/web");
    assert_eq!(container.namespaces.len(), 6);
    assert_eq!(container.namespaces[4].type_, NamespaceType::NETWORK.into());
    assert_eq!(container.masked_paths, ["/proc/kcore"]);

    let process = &container.process;
    assert_eq!(process.args, ["sh", "-c", "exit 42"]);
    assert_eq!(process.user.additional_gids, [0, 10]);
    assert_eq!(process.capabilities.bounding, 1 | 1 << 10 | 1 << 40);
    assert_eq!((process.capabilities.effective, process.capabilities.ambient), (1, 0));
    assert_eq!((process.rlimits[0].resource, process.rlimits[0].soft), (7, 512));
    assert!(process.no_new_privileges);
}

#[test]
fn binds_come_from_the_share() {
    let bundle = load(&ctr_spec()).unwrap();
    let mounts = &bundle.container.mounts;
    assert!(!mounts[0].from_share);
    assert_eq!((mounts[1].destination.as_str(), mounts[1].source.as_str()), ("/data", "web/mounts/1"));
    assert!(mounts[1].from_share);
    assert_eq!((mounts[2].type_.as_str(), mounts[2].source.as_str()), ("bind", "web/mounts/2"));
    let volumes: Vec<_> = bundle
        .volumes
        .iter()
        .map(|volume| (volume.source.to_str().unwrap(), volume.recursive, volume.readonly))
        .collect();
    assert_eq!(volumes, [("/srv/data", true, true), ("/bundle/hosts", false, false)]);
}

#[test]
fn wrong_values_are_named_with_what_would_be_right() {
    for (at, value, expected) in [
        ("/ociVersion", json!("2.0"), "ociVersion: must be 1.x, is \"2.0\""),
        ("/process", Value::Null, "process: is missing; it says what the container runs"),
        (
            "/process/args",
            json!([]),
            "process.args: is missing or empty; its first element is the program to run",
        ),
        ("/process/args", json!([""]), "process.args[0]: is empty; it must be the program to run"),
        ("/process/args/1", json!("a\0b"), "process.args[1]: must not contain a NUL byte"),
        ("/process/cwd", json!("data"), "process.cwd: must be an absolute path, is \"data\""),
        ("/process/cwd", json!(""), "process.cwd: must be an absolute path, is \"\""),
        ("/process/user/umask", json!(4096), "process.user.umask: must be 0 to 0777, is 0o10000"),
        ("/process/oomScoreAdj", json!(-2000), "process.oomScoreAdj: must be -1000 to 1000, is -2000"),
        (
            "/process/rlimits/0/soft",
            json!(2048),
            "process.rlimits[0]: soft must not be above hard, is 2048 above 1024",
        ),
        ("/root/path", json!(""), "root.path: is empty; it names the root file system"),
        (
            "/mounts/0/destination",
            json!(""),
            "mounts[0].destination: is empty; it must be a path in the container",
        ),
        (
            "/mounts/1/source",
            json!(""),
            "mounts[1].source: is missing; a bind mount needs a path of the host",
        ),
        ("/mounts/0/type", json!(""), "mounts[0].type: is missing; it names a file system or \"bind\""),
        ("/linux/namespaces", json!([]), "linux.namespaces: must hold a \"mount\" namespace"),
        ("/linux/namespaces/0", json!({"type": "ipc"}), "linux.namespaces[1].type: ipc is there twice"),
        (
            "/linux/maskedPaths/0",
            json!("proc"),
            "linux.maskedPaths[0]: must be an absolute path, is \"proc\"",
        ),
        (
            "/linux/cgroupsPath",
            json!("/a/../b"),
            "linux.cgroupsPath: must not contain \"..\", is \"/a/../b\"",
        ),
        (
            "/linux/rootfsPropagation",
            json!("both"),
            "linux.rootfsPropagation: must be private, slave, shared or unbindable, is \"both\"",
        ),
        (
            "/linux/devices",
            json!([{"path": "/dev/x", "type": "a"}]),
            "linux.devices[0].type: must be one of c, b, u, p, is \"a\"",
        ),
        (
            "/linux/namespaces",
            json!([{"type": "mount"}, {"type": "network"}]),
            "hostname: needs a \"uts\" namespace in linux.namespaces",
        ),
        (
            "/linux/uidMappings",
            json!([{"hostID": 1, "containerID": 0, "size": 1}]),
            "linux.uidMappings: needs a new \"user\" namespace in linux.namespaces",
        ),
        (
            "/linux/gidMappings",
            json!([{"hostID": 1, "containerID": 0, "size": 0}]),
            "linux.gidMappings[0].size: must be at least 1, is 0",
        ),
        (
            "/linux/uidMappings",
            json!([{"hostID": 1, "containerID": 0, "size": 10}, {"hostID": 100, "containerID": 9, "size": 1}]),
            "linux.uidMappings[1].containerID: maps ids that another entry maps",
        ),
        (
            "/linux/uidMappings",
            json!([{"hostID": 1, "containerID": 4294967295u32, "size": 1}]),
            "linux.uidMappings[0].size: goes beyond the last id, is 1",
        ),
        (
            "/linux/timeOffsets",
            json!({"boottime": {"secs": 1}}),
            "linux.timeOffsets: needs a new \"time\" namespace in linux.namespaces",
        ),
        (
            "/linux/timeOffsets",
            json!({"realtime": {"secs": 1}}),
            "linux.timeOffsets[\"realtime\"]: must be of the clock \"monotonic\" or \"boottime\"",
        ),
        (
            "/linux/resources/memory",
            json!({"limit": -2}),
            "linux.resources.memory.limit: must be positive, or -1 for no limit, is -2",
        ),
        (
            "/linux/resources/memory",
            json!({"limit": 2000, "swap": 1000}),
            "linux.resources.memory.swap: limits memory and swap together and must not be below memory.limit, is 1000 below 2000",
        ),
        (
            "/linux/resources/memory",
            json!({"swap": 1000}),
            "linux.resources.memory.swap: limits memory and swap together and needs memory.limit beside it",
        ),
        (
            "/linux/resources/cpu",
            json!({"cpus": "0-x"}),
            "linux.resources.cpu.cpus: must be a list of numbers and ranges like \"0-3,7\", is \"0-x\"",
        ),
        (
            "/linux/resources/cpu",
            json!({"mems": "3-1"}),
            "linux.resources.cpu.mems: must be a list of numbers and ranges like \"0-3,7\", is \"3-1\"",
        ),
        ("/linux/resources/cpu", json!({"idle": 2}), "linux.resources.cpu.idle: must be 0 or 1, is 2"),
        (
            "/linux/resources/blockIO",
            json!({"weight": 5}),
            "linux.resources.blockIO.weight: must be 10 to 1000, is 5",
        ),
        (
            "/linux/resources/hugepageLimits",
            json!([{"pageSize": "2XB", "limit": 1}]),
            "linux.resources.hugepageLimits[0].pageSize: must be a size in KB, MB or GB, for example \"2MB\", is \"2XB\"",
        ),
        (
            "/linux/resources/unified",
            json!({"../memory.max": "1"}),
            "linux.resources.unified[\"../memory.max\"]: must be a cgroup v2 file, CONTROLLER.PARAMETER",
        ),
        (
            "/linux/resources/devices",
            json!([{"allow": true, "access": "rx"}]),
            "linux.resources.devices[0].access: must be of the letters r, w and m, is \"rx\"",
        ),
        (
            "/linux/resources/devices",
            json!([{"allow": true, "type": "p", "access": "r"}]),
            "linux.resources.devices[0].type: must be one of a, b, c, is \"p\"",
        ),
        (
            "/linux/seccomp",
            json!({"defaultAction": "SCMP_ACT_ERRNO", "defaultErrnoRet": 70000}),
            "linux.seccomp.defaultErrnoRet: must be an error number up to 65535, is 70000",
        ),
        (
            "/hooks",
            json!({"poststop": [{"path": "bin/true"}]}),
            "hooks.poststop[0].path: must be an absolute path, is \"bin/true\"",
        ),
        (
            "/hooks",
            json!({"startContainer": [{"path": "/bin/true", "timeout": 0}]}),
            "hooks.startContainer[0].timeout: must be a number of seconds above 0, is 0",
        ),
        (
            "/process/ioPriority",
            json!({"class": "IOPRIO_CLASS_BE", "priority": 8}),
            "process.ioPriority.priority: must be 0 to 7, is 8",
        ),
        (
            "/process/scheduler",
            json!({"policy": "SCHED_FIFO"}),
            "process.scheduler.priority: must be 1 to 99 with SCHED_FIFO and SCHED_RR, is 0",
        ),
        (
            "/process/scheduler",
            json!({"policy": "SCHED_OTHER", "nice": 20}),
            "process.scheduler.nice: must be -20 to 19, is 20",
        ),
        (
            "/process/scheduler",
            json!({"policy": "SCHED_OTHER", "runtime": 1}),
            "process.scheduler.runtime: is for SCHED_DEADLINE only",
        ),
        (
            "/mounts/1",
            json!({"destination": "/x", "type": "bind", "source": "/x", "uidMappings": [{"size": 1}]}),
            "mounts[1].gidMappings: is missing beside uidMappings",
        ),
        (
            "/mounts/0",
            json!({"destination": "/x", "type": "tmpfs", "uidMappings": [{"size": 1}], "gidMappings": [{"size": 1}]}),
            "mounts[0].uidMappings: can be mapped on bind mounts only",
        ),
        (
            "/linux/sysctl",
            json!({"../x": "1"}),
            "linux.sysctl[\"../x\"]: must be a kernel parameter's name, as in sysctl(8)",
        ),
    ] {
        assert_eq!(error_with(at, value), expected, "at {at}");
    }
}

#[test]
fn what_is_not_done_is_refused_by_name() {
    for (at, value, field) in [
        ("/vm", json!({"kernel": {"path": "/k"}}), "vm"),
        ("/linux/namespaces/0", json!({"type": "pid", "path": "/proc/1/ns/pid"}), "linux.namespaces[0].path"),
        (
            "/linux/namespaces/0",
            json!({"type": "pid", "path": "/proc/4194305/ns/pid"}),
            "linux.namespaces[0].path",
        ),
        (
            "/linux/namespaces/4",
            json!({"type": "network", "path": "/run/netns/x"}),
            "linux.namespaces[4].path",
        ),
        ("/linux/intelRdt", json!({}), "linux.intelRdt"),
        ("/linux/personality", json!({"domain": "LINUX", "flags": ["X"]}), "linux.personality.flags"),
        ("/linux/resources/rdma", json!({"mlx5_1": {"hcaHandles": 3}}), "linux.resources.rdma"),
        ("/linux/seccomp", json!({"defaultAction": "SCMP_ACT_NOTIFY"}), "linux.seccomp.defaultAction"),
        (
            "/linux/devices",
            json!([{"path": "/dev/snd/seq", "type": "c", "major": 116, "minor": 1}]),
            "linux.devices[0]",
        ),
        ("/linux/mountLabel", json!("system_u:object_r:container_file_t:s0"), "linux.mountLabel"),
        ("/process/apparmorProfile", json!("docker-default"), "process.apparmorProfile"),
        ("/process/selinuxLabel", json!("system_u:system_r:container_t:s0"), "process.selinuxLabel"),
    ] {
        let error = error_with(at, value);
        assert!(error.starts_with(&format!("{field}: not supported: ")), "at {at}: {error}");
    }
}

#[test]
fn labels_are_ignored_where_the_configuration_says_so() {
    let error = error_with("/process/apparmorProfile", json!("docker-default"));
    for hint in
        ["\"docker-default\"", "--security-opt apparmor=unconfined", "ignore_labels = true", "[compat]"]
    {
        assert!(error.contains(hint), "{error}");
    }
    let spec = changed("/process/apparmorProfile", json!("docker-default"));
    let bundle = load_with(&spec, Compat { ignore_labels: true }).unwrap();
    assert_eq!(bundle.not_applied, ["process.apparmorProfile"]);
    for none in ["", "unconfined"] {
        let spec = changed("/process/apparmorProfile", json!(none));
        assert!(load(&spec).unwrap().not_applied.is_empty());
    }
}

fn resources(value: Value) -> Resources {
    let mut spec = ctr_spec();
    spec["linux"]["resources"] = value;
    load(&spec).unwrap().container.resources.unwrap()
}

#[test]
fn limits_are_converted_as_runc_does() {
    let given = resources(json!({
        "memory": {"limit": 1000, "reservation": 500, "swap": 1500},
        "cpu": {"shares": 1024, "quota": 50000, "period": 100000, "burst": 10, "idle": 1, "cpus": "0-1", "mems": "0"},
        "pids": {"limit": 100},
        "blockIO": {"weight": 500},
        "hugepageLimits": [{"pageSize": "2MB", "limit": 4194304}],
        "unified": {"memory.high": "1000"}
    }));
    assert_eq!(
        (given.memory_max, given.memory_low, given.memory_swap_max),
        (Some(1000), Some(500), Some(500))
    );
    assert_eq!(
        (given.cpu_weight, given.cpu_quota_us, given.cpu_period_us),
        (Some(39), Some(50000), Some(100000))
    );
    assert_eq!((given.cpu_burst_us, given.cpu_idle), (Some(10), Some(true)));
    assert_eq!((given.cpus.as_str(), given.mems.as_str()), ("0-1", "0"));
    assert_eq!((given.pids_max, given.io_weight), (Some(100), Some(4950)));
    assert_eq!(
        (given.hugepage_limits[0].page_size.as_str(), given.hugepage_limits[0].limit),
        ("2MB", 4194304)
    );
    assert_eq!(given.unified["memory.high"], "1000");

    let unset = resources(json!({
        "memory": {"limit": 0, "reservation": 0, "swap": 0}, "cpu": {"shares": 0, "quota": 0, "period": 0},
        "pids": {"limit": 0}, "blockIO": {"weight": 0}
    }));
    let nothing = Resources { device_rules: unset.device_rules.clone(), ..Default::default() };
    assert_eq!(unset, nothing);

    let unlimited = resources(json!({"memory": {"limit": -1}, "cpu": {"quota": -1}, "pids": {"limit": -1}}));
    assert_eq!((unlimited.memory_max, unlimited.memory_swap_max), (Some(-1), Some(-1)));
    assert_eq!((unlimited.cpu_quota_us, unlimited.pids_max), (Some(-1), Some(-1)));

    for (shares, weight) in [(1, 1), (2, 1), (262_144, 10_000), (u64::MAX, 10_000)] {
        assert_eq!(resources(json!({"cpu": {"shares": shares}})).cpu_weight, Some(weight));
    }
    for (weight, converted) in [(10, 1), (1000, 10_000)] {
        assert_eq!(resources(json!({"blockIO": {"weight": weight}})).io_weight, Some(converted));
    }
    let no_swap = resources(json!({"memory": {"limit": 1000, "swap": 1000}}));
    assert_eq!(no_swap.memory_swap_max, Some(0));
}

#[test]
fn what_only_cgroup_v1_has_is_listed() {
    let mut spec = ctr_spec();
    spec["linux"]["resources"] = json!({
        "memory": {"kernel": 1, "kernelTCP": 1, "swappiness": 10, "disableOOMKiller": true},
        "cpu": {"realtimeRuntime": 1, "realtimePeriod": 1}, "network": {"classID": 1}
    });
    let not_applied = load(&spec).unwrap().not_applied;
    let fields = [
        "memory.kernel",
        "memory.kernelTCP",
        "memory.swappiness",
        "memory.disableOOMKiller",
        "cpu.realtimeRuntime",
        "cpu.realtimePeriod",
        "network",
    ];
    assert_eq!(not_applied, fields.map(|field| format!("linux.resources.{field}")));
}

#[test]
fn several_throttles_of_one_device_are_one_limit() {
    let limits = resources(json!({"blockIO": {
        "throttleReadBpsDevice": [{"major": 8, "minor": 0, "rate": 100}, {"major": 9, "minor": 0, "rate": 50}],
        "throttleWriteIOPSDevice": [{"major": 8, "minor": 0, "rate": 7}],
        "weightDevice": [{"major": 8, "minor": 0, "weight": 10}]
    }}))
    .io_limits;
    assert_eq!(limits.len(), 1);
    assert_eq!((limits[0].serial.as_str(), limits[0].read_bps, limits[0].write_bps), ("", Some(50), None));
    assert_eq!((limits[0].write_iops, limits[0].weight), (Some(7), Some(1)));
}

#[test]
fn device_rules_are_in_the_guests_terms() {
    let rules = resources(json!({"devices": [
        {"allow": false, "access": "rwm"},
        {"allow": true, "type": "c", "major": 10, "minor": 229, "access": "rw"},
        {"allow": true, "type": "b", "major": 8, "minor": 0, "access": "rw"},
        {"allow": true, "type": "b", "major": 8, "minor": -1, "access": "r"}
    ]}))
    .device_rules;
    let text: Vec<_> = rules
        .iter()
        .map(|rule| {
            let number = |number: Option<u32>| number.map_or("*".into(), |number| number.to_string());
            let verb = if rule.allow { "allow" } else { "deny" };
            format!("{verb} {} {}:{} {}", rule.type_, number(rule.major), number(rule.minor), rule.access)
        })
        .collect();
    assert_eq!(
        text,
        ["deny a *:* rwm", "allow c 10:229 rw", "allow b 8:* r"],
        "the disk of the host is not the guest's"
    );
    // What every container may use besides, the agent knows.
    assert!(resources(json!({})).device_rules.is_empty());
}

#[test]
fn updates_change_what_they_name() {
    let (update, not_applied) =
        super::resources(br#"{"memory": {"limit": 1000, "swappiness": 1}, "devices": []}"#, &[]).unwrap();
    assert_eq!(update, Resources { memory_max: Some(1000), ..Default::default() });
    assert_eq!(not_applied, ["resources.memory.swappiness"]);
    let error = super::resources(br#"{"cpu": {"quota": "half"}}"#, &[]).unwrap_err().to_string();
    assert!(error.starts_with("update: cpu.quota: invalid type"), "{error}");
    let error = super::resources(br#"{"pids": {"limit": -7}}"#, &[]).unwrap_err().to_string();
    assert_eq!(error, "resources.pids.limit: must be positive, or -1 for no limit, is -7");
}

fn with_namespace(namespace: Value) -> Value {
    let mut spec = ctr_spec();
    spec["linux"]["namespaces"].as_array_mut().unwrap().push(namespace);
    spec
}

#[test]
fn user_namespaces_come_with_their_mappings() {
    let mut spec = with_namespace(json!({"type": "user"}));
    let error = load(&spec).unwrap_err();
    assert!(error.starts_with("linux.uidMappings: must map id 0"), "{error}");
    spec["linux"]["uidMappings"] = json!([{"hostID": 1000, "containerID": 0, "size": 10}]);
    spec["linux"]["gidMappings"] = json!([{"hostID": 2000, "containerID": 0, "size": 11}]);
    let container = load(&spec).unwrap().container;
    assert_eq!((container.uid_mappings[0].host_id, container.gid_mappings[0].size), (1000, 11));
    spec["process"]["user"]["additionalGids"] = json!([10, 11]);
    assert_eq!(
        load(&spec).unwrap_err(),
        "process.user.additionalGids[1]: 11 is not mapped by linux.gidMappings"
    );
    spec["process"]["user"]["uid"] = json!(10);
    assert_eq!(load(&spec).unwrap_err(), "process.user.uid: 10 is not mapped by linux.uidMappings");
}

#[test]
fn time_namespaces_come_with_their_offsets() {
    let mut spec = with_namespace(json!({"type": "time"}));
    spec["linux"]["timeOffsets"] = json!({"monotonic": {"secs": -5, "nanosecs": 7}, "boottime": {"secs": 9}});
    let offsets = load(&spec).unwrap().container.time_offsets;
    assert_eq!((offsets[0].clock.as_str(), offsets[0].secs), ("boottime", 9));
    assert_eq!((offsets[1].clock.as_str(), offsets[1].secs, offsets[1].nanosecs), ("monotonic", -5, 7));
}

#[test]
fn namespaces_of_processes_in_the_guest_can_be_joined() {
    let pid = crate::container::GUEST_PIDS_FROM + 42;
    let container =
        request_with("/linux/namespaces/1", json!({"type": "ipc", "path": format!("/proc/{pid}/ns/ipc")}));
    let joined =
        Namespace { type_: NamespaceType::IPC.into(), path: "/proc/42/ns/ipc".into(), ..Default::default() };
    assert_eq!(container.namespaces[1], joined);
    let error =
        error_with("/linux/namespaces/1", json!({"type": "ipc", "path": format!("/proc/{pid}/ns/net")}));
    assert!(error.contains("must end in /ns/ipc"), "{error}");
}

#[test]
fn how_a_process_is_scheduled_goes_through() {
    let container = request_with(
        "/process/scheduler",
        json!({"policy": "SCHED_DEADLINE", "runtime": 1, "deadline": 2, "period": 3,
            "flags": ["SCHED_FLAG_RESET_ON_FORK", "SCHED_FLAG_DL_OVERRUN", "SCHED_FLAG_RECLAIM"]}),
    );
    let scheduler = &container.process.scheduler;
    assert_eq!((scheduler.policy, scheduler.flags), (6, 7));
    assert_eq!((scheduler.runtime, scheduler.deadline, scheduler.period), (1, 2, 3));
    let io = request_with("/process/ioPriority", json!({"class": "IOPRIO_CLASS_IDLE", "priority": 4}));
    assert_eq!((io.process.io_priority.class, io.process.io_priority.priority), (3, 4));
    let affinity = request_with("/process/execCPUAffinity", json!({"initial": "0-1", "final": "1"}));
    assert_eq!((affinity.process.initial_cpus.as_str(), affinity.process.final_cpus.as_str()), ("0-1", "1"));
    assert_eq!(request_with("/linux/personality", json!({"domain": "LINUX32"})).personality, Some(8));
}

#[test]
fn hooks_go_where_they_run() {
    let mut spec = ctr_spec();
    spec["annotations"] = json!({"a": "b"});
    spec["hooks"] = json!({
        "prestart": [{"path": "/bin/one", "args": ["one", "x"], "env": ["A=B"], "timeout": 3}],
        "createRuntime": [{"path": "/bin/two"}],
        "createContainer": [{"path": "/bin/three", "args": ["three"], "timeout": 4}],
        "startContainer": [{"path": "/bin/four", "env": ["C=D"]}],
        "poststart": [{"path": "/bin/five"}],
        "poststop": [{"path": "/bin/six"}]
    });
    let bundle = load(&spec).unwrap();
    let hooks = &bundle.hooks;
    assert_eq!(
        (hooks.prestart[0].field.as_str(), hooks.prestart[0].timeout_s),
        ("hooks.prestart[0]", Some(3))
    );
    assert_eq!(
        (hooks.prestart[0].args.len(), hooks.prestart[0].env.as_deref()),
        (2, Some(&["A=B".to_owned()][..]))
    );
    assert_eq!(
        (hooks.create_runtime[0].path.as_path(), &hooks.create_runtime[0].env),
        (Path::new("/bin/two"), &None)
    );
    assert_eq!((hooks.poststart.len(), hooks.poststop.len()), (1, 1));
    let container = &bundle.container;
    assert_eq!(
        (container.create_container_hooks[0].path.as_str(), container.create_container_hooks[0].timeout_s),
        ("/bin/three", 4)
    );
    assert_eq!(container.start_container_hooks[0].env, ["C=D"]);
    let state = &container.hook_state;
    assert_eq!(
        (state.id.as_str(), state.bundle.as_str(), state.oci_version.as_str()),
        ("web", "/bundle", "1.0.2-dev")
    );
    assert_eq!(state.annotations["a"], "b");
    assert!(load(&ctr_spec()).unwrap().container.hook_state.is_none());
}

#[test]
fn a_host_network_is_refused() {
    let mut spec = ctr_spec();
    spec["linux"]["namespaces"] = json!([{"type": "mount"}, {"type": "pid"}]);
    let error = load(&spec).unwrap_err();
    assert!(error.starts_with("linux.namespaces: not supported: without a \"network\""), "{error}");
}

#[test]
fn broken_json_is_named_where_it_breaks() {
    let error = error_with("/process/args/2", json!(3));
    assert!(error.starts_with("config.json: process.args[2]: invalid type: integer `3`"), "{error}");
    let error = error_with("/process/capabilities/bounding", json!(["CAP_FLY"]));
    assert!(error.starts_with("config.json: process.capabilities.bounding[0]: "), "{error}");
    let error =
        Bundle::parse(Path::new("/b"), "web", b"not json", &Compat::default()).unwrap_err().to_string();
    assert!(error.starts_with("config.json: "), "{error}");
    assert!(!error.contains('\n'));
    let error = Bundle::load(Path::new("/nonexistent"), "web", &Compat::default()).unwrap_err().to_string();
    assert_eq!(error, "/nonexistent/config.json: No such file or directory (os error 2)");
}

#[test]
fn seccomp_profiles_are_compiled() {
    let container = request_with(
        "/linux/seccomp",
        json!({"defaultAction": "SCMP_ACT_ERRNO", "flags": ["SECCOMP_FILTER_FLAG_LOG"],
            "syscalls": [{"names": ["read"], "action": "SCMP_ACT_ALLOW"}]}),
    );
    assert!(container.seccomp.program.len() >= 32 && container.seccomp.program.len().is_multiple_of(8));
    assert_eq!(container.seccomp.flags, 2);
    assert!(load(&ctr_spec()).unwrap().container.seccomp.is_none());
}

#[test]
fn systemd_style_cgroups_become_paths() {
    for (given, expected) in [
        ("system.slice:docker:abc", "/system.slice/docker-abc.scope"),
        (":cri:abc", "/system.slice/cri-abc.scope"),
        ("kubepods/pod1/abc", "/kubepods/pod1/abc"),
        ("/", "/web"),
        ("", "/web"),
    ] {
        let mut spec = ctr_spec();
        spec["linux"]["cgroupsPath"] = json!(given);
        assert_eq!(load(&spec).unwrap().container.cgroup_path, expected);
    }
}

#[test]
fn devices_every_kernel_has_are_passed_on() {
    let mut spec = ctr_spec();
    spec["linux"]["devices"] =
        json!([{"path": "/dev/net/tun", "type": "c", "major": 10, "minor": 200, "fileMode": 438}]);
    let bundle = load(&spec).unwrap();
    let device = &bundle.container.devices[0];
    assert_eq!(
        (device.path.as_str(), device.major, device.minor, device.file_mode),
        ("/dev/net/tun", 10, 200, 438)
    );
}

#[test]
fn every_capability_has_its_own_number() {
    use Capability::*;
    let all = [
        AuditControl,
        AuditRead,
        AuditWrite,
        BlockSuspend,
        Bpf,
        CheckpointRestore,
        Chown,
        DacOverride,
        DacReadSearch,
        Fowner,
        Fsetid,
        IpcLock,
        IpcOwner,
        Kill,
        Lease,
        LinuxImmutable,
        MacAdmin,
        MacOverride,
        Mknod,
        NetAdmin,
        NetBindService,
        NetBroadcast,
        NetRaw,
        Perfmon,
        Setgid,
        Setfcap,
        Setpcap,
        Setuid,
        SysAdmin,
        SysBoot,
        SysChroot,
        SysModule,
        SysNice,
        SysPacct,
        SysPtrace,
        SysRawio,
        SysResource,
        SysTime,
        SysTtyConfig,
        Syslog,
        WakeAlarm,
    ];
    let mask = all.iter().fold(0, |mask, capability| mask | process::bit(*capability));
    assert_eq!(mask, (1 << 41) - 1);
    assert_eq!(process::bit(SysAdmin), 1 << 21);
}

#[test]
fn limits_that_are_not_named_are_inherited() {
    let process = load(&ctr_spec()).unwrap().container.process;
    let limit = |resource| process.rlimits.iter().find(|limit| limit.resource == resource).unwrap();
    assert_eq!(process.rlimits.len(), 16);
    assert_eq!((limit(libc::RLIMIT_NOFILE).soft, limit(libc::RLIMIT_NOFILE).hard), (512, 1024));
    let mut own = libc::rlimit { rlim_cur: 0, rlim_max: 0 };
    // SAFETY: `own` is a valid rlimit for the call to fill in.
    assert_eq!(unsafe { libc::getrlimit(libc::RLIMIT_SIGPENDING, &raw mut own) }, 0);
    let pending = limit(libc::RLIMIT_SIGPENDING);
    assert_eq!((pending.soft, pending.hard), (own.rlim_cur, own.rlim_max));
    let (exec, _) = exec_process(br#"{"user": {}, "args": ["ls"], "cwd": "/"}"#, &Compat::default()).unwrap();
    let files = exec.rlimits.iter().find(|limit| limit.resource == libc::RLIMIT_NOFILE).unwrap();
    assert!(files.hard <= 1 << 20, "what the guest's kernel allows: {}", files.hard);
}

#[test]
fn an_exec_is_a_process() {
    let (process, _) =
        exec_process(br#"{"user": {"uid": 7}, "args": ["ls"], "cwd": "/"}"#, &Compat::default()).unwrap();
    assert_eq!((process.args.len(), process.user.uid, process.capabilities.bounding), (1, 7, 0));
    let error = exec_process(br#"{"user": {}, "args": ["ls"], "cwd": "tmp"}"#, &Compat::default())
        .unwrap_err()
        .to_string();
    assert_eq!(error, "process.cwd: must be an absolute path, is \"tmp\"");
}

#[test]
fn idmapped_mounts_have_both_mappings() {
    let mount = |extra: Value| {
        let mut mount =
            json!({"destination": "/x", "type": "bind", "source": "/srv", "options": ["bind", "ridmap"]});
        mount.as_object_mut().unwrap().extend(extra.as_object().unwrap().clone());
        mount
    };
    let map = json!([{"containerID": 0, "hostID": 1000, "size": 5}]);
    assert_eq!(
        error_with("/mounts/0", mount(json!({}))),
        "mounts[0].uidMappings: is missing: an idmapped mount needs uidMappings and gidMappings, its own or linux's"
    );
    let mut spec = ctr_spec();
    spec["mounts"][0] = mount(json!({"uidMappings": map, "gidMappings": map}));
    let bundle = load(&spec).unwrap();
    let (idmap, all) = bundle.volumes[0].idmap.clone().unwrap();
    assert!(all && idmap.uids == idmap.gids && idmap.uids[0].outside == 1000);
}

#[test]
fn a_remount_needs_nothing_of_the_host() {
    let mut spec = ctr_spec();
    spec["mounts"][1] = json!({"destination": "/proc", "type": "bind", "source": "/proc", "options": ["remount", "bind", "ro"]});
    let bundle = load(&spec).unwrap();
    assert!(bundle.volumes.iter().all(|volume| volume.field != "mounts[1].source"));
    assert!(!bundle.container.mounts[1].from_share);
}
