//! What developers and services do with files (`workloads.sh`), on the root file system and on a volume, side by side with
//! runc: the results are to be the same, and the times are told.

use std::{collections::BTreeMap, path::Path};

use anyhow::{Context, Result, ensure};
use rvm_tests::{
    images, scale,
    stage::{RUNTIME, Stage},
    world::World,
};
use serde_json::{Value, json};

use crate::{RUNC, files, median, swept};

/// The image's reference.
pub const IMAGE: &str = "docker.io/library/debian-workloads:latest";
/// Memory of the guest, in MiB.
pub const GUEST_MIB: &str = "2048";
/// Functions of a shell, of which `run` is to be said beside.
pub const SCRIPT: &str = include_str!("workloads.sh");

/// Everything measured; `image` is its archive.
pub fn measure(stage: Stage, runs: usize, image: &Path) -> Result<Value> {
    let world = World::new(stage)?;
    swept(&world, |world| {
        let archive = image.to_string_lossy();
        world.ctr().run(&["images", "import", &archive], scale::container() * 10)?.success()?;
        // A compiler takes more than the default.
        world.set_config(&world.config().with_images().set("guest", "memory_mib", GUEST_MIB))?;
        images::make_of(world, IMAGE, 1)?;
        compared(world, runs)
    })
}

fn compared(world: &World, runs: usize) -> Result<Value> {
    let sides = [RUNC, RUNTIME].map(|runtime| world.ctr().under(runtime));
    let mut all: BTreeMap<String, [Vec<f64>; 2]> = BTreeMap::new();
    let mut order = Vec::new();
    let (mut same, mut wrong) = (0, Vec::new());
    for round in 1..=runs {
        for (volume, place, suffix) in [(false, "/root", ""), (true, "/volume", ", on a volume")] {
            let script = format!("{SCRIPT}\nprepare; work {place} '{suffix}'");
            let mut results = Vec::new();
            for (which, ctr) in sides.iter().enumerate() {
                eprintln!("round {round}: {}{suffix}", ["runc", "rvm"][which]);
                let said = files::said(world, ctr, IMAGE, volume, &script)?;
                for (name, microseconds) in files::times(&said)? {
                    eprintln!("   {:>9.1} ms {name}", microseconds / 1e3);
                    if !all.contains_key(&name) {
                        order.push(name.clone());
                    }
                    all.entry(name).or_default()[which].push(microseconds / 1e3);
                }
                let lines = said.lines().filter_map(|line| line.strip_prefix("= "));
                results.push(lines.map(str::to_owned).collect::<Vec<_>>());
            }
            let [runc, rvm] = results.try_into().ok().context("two sides")?;
            ensure!(!runc.is_empty() && runc.len() == rvm.len(), "{runc:?} under runc, {rvm:?} under rvm");
            for (runc, rvm) in runc.iter().zip(&rvm) {
                if runc == rvm {
                    same += 1;
                } else {
                    wrong.push(format!("{suffix}: {runc} under runc, {rvm} under rvm"));
                }
            }
        }
    }
    let rows: Vec<_> = order.iter().map(|name| (name, all[name].each_ref().map(|ms| median(ms)))).collect();
    let ratios: serde_json::Map<_, _> =
        rows.iter().map(|(name, [runc, rvm])| (format!("rvm/runc, {name}"), json!(rvm / runc))).collect();
    let medians: Vec<_> = rows.iter().map(|(name, [runc, rvm])| json!([name, rvm, runc])).collect();
    Ok(json!({
        "ratios": ratios,
        "medians_ms, rvm and runc": medians,
        "runs_ms, runc and rvm": all,
        "results": { "same": same, "wrong": wrong },
        "conditions": {
            "runs": runs,
            "image": "Debian 12 with git, npm, cargo, pip, PostgreSQL; as an image file under rvm",
            "volume": "a directory on a tmpfs of the host, bound read-write",
            "guest": format!("one vCPU, {GUEST_MIB} MiB; runc has all of the host's memory"),
            "host_kernel": std::fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default().trim(),
            "devhost": std::env::var(rvm_tests::host::DEVHOST_ENV).ok(),
        },
    }))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_shell_can_read_it() -> Result<()> {
        let output = std::process::Command::new("bash").args(["-n", "-c", SCRIPT]).output()?;
        ensure!(output.status.success() && output.stderr.is_empty(), "{output:?}");
        Ok(())
    }
}
