//! Whoever dies first: the client learns of it, once, and nothing stays.

use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use rvm_tests::{
    case,
    ctr::remove_clients_fifos,
    host::Process,
    job::{Input, Job},
    sandbox::Sandbox,
    scale,
    task::Shim,
    world::World,
};

#[test]
fn monitor_killed_under_ctr_run() {
    case(|world| {
        let run = world.ctr().container("monitor");
        let job = run.start(&["sh", "-c", "echo ready; sleep 100000"], Input::Open)?;
        job.wait_for("ready", scale::container())?;
        Sandbox::find(world.stage(), &run.id)?.kill_monitor()?;
        let finished = job.finish(scale::container())?.exited(137)?;
        ensure!(finished.text() == "ready\n", "{finished}");
        ensure!(world.events(|events| events.exit_once(&run.id))? == 137, "exit code");
        Ok(())
    });
}

#[test]
fn monitor_killed_and_task_deleted() {
    case(|world| {
        let ctr = world.ctr();
        let (run, sandbox) = Sandbox::sleeping(world, "deleted")?;
        // A second process's waiter is told as well.
        let exec = ctr.exec(&run.id, &[], &["sh", "-c", "echo in; sleep 100000"], Input::Open)?;
        exec.wait_for("in", scale::container())?;
        sandbox.kill_monitor()?;
        world.events(|events| events.wait_for("/tasks/exit", &run.id, scale::container()))?;
        let exec = exec.finish(scale::container())?;
        ensure!(exec.code() != 0, "{exec}");
        ensure!(ctr.task_state(&run.id).as_deref() == Some("STOPPED"), "{:?}", ctr.list(&["task", "ls"]));
        let late = ctr.exec(&run.id, &[], &["true"], Input::Nothing)?.finish(scale::command())?;
        ensure!(late.code() != 0, "exec in a dead sandbox: {late}");
        let deleted = ctr.run(&["task", "delete", &run.id], scale::container())?;
        println!("task delete: {deleted}");
        ctr.run(&["containers", "rm", &run.id], scale::command())?.success()?;
        ensure!(world.events(|events| events.exit_once(&run.id))? == 137, "exit code");
        sandbox.wait_until_gone(scale::command())
    });
}

#[test]
fn shim_killed() {
    case(|world| {
        let ctr = world.ctr();
        let (run, sandbox) = Sandbox::sleeping(world, "shim")?;
        sandbox.kill_shim()?;
        // containerd calls `containerd-shim-rvm-v2 delete`, which must not need the shim.
        sandbox.wait_until_gone(scale::container())?;
        world.events(|events| events.wait_for("/tasks/exit", &run.id, scale::container()))?;
        ensure!(
            ctr.task_state(&run.id).is_none_or(|state| state != "RUNNING"),
            "{:?}",
            ctr.list(&["task", "ls"])
        );
        let _ = ctr.run(&["task", "rm", "-f", &run.id], scale::container())?;
        ctr.run(&["containers", "rm", &run.id], scale::command())?.success()?;
        ensure!(world.events(|events| events.exit_once(&run.id))? == 137, "exit code");
        remove_clients_fifos(&run.id)
    });
}

#[test]
fn shim_and_monitor_killed_together() {
    case(|world| {
        let ctr = world.ctr();
        let (run, sandbox) = Sandbox::sleeping(world, "both")?;
        sandbox.kill_monitor()?;
        sandbox.kill_shim()?;
        world.events(|events| events.wait_for("/tasks/exit", &run.id, scale::container()))?;
        let _ = ctr.run(&["task", "rm", "-f", &run.id], scale::container())?;
        ctr.run(&["containers", "rm", &run.id], scale::command())?.success()?;
        world.events(|events| events.exit_once(&run.id))?;
        remove_clients_fifos(&run.id)
    });
}

fn containerd_restarted(world: &World, signal: Signal) -> Result<()> {
    let ctr = world.ctr();
    let run = ctr.container("restart").detached();
    run.run(&["sh", "-c", "trap 'exit 21' TERM; while :; do sleep 1000 & wait $!; done"])?.success()?;
    let sandbox = Sandbox::find(world.stage(), &run.id)?;
    world.restart_containerd(signal)?;
    ensure!(ctr.task_state(&run.id).as_deref() == Some("RUNNING"), "{:?}", ctr.list(&["task", "ls"]));
    let again = Sandbox::find(world.stage(), &run.id)?;
    ensure!(
        again.shim.pid == sandbox.shim.pid && again.monitor.pid == sandbox.monitor.pid,
        "{sandbox:?} {again:?}"
    );
    let exec = ctr
        .exec(&run.id, &[], &["echo", "still here"], Input::Nothing)?
        .finish(scale::container())?
        .success()?;
    ensure!(exec.text() == "still here\n", "{exec}");
    ctr.run(&["task", "kill", "-s", "SIGTERM", &run.id], scale::command())?.success()?;
    world.events(|events| events.wait_for("/tasks/exit", &run.id, scale::container()))?;
    ensure!(world.events(|events| events.exit_once(&run.id))? == 21, "exit code");
    ctr.remove(&run.id)
}

