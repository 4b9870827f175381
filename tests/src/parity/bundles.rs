//! The bundles: what is asked for in each, and what of the probe is run in it.

use std::fs;

use anyhow::{Result, ensure};
use serde_json::{Value, json};

use super::place::{PROBE, Place, push};
use crate::{job::Input, scale, task::Shim};

/// One bundle.
pub struct Bundle {
    /// Its name, without dots: keys begin with it.
    pub name: &'static str,
    /// Runs it and returns what its probes printed.
    pub run: fn(&Place<'_>) -> Result<String>,
}

/// Every bundle.
pub const ALL: &[Bundle] = &[
    Bundle { name: "default", run: default },
    Bundle { name: "user", run: user },
    Bundle { name: "privileged", run: privileged },
    Bundle { name: "mounts", run: mounts },
    Bundle { name: "minimal", run: minimal },
    Bundle { name: "terminal", run: terminal },
    Bundle { name: "limits", run: limits },
    Bundle { name: "seccomp", run: seccomp },
    Bundle { name: "seccomp-default", run: seccomp_default },
    Bundle { name: "user-namespace", run: user_namespace },
    Bundle { name: "hooks", run: hooks },
    Bundle { name: "exec", run: exec },
    Bundle { name: "network", run: super::network::run },
];

/// What `ctr run` makes of an image.
fn default(place: &Place<'_>) -> Result<String> {
    of_image(place, &[])
}

/// The same with containerd's default seccomp profile.
fn seccomp_default(place: &Place<'_>) -> Result<String> {
    of_image(place, &["--seccomp"])
}

/// `ctr run` of the image, the probe mounted into it.
fn of_image(place: &Place<'_>, options: &[&str]) -> Result<String> {
    let mount = format!("type=bind,src={},dst=/probe,options=rbind:ro", place.path("root/bin"));
    let run = place.container().with(&["--mount", &mount, "--env", "COLOUR=dark blue"]).with(options);
    let job = run.start(&["/probe/rvm-probe"], Input::Nothing)?;
    Ok(job.finish(scale::container() * 2)?.success()?.text())
}

/// An ordinary user with one capability.
fn user(place: &Place<'_>) -> Result<String> {
    let mut spec = place.spec(&[])?;
    let process = &mut spec["process"];
    process["user"] = json!({ "uid": 1000, "gid": 1000, "umask": 0o027, "additionalGids": [7, 2000] });
    process["noNewPrivileges"] = false.into();
    process["cwd"] = "/tmp".into();
    let one = json!(["CAP_NET_BIND_SERVICE"]);
    process["capabilities"] = json!({ "bounding": ["CAP_NET_BIND_SERVICE", "CAP_NET_RAW"], "effective": one, "permitted": one,
                "inheritable": one, "ambient": one });
    process["oomScoreAdj"] = 300.into();
    spec["linux"]["sysctl"] = json!({ "net.ipv4.ip_unprivileged_port_start": "1024" });
    place.run(&spec)
}

/// Every capability, every device, nothing masked.
fn privileged(place: &Place<'_>) -> Result<String> {
    let mut spec = place.spec(&[])?;
    let all = all_capabilities();
    spec["process"]["capabilities"] =
        json!({ "bounding": all, "effective": all, "permitted": all, "inheritable": all });
    spec["process"]["noNewPrivileges"] = false.into();
    spec["process"]["oomScoreAdj"] = (-500).into();
    spec["linux"]["maskedPaths"] = json!([]);
    spec["linux"]["readonlyPaths"] = json!([]);
    spec["linux"]["resources"]["devices"] = json!([{ "allow": true, "access": "rwm" }]);
    for mount in spec["mounts"].as_array_mut().into_iter().flatten() {
        if let Some(options) = mount["options"].as_array_mut() {
            options.retain(|option| option != "ro");
        }
    }
    place.run(&spec)
}

/// A read-only root with every kind of mount over it; sysctls, limits and devices as well.
fn mounts(place: &Place<'_>) -> Result<String> {
    let mut spec = place.spec(&[])?;
    spec["root"]["readonly"] = true.into();
    spec["linux"]["rootfsPropagation"] = "slave".into();
    let mount = |destination: &str, kind: &str, source: &str, options: &[&str]| json!({ "destination": destination, "type": kind, "source": source, "options": options });
    let all = &mut spec["mounts"];
    for mount in [
        mount("/tmp", "tmpfs", "tmpfs", &["nosuid", "nodev", "size=8m", "mode=1770", "uid=5", "gid=6"]),
        mount("/data", "bind", &place.path("data"), &["rbind", "ro"]),
        mount("/volume", "bind", &place.path("volume"), &["rbind", "rw", "nosuid"]),
        mount("/volume/below", "bind", &place.path("data"), &["bind", "ro", "noexec"]),
        mount("/single", "bind", &place.path("single"), &["bind", "ro"]),
        mount("/nested", "tmpfs", "inner", &["size=1m", "mode=755"]),
        mount("/nested/deep/er", "tmpfs", "innermost", &["size=1m", "ro"]),
        mount("/noexec", "bind", &place.path("root/bin"), &["bind", "noexec", "nodev"]),
        mount("/nosuid", "bind", &place.path("root/bin"), &["bind", "nosuid", "noatime"]),
        mount("/shared", "tmpfs", "shared", &["size=1m", "rshared"]),
        mount("/slave", "tmpfs", "slave", &["size=1m", "rslave"]),
        mount("/unbindable", "tmpfs", "unbindable", &["size=1m", "unbindable"]),
        mount("/etc/hosts", "bind", &place.path("single"), &["rbind", "rprivate", "rw"]),
    ] {
        push(all, mount);
    }
    for mount in all.as_array_mut().into_iter().flatten() {
        if mount["destination"] == "/dev/shm" {
            mount["options"] = json!(["nosuid", "noexec", "nodev", "mode=1777", "size=1024k"]);
        }
    }
    spec["linux"]["sysctl"] = json!({
        "kernel.msgmax": "4096",
        "kernel.shm_rmid_forced": "1",
        "kernel.sem": "100 3200 32 64",
        "fs.mqueue.msg_max": "5",
        "net.ipv4.ip_forward": "1",
        "net.ipv4.ping_group_range": "0 100",
        "net.core.somaxconn": "99",
    });
    spec["process"]["rlimits"] = json!([
        { "type": "RLIMIT_NOFILE", "soft": 512, "hard": 2048 },
        { "type": "RLIMIT_CORE", "soft": 0, "hard": 0 },
        { "type": "RLIMIT_CPU", "soft": 1000, "hard": 2000 },
        { "type": "RLIMIT_DATA", "soft": 1_073_741_824u64, "hard": 2_147_483_648u64 },
        { "type": "RLIMIT_FSIZE", "soft": 1_000_000_000u64, "hard": u64::MAX },
        { "type": "RLIMIT_MEMLOCK", "soft": 65536, "hard": 131_072 },
        { "type": "RLIMIT_MSGQUEUE", "soft": 100_000, "hard": 200_000 },
        { "type": "RLIMIT_NICE", "soft": 1, "hard": 2 },
        { "type": "RLIMIT_NPROC", "soft": 400, "hard": 500 },
        { "type": "RLIMIT_RTPRIO", "soft": 1, "hard": 2 },
        { "type": "RLIMIT_SIGPENDING", "soft": 100, "hard": 200 },
        { "type": "RLIMIT_STACK", "soft": 4_194_304, "hard": 16_777_216 },
    ]);
    spec["linux"]["devices"] = json!([
        { "path": "/dev/fuse", "type": "c", "major": 10, "minor": 229, "fileMode": 0o640, "uid": 3, "gid": 4 },
        { "path": "/dev/net/tun", "type": "c", "major": 10, "minor": 200, "fileMode": 0o666 },
        { "path": "/dev/pipe", "type": "p", "fileMode": 0o622 },
    ]);
    push(
        &mut spec["linux"]["resources"]["devices"],
        json!({ "allow": true, "type": "c", "major": 10, "minor": 229, "access": "rwm" }),
    );
    push(
        &mut spec["linux"]["resources"]["devices"],
        json!({ "allow": false, "type": "c", "major": 1, "minor": 5, "access": "w" }),
    );
    place.run(&spec)
}

/// The least a specification can say.
fn minimal(place: &Place<'_>) -> Result<String> {
    let spec = json!({
        "ociVersion": "1.0.2",
        "root": { "path": place.path("root") },
        "process": { "args": [PROBE], "cwd": "/", "env": [] },
        "mounts": [{ "destination": "/proc", "type": "proc", "source": "proc" }],
        "linux": {
            "cgroupsPath": format!("/default/{}", place.id()),
            "namespaces": [{ "type": "mount" }, { "type": "pid" }, { "type": "network" }],
        },
    });
    place.run(&spec)
}

/// A terminal of a size of its own.
fn terminal(place: &Place<'_>) -> Result<String> {
    let mut spec = place.spec(&["process", "terminal", "files"])?;
    spec["process"]["terminal"] = true.into();
    spec["process"]["consoleSize"] = json!({ "width": 91, "height": 33 });
    spec["process"]["user"] = json!({ "uid": 1000, "gid": 1000 });
    // ctr resizes to its own terminal's size when it has one.
    place.run_with(&spec, &["--tty"], Input::Terminal(91, 33))
}

/// Every limit of a cgroup, in the terms of the specification.
fn limits(place: &Place<'_>) -> Result<String> {
    let mut spec = place.spec(&["process", "kernel", "attempts"])?;
    let resources = &mut spec["linux"]["resources"];
    resources["memory"] = json!({
        "limit": 256 << 20, "reservation": 64 << 20, "swap": 300 << 20, "disableOOMKiller": false,
    });
    resources["cpu"] = json!({ "shares": 512, "quota": 50_000, "period": 100_000, "cpus": "0", "mems": "0" });
    resources["pids"] = json!({ "limit": 40 });
    resources["hugepageLimits"] = json!([{ "pageSize": "2MB", "limit": 4 << 20 }]);
    resources["unified"] = json!({ "memory.high": "209715200", "cgroup.max.depth": "3" });
    place.run(&spec)
}

/// A profile of every action, with arguments compared.
fn seccomp(place: &Place<'_>) -> Result<String> {
    let mut spec = place.spec(&["process", "attempts"])?;
    spec["linux"]["seccomp"] = json!({
        "defaultAction": "SCMP_ACT_ALLOW",
        "architectures": ["SCMP_ARCH_X86_64", "SCMP_ARCH_X86", "SCMP_ARCH_X32"],
        "syscalls": [
            { "names": ["fanotify_init"], "action": "SCMP_ACT_ERRNO", "errnoRet": 28 },
            { "names": ["memfd_create"], "action": "SCMP_ACT_ERRNO" },
            { "names": ["swapoff"], "action": "SCMP_ACT_KILL_PROCESS" },
            { "names": ["swapon"], "action": "SCMP_ACT_KILL" },
            { "names": ["acct"], "action": "SCMP_ACT_TRAP" },
            { "names": ["syslog"], "action": "SCMP_ACT_LOG" },
            { "names": ["no_such_call_of_any_kernel"], "action": "SCMP_ACT_ERRNO" },
            { "names": ["personality"], "action": "SCMP_ACT_ERRNO", "errnoRet": 95,
              "args": [{ "index": 0, "value": 8, "op": "SCMP_CMP_EQ" }] },
            { "names": ["socket"], "action": "SCMP_ACT_ERRNO", "errnoRet": 97,
              "args": [{ "index": 0, "value": 38, "op": "SCMP_CMP_EQ" }] },
            { "names": ["socket"], "action": "SCMP_ACT_ERRNO", "errnoRet": 93,
              "args": [{ "index": 0, "value": 16, "op": "SCMP_CMP_EQ" },
                       { "index": 2, "value": 9, "op": "SCMP_CMP_GE" }] },
            { "names": ["unshare"], "action": "SCMP_ACT_ERRNO", "errnoRet": 1,
              "args": [{ "index": 0, "value": 0x1000_0000, "valueTwo": 0x1000_0000, "op": "SCMP_CMP_MASKED_EQ" }] },
            { "names": ["setpriority"], "action": "SCMP_ACT_ERRNO", "errnoRet": 11,
              "args": [{ "index": 2, "value": 0, "op": "SCMP_CMP_GT" }] },
            { "names": ["ioprio_set"], "action": "SCMP_ACT_ERRNO", "errnoRet": 12,
              "args": [{ "index": 2, "value": 16384, "op": "SCMP_CMP_LT" }] },
        ],
    });
    spec["process"]["noNewPrivileges"] = false.into();
    place.run(&spec)
}

/// Root inside is an ordinary user outside.
fn user_namespace(place: &Place<'_>) -> Result<String> {
    place.give_root_to(100_000, 100_000)?;
    let mut spec = place.spec(&[])?;
    push(&mut spec["linux"]["namespaces"], json!({ "type": "user" }));
    let mapping = json!([{ "containerID": 0, "hostID": 100_000, "size": 65536 }]);
    spec["linux"]["uidMappings"] = mapping.clone();
    spec["linux"]["gidMappings"] = mapping;
    spec["process"]["user"] = json!({ "uid": 0, "gid": 0, "additionalGids": [10] });
    place.run(&spec)
}

/// Each kind of hook writes down what it sees, and the program that it ran.
fn hooks(place: &Place<'_>) -> Result<String> {
    let mut spec = place.spec(&["seen", "process", "/out/seen"])?;
    push(
        &mut spec["mounts"],
        json!({ "destination": "/out", "type": "bind", "source": place.path("out"), "options": ["rbind", "rw"] }),
    );
    spec["annotations"] = json!({ "example.org/colour": "dark blue" });
    let host = |name: &str| {
        json!([{
            "path": place.path("root/bin/rvm-probe"),
            "args": ["probe", "hook", name, place.path("out/seen")],
            "env": [format!("HOOK={name}")],
            "timeout": 60,
        }])
    };
    spec["hooks"] = json!({
        "prestart": host("prestart"),
        "createRuntime": host("createRuntime"),
        "startContainer": [{
            "path": PROBE,
            "args": ["probe", "hook", "startContainer", "/out/seen"],
            "env": ["HOOK=startContainer"],
        }],
        "poststart": host("poststart"),
        "poststop": host("poststop"),
    });
    place.run(&spec)?;
    let seen = fs::read_to_string(place.file("out/seen"))?;
    // The order of the hooks is a fact of its own; a file's name in the bundle is not.
    let mut order = Vec::new();
    for line in seen.lines() {
        if let Some((name, _)) = line.split_once(".args = ") {
            order.push(name);
        }
    }
    // A hook's state holds the process id of whoever it is called for.
    let seen = seen.lines().map(|line| without_pid(line) + "\n").collect::<String>();
    Ok(format!("{seen}order = {}\n", order.join(" ")))
}

/// Sorts the state's fields and hides which process id it was, not whether there was one.
fn without_pid(line: &str) -> String {
    let Some((key, text)) = line.split_once(".state = ") else { return line.to_owned() };
    let Ok(mut state) = serde_json::from_str::<Value>(text) else { return line.to_owned() };
    if let Some(pid) = state.get_mut("pid") {
        *pid = if pid.as_i64().is_some_and(|pid| pid > 0) { "a pid".into() } else { pid.take() };
    }
    format!("{key}.state = {state}")
}

/// Added processes: as `ctr` asks for them, and with specifications of their own.
fn exec(place: &Place<'_>) -> Result<String> {
    let mut spec = place.spec(&["hold"])?;
    spec["process"]["capabilities"] = json!({ "bounding": ["CAP_CHOWN", "CAP_NET_RAW"], "effective": ["CAP_CHOWN"],
        "permitted": ["CAP_CHOWN"] });
    spec["process"]["env"] = json!(["PATH=/bin", "FROM=container"]);
    place.start(&spec)?;
    let result = execs(place);
    place.stop()?;
    result
}

fn execs(place: &Place<'_>) -> Result<String> {
    let mut text = String::new();
    let mut add = |name: &str, output: &str| {
        for line in output.lines() {
            text += &format!("{name}/{line}\n");
        }
    };
    let sections = [PROBE, "process", "terminal", "kernel", "mounts", "attempts"];
    let output = place
        .ctr()
        .exec(place.id(), &["--cwd", "/etc"], &sections, Input::Nothing)?
        .finish(scale::container() * 2)?
        .success()?;
    add("ctr", &output.text());

    let shim = Shim::of(place.id())?;
    let run = |name: &str, process: Value| -> Result<String> {
        let executed = shim.exec(name, &process, &place.file("out"))?;
        ensure!(executed.code == 0, "{name}: {executed:?}");
        Ok(executed.output)
    };
    let args = json!([PROBE, "process", "terminal"]);
    let plain = json!({ "args": args, "cwd": "/", "env": ["PATH=/bin"], "user": { "uid": 0, "gid": 0 } });
    let with = |changes: Value| {
        let mut process = plain.clone();
        if let (Some(process), Value::Object(changes)) = (process.as_object_mut(), changes) {
            process.extend(changes);
        }
        process
    };
    // Nothing of the container's first process is inherited.
    add("plain", &run("plain", plain.clone())?);
    let user = json!({ "uid": 1000, "gid": 1001, "additionalGids": [5, 6], "umask": 0o77 });
    add(
        "user",
        &run("user", with(json!({ "user": user, "cwd": "/tmp", "env": ["PATH=/bin", "A=1", "B="] })))?,
    );
    let raw = json!(["CAP_NET_RAW"]);
    let capabilities =
        json!({ "bounding": raw, "effective": raw, "permitted": raw, "inheritable": raw, "ambient": raw });
    add(
        "capabilities",
        &run(
            "capabilities",
            with(json!({
                "capabilities": capabilities,
                "user": { "uid": 1000, "gid": 1000 },
                "noNewPrivileges": true,
                "rlimits": [{ "type": "RLIMIT_NOFILE", "soft": 77, "hard": 78 }],
                "oomScoreAdj": 500,
            })),
        )?,
    );
    add(
        "terminal",
        &run("terminal", with(json!({ "terminal": true, "consoleSize": { "width": 61, "height": 17 } })))?,
    );
    Ok(text)
}

fn all_capabilities() -> Vec<String> {
    const NAMES: [&str; 41] = [
        "CHOWN",
        "DAC_OVERRIDE",
        "DAC_READ_SEARCH",
        "FOWNER",
        "FSETID",
        "KILL",
        "SETGID",
        "SETUID",
        "SETPCAP",
        "LINUX_IMMUTABLE",
        "NET_BIND_SERVICE",
        "NET_BROADCAST",
        "NET_ADMIN",
        "NET_RAW",
        "IPC_LOCK",
        "IPC_OWNER",
        "SYS_MODULE",
        "SYS_RAWIO",
        "SYS_CHROOT",
        "SYS_PTRACE",
        "SYS_PACCT",
        "SYS_ADMIN",
        "SYS_BOOT",
        "SYS_NICE",
        "SYS_RESOURCE",
        "SYS_TIME",
        "SYS_TTY_CONFIG",
        "MKNOD",
        "LEASE",
        "AUDIT_WRITE",
        "AUDIT_CONTROL",
        "SETFCAP",
        "MAC_OVERRIDE",
        "MAC_ADMIN",
        "SYSLOG",
        "WAKE_ALARM",
        "BLOCK_SUSPEND",
        "AUDIT_READ",
        "PERFMON",
        "BPF",
        "CHECKPOINT_RESTORE",
    ];
    NAMES.iter().map(|name| format!("CAP_{name}")).collect()
}
