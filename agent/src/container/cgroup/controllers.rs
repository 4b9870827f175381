//! Making the guest's controllers available in a container's cgroup.

use std::{fs, path::Path};

use crate::error::{Step, StepError, StepResult};

/// Makes every controller a cgroup has available to those below it.
pub fn delegate(dir: &Path) -> StepResult<()> {
    let read =
        |file: &str| fs::read_to_string(dir.join(file)).step(|| format!("read {file} of cgroup {dir:?}"));
    let missing = missing(&read("cgroup.controllers")?, &read("cgroup.subtree_control")?);
    if missing.is_empty() {
        return Ok(());
    }
    fs::write(dir.join("cgroup.subtree_control"), &missing).map_err(|error| {
        StepError::Refused(format!("enable controllers {missing:?} of cgroup {dir:?}: {error}"))
    })
}

fn missing(available: &str, enabled: &str) -> String {
    let enabled: Vec<&str> = enabled.split_whitespace().collect();
    let missing = available.split_whitespace().filter(|controller| !enabled.contains(controller));
    missing.map(|controller| format!("+{controller}")).collect::<Vec<_>>().join(" ")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_missing_controllers_are_enabled() {
        assert_eq!(missing("cpuset cpu io memory\n", "cpu memory\n"), "+cpuset +io");
        assert_eq!(missing("cpu\n", "cpu\n"), "");
        assert_eq!(missing("\n", "\n"), "");
    }
}
