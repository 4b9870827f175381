//! Broken specifications: each gives one clear error that names the field, soon,
//! and leaves nothing behind. Under runc the same table shows that nothing is
//! refused that runc accepts.

use std::{os::unix::fs::symlink, path::Path, time::Duration};

use anyhow::{Context, Result, bail, ensure};
use rvm_tests::{
    bundle::{Bundle, spec},
    case,
    job::Finished,
    scale,
    world::World,
};
use serde_json::{Value, json};

/// A specification with one thing wrong.
struct Broken {
    /// JSON pointer of what is replaced; a key that is not there is added.
    at: &'static str,
    /// By what; none: it is removed.
    value: Option<Value>,
    /// What the error says.
    words: &'static [&'static str],
    /// What runc does with it.
    runc: Runc,
}

#[derive(Clone, Copy, PartialEq)]
enum Runc {
    Refuses,
    /// It runs the container: with the reason why rvm does not.
    Accepts(&'static str),
}
use Runc::{Accepts, Refuses};

const HOST_KERNEL: &str = "it means the host's kernel";
const STRICTER: &str = "runc drops or misreads it in silence";
const UNCHECKED: &str = "runc 1.1 does not look where a tmpfs goes";

fn broken(at: &'static str, value: Value, words: &'static [&'static str], runc: Runc) -> Broken {
    Broken { at, value: Some(value), words, runc }
}

fn without(at: &'static str, words: &'static [&'static str], runc: Runc) -> Broken {
    Broken { at, value: None, words, runc }
}

/// A container that runs `true`.
fn good(rootfs: &Path) -> Value {
    spec(rootfs, &["/bin/true", "argument"])
}

fn of_the_process() -> Vec<Broken> {
    vec![
        without("/process", &["process", "missing"], Refuses),
        without("/process/args", &["process.args", "missing"], Refuses),
        broken("/process/args", json!("true"), &["process.args", "expected a sequence"], Refuses),
        broken("/process/args/1", json!(7), &["process.args[1]", "expected a string"], Refuses),
        broken("/process/args/1", json!("a\0b"), &["process.args[1]", "NUL"], Refuses),
        broken("/process/env/0", json!("A=\0"), &["process.env[0]", "NUL"], Refuses),
        broken("/process/env/0", json!("PATH"), &["process.env[0]", "NAME=VALUE"], Refuses),
        broken("/process/cwd", json!("tmp"), &["process.cwd", "absolute"], Refuses),
        without("/process/cwd", &["process", "cwd"], Refuses),
        broken("/process/user/uid", json!(-1), &["process.user.uid"], Refuses),
        broken("/process/user/gid", json!("root"), &["process.user.gid"], Refuses),
        broken(
            "/process/capabilities/bounding/0",
            json!("CAP_FLY"),
            &["process.capabilities.bounding[0]"],
            Accepts(STRICTER),
        ),
        broken("/process/rlimits/0/type", json!("RLIMIT_FUN"), &["process.rlimits[0].type"], Refuses),
        broken("/process/rlimits/0/soft", json!(2048), &["process.rlimits[0]", "above hard"], Refuses),
        broken("/process/rlimits/0/hard", json!(-1), &["process.rlimits[0].hard"], Refuses),
        broken("/process/oomScoreAdj", json!(5000), &["process.oomScoreAdj", "-1000 to 1000"], Refuses),
        broken(
            "/process/consoleSize",
            json!({"height": -1, "width": 80}),
            &["process.consoleSize.height"],
            Refuses,
        ),
        broken(
            "/process/ioPriority",
            json!({"class": "IOPRIO_CLASS_FAST"}),
            &["process.ioPriority.class"],
            Accepts(STRICTER),
        ),
        broken(
            "/process/scheduler",
            json!({"policy": "SCHED_FAST"}),
            &["process.scheduler.policy"],
            Accepts(STRICTER),
        ),
    ]
}

fn of_namespaces() -> Vec<Broken> {
    let user = |uids: Value| {
        json!({"namespaces": [{"type": "mount"}, {"type": "network"}, {"type": "uts"}, {"type": "user"}],
            "uidMappings": uids, "gidMappings": [{"hostID": 0, "containerID": 0, "size": 1}]})
    };
    vec![
        broken("/linux/namespaces/0/type", json!("space"), &["linux.namespaces[0].type", "space"], Refuses),
        broken("/linux/namespaces/0/type", json!("ipc"), &["linux.namespaces[1].type", "twice"], Refuses),
        broken("/linux/namespaces", json!([]), &["linux.namespaces", "mount"], Refuses),
        broken(
            "/linux/namespaces",
            json!([{"type": "mount"}, {"type": "network"}, {"type": "pid"}]),
            &["hostname", "\"uts\""],
            Refuses,
        ),
        broken(
            "/linux/namespaces/4/path",
            json!("/proc/1/ns/net"),
            &["linux.namespaces[4].path", "/proc/1/ns/net"],
            Accepts(HOST_KERNEL),
        ),
        broken(
            "/linux/namespaces/1/path",
            json!("/no/such/namespace"),
            &["linux.namespaces[1].path", "/no/such/namespace"],
            Refuses,
        ),
        broken(
            "/linux/uidMappings",
            json!([{"hostID": 0, "containerID": 0, "size": 1}]),
            &["linux.uidMappings", "\"user\" namespace"],
            Accepts(STRICTER),
        ),
        broken("/linux", user(json!([])), &["linux.uidMappings", "must map id 0"], Refuses),
        broken(
            "/linux",
            user(
                json!([{"hostID": 0, "containerID": 0, "size": 2}, {"hostID": 9, "containerID": 1, "size": 1}]),
            ),
            &["linux.uidMappings[1].containerID", "another entry"],
            Refuses,
        ),
        broken(
            "/linux/timeOffsets",
            json!({"monotonic": {"secs": 1}}),
            &["linux.timeOffsets", "\"time\" namespace"],
            Accepts(STRICTER),
        ),
    ]
}

fn of_limits() -> Vec<Broken> {
    let resources = |name: &'static str| -> &'static str {
        match name {
            "memory" => "/linux/resources/memory",
            "cpu" => "/linux/resources/cpu",
            "pids" => "/linux/resources/pids",
            _ => "/linux/resources/blockIO",
        }
    };
    vec![
        broken(resources("memory"), json!({"limit": -5}), &["linux.resources.memory.limit", "-5"], Refuses),
        broken(
            resources("memory"),
            json!({"limit": 100_000_000, "swap": 50_000_000}),
            &["linux.resources.memory.swap", "below"],
            Refuses,
        ),
        broken(resources("memory"), json!({"swap": 50_000_000}), &["linux.resources.memory.swap"], Refuses),
        broken(resources("memory"), json!({"limit": "1g"}), &["linux.resources.memory.limit"], Refuses),
        broken(resources("cpu"), json!({"cpus": "x-y"}), &["linux.resources.cpu.cpus", "x-y"], Refuses),
        broken(resources("cpu"), json!({"quota": 0.5}), &["linux.resources.cpu.quota"], Refuses),
        broken(resources("pids"), json!({"limit": "many"}), &["linux.resources.pids.limit"], Refuses),
        broken(
            resources("blockIO"),
            json!({"weight": 5}),
            &["linux.resources.blockIO.weight", "10 to 1000"],
            Refuses,
        ),
        broken(
            "/linux/resources/hugepageLimits",
            json!([{"pageSize": "2XB", "limit": 1}]),
            &["linux.resources.hugepageLimits[0].pageSize"],
            Refuses,
        ),
        broken(
            "/linux/resources/unified",
            json!({"../memory.max": "1"}),
            &["linux.resources.unified", "../memory.max"],
            Refuses,
        ),
        broken(
            "/linux/resources/devices/0/access",
            json!("rx"),
            &["linux.resources.devices[0].access", "\"rx\""],
            Accepts(STRICTER),
        ),
        broken("/linux/cgroupsPath", json!("/a/../../b"), &["linux.cgroupsPath", ".."], Accepts(STRICTER)),
    ]
}

fn of_the_rest() -> Vec<Broken> {
    let profile = |syscall: Value| json!({"defaultAction": "SCMP_ACT_ALLOW", "syscalls": [syscall]});
    vec![
        broken("/ociVersion", json!("9.9"), &["ociVersion", "9.9"], Accepts(STRICTER)),
        without("/root", &["root", "missing"], Refuses),
        broken("/root/path", json!("/no/such/rootfs"), &["/no/such/rootfs"], Refuses),
        broken("/root/path", json!("/etc/passwd"), &["/etc/passwd"], Refuses),
        broken(
            "/linux/devices",
            json!([{"path": "/dev/x", "type": "q"}]),
            &["linux.devices[0].type"],
            Refuses,
        ),
        broken(
            "/linux/devices",
            json!([{"path": "dev/x", "type": "c", "major": 1, "minor": 3}]),
            &["linux.devices[0].path", "absolute"],
            Accepts(STRICTER),
        ),
        broken(
            "/linux/maskedPaths",
            json!(["proc/kcore"]),
            &["linux.maskedPaths[0]", "absolute"],
            Accepts(STRICTER),
        ),
        broken("/linux/rootfsPropagation", json!("both"), &["linux.rootfsPropagation", "both"], Refuses),
        broken("/linux/sysctl", json!({"../x": "1"}), &["linux.sysctl", "../x"], Refuses),
        broken(
            "/linux/seccomp",
            json!({"defaultAction": "SCMP_ACT_MAYBE"}),
            &["linux.seccomp.defaultAction"],
            Refuses,
        ),
        broken(
            "/linux/seccomp",
            json!({"defaultAction": "SCMP_ACT_ALLOW", "architectures": ["SCMP_ARCH_PDP11"]}),
            &["linux.seccomp.architectures[0]"],
            Refuses,
        ),
        broken(
            "/linux/seccomp",
            profile(json!({"names": ["read"], "action": "SCMP_ACT_KILL",
                "args": [{"index": 0, "value": 1, "op": "SCMP_CMP_LIKE"}]})),
            &["linux.seccomp.syscalls[0].args[0].op"],
            Refuses,
        ),
        broken(
            "/linux/seccomp",
            profile(json!({"names": ["read"], "action": "SCMP_ACT_KILL",
                "args": [{"index": 6, "value": 1, "op": "SCMP_CMP_EQ"}]})),
            &["linux.seccomp.syscalls[0].args[0].index", "0 to 5"],
            Refuses,
        ),
        broken(
            "/linux/seccomp",
            profile(json!({"names": ["mount"], "action": "SCMP_ACT_NOTIFY"})),
            &["linux.seccomp.syscalls[0].action", "listener"],
            Refuses,
        ),
        broken(
            "/mounts/1",
            json!({"destination": "/x", "type": "bind", "source": "/no/such/source", "options": ["bind"]}),
            &["mounts[1].source", "/no/such/source"],
            Refuses,
        ),
        broken(
            "/mounts/1",
            json!({"destination": "/x", "type": "bind"}),
            &["mounts[1].source", "missing"],
            Refuses,
        ),
        broken("/mounts/1", json!({"type": "tmpfs"}), &["mounts[1]", "destination"], Refuses),
        broken(
            "/mounts/1/type",
            json!("nosuchfs"),
            &["mounts[1].type", "nosuchfs", "guest's kernel"],
            Refuses,
        ),
        broken(
            "/hooks",
            json!({"prestart": [{"path": "bin/true"}]}),
            &["hooks.prestart[0].path", "absolute"],
            Refuses,
        ),
        broken(
            "/hooks",
            json!({"poststop": [{"path": "/bin/true", "timeout": -3}]}),
            &["hooks.poststop[0].timeout", "-3"],
            Accepts(STRICTER),
        ),
        broken(
            "/process/apparmorProfile",
            json!("my-own"),
            &["process.apparmorProfile", "my-own", "ignore_labels"],
            Refuses,
        ),
    ]
}

/// What only the guest can find out: each takes a machine.
fn of_the_guest() -> Vec<Broken> {
    vec![
        broken("/mounts/1/options/0", json!("nosuchoption"), &["mounts[1]", "/dev", "nosuchoption"], Refuses),
        broken("/linux/sysctl", json!({"kernel.no_such_thing": "1"}), &["kernel.no_such_thing"], Refuses),
        // Through a symlink of the root file system, /proc itself would be covered.
        broken(
            "/mounts/1/destination",
            json!("/to-proc/sys"),
            &["mounts[1]", "/to-proc/sys"],
            Accepts(UNCHECKED),
        ),
        broken("/mounts/1/destination", json!("/loop/x"), &["mounts[1]", "/loop/x"], Refuses),
        broken("/process/args", json!(["/bin/no-such-program"]), &["/bin/no-such-program"], Refuses),
        broken(
            "/linux/resources/memory",
            json!({"limit": 4096}),
            &["linux.resources.memory.limit", "too low"],
            Refuses,
        ),
        broken(
            "/hooks",
            json!({"prestart": [{"path": "/no/such/hook"}]}),
            &["hooks.prestart[0]", "/no/such/hook"],
            Refuses,
        ),
    ]
}

/// A bundle with traps in its root file system.
fn trapped(world: &World) -> Result<Bundle> {
    let bundle = Bundle::new(world)?;
    symlink("/proc", bundle.rootfs().join("to-proc"))?;
    symlink("loop", bundle.rootfs().join("loop"))?;
    symlink("../../../../../../../../run/rvm-tests/outside", bundle.rootfs().join("out"))?;
    Ok(bundle)
}

/// The good specification with one thing wrong.
fn spoil(mut spec: Value, broken: &Broken) -> Result<Value> {
    let (parent, key) = broken.at.rsplit_once('/').context("not a JSON pointer")?;
    match spec.pointer_mut(parent).with_context(|| format!("{parent} is not there"))? {
        Value::Object(object) => match &broken.value {
            Some(value) => drop(object.insert(key.to_owned(), value.clone())),
            None => drop(object.remove(key)),
        },
        Value::Array(array) => {
            array[key.parse::<usize>()?] = broken.value.clone().context("nothing to put there")?
        }
        other => bail!("{parent} is {other}"),
    }
    Ok(spec)
}

/// Tries every specification and reports all that are not as they should be.
fn check(world: &World, table: &[Broken], limit: Duration) -> Result<()> {
    let bundle = trapped(world)?;
    let mut wrong = Vec::new();
    for broken in table {
        let spec = spoil(good(bundle.rootfs()), broken)?;
        let finished = bundle.run(world, &serde_json::to_vec(&spec)?)?;
        let what = format!("{} = {}", broken.at, broken.value.as_ref().unwrap_or(&Value::Null));
        println!("{what}\n    {:.2} s: {}", finished.took.as_secs_f64(), finished.errors().trim());
        if let Err(error) = judge(world, broken, &finished, limit) {
            wrong.push(format!("{what}: {error:#}"));
        }
    }
    ensure!(wrong.is_empty(), "{} of {} wrong:\n{}", wrong.len(), table.len(), wrong.join("\n"));
    Ok(())
}

fn judge(world: &World, broken: &Broken, finished: &Finished, limit: Duration) -> Result<()> {
    if !world.stage().is_rvm() {
        let refused = finished.code() != 0;
        match broken.runc {
            Refuses => ensure!(refused, "runc accepts it"),
            Accepts(why) => ensure!(!refused, "runc refuses it, and not: {why}"),
        }
        return Ok(());
    }
    ensure!(finished.code() == 125, "code {}", finished.code());
    let errors = finished.errors();
    ensure!(errors.trim().lines().count() == 1, "more than one line: {errors}");
    for word in broken.words {
        ensure!(errors.contains(word), "does not say {word:?}: {errors}");
    }
    ensure!(finished.stdout.is_empty(), "{finished}");
    ensure!(finished.took < limit, "took {:?}", finished.took);
    Ok(())
}

/// For what is refused before a machine is started.
fn soon() -> Duration {
    scale::seconds(1.0)
}

#[test]
fn process() {
    case(|world| check(world, &of_the_process(), soon()));
}

#[test]
fn namespaces() {
    case(|world| check(world, &of_namespaces(), soon()));
}

#[test]
fn limits() {
    case(|world| check(world, &of_limits(), soon()));
}

#[test]
fn everything_else() {
    case(|world| check(world, &of_the_rest(), soon()));
}

#[test]
fn what_the_guest_finds() {
    case(|world| check(world, &of_the_guest(), scale::container()));
}

/// The table proves nothing unless what is not broken runs.
#[test]
fn unbroken() {
    case(|world| {
        let bundle = trapped(world)?;
        bundle.run(world, &serde_json::to_vec(&good(bundle.rootfs()))?)?.success()?;
        // A symlink that points out of the root file system is followed inside it.
        let mut spec = good(bundle.rootfs());
        spec["mounts"].as_array_mut().context("no mounts")?.push(
            json!({"destination": "/out/x", "type": "tmpfs", "source": "tmpfs", "options": ["size=64k"]}),
        );
        spec["process"]["args"] = json!(["/bin/grep", " /run/rvm-tests/outside/x tmpfs", "/proc/mounts"]);
        bundle.run(world, &serde_json::to_vec(&spec)?)?.success()?;
        ensure!(!Path::new("/run/rvm-tests/outside").exists(), "made on the host");
        Ok(())
    });
}

#[test]
fn no_document_at_all() {
    case(|world| {
        let bundle = trapped(world)?;
        let good = serde_json::to_vec(&good(bundle.rootfs()))?;
        for config in
            [&b""[..], b"not json", b"[]", b"null", &good[..good.len() / 2], &[0xff; 100], &[b'['; 100_000]]
        {
            let finished = bundle.run(world, config)?;
            println!("{finished}");
            ensure!(finished.code() != 0, "{finished}");
            if world.stage().is_rvm() {
                let errors = finished.errors();
                ensure!(errors.trim().lines().count() == 1 && errors.contains("config.json"), "{finished}");
                ensure!(finished.took < soon(), "{finished}");
            }
        }
        Ok(())
    });
}
