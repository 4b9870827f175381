//! The part of `cargo xtask fstest` that runs where KVM is: pjdfstest and fsx
//! inside a container, on its root file system and on a volume, under runc and
//! under rvm. What counts is what fails under rvm and passes under runc.

mod pjdfstest;

use std::{path::PathBuf, process::ExitCode, time::Duration};

use anyhow::{Context, Result, ensure};
use rvm_tests::{
    images,
    stage::{RUNTIME, Stage},
    world::{World, shell},
};

use pjdfstest::{Outcome, Results};

const RUNC: &str = "io.containerd.runc.v2";
/// For one of the programs in one place, on a software CPU.
const LIMIT: Duration = Duration::from_secs(900);
/// Where in the container the file systems under test are.
const PLACES: [(&str, &str); 2] = [("root file system", "/fst"), (VOLUME, "/v/fst")];
const VOLUME: &str = "volume";

/// Users whose rights pjdfstest tries, as the busybox image names them; the
/// sleeps are longer than an ext4 time stamp's grain (a tick).
const PJDFSTEST_CONFIG: &str = "\
[features]\nposix_fallocate = {}\nutimensat = {}\nutime_now = {}\nrename_ctime = {}\n\
[settings]\nnaptime = 0.02\n\
[dummy_auth]\nentries = [[\"nobody\", \"nogroup\"], [\"user\", \"user\"]]\n";

/// Every operation of fsx that Linux has.
const FSX_CONFIG: &str = "\
[weights]\nclose_open = 1\nread = 10\nwrite = 10\nmapread = 10\nmapwrite = 10\ninvalidate = 1\ntruncate = 5\n\
fsync = 1\nfdatasync = 1\nposix_fallocate = 1\npunch_hole = 2\nsendfile = 1\nposix_fadvise = 1\ncopy_file_range = 2\n";

/// What is not the same on a volume and is meant, by the end of the test's name.
const INTENDED: &[(&str, &str)] =
    &[("link::link_count_max", "the C library tells LINK_MAX by the type of the file system, which is FUSE")];

fn main() -> ExitCode {
    match run() {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("rvm-fstest: {error:#}");
            ExitCode::FAILURE
        }
    }
}

/// Whether nothing fails under rvm alone.
fn run() -> Result<bool> {
    let mut arguments = std::env::args().skip(1);
    let tools = PathBuf::from(arguments.next().context("the directory of the tools is missing")?);
    let operations: u32 = arguments.next().context("how many operations of fsx")?.parse()?;
    let patterns: Vec<String> = arguments.collect();
    let world = World::new(Stage::from_env()?)?;
    compare(&world, &tools, operations, &patterns)
}

fn compare(world: &World, tools: &std::path::Path, operations: u32, patterns: &[String]) -> Result<bool> {
    let config = world.config().text("scratch", "backing", "block").set("scratch", "size_mib", "1024");
    world.set_config(&config.with_images())?;
    // The root file system under test has an image file below.
    world.ctr().container("first").run(&["true"])?.success()?;
    images::wait_for(world, 1)?;
    let dir = world.dir().join("fstest");
    // A file system as hosts have it: not every kernel's tmpfs knows `user.*`.
    shell(&format!(
        "mkdir -p {0}/tools {0}/volume; cp {1}/pjdfstest {1}/fsx {1}/sleep {0}/tools/; truncate -s 512M {0}/disk; \
         /sbin/mkfs.ext4 -q -F {0}/disk; mount -o loop {0}/disk {0}/volume; chmod 755 {0}/volume",
        dir.display(),
        tools.display()
    ))?;
    std::fs::write(dir.join("tools/pjdfstest.toml"), PJDFSTEST_CONFIG)?;
    std::fs::write(dir.join("tools/fsx.toml"), FSX_CONFIG)?;
    let result = all(world, &dir, operations, patterns);
    shell(&format!("umount {0}/volume; rm -r {0}", dir.display()))?;
    result
}

fn all(world: &World, dir: &std::path::Path, operations: u32, patterns: &[String]) -> Result<bool> {
    let mut wrong = 0;
    for (place, path) in PLACES {
        let script = format!(
            "export PATH=/tools:$PATH; mkdir -p {path} && cd {path} && /tools/pjdfstest -c /tools/pjdfstest.toml -p {path} {}",
            patterns.join(" ")
        );
        let mut results = Vec::new();
        for runtime in [RUNC, RUNTIME] {
            let finished = in_container(world, runtime, dir, &script)?;
            let found = Results::parse(&finished.text());
            ensure!(found.total() > 0, "pjdfstest did not run: {finished}");
            println!(
                "pjdfstest, {place}, {runtime}: {} in {:.0} s",
                found.summary(),
                finished.took.as_secs_f64()
            );
            results.push(found);
        }
        if let [runc, rvm] = &results[..] {
            wrong += judge(place, runc, rvm);
        }
        for runtime in [RUNC, RUNTIME] {
            for seed in 1..=3 {
                let script = format!(
                    "mkdir -p {path} && cd {path} && /tools/fsx -q -f /tools/fsx.toml -N {operations} -S {seed} -P {path} {path}/fsx-{seed}"
                );
                let finished = in_container(world, runtime, dir, &script)?;
                let good = finished.code() == 0;
                let word = if good { "passed" } else { "FAILED" };
                println!(
                    "fsx, {place}, {runtime}, seed {seed}: {word} in {:.0} s",
                    finished.took.as_secs_f64()
                );
                if !good {
                    println!("{finished}");
                    wrong += usize::from(runtime == RUNTIME);
                }
            }
        }
    }
    println!("{wrong} wrong");
    Ok(wrong == 0)
}

/// Says what passes under runc and does not under rvm; returns how much of it
/// is wrong.
fn judge(place: &str, runc: &Results, rvm: &Results) -> usize {
    let mut wrong = 0;
    for (name, _) in runc.all().filter(|(_, outcome)| matches!(outcome, Outcome::Passed)) {
        let what = match rvm.get(name) {
            Some(Outcome::Passed) => continue,
            Some(Outcome::Failed(reason)) => reason,
            Some(Outcome::Skipped) | None => "does not run",
        };
        let intended = INTENDED.iter().find(|(end, _)| place == VOLUME && name.ends_with(end));
        match intended {
            Some((_, why)) => println!("  intended: {name}: {why}"),
            None => {
                wrong += 1;
                println!("  WRONG: {name}: {what}");
            }
        }
    }
    wrong
}

fn in_container(
    world: &World,
    runtime: &str,
    dir: &std::path::Path,
    script: &str,
) -> Result<rvm_tests::job::Finished> {
    let mount = |name: &str, destination: &str, options: &str| {
        format!("type=bind,src={},dst={destination},options={options}", dir.join(name).display())
    };
    let run = world.ctr().container("fstest").with(&[
        "--runtime",
        runtime,
        "--env",
        "NO_COLOR=1",
        "--mount",
        &mount("tools", "/tools", "rbind:ro"),
        "--mount",
        &mount("volume", "/v", "rbind:rw"),
    ]);
    run.start(&["sh", "-c", script], rvm_tests::job::Input::Nothing)?.finish(LIMIT)
}
