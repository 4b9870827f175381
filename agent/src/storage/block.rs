//! Block devices of the guest, known to the host by the serials it gave them.

use std::{
    fs,
    path::{Path, PathBuf},
};

use crate::{
    error::{Step, StepError, StepResult},
    sys::pci,
};

const SYS_BLOCK: &str = "/sys/block";

/// A virtio-blk device.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BlockDevice {
    /// Its node in the agent's `/dev`.
    pub path: PathBuf,
    /// Its number in this guest.
    pub major: u32,
    /// See `major`.
    pub minor: u32,
}

impl BlockDevice {
    /// The device whose driver reports `serial`. One that was plugged in while the
    /// guest ran has to be [`found`](Self::find_all) first.
    pub fn with_serial(serial: &str) -> StepResult<Self> {
        Self::known(serial)?
            .ok_or_else(|| StepError::Refused(format!("no block device has the serial {serial:?}")))
    }

    /// Looks for devices that were plugged in, where the guest does not know one
    /// of these. Takes the time their drivers and the host's disks take.
    pub fn find_all<'a>(serials: impl IntoIterator<Item = &'a str>) -> StepResult<()> {
        for serial in serials {
            if Self::known(serial)?.is_none() {
                return pci::rescan();
            }
        }
        Ok(())
    }

    /// Takes its PCI function out of the guest; its driver writes out what it has.
    pub fn remove(&self) -> StepResult<()> {
        let step = || format!("remove block device {:?}", self.path);
        let name = self.path.file_name().unwrap_or_default();
        // The disk's device is the virtio one, whose parent is the function.
        let device = fs::canonicalize(Path::new(SYS_BLOCK).join(name).join("device")).step(step)?;
        fs::write(device.join("../remove"), "1").step(step)
    }

    /// The device whose driver reports `serial`, if the guest knows it.
    pub fn known(serial: &str) -> StepResult<Option<Self>> {
        Self::find(Path::new(SYS_BLOCK), serial)
    }

    fn find(sys_block: &Path, serial: &str) -> StepResult<Option<Self>> {
        let entries = fs::read_dir(sys_block).step(|| format!("list {sys_block:?}"))?;
        for entry in entries.flatten() {
            // Only virtio-blk has this attribute.
            let Ok(found) = fs::read_to_string(entry.path().join("serial")) else { continue };
            if found.trim_end() != serial {
                continue;
            }
            let number = fs::read_to_string(entry.path().join("dev"))
                .step(|| format!("read the number of block device {serial:?}"))?;
            let number = number.trim_end().split_once(':');
            if let Some((Ok(major), Ok(minor))) = number.map(|(a, b)| (a.parse(), b.parse())) {
                return Ok(Some(Self { path: Path::new("/dev").join(entry.file_name()), major, minor }));
            }
        }
        Ok(None)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_device_is_found_by_its_serial() {
        let sys = tempfile::tempdir().unwrap();
        for (name, serial) in [("vda", Some("other\n")), ("loop0", None), ("vdb", Some("rvm-scratch"))] {
            let dir = sys.path().join(name);
            fs::create_dir(&dir).unwrap();
            fs::write(dir.join("dev"), "254:16\n").unwrap();
            if let Some(serial) = serial {
                fs::write(dir.join("serial"), serial).unwrap();
            }
        }
        let found = BlockDevice::find(sys.path(), "rvm-scratch").unwrap();
        assert_eq!(found, Some(BlockDevice { path: "/dev/vdb".into(), major: 254, minor: 16 }));
        assert_eq!(BlockDevice::find(sys.path(), "rvm").unwrap(), None);
    }
}