#[test]
fn containerd_restarted_politely() {
    case(|world| containerd_restarted(world, Signal::SIGTERM));
}

#[test]
fn containerd_killed_and_started_again() {
    case(|world| containerd_restarted(world, Signal::SIGKILL));
}

/// The exit happens while no containerd is there to be told.
#[test]
fn exit_while_containerd_is_away() {
    case(|world| {
        let ctr = world.ctr();
        let run = ctr.container("away").detached();
        // Ends by itself once the file is there.
        run.run(&["sh", "-c", "trap 'exit 22' TERM; while :; do sleep 1000 & wait $!; done"])?.success()?;
        let sandbox = Sandbox::find(world.stage(), &run.id)?;
        world.without_containerd(Signal::SIGKILL, || sandbox.kill_monitor())?;
        let until = Instant::now() + scale::container();
        while ctr.task_state(&run.id).as_deref() == Some("RUNNING") {
            ensure!(Instant::now() < until, "still running: {:?}", ctr.list(&["task", "ls"]));
        }
        let removed = ctr.run(&["task", "rm", &run.id], scale::container())?;
        println!("task rm: {removed}");
        ctr.run(&["containers", "rm", &run.id], scale::command())?.success()?;
        sandbox.wait_until_gone(scale::command())?;
        // `ctr task rm` removes them, but not where containerd 1.7 has removed the task by itself.
        remove_clients_fifos(&run.id)
    });
}

/// The machine's end by the host's kernel is told as what it is.
#[test]
fn killed_by_the_host_for_want_of_memory() {
    case(|world| {
        let (run, sandbox) = Sandbox::sleeping(world, "starved")?;
        let groups = std::fs::read_to_string(format!("/proc/{}/cgroup", sandbox.monitor.pid))?;
        let limit = groups.lines().find_map(|line| {
            let (controllers, path) = line.split_once(':')?.1.split_once(':')?;
            let (root, file) = match controllers {
                "" => ("/sys/fs/cgroup", "memory.max"),
                "memory" => ("/sys/fs/cgroup/memory", "memory.limit_in_bytes"),
                _ => return None,
            };
            Some(format!("{root}{path}/{file}")).filter(|path| std::path::Path::new(path).exists())
        });
        let limit = limit.with_context(|| format!("no memory cgroup in {groups:?}"))?;
        match std::fs::write(&limit, "1048576") {
            // Version 1 takes no limit below what is used, and a little above it the kernel gives back pages of the
            // guest kernel's file again and again instead of killing anybody: it is asked to choose now.
            Err(error) if error.raw_os_error() == Some(libc::EBUSY) => {
                std::fs::write(format!("/proc/{}/oom_score_adj", sandbox.monitor.pid), "1000")?;
                std::fs::write("/proc/sysrq-trigger", "f").context("SysRq")?;
            }
            written => written.with_context(|| limit.clone())?,
        }
        world.events(|events| events.wait_for("/tasks/exit", &run.id, scale::container()))?;
        let events = world.events(|events| events.of(&run.id))?;
        let topics: Vec<&str> = events.iter().map(|event| event.topic.as_str()).collect();
        ensure!(topics[topics.len() - 2..] == ["/tasks/oom", "/tasks/exit"], "{topics:?}");
        world.ctr().remove(&run.id)?;
        ensure!(world.events(|events| events.exit_once(&run.id))? == 137, "exit code");
        remove_clients_fifos(&run.id)
    });
}

/// What runs beside the first process ends with it, and is told before it.
#[test]
fn execs_exit_before_the_container() {
    case(|world| {
        let (run, _) = Sandbox::sleeping(world, "order")?;
        let exec = world.ctr().exec(&run.id, &[], &["sh", "-c", "echo in; sleep 100000"], Input::Open)?;
        exec.wait_for("in", scale::container())?;
        world.end(&run.id)?;
        exec.finish(scale::container())?.exited(137)?;
        let events = world.events(|events| events.of(&run.id))?;
        let exits: Vec<bool> = events
            .iter()
            .filter(|event| event.topic == "/tasks/exit")
            .map(|event| event.text("id") == run.id)
            .collect();
        ensure!(exits == [false, true], "{events:?}");
        remove_clients_fifos(&run.id)
    });
}

/// A guest that stands still does not keep containerd from its task: it lists the
/// first process, as it does of a task that has ended.
#[test]
fn a_task_always_lists_a_process() {
    case(|world| {
        let ctr = world.ctr();
        let (run, sandbox) = Sandbox::sleeping(world, "still")?;
        let monitor = Pid::from_raw(sandbox.monitor.pid);
        let listed = || -> Result<String> {
            let listed = ctr.run(&["task", "ps", &run.id], scale::command())?.success()?.text();
            Ok(listed
                .lines()
                .nth(1)
                .unwrap_or_default()
                .split_whitespace()
                .next()
                .unwrap_or_default()
                .to_owned())
        };
        let running = listed()?;
        kill(monitor, Signal::SIGSTOP)?;
        let still = listed();
        kill(monitor, Signal::SIGCONT)?;
        ensure!(still? == running, "another first process");
        ctr.run(&["task", "kill", "-s", "SIGKILL", &run.id], scale::command())?.success()?;
        world.events(|events| events.wait_for("/tasks/exit", &run.id, scale::container()))?;
        ensure!(listed()? == running, "none after its end");
        ctr.remove(&run.id)
    });
}

