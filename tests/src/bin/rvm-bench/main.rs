//! The part of `cargo xtask bench` that runs where KVM is.
//!
//! Prints what it does on stderr, and on stdout one line [`MARK`]` {JSON}`.
//!
//! * `rvm-bench boot`: start times side by side with QEMU's `microvm`, returns
//!   to user space, memory. Needs a KVM that runs kernels.
//! * `rvm-bench jail`: the same of two monitors, of which one is shut in.
//! * `rvm-bench container`: a container's start and an added process, side by
//!   side with runc. Needs the same.
//! * `rvm-bench many`: many containers started at once, and removed at once.
//! * `rvm-bench files`: what programs do with files, in an image and on a volume.
//! * `rvm-bench requests`: what operations on files cost of round trips, exits and calls.
//! * `rvm-bench virtiofsd`: files by the monitor's server and by QEMU's `microvm` with virtiofsd.
//! * `rvm-bench workloads`: what developers and services do, and whether it comes to the same.
//! * `rvm-bench record`: what a guest's kernel asks of the file servers while some of that runs.
//! * `rvm-bench neighbour`: what a sandbox loses by one that takes all it can.
//! * `rvm-bench net`: a container's network, beside runc's and QEMU's.
//! * `rvm-bench pod`: a pod by containerd's CRI plugin, beside runc's.
//! * `rvm-bench first-run`: the monitor's exec to its first `KVM_RUN`. Any KVM.

mod boot;
mod clean;
mod container;
mod counters;
mod files;
mod many;
mod memory;
mod monitor;
mod neighbour;
mod net;
mod peer;
mod pod;
mod processor;
mod ready;
mod record;
mod requests;
mod virtiofsd;
mod workloads;

use std::{path::PathBuf, process::ExitCode};

use anyhow::{Context, Result, bail};
use rvm_tests::{stage::Stage, world::World};
use serde_json::Value;

/// What the line with the result starts with.
const MARK: &str = "@result";

/// What rvm is compared with.
const RUNC: &str = "io.containerd.runc.v2";

/// Memory and vCPUs of the guests whose start is timed.
const MEMORY_MIB: u64 = 128;
const VCPUS: u8 = 1;

fn main() -> ExitCode {
    match run() {
        Ok(result) => {
            println!("{MARK} {result}");
            ExitCode::SUCCESS
        }
        Err(error) => {
            eprintln!("rvm-bench: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run() -> Result<Value> {
    let stage = Stage::from_env()?;
    let runs =
        std::env::var("RVM_BENCH_RUNS").ok().map_or(Ok(10), |text| text.parse().context("RVM_BENCH_RUNS"))?;
    match std::env::args().nth(1).as_deref() {
        Some("boot") => {
            let files = boot::PeerFiles {
                same_kernel: variable("RVM_BENCH_KERNEL_PEER")?,
                trial_kernel: variable("RVM_BENCH_KERNEL_TRIAL")?,
                trial_initramfs: variable("RVM_BENCH_INIT")?,
            };
            let mut result = boot::measure(&stage, &files, runs)?;
            result["memory"] = memory::measure(stage)?;
            Ok(result)
        }
        Some("jail") => boot::jail(&stage, runs),
        Some("container") => container::measure(stage, runs),
        Some("many") => {
            let count = std::env::var("RVM_BENCH_COUNT").context("RVM_BENCH_COUNT is not set")?;
            many::measure(stage, runs, count.parse().context("RVM_BENCH_COUNT")?)
        }
        Some("files") => {
            let mut images = vec![variable("RVM_BENCH_IMAGE_ONE")?];
            images.extend(std::env::var_os("RVM_BENCH_IMAGE_FIVE").map(PathBuf::from));
            files::measure(stage, runs, &images)
        }
        Some("requests") => requests::measure(stage, runs, &variable("RVM_BENCH_IMAGE_ONE")?),
        Some("virtiofsd") => {
            let files = virtiofsd::Files {
                server: variable("RVM_BENCH_VIRTIOFSD")?,
                libraries: variable("RVM_BENCH_VIRTIOFSD_LIBRARIES")?,
                kernel: variable("RVM_BENCH_KERNEL_PEER")?,
                unpatched: std::env::var_os("RVM_BENCH_KERNEL_TRIAL").map(PathBuf::from),
            };
            let with_root = std::env::var_os("RVM_BENCH_ROOT").is_some();
            virtiofsd::measure(stage, runs, &variable("RVM_BENCH_IMAGE_ONE")?, &files, with_root)
        }
        Some("workloads") => workloads::measure(stage, runs, &variable("RVM_BENCH_IMAGE_WORKLOADS")?),
        Some("record") => {
            record::record(stage, &variable("RVM_BENCH_IMAGE_WORKLOADS")?, &variable("RVM_BENCH_MONITOR")?)
        }
        Some("neighbour") => neighbour::measure(stage, runs),
        Some("net") => {
            let short = std::env::var_os("RVM_BENCH_SHORT").is_some();
            net::measure(stage, runs, variable("RVM_BENCH_KERNEL_PEER")?, short)
        }
        Some("pod") => pod::measure(stage, runs),
        Some("first-run") => monitor::first_run(&stage, runs),
        other => {
            bail!(
                "boot, jail, container, many, files, requests, virtiofsd, workloads, record, neighbour, net, pod or first-run, not {other:?}"
            )
        }
    }
}

fn variable(name: &str) -> Result<PathBuf> {
    std::env::var_os(name).map(PathBuf::from).with_context(|| format!("{name} is not set"))
}

/// Measures in a world; what fails is shown, and what is left is removed.
fn swept(world: &World, measure: impl FnOnce(&World) -> Result<Value>) -> Result<Value> {
    let result = measure(world);
    if result.is_err() {
        eprintln!("containerd's log ends with:\n{}", world.log_tail(0, 20));
    }
    for killed in world.sweep() {
        eprintln!("left behind: {killed}");
    }
    result
}

/// The middle of a list of measurements; of an even number the mean of the two in the middle.
fn median(values: &[f64]) -> f64 {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    match sorted.len() {
        0 => f64::NAN,
        n if n % 2 == 1 => sorted[n / 2],
        n => f64::midpoint(sorted[n / 2 - 1], sorted[n / 2]),
    }
}

#[cfg(test)]
mod tests {
    use super::median;

    #[test]
    fn median_of_odd_and_even() {
        assert_eq!(median(&[3.0, 1.0, 2.0]), 2.0);
        assert_eq!(median(&[4.0, 1.0, 2.0, 3.0]), 2.5);
    }
}
