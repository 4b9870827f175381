//! Lines `key = value` of two runs side by side.

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt,
};

use super::intended::Intended;

/// Values by key.
pub type Lines = BTreeMap<String, String>;

/// What stands for a value that only one of the two has.
pub const ABSENT: &str = "(absent)";

/// A value that is not the same under both.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Difference {
    /// The bundle and the line's key: `limits/cgroup.memory.max`.
    pub key: String,
    /// The value under runc.
    pub runc: String,
    /// The value under rvm.
    pub rvm: String,
}

/// Every comparison so far.
pub struct Report {
    intended: Vec<Intended>,
    equal: usize,
    excused: Vec<(Difference, String)>,
    wrong: Vec<Difference>,
    /// Rows and the places of their keys that something was excused by.
    used: BTreeSet<(usize, usize)>,
}

/// How the reason begins of a difference that depends on the moment.
const SOMETIMES: &str = "sometimes: ";

/// Reads lines `key = value`; a terminal ends them with a carriage return.
pub fn parse(text: &str) -> Lines {
    let lines = text.lines().filter_map(|line| line.trim_end_matches('\r').split_once(" ="));
    lines.map(|(key, value)| (key.to_owned(), value.trim().to_owned())).collect()
}

impl Report {
    /// An empty one, with the differences that are meant.
    pub fn new(intended: Vec<Intended>) -> Self {
        Self { intended, equal: 0, excused: Vec::new(), wrong: Vec::new(), used: BTreeSet::new() }
    }

    /// Compares one bundle's lines.
    pub fn compare(&mut self, bundle: &str, runc: &Lines, rvm: &Lines) {
        // A run that failed says why once; all its missing lines say nothing.
        let failed = [runc, rvm].into_iter().any(|lines| lines.contains_key("run"));
        let keys: BTreeSet<&String> = runc.keys().chain(rvm.keys()).collect();
        for key in keys {
            if failed && key != "run" {
                continue;
            }
            let value = |lines: &Lines| {
                let otherwise = if failed { "ran" } else { ABSENT };
                lines.get(key).cloned().unwrap_or_else(|| otherwise.to_owned())
            };
            let difference =
                Difference { key: format!("{bundle}/{key}"), runc: value(runc), rvm: value(rvm) };
            // A bundle that neither runs compares nothing.
            if difference.runc == difference.rvm && !failed {
                self.equal += 1;
                continue;
            }
            let covering = self.intended.iter().enumerate().find_map(|(row, intended)| {
                let keys = intended.covers(&difference);
                (!keys.is_empty()).then_some((row, keys))
            });
            match covering {
                Some((row, keys)) => {
                    self.used.extend(keys.into_iter().map(|key| (row, key)));
                    self.excused.push((difference, self.intended[row].reason.clone()));
                }
                None => self.wrong.push(difference),
            }
        }
    }

    /// How many comparisons there were.
    pub fn checks(&self) -> usize {
        self.equal + self.excused.len() + self.wrong.len()
    }

    /// The differences nothing excuses.
    pub fn wrong(&self) -> &[Difference] {
        &self.wrong
    }

    /// Keys of the table that excused nothing: a difference that is gone, or one that never was. Not
    /// those that are said to be seen [`SOMETIMES`].
    pub fn unused(&self) -> Vec<&str> {
        let rows = self.intended.iter().enumerate();
        let rows = rows.filter(|(_, intended)| !intended.reason.starts_with(SOMETIMES));
        rows.flat_map(|(row, intended)| {
            let keys = intended.keys.iter().enumerate();
            keys.filter(move |(key, _)| !self.used.contains(&(row, *key))).map(|(_, key)| key.as_str())
        })
        .collect()
    }

    /// The line a run ends with.
    pub fn summary(&self) -> String {
        format!("{} equal, {} intended, {} wrong", self.equal, self.excused.len(), self.wrong.len())
    }
}

impl fmt::Display for Difference {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}\n    runc: {}\n    rvm:  {}", self.key, self.runc, self.rvm)
    }
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (difference, reason) in &self.excused {
            writeln!(f, "intended: {difference}\n    ({reason})")?;
        }
        for key in self.unused() {
            writeln!(f, "not seen this time: {key}")?;
        }
        for difference in &self.wrong {
            writeln!(f, "wrong: {difference}")?;
        }
        write!(f, "{}", self.summary())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn report() -> Report {
        Report::new(vec![Intended {
            keys: vec!["uname.release".into(), "b/x.*".into()],
            runc: "*".into(),
            rvm: "6.*".into(),
            reason: "a kernel of its own".into(),
        }])
    }

    #[test]
    fn equal_intended_and_wrong() {
        let mut report = report();
        let runc = parse("a = 1\nuname.release = 5\r\nempty =\nx.y = 1\nonly = 1\n");
        let rvm = parse("a = 1\nuname.release = 6.12\nempty = \nx.y = 6.\n");
        report.compare("b", &runc, &rvm);
        report.compare("c", &parse("x.y = 1"), &parse("x.y = 6."));
        assert_eq!(report.summary(), "2 equal, 2 intended, 2 wrong");
        let wrong: Vec<&str> = report.wrong().iter().map(|difference| difference.key.as_str()).collect();
        assert_eq!(wrong, ["b/only", "c/x.y"]);
        assert_eq!(report.wrong()[0].rvm, ABSENT);
        assert!(report.unused().is_empty());
        let mut report = self::report();
        report.compare("b", &runc, &parse("a = 1\nuname.release = 6.12\nempty = \nx.y = 1\nonly = 1\n"));
        assert_eq!(report.unused(), ["b/x.*"]);
    }

    #[test]
    fn a_run_that_failed_is_one_difference() {
        let mut report = report();
        let ran = parse("a = 1\nb = 2");
        report.compare("b", &ran, &parse("run = refused"));
        report.compare("c", &parse("run = refused"), &parse("run = refused"));
        assert_eq!(report.summary(), "0 equal, 0 intended, 2 wrong");
    }
}
