//! The guest's PCI bus, which has no controller that would tell of new devices.

use crate::error::{Step, StepResult};

const RESCAN: &str = "/sys/bus/pci/rescan";

/// Has the kernel look for functions it does not know yet; their drivers are at
/// work when this returns.
pub fn rescan() -> StepResult<()> {
    std::fs::write(RESCAN, "1").step(|| "scan the PCI bus again")
}
