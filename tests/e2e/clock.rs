//! The guest's clock is the host's.

use std::time::{Instant, SystemTime, UNIX_EPOCH};

use anyhow::{Context, Result, ensure};
use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use rvm_tests::{
    case,
    ctr::remove_clients_fifos,
    job::{Input, Job},
    parity::probe_at,
    sandbox::Sandbox,
    scale,
    world::{World, shell},
};

/// Moves the host's clock, and back when it goes.
struct Moved(i64);

impl Moved {
    fn by(seconds: i64) -> Result<Self> {
        move_clock(seconds)?;
        Ok(Self(seconds))
    }
}

impl Drop for Moved {
    fn drop(&mut self) {
        if let Err(error) = move_clock(-self.0) {
            eprintln!("the host's clock stays wrong by {} s: {error:#}", self.0);
        }
    }
}

fn move_clock(seconds: i64) -> Result<()> {
    shell(&format!("date -s @$(($(date +%s) + {seconds}))")).map(drop)
}

fn now() -> Result<f64> {
    Ok(SystemTime::now().duration_since(UNIX_EPOCH)?.as_secs_f64())
}

/// At least how many seconds the guest's clock is ahead of the host's (behind it: below 0), as
/// the probe's `clock` tells: each answer was given between its question and its arrival.
pub fn apart(clock: &mut Job) -> Result<f64> {
    const QUESTIONS: usize = 20;
    let (mut least, mut most) = (f64::MIN, f64::MAX);
    for _ in 0..QUESTIONS {
        let seen = clock.stdout().len();
        let before = now()?;
        clock.write(b"\n")?;
        let mut text = String::new();
        while !text.ends_with('\n') {
            ensure!(now()? - before < scale::command().as_secs_f64(), "the clock does not answer: {text:?}");
            clock.wait_for_more(seen + text.len(), scale::command());
            text = clock.stdout().split_off(seen);
        }
        let after = now()?;
        let guest: f64 = text.trim().parse().with_context(|| format!("{text:?}"))?;
        (least, most) = (least.max(guest - after), most.min(guest - before));
    }
    Ok(if least > 0.0 { least } else { most.min(0.0) })
}

/// A container that does nothing, and the probe's `clock` in it.
pub fn started(world: &World) -> Result<(String, Job)> {
    let ctr = world.ctr();
    let mount = probe_at("/probe")?;
    let run = ctr.container("clock").with(&["--mount", &mount]).detached();
    run.run(&["sleep", "100000"])?.success()?;
    let clock = ctr.exec(&run.id, &[], &["/probe", "clock"], Input::Open)?;
    Ok((run.id, clock))
}

/// Waits until the guest's clock is the host's.
pub fn settled(clock: &mut Job, when: &str) -> Result<()> {
    const NEAR: f64 = 0.05;
    let until = Instant::now() + scale::command();
    let mut last = apart(clock)?;
    while last.abs() > NEAR && Instant::now() < until {
        last = apart(clock)?;
    }
    ensure!(last.abs() <= NEAR, "{when}: {last} s apart");
    println!("{when}: {last} s apart");
    Ok(())
}

pub fn ended(world: &World, id: &str, clock: Job) -> Result<()> {
    world.end(id)?;
    clock.finish(scale::container())?.exited(137)?;
    remove_clients_fifos(id)
}

#[test]
fn follows_the_hosts_when_that_is_set() {
    case(|world| {
        let (id, mut clock) = started(world)?;
        settled(&mut clock, "before")?;
        {
            let _moved = Moved::by(1000)?;
            settled(&mut clock, "ahead by 1000 s")?;
        }
        settled(&mut clock, "set back")?;
        let ctr = world.ctr();
        ctr.run(&["task", "pause", &id], scale::command())?.success()?;
        ctr.run(&["task", "resume", &id], scale::command())?.success()?;
        settled(&mut clock, "after a pause")?;
        ended(world, &id, clock)
    });
}

/// As on a host that sleeps: nothing of the sandbox runs for a while, in which the clock has moved on by more, or was
/// set back.
#[test]
fn is_right_after_the_host_has_slept() {
    case(|world| {
        let (id, mut clock) = started(world)?;
        let sandbox = Sandbox::find(world.stage(), &id)?;
        let both = |signal: Signal| -> Result<()> {
            for process in [&sandbox.shim, &sandbox.monitor] {
                kill(Pid::from_raw(process.pid), signal)?;
            }
            Ok(())
        };
        settled(&mut clock, "before")?;
        let mut moved = Vec::new();
        for seconds in [0, 3600, -1800] {
            both(Signal::SIGSTOP)?;
            moved.push(Moved::by(seconds)?);
            std::thread::sleep(scale::seconds(0.1));
            both(Signal::SIGCONT)?;
            settled(&mut clock, &format!("slept, and {seconds} s more"))?;
        }
        drop(moved);
        settled(&mut clock, "set back")?;
        ended(world, &id, clock)
    });
}
