//! Many containers at once, side by side with runc: started by as many clients,
//! then killed and removed by as many that poll, as clients do.

use std::{
    path::Path,
    sync::Barrier,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, anyhow, ensure};
use rvm_tests::{
    ctr::{Ctr, Run},
    host,
    job::Input,
    sandbox::Sandbox,
    scale,
    stage::{RUNTIME, Stage},
    timeline,
    world::World,
};
use serde_json::{Value, json};

use crate::{RUNC, median, processor::ProcessorTimes, swept};

/// How long a client waits before it tries `task rm` again.
const RETRY: Duration = Duration::from_millis(500);

/// One round of one runtime: seconds from the first client's start.
struct Round {
    /// Until every container was started.
    started: f64,
    /// Until every container was removed.
    removed: f64,
    /// What one idle container took of `MemAvailable`, in MiB.
    memory_mib: f64,
    /// Of each container.
    ends: Vec<End>,
    /// Who used the processor for the start: [`ProcessorTimes::since`].
    processor: Value,
    /// Milliseconds of each step of the shim's, the median and the largest; none under runc.
    steps: Vec<(String, f64, f64)>,
}

/// How one container ended: seconds from the clients' start.
#[derive(Clone, Copy)]
struct End {
    /// `task kill` had returned.
    killed: f64,
    /// Its exit was published.
    exited: f64,
    /// `task rm` and `containers rm` had returned.
    removed: f64,
    /// How often `task rm` was refused.
    refused: u32,
}

/// Everything measured, with `count` containers.
pub fn measure(stage: Stage, runs: usize, count: usize) -> Result<Value> {
    beside_the_containers()?;
    let world = World::new(stage)?;
    swept(&world, |world| {
        let ctrs = [world.ctr().under(RUNC), world.ctr().under(RUNTIME)];
        // Caches are filled by one container of each.
        for ctr in &ctrs {
            ctr.container("warm").run(&["/bin/true"])?.success()?;
        }
        let mut rounds: [Vec<Round>; 2] = Default::default();
        for number in 1..=runs {
            for ((ctr, rounds), name) in ctrs.iter().zip(&mut rounds).zip(["runc", "rvm"]) {
                let round = round(world, ctr, count, name == "rvm").with_context(|| name.to_owned())?;
                eprintln!(
                    "round {number}, {name}: {count} started in {:.1} s, removed in {:.1} s, {:.1} MiB each",
                    round.started, round.removed, round.memory_mib
                );
                rounds.push(round);
            }
        }
        Ok(result(&rounds, count))
    })
}

/// Puts this process, and with it containerd and the clients, into a cgroup beside that of the
/// containers, where systemd has them on every host. In the root cgroup, where the devhost starts
/// programs, each single client would weigh as much as all containers together.
fn beside_the_containers() -> Result<()> {
    let root = Path::new("/sys/fs/cgroup");
    let in_the_root = std::fs::read_to_string("/proc/self/cgroup")?.lines().any(|line| line == "0::/");
    if !in_the_root || !root.join("cgroup.subtree_control").exists() {
        return Ok(());
    }
    std::fs::write(root.join("cgroup.subtree_control"), "+cpu").context("enabling the cpu controller")?;
    let own = root.join("clients");
    std::fs::create_dir_all(&own)?;
    std::fs::write(own.join("cgroup.procs"), std::process::id().to_string()).context("moving to a cgroup")
}

