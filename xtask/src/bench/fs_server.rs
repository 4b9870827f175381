//! `cargo xtask bench fs-server`: the monitor's file server without a guest, on this machine.

use std::fmt::Write;
use std::process::Command;

use anyhow::{Context, Result, bail};
use serde_json::Value;

use super::{Bench, aims, print, result};
use crate::build;
use crate::e2e::{self, Output};

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
const MEASURES: &str = "devices::virtio::fs::tests::native::what_requests_cost";

/// Runs `cargo xtask bench fs-server`: a test that drives the device with messages, made by hand and recorded.
pub fn run(args: Args) -> Result<()> {
    if args.record {
        return record();
    }
    let mut command = Command::new(env!("CARGO"));
    command.current_dir(build::workspace_dir()).env("RVM_BENCH_RUNS", args.runs.max(1).to_string());
    command.args(["test", "--quiet", "--release", "-p", "rvm-vmm", "--lib", "--"]);
    command.args(["--ignored", "--nocapture", "--exact", MEASURES]);
    let measured = result("fs-server", |output| match output {
        Output::Lines(callback) => Ok(e2e::lines(command, callback)?.code().unwrap_or(1)),
        _ => bail!("a result is a line"),
    })?;
    print(&measured, args.json, text)
}

/// The result for people.
fn text(result: &Value) -> String {
    let mut text = aims(result, &[]);
    let _ = writeln!(
        text,
        "{:>12} {:>26} {:>12} {:>26}",
        "requests/s", "us of a processor each", "shut in", "us of a processor each"
    );
    for row in
        result["requests/s and us of a processor for each, and both shut in"].as_array().into_iter().flatten()
    {
        let number = |place: usize| row[place].as_f64().unwrap_or(f64::NAN);
        let what = row[0].as_str().unwrap_or_default();
        let ratio = |suffix: &str| {
            result["ratios"][format!("rvm shut in/rvm, {what}{suffix}")].as_f64().unwrap_or(f64::NAN)
        };
        let requests = result["requests of each trace"][what].as_u64();
        let requests = requests.map_or_else(String::new, |count| format!(" ({count} requests)"));
        let _ = writeln!(
            text,
            "{:>12.0} {:>26.2} {:>12.0} {:>26.2}   {what}{requests}: {:.2} of the time, {:.2} of the processor shut in",
            number(1),
            number(2),
            number(3),
            number(4),
            ratio(""),
            ratio(", processor")
        );
    }
    text
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

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn a_trace_is_told_with_its_requests() {
        let text = text(&json!({
            "ratios": { "rvm shut in/rvm, npm ci": 1.02, "rvm shut in/rvm, npm ci, processor": 1.5 },
            "requests/s and us of a processor for each, and both shut in": [["npm ci", 1000.0, 7.0, 900.0, 8.0]],
            "requests of each trace": { "npm ci": 4000 },
            "conditions": { "runs": 3, "where": "Here." },
        }));
        assert!(text.starts_with("Here.\nMedians of 3 runs in turn"), "{text}");
        let row = "npm ci (4000 requests): 1.02 of the time, 1.50 of the processor shut in\n";
        assert!(text.ends_with(row) && text.contains(" 1000 ") && text.contains(" 8.00 "), "{text}");
    }
}
