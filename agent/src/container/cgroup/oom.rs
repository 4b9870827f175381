//! Processes the kernel killed for want of memory.

use super::{
    Cgroup,
    files::{self, Watched, value_of},
};
use crate::error::StepResult;

/// Counts kills in this cgroup and those below it, whether for want of its own
/// memory or of the guest's.
const FILE: &str = "memory.events";
const KEY: &str = "oom_kill";

impl Cgroup {
    /// How many there have been.
    pub fn oom_kills(&self) -> u64 {
        let content = files::read(self.dir(), FILE).unwrap_or_default();
        value_of(&content, KEY).unwrap_or(0)
    }

    /// Waits until there have been more than `known`; returns how many.
    pub async fn more_oom_kills(&self, known: u64) -> StepResult<u64> {
        Watched::open(self.dir(), FILE)?.wait_for(KEY, |kills| kills > known).await
    }
}