fn round(world: &World, ctr: &Ctr, count: usize, is_rvm: bool) -> Result<Round> {
    let before = available_mib()?;
    let containers: Vec<Run> = (0..count).map(|_| ctr.container("many").detached()).collect();
    let times = ProcessorTimes::now();
    let started = at_once(world, &containers, |_, run| {
        run.start(&["sleep", "100000"], Input::Nothing)?.finish(limit(count))?.success().map(drop)
    })?;
    let started = started.into_iter().map(|(at, ())| at).fold(0.0, f64::max);
    let processor = times.since(&ProcessorTimes::now());
    let memory_mib = (before - settled_mib()?) / count as f64;
    let steps = if is_rvm { steps(world, &containers)? } else { Vec::new() };

    let wall = wall_clock();
    let removed = at_once(world, &containers, |since, run| {
        let kill = ctr.command(&["task", "kill", "-s", "SIGKILL", &run.id]);
        rvm_tests::job::run(kill, Input::Nothing, limit(count))?.success()?;
        let killed = since.elapsed().as_secs_f64();
        let mut refused = 0;
        while ctr.run(&["task", "rm", &run.id], limit(count))?.code() != 0 {
            refused += 1;
            ensure!(since.elapsed() < limit(count), "{} cannot be removed", run.id);
            std::thread::sleep(RETRY);
        }
        ctr.run(&["containers", "rm", &run.id], limit(count))?.success()?;
        Ok((killed, refused))
    })?;
    let ends = containers.iter().zip(&removed).map(|(run, &(removed, (killed, refused)))| {
        world.events(|events| events.wait_for("/tasks/exit", &run.id, scale::command()))?;
        let exit = world.events(|events| events.of(&run.id))?;
        let exit = exit.iter().find(|event| event.is_end_of(&run.id)).context("no exit")?;
        let exited = (exit.at - wall).rem_euclid(24.0 * 3600.0);
        Ok(End { killed, exited, removed, refused })
    });
    Ok(Round {
        started,
        removed: removed.iter().map(|one| one.0).fold(0.0, f64::max),
        memory_mib,
        ends: ends.collect::<Result<_>>()?,
        processor,
        steps,
    })
}

/// Runs `act` for every container, each in a thread, all beginning together. Returns when each was
/// done, in seconds, and what it returned.
fn at_once<T: Send>(
    world: &World,
    containers: &[Run],
    act: impl Fn(Instant, &Run) -> Result<T> + Sync,
) -> Result<Vec<(f64, T)>> {
    let barrier = Barrier::new(containers.len());
    std::thread::scope(|scope| {
        let threads: Vec<_> = containers
            .iter()
            .map(|run| {
                scope.spawn(|| {
                    let entered = world.enter();
                    barrier.wait();
                    entered?;
                    let since = Instant::now();
                    let result = act(since, run)?;
                    Ok((since.elapsed().as_secs_f64(), result))
                })
            })
            .collect();
        threads.into_iter().map(|thread| thread.join().map_err(|_| anyhow!("a client panicked"))?).collect()
    })
}

/// Each waits for all the others.
fn limit(count: usize) -> Duration {
    scale::container() * u32::try_from(count).unwrap_or(u32::MAX)
}

/// The steps of the containers' starts: name, median and largest milliseconds.
fn steps(world: &World, containers: &[Run]) -> Result<Vec<(String, f64, f64)>> {
    let all = containers
        .iter()
        .map(|run| timeline::of(&Sandbox::find(world.stage(), &run.id)?))
        .collect::<Result<Vec<_>>>()?;
    let names = all.first().context("no containers")?;
    let took = |n: usize| -> Vec<f64> {
        let one = |steps: &Vec<timeline::Step>| {
            let before = n.checked_sub(1).and_then(|n| steps.get(n)).map_or(0.0, |step| step.ms);
            Some(steps.get(n)?.ms - before)
        };
        all.iter().filter_map(one).collect()
    };
    let step = |(n, step): (usize, &timeline::Step)| {
        let took = took(n);
        (step.name.clone(), median(&took), took.iter().copied().fold(0.0, f64::max))
    };
    Ok(names.iter().enumerate().map(step).collect())
}

/// `MemAvailable` once it changes no more: what a start has freed comes back late.
fn settled_mib() -> Result<f64> {
    let mut last = available_mib()?;
    for _ in 0..20 {
        std::thread::sleep(Duration::from_secs(1));
        let now = available_mib()?;
        if (now - last).abs() < 1.0 {
            return Ok(now);
        }
        last = now;
    }
    Ok(last)
}

