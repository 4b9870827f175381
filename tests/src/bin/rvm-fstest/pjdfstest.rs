//! What pjdfstest prints: `NAME ok`, `NAME skipped` or `NAME FAILED`, and below
//! that, indented, why.

use std::collections::BTreeMap;

/// How one test ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Outcome {
    Passed,
    Skipped,
    /// Why, in pjdfstest's words.
    Failed(String),
}

/// The outcomes of a run, by test.
#[derive(Debug, Default)]
pub struct Results(BTreeMap<String, Outcome>);

impl Results {
    /// Reads the output of a run.
    pub fn parse(text: &str) -> Self {
        let mut results = BTreeMap::new();
        let mut failed: Option<String> = None;
        for line in text.lines() {
            if line.starts_with(char::is_whitespace) {
                let reason = failed.as_ref().and_then(|name| results.get_mut(name));
                if let Some(Outcome::Failed(reason)) = reason {
                    if !reason.is_empty() {
                        reason.push_str("; ");
                    }
                    reason.push_str(line.trim());
                }
                continue;
            }
            failed = None;
            let words: Vec<&str> = line.split_whitespace().collect();
            let (name, outcome) = match words[..] {
                [name, "ok"] => (name, Outcome::Passed),
                [name, "skipped"] => (name, Outcome::Skipped),
                [name, "FAILED"] => {
                    failed = Some(name.to_owned());
                    (name, Outcome::Failed(String::new()))
                }
                _ => continue,
            };
            results.insert(name.to_owned(), outcome);
        }
        Self(results)
    }

    /// Every test and how it ended.
    pub fn all(&self) -> impl Iterator<Item = (&str, &Outcome)> {
        self.0.iter().map(|(name, outcome)| (name.as_str(), outcome))
    }

    /// How a test ended.
    pub fn get(&self, name: &str) -> Option<&Outcome> {
        self.0.get(name)
    }

    /// How many there are.
    pub fn total(&self) -> usize {
        self.0.len()
    }

    /// How many ended how.
    pub fn summary(&self) -> String {
        let count = |wanted: fn(&Outcome) -> bool| self.0.values().filter(|outcome| wanted(outcome)).count();
        format!(
            "{} passed, {} failed, {} skipped",
            count(|outcome| matches!(outcome, Outcome::Passed)),
            count(|outcome| matches!(outcome, Outcome::Failed(_))),
            count(|outcome| matches!(outcome, Outcome::Skipped))
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn outcomes_and_reasons() {
        let text = "chmod::errno::enotdir::block      ok\nopen::x   skipped\n\trequires features: y\n\
                    link::a  FAILED\n\tassertion failed\n  left: 1\nSummary: 1 failed, 1 skipped\n";
        let results = Results::parse(text);
        assert_eq!(results.summary(), "1 passed, 1 failed, 1 skipped");
        assert_eq!(results.get("link::a"), Some(&Outcome::Failed("assertion failed; left: 1".into())));
    }
}
