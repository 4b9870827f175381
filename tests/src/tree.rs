//! Trees of files, compared.

mod walk;

use std::path::Path;

use anyhow::{Result, ensure};

use walk::{Entry, walk};

/// # Errors
/// With the first differences, where there are any.
pub fn same(expected: &Path, found: &Path) -> Result<()> {
    let (expected, found) = (walk(expected)?, walk(found)?);
    let paths: Vec<_> = expected.keys().chain(found.keys()).collect();
    let different: Vec<String> = paths
        .into_iter()
        .filter(|path| expected.get(*path) != found.get(*path))
        .map(|path| format!("{path:?}:\n  {:?}\n  {:?}", brief(expected.get(path)), brief(found.get(path))))
        .take(5)
        .collect();
    ensure!(different.is_empty(), "{} and {} files: {}", expected.len(), found.len(), different.join("\n"));
    Ok(())
}

fn brief(entry: Option<&Entry>) -> String {
    entry.map_or_else(|| "is not there".into(), |entry| format!("{entry:?}").chars().take(400).collect())
}
