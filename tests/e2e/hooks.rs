//! OCI hooks: order, what they are told, and what their failure means.

use std::{
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use anyhow::{Context, Result, ensure};
use nix::sys::signal::Signal;
use rvm_tests::{
    bundle, case,
    ctr::{Run, remove_clients_fifos},
    job::{Finished, Input, Job},
    sandbox::Sandbox,
    scale,
    world::World,
};
use serde_json::{Value, json};

/// A place for what hooks write.
struct Hooks(PathBuf);

impl Hooks {
    fn new(world: &World) -> Result<Self> {
        let dir = world.dir().join("hooks");
        std::fs::create_dir_all(&dir)?;
        Ok(Self(dir))
    }

    /// A hook of the host that keeps its state and notes that it ran.
    fn note(&self, name: &str) -> Value {
        let dir = self.0.display();
        self.script(&format!("cat > {dir}/{name}; echo {name} $COLOUR $PWD >> {dir}/order"), &["COLOUR=red"])
    }

    fn script(&self, script: &str, env: &[&str]) -> Value {
        let env = [&["PATH=/usr/bin:/bin:/usr/sbin:/sbin"], env].concat();
        json!({"path": "/bin/sh", "args": ["sh", "-c", script], "env": env})
    }

    fn order(&self) -> Vec<String> {
        let text = std::fs::read_to_string(self.0.join("order")).unwrap_or_default();
        text.lines().map(str::to_owned).collect()
    }

    fn names(&self) -> Vec<String> {
        self.order().iter().filter_map(|line| line.split(' ').next().map(str::to_owned)).collect()
    }

    fn state(&self, name: &str) -> Result<Value> {
        let text =
            std::fs::read_to_string(self.0.join(name)).with_context(|| format!("{name} did not run"))?;
        serde_json::from_str(&text).with_context(|| format!("{name} was told {text:?}"))
    }
}

impl Drop for Hooks {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

/// A container with hooks, and the file that describes it.
fn container(world: &World, hooks: &Value, args: &[&str]) -> Result<(Run, String)> {
    let mut spec = bundle::spec(&world.rootfs()?, args);
    spec["hooks"] = hooks.clone();
    spec["annotations"] = json!({"colour": "blue"});
    let path = world.write_file("hooks.json", spec.to_string())?;
    Ok((world.ctr().container("hooks").with(&["--config", &path]), path))
}

fn run(world: &World, hooks: &Value, args: &[&str]) -> Result<(String, Finished)> {
    let (run, path) = container(world, hooks, args)?;
    let finished = run.run(&[]);
    std::fs::remove_file(path)?;
    Ok((run.id, finished?))
}

fn refused(finished: &Finished, words: &[&str]) -> Result<()> {
    println!("{finished}");
    ensure!(finished.code() != 0 && finished.stdout.is_empty(), "not refused: {finished}");
    for word in words {
        ensure!(finished.errors().contains(word), "the error does not say {word:?}: {finished}");
    }
    Ok(())
}

#[test]
fn order_and_state() {
    case(|world| {
        let hooks = Hooks::new(world)?;
        let mut all = json!({
            "prestart": [hooks.note("prestart")],
            "createRuntime": [hooks.note("createRuntime"), hooks.note("second")],
            "poststart": [hooks.note("poststart")],
            "poststop": [hooks.note("poststop")],
            "startContainer": [{"path": "/bin/sh", "args": ["sh", "-c", "cat > /dev/told"], "timeout": 10}],
        });
        // The network namespace a network hook would look up is not the host's.
        all["createRuntime"][1] = hooks.script(
            &format!(
                "pid=$(sed 's/.*\"pid\": *\\([0-9]*\\).*/\\1/'); readlink /proc/$pid/ns/net > {0}/net; echo second >> {0}/order",
                hooks.0.display()
            ),
            &[],
        );
        let (id, finished) = run(world, &all, &["/bin/cat", "/dev/told"])?;
        let finished = finished.success()?;
        println!("{finished}");
        ensure!(
            hooks.names() == ["prestart", "createRuntime", "second", "poststart", "poststop"],
            "{:?}",
            hooks.order()
        );
        ensure!(hooks.order()[0].starts_with("prestart red /run/containerd/"), "{:?}", hooks.order());
        for (name, status) in
            [("createRuntime", "creating"), ("poststart", "running"), ("poststop", "stopped")]
        {
            let state = hooks.state(name)?;
            println!("{name}: {state}");
            ensure!(state["id"] == *id && state["ociVersion"].is_string(), "{name}: {state}");
            ensure!(state["annotations"]["colour"] == "blue", "{name}: {state}");
            ensure!(state["bundle"].as_str().is_some_and(|bundle| bundle.ends_with(&id)), "{name}: {state}");
            // runc runs poststart hooks while the container is "created".
            ensure!(state["status"] == status || !world.stage().is_rvm(), "{name}: {state}");
        }
        let network = std::fs::read_to_string(hooks.0.join("net"))?;
        let own = std::fs::read_link("/proc/self/ns/net")?;
        ensure!(network.starts_with("net:[") && Path::new(network.trim()) != own, "{network} and {own:?}");
        let told: Value = serde_json::from_slice(&finished.stdout)?;
        ensure!(told["id"] == *id && told["annotations"]["colour"] == "blue", "{told}");
        Ok(())
    });
}

#[test]
fn failures() {
    case(|world| {
        let hooks = Hooks::new(world)?;
        let failing = |kind: &str| {
            let mut all = json!({"poststop": [hooks.note("poststop")]});
            all[kind] = json!([hooks.script("echo boom >&2; exit 3", &[]), hooks.note("next")]);
            all
        };
        for kind in ["prestart", "createRuntime", "poststart"] {
            let (_, finished) = run(world, &failing(kind), &["/bin/sleep", "100000"])?;
            let named = format!("hooks.{kind}[0]: /bin/sh ended with code 3");
            let words: &[&str] = if world.stage().is_rvm() { &[&named, "boom"] } else { &["boom"] };
            refused(&finished, words)?;
            ensure!(hooks.names() == ["poststop"], "{kind}: {:?}", hooks.order());
            std::fs::remove_file(hooks.0.join("order"))?;
        }
        let missing = json!({"createRuntime": [{"path": "/no/such/hook"}]});
        refused(&run(world, &missing, &["/bin/true"])?.1, &["/no/such/hook"])
    });
}

/// Failures of the last hooks do not undo anything.
#[test]
fn failing_poststop() {
    case(|world| {
        let hooks = Hooks::new(world)?;
        let all = json!({"poststop": [hooks.script("exit 3", &[]), hooks.note("next")]});
        let (_, finished) = run(world, &all, &["/bin/echo", "fine"])?;
        ensure!(finished.text() == "fine\n", "{finished}");
        if world.stage().is_rvm() {
            ensure!(finished.code() == 0 && hooks.names() == ["next"], "{finished} {:?}", hooks.order());
        }
        Ok(())
    });
}

/// How many processes have `text` in their command line.
fn processes_with(text: &str) -> usize {
    let own = std::process::id().to_string();
    let entries = std::fs::read_dir("/proc").into_iter().flatten().flatten();
    let others = entries.filter(|entry| entry.file_name().to_string_lossy() != own);
    others
        .filter_map(|entry| std::fs::read(entry.path().join("cmdline")).ok())
        .filter(|line| String::from_utf8_lossy(line).replace('\0', " ").contains(text))
        .count()
}

#[test]
fn a_hook_that_hangs() {
    case(|world| {
        let hooks = Hooks::new(world)?;
        let mut hook = hooks.script("echo waiting; sleep 54321 & sleep 54321; true", &[]);
        hook["timeout"] = json!(1);
        let all = json!({"createRuntime": [hook], "poststop": [hooks.note("poststop")]});
        let (_, finished) = run(world, &all, &["/bin/true"])?;
        if world.stage().is_rvm() {
            refused(&finished, &["hooks.createRuntime[0].timeout", "within 1 s", "waiting"])?;
            ensure!(processes_with("sleep 54321") == 0, "the hook's processes are still there");
        }
        ensure!(hooks.names() == ["poststop"], "{:?}", hooks.order());
        Ok(())
    });
}

#[test]
fn poststop_after_the_shim_was_killed() {
    case(|world| {
        let hooks = Hooks::new(world)?;
        let all = json!({"poststop": [hooks.note("poststop")]});
        let (run, path) = container(world, &all, &["/bin/sleep", "100000"])?;
        let run = run.detached();
        let started = run.start(&[], Input::Nothing)?.finish(scale::container());
        std::fs::remove_file(path)?;
        started?.success()?;
        let sandbox = Sandbox::find(world.stage(), &run.id)?;
        sandbox.kill_shim()?;
        sandbox.wait_until_gone(scale::container())?;
        world.events(|events| events.wait_for("/tasks/exit", &run.id, scale::container()))?;
        let _ = world.ctr().run(&["task", "rm", "-f", &run.id], scale::command());
        world.ctr().run(&["containers", "rm", &run.id], scale::command())?.success()?;
        remove_clients_fifos(&run.id)?;
        ensure!(hooks.names() == ["poststop"], "{:?}", hooks.order());
        Ok(())
    });
}

/// Hooks and loggers are others' programs, which may do all that they may under runc.
#[test]
fn what_programs_of_others_may_do() {
    case(|world| {
        let hooks = Hooks::new(world)?;
        let dir = hooks.0.display();
        let note =
            |name: &str| format!("grep -E '^(Cap|NoNewPrivs|Seccomp)' /proc/self/status > {dir}/{name}");
        let logger =
            world.write_file("logger", format!("#!/bin/sh\n{}; exec 5>&-; cat <&3\n", note("logger")))?;
        std::fs::set_permissions(&logger, std::os::unix::fs::PermissionsExt::from_mode(0o755))?;
        let all = json!({
            "createRuntime": [hooks.script(&note("createRuntime"), &[])],
            "poststop": [hooks.script(&note("poststop"), &[])],
        });
        let mut spec = bundle::spec(&world.rootfs()?, &["/bin/true"]);
        spec["hooks"] = all;
        let config = world.write_file("hooks.json", spec.to_string())?;
        let names = ["createRuntime", "logger", "poststop"];
        let mut seen = Vec::new();
        for ctr in [world.ctr(), world.ctr().under("io.containerd.runc.v2")] {
            let run = ctr.container("others").with(&[
                "--log-uri",
                &format!("binary://{logger}"),
                "--config",
                &config,
            ]);
            run.run(&[])?.success()?;
            let read = |name: &&str| {
                let path = hooks.0.join(name);
                let text = std::fs::read_to_string(&path).with_context(|| format!("{name} did not run"))?;
                std::fs::remove_file(path)?;
                Ok(text)
            };
            seen.push(names.iter().map(read).collect::<Result<Vec<String>>>()?);
        }
        std::fs::remove_file(logger)?;
        std::fs::remove_file(config)?;
        ensure!(seen[0] == seen[1], "rvm:\n{}\nrunc:\n{}", seen[0].join("\n"), seen[1].join("\n"));
        rvm_tests::host::remove_runcs_parent();
        Ok(())
    });
}

/// A shim that is told to end while hooks run lets them come to their end: they ran once.
#[test]
fn a_terminated_shim_lets_hooks_end() {
    case(|world| {
        let hooks = Hooks::new(world)?;
        let dir = hooks.0.display();
        let slow = format!("echo begun >> {dir}/order; sleep 2; echo ended >> {dir}/order");
        let poststop = json!({ "poststop": [hooks.script(&slow, &[])] });
        let (run, path) = container(world, &poststop, &["sleep", "100000"])?;
        let run = run.detached();
        run.run(&[])?.success()?;
        std::fs::remove_file(path)?;
        let sandbox = Sandbox::find(world.stage(), &run.id)?;
        let ctr = world.ctr();
        ctr.run(&["task", "kill", "-s", "SIGKILL", &run.id], scale::command())?.success()?;
        world.events(|events| events.wait_for("/tasks/exit", &run.id, scale::container()))?;
        let removal = Job::start(ctr.command(&["task", "rm", &run.id]), Input::Nothing)?;
        let until = Instant::now() + scale::container();
        while hooks.order().is_empty() {
            ensure!(Instant::now() < until, "no hook runs");
            std::thread::sleep(Duration::from_millis(10));
        }
        nix::sys::signal::kill(nix::unistd::Pid::from_raw(sandbox.shim.pid), Signal::SIGTERM)?;
        removal.finish(scale::container())?.success()?;
        sandbox.wait_until_gone(scale::command())?;
        ctr.run(&["containers", "rm", &run.id], scale::command())?.success()?;
        ensure!(hooks.order() == ["begun", "ended"], "{:?}", hooks.order());
        remove_clients_fifos(&run.id)
    });
}
