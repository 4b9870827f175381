//! `cargo xtask bench neighbour`.

use anyhow::Result;
use serde_json::Value;

use super::{Bench, Common, aims, columns};
use crate::build;
use crate::parity::PROBE_ENV;

/// Arguments of `cargo xtask bench neighbour`.
#[derive(clap::Args)]
pub struct Args {
    #[command(flatten)]
    common: Common,
    /// Rounds of each runtime; medians are reported.
    #[arg(long, default_value_t = 3)]
    runs: u32,
}

/// At most this much of the time that is taken alone.
const AIM: f64 = 1.1;

/// Runs `cargo xtask bench neighbour`.
pub fn run(args: Args) -> Result<()> {
    let mut bench = Bench::new("neighbour", args.common.fast, args.runs)?;
    bench.prepared.set(PROBE_ENV, build::probe()?);
    bench.report(args.common.json, text)
}

/// The result for people.
fn text(result: &Value) -> String {
    let ratios = result["ratios"].as_object();
    let names = ratios.into_iter().flatten().map(|(name, _)| name.as_str());
    let wanted: Vec<(&str, f64)> =
        names.filter(|name| name.starts_with("rvm ")).map(|name| (name, AIM)).collect();
    aims(result, &wanted) + &columns(result)
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn what_is_lost_to_a_neighbour_has_an_aim() {
        let text = text(&json!({
            "ratios": { "rvm beside a loop/rvm alone, files": 1.3, "runc beside a loop/runc alone, files": 1.2 },
            "kinds": ["alone", "a loop"],
            "medians": [["rvm, files", [10.0, 13.0]]],
            "conditions": { "units": "ms" },
        }));
        assert_eq!(text.matches("MISSED rvm beside a loop").count(), 1, "{text}");
        assert!(!text.contains("ok    ") && text.contains("13.000"), "{text}");
    }
}
