//! The guest's clock is the host's.

use std::time::Instant;

use anyhow::{Context, Result, ensure};
use rvm_tests::{case, job::Input, scale, world::shell};

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

fn host_seconds() -> Result<i64> {
    shell("date +%s")?.trim().parse().context("seconds of the host")
}

#[test]
fn follows_the_hosts_when_that_is_set() {
    case(|world| {
        let ctr = world.ctr();
        let run = ctr.container("clock").detached();
        run.run(&["sleep", "1000"])?.success()?;
        // How far the guest's clock is from the host's, which runs on meanwhile.
        let apart = || -> Result<i64> {
            let before = host_seconds()?;
            let job = ctr.exec(&run.id, &[], &["date", "+%s"], Input::Nothing)?;
            let guest: i64 = job.finish(scale::container())?.success()?.text().trim().parse()?;
            let after = host_seconds()?;
            Ok(if guest < before { guest - before } else { (guest - after).max(0) })
        };
        let settled = |when: &str| -> Result<()> {
            let until = Instant::now() + scale::command();
            let mut last = apart()?;
            while last.abs() > 1 && Instant::now() < until {
                last = apart()?;
            }
            ensure!(last.abs() <= 1, "{when}: {last} s apart");
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
        world.end(&run.id)
    });
}
