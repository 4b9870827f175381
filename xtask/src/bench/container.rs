//! `cargo xtask bench container`.

use std::fmt::Write;

use anyhow::Result;
use serde_json::Value;

use super::{Bench, Common, aims};

/// Arguments of `cargo xtask bench container`.
#[derive(clap::Args)]
pub struct Args {
    #[command(flatten)]
    common: Common,
    /// Runs of each kind; medians are reported.
    #[arg(long, default_value_t = 10)]
    runs: u32,
}

/// Ratios and what each may be at most.
const AIMS: [(&str, f64); 3] = [("rvm/runc, start", 1.2), ("rvm/runc, exec", 0.7), ("rvm/runc, join", 0.8)];

/// Runs `cargo xtask bench container`.
pub fn run(args: Args) -> Result<()> {
    Bench::new("container", args.common.fast, args.runs)?.report(args.common.json, text)
}

/// The result for people.
fn text(result: &Value) -> String {
    let mut text = aims(result, &AIMS);
    for what in ["start", "exec"] {
        let medians = &result["medians_ms"][what];
        let _ = writeln!(
            text,
            "\n{what}: rvm {:.0} ms, runc {:.0} ms",
            ms(&medians["rvm"]),
            ms(&medians["runc"])
        );
        for part in parts(&result["parts_ms"][what]) {
            let _ = writeln!(text, "   {:<44} {:>8.1}", part.0, part.1);
        }
        let largest: Vec<String> = parts(&result["largest_parts"][what])
            .iter()
            .map(|(name, ms)| format!("{name} {ms:.1}"))
            .collect();
        let _ = writeln!(text, "   the three largest parts: {}", largest.join(", "));
    }
    let calls = &result["medians_ms"]["exec, the shim's calls"];
    let _ = writeln!(text, "\nThe shim's calls of an exec: rvm {}, runc {}", calls["rvm"], calls["runc"]);
    let _ = writeln!(text, "ctr version, for scale: {:.0} ms", ms(&result["medians_ms"]["ctr version"]));
    text
}

fn parts(list: &Value) -> Vec<(String, f64)> {
    let part = |part: &Value| (part[0].as_str().unwrap_or_default().to_owned(), ms(&part[1]));
    list.as_array().map(|parts| parts.iter().map(part).collect()).unwrap_or_default()
}

fn ms(value: &Value) -> f64 {
    value.as_f64().unwrap_or(f64::NAN)
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn aims_and_largest_parts_are_named() {
        let text = text(&json!({
            "ratios": { "rvm/runc, start": 1.3, "rvm/runc, exec": 0.6 },
            "largest_parts": { "start": [["kernel", 900.0], ["layers", 30.5]] },
        }));
        assert!(text.lines().any(|line| line.starts_with("MISSED rvm/runc, start")), "{text}");
        assert!(text.lines().any(|line| line.starts_with("ok     rvm/runc, exec")), "{text}");
        assert!(text.contains("largest parts: kernel 900.0, layers 30.5"), "{text}");
    }
}
