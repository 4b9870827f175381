//! A container's start, an added process and a container that joins a running sandbox, side by side with runc.
//!
//! Rounds of one run each in turn, so that what slows the machine for a while
//! slows both.

use std::time::Instant;

use anyhow::{Context, Result};
use rvm_tests::{
    ctr::{Ctr, Run},
    images,
    job::Input,
    sandbox::Sandbox,
    scale,
    stage::{RUNTIME, Stage},
    task::Shim,
    timeline,
    world::World,
};
use serde_json::{Value, json};

use crate::{RUNC, median, swept};

/// Names of what [`Shim::exec`] times.
const CALLS: [&str; 4] = ["Exec", "Start", "Wait", "Delete"];

/// One runtime's times in milliseconds.
#[derive(Default)]
struct Times {
    /// `ctr run --rm` of `true`.
    start: Vec<f64>,
    /// `ctr task exec` of `true`.
    exec: Vec<f64>,
    /// The shim's part of an exec, by call.
    calls: Vec<[f64; 4]>,
}

/// Everything timed.
pub fn measure(stage: Stage, runs: usize) -> Result<Value> {
    let world = World::new(stage)?;
    swept(&world, |world| timed(world, runs))
}

fn timed(world: &World, runs: usize) -> Result<Value> {
    let ctrs = [world.ctr().under(RUNC), world.ctr().under(RUNTIME)];
    let mut times = [Times::default(), Times::default()];
    let mut client = Vec::new();
    let mut on_image = Vec::new();
    let (shared, image) = (world.config().set("images", "enabled", "false"), world.config().with_images());
    world.set_config(&image)?;
    ctrs[1].container("bench").run(&["/bin/true"])?.success()?;
    images::wait_for(world, 1)?;
    world.set_config(&shared)?;

    // The first round fills caches and is not counted.
    for round in 0..=runs {
        let mut took = [0.0; 2];
        for (ctr, took) in ctrs.iter().zip(&mut took) {
            *took = ms(|| ctr.container("bench").run(&["/bin/true"])?.success().map(drop))?;
        }
        world.set_config(&image)?;
        let with_image = ms(|| ctrs[1].container("bench").run(&["/bin/true"])?.success().map(drop))?;
        world.set_config(&shared)?;
        let version = ms(|| ctrs[0].run(&["version"], scale::command())?.success().map(drop))?;
        eprintln!(
            "start, round {round}: runc {:.0} ms, rvm {:.0} ms, with an image file {with_image:.0} ms",
            took[0], took[1]
        );
        if round > 0 {
            times[0].start.push(took[0]);
            times[1].start.push(took[1]);
            client.push(version);
            on_image.push(with_image);
        }
    }
    let steps = steps(world, &ctrs[1], runs)?;

    let holders: Vec<Run> = ctrs.iter().map(|ctr| ctr.container("held").detached()).collect();
    for holder in &holders {
        holder.run(&["sleep", "100000"])?.success()?;
    }
    for round in 0..=runs {
        let mut took = [0.0; 2];
        for ((ctr, holder), took) in ctrs.iter().zip(&holders).zip(&mut took) {
            *took = ms(|| {
                let job = ctr.exec(&holder.id, &[], &["/bin/true"], Input::Nothing)?;
                job.finish(scale::container())?.success().map(drop)
            })?;
        }
        eprintln!("exec, round {round}: runc {:.0} ms, rvm {:.0} ms", took[0], took[1]);
        for ((times, holder), took) in times.iter_mut().zip(&holders).zip(took) {
            let process = json!({ "args": ["/bin/true"], "cwd": "/", "env": ["PATH=/bin"], "user": { "uid": 0, "gid": 0 } });
            let executed = Shim::of(&holder.id)?.exec(&format!("timed-{round}"), &process, world.dir())?;
            if round > 0 {
                times.exec.push(took);
                times.calls.push(executed.calls_ms);
            }
        }
    }
    for (ctr, holder) in ctrs.iter().zip(&holders) {
        stop(world, ctr, holder)?;
    }
    let joins = joins(world, &ctrs, runs)?;
    Ok(result(&times, (&on_image, &client), &steps, &joins, runs))
}

/// A pod as containerd's CRI plugin makes it: a container that holds the sandbox, and others that
/// join it and three of its namespaces. Milliseconds of a container's start under runc, which makes
/// all that by itself, and of one that joins, under rvm.
fn joins(world: &World, ctrs: &[Ctr; 2], runs: usize) -> Result<[Vec<f64>; 2]> {
    let [runc, rvm] = ctrs;
    let pod = rvm.container("pod").detached();
    let of_pod = format!("io.kubernetes.cri.sandbox-id={}", pod.id);
    let sandbox = ["--annotation", "io.kubernetes.cri.container-type=sandbox", "--annotation", &of_pod];
    pod.clone().with(&sandbox).run(&["sleep", "100000"])?.success()?;
    let tasks = rvm.list(&["task", "ls"]);
    let pid = tasks.iter().find_map(|task| task.strip_prefix(&pod.id)?.split_whitespace().next());
    let pid = pid.context("the pod has no task")?;
    let namespaces = [("network", "net"), ("ipc", "ipc"), ("uts", "uts")]
        .map(|(kind, link)| format!("{kind}:/proc/{pid}/ns/{link}"));
    let mut member =
        vec!["--annotation", "io.kubernetes.cri.container-type=container", "--annotation", &of_pod];
    member.extend(namespaces.iter().flat_map(|namespace| ["--with-ns", namespace]));
    let mut times = [Vec::new(), Vec::new()];
    for round in 0..=runs {
        let alone = ms(|| runc.container("bench").run(&["/bin/true"])?.success().map(drop))?;
        let joined = ms(|| rvm.container("member").with(&member).run(&["/bin/true"])?.success().map(drop))?;
        eprintln!("join, round {round}: runc's start {alone:.0} ms, rvm's join {joined:.0} ms");
        if round > 0 {
            times[0].push(alone);
            times[1].push(joined);
        }
    }
    stop(world, rvm, &pod)?;
    Ok(times)
}

