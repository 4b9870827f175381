//! Faults at points that are chosen by a counter: each point that a shim passes from `start` to `delete` is once where it is
//! killed, where its monitor is, and where containerd is; and where each of them is stopped for a while.

use std::{
    panic::{AssertUnwindSafe, catch_unwind},
    path::PathBuf,
    sync::atomic::{AtomicBool, Ordering},
    time::{Duration, Instant},
};

use anyhow::{Context, Result, ensure};
use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use rvm_tests::{
    case,
    ctr::{Ctr, remove_clients_fifos, unique_id},
    host::Process,
    sandbox::Sandbox,
    scale,
    world::World,
};

/// Points at the least from the first container's `start` to its `delete`.
const POINTS: usize = 50;
/// More than any has; a case that has come here would never end.
const FAR: usize = 200;
/// How long a shim waits for its monitor or its guest, at most.
const PATIENCE: Duration = Duration::from_secs(60);
/// What the container ends with when it is told to.
const EXIT: i32 = 9;

/// To whom it happens.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Victim {
    Shim,
    Monitor,
    Containerd,
    /// PID 1 of the guest, before an answer: its kernel panics. What is counted is the answers.
    Agent,
}

/// What happens to it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Fault {
    /// SIGKILL.
    Death,
    /// SIGSTOP, and SIGCONT so much later.
    Stop(Duration),
}

impl Fault {
    /// A stop within what everybody waits.
    fn short_stop() -> Self {
        Self::Stop(scale::seconds(0.05))
    }

    /// A stop for longer than a shim waits for anybody.
    fn long_stop() -> Self {
        Self::Stop(PATIENCE + Duration::from_secs(20))
    }

    /// Whether nobody gives up meanwhile.
    fn is_short(self) -> bool {
        matches!(self, Self::Stop(pause) if pause < PATIENCE)
    }

    fn signal(self) -> Signal {
        match self {
            Self::Death => Signal::SIGKILL,
            Self::Stop(_) => Signal::SIGSTOP,
        }
    }
}

/// What is planned: the file that the shims' `RVM_FAULT` names, and those beside it.
struct Plan(PathBuf);

