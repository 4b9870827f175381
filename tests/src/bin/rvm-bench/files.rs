//! What programs do with files, side by side with runc: in a Debian image of one
//! layer and of several, with and without a volume beside it, and on the volume.
//!
//! Each container does everything once, then again: what a file system costs that
//! is used for the first time, and what it costs once its guest knows it. Times
//! are taken inside by the shell itself.

use std::{collections::BTreeMap, path::PathBuf};

use anyhow::{Context, Result, bail, ensure};
use rvm_tests::{
    ctr::{Ctr, Run},
    images,
    job::Input,
    scale,
    stage::{RUNTIME, Stage},
    world::World,
};
use serde_json::{Value, json};

use crate::{RUNC, median, swept};

/// The images' references, of one layer and of five.
pub const IMAGES: [(&str, &str); 2] = [
    ("", "docker.io/library/debian-services:latest"),
    (", five layers", "docker.io/library/debian-services:five"),
];

/// Where a container's writes go: what it is called, and section, key and value of the configuration.
const SCRATCHES: [(&str, [&str; 3]); 3] = [
    ("guest", ["scratch", "writes", "\"guest\""]),
    ("host", ["scratch", "writes", "\"host\""]),
    ("memory", ["scratch", "writes", "\"memory\""]),
];

/// Times one thing: `run NAME COMMAND...` prints `@ MICROSECONDS NAME`.
pub const RUN: &str = r#"
LC_ALL=C
run() {
    local name=$1 from=${EPOCHREALTIME/./}; shift
    "$@" > /dev/null || { echo "failed: $name"; exit 1; }
    echo "@ $(( ${EPOCHREALTIME/./} - from )) $name"
}
trues() { for n in {1..100}; do /bin/true || return; done; }
imports() { python3 -c 'import json, ssl, http.client, urllib.request, sqlite3, email.message'; }
archive() { tar -cf - /usr/lib | cat; }
image() {
    run "100 x true$1" trues
    run "python3 imports$1" imports
    run "find$1" find / -xdev
    run "stat of all files$1" find / -xdev -printf '%s %m\n'
    run "tar of /usr/lib$1" archive
}
small() { for n in {1..1000}; do echo "the content of file $n" > "$1/small/$n" || return; done; }
read_small() { cat "$1"/small/*; }
writes() {
    mkdir "$1/small" || exit 1
    run "64 MiB written$2" dd if=/dev/zero of="$1/large" bs=1M count=64 status=none
    run "64 MiB read$2" cat "$1/large"
    run "64 MiB removed$2" rm "$1/large"
    run "1,000 small files written$2" small "$1"
    run "1,000 small files read$2" read_small "$1"
    run "1,000 small files removed$2" rm -r "$1/small"
}
"#;

/// What is compared: a runtime, and how the image's layers come to the container.
#[derive(Clone, Copy)]
struct Side {
    name: &'static str,
    runtime: &'static str,
    /// `images.enabled`.
    images: &'static str,
    snapshotter: Option<&'static str>,
}

const EROFS: &str = "erofs";

/// The first is what the others are compared with.
const SIDES: [Side; 4] = [
    Side { name: "runc", runtime: RUNC, images: "false", snapshotter: None },
    Side { name: "rvm", runtime: RUNTIME, images: "false", snapshotter: None },
    Side { name: "rvm, image file", runtime: RUNTIME, images: "true", snapshotter: None },
    Side { name: "rvm, EROFS snapshotter", runtime: RUNTIME, images: "true", snapshotter: Some(EROFS) },
];

/// Microseconds by what was timed, in the order of the container's lines.
type Times = Vec<(String, f64)>;

/// Everything measured; `images` are the archives of [`IMAGES`], or of the first ones.
pub fn measure(stage: Stage, runs: usize, images: &[PathBuf]) -> Result<Value> {
    let world = World::new(stage)?;
    swept(&world, |world| {
        for archive in images {
            let archive = archive.to_string_lossy();
            world.ctr().run(&["images", "import", &archive], scale::container() * 10)?.success()?;
        }
        world.set_config(&world.config().with_images())?;
        let images = &IMAGES[..images.len()];
        for (count, (_, image)) in (1..).zip(images) {
            images::make_of(world, image, count)?;
        }
        compared(world, runs, images)
    })
}

fn compared(world: &World, runs: usize, images: &[(&str, &str)]) -> Result<Value> {
    let ctrs = [("runc", world.ctr().under(RUNC)), ("rvm", world.ctr().under(RUNTIME))];
    let mut sides = SIDES.to_vec();
    if !world.ctr().has_snapshotter(EROFS) {
        sides.retain(|side| side.snapshotter.is_none());
    }
    let mut all: BTreeMap<String, [Vec<f64>; SIDES.len()]> = BTreeMap::new();
    let mut order = Vec::new();
    let mut add = |which: usize, times: Times| {
        for (name, microseconds) in times {
            // A run takes long; what it has found so far is worth something by itself.
            eprintln!("   {:>9.1} ms {name}", microseconds / 1e3);
            if !all.contains_key(&name) {
                order.push(name.clone());
            }
            all.entry(name).or_default()[which].push(microseconds / 1e3);
        }
    };
    let mut scratches = Vec::new();
    for round in 1..=runs {
        for (layers, image) in images {
            for volume in [false, true] {
                for (which, side) in sides.iter().enumerate() {
                    world.set_config(&world.config().set("images", "enabled", side.images))?;
                    let with = if volume { ", with a volume" } else { "" };
                    eprintln!("round {round}: {}{layers}{with}", side.name);
                    let suffix = format!("{layers}{with}");
                    let mut script = format!("image '{suffix}'; image ' again{suffix}'; ");
                    script += &format!("writes /root '{suffix}'; ");
                    if volume && layers.is_empty() {
                        script += "writes /volume ' on a volume'; ";
                    }
                    let mut run = world.ctr().under(side.runtime).container("files").with_image(image);
                    if let Some(snapshotter) = side.snapshotter {
                        run = run.with(&["--snapshotter", snapshotter]);
                    }
                    add(which, times(&run_script(world, run, volume, &script)?)?);
                }
            }
        }
        for (name, [section, key, value]) in SCRATCHES {
            world.set_config(&world.config().set(section, key, value))?;
            let script = format!("writes /root ', writes to {name}'");
            for (which, (runtime, ctr)) in ctrs.iter().enumerate().rev() {
                eprintln!("round {round}: {runtime}, writes to {name}");
                match container(world, ctr, IMAGES[0].1, false, &script) {
                    Ok(times) => add(which, times),
                    // A configuration of another version; runc is not asked then.
                    Err(error)
                        if round == 1 && format!("{error:#}").contains(&format!("{section}.{key}")) =>
                    {
                        eprintln!("writes to {name}: {error:#}");
                        break;
                    }
                    Err(error) => return Err(error),
                }
                if !scratches.contains(&name) {
                    scratches.push(name);
                }
            }
        }
    }
    world.set_config(&world.config())?;
    let mut ratios = serde_json::Map::new();
    let mut medians = Vec::new();
    for name in order {
        let [runc, others @ ..] = all[&name].each_ref().map(|values| median(values));
        for (ms, side) in others.into_iter().zip(&SIDES[1..]).filter(|(ms, _)| ms.is_finite()) {
            let name = format!("{name}{}", side.name.trim_start_matches("rvm"));
            ratios.insert(format!("rvm/runc, {name}"), json!(ms / runc));
            medians.push(json!([name, ms, runc]));
        }
    }
    Ok(json!({
        "ratios": ratios,
        "medians_ms, rvm and runc": medians,
        "sides": SIDES.map(|side| side.name),
        "runs_ms, of each side": all,
        "conditions": {
            "runs": runs,
            "image": "Debian 12 with nginx, PostgreSQL and Python, one layer where nothing is said",
            "again": "the same in the same container a second time",
            "image file": "the layers as one EROFS file system; shared by the monitor's file server where nothing is said",
            "EROFS snapshotter": "containerd's, where it has it: each layer as a file system of its own",
            "containerd": world.ctr().list(&["--version"]),
            "volume": "a directory on a tmpfs of the host, bound read-write",
            "writes": "on the root file system, as the configuration's default has it where nothing is said",
            "writes to": scratches,
            "guest": "vCPUs and memory as the configuration's defaults say",
            "file system of containerd": world.stage().file_system_name(),
            "host_kernel": std::fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default().trim(),
            "devhost": std::env::var(rvm_tests::host::DEVHOST_ENV).ok(),
        },
    }))
}

/// Runs a script in a container of its own; what it timed.
fn container(world: &World, ctr: &Ctr, image: &str, volume: bool, script: &str) -> Result<Times> {
    times(&said(world, ctr, image, volume, script)?)
}

/// Runs a script that may use `run` in a container of its own, with a directory of the host's at `/volume` where that is
/// wanted; what it said.
pub fn said(world: &World, ctr: &Ctr, image: &str, volume: bool, script: &str) -> Result<String> {
    run_script(world, ctr.container("files").with_image(image), volume, script)
}

fn run_script(world: &World, mut run: Run, volume: bool, script: &str) -> Result<String> {
    let dir = world.dir().join("volume");
    std::fs::create_dir_all(&dir)?;
    let mount = format!("type=bind,src={},dst=/volume,options=rbind:rw", dir.display());
    if volume {
        run = run.with(&["--mount", &mount]);
    }
    let script = format!("{RUN}{script}");
    let finished = run.start(&["bash", "-c", &script], Input::Nothing)?.finish(scale::container() * 10)?;
    std::fs::remove_dir_all(&dir)?;
    if finished.code() != 0 {
        bail!("{finished}");
    }
    let said = finished.text();
    ensure!(!times(&said).with_context(|| finished.to_string())?.is_empty(), "{finished}");
    Ok(said)
}

/// What was timed, of what a script said.
pub fn times(text: &str) -> Result<Times> {
    let lines = text.lines().filter_map(|line| line.strip_prefix("@ "));
    lines
        .map(|line| {
            let (time, name) = line.split_once(' ').context("no name")?;
            Ok((name.to_owned(), time.parse().context("microseconds")?))
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_shell_times_what_it_runs() -> Result<()> {
        let dir = tempfile::tempdir()?;
        let script = format!("{RUN} run 'a pause' sleep 0.2; writes {} ' here'", dir.path().display());
        let output = std::process::Command::new("bash").args(["-c", &script]).output()?;
        let times = times(&String::from_utf8_lossy(&output.stdout))?;
        ensure!(output.status.success() && times.len() == 7, "{output:?}");
        ensure!(times[0].0 == "a pause" && (2e5..5e6).contains(&times[0].1), "{times:?}");
        ensure!(times[6].0 == "1,000 small files removed here", "{times:?}");
        Ok(())
    }

    #[test]
    fn what_fails_ends_the_script() -> Result<()> {
        let script = format!("{RUN} run 'nothing' false; run never true");
        let output = std::process::Command::new("bash").args(["-c", &script]).output()?;
        ensure!(output.status.code() == Some(1) && output.stdout == b"failed: nothing\n", "{output:?}");
        Ok(())
    }
}
