//! `process`.

use oci_spec::runtime::Capability;

use super::*;

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
    let mask = all.iter().fold(0, |mask, capability| mask | crate::spec::process::bit(*capability));
    assert_eq!(mask, (1 << 41) - 1);
    assert_eq!(crate::spec::process::bit(SysAdmin), 1 << 21);
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
fn labels_are_ignored_where_the_configuration_says_so() {
    let error = error_with("/process/apparmorProfile", json!("my-own"));
    for hint in ["\"my-own\"", "--security-opt apparmor=unconfined", "ignore_labels = true", "[compat]"] {
        assert!(error.contains(hint), "{error}");
    }
    let spec = changed("/process/apparmorProfile", json!("my-own"));
    let bundle = load_with(&spec, Compat { ignore_labels: true }).unwrap();
    assert_eq!(bundle.not_applied, ["process.apparmorProfile"]);
    for none in ["", "unconfined"] {
        let spec = changed("/process/apparmorProfile", json!(none));
        assert!(load(&spec).unwrap().not_applied.is_empty());
    }
}

#[test]
fn default_profiles_of_clients_have_no_effect() {
    for profile in DEFAULT_PROFILES {
        let bundle = load(&changed("/process/apparmorProfile", json!(profile))).unwrap();
        assert_eq!(bundle.not_applied, ["process.apparmorProfile"], "{profile}");
        let exec = json!({"user": {}, "args": ["ls"], "cwd": "/", "apparmorProfile": profile}).to_string();
        let (_, not_applied) = exec_process(exec.as_bytes(), &Compat::default()).unwrap();
        assert_eq!(not_applied, ["process.apparmorProfile"], "{profile}");
    }
    let error = error_with("/process/apparmorProfile", json!("docker-default-2"));
    assert!(error.starts_with("process.apparmorProfile: not supported: "), "{error}");
}

#[test]
fn a_variable_is_there_once() {
    let mut spec = ctr_spec();
    spec["process"]["env"] = json!(["A=1", "PATH=/bin", "A=2=3", "B=", "A=4"]);
    let process = load(&spec).unwrap().container.process.unwrap();
    assert_eq!(process.env, ["A=4", "PATH=/bin", "B="]);
    for wrong in ["A", "=x", ""] {
        spec["process"]["env"] = json!(["B=1", wrong]);
        let error = load(&spec).unwrap_err().to_string();
        assert_eq!(error, format!("process.env[1]: must be NAME=VALUE, is {wrong:?}"));
    }
}
