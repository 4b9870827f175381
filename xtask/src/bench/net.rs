//! `cargo xtask bench net`.

use std::fmt::Write;

use anyhow::Result;
use guest_kernel::Flavour;
use serde_json::Value;

use super::{Bench, aims, columns, device, kinds};
use crate::build;
use crate::packages::{self, Purpose};

/// Arguments of `cargo xtask bench net`.
#[derive(clap::Args)]
pub struct Args {
    /// Print one JSON object on standard output, and nothing else there.
    #[arg(long)]
    json: bool,
    /// Rounds of each kind; medians are reported.
    #[arg(long, default_value_t = 3)]
    runs: u32,
    /// Measure what tests run instead of what is installed, which builds in a fraction of the time,
    /// in transfers of one second.
    #[arg(long)]
    fast: bool,
    /// Only the monitor's own interface, without a guest, on this machine: what a frame costs, shut in and not.
    #[arg(long, conflicts_with = "fast")]
    monitor: bool,
}

/// What the names of ratios begin with, and what each may be at most.
const AIMS: [(&str, f64); 3] = [
    ("rvm/runc, start with a network", 1.3),
    ("rvm/qemu, vhost, ", 1.0),
    ("rvm in user space/qemu, vhost, ", 1.5),
];

/// Runs `cargo xtask bench net`.
pub fn run(args: Args) -> Result<()> {
    if args.monitor {
        return device::measure("net::tests::native::what_frames_cost", args.runs, args.json);
    }
    packages::ensure(&[Purpose::Bench])?;
    let mut bench = Bench::new("net", args.fast, args.runs)?;
    bench.prepared.set("RVM_BENCH_KERNEL_PEER", build::kernel(Flavour::Peer)?.vmlinux);
    if args.fast {
        bench.prepared.set("RVM_BENCH_SHORT", "1");
    }
    bench.report(args.json, text)
}

/// The result for people.
fn text(result: &Value) -> String {
    let ratios: Vec<&str> =
        result["ratios"].as_object().into_iter().flatten().map(|(name, _)| name.as_str()).collect();
    let of = |begin: &'static str, aim: f64| {
        ratios.iter().filter(move |name| name.starts_with(begin)).map(move |name| (*name, aim))
    };
    let wanted: Vec<(&str, f64)> = AIMS.iter().flat_map(|(begin, aim)| of(begin, *aim)).collect();
    let mut text = aims(result, &wanted);
    text += &columns(result);
    let _ = writeln!(text, "\nFor each frame:");
    for kind in kinds(result) {
        for (what, cost) in result["costs for each frame, last run"][kind].as_object().into_iter().flatten() {
            let _ = writeln!(text, "   {kind}, {what}: {cost}");
        }
    }
    text
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn each_aim_is_judged_and_each_median_shown() {
        let text = text(&json!({
            "ratios": {
                "rvm/runc, start with a network": 1.2,
                "rvm/qemu, vhost, TCP, 1 stream in": 1.1,
                "rvm in user space/qemu, vhost, TCP, 1 stream in": 1.1,
                "rvm/runc, TCP, 1 stream in": 3.0,
            },
            "kinds": ["runc", "rvm, vhost"],
            "medians": [["TCP, 1 stream in", [4000.5, 1000.0]]],
            "costs for each frame, last run": { "rvm, vhost": { "TCP, 1 stream in": { "exits": 0.5 } } },
        }));
        assert!(text.contains("ok     rvm/runc, start with a network"), "{text}");
        assert!(text.contains("MISSED rvm/qemu, vhost, TCP, 1 stream in"), "{text}");
        assert!(text.contains("ok     rvm in user space/qemu, vhost, TCP, 1 stream in"), "{text}");
        assert_eq!(text.matches("MISSED").count() + text.matches("ok    ").count(), 3, "{text}");
        assert!(text.contains("4000.500") && text.contains("exits"), "{text}");
    }
}
