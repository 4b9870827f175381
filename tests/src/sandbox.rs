//! The host side of one running sandbox.

use std::{
    path::PathBuf,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, ensure};
use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};

use crate::{
    ctr::Run,
    host::{Process, sandbox_processes},
    stage::Stage,
    world::World,
};

/// Shim and monitor of one sandbox.
#[derive(Clone, Debug)]
pub struct Sandbox {
    /// Its id.
    pub id: String,
    /// The shim.
    pub shim: Process,
    /// The monitor.
    pub monitor: Process,
}

impl Sandbox {
    /// Starts a container that does nothing, and finds its sandbox.
    ///
    /// # Errors
    /// When it does not start.
    pub fn sleeping(world: &World, prefix: &str) -> Result<(Run, Self)> {
        let run = world.ctr().container(prefix).detached();
        run.run(&["sleep", "100000"])?.success()?;
        let sandbox = Self::find(world.stage(), &run.id)?;
        Ok((run, sandbox))
    }

    /// Finds shim and monitor of a running sandbox.
    ///
    /// # Errors
    /// When either is not there.
    pub fn find(stage: &Stage, id: &str) -> Result<Self> {
        let processes = sandbox_processes(stage);
        let shim = processes
            .iter()
            .find(|process| {
                process.name.starts_with("containerd-shim")
                    && process.args.windows(2).any(|pair| pair[0].ends_with("-id") && pair[1] == id)
            })
            .with_context(|| format!("no shim of {id} among {processes:?}"))?;
        let monitor = processes
            .iter()
            .find(|process| process.parent == shim.pid && process.name.starts_with("rvm-vmm"))
            .with_context(|| format!("no monitor of {id} among {processes:?}"))?;
        Ok(Self { id: id.to_owned(), shim: shim.clone(), monitor: monitor.clone() })
    }

    /// Its directory.
    pub fn dir(&self) -> PathBuf {
        Self::dir_of(&self.id)
    }

    /// That of a sandbox by its id.
    pub fn dir_of(id: &str) -> PathBuf {
        PathBuf::from("/run/rvm/default").join(id)
    }

    /// Kills the monitor with SIGKILL.
    ///
    /// # Errors
    /// When it is gone already.
    pub fn kill_monitor(&self) -> Result<()> {
        kill_process(&self.monitor)
    }

    /// Kills the shim with SIGKILL.
    ///
    /// # Errors
    /// When it is gone already.
    pub fn kill_shim(&self) -> Result<()> {
        kill_process(&self.shim)
    }

    /// Waits until neither process is there any more.
    ///
    /// # Errors
    /// When one still is after `limit`.
    pub fn wait_until_gone(&self, limit: Duration) -> Result<()> {
        let until = Instant::now() + limit;
        for process in [&self.shim, &self.monitor] {
            while is_same(process) {
                ensure!(Instant::now() < until, "still there after {limit:?}: {process}");
                std::thread::sleep(Duration::from_millis(10));
            }
        }
        Ok(())
    }
}

fn is_same(process: &Process) -> bool {
    Process::read(process.pid).is_some_and(|now| now.start_ticks == process.start_ticks && now.state != 'Z')
}

fn kill_process(process: &Process) -> Result<()> {
    ensure!(is_same(process), "gone: {process}");
    kill(Pid::from_raw(process.pid), Signal::SIGKILL).with_context(|| format!("killing {process}"))
}
