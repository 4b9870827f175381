//! Added processes under strain: much output, half-closed input, a caller that
//! goes, many in a row.

use std::{collections::BTreeMap, io::Read, process::Stdio, time::Instant};

use anyhow::{Context, Result, bail, ensure};
use nix::sys::signal::Signal;
use rvm_tests::{
    case,
    ctr::{Run, remove_clients_fifos},
    host::{Process, sandbox_processes},
    job::{Input, Job},
    parity::probe_at,
    sandbox::Sandbox,
    scale,
    task::Shim,
    world::World,
};
use serde_json::json;

/// How many MiB are read; unset: [`OUTPUT_MIB`].
const OUTPUT_ENV: &str = "RVM_TEST_OUTPUT_MIB";
const OUTPUT_MIB: u64 = 16;

/// A container that runs until it is killed, with the probe in `/probe`.
fn sleeper(world: &World) -> Result<Run> {
    let mount = probe_at("/probe")?;
    let run = world.ctr().container("robust").with(&["--mount", &mount]).detached();
    run.run(&["sleep", "100000"])?.success()?;
    Ok(run)
}

/// The probe's `output`: 8 bytes at a time, each word from the one before
/// (xorshift64), so that a lost, repeated or swapped byte shows.
struct Expected {
    state: u64,
    count: u64,
}

impl Expected {
    fn byte(&mut self) -> u8 {
        if self.count.is_multiple_of(8) {
            self.state ^= self.state << 13;
            self.state ^= self.state >> 7;
            self.state ^= self.state << 17;
        }
        let byte = self.state.to_le_bytes()[(self.count % 8) as usize];
        self.count += 1;
        byte
    }
}

#[test]
fn much_output_is_whole() {
    case(|world| {
        let mib = std::env::var(OUTPUT_ENV).map_or(Ok(OUTPUT_MIB), |text| text.parse())?;
        let run = sleeper(world)?;
        let count = (mib << 20).to_string();
        let mut command =
            world.ctr().command(&["task", "exec", "--exec-id", "much", &run.id, "/probe", "output", &count]);
        let started = Instant::now();
        let mut child = command.stdin(Stdio::null()).stdout(Stdio::piped()).spawn()?;
        let mut output = child.stdout.take().context("a pipe")?;
        let mut expected = Expected { state: 1, count: 0 };
        let mut buffer = vec![0; 256 << 10];
        let read = loop {
            match output.read(&mut buffer) {
                Ok(0) => break Ok(()),
                Ok(count) => {
                    if let Some(at) = buffer[..count].iter().position(|&byte| byte != expected.byte()) {
                        break Err(format!("byte {} of the block before {}", at, expected.count));
                    }
                }
                Err(error) => break Err(error.to_string()),
            }
        };
        if read.is_err() {
            child.kill()?;
        }
        let status = child.wait()?;
        let took = started.elapsed().as_secs_f64();
        println!("{mib} MiB in {took:.1} s, {:.1} MiB/s", mib as f64 / took);
        world.end(&run.id)?;
        if let Err(error) = read {
            bail!("not what was written: {error}");
        }
        ensure!(status.success(), "{status}");
        ensure!(expected.count == mib << 20, "{} bytes of {}", expected.count, mib << 20);
        Ok(())
    });
}

#[test]
fn input_ends_and_output_goes_on() {
    case(|world| {
        let run = sleeper(world)?;
        let script = "wc -c; echo input has ended; read -r line || echo no more; seq 1 3; exit 4";
        let mut job = world.ctr().exec(&run.id, &[], &["sh", "-c", script], Input::Open)?;
        job.write(&[b'x'; 100_000])?;
        job.close_input();
        let finished = job.finish(scale::container())?.exited(4)?;
        ensure!(finished.text() == "100000\ninput has ended\nno more\n1\n2\n3\n", "{finished}");
        world.end(&run.id)
    });
}

