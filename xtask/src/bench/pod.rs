//! `cargo xtask bench pod`.

use std::fmt::Write;

use anyhow::Result;
use serde_json::Value;

use super::{Bench, Common, aims};

/// Arguments of `cargo xtask bench pod`.
#[derive(clap::Args)]
pub struct Args {
    #[command(flatten)]
    common: Common,
    /// Runs of each kind; medians are reported.
    #[arg(long, default_value_t = 10)]
    runs: u32,
}

/// Ratios and what each may be at most.
const AIMS: [(&str, f64); 2] = [("rvm/runc, pod", 1.3), ("rvm/runc, further container", 0.9)];

/// Runs `cargo xtask bench pod`.
pub fn run(args: Args) -> Result<()> {
    Bench::new("pod", args.common.fast, args.runs)?.report(args.common.json, text)
}

/// The result for people.
fn text(result: &Value) -> String {
    let mut text = aims(result, &AIMS);
    for (part, medians) in result["medians_ms"].as_object().into_iter().flatten() {
        let ms = |runtime: &str| medians[runtime].as_f64().unwrap_or(f64::NAN);
        let _ = writeln!(text, "{part}: rvm {:.0} ms, runc {:.0} ms", ms("rvm"), ms("runc"));
    }
    text
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn aims_and_medians_are_named() {
        let text = text(&json!({
            "ratios": { "rvm/runc, pod": 1.4, "rvm/runc, further container": 0.6 },
            "medians_ms": { "pod": { "rvm": 1400.4, "runc": 1000.0 } },
        }));
        assert!(text.lines().any(|line| line.starts_with("MISSED rvm/runc, pod")), "{text}");
        assert!(text.lines().any(|line| line.starts_with("ok     rvm/runc, further container")), "{text}");
        assert!(text.contains("pod: rvm 1400 ms, runc 1000 ms"), "{text}");
    }
}