impl Plan {
    fn new(world: &World, at: usize, signal: Signal, victim: Victim) -> Result<Self> {
        let plan = Self(world.fault_path());
        let victim = match victim {
            // Its own command line says when; no point is that far.
            Victim::Agent => {
                let parameter = format!("rvm_fault={at}");
                world.set_config(&world.config().text("guest", "kernel_params", &parameter))?;
                std::fs::write(&plan.0, format!("{} 0 0", u64::MAX))?;
                return Ok(plan);
            }
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

    /// How many requests the agent was to answer.
    fn answers(&self) -> usize {
        self.passed().iter().filter(|point| point.starts_with("the agent has answered: ")).count()
    }

    /// Whether it has happened.
    fn is_done(&self) -> bool {
        self.0.with_extension("done").exists()
    }

    /// Lets a victim go on that has been stopped for `pause`; returns at once where none is when `ended`.
    fn resume(&self, pause: Duration, ended: &AtomicBool) -> Result<()> {
        const STEP: Duration = Duration::from_millis(5);
        while !self.is_done() {
            if ended.load(Ordering::Acquire) {
                return Ok(());
            }
            std::thread::sleep(STEP);
        }
        let victim: libc::pid_t = std::fs::read_to_string(self.0.with_extension("done"))?.parse()?;
        // The signal follows the file.
        let until = Instant::now() + scale::command();
        while Process::read(victim).is_some_and(|process| process.state != 'T') {
            ensure!(Instant::now() < until, "{victim} has not stopped");
            std::thread::sleep(STEP);
        }
        std::thread::sleep(pause);
        // One that has been killed meanwhile is gone.
        let _ = kill(Pid::from_raw(victim), Signal::SIGCONT);
        Ok(())
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
/// refused with an error. Returns whether all of them were done.
fn life(ctr: &Ctr, id: &str, fault: Fault, after_each: &dyn Fn() -> Result<()>) -> Result<bool> {
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
    let script = format!("trap 'exit {EXIT}' TERM; while :; do sleep 100000 & wait $!; done");
    let started = run.run(&["sh", "-c", &script])?;
    println!(
        "  run: {} after {} ms {}",
        started.code(),
        began.elapsed().as_millis(),
        started.errors().trim()
    );
    ensure!(started.code() == 0 || !started.errors().trim().is_empty(), "run: no error: {started}");
    after_each()?;
    let exec =
        ctr.run(&["task", "exec", "--exec-id", &exec_of(id), id, "echo", "here"], scale::container())?;
    ensure!(exec.code() != 0 || exec.text() == "here\n", "exec: {exec}");
    println!("  exec: {} {}", exec.code(), exec.errors().trim());
    after_each()?;
    let listed = step("pids", &["task", "ps", id])?;
    let kill = ["task", "kill", "-s", "SIGTERM", id];
    let is_running = || ctr.task_state(id).is_some_and(|state| state == "RUNNING");
    let killed = step("kill", &kill)?;
    if !killed && is_running() {
        // It was containerd that did not answer.
        ensure!(step("kill", &kill)? || !is_running(), "a running task cannot be killed");
    }
    let until = Instant::now() + scale::container();
    let mut again = Instant::now() + scale::command();
    while is_running() {
        ensure!(Instant::now() < until, "what was killed goes on: {:?}", ctr.list(&["task", "ls"]));
        // To a first process that has no handler yet a signal is nothing, under runc too: its guest may have stood
        // still since the start, and the signal be what it goes on with.
        if matches!(fault, Fault::Stop(_)) && !fault.is_short() && Instant::now() > again {
            step("kill", &kill)?;
            again += scale::command();
        }
    }
    let began = Instant::now();
    let deleted = ctr.run(&["task", "delete", id], scale::container())?;
    println!(
        "  delete: {} after {} ms {}",
        deleted.code(),
        began.elapsed().as_millis(),
        deleted.errors().trim()
    );
    // `ctr` ends with what the task ended with.
    let is_deleted = deleted.code() == EXIT || deleted.code() == 0;
    ensure!(is_deleted || !deleted.errors().trim().is_empty(), "delete: no error: {deleted}");
    after_each()?;
    Ok(started.code() == 0 && exec.code() == 0 && listed && killed && is_deleted)
}

/// What was seen of one life with one fault.
#[derive(Default)]
struct Seen {
    /// The points, in order.
    passed: Vec<String>,
    /// Whether it happened.
    done: bool,
}

/// One life with one fault.
fn with_fault(world: &World, at: usize, fault: Fault, victim: Victim, seen: &mut Seen) -> Result<()> {
    let ctr = world.ctr();
    // Of its own: events of all cases come together.
    let id = unique_id(&format!("fault-{at}-{victim:?}").to_lowercase());
    let plan = Plan::new(world, at, fault.signal(), victim)?;
    let containerd = world.containerd_pid().context("no containerd")?;
    // The harness is who would start it again.
    let after_each = || match Process::read(containerd.cast_signed()) {
        Some(process) if process.state != 'Z' => Ok(()),
        _ if world.containerd_pid() == Some(containerd) => world.restart_containerd(Signal::SIGKILL),
        _ => Ok(()),
    };
    let ended = AtomicBool::new(false);
    let lived = std::thread::scope(|scope| {
        let resumer = scope.spawn(|| match fault {
            Fault::Death => Ok(()),
            Fault::Stop(pause) => plan.resume(pause, &ended),
        });
        let lived = life(&ctr, &id, fault, &after_each);
        ended.store(true, Ordering::Release);
        let resumed = resumer.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic));
        lived.and_then(|lived| resumed.map(|()| lived))
    });
    let done = if victim == Victim::Agent { plan.answers() >= at } else { plan.is_done() };
    *seen = Seen { passed: plan.passed(), done };
    let all_done = lived?;
    drop(plan);
    // As whoever finds the remains: force, and say nothing of what is not there.
    let _ = ctr.run(&["task", "rm", "-f", &id], scale::container())?;
    let removed = ctr.run(&["containers", "rm", &id], scale::command())?;
    ensure!(removed.code() == 0 || removed.errors().contains("not found"), "{removed}");
    if let Ok(sandbox) = Sandbox::find(world.stage(), &id) {
        sandbox.wait_until_gone(scale::container())?;
    }
    if fault.is_short() {
        // Nothing was lost: it took longer, and that is all.
        ensure!(all_done, "a step was not done");
        let code = world.events(|events| events.exit_once(&id))?;
        ensure!(code == u64::try_from(EXIT)?, "exit code {code}");
    } else if victim != Victim::Containerd {
        // Never two ends of one process; one, where its start was told. A containerd that was killed may have taken what
        // it had just been told with it; and of a task that is not deleted when its shim dies it tells an end itself,
        // whatever it was told before (as with runc's shim).
        let told = seen.passed.iter().take(at).any(|point| point == "/tasks/exit");
        let most = if victim == Victim::Shim && told { 2 } else { 1 };
        world.events(|events| {
            events.marker(scale::command())?;
            let all = events.of(&id)?;
            let ends = all.iter().filter(|event| event.is_end_of(&id)).count();
            let started = all.iter().any(|event| event.topic == "/tasks/start");
            ensure!(ends <= most && (ends > 0 || !started), "{ends} ends, started: {started}: {all:?}");
            Ok(())
        })?;
    }
    // Those of a client that containerd has left alone with them.
    remove_clients_fifos(&exec_of(&id))?;
    remove_clients_fifos(&id)
}

/// What is added to a container.
fn exec_of(id: &str) -> String {
    format!("{id}-exec")
}

/// Whether who passed the point has no monitor: there was none yet, or it is what containerd removes remains by.
fn has_no_monitor(passed: &[String], at: usize) -> bool {
    let until = &passed[..at];
    !until.iter().any(|point| point == "monitor spawned")
        || until.last().is_some_and(|point| point.starts_with("delete: "))
}

/// How one point went.
struct Tried {
    seen: Seen,
    is_right: bool,
}

fn at_point(victim: Victim, fault: Fault, at: usize) -> Tried {
    let mut seen = Seen::default();
    let tried = catch_unwind(AssertUnwindSafe(|| {
        case(|world| {
            println!("{victim:?}, point {at}: {fault:?}");
            with_fault(world, at, fault, victim, &mut seen)
        });
    }));
    println!("  at {:?}", seen.passed.get(at - 1));
    Tried { seen, is_right: tried.is_ok() }
}

/// At every `step`th point, from `first` on, until there are no more; what fails at one keeps nobody from the next.
fn at_points(victim: Victim, fault: Fault, first: usize, step: usize) {
    let (mut happened, mut failed) = (0, Vec::new());
    for at in (first..).step_by(step) {
        assert!(at < FAR, "no end");
        let Tried { seen: Seen { passed, done }, is_right } = at_point(victim, fault, at);
        if !is_right {
            failed.push(format!("{at} ({:?})", passed.get(at - 1)));
        }
        if done {
            happened += 1;
            continue;
        }
        if victim == Victim::Monitor && passed.len() >= at && has_no_monitor(&passed, at) {
            continue;
        }
        if is_right {
            // Points before it were passed, and it has not been reached: the end.
            assert!(
                victim == Victim::Agent || passed.len() < at,
                "point {at} of {} did nothing: {passed:#?}",
                passed.len()
            );
            assert!(passed.len() > POINTS, "{} points: {passed:#?}", passed.len());
            break;
        }
    }
    println!("{victim:?}, {fault:?}: {happened} points, residue or wrong at {} of them", failed.len());
    assert!(failed.is_empty(), "{} of {happened} points: {failed:#?}", failed.len());
}

#[test]
fn every_answer_of_the_agent() {
    at_points(Victim::Agent, Fault::Death, 1, 1);
}

/// A few of them, for every run of the tests.
#[test]
fn some_points() {
    at_points(Victim::Shim, Fault::Death, 6, 24);
    at_points(Victim::Monitor, Fault::Death, 16, 24);
    at_points(Victim::Containerd, Fault::Death, 25, 30);
}

#[test]
fn every_point_of_the_shim() {
    at_points(Victim::Shim, Fault::Death, 1, 1);
}

#[test]
fn every_point_of_the_monitor() {
    at_points(Victim::Monitor, Fault::Death, 1, 1);
}

#[test]
fn every_point_of_containerd() {
    at_points(Victim::Containerd, Fault::Death, 1, 2);
}

/// A stop of two and a death of the agent, for every run of the tests.
#[test]
fn some_stops_and_an_agent() {
    for (victim, fault, at) in [
        (Victim::Shim, Fault::short_stop(), 31),
        (Victim::Monitor, Fault::short_stop(), 42),
        (Victim::Agent, Fault::Death, 4),
    ] {
        let Tried { seen, is_right } = at_point(victim, fault, at);
        assert!(is_right && seen.done, "{:#?}", seen.passed);
    }
}

/// What is asked meanwhile may be refused, and what is stopped may be given up: in order, and nothing is left of it.
#[test]
fn every_long_stop() {
    for (victim, at) in [
        (Victim::Shim, 11),
        (Victim::Shim, 41),
        (Victim::Monitor, 17),
        (Victim::Monitor, 30),
        (Victim::Monitor, 42),
        (Victim::Containerd, 20),
        (Victim::Containerd, 45),
    ] {
        let Tried { seen, is_right } = at_point(victim, Fault::long_stop(), at);
        assert!(is_right && seen.done, "{victim:?}, {at}: {:#?}", seen.passed);
    }
}

#[test]
fn every_stop_of_the_shim() {
    at_points(Victim::Shim, Fault::short_stop(), 1, 4);
}

#[test]
fn every_stop_of_the_monitor() {
    at_points(Victim::Monitor, Fault::short_stop(), 2, 4);
}

#[test]
fn every_stop_of_containerd() {
    at_points(Victim::Containerd, Fault::short_stop(), 3, 8);
}
