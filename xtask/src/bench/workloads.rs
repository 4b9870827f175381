//! `cargo xtask bench workloads`.

use std::fmt::Write;

use anyhow::Result;
use serde_json::Value;

use super::{Bench, Common, aims, medians};
use crate::build;

/// Arguments of `cargo xtask bench workloads`.
#[derive(clap::Args)]
pub struct Args {
    #[command(flatten)]
    common: Common,
    /// Rounds; medians are reported.
    #[arg(long, default_value_t = 1)]
    runs: u32,
}

/// Of the devhost, in MiB: it holds the image, packed and unpacked.
const MEMORY_MIB: u32 = 8192;

/// Runs `cargo xtask bench workloads`.
pub fn run(args: Args) -> Result<()> {
    let mut bench = Bench::new("workloads", args.common.fast, args.runs)?;
    bench.prepared.set("RVM_BENCH_IMAGE_WORKLOADS", build::workloads_image()?);
    bench.prepared.memory_mib = MEMORY_MIB;
    bench.report(args.common.json, text)
}

/// The result for people.
fn text(result: &Value) -> String {
    let mut text = aims(result, &[]);
    text += &medians(result, 40);
    let wrong = result["results"]["wrong"].as_array().map_or(&[][..], Vec::as_slice);
    let _ = writeln!(text, "\nresults: {} the same, {} wrong", result["results"]["same"], wrong.len());
    for line in wrong {
        let _ = writeln!(text, "   {}", line.as_str().unwrap_or_default());
    }
    text
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn what_differs_is_told() {
        let text = text(&json!({
            "medians_ms, rvm and runc": [["tar x", 300.0, 100.0]],
            "results": { "same": 3, "wrong": ["npm ci: 1 under runc, 2 under rvm"] },
        }));
        assert!(
            text.contains("3.00") && text.contains("results: 3 the same, 1 wrong\n   npm ci: 1"),
            "{text}"
        );
    }
}
