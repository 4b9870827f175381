//! `cargo xtask bench fs-server`: the monitor's file server without a guest, on this machine.

use anyhow::{Context, Result};

use super::{Bench, device};
use crate::build;

/// Arguments of `cargo xtask bench fs-server`.
#[derive(clap::Args)]
pub struct Args {
    /// Print one JSON object on standard output, and nothing else there.
    #[arg(long)]
    json: bool,
    /// Runs, in turn without the jail and in it; medians are reported.
    #[arg(long, default_value_t = 3)]
    runs: u32,
    /// Measure nothing, but record the traces anew (`vmm/traces`): what a guest's kernel asks while programs run.
    #[arg(long, conflicts_with_all = ["json", "runs"])]
    record: bool,
}

/// Of the devhost, in MiB: it holds the image, packed and unpacked.
const MEMORY_MIB: u32 = 8192;
/// The test that measures.
const MEASURES: &str = "fs::tests::native::what_requests_cost";

/// Runs `cargo xtask bench fs-server`: a test that drives the device with messages, made by hand and recorded.
pub fn run(args: Args) -> Result<()> {
    if args.record {
        return record();
    }
    device::measure(MEASURES, args.runs, args.json)
}

/// Records all traces where KVM can run a kernel.
fn record() -> Result<()> {
    let mut bench = Bench::new("record", true, 1)?;
    bench.prepared.set("RVM_BENCH_IMAGE_WORKLOADS", build::workloads_image()?);
    bench.prepared.set("RVM_BENCH_MONITOR", build::recording_monitor()?);
    bench.prepared.memory_mib = MEMORY_MIB;
    let recorded = bench.measure()?;
    let traces = recorded["traces"].as_object().context("bench record gave no traces")?;
    for (name, trace) in traces {
        let trace = trace.as_str().with_context(|| format!("bench record gave no {name}"))?;
        let path = build::workspace_dir().join("vmm/traces").join(format!("{name}.trace"));
        build::write_whole(&path, trace.as_bytes())?;
        println!("{}: {} bytes", path.display(), trace.len());
    }
    Ok(())
}
