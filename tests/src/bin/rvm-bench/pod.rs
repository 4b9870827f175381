//! A pod by containerd's CRI plugin: until its first container says something, each further container, and its removal;
//! and what one that waits uses of the host beside what its container uses.

use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use k8s_cri::v1::{LinuxContainerConfig, LinuxContainerResources};
use rvm_tests::{
    cri::{Cri, Pod},
    stage::Stage,
    world::World,
};
use serde_json::{Value, json};

use crate::{median, swept};

/// What is timed of each.
const PARTS: [&str; 3] = ["pod", "further container", "pod's removal"];

/// Memory limits of pods that wait, in MiB.
const LIMITS_MIB: [i64; 4] = [64, 256, 1024, 2048];
/// How long one waits before and while it is looked at.
const IDLE: Duration = Duration::from_secs(10);

/// Everything timed.
pub fn measure(stage: Stage, runs: usize) -> Result<Value> {
    let world = World::new(stage)?;
    swept(&world, |world| {
        Cri::prepare(world)?;
        Cri::with_all(world, |cris| timed(cris, runs))
    })
}

/// Of runc and rvm, which are the first.
fn timed(cris: &[Cri], runs: usize) -> Result<Value> {
    let mut times = [const { [const { Vec::new() }; PARTS.len()] }; 2];
    // The first round fills caches and is not counted.
    for round in 0..=runs {
        for (cri, times) in cris.iter().zip(&mut times) {
            let took = one(cri)?;
            let [pod, further, removal] = took;
            eprintln!(
                "round {round}, {}: pod {pod:.0} ms, further {further:.0}, removal {removal:.0}",
                cri.handler()
            );
            if round > 0 {
                times.iter_mut().zip(took).for_each(|(times, took)| times.push(took));
            }
        }
    }
    let [runc, rvm] = &times;
    let (mut ratios, mut medians, mut all) = (json!({}), json!({}), json!({}));
    for (n, part) in PARTS.iter().enumerate() {
        let (ours, theirs) = (median(&rvm[n]), median(&runc[n]));
        ratios[format!("rvm/runc, {part}")] = json!(ours / theirs);
        medians[part] = json!({ "rvm": ours, "runc": theirs });
        all[part] = json!({ "rvm": rvm[n], "runc": runc[n] });
    }
    let mut waiting = json!({});
    for mib in LIMITS_MIB {
        let [runc, rvm] = [idle(&cris[0], mib)?, idle(&cris[1], mib)?];
        eprintln!("{mib} MiB, idle: runc {runc:?}, rvm {rvm:?}");
        ratios[format!("rvm/runc, memory of a pod of {mib} MiB that waits")] = json!(rvm.mib / runc.mib);
        waiting[mib.to_string()] = json!({
            "overhead_mib": rvm.mib - runc.mib,
            "overhead_millicpus": rvm.millicpus - runc.millicpus,
        });
    }
    Ok(json!({
        "ratios": ratios,
        "medians_ms": medians,
        "runs_ms": all,
        "waiting_by_limit_mib": waiting,
        "conditions": {
            "runs": runs,
            "guest": "vCPUs and memory as the configuration's defaults say",
            "pod": "RunPodSandbox with a network by CNI's bridge, CreateContainer and StartContainer of busybox's sh, until its echo is in the log",
            "further container": "CreateContainer and StartContainer of a second one, until its echo is in the log",
            "waiting": "the pod's cgroup, of which the limit is its one container's, which sleeps: memory.current and cpu.stat",
            "pod's removal": "StopPodSandbox and RemovePodSandbox with both running",
            "host_kernel": std::fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default().trim(),
            "devhost": std::env::var(rvm_tests::host::DEVHOST_ENV).ok(),
        },
    }))
}

/// Milliseconds of each part.
fn one(cri: &Cri) -> Result<[f64; PARTS.len()]> {
    let begun = Instant::now();
    let pod = Pod::run(cri, "timed", |_| {})?;
    say(&pod, "first")?;
    let first = begun.elapsed();
    say(&pod, "second")?;
    let second = begun.elapsed();
    pod.remove()?;
    let removed = begun.elapsed();
    Ok([first, second - first, removed - second].map(|took| took.as_secs_f64() * 1e3))
}

/// What a pod uses that waits.
#[derive(Debug)]
struct Idle {
    mib: f64,
    millicpus: f64,
}

fn idle(cri: &Cri, mib: i64) -> Result<Idle> {
    let pod = Pod::run(cri, "waiting", |_| {})?;
    let resources = LinuxContainerResources { memory_limit_in_bytes: mib << 20, ..Default::default() };
    let limit = |config: &mut k8s_cri::v1::ContainerConfig| {
        let linux = config.linux.get_or_insert_with(LinuxContainerConfig::default);
        linux.resources = Some(resources);
    };
    pod.start("waits", &["sh", "-c", "echo here; exec sleep 100000"], limit)?.printed("here")?;
    std::thread::sleep(IDLE);
    let busy = || -> Result<f64> {
        let text = pod.cgroup_file("cpu.stat")?;
        let line = text.lines().find_map(|line| line.strip_prefix("usage_usec ")).context("usage_usec")?;
        Ok(line.parse::<f64>()? / 1e6)
    };
    let before = busy()?;
    std::thread::sleep(IDLE);
    let millicpus = (busy()? - before) / IDLE.as_secs_f64() * 1e3;
    let mib = pod.cgroup_file("memory.current")?.trim().parse::<f64>()? / f64::from(1 << 20);
    pod.remove()?;
    Ok(Idle { mib, millicpus })
}

/// Starts a container and waits for what it says.
fn say(pod: &Pod<'_>, name: &str) -> Result<()> {
    let container = pod.start(name, &["sh", "-c", "echo here; exec sleep 100000"], |_| {})?;
    container.printed("here").map(drop)
}
