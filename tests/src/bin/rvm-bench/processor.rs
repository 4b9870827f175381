//! Who used the processor while something was measured.

use std::collections::BTreeMap;

use rvm_tests::host::Process;
use serde_json::{Value, json};

/// What the kernel counts processor time in, by the second (`USER_HZ`).
const TICKS: f64 = 100.0;
/// Who used less, in seconds, is not worth a line.
const LEAST: f64 = 0.5;

/// Processor time by program since boot; a program's line sums up all processes of its name, with the
/// children that they have waited for.
pub struct ProcessorTimes(BTreeMap<String, Times>);

/// In ticks. A guest's time is not in `user`.
#[derive(Clone, Copy, Default)]
struct Times {
    user: i64,
    system: i64,
    guest: i64,
    children: i64,
}

impl ProcessorTimes {
    /// Those of now.
    pub fn now() -> Self {
        let mut all = BTreeMap::<String, Times>::new();
        for process in Process::all() {
            let stat = std::fs::read_to_string(format!("/proc/{}/stat", process.pid)).unwrap_or_default();
            let Some(times) = Times::of(&stat) else { continue };
            let sum = all.entry(process.name).or_default();
            sum.user += times.user;
            sum.system += times.system;
            sum.guest += times.guest;
            sum.children += times.children;
        }
        Self(all)
    }

    /// Seconds that each program used from then to now, the largest first:
    /// `[program, user, system, guest, children]`.
    pub fn since(&self, now: &Self) -> Value {
        let mut rows: Vec<(String, [f64; 4])> = Vec::new();
        for (name, times) in &now.0 {
            let was = self.0.get(name).copied().unwrap_or_default();
            let used = [
                times.user - was.user,
                times.system - was.system,
                times.guest - was.guest,
                times.children - was.children,
            ];
            // Who has ended took its time away with it.
            rows.push((name.clone(), used.map(|ticks| ticks.max(0) as f64 / TICKS)));
        }
        rows.retain(|(_, used)| used.iter().sum::<f64>() >= LEAST);
        rows.sort_by(|(_, a), (_, b)| b.iter().sum::<f64>().total_cmp(&a.iter().sum()));
        rows.into_iter()
            .map(|(name, [user, system, guest, children])| json!([name, user, system, guest, children]))
            .collect()
    }
}

impl Times {
    /// Of a line of `/proc/PID/stat` (proc(5)), whose third field is the first behind the name.
    fn of(stat: &str) -> Option<Self> {
        let (_, fields) = stat.rsplit_once(')')?;
        let fields: Vec<&str> = fields.split_whitespace().collect();
        let field = |number: usize| fields.get(number - 3)?.parse::<i64>().ok();
        let guest = field(43)?;
        Some(Self { user: field(14)? - guest, system: field(15)?, guest, children: field(16)? + field(17)? })
    }
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
        let times = Times::of(&stat).unwrap();
        assert_eq!([times.user, times.system, times.guest, times.children], [200, 30, 50, 9]);
        assert!(Times::of("7 (a) S 1").is_none());
    }

    #[test]
    fn who_used_most_comes_first() {
        let times = |user, guest| Times { user, guest, ..Times::default() };
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
