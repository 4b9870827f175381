//! A pod by containerd's CRI plugin: until its first container says something, each further container, and its removal.

use std::time::Instant;

use anyhow::Result;
use rvm_tests::{
    cri::{Cri, Pod},
    stage::Stage,
    world::World,
};
use serde_json::{Value, json};

use crate::{median, swept};

/// What is timed of each.
const PARTS: [&str; 3] = ["pod", "further container", "pod's removal"];

/// Everything timed.
pub fn measure(stage: Stage, runs: usize) -> Result<Value> {
    let world = World::new(stage)?;
    swept(&world, |world| {
        Cri::prepare(world)?;
        Cri::with_both(world, |cris| timed(cris, runs))
    })
}

fn timed(cris: &[Cri; 2], runs: usize) -> Result<Value> {
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
    Ok(json!({
        "ratios": ratios,
        "medians_ms": medians,
        "runs_ms": all,
        "conditions": {
            "runs": runs,
            "guest": "vCPUs and memory as the configuration's defaults say",
            "pod": "RunPodSandbox with a network by CNI's bridge, CreateContainer and StartContainer of busybox's sh, until its echo is in the log",
            "further container": "CreateContainer and StartContainer of a second one, until its echo is in the log",
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

/// Starts a container and waits for what it says.
fn say(pod: &Pod<'_>, name: &str) -> Result<()> {
    let container = pod.start(name, &["sh", "-c", "echo here; exec sleep 100000"], |_| {})?;
    container.printed("here").map(drop)
}
