//! The timeline of one start, as the shim records it in the sandbox's record.

use std::{fmt::Write, time::Duration};

use anyhow::{Context, Result, ensure};
use serde::{Deserialize, Serialize};

use crate::sandbox::Sandbox;

/// One step: what was done, and milliseconds from the request until it was.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Step {
    /// What was done.
    pub name: String,
    /// When, in milliseconds since containerd's request.
    pub ms: f64,
}

/// The steps of a running sandbox's start.
///
/// # Errors
/// When there are none.
pub fn of(sandbox: &Sandbox) -> Result<Vec<Step>> {
    #[derive(Deserialize)]
    struct State {
        timeline: Vec<Step>,
    }
    let path = sandbox.dir().join("sandbox.json");
    let json = std::fs::read(&path).with_context(|| format!("reading {}", path.display()))?;
    let state: State =
        serde_json::from_slice(&json).with_context(|| format!("parsing {}", path.display()))?;
    ensure!(!state.timeline.is_empty(), "{} holds no timeline", path.display());
    Ok(state.timeline)
}

/// The steps as a table: how long each took and when it was done. `total` is
/// the whole as its caller saw it.
pub fn table(steps: &[Step], total: Duration) -> String {
    let total_ms = total.as_secs_f64() * 1e3;
    let width = steps.iter().map(|step| step.name.len()).chain([20]).max().unwrap_or_default();
    let longest = steps.iter().scan(0.0, |last, step| Some(step.ms - std::mem::replace(last, step.ms)));
    let longest = longest.fold(1.0, f64::max);
    let mut text = format!("    {:width$} {:>9} {:>9}\n", "step", "took ms", "done ms");
    let mut last = 0.0;
    for Step { name, ms } in steps {
        let took = ms - last;
        let bar = "#".repeat((took / longest * 40.0).round() as usize);
        let _ = writeln!(text, "    {name:width$} {took:>9.1} {ms:>9.1}  {bar}");
        last = *ms;
    }
    let around = total_ms - last;
    let _ = writeln!(text, "    {:width$} {around:>9.1} {total_ms:>9.1}", "ctr and containerd");
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_millisecond_is_somewhere() {
        let steps = [Step { name: "a".into(), ms: 2.0 }, Step { name: "b".into(), ms: 10.0 }];
        let table = table(&steps, Duration::from_millis(15));
        let numbers: Vec<Vec<f64>> = table
            .lines()
            .map(|line| line.split_whitespace().filter_map(|word| word.parse().ok()).collect())
            .collect();
        assert_eq!(numbers[1..], [vec![2.0, 2.0], vec![8.0, 10.0], vec![5.0, 15.0]], "{table}");
    }
}
