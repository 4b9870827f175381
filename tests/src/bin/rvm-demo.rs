//! The part of `cargo xtask demo` that runs where KVM is: a private containerd
//! and containers through `ctr run --rm --runtime io.rvm.v2`.

use std::{process::ExitCode, time::Instant};

use anyhow::{Context, Result, ensure};
use nix::{
    sys::signal::{SigSet, Signal, kill},
    unistd::Pid,
};
use rvm_tests::{
    ctr::Run,
    host,
    job::{Finished, Input},
    sandbox::Sandbox,
    scale,
    stage::Stage,
    timeline,
    world::{IMAGE, World},
};

fn main() -> ExitCode {
    let shell = std::env::args().any(|arg| arg == "--shell");
    let result = Stage::from_env().and_then(|stage| {
        leave_nothing_when_interrupted(stage.clone())?;
        World::new(stage).and_then(|world| demo(&world, shell))
    });
    match result {
        Ok(code) => code,
        Err(error) => {
            eprintln!("demo: {error:#}");
            ExitCode::FAILURE
        }
    }
}

/// containerd ends with this process; its shims, made to outlive it, do not.
fn leave_nothing_when_interrupted(stage: Stage) -> Result<()> {
    let signals = SigSet::from_iter([Signal::SIGINT, Signal::SIGTERM, Signal::SIGHUP]);
    // Before any other thread is there, so that it holds for all of them; children start with none blocked.
    signals.thread_block()?;
    std::thread::spawn(move || {
        if let Ok(signal) = signals.wait() {
            for process in host::sandbox_processes(&stage) {
                let _ = kill(Pid::from_raw(process.pid), Signal::SIGKILL);
            }
            std::process::exit(128 + signal as i32);
        }
    });
    Ok(())
}

fn demo(world: &World, shell: bool) -> Result<ExitCode> {
    let version = world.ctr().run(&["version"], scale::command())?.success()?.text();
    let version = version.lines().filter_map(|line| line.trim().strip_prefix("Version:")).next_back();
    println!("A private containerd {} with the image {IMAGE} is up.\n", version.unwrap_or("").trim());
    let result = if shell { interactive(world) } else { tour(world).map(|()| ExitCode::SUCCESS) };
    if result.is_err() {
        eprintln!("\ncontainerd's log ends with:\n{}\n", world.log_tail(0, 20));
    }
    let swept = world.sweep();
    ensure!(swept.is_empty(), "these processes were left behind: {swept:#?}");
    result
}

/// A shell in a microVM on this process's own terminal.
fn interactive(world: &World) -> Result<ExitCode> {
    let run = world.ctr().container("shell").with(&["--tty"]);
    println!("A shell in a microVM of its own; `exit` ends it.");
    let status = run.command(&["sh"]).status().context("running ctr")?;
    println!("The shell ended with exit code {}.", status.code().unwrap_or(1));
    Ok(ExitCode::SUCCESS)
}

fn tour(world: &World) -> Result<()> {
    let ctr = world.ctr();

    let kernel = step(&ctr.container("kernel"), &["uname", "-r"], "")?;
    let host = std::fs::read_to_string("/proc/sys/kernel/osrelease")?;
    println!("    host kernel   {:<28} guest kernel  {}\n", host.trim(), kernel.text().trim());
    ensure!(kernel.code() == 0 && host.trim() != kernel.text().trim(), "not a kernel of its own: {kernel}");

    let sent = "every container in its own microVM";
    let piped = step(&ctr.container("pipe"), &["tr", "a-z", "A-Z"], sent)?;
    println!("    stdin  {sent}\n    stdout {}\n", piped.text());
    ensure!(piped.code() == 0 && piped.text() == sent.to_uppercase(), "stdin did not come back: {piped}");

    let code = step(&ctr.container("code"), &["sh", "-c", "exit 42"], "")?;
    println!("    exit code {}\n", code.code());
    ensure!(code.code() == 42, "expected 42: {code}");

    let run = ctr.container("timeline").detached();
    println!("$ ctr run --detach --runtime io.rvm.v2 {IMAGE} {} sleep 1000", run.id);
    let started = Instant::now();
    run.run(&["sleep", "1000"])?.success()?;
    let took = started.elapsed();
    let sandbox = Sandbox::find(world.stage(), &run.id)?;
    let steps = timeline::of(&sandbox)?;
    println!("    One start, step by step:\n\n{}", timeline::table(&steps, took));
    ctr.run(&["task", "kill", "-s", "SIGKILL", &run.id], scale::command())?.success()?;
    world.events(|events| events.wait_for("/tasks/exit", &run.id, scale::container()))?;
    ctr.remove(&run.id)?;
    sandbox.wait_until_gone(scale::command())
}

/// Shows and runs one container.
fn step(run: &Run, args: &[&str], input: &str) -> Result<Finished> {
    let pipe = if input.is_empty() { String::new() } else { format!("echo -n '{input}' | ") };
    println!("$ {pipe}ctr run --rm --runtime io.rvm.v2 {IMAGE} {} {}", run.id, args.join(" "));
    let finished = if input.is_empty() {
        run.run(args)?
    } else {
        run.run_with(args, Input::Bytes(input.as_bytes().to_vec()))?
    };
    if !finished.stderr.is_empty() {
        println!("    {}", finished.errors().trim_end());
    }
    println!("    {} ms", finished.took.as_millis());
    Ok(finished)
}