#[test]
fn outlives_its_caller() {
    case(|world| {
        let ctr = world.ctr();
        let run = sleeper(world)?;
        // Nobody reads any more what it prints later; that is not its end.
        let script = "echo begun; while test ! -e /tmp/go; do sleep 0.1; done; echo unheard; echo done > /tmp/done; exit 9";
        let exec_id = "unheard";
        let command = ["task", "exec", "--exec-id", exec_id, &run.id, "sh", "-c", script];
        let job = Job::start(ctr.command(&command), Input::Nothing)?;
        job.wait_for("begun", scale::container())?;
        job.signal(Signal::SIGKILL)?;
        job.finish(scale::command())?;
        let exec = |script: &str| {
            ctr.exec(&run.id, &[], &["sh", "-c", script], Input::Nothing)?
                .finish(scale::container())?
                .success()
        };
        let there = exec("ps | grep -v grep | grep -c unheard || true")?;
        ensure!(there.text() == "1\n", "it ended with its caller: {there}");
        exec("touch /tmp/go; until test -s /tmp/done; do sleep 0.1; done")?;
        let ended = || -> Result<Vec<u64>> {
            world.events(|events| {
                events.marker(scale::command())?;
                let all = events.of(&run.id)?;
                let exits = all.iter().filter(|event| event.topic == "/tasks/exit");
                Ok(exits.map(|event| event.number("exit_status")).filter(|&code| code == 9).collect())
            })
        };
        let until = Instant::now() + scale::container();
        while ended()?.is_empty() {
            ensure!(Instant::now() < until, "its exit was never published");
        }
        ensure!(ended()?.len() == 1, "its exit was published {} times", ended()?.len());
        world.end(&run.id)?;
        remove_clients_fifos(exec_id)
    });
}

#[test]
fn as_other_users() {
    case(|world| {
        let ctr = world.ctr();
        let run = sleeper(world)?;
        let id = |user: &str| {
            ctr.exec(
                &run.id,
                &["--user", user],
                &["sh", "-c", "id -u; id -g; id -G; touch /root/x 2>/dev/null; echo $?"],
                Input::Nothing,
            )?
            .finish(scale::container())
        };
        // ctr asks for the user's own group alone.
        for (user, expected) in [
            ("0", "0\n0\n0\n0\n"),
            ("user", "1000\n1000\n1000\n1\n"),
            ("1000:2000", "1000\n2000\n2000\n1\n"),
            ("nobody", "65534\n65534\n65534\n1\n"),
        ] {
            let finished = id(user)?.success()?;
            ensure!(finished.text() == expected, "{user}: {finished}");
        }
        let unknown = id("nosuchuser")?;
        ensure!(unknown.code() != 0, "{unknown}");
        world.end(&run.id)
    });
}

/// Descriptors, threads and children of everything that serves a sandbox.
fn holdings(sandbox: &Sandbox, world: &World) -> Result<BTreeMap<String, usize>> {
    let mut all = BTreeMap::new();
    for process in [&sandbox.shim, &sandbox.monitor] {
        let count = |what: &str| -> Result<usize> {
            let dir = format!("/proc/{}/{what}", process.pid);
            Ok(std::fs::read_dir(&dir).with_context(|| format!("reading {dir}"))?.count())
        };
        all.insert(format!("descriptors of {}", process.name), count("fd")?);
        all.insert(format!("threads of {}", process.name), count("task")?);
    }
    let ours = sandbox_processes(world.stage());
    all.insert("processes".into(), ours.len());
    let zombies = |process: &&Process| process.state == 'Z' && process.parent == sandbox.shim.pid;
    all.insert("zombies".into(), Process::all().iter().filter(zombies).count());
    let files = |dir: &std::path::Path| std::fs::read_dir(dir).map_or(0, Iterator::count);
    all.insert("files of the sandbox".into(), files(&sandbox.dir()));
    all.insert("FIFOs".into(), files(std::path::Path::new("/run/containerd/fifo")));
    Ok(all)
}

#[test]
fn two_hundred_in_a_row_leave_nothing() {
    case(|world| {
        let run = sleeper(world)?;
        let sandbox = Sandbox::find(world.stage(), &run.id)?;
        let process = json!({
            "args": ["/bin/sh", "-c", "echo to be read; true | true; exit 3"], "cwd": "/", "env": ["PATH=/bin"],
            "user": { "uid": 0, "gid": 0 },
        });
        let mut number = 0;
        let mut execs = |count: u32| -> Result<()> {
            let shim = Shim::of(&run.id)?;
            for _ in 0..count {
                number += 1;
                let ended = shim.exec(&format!("turn-{number}"), &process, world.dir())?;
                ensure!(ended.code == 3 && ended.output == "to be read\n", "{ended:?}");
            }
            Ok(())
        };
        // Whatever is made once is made by then.
        execs(5)?;
        let inside = || -> Result<String> {
            let ctr = world.ctr();
            let script = "ls /proc | grep -c '^[0-9]'; ls /dev/pts";
            let job = ctr.exec(&run.id, &[], &["sh", "-c", script], Input::Nothing)?;
            Ok(job.finish(scale::container())?.success()?.text())
        };
        let before = (holdings(&sandbox, world)?, inside()?);
        let started = Instant::now();
        execs(200)?;
        println!("200 in {:.1} s", started.elapsed().as_secs_f64());
        let until = Instant::now() + scale::command();
        let mut after = (holdings(&sandbox, world)?, inside()?);
        // Less than before is no leak; what is closed after an answer may take a moment.
        let leaks = |after: &(BTreeMap<String, usize>, String)| {
            after.1 != before.1 || after.0.iter().any(|(what, count)| before.0.get(what) < Some(count))
        };
        while leaks(&after) && Instant::now() < until {
            after = (holdings(&sandbox, world)?, inside()?);
        }
        ensure!(!leaks(&after), "before: {before:?}\nafter:  {after:?}");
        println!("{after:?}");
        world.end(&run.id)
    });
}

