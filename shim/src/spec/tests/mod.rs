//! What specifications become, and what is refused.

mod namespaces;
mod process;
mod resources;

use std::path::Path;

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
    assert_eq!(container.rootfs.share_path, "web");
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
    for (n, destination) in [(1, "/data"), (2, "/etc/hosts")] {
        let mount = &mounts[n];
        assert_eq!((mount.destination.as_str(), mount.type_.as_str()), (destination, "bind"));
        assert!(mount.from_share && mount.source.is_empty());
    }
    let volumes: Vec<_> = bundle
        .volumes
        .iter()
        .map(|volume| (volume.mount, volume.source.to_str().unwrap(), volume.recursive, volume.readonly))
        .collect();
    assert_eq!(volumes, [(1, "/srv/data", true, true), (2, "/bundle/hosts", false, false)]);
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
        ("/process/apparmorProfile", json!("my-own"), "process.apparmorProfile"),
        ("/process/selinuxLabel", json!("system_u:system_r:container_t:s0"), "process.selinuxLabel"),
    ] {
        let error = error_with(at, value);
        assert!(error.starts_with(&format!("{field}: not supported: ")), "at {at}: {error}");
    }
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
fn a_privileged_container_does_without_the_devices_of_the_host() {
    let mut spec = ctr_spec();
    spec["linux"]["devices"] = json!([
        {"path": "/dev/kvm", "type": "c", "major": 10, "minor": 232},
        {"path": "/dev/fuse", "type": "c", "major": 10, "minor": 229},
        {"path": "/dev/sda", "type": "b", "major": 8, "minor": 0}
    ]);
    let with_rules = |rules: Value| {
        let mut spec = spec.clone();
        spec["linux"]["resources"]["devices"] = rules;
        load(&spec)
    };
    let (all, none) = (json!({"allow": true, "access": "rwm"}), json!({"allow": false, "access": "rwm"}));
    let one = json!({"allow": true, "type": "c", "major": 1, "minor": 3, "access": "rwm"});
    for rules in [json!([all]), json!([none, all, one])] {
        let bundle = with_rules(rules).unwrap();
        let paths: Vec<_> = bundle.container.devices.iter().map(|device| device.path.as_str()).collect();
        assert_eq!(paths, ["/dev/fuse"]);
        assert!(bundle.disks.is_empty());
        assert_eq!(bundle.not_applied, ["linux.devices"]);
    }
    for rules in [json!([all, none]), json!([{"allow": true, "access": "r"}]), json!([one])] {
        let error = with_rules(rules).unwrap_err();
        assert!(
            error.starts_with("linux.devices[0]: not supported: /dev/kvm is a character device"),
            "{error}"
        );
    }
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
