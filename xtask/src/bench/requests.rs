//! `cargo xtask bench requests`.

use std::fmt::Write;

use anyhow::Result;
use serde_json::Value;

use super::{Bench, Common, Containerd, aims};
use crate::build;

/// Arguments of `cargo xtask bench requests`.
#[derive(clap::Args)]
pub struct Args {
    #[command(flatten)]
    common: Common,
    /// Runs of each kind; times are medians.
    #[arg(long, default_value_t = 1)]
    runs: u32,
    #[command(flatten)]
    containerd: Containerd,
}

/// Runs `cargo xtask bench requests`.
pub fn run(args: Args) -> Result<()> {
    let mut bench = Bench::new("requests", args.common.fast, args.runs)?;
    bench.prepared.set("RVM_BENCH_IMAGE_ONE", build::debian_image()?);
    args.containerd.set(&mut bench.prepared)?;
    bench.report(args.common.json, text)
}

/// The result for people.
fn text(result: &Value) -> String {
    let mut text = aims(result, &[]);
    for (name, counted) in result["counted for each"].as_object().into_iter().flatten() {
        let us = |side: &str| result["microseconds for each"][name][side].as_f64().unwrap_or(f64::NAN);
        let (rvm, runc) = (us("rvm"), us("runc"));
        let _ = writeln!(text, "{name}: {rvm:.0} us, runc {runc:.0} us, rvm/runc {:.1}", rvm / runc);
        for (what, count) in counted.as_object().into_iter().flatten() {
            let count = count.as_f64().unwrap_or(f64::NAN);
            if count >= 0.05 {
                let _ = writeln!(text, "   {count:>8.2} {what}");
            }
        }
    }
    text
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn what_hardly_occurs_is_left_out() {
        let text = text(&json!({
            "microseconds for each": { "stat": { "rvm": 40.0, "runc": 10.0 } },
            "counted for each": { "stat": { "exits": 3.0, "message OPEN": 0.01 } },
        }));
        assert!(text.contains("stat: 40 us, runc 10 us, rvm/runc 4.0\n       3.00 exits\n"), "{text}");
        assert!(!text.contains("OPEN"), "{text}");
    }
}
