//! The differences that are meant: a table of `docs/specification.md`.
//!
//! A row is `| keys | under runc | under rvm | reason |`, keys and values in
//! backticks, several keys separated by commas. `*` stands for anything, but not
//! for [`ABSENT`], and not for the loss of a flag that protects. A key with a slash
//! names a bundle as well. A key that nothing differs under any more is wrong, unless
//! its reason begins with `sometimes: `.

use anyhow::{Context, Result, ensure};

use super::compare::{ABSENT, Difference};

/// The section of the document.
const HEADING: &str = "## Intended differences from runc";

const DOCUMENT: &str = include_str!("../../../docs/specification.md");

/// One row.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Intended {
    /// Patterns of keys.
    pub keys: Vec<String>,
    /// Pattern of the value under runc.
    pub runc: String,
    /// Pattern of the value under rvm.
    pub rvm: String,
    /// Why.
    pub reason: String,
}

impl Intended {
    /// Which of the keys the difference is excused by; none where it is another one.
    pub fn covers(&self, difference: &Difference) -> Vec<usize> {
        let value = |pattern: &str, text: &str| match text {
            ABSENT => pattern == ABSENT,
            _ => matches(pattern, text),
        };
        let meant = value(&self.runc, &difference.runc)
            && value(&self.rvm, &difference.rvm)
            && !(self.rvm.contains('*') && loses_a_flag(difference));
        let key = |pattern: &str| {
            matches(pattern, if names_bundle(pattern) { &difference.key } else { line(&difference.key) })
        };
        let keys = self.keys.iter().enumerate().filter(|(_, pattern)| meant && key(pattern));
        keys.map(|(index, _)| index).collect()
    }
}

/// Whether a mount lacks, under rvm, what keeps something from being done there under runc.
fn loses_a_flag(difference: &Difference) -> bool {
    const FLAGS: [&str; 5] = ["ro", "nosuid", "nodev", "noexec", "nosymfollow"];
    let is_a_mounts = difference.key.ends_with(".options") || difference.key.ends_with(".super");
    let has = |options: &str, flag: &str| options.split(',').any(|option| option == flag);
    is_a_mounts && FLAGS.iter().any(|flag| has(&difference.runc, flag) && !has(&difference.rvm, flag))
}

/// Whether a key or pattern begins with a bundle's name: lines' keys have a dot
/// before any slash.
fn names_bundle(key: &str) -> bool {
    key.split_once('/').is_some_and(|(first, _)| !first.is_empty() && !first.contains('.'))
}

/// A key without its bundle, and without the process of a bundle that has several.
fn line(key: &str) -> &str {
    match key.split_once('/') {
        Some((_, rest)) if names_bundle(key) => line(rest),
        _ => key,
    }
}

/// The document's rows.
///
/// # Errors
/// Names the row that is not as described above.
pub fn table() -> Result<Vec<Intended>> {
    parse(DOCUMENT)
}

fn parse(document: &str) -> Result<Vec<Intended>> {
    let (_, section) =
        document.split_once(HEADING).with_context(|| format!("the document has no section {HEADING:?}"))?;
    let section = section.split_once("\n## ").map_or(section, |(section, _)| section);
    let rows = section.lines().filter(|line| line.starts_with('|')).skip(2);
    rows.map(|line| row(line).with_context(|| format!("row {line:?}"))).collect()
}

fn row(line: &str) -> Result<Intended> {
    let cells: Vec<&str> = line.trim().trim_matches('|').split('|').map(str::trim).collect();
    ensure!(cells.len() == 4, "{} cells, not keys, runc, rvm, reason", cells.len());
    let keys = quoted(cells[0]);
    ensure!(!keys.is_empty(), "no key in backticks");
    let value = |cell: &str| -> Result<String> {
        let values = quoted(cell);
        ensure!(values.len() == 1, "{cell:?} is not one value in backticks");
        Ok(values[0].clone())
    };
    ensure!(!cells[3].is_empty(), "a reason is missing");
    Ok(Intended { keys, runc: value(cells[1])?, rvm: value(cells[2])?, reason: cells[3].to_owned() })
}

