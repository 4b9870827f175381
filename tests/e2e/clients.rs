//! What clients other than a plain `ctr run` ask a shim for, and what several
//! containerds do to each other.

use std::path::Path;

use anyhow::{Context, Result, bail, ensure};
use containerd_shim_protos::{api::Status, ttrpc::Code};
use nix::{
    errno::Errno,
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use rvm_tests::{
    bare::Bare,
    bundle::{Bundle, spec},
    case, scale,
    world::{ADDRESS, World, shell},
};

/// ctr sends runc's options with the owner of the streams, and moves the
/// snapshot's files to the mapped owners.
#[test]
fn a_remapped_container() {
    case(|world| {
        let ctr = world.ctr();
        let mapping = ["--uidmap", "0:100000:65536", "--gidmap", "0:100000:65536"];
        let run = ctr.container("remapped").with(&mapping);
        let finished = run.shell(
            "id -u; cat /proc/self/uid_map /proc/self/gid_map | tr -s ' ' ; stat -c '%u:%g' /bin/busybox; \
             touch /new && stat -c '%u:%g' /new; echo through > /dev/stdout",
        );
        let text = finished?.success()?.text();
        let lines: Vec<&str> = text.lines().map(str::trim).collect();
        let expected = ["0", "0 100000 65536", "0 100000 65536", "0:0", "0:0", "through"];
        ensure!(lines == expected, "{lines:?}");
        Ok(())
    });
}

/// A shim of its own with a bundle that runs `args`.
fn bare(world: &World, address: &str, id: &str, args: &[&str]) -> Result<Bare> {
    let mut spec = spec(&world.rootfs()?, args);
    // Nobody writes to the directory the others use.
    spec["root"]["readonly"] = true.into();
    Bare::start(world, address, id, &spec)
}

#[test]
fn runcs_options_are_taken_or_refused_by_field() {
    case(|world| {
        if !world.stage().is_rvm() {
            return Ok(());
        }
        let shim = bare(world, ADDRESS, "options", &["/bin/sleep", "1000"])?;
        let runc = "type.googleapis.com/containerd.runc.v1.Options";
        for (value, words) in [
            (&b"\x32\x04crun"[..], "options.BinaryName: "),
            (b"\x1a\x0c/no/such/one", "options.ShimCgroup: "),
            (b"\x48\x01", "linux.cgroupsPath: must be SLICE:PREFIX:NAME with options.SystemdCgroup"),
        ] {
            let Err(status) = shim.create(Some((runc, value))) else { bail!("{words} was not refused") };
            ensure!(status.message.starts_with(words), "{status:?}");
            // UNIMPLEMENTED makes containerd 2.x create once more for an older shim.
            ensure!(
                [Code::INVALID_ARGUMENT, Code::FAILED_PRECONDITION].contains(&status.code()),
                "{status:?}"
            );
        }
        // ShimCgroup, IoUid, IoGid, NoPivotRoot.
        let cgroup = Path::new("/sys/fs/cgroup/rvm-shims");
        std::fs::create_dir_all(cgroup)?;
        let created = shim.create(Some((runc, b"\x08\x01\x1a\x09rvm-shims\x20\xa0\x8d\x06\x28\xa0\x8d\x06")));
        let own = std::fs::read_to_string(format!("/proc/{}/cgroup", shim.pid()?))?;
        let result = created.map_err(|status| anyhow::anyhow!("{}", status.message)).and_then(|()| {
            ensure!(own.lines().any(|line| line.ends_with(":/rvm-shims")), "{own}");
            shim.end_task()
        });
        shim.shut_down()?;
        std::fs::remove_dir(cgroup)?;
        result
    });
}

/// Where memory is short, a shim goes before its containerd.
#[test]
fn a_shims_oom_score_is_one_above_containerds() {
    case(|world| {
        if !world.stage().is_rvm() {
            return Ok(());
        }
        let score = |pid: &str| -> Result<i32> {
            Ok(std::fs::read_to_string(format!("/proc/{pid}/oom_score_adj"))?.trim().parse()?)
        };
        let shim = bare(world, ADDRESS, "score", &["/bin/true"])?;
        let scores = score("self").and_then(|parents| Ok((parents, score(&shim.pid()?.to_string())?)));
        shim.shut_down()?;
        let (parents, shims) = scores?;
        ensure!(shims == parents + 1, "{shims} after {parents}");
        Ok(())
    });
}

/// What containers were given and what they said stays in memory.
#[test]
fn a_shim_that_crashes_leaves_no_core_file() {
    case(|world| {
        if !world.stage().is_rvm() {
            return Ok(());
        }
        let _pattern = Parameter::set("/proc/sys/kernel/core_pattern", "core.of.%p")?;
        let shim = bare(world, ADDRESS, "core", &["/bin/true"])?;
        let pid = shim.pid()?.cast_signed();
        kill(Pid::from_raw(pid), Signal::SIGABRT)?;
        let until = std::time::Instant::now() + scale::command();
        while rvm_tests::host::Process::read(pid).is_some_and(|shim| shim.state != 'Z') {
            ensure!(std::time::Instant::now() < until, "the shim goes on after SIGABRT");
            std::thread::sleep(std::time::Duration::from_millis(10));
        }
        let core = shim.bundle().join(format!("core.of.{pid}"));
        let dumped = core.exists();
        shim.delete()?.success()?;
        shell(&format!("rm -rf {}", shim.bundle().parent().context("no parent")?.display()))?;
        ensure!(!dumped, "{} was written", core.display());
        Ok(())
    });
}

/// Two containerds may use one id: the second cannot have it, and what it does
/// to clean up is none of the first one's business.
#[test]
fn two_containerds_with_one_id() {
    case(|world| {
        if !world.stage().is_rvm() {
            return Ok(());
        }
        let first = bare(world, ADDRESS, "twin", &["/bin/sleep", "1000"])?;
        first.create(None).map_err(|status| anyhow::anyhow!("{}", status.message))?;
        first.start_task().map_err(|status| anyhow::anyhow!("{}", status.message))?;
        let second = bare(world, "/run/other/containerd.sock", "twin", &["/bin/sleep", "1000"])?;
        let answer = second.create(None);
        let deleted = second.delete();
        let state = first.state();
        first.end_task()?;
        // Its socket is gone with `delete`, as it would be for containerd.
        second.shut_down()?;
        first.shut_down()?;
        let Err(status) = answer else { bail!("both have it") };
        ensure!(status.code() == Code::ALREADY_EXISTS, "{status:?}");
        ensure!(status.message.contains("default/twin"), "{status:?}");
        deleted?.success()?;
        let status = state?.status.enum_value().ok().context("no status")?;
        ensure!(status == Status::RUNNING, "{status:?}");
        Ok(())
    });
}

/// containerd kills a `delete` after five seconds: what takes longer goes on
/// without it.
#[test]
fn a_cleanup_that_takes_longer_than_containerd_waits() {
    case(|world| {
        if !world.stage().is_rvm() {
            return Ok(());
        }
        let told = world.dir().join("poststop");
        let script = format!("#!/bin/sh\nsleep 7\necho done > {}\n", told.display());
        let hook = world.write_file("slow-hook", script)?;
        shell(&format!("chmod 755 {hook}"))?;
        let bundle = Bundle::new(world)?;
        let mut spec = spec(bundle.rootfs(), &["/bin/sleep", "1000"]);
        spec["hooks"]["poststop"] = serde_json::json!([{"path": hook}]);
        let shim = Bare::start(world, ADDRESS, "slow", &spec)?;
        shim.create(None).map_err(|status| anyhow::anyhow!("{}", status.message))?;
        kill(Pid::from_raw(shim.pid()?.cast_signed()), Signal::SIGKILL)?;
        let deleted = shim.delete()?.success()?;
        ensure!(deleted.took < std::time::Duration::from_secs(5), "{deleted}");
        ensure!(deleted.errors().contains("goes on"), "{deleted}");
        ensure!(!Path::new("/run/rvm/default/slow").exists(), "the sandbox's directory is there");
        ensure!(!told.exists(), "the hook was done in time: this shows nothing");
        let until = std::time::Instant::now() + scale::container();
        while !told.exists() {
            ensure!(std::time::Instant::now() < until, "the hook was never done");
            std::thread::sleep(std::time::Duration::from_millis(100));
        }
        std::fs::remove_file(told)?;
        std::fs::remove_file(hook)?;
        shell(&format!("rm -rf {}", shim.bundle().parent().context("no parent")?.display()))?;
        Ok(())
    });
}

/// A parameter of the host's kernel, which is put back when the value goes.
struct Parameter {
    path: &'static str,
    before: String,
}

impl Parameter {
    fn set(path: &'static str, value: &str) -> Result<Self> {
        let before = std::fs::read_to_string(path)?;
        std::fs::write(path, value).with_context(|| format!("setting {path}"))?;
        Ok(Self { path, before })
    }
}

impl Drop for Parameter {
    fn drop(&mut self) {
        let _ = std::fs::write(self.path, &self.before);
    }
}

#[test]
fn what_the_administrator_set_holds_in_the_guest() {
    case(|world| {
        let _set = [
            Parameter::set("/proc/sys/vm/max_map_count", "262144")?,
            Parameter::set("/proc/sys/fs/nr_open", "2097152")?,
            Parameter::set("/proc/sys/fs/inotify/max_user_instances", "1234")?,
            Parameter::set("/proc/sys/kernel/core_pattern", "core.of.%p")?,
        ];
        let script = "cat /proc/sys/vm/max_map_count /proc/sys/fs/nr_open \
                      /proc/sys/fs/inotify/max_user_instances /proc/sys/kernel/core_pattern; ulimit -n";
        let bundle = Bundle::new(world)?;
        let mut spec = spec(bundle.rootfs(), &["/bin/sh", "-c", script]);
        // The host's kernel allows it.
        spec["process"]["rlimits"] =
            serde_json::json!([{"type": "RLIMIT_NOFILE", "hard": 2_097_152, "soft": 2_097_152}]);
        let run = |text: &str| -> Result<String> {
            Ok(bundle
                .run(world, text.as_bytes())?
                .success()?
                .text()
                .split_whitespace()
                .collect::<Vec<_>>()
                .join(" "))
        };
        let text = run(&spec.to_string())?;
        ensure!(text == "262144 2097152 1234 core.of.%p 2097152", "{text}");
        if !world.stage().is_rvm() {
            return Ok(());
        }

        // Others by configuration; one the guest does not have is refused by name.
        spec["process"]["args"] =
            serde_json::json!(["/bin/cat", "/proc/sys/vm/max_map_count", "/proc/sys/vm/swappiness"]);
        spec["process"]["rlimits"] = serde_json::json!([]);
        let _set = Parameter::set("/proc/sys/vm/swappiness", "37")?;
        world.set_config(&world.config().set("guest", "host_sysctls", "['vm.swappiness']"))?;
        let text = run(&spec.to_string())?;
        ensure!(text.ends_with(" 37") && !text.starts_with("262144 "), "{text}");
        world.set_config(&world.config().set("guest", "host_sysctls", "['kernel.sysrq']"))?;
        let refused = bundle.run(world, spec.to_string().as_bytes())?;
        ensure!(refused.code() != 0 && refused.errors().contains("kernel.sysrq"), "{refused}");
        Ok(())
    });
}

/// containerd 2.x asks a shim what it can do before it asks for anything.
#[test]
fn containerd_2_reads_the_features() {
    case(|world| {
        let ctr = world.ctr();
        let version = ctr.run(&["--version"], scale::command())?.success()?.text();
        if version.contains(" 1.") || !world.stage().is_rvm() {
            return Ok(());
        }
        let arguments = ["plugins", "inspect-runtime", "--runtime", "io.rvm.v2"];
        let finished = ctr.run(&arguments, scale::container())?.success()?;
        let info: serde_json::Value = serde_json::from_slice(&finished.stdout)?;
        let features = &info["Features"];
        let has = |list: &serde_json::Value, name: &str| {
            list.as_array().is_some_and(|list| list.iter().any(|item| item == name))
        };
        ensure!(has(&features["mountOptions"], "rro"), "{finished}");
        ensure!(has(&features["linux"]["namespaces"], "user"), "{finished}");
        ensure!(features["linux"]["mountExtensions"]["idmap"]["enabled"] == true, "{finished}");
        Ok(())
    });
}

/// `ctr --env` of a variable the image sets already.
#[test]
fn a_variable_given_twice() {
    case(|world| {
        let run =
            world.ctr().container("twice").with(&["--env", "A=1", "--env", "A=2", "--env", "PATH=/bin"]);
        let text = run.shell("env")?.success()?.text();
        let of = |name: &str| text.lines().filter(|line| line.starts_with(name)).collect::<Vec<_>>();
        ensure!(of("A=") == ["A=2"] && of("PATH=") == ["PATH=/bin"], "{text}");
        Ok(())
    });
}

/// A daemon that was restarted knows of a task what containerd tells it: it kills
/// what will not end by its pid, and looks whether that pid is gone.
#[test]
fn a_task_killed_by_its_pid_after_a_restart() {
    case(|world| {
        let ctr = world.ctr();
        let run = ctr.container("by-pid").detached();
        run.run(&["sleep", "100000"])?.success()?;
        world.restart_containerd(Signal::SIGKILL)?;
        let tasks = ctr.list(&["task", "ls"]);
        let mut words =
            tasks.iter().find_map(|line| line.strip_prefix(&run.id)).context("no task")?.split_whitespace();
        let pid = Pid::from_raw(words.next().context("no pid")?.parse()?);
        kill(pid, Signal::SIGKILL)?;
        world.events(|events| events.wait_for("/tasks/exit", &run.id, scale::container()))?;
        let gone = kill(pid, None);
        ctr.remove(&run.id)?;
        ensure!(gone == Err(Errno::ESRCH), "{pid} is there after its exit was told: {gone:?}");
        Ok(())
    });
}
