//! A guest whose kernel panics, and one that floods the host with connections: it is alone in that.

use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use rvm_tests::{
    case, ctr::remove_clients_fifos, host, job::Input, machine::hostile::HOSTILE_ENV, parity::probe_at,
    sandbox::Sandbox, scale, world::World,
};

use crate::volumes::{Volume, bind};

/// Runs what brings its kernel down, which says so in these words, beside a container of another machine, which goes on.
fn brings_its_kernel_down(world: &World, options: &[&str], args: &[&str], words: &str) -> Result<()> {
    let ctr = world.ctr();
    let (other, _) = Sandbox::sleeping(world, "other")?;
    let log = world.log_length();
    let run = ctr.container("panic").with(&["--privileged"]).with(options);
    let finished = run.run(args)?;
    println!("{finished}");
    finished.exited(137)?;
    ensure!(world.events(|events| events.exit_once(&run.id))? == 137, "exit code");
    let said = world.log_tail(log, 50);
    ensure!(
        said.contains(&format!("Kernel panic - not syncing: {words}")),
        "not in the log: {words}\n{said}"
    );
    ctr.exec(&other.id, &[], &["true"], Input::Nothing)?.finish(scale::command())?.success()?;
    world.end(&other.id)?;
    remove_clients_fifos(&run.id)
}

/// A container that may set what its kernel does has it panic where memory runs out.
#[test]
fn a_kernel_that_panics() {
    case(|world| {
        let script = "echo 2 > /proc/sys/vm/panic_on_oom; tail /dev/zero";
        brings_its_kernel_down(world, &[], &["sh", "-c", script], "Out of memory: compulsory panic_on_oom")
    });
}

/// A device is told to write into the kernel, which then trips over it: an oops, after which nothing of it goes on.
#[test]
fn a_kernel_that_oopses() {
    case(|world| {
        let program = std::env::var(HOSTILE_ENV)
            .with_context(|| format!("{HOSTILE_ENV} is not set; `cargo xtask test` sets it"))?;
        let programs = Volume::new(world, "programs")?;
        std::fs::copy(&program, programs.path("rvm-hostile"))?;
        let mount = bind(&programs.0, "/programs", "rbind:ro");
        brings_its_kernel_down(
            world,
            &["--mount", &mount],
            &["/programs/rvm-hostile", "oops"],
            "Fatal exception",
        )
    });
}

/// Connections without an end, at once and one after another: the container's own machine serves, so do others, and
/// what the monitor holds is bounded.
#[test]
fn a_flood_of_connections() {
    case(|world| {
        const ROUNDS: usize = 5;
        /// What `vmm` allows a guest, and what a monitor has beside.
        const DESCRIPTORS: usize = 512 + 100;
        const MIB: u64 = 32;
        let ctr = world.ctr();
        let mount = probe_at("/probe")?;
        let run = ctr.container("flood").with(&["--mount", &mount]).detached();
        run.run(&["sleep", "100000"])?.success()?;
        let sandbox = Sandbox::find(world.stage(), &run.id)?;
        let flood = ctr.exec(&run.id, &[], &["/probe", "flood"], Input::Nothing)?;
        flood.wait_for("round 1\n", scale::container())?;
        let (mut most, mut slowest) = (0, Duration::ZERO);
        for round in 2..=ROUNDS {
            let began = Instant::now();
            let exec = ctr.exec(&run.id, &[], &["echo", "here"], Input::Nothing)?;
            ensure!(exec.finish(scale::command())?.success()?.text() == "here\n");
            slowest = slowest.max(began.elapsed());
            most = most.max(std::fs::read_dir(format!("/proc/{}/fd", sandbox.monitor.pid))?.count());
            flood.wait_for(&format!("round {round}\n"), scale::container())?;
        }
        let own = host::kib(&format!("{}/status", sandbox.monitor.pid), "RssAnon")?;
        println!("{most} descriptors, {own} KiB; the slowest exec took {} ms", slowest.as_millis());
        ensure!(most <= DESCRIPTORS, "{most} descriptors");
        ensure!(own <= MIB << 10, "{own} KiB of the monitor's own");
        let other = ctr.container("beside").run(&["echo", "beside"])?.success()?;
        ensure!(other.text() == "beside\n", "{other}");
        world.end(&run.id)?;
        flood.finish(scale::container())?.exited(137)?;
        sandbox.wait_until_gone(scale::container())?;
        remove_clients_fifos(&run.id)
    });
}
