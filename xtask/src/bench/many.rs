//! `cargo xtask bench many`.

use std::fmt::Write;

use anyhow::Result;
use serde_json::Value;

use super::{Bench, Common, aims};

/// Arguments of `cargo xtask bench many`.
#[derive(clap::Args)]
pub struct Args {
    #[command(flatten)]
    common: Common,
    /// Rounds of each runtime; medians are reported.
    #[arg(long, default_value_t = 3)]
    runs: u32,
    /// Containers at once.
    #[arg(long, default_value_t = 20)]
    containers: u32,
}

/// Runs `cargo xtask bench many`.
pub fn run(args: Args) -> Result<()> {
    let mut bench = Bench::new("many", args.common.fast, args.runs)?;
    bench.prepared.set("RVM_BENCH_COUNT", args.containers.to_string());
    bench.report(args.common.json, text)
}

/// The result for people.
fn text(result: &Value) -> String {
    let count = &result["conditions"]["containers"];
    let start = format!("rvm/runc, start of {count}");
    let removal = format!("rvm/runc, removal of {count}");
    let mut text = aims(result, &[(&start, 1.2), (&removal, 1.5)]);
    for what in ["start", "removal"] {
        let medians = &result["medians_s"][what];
        let _ = writeln!(
            text,
            "{what}: rvm {:.1} s, runc {:.1} s",
            number(&medians["rvm"]),
            number(&medians["runc"])
        );
    }
    let memory = number(&result["memory_mib"]["rvm"]);
    let verdict = if memory <= MEMORY_MIB { "ok    " } else { "MISSED" };
    let _ = writeln!(
        text,
        "{verdict} MiB of MemAvailable for one idle container: rvm {memory:.1}, runc {:.1}  (aim: at most {MEMORY_MIB})",
        number(&result["memory_mib"]["runc"])
    );
    for runtime in ["rvm", "runc"] {
        let _ = writeln!(text, "\nremoval under {runtime}, seconds from its begin (median, largest):");
        for (name, row) in result["removal_s, median and largest"][runtime].as_object().into_iter().flatten()
        {
            let _ = writeln!(text, "   {name:<44} {:>8.2} {:>8.2}", number(&row[0]), number(&row[1]));
        }
    }
    for runtime in ["rvm", "runc"] {
        let _ =
            writeln!(text, "\nprocessor seconds of a start under {runtime} (user, system, guest, children):");
        for row in result["start_processor_s, of the last round"][runtime].as_array().into_iter().flatten() {
            let name = row[0].as_str().unwrap_or_default();
            let [user, system, guest, children] = [1, 2, 3, 4].map(|n| number(&row[n]));
            let _ = writeln!(text, "   {name:<24} {user:>8.1} {system:>8.1} {guest:>8.1} {children:>8.1}");
        }
    }
    let _ = writeln!(text, "\nsteps of the shim's start, ms (median, largest):");
    for step in result["start_steps_ms, median and largest"].as_array().into_iter().flatten() {
        let name = step[0].as_str().unwrap_or_default();
        let _ = writeln!(text, "   {name:<44} {:>8.1} {:>8.1}", number(&step[1]), number(&step[2]));
    }
    text
}

/// What an idle container may take.
const MEMORY_MIB: f64 = 38.0;

fn number(value: &Value) -> f64 {
    value.as_f64().unwrap_or(f64::NAN)
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn aims_and_steps_are_named() {
        let text = text(&json!({
            "ratios": { "rvm/runc, start of 20": 1.1, "rvm/runc, removal of 20": 3.0 },
            "memory_mib": { "rvm": 43.0, "runc": 9.0 },
            "start_steps_ms, median and largest": [["kernel", 900.0, 1200.5]],
            "conditions": { "containers": 20 },
        }));
        assert!(text.lines().any(|line| line.starts_with("ok     rvm/runc, start of 20")), "{text}");
        assert!(text.lines().any(|line| line.starts_with("MISSED rvm/runc, removal of 20")), "{text}");
        assert!(text.lines().any(|line| line.starts_with("MISSED MiB of MemAvailable")), "{text}");
        assert!(text.contains("1200.5"), "{text}");
    }
}
