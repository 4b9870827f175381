use std::path::Path;

use oci_spec::runtime::Capability;
use rvm_protocol::agent::NamespaceType;
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
    Bundle::parse(Path::new("/bundle"), "web", spec.to_string().as_bytes()).map_err(|error| error.to_string())
}

/// The error of the spec with `value` at the JSON pointer `at`.
fn error_with(at: &str, value: Value) -> String {
    let mut spec = ctr_spec();
    let (parent, key) = at.rsplit_once('/').unwrap();
    match spec.pointer_mut(parent).unwrap() {
        Value::Object(object) => drop(object.insert(key.into(), value)),
        Value::Array(array) => array[key.parse::<usize>().unwrap()] = value,
        other => panic!("{other}"),
    }
    load(&spec).unwrap_err()
}

#[test]
fn what_ctr_writes_goes_through() {
    let bundle = load(&ctr_spec()).unwrap();
    assert_eq!(bundle.root, Path::new("/bundle/rootfs"));
    assert_eq!(bundle.not_applied, ["linux.resources.cpu.shares", "linux.resources.devices"]);
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
        ("/hooks", json!({"prestart": [{"path": "/bin/true"}]}), "hooks.prestart"),
        ("/vm", json!({"kernel": {"path": "/k"}}), "vm"),
        ("/process/ioPriority", json!({"class": "IOPRIO_CLASS_RT", "priority": 1}), "process.ioPriority"),
        ("/linux/namespaces/0", json!({"type": "user"}), "linux.namespaces[0]"),
        ("/linux/namespaces/0", json!({"type": "pid", "path": "/proc/1/ns/pid"}), "linux.namespaces[0].path"),
        ("/linux/namespaces/4", json!({"type": "user"}), "linux.namespaces[4]"),
        ("/linux/uidMappings", json!([{"hostID": 1, "containerID": 0, "size": 1}]), "linux.uidMappings"),
        ("/linux/resources/memory", json!({"limit": 1048576}), "linux.resources.memory.limit"),
        ("/linux/resources/pids", json!({"limit": 10}), "linux.resources.pids.limit"),
        ("/linux/resources/unified", json!({"memory.high": "1"}), "linux.resources.unified"),
        ("/linux/devices", json!([{"path": "/dev/sda", "type": "b", "major": 8}]), "linux.devices[0]"),
        (
            "/mounts/0",
            json!({"destination": "/x", "type": "tmpfs", "uidMappings": [{"size": 1}]}),
            "mounts[0].uidMappings",
        ),
    ] {
        let error = error_with(at, value);
        assert!(error.starts_with(&format!("{field}: not supported: ")), "at {at}: {error}");
    }
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
    let error = Bundle::parse(Path::new("/b"), "web", b"not json").unwrap_err().to_string();
    assert!(error.starts_with("config.json: "), "{error}");
    assert!(!error.contains('\n'));
    let error = Bundle::load(Path::new("/nonexistent"), "web").unwrap_err().to_string();
    assert_eq!(error, "/nonexistent/config.json: No such file or directory (os error 2)");
}

#[test]
fn seccomp_is_listed_and_not_lost() {
    let mut spec = ctr_spec();
    spec["linux"]["seccomp"] = json!({"defaultAction": "SCMP_ACT_ERRNO"});
    spec["process"]["apparmorProfile"] = json!("docker-default");
    let bundle = load(&spec).unwrap();
    assert!(bundle.not_applied.contains(&"linux.seccomp".into()));
    assert!(bundle.not_applied.contains(&"process.apparmorProfile".into()));
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
fn an_exec_is_a_process() {
    let (process, _) = exec_process(br#"{"user": {"uid": 7}, "args": ["ls"], "cwd": "/"}"#).unwrap();
    assert_eq!((process.args.len(), process.user.uid, process.capabilities.bounding), (1, 7, 0));
    let error = exec_process(br#"{"user": {}, "args": ["ls"], "cwd": "tmp"}"#).unwrap_err().to_string();
    assert_eq!(error, "process.cwd: must be an absolute path, is \"tmp\"");
}
