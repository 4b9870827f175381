//! What a device of the monitor's costs without a guest, on this machine: a test of the monitor's that measures.

use std::fmt::Write;
use std::process::Command;

use anyhow::{Result, bail};
use serde_json::Value;

use super::{aims, print, result};
use crate::build;
use crate::e2e::{self, Output};

/// Measures by a test of the monitor's devices, and prints what it found.
pub fn measure(test: &str, runs: u32, as_json: bool) -> Result<()> {
    let mut command = Command::new(env!("CARGO"));
    command.current_dir(build::workspace_dir()).env("RVM_BENCH_RUNS", runs.max(1).to_string());
    command.args(["test", "--quiet", "--release", "-p", "rvm-vmm", "--lib", "--"]);
    command.args(["--ignored", "--nocapture", "--exact", &format!("devices::virtio::{test}")]);
    let measured = result(test, |output| match output {
        Output::Lines(callback) => Ok(e2e::lines(command, callback)?.code().unwrap_or(1)),
        _ => bail!("a result is a line"),
    })?;
    print(&measured, as_json, text)
}

/// The result for people.
fn text(result: &Value) -> String {
    let mut text = aims(result, &[]);
    let rate = format!("{}/s", result["conditions"]["counted"].as_str().unwrap_or_default());
    let _ = writeln!(
        text,
        "{:>12} {:>26} {:>12} {:>26}",
        rate, "us of a processor each", "shut in", "us of a processor each"
    );
    for row in result["each second and us of a processor for each, and both shut in"]
        .as_array()
        .into_iter()
        .flatten()
    {
        let number = |place: usize| row[place].as_f64().unwrap_or(f64::NAN);
        let what = row[0].as_str().unwrap_or_default();
        let ratio = |suffix: &str| {
            result["ratios"][format!("rvm shut in/rvm, {what}{suffix}")].as_f64().unwrap_or(f64::NAN)
        };
        let requests = result["conditions"]["requests of each trace"][what].as_u64();
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

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn a_trace_is_told_with_its_requests() {
        let text = text(&json!({
            "ratios": { "rvm shut in/rvm, npm ci": 1.02, "rvm shut in/rvm, npm ci, processor": 1.5 },
            "each second and us of a processor for each, and both shut in": [["npm ci", 1000.0, 7.0, 900.0, 8.0]],
            "conditions": {
                "runs": 3, "where": "Here.", "counted": "requests", "requests of each trace": { "npm ci": 4000 },
            },
        }));
        assert!(text.starts_with("Here.\nMedians of 3 runs in turn"), "{text}");
        let row = "npm ci (4000 requests): 1.02 of the time, 1.50 of the processor shut in\n";
        assert!(text.ends_with(row) && text.contains(" 1000 ") && text.contains(" 8.00 "), "{text}");
    }
}