/// What stands in backticks.
fn quoted(cell: &str) -> Vec<String> {
    cell.split('`').skip(1).step_by(2).map(str::to_owned).collect()
}

/// Whether `text` is `pattern`, in which `*` stands for anything.
fn matches(pattern: &str, text: &str) -> bool {
    let mut parts = pattern.split('*');
    let Some(mut rest) = parts.next().and_then(|first| text.strip_prefix(first)) else { return false };
    let parts: Vec<&str> = parts.collect();
    let Some((last, middle)) = parts.split_last() else { return rest.is_empty() };
    for part in middle {
        match rest.find(part) {
            Some(at) => rest = &rest[at + part.len()..],
            None => return false,
        }
    }
    rest.ends_with(last)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_documents_table_is_readable() -> Result<()> {
        let table = table()?;
        assert!(!table.is_empty());
        for intended in &table {
            // Everything under every name excuses whatever happens.
            assert!(intended.keys.iter().all(|key| key.trim_matches('*').len() > 3), "{intended:?}");
        }
        Ok(())
    }

    #[test]
    fn anything_is_neither_nothing_nor_a_lost_flag() {
        let all = |runc: &str, rvm: &str| Intended {
            keys: vec!["b/mount./dev/*".into(), "mount.*".into()],
            runc: runc.into(),
            rvm: rvm.into(),
            reason: "a reason".into(),
        };
        let difference = |key: &str, runc: &str, rvm: &str| Difference {
            key: format!("b/mount./dev/x.{key}"),
            runc: runc.into(),
            rvm: rvm.into(),
        };
        assert_eq!(all("*", "*").covers(&difference("type", "a", "b")), [0, 1]);
        assert!(all("*", "*").covers(&difference("type", "a", ABSENT)).is_empty());
        assert_eq!(all("*", ABSENT).covers(&difference("type", "a", ABSENT)).len(), 2);
        let lost = difference("options", "rw,nosuid,noexec", "rw,noexec");
        assert!(all("*", "*").covers(&lost).is_empty());
        assert!(all("rw*", "rw*").covers(&lost).is_empty());
        assert_eq!(all("*", "rw,noexec").covers(&lost).len(), 2);
        assert_eq!(all("*", "*").covers(&difference("options", "rw", "rw,nosuid")).len(), 2);
    }

    #[test]
    fn keys_with_and_without_a_bundle() {
        assert_eq!(line("exec/user/mount./dev/pts.type"), "mount./dev/pts.type");
        assert_eq!(line("hooks/order"), "order");
        assert!(names_bundle("exec/*/status.Pid") && !names_bundle("mount./dev/*"));
    }

    #[test]
    fn patterns() {
        for (pattern, text, expected) in [
            ("a", "a", true),
            ("a", "ab", false),
            ("*", "", true),
            ("a*c", "abc", true),
            ("a*c", "ac", true),
            ("a*c", "acd", false),
            ("*b*", "abc", true),
            ("*ab", "abab", true),
            ("x*", "abc", false),
            ("a*b*c", "a-b-c", true),
            ("a*b*c", "a-c", false),
        ] {
            assert_eq!(matches(pattern, text), expected, "{pattern} {text}");
        }
    }

    #[test]
    fn rows_that_are_wrong_are_named() {
        let document =
            |row: &str| format!("x\n{HEADING}\n\n| a | b | c | d |\n| - | - | - | - |\n{row}\n\n## Next\n");
        let good = parse(&document("| `a.*`, `b` | `1` | `*` | a kernel of its own |")).expect("a good row");
        assert_eq!(good[0].keys, ["a.*", "b"]);
        for row in ["| `a` | `1` | `2` |", "| a | `1` | `2` | a long reason |", "| `a` | `1` | `2` | |"] {
            assert!(parse(&document(row)).is_err(), "{row}");
        }
    }
}