/// Of a start that the guest does not answer nobody knows whether it was one: it is refused, and what has run for it
/// all the same is ended and told of once, as what was started is.
#[test]
fn a_start_that_is_not_answered_has_one_exit() {
    case(|world| {
        let run = sleeper(world)?;
        let shim = Shim::of(&run.id)?;
        let process = json!({
            "args": ["/bin/sleep", "54321"], "cwd": "/", "env": ["PATH=/bin"], "user": { "uid": 0, "gid": 0 },
        });
        // Without streams, which would be connected to the guest first, and with another limit.
        shim.add_exec("unanswered", &process, std::path::Path::new(""))?;
        let monitor = nix::unistd::Pid::from_raw(Sandbox::find(world.stage(), &run.id)?.monitor.pid);
        nix::sys::signal::kill(monitor, Signal::SIGSTOP)?;
        let started = shim.start_added("unanswered");
        nix::sys::signal::kill(monitor, Signal::SIGCONT)?;
        let refused = started.err().context("it is started")?.to_string();
        ensure!(refused.contains("does not answer start_process within"), "{refused}");
        let code = shim.await_exec("unanswered")?;
        ensure!(code == 137, "exit code {code}");
        let left = world.ctr().exec(
            &run.id,
            &[],
            &["sh", "-c", "ps | grep '[s]leep 54321' || true"],
            Input::Nothing,
        )?;
        let left = left.finish(scale::container())?.success()?.text();
        ensure!(left.is_empty(), "still there: {left}");
        let told = world.events(|events| {
            events.marker(scale::command())?;
            events.of(&run.id)
        })?;
        let told: Vec<_> = told.iter().filter(|event| event.text("id") == "unanswered").collect();
        ensure!(told.len() == 1 && told[0].topic == "/tasks/exit", "{told:?}");
        world.end(&run.id)
    });
}

/// Each has descriptors in the agent, the shim and the monitor: 142 was the most that a limit of 1,024 allowed.
#[test]
fn three_hundred_at_once() {
    const COUNT: usize = 300;
    case(|world| {
        let run = sleeper(world)?;
        let shim = Shim::of(&run.id)?;
        let process = json!({
            "args": ["/bin/sleep", "54321"], "cwd": "/", "env": ["PATH=/bin"], "user": { "uid": 0, "gid": 0 },
        });
        let names: Vec<String> = (1..=COUNT).map(|number| format!("held-{number}")).collect();
        // Open for both, it has a reader for every one of them.
        let output = world.dir().join("held");
        nix::unistd::mkfifo(&output, nix::sys::stat::Mode::from_bits_truncate(0o600))?;
        let held = std::fs::File::options().read(true).write(true).open(&output)?;
        for name in &names {
            shim.start_exec(name, &process, &output).with_context(|| name.clone())?;
        }
        let count = || -> Result<usize> {
            let script = "ps | grep -c '[s]leep 54321' || true";
            let job = world.ctr().exec(&run.id, &[], &["sh", "-c", script], Input::Nothing)?;
            Ok(job.finish(scale::container())?.success()?.text().trim().parse()?)
        };
        ensure!(count()? == COUNT, "{} of {COUNT} run", count()?);
        for name in &names {
            let code = shim.end_exec(name).with_context(|| name.clone())?;
            ensure!(code == 137, "{name}: exit code {code}");
        }
        ensure!(count()? == 0, "{} are left", count()?);
        drop(held);
        std::fs::remove_file(output)?;
        world.end(&run.id)
    });
}
