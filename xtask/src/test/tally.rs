//! What test programs say of their cases, read from libtest's output.

use std::time::{Duration, Instant};

/// Sums over cases.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Tally {
    /// Cases that passed.
    pub passed: u64,
    /// Cases that failed, or did not end, or never began.
    pub failed: u64,
    /// Cases that were left out.
    pub skipped: u64,
    /// Names of those that failed, each with what is known beside that.
    pub failures: Vec<String>,
    /// What was seen under runc and under rvm: equal, different with a reason, wrong.
    pub compared: [u64; 3],
}

impl Tally {
    /// Adds another one's cases.
    pub fn add(&mut self, other: &Self) {
        self.passed += other.passed;
        self.failed += other.failed;
        self.skipped += other.skipped;
        self.failures.extend(other.failures.iter().cloned());
        self.compared.iter_mut().zip(other.compared).for_each(|(sum, more)| *sum += more);
    }

    /// `41 equal, 2 intended, 0 wrong`, where anything was compared.
    pub fn comparison(&self) -> Option<String> {
        let [equal, intended, wrong] = self.compared;
        (self.compared != [0; 3]).then(|| format!("{equal} equal, {intended} intended, {wrong} wrong"))
    }

    /// `3 passed, 1 failed`, and `, 2 skipped` where some were. CI's reader looks
    /// for a line of this form.
    pub fn text(&self) -> String {
        let skipped = if self.skipped > 0 { format!(", {} skipped", self.skipped) } else { String::new() };
        format!("{} passed, {} failed{skipped}", self.passed, self.failed)
    }
}

/// One case that has ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Ended {
    /// Its name, modules included.
    pub name: String,
    /// Whether it passed.
    pub passed: bool,
    /// Since the one before, or since the program's start.
    pub took: Duration,
}

/// Reads libtest's lines, of one program or of several in a row.
pub struct Reader {
    tally: Tally,
    ended: Vec<Ended>,
    running: Option<String>,
    /// When the last case ended.
    since: Instant,
    /// Within the list of names that follows `failures:`.
    listing: bool,
    /// Whether the last program that began has told its result.
    complete: bool,
}

impl Reader {
    /// For programs that start now.
    pub fn new() -> Self {
        Self {
            tally: Tally::default(),
            ended: Vec::new(),
            running: None,
            since: Instant::now(),
            listing: false,
            complete: false,
        }
    }

    /// Takes one line.
    pub fn line(&mut self, line: &str) {
        if std::mem::take(&mut self.listing)
            && let Some(name) = line.strip_prefix("    ")
        {
            self.listing = true;
            self.tally.failures.push(name.trim().to_owned());
        } else if line == "failures:" {
            // Twice: before what each printed, and before their names, indented.
            self.listing = true;
        } else if let Some(result) = line.strip_prefix("test result: ") {
            self.result(result);
        } else if let Some((name, rest)) =
            line.strip_prefix("test ").and_then(|rest| rest.split_once(" ... "))
        {
            // With --nocapture, what the case prints follows, and its result on a line of its own.
            self.running = Some(name.to_owned());
            self.case_ends(rest);
        } else {
            self.case_ends(line);
        }
    }

    /// The sums so far. Where a program did not tell its result, or it was to run `planned` and
    /// did not come to all of them, those are failures.
    pub fn finish(mut self, planned: &[String]) -> (Tally, Vec<Ended>) {
        if self.complete {
            return (self.tally, self.ended);
        }
        for case in &self.ended {
            match case.passed {
                true => self.tally.passed += 1,
                false => {
                    self.tally.failed += 1;
                    self.tally.failures.push(case.name.clone());
                }
            }
        }
        for name in planned {
            if self.ended.iter().all(|case| case.name != *name) {
                let running = self.running.as_ref() == Some(name);
                let why = if running { "did not end" } else { "did not run" };
                self.tally.failed += 1;
                self.tally.failures.push(format!("{name} ({why})"));
            }
        }
        (self.tally, self.ended)
    }

    fn case_ends(&mut self, word: &str) {
        if !matches!(word, "ok" | "FAILED") {
            if let Some(counts) = compared(word) {
                self.tally.compared.iter_mut().zip(counts).for_each(|(sum, more)| *sum += more);
            }
            return;
        }
        if let Some(name) = self.running.take() {
            let now = Instant::now();
            let took = now - std::mem::replace(&mut self.since, now);
            self.ended.push(Ended { name, passed: word == "ok", took });
        }
    }

    /// Counts such as `ok. 3 passed; 0 failed; 1 ignored; ...`.
    fn result(&mut self, text: &str) {
        let Some((_, counts)) = text.split_once(". ") else { return };
        self.complete = true;
        for count in counts.split("; ") {
            let Some((number, kind)) = count.split_once(' ') else { continue };
            let number: u64 = number.parse().unwrap_or(0);
            match kind {
                "passed" => self.tally.passed += number,
                "failed" => self.tally.failed += number,
                "ignored" => self.tally.skipped += number,
                _ => {}
            }
        }
    }
}

/// The counts in `41 equal, 2 intended, 0 wrong`.
fn compared(line: &str) -> Option<[u64; 3]> {
    let mut words = line.split(", ").map(|part| part.split_once(' '));
    let mut next = |kind: &str| {
        let (number, word) = words.next()??;
        (word == kind).then(|| number.parse().ok())?
    };
    Some([next("equal")?, next("intended")?, next("wrong")?])
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(text: &str, planned: &[&str]) -> (Tally, Vec<Ended>) {
        let mut reader = Reader::new();
        text.lines().for_each(|line| reader.line(line));
        reader.finish(&planned.iter().map(|&name| name.to_owned()).collect::<Vec<_>>())
    }

    #[test]
    fn results_of_several_programs_add_up() {
        let (tally, _) = read(
            "test result: ok. 3 passed; 0 failed; 1 ignored; 0 measured; 0 filtered out; finished in 0.1s\n\
             test something ... ok\n\n\
             failures:\n\n---- a::b stdout ----\nfailures:\nno name\n\n\nfailures:\n    a::b\n    a::c\n\n\
             test result: FAILED. 1 passed; 2 failed; 0 ignored; 0 measured; 0 filtered out; finished in 0.1s",
            &[],
        );
        assert_eq!(tally.text(), "4 passed, 2 failed, 1 skipped");
        assert_eq!(tally.failures, ["a::b", "a::c"]);
    }

    #[test]
    fn what_a_program_that_died_did_not_come_to_has_failed() {
        let text = "running 4 tests\n\
                    test a::a ... 12 ms, and 3 ms until nothing was left\nok\n\
                    test a::b ... panicked\nFAILED\n\
                    test a::c ... ";
        let (tally, ended) = read(text, &["a::a", "a::b", "a::c", "a::d"]);
        assert_eq!(tally.text(), "1 passed, 3 failed");
        assert_eq!(tally.failures, ["a::b", "a::c (did not end)", "a::d (did not run)"]);
        assert_eq!(ended.len(), 2);
    }

    #[test]
    fn comparisons_add_up() {
        let text =
            "test a ... 3 equal, 1 intended, 0 wrong\n12 ms\nok\n40 equal, 0 intended, 2 wrong\nequal, so\n";
        assert_eq!(read(text, &[]).0.comparison().as_deref(), Some("43 equal, 1 intended, 2 wrong"));
        assert_eq!(Tally::default().comparison(), None);
    }
}
