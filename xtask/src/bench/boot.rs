//! `cargo xtask bench boot`.

use std::fmt::Write;

use anyhow::{Context, Result};
use guest_kernel::Flavour;
use rootfs_builder::initramfs;
use serde_json::json;

use super::{Bench, aims, print, report, result, tiny_init};
use crate::build::{self, Profile};
use crate::e2e::{self, Prepared};
use crate::packages::{self, Purpose};

/// Arguments of `cargo xtask bench boot`.
#[derive(clap::Args)]
pub struct Args {
    /// Print one JSON object on standard output, and nothing else there.
    #[arg(long)]
    json: bool,
    /// Runs of each kind; medians are reported.
    #[arg(long, default_value_t = 10)]
    runs: u32,
    /// Only what the jail adds to a start, without the peers and their kernels.
    #[arg(long)]
    jail: bool,
    /// With `--jail`: measure what tests run instead of what is installed.
    #[arg(long, requires = "jail")]
    fast: bool,
}

/// At most this much of a start without it.
const JAIL: f64 = 1.05;

/// Runs `cargo xtask bench boot`.
pub fn run(args: Args) -> Result<()> {
    if args.jail {
        return jail(&args);
    }
    packages::ensure(&[Purpose::Bench])?;
    let mut prepared = Prepared::new(Profile::Release)?;
    let program = e2e::program("rvm-bench", Profile::Fast)?;
    let init = build::target_dir().join("rvm").join("tiny-init.cpio");
    std::fs::write(&init, initramfs::build(&tiny_init::program())?)
        .context("writing the peer's initramfs")?;
    prepared.set("RVM_BENCH_INIT", init);
    prepared.set("RVM_BENCH_KERNEL_PEER", build::kernel(Flavour::Peer)?.vmlinux);
    prepared.set("RVM_BENCH_KERNEL_TRIAL", build::kernel(Flavour::Trial)?.vmlinux);
    prepared.set("RVM_BENCH_RUNS", args.runs.to_string());
    eprintln!("{}", prepared.host);

    // What the host does without running a guest is measured here, emulated or not.
    let native =
        result("first-run", |output| prepared.run_here(&program, &["first-run".to_owned()], output))?;
    let mut all = result("boot", |output| prepared.run_with_kvm(&program, &["boot".to_owned()], output))?;
    all["native"] = native;
    all["conditions"]["where"] = json!(prepared.host.to_string());
    if args.json {
        println!("{}", serde_json::to_string(&all)?);
    } else {
        println!("{}", report::text(&all));
    }
    Ok(())
}

/// Milliseconds of monitors that are shut in and of others, of their own time until the guest runs and until the agent answers.
fn jail(args: &Args) -> Result<()> {
    let mut bench = Bench::new("jail", args.fast, args.runs)?;
    let Bench { prepared, program, .. } = &mut bench;
    let native = result("first-run", |output| prepared.run_here(program, &["first-run".to_owned()], output))?;
    let mut all = bench.measure()?;
    all["native"] = native;
    print(&all, args.json, |all| {
        let mut text = aims(all, &[("rvm/rvm without its jail", JAIL)]);
        let _ = writeln!(text, "{}\n{}\nnative: {}", all["medians_ms"], all["steps_ms"], all["native"]);
        text
    })
}
