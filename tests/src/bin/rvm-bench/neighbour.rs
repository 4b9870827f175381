//! What a sandbox loses by a neighbour that takes all it can get of the little it was given, side by side with
//! runc: a processor's time, files, an added process.

use std::{
    collections::BTreeMap,
    path::Path,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, ensure};
use rvm_tests::{
    ctr::{Ctr, Run},
    host,
    job::Input,
    parity::probe_at,
    scale,
    stage::{RUNTIME, Stage},
    world::World,
};
use serde_json::{Value, json};

use crate::{RUNC, median, swept};

/// Of a processor, what a neighbour may use once it runs (`cpu.max`), and whatever works for it.
const QUOTA: &str = "5000 100000";
const MEMORY: [&str; 2] = ["--memory-limit", "67108864"];
/// Where the kernel's own log goes that nobody reads.
const NOWHERE: [&str; 2] = ["--log-uri", "file:///dev/null"];

/// What a neighbour does.
const NEIGHBOURS: [(&str, &str); 5] = [
    ("a loop", "while :; do :; done"),
    ("output", "exec yes a line that nobody reads"),
    ("files", "while :; do for n in $(seq 200); do echo > /volume/$n; done; rm /volume/*; done"),
    ("connections", "exec /probe flood"),
    ("want of memory", "while :; do head -c 200000000 /dev/zero | tail -c 150000000 | wc -c; done"),
];

/// How often in each round a figure is taken with the neighbour and without it, one right after the other and each first
/// in turn: a machine whose speed changes does so for both.
const PAIRS: usize = 4;

/// What the other one is asked to do, by an added process.
const FIGURES: [(&str, &str); 3] = [
    ("an added process", "true"),
    ("a loop", "i=0; while [ $i -lt 20000 ]; do i=$((i+1)); done"),
    (
        "files on a volume",
        "for n in $(seq 60); do echo content > /volume/$n; done; cat /volume/* | wc -l; rm /volume/*",
    ),
];

/// Everything measured.
pub fn measure(stage: Stage, runs: usize) -> Result<Value> {
    let world = World::new(stage)?;
    swept(&world, |world| compared(world, runs))
}

fn compared(world: &World, runs: usize) -> Result<Value> {
    // Of each figure, runtime and neighbour: alone, and a moment later beside it.
    let mut all: BTreeMap<(usize, usize, usize), Vec<[f64; 2]>> = BTreeMap::new();
    let runtimes = [("rvm", RUNTIME), ("runc", RUNC)];
    for round in 1..=runs {
        for (side, (name, runtime)) in runtimes.iter().enumerate() {
            let ctr = world.ctr().under(runtime);
            let victim = started(world, ctr.container("victim"), "victim", "exec sleep 1000000")?;
            // What is done for the first time is slower.
            for what in FIGURES {
                figure(&ctr, &victim, what)?;
            }
            for (kind, (neighbour, script)) in NEIGHBOURS.iter().enumerate() {
                let limited = ctr.container("neighbour").with(&MEMORY).with(&NOWHERE);
                let limited = started(world, limited, "neighbour", script)?;
                let cgroup = Path::new("/sys/fs/cgroup/default").join(&limited.id);
                std::fs::write(cgroup.join("cpu.max"), QUOTA)?;
                for (at, what) in FIGURES.into_iter().enumerate() {
                    for pair in 0..PAIRS {
                        let mut times = [0.0; 2];
                        for beside in if pair % 2 == 0 { [0, 1] } else { [1, 0] } {
                            frozen(&cgroup, beside == 0)?;
                            times[beside] = figure(&ctr, &victim, what)?;
                        }
                        let ([alone, beside], what) = (times, what.0);
                        eprintln!(
                            "round {round}, {name} beside {neighbour}: {alone:>9.1} {beside:>9.1} ms {what}"
                        );
                        all.entry((at, side, kind)).or_default().push(times);
                    }
                }
                frozen(&cgroup, false)?;
                ended(world, &ctr, &limited, "neighbour")?;
            }
            ended(world, &ctr, &victim, "victim")?;
            host::remove_runcs_parent();
        }
    }
    let (mut ratios, mut medians) = (serde_json::Map::new(), Vec::new());
    for (figure, (what, _)) in FIGURES.iter().enumerate() {
        for (side, (name, _)) in runtimes.iter().enumerate() {
            let pairs = |kind| &all[&(figure, side, kind)];
            for (kind, (neighbour, _)) in NEIGHBOURS.iter().enumerate() {
                let each: Vec<f64> = pairs(kind).iter().map(|[alone, beside]| beside / alone).collect();
                ratios
                    .insert(format!("{name} beside {neighbour}/{name} alone, {what}"), json!(median(&each)));
            }
            let alone: Vec<f64> = (0..NEIGHBOURS.len()).flat_map(pairs).map(|pair| pair[0]).collect();
            let beside = |kind| median(&pairs(kind).iter().map(|pair| pair[1]).collect::<Vec<_>>());
            let row: Vec<f64> =
                std::iter::once(median(&alone)).chain((0..NEIGHBOURS.len()).map(beside)).collect();
            medians.push(json!([format!("{name}, {what}"), row]));
        }
    }
    let kinds: Vec<&str> = std::iter::once("alone").chain(NEIGHBOURS.map(|(name, _)| name)).collect();
    Ok(json!({
        "ratios": ratios,
        "kinds": kinds,
        "medians": medians,
        "conditions": {
            "runs": runs,
            "units": "ms, of `ctr task exec`; ratios are of each pair, measured one after the other",
            "pairs": PAIRS * runs,
            "neighbour": "with 5 % of a processor and 64 MiB; alone: the neighbour frozen",
            "host_kernel": std::fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default().trim(),
            "devhost": std::env::var(rvm_tests::host::DEVHOST_ENV).ok(),
        },
    }))
}

