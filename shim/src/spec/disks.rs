//! Block devices of the host that the guest gets as virtio-blk devices.

use std::{
    fs,
    os::unix::fs::{FileTypeExt, MetadataExt},
    path::{Path, PathBuf},
};

use nix::sys::stat::{major, minor};
use oci_spec::runtime::{self as oci, LinuxDeviceType};

use super::SpecError;

/// A block device of the host.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct HostDisk {
    /// The field that asked for it, for errors.
    pub field: String,
    /// Its number on the host.
    pub major: u32,
    /// See `major`.
    pub minor: u32,
    /// Its node.
    pub path: PathBuf,
    /// Held read-only by the host.
    pub readonly: bool,
}

impl HostDisk {
    /// The block device a path of the host leads to, if it is one.
    pub(super) fn at(field: &str, path: &Path) -> Option<Self> {
        let found = fs::metadata(path)
            .ok()
            .filter(|found| path.is_absolute() && found.file_type().is_block_device())?;
        let number = |part: u64| u32::try_from(part).ok();
        let (major, minor) = (number(major(found.rdev()))?, number(minor(found.rdev()))?);
        let says = fs::read_to_string(format!("/sys/dev/block/{major}:{minor}/ro"));
        let readonly = says.is_ok_and(|text| text.trim_end() == "1");
        Some(Self { field: field.to_owned(), major, minor, path: path.to_owned(), readonly })
    }

    /// The host's block device of this number, by the name its kernel gives it.
    pub(super) fn with_number(field: &str, major: u32, minor: u32) -> Result<Self, SpecError> {
        let uevent = fs::read_to_string(format!("/sys/dev/block/{major}:{minor}/uevent")).unwrap_or_default();
        let name = uevent.lines().find_map(|line| line.strip_prefix("DEVNAME="));
        name.and_then(|name| Self::at(field, &Path::new("/dev").join(name)))
            .filter(|disk| (disk.major, disk.minor) == (major, minor))
            .ok_or_else(|| {
                SpecError::field(field, format!("the host has no block device {major}:{minor} in its /dev"))
            })
    }

    /// What the guest knows it by.
    pub fn serial(&self) -> String {
        serial(self.major, self.minor)
    }
}

/// What the guest knows the host's block device of this number by; at most the
/// 20 bytes of a virtio-blk serial.
pub(crate) fn serial(major: u32, minor: u32) -> String {
    format!("blk-{major}-{minor}")
}

/// Adds a disk, or what a second field asks of one that is there: it is
/// read-only if nobody asks for more.
pub(super) fn add(disks: &mut Vec<HostDisk>, disk: HostDisk) {
    match disks.iter_mut().find(|other| (other.major, other.minor) == (disk.major, disk.minor)) {
        Some(other) => other.readonly &= disk.readonly,
        None => disks.push(disk),
    }
}

/// Whether the device rules let the container write to a block device: the last
/// one that says something about it counts.
pub(super) fn may_write(rules: &[oci::LinuxDeviceCgroup], major: u32, minor: u32) -> bool {
    let is = |number: Option<i64>, wanted: u32| {
        number.is_none_or(|number| number < 0 || number == i64::from(wanted))
    };
    let last = rules.iter().rev().find(|rule| {
        let kind = rule.typ().unwrap_or(LinuxDeviceType::A);
        let access = rule.access().as_deref().unwrap_or_default();
        matches!(kind, LinuxDeviceType::A | LinuxDeviceType::B)
            && is(rule.major(), major)
            && is(rule.minor(), minor)
            && (access.is_empty() || access.contains('w'))
    });
    last.is_some_and(oci::LinuxDeviceCgroup::allow)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn disk(minor: u32, readonly: bool) -> HostDisk {
        HostDisk { field: "f".into(), major: 7, minor, path: "/dev/loop0".into(), readonly }
    }

    #[test]
    fn one_device_is_one_disk() {
        let mut disks = Vec::new();
        for disk in [disk(0, true), disk(1, true), disk(0, false)] {
            add(&mut disks, disk);
        }
        assert_eq!(disks, [disk(0, false), disk(1, true)]);
        assert_eq!(disks[1].serial(), "blk-7-1");
        assert!(serial(4095, (1 << 20) - 1).len() <= 20);
    }

    #[test]
    fn the_last_rule_decides_about_writing() {
        let rules =
            |json: serde_json::Value| serde_json::from_value::<Vec<oci::LinuxDeviceCgroup>>(json).unwrap();
        let deny = serde_json::json!({"allow": false, "access": "rwm"});
        let allow = |access: &str| serde_json::json!({"allow": true, "type": "b", "major": 7, "minor": 0, "access": access});
        assert!(!may_write(&rules(serde_json::json!([deny])), 7, 0));
        assert!(may_write(&rules(serde_json::json!([deny, allow("rwm")])), 7, 0));
        assert!(!may_write(&rules(serde_json::json!([deny, allow("rwm")])), 7, 1));
        assert!(!may_write(&rules(serde_json::json!([deny, allow("r")])), 7, 0));
        assert!(!may_write(&rules(serde_json::json!([allow("rwm"), deny])), 7, 0));
        assert!(may_write(&rules(serde_json::json!([{"allow": true, "access": "rwm"}])), 8, 16));
        assert!(!may_write(&[], 7, 0));
    }
}
