//! The guest's clock is the host's.

use std::time::{Instant, SystemTime, UNIX_EPOCH};

use anyhow::{Context, Result, ensure};
use rvm_tests::{
    case,
    ctr::remove_clients_fifos,
    job::{Input, Job},
    parity::PROBE_ENV,
    scale,
    world::shell,
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
fn apart(clock: &mut Job) -> Result<f64> {
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

#[test]
fn follows_the_hosts_when_that_is_set() {
    case(|world| {
        const NEAR: f64 = 0.05;
        let ctr = world.ctr();
        let probe = std::env::var(PROBE_ENV).with_context(|| format!("{PROBE_ENV} is not set"))?;
        let mount = format!("type=bind,src={probe},dst=/probe,options=rbind:ro");
        let run = ctr.container("clock").with(&["--mount", &mount]).detached();
        run.run(&["sleep", "1000"])?.success()?;
        let mut clock = ctr.exec(&run.id, &[], &["/probe", "clock"], Input::Open)?;
        let mut settled = |when: &str| -> Result<()> {
            let until = Instant::now() + scale::command();
            let mut last = apart(&mut clock)?;
            while last.abs() > NEAR && Instant::now() < until {
                last = apart(&mut clock)?;
            }
            ensure!(last.abs() <= NEAR, "{when}: {last} s apart");
            Ok(())
        };
        settled("before")?;
        {
            let _moved = Moved::by(1000)?;
            settled("ahead by 1000 s")?;
        }
        settled("set back")?;
        ctr.run(&["task", "pause", &run.id], scale::command())?.success()?;
        ctr.run(&["task", "resume", &run.id], scale::command())?.success()?;
        settled("after a pause")?;
        world.end(&run.id)?;
        clock.finish(scale::container())?.exited(137)?;
        remove_clients_fifos(&run.id)
    });
}