fn result(
    times: &[Times; 2],
    (on_image, client): (&[f64], &[f64]),
    steps: &[(String, f64)],
    joins: &[Vec<f64>; 2],
    runs: usize,
) -> Value {
    let [runc, rvm] = times;
    let (start, exec) = (median(&rvm.start), median(&rvm.exec));
    let calls = |times: &Times| -> Vec<f64> {
        (0..CALLS.len()).map(|n| median(&times.calls.iter().map(|all| all[n]).collect::<Vec<_>>())).collect()
    };
    let by_name = |values: &[f64]| -> Value {
        CALLS
            .iter()
            .zip(values)
            .map(|(name, ms)| ((*name).to_owned(), json!(ms)))
            .collect::<serde_json::Map<_, _>>()
            .into()
    };
    let (runc_calls, rvm_calls) = (calls(runc), calls(rvm));

    // Where the time goes: the shim's own steps, and what is around them.
    let shim_total = steps.iter().map(|step| step.1).sum::<f64>();
    let mut start_parts = steps.to_vec();
    start_parts.push(("ctr and containerd, exit and removal".to_owned(), start - shim_total));
    let mut exec_parts: Vec<(String, f64)> =
        CALLS.iter().zip(&rvm_calls).map(|(name, ms)| (format!("shim: {name}"), *ms)).collect();
    exec_parts.push(("ctr and containerd".to_owned(), exec - rvm_calls.iter().sum::<f64>()));

    json!({
        "ratios": {
            "rvm/runc, start": start / median(&runc.start),
            "rvm/runc, start, image file": median(on_image) / median(&runc.start),
            "rvm/runc, exec": exec / median(&runc.exec),
            "rvm/runc, join": median(&joins[1]) / median(&joins[0]),
        },
        "medians_ms": {
            "start": { "rvm": start, "runc": median(&runc.start) },
            "start, image file": { "rvm": median(on_image), "runc": median(&runc.start) },
            "exec": { "rvm": exec, "runc": median(&runc.exec) },
            "join": { "rvm": median(&joins[1]), "runc": median(&joins[0]) },
            "exec, the shim's calls": { "rvm": by_name(&rvm_calls), "runc": by_name(&runc_calls) },
            "ctr version": median(client),
        },
        "runs_ms": {
            "start": { "rvm": rvm.start, "runc": runc.start },
            "start, image file": { "rvm": on_image, "runc": runc.start },
            "exec": { "rvm": rvm.exec, "runc": runc.exec },
            "join": { "rvm": joins[1], "runc": joins[0] },
        },
        "parts_ms": { "start": start_parts, "exec": exec_parts },
        "largest_parts": { "start": largest(&start_parts), "exec": largest(&exec_parts) },
        "conditions": {
            "runs": runs,
            "guest": "vCPUs and memory as the configuration's defaults say",
            "start": "ctr run --rm of /bin/true in the busybox image, from ctr's start to its end",
            "image file": "the layers as one EROFS file system; where nothing is said they are shared by the monitor's file server",
            "exec": "ctr task exec of /bin/true in a running container, from ctr's start to its end",
            "join": "the same as start: under rvm in a running sandbox, by the annotations of containerd's CRI plugin and its network, IPC and UTS namespaces; under runc by itself",
            "parts": "rvm's steps are medians of as many ctr run --detach",
            "host_kernel": std::fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default().trim(),
            "devhost": std::env::var(rvm_tests::host::DEVHOST_ENV).ok(),
        },
    })
}

/// The three largest parts, the largest first.
fn largest(parts: &[(String, f64)]) -> Vec<(String, f64)> {
    let mut sorted = parts.to_vec();
    sorted.sort_by(|a, b| b.1.total_cmp(&a.1));
    sorted.truncate(3);
    sorted
}

/// How long each step of a start takes, in order: medians of starts of their own,
/// since the record of one goes with its container.
fn steps(world: &World, ctr: &Ctr, runs: usize) -> Result<Vec<(String, f64)>> {
    let mut all = Vec::new();
    for _ in 0..runs {
        let run = ctr.container("steps").detached();
        run.run(&["sleep", "100000"])?.success()?;
        all.push(timeline::of(&Sandbox::find(world.stage(), &run.id)?)?);
        stop(world, ctr, &run)?;
    }
    let names = all.first().context("no runs")?;
    let step = |n: usize| {
        let took = all.iter().filter_map(|steps| {
            let before = n.checked_sub(1).and_then(|n| steps.get(n)).map_or(0.0, |step| step.ms);
            Some(steps.get(n)?.ms - before)
        });
        median(&took.collect::<Vec<_>>())
    };
    Ok(names.iter().enumerate().map(|(n, named)| (named.name.clone(), step(n))).collect())
}

fn stop(world: &World, ctr: &Ctr, run: &Run) -> Result<()> {
    ctr.run(&["task", "kill", "-s", "SIGKILL", &run.id], scale::command())?.success()?;
    world.events(|events| events.wait_for("/tasks/exit", &run.id, scale::container()))?;
    ctr.remove(&run.id)
}

fn ms(act: impl FnOnce() -> Result<()>) -> Result<f64> {
    let started = Instant::now();
    act()?;
    Ok(started.elapsed().as_secs_f64() * 1e3)
}
