//! Block devices of the guest, known to the host by the serials it gave them; memory that is a file
//! of the host's by its PCI slot.

use std::{
    fs, io,
    path::{Path, PathBuf},
};

use crate::{
    error::{Step, StepError, StepResult},
    sys::pci,
};

const SYS_BLOCK: &str = "/sys/block";
/// The drivers that make a block device of memory, one above the other.
const PMEM_DRIVERS: [&str; 2] = ["/sys/bus/virtio/drivers/virtio_pmem", "/sys/bus/nd/drivers/nd_pmem"];

/// A virtio-blk or virtio-pmem device.
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

    /// Whether this kernel has block devices that are memory.
    pub fn has_pmem() -> bool {
        PMEM_DRIVERS.iter().all(|driver| Path::new(driver).exists())
    }

    /// The memory in a PCI slot, which nobody can write to from now on: who tries is told so
    /// by this kernel. One that was plugged in while the guest ran is looked for.
    pub fn in_slot(slot: u32) -> StepResult<Self> {
        let function = pci::function(slot);
        if !function.exists() {
            pci::rescan()?;
        }
        Self::of_function(&function)
    }

    /// The block device of a virtio-pmem function: `virtioN/ndbusN/regionN/namespaceN.0/block/pmemN`.
    fn of_function(function: &Path) -> StepResult<Self> {
        let step = || format!("find the memory at {function:?}");
        let bus = entry(&entry(function, "virtio")?, "ndbus")?;
        // It is answered when the drivers are at work.
        fs::read(bus.join("wait_probe")).step(step)?;
        let region = entry(&bus, "region")?;
        let block = entry(&entry(&region, "namespace")?.join("block"), "pmem")?;
        fs::write(region.join("read_only"), "1").step(step)?;
        let number = fs::read_to_string(block.join("dev")).step(step)?;
        let name = block.file_name().unwrap_or_default();
        Self::numbered(name.as_ref(), &number)
            .ok_or_else(|| StepError::Refused(format!("{block:?} has the number {number:?}")))
    }

    fn numbered(name: &Path, number: &str) -> Option<Self> {
        let (major, minor) = number.trim_end().split_once(':')?;
        let (major, minor) = (major.parse().ok()?, minor.parse().ok()?);
        Some(Self { path: Path::new("/dev").join(name), major, minor })
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
            if let Some(found) = Self::numbered(entry.file_name().as_ref(), &number) {
                return Ok(Some(found));
            }
        }
        Ok(None)
    }
}

/// The entry of `dir` whose name is `kind` and a number.
fn entry(dir: &Path, kind: &str) -> StepResult<PathBuf> {
    let step = || format!("find {kind} in {dir:?}");
    let is_of_kind = |name: &str| {
        name.strip_prefix(kind).is_some_and(|rest| rest.starts_with(|first: char| first.is_ascii_digit()))
    };
    for entry in fs::read_dir(dir).step(step)? {
        let entry = entry.step(step)?;
        if entry.file_name().to_str().is_some_and(is_of_kind) {
            return Ok(entry.path());
        }
    }
    Err(io::Error::from(io::ErrorKind::NotFound)).step(step)
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

    #[test]
    fn memory_is_found_by_its_function_and_made_read_only() {
        let sys = tempfile::tempdir().unwrap();
        let function = sys.path().join("0000:00:05.0");
        let bus = function.join("virtio3/ndbus0");
        fs::create_dir_all(bus.join("power")).unwrap();
        let refused = |what: &str| {
            let said = BlockDevice::of_function(&function).unwrap_err().to_string();
            assert!(said.contains(what), "{said}");
        };
        refused("find the memory at");
        fs::write(bus.join("wait_probe"), "1\n").unwrap();
        refused("find region in");
        let block = bus.join("region2/namespace2.0/block/pmem2");
        fs::create_dir_all(&block).unwrap();
        fs::create_dir(bus.join("region2/namespaces")).unwrap();
        fs::write(block.join("dev"), "259:3\n").unwrap();
        let found = BlockDevice::of_function(&function).unwrap();
        assert_eq!(found, BlockDevice { path: "/dev/pmem2".into(), major: 259, minor: 3 });
        assert_eq!(fs::read(bus.join("region2/read_only")).unwrap(), b"1");
    }
}
