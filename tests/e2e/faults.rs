//! Deaths at points that are chosen by a counter: each point that a shim passes from `start` to `delete` is once where it is
//! killed, where its monitor is, and where containerd is.

use std::{path::PathBuf, time::Instant};

use anyhow::{Context, Result, ensure};
use nix::sys::signal::Signal;
use rvm_tests::{
    case,
    ctr::{Ctr, remove_clients_fifos},
    host::Process,
    job::Input,
    sandbox::Sandbox,
    scale,
    world::World,
};

/// Points at the least from the first container's `start` to its `delete`.
const POINTS: usize = 50;

/// To whom it happens.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Victim {
    Shim,
    Monitor,
    Containerd,
}

/// What is planned: the file that the shims' `RVM_FAULT` names, and those beside it.
struct Plan(PathBuf);

impl Plan {
    fn new(world: &World, at: usize, signal: Signal, victim: Victim) -> Result<Self> {
        let plan = Self(world.fault_path());
        let victim = match victim {
            Victim::Shim => "shim".to_owned(),
            Victim::Monitor => "monitor".to_owned(),
            Victim::Containerd => world.containerd_pid().context("no containerd")?.to_string(),
        };
        std::fs::write(&plan.0, format!("{at} {} {victim}", signal as i32))?;
        Ok(plan)
    }

    /// What has been passed, in order.
    fn passed(&self) -> Vec<String> {
        let text = std::fs::read_to_string(self.0.with_extension("passed")).unwrap_or_default();
        text.lines().map(|line| line.trim_end().to_owned()).collect()
    }

    /// Whether it has happened.
    fn is_done(&self) -> bool {
        self.0.with_extension("done").exists()
    }
}

impl Drop for Plan {
    fn drop(&mut self) {
        for path in [self.0.clone(), self.0.with_extension("passed"), self.0.with_extension("done")] {
            let _ = std::fs::remove_file(path);
        }
    }
}

/// What a client does with a container, each step within the time that one may take, and each either done or
/// refused with an error.
fn life(ctr: &Ctr, id: &str, after_each: &dyn Fn() -> Result<()>) -> Result<()> {
    let step = |what: &str, args: &[&str]| -> Result<bool> {
        let began = Instant::now();
        let finished = ctr.run(args, scale::container())?;
        ensure!(finished.code() == 0 || !finished.errors().trim().is_empty(), "{what}: no error: {finished}");
        let errors = finished.errors();
        println!("  {what}: {} after {} ms {}", finished.code(), began.elapsed().as_millis(), errors.trim());
        after_each()?;
        Ok(finished.code() == 0)
    };
    let run = ctr.container("fault").named(id).detached().kept();
    let began = Instant::now();
    let started = run.run(&["sh", "-c", "trap 'exit 9' TERM; while :; do sleep 100000 & wait $!; done"])?;
    println!(
        "  run: {} after {} ms {}",
        started.code(),
        began.elapsed().as_millis(),
        started.errors().trim()
    );
    ensure!(started.code() == 0 || !started.errors().trim().is_empty(), "run: no error: {started}");
    after_each()?;
    let exec = ctr.exec(id, &[], &["echo", "here"], Input::Nothing)?.finish(scale::container())?;
    ensure!(exec.code() != 0 || exec.text() == "here\n", "exec: {exec}");
    println!("  exec: {} {}", exec.code(), exec.errors().trim());
    after_each()?;
    step("pids", &["task", "ps", id])?;
    let kill = ["task", "kill", "-s", "SIGTERM", id];
    let is_running = || ctr.task_state(id).is_some_and(|state| state == "RUNNING");
    if !step("kill", &kill)? && is_running() {
        // It was containerd that did not answer.
        ensure!(step("kill", &kill)? || !is_running(), "a running task cannot be killed");
    }
    let until = Instant::now() + scale::container();
    while is_running() {
        ensure!(Instant::now() < until, "what was killed goes on: {:?}", ctr.list(&["task", "ls"]));
    }
    step("delete", &["task", "delete", id]).map(drop)
}