fn available_mib() -> Result<f64> {
    Ok(host::kib("meminfo", "MemAvailable")? as f64 / 1024.0)
}

/// Seconds of the day in UTC, as events have them.
fn wall_clock() -> f64 {
    let since = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap_or_default();
    since.as_secs_f64().rem_euclid(24.0 * 3600.0)
}

fn result(rounds: &[Vec<Round>; 2], count: usize) -> Value {
    let of = |what: fn(&Round) -> f64| {
        let [runc, rvm] = rounds.each_ref().map(|rounds| rounds.iter().map(what).collect::<Vec<_>>());
        (median(&rvm), median(&runc), json!({ "rvm": rvm, "runc": runc }))
    };
    let (start_rvm, start_runc, starts) = of(|round| round.started);
    let (removal_rvm, removal_runc, removals) = of(|round| round.removed);
    let (memory_rvm, memory_runc, memories) = of(|round| round.memory_mib);
    let ends = |rounds: &[Round]| {
        let all: Vec<End> = rounds.iter().flat_map(|round| round.ends.clone()).collect();
        let row = |what: fn(&End) -> f64| {
            let values: Vec<f64> = all.iter().map(what).collect();
            json!([median(&values), values.iter().copied().fold(0.0, f64::max)])
        };
        json!({
            "task kill returned": row(|end| end.killed),
            "exit published": row(|end| end.exited),
            "exit after the kill": row(|end| (end.exited - end.killed).max(0.0)),
            "removed": row(|end| end.removed),
            "removed after the exit": row(|end| end.removed - end.exited),
            "refusals of task rm": row(|end| f64::from(end.refused)),
        })
    };
    let [runc, rvm] = rounds;
    let mut steps = Vec::new();
    for (n, (name, ..)) in
        rvm.first().map(|round| round.steps.as_slice()).unwrap_or_default().iter().enumerate()
    {
        let column = |what: fn(&(String, f64, f64)) -> f64| {
            rvm.iter().filter_map(|round| round.steps.get(n)).map(what).collect::<Vec<_>>()
        };
        steps.push((name.clone(), median(&column(|step| step.1)), median(&column(|step| step.2))));
    }
    json!({
        "ratios": {
            format!("rvm/runc, start of {count}"): start_rvm / start_runc,
            format!("rvm/runc, removal of {count}"): removal_rvm / removal_runc,
        },
        "memory_mib": { "rvm": memory_rvm, "runc": memory_runc },
        "medians_s": {
            "start": { "rvm": start_rvm, "runc": start_runc },
            "removal": { "rvm": removal_rvm, "runc": removal_runc },
        },
        "rounds": { "start_s": starts, "removal_s": removals, "memory_mib": memories },
        "removal_s, median and largest": { "rvm": ends(rvm), "runc": ends(runc) },
        "start_processor_s, of the last round": {
            "rvm": rvm.last().map(|round| &round.processor),
            "runc": runc.last().map(|round| &round.processor),
        },
        "start_steps_ms, median and largest": steps,
        "conditions": {
            "runs": runc.len(),
            "containers": count,
            "start": "as many clients at once, each ctr run --detach of sleep in the busybox image",
            "removal": "as many clients at once, each ctr task kill with SIGKILL, then ctr task rm every half second until it is accepted, then ctr containers rm",
            "cgroups": "containerd and the clients in one of their own beside the containers', as under systemd",
            "memory": "MemAvailable before the start less that after it, by the number of containers, each with its shim (and monitor)",
            "guest": "vCPUs and memory as the configuration's defaults say",
            "host_kernel": std::fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default().trim(),
            "devhost": std::env::var(rvm_tests::host::DEVHOST_ENV).ok(),
        },
    })
}