/// Milliseconds of one of [`FIGURES`].
fn figure(ctr: &Ctr, victim: &Run, (what, script): (&str, &str)) -> Result<f64> {
    let began = Instant::now();
    let job = ctr.exec(&victim.id, &[], &["sh", "-c", script], Input::Nothing)?;
    job.finish(scale::container() * 4)?.success().with_context(|| what.to_owned())?;
    Ok(began.elapsed().as_secs_f64() * 1e3)
}

/// Stops all that is in a cgroup, or lets it go on. Where the kernel's own threads of a vhost device are in it too, which
/// nothing stops, it never says of itself that it is frozen: it is when it uses no processor.
fn frozen(cgroup: &Path, frozen: bool) -> Result<()> {
    std::fs::write(cgroup.join("cgroup.freeze"), if frozen { "1" } else { "0" })?;
    let used = || -> Result<u64> {
        let stat = std::fs::read_to_string(cgroup.join("cpu.stat"))?;
        let line = stat.lines().find_map(|line| line.strip_prefix("usage_usec ")).context("usage_usec")?;
        Ok(line.parse()?)
    };
    if !frozen {
        return Ok(());
    }
    let until = Instant::now() + scale::command();
    let mut before = used()?;
    loop {
        std::thread::sleep(Duration::from_millis(20));
        let now = used()?;
        if now == before {
            return Ok(());
        }
        ensure!(Instant::now() < until, "{}: is not frozen", cgroup.display());
        before = now;
    }
}

/// A container in the background with a directory of its own of the host's.
fn started(world: &World, run: Run, name: &str, script: &str) -> Result<Run> {
    let dir = world.dir().join(name);
    std::fs::create_dir_all(&dir)?;
    let volume = format!("type=bind,src={},dst=/volume,options=rbind:rw", dir.display());
    let run = run.with(&["--mount", &volume, "--mount", &probe_at("/probe")?]).detached();
    run.run(&["sh", "-c", script])?.success()?;
    Ok(run)
}

fn ended(world: &World, ctr: &Ctr, run: &Run, name: &str) -> Result<()> {
    ctr.remove(&run.id)?;
    Ok(std::fs::remove_dir_all(world.dir().join(name))?)
}
