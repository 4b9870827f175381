//! Who used the processor while something was measured.

use std::collections::BTreeMap;

use rvm_tests::host::{parse_stat, pids};
use serde_json::{Value, json};

/// What the kernel counts processor time in, by the second (`USER_HZ`).
const TICKS: f64 = 100.0;
/// Who used less, in seconds, is not worth a line.
const LEAST: f64 = 0.5;

/// Processor time by program since boot; a program's line sums up all processes of its name, with the
/// children that they have waited for.
pub struct ProcessorTimes(BTreeMap<String, Times>);

/// In ticks: user, without a guest's; system; a guest's; the children's.
type Times = [i64; 4];

impl ProcessorTimes {
    /// Those of now.
    pub fn now() -> Self {
        let mut all = BTreeMap::<String, Times>::new();
        for pid in pids() {
            let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
            if let Some((name, times)) = times_of(&stat) {
                let sum = all.entry(name.to_owned()).or_default();
                *sum = std::array::from_fn(|n| sum[n] + times[n]);
            }
        }
        Self(all)
    }

    /// Seconds that each program used from then to now, the largest first:
    /// `[program, user, system, guest, children]`.
    pub fn since(&self, now: &Self) -> Value {
        let used = |(name, times): (&String, &Times)| {
            let was = self.0.get(name).copied().unwrap_or_default();
            // Who has ended took its time away with it.
            let used: [f64; 4] = std::array::from_fn(|n| (times[n] - was[n]).max(0) as f64 / TICKS);
            (name.clone(), used, used.iter().sum::<f64>())
        };
        let mut rows: Vec<_> = now.0.iter().map(used).filter(|(.., sum)| *sum >= LEAST).collect();
        rows.sort_by(|(.., a), (.., b)| b.total_cmp(a));
        rows.into_iter()
            .map(|(name, [user, system, guest, children], _)| json!([name, user, system, guest, children]))
            .collect()
    }
}

/// Of a `/proc/PID/stat`, with the process's name.
fn times_of(stat: &str) -> Option<(&str, Times)> {
    let (name, fields) = parse_stat(stat)?;
    let field = |number: usize| fields.get(number - 3)?.parse::<i64>().ok();
    let guest = field(43)?;
    Some((name, [field(14)? - guest, field(15)?, guest, field(16)? + field(17)?]))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fields_are_found_behind_any_name() {
        let zeros = "0 ".repeat(23);
        let stat = format!("7 (a) b) S 1 7 7 0 -1 0 9 9 9 9 250 30 4 5 20 0 {zeros} 50 1 0");
        let fields: Vec<&str> = stat.rsplit_once(')').unwrap().1.split_whitespace().collect();
        assert_eq!(fields[43 - 3], "50");
        assert_eq!(times_of(&stat), Some(("a) b", [200, 30, 50, 9])));
        assert!(times_of("7 (a) S 1").is_none());
    }

    #[test]
    fn who_used_most_comes_first() {
        let times = |user, guest| [user, 0, guest, 0];
        let before =
            ProcessorTimes([("b".to_owned(), times(100, 0)), ("gone".to_owned(), times(900, 0))].into());
        let after = ProcessorTimes(
            [
                ("a".to_owned(), times(0, 60)),
                ("b".to_owned(), times(300, 0)),
                ("gone".to_owned(), times(0, 0)),
                ("idle".to_owned(), times(1, 0)),
            ]
            .into(),
        );
        assert_eq!(before.since(&after), json!([["b", 2.0, 0.0, 0.0, 0.0], ["a", 0.0, 0.0, 0.6, 0.0]]));
    }
}