/// A shim that is asked to end has the guest write first what belongs on the host.
#[test]
fn a_terminated_shim_loses_nothing() {
    case(|world| {
        world.set_config(
            &world.config().text("scratch", "backing", "block").set("scratch", "size_mib", "64"),
        )?;
        let ctr = world.ctr();
        let run = ctr.container("terminated").detached();
        let script = "if test -e /kept; then cat /kept; else echo kept > /kept; sleep 100000; fi";
        run.run(&["sh", "-c", script])?.success()?;
        let sandbox = Sandbox::find(world.stage(), &run.id)?;
        let written =
            || ctr.exec(&run.id, &[], &["test", "-s", "/kept"], Input::Nothing)?.finish(scale::container());
        let until = Instant::now() + scale::container();
        while written()?.code() != 0 {
            ensure!(Instant::now() < until, "nothing is written");
        }
        kill(Pid::from_raw(sandbox.shim.pid), Signal::SIGTERM)?;
        sandbox.wait_until_gone(scale::container())?;
        let _ = ctr.run(&["task", "rm", "-f", &run.id], scale::container())?;
        let again = ctr.run(&["task", "start", &run.id], scale::container())?.success()?;
        ensure!(again.text() == "kept\n", "{again}");
        ctr.run(&["containers", "rm", &run.id], scale::command())?.success()?;
        remove_clients_fifos(&run.id)
    });
}

/// One that is asked to end while a task is being deleted does that first: what the guest holds
/// reaches the host, however long that takes.
#[test]
fn a_shim_terminated_while_deleting_loses_nothing() {
    case(|world| {
        world.set_config(
            &world.config().text("scratch", "backing", "block").set("scratch", "size_mib", "64"),
        )?;
        let ctr = world.ctr();
        let run = ctr.container("deleting").detached();
        run.run(&[
            "sh",
            "-c",
            "if test -e /kept; then cat /kept; else echo kept > /kept; exec sleep 100000; fi",
        ])?
        .success()?;
        let sandbox = Sandbox::find(world.stage(), &run.id)?;
        let written =
            || ctr.exec(&run.id, &[], &["test", "-s", "/kept"], Input::Nothing)?.finish(scale::container());
        let until = Instant::now() + scale::container();
        while written()?.code() != 0 {
            ensure!(Instant::now() < until, "nothing is written");
        }
        ctr.run(&["task", "kill", "-s", "SIGKILL", &run.id], scale::command())?.success()?;
        world.events(|events| events.wait_for("/tasks/exit", &run.id, scale::container()))?;

        let shim = Shim::of(&run.id)?;
        let signal = |pid: i32, signal| kill(Pid::from_raw(pid), signal);
        signal(sandbox.monitor.pid, Signal::SIGSTOP)?;
        let removal = Job::start(ctr.command(&["task", "rm", &run.id]), Input::Nothing)?;
        // It is struck off first, and ended then.
        while shim
            .update(&serde_json::json!({}))
            .is_err_and(|error| !error.to_string().contains("is not here"))
        {
            ensure!(Instant::now() < until, "it is not being deleted");
        }
        signal(sandbox.shim.pid, Signal::SIGTERM)?;
        let ended = || Process::read(sandbox.shim.pid).is_none_or(|shim| shim.state == 'Z');
        let soon = Instant::now() + scale::seconds(0.1);
        while Instant::now() < soon && !ended() {
            std::thread::sleep(Duration::from_millis(10));
        }
        let early = ended();
        signal(sandbox.monitor.pid, Signal::SIGCONT)?;
        removal.finish(scale::container())?;
        ensure!(!early, "the shim has ended while it deletes");
        sandbox.wait_until_gone(scale::container())?;
        let again = ctr.run(&["task", "start", &run.id], scale::container())?.success()?;
        ensure!(again.text() == "kept\n", "{again}");
        ctr.run(&["containers", "rm", &run.id], scale::command())?.success()?;
        remove_clients_fifos(&run.id)
    });
}

/// `ctr run` itself is killed: its container goes on and can be ended by another.
#[test]
fn client_killed() {
    case(|world| {
        let ctr = world.ctr();
        let run = ctr.container("client").kept();
        let job = run.start(&["sh", "-c", "echo ready; sleep 100000"], Input::Open)?;
        job.wait_for("ready", scale::container())?;
        job.signal(Signal::SIGKILL)?;
        job.finish(scale::command())?;
        ensure!(ctr.task_state(&run.id).as_deref() == Some("RUNNING"), "{:?}", ctr.list(&["task", "ls"]));
        world.end(&run.id)?;
        remove_clients_fifos(&run.id)
    });
}
