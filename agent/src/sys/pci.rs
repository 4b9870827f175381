//! The guest's PCI bus, which has no controller that would tell of new devices. A slot is a device
//! number on bus 0, by which the host knows a function.

use std::{
    fs, io,
    path::{Path, PathBuf},
};

use crate::error::{Step, StepResult};

const RESCAN: &str = "/sys/bus/pci/rescan";
const DEVICES: &str = "/sys/bus/pci/devices";

/// Device numbers of a bus.
pub const SLOTS: u32 = 32;

/// Has the kernel look for functions it does not know yet; their drivers are at
/// work when this returns.
pub fn rescan() -> StepResult<()> {
    fs::write(RESCAN, "1").step(|| "scan the PCI bus again")
}

/// The directory of the function in `slot`, whether there is one or not.
pub fn function(slot: u32) -> PathBuf {
    Path::new(DEVICES).join(format!("0000:00:{slot:02x}.0"))
}

/// Takes a function out of the guest, if it is there.
pub fn remove(slot: u32) -> StepResult<()> {
    match fs::write(function(slot).join("remove"), "1") {
        Err(error) if error.kind() != io::ErrorKind::NotFound => {
            Err(error).step(|| format!("remove PCI function {slot}"))
        }
        _ => Ok(()),
    }
}
