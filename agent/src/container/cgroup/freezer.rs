//! Stopping a container's processes where they are, and letting them go on.

use std::time::Duration;

use tokio::time::timeout;

use super::{Cgroup, files};
use crate::error::{Step, StepError, StepResult};

/// A process stops as soon as it leaves the kernel; one that waits for a device
/// may take as long as runc waits for it.
const LIMIT: Duration = Duration::from_secs(10);

impl Cgroup {
    /// Stops every process of this cgroup and those below; returns when all
    /// stand still. Otherwise all go on.
    pub async fn freeze(&self) -> StepResult<()> {
        let events = self.events()?;
        self.set_frozen(true)?;
        let stopped = match timeout(LIMIT, events.wait_for("frozen", |frozen| frozen == 1)).await {
            Ok(stopped) => stopped.map(drop),
            Err(_) => Err(StepError::Refused(format!(
                "pause: a process has not stopped within {} s",
                LIMIT.as_secs()
            ))),
        };
        if stopped.is_err() {
            self.set_frozen(false)?;
        }
        stopped
    }

    /// Lets them go on.
    pub fn thaw(&self) -> StepResult<()> {
        self.set_frozen(false)
    }

    /// Whether they were stopped by [`freeze`](Self::freeze).
    pub fn is_frozen(&self) -> bool {
        files::read(self.dir(), "cgroup.freeze").is_ok_and(|content| content.trim() == "1")
    }

    fn set_frozen(&self, frozen: bool) -> StepResult<()> {
        let step =
            || if frozen { "pause the container's processes" } else { "resume the container's processes" };
        files::write(self.dir(), "cgroup.freeze", if frozen { "1" } else { "0" }).step(step)
    }
}