/// One life with one fault; returns what was passed, and whether it happened.
fn with_fault(world: &World, at: usize, signal: Signal, victim: Victim) -> Result<(Vec<String>, bool)> {
    let ctr = world.ctr();
    let id = format!("fault-{at}-{victim:?}").to_lowercase();
    let plan = Plan::new(world, at, signal, victim)?;
    let containerd = world.containerd_pid().context("no containerd")?;
    // The harness is who would start it again.
    let after_each = || match Process::read(containerd.cast_signed()) {
        Some(process) if process.state != 'Z' => Ok(()),
        _ if world.containerd_pid() == Some(containerd) => world.restart_containerd(Signal::SIGKILL),
        _ => Ok(()),
    };
    life(&ctr, &id, &after_each)?;
    let (passed, done) = (plan.passed(), plan.is_done());
    drop(plan);
    // As whoever finds the remains: force, and say nothing of what is not there.
    let _ = ctr.run(&["task", "rm", "-f", &id], scale::container())?;
    let removed = ctr.run(&["containers", "rm", &id], scale::command())?;
    ensure!(removed.code() == 0 || removed.errors().contains("not found"), "{removed}");
    if let Ok(sandbox) = Sandbox::find(world.stage(), &id) {
        sandbox.wait_until_gone(scale::container())?;
    }
    // Never two ends of one process; one, where its start was told. A containerd that was killed may have taken what
    // it had just been told with it; and of a task that is not deleted when its shim dies it tells an end itself,
    // whatever it was told before (as with runc's shim).
    let told = passed.iter().take(at).any(|point| point == "/tasks/exit");
    let most = if victim == Victim::Shim && told { 2 } else { 1 };
    if victim != Victim::Containerd {
        world.events(|events| {
            events.marker(scale::command())?;
            let all = events.of(&id)?;
            let ends = all.iter().filter(|event| event.is_end_of(&id)).count();
            let started = all.iter().any(|event| event.topic == "/tasks/start");
            ensure!(ends <= most && (ends > 0 || !started), "{ends} ends, started: {started}: {all:?}");
            Ok(())
        })?;
    }
    remove_clients_fifos(&id)?;
    Ok((passed, done))
}

/// Whether the point was passed before there was a monitor.
fn before_a_monitor(passed: &[String], at: usize) -> bool {
    !passed.iter().take(at).any(|point| point == "monitor spawned")
}

/// At every `step`th point, from `first` on.
fn at_points(victim: Victim, first: usize, step: usize) {
    let (mut at, mut happened) = (first, 0);
    loop {
        let mut seen = (Vec::new(), false);
        case(|world| {
            println!("{victim:?} killed at point {at}");
            seen = with_fault(world, at, Signal::SIGKILL, victim)?;
            Ok(())
        });
        let (passed, done) = seen;
        if !done && victim == Victim::Monitor && passed.len() >= at && before_a_monitor(&passed, at) {
            // There was none yet.
            at += step;
            continue;
        }
        if !done {
            // Points before it were passed, and it has not been reached: the end.
            assert!(passed.len() < at, "point {at} of {} did nothing: {passed:#?}", passed.len());
            assert!(at > POINTS, "{} points: {passed:#?}", passed.len());
            break;
        }
        println!("  at {:?}", passed.get(at - 1));
        happened += 1;
        at += step;
    }
    println!("{happened} points");
}

/// A few of them, for every run of the tests.
#[test]
fn some_points() {
    at_points(Victim::Shim, 6, 24);
    at_points(Victim::Monitor, 16, 24);
    at_points(Victim::Containerd, 25, 30);
}

#[test]
fn every_point_of_the_shim() {
    at_points(Victim::Shim, 1, 1);
}

#[test]
fn every_point_of_the_monitor() {
    at_points(Victim::Monitor, 1, 1);
}

#[test]
fn every_point_of_containerd() {
    at_points(Victim::Containerd, 1, 2);
}
