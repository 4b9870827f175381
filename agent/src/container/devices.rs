//! Device nodes and the links of `/dev`.

use std::{
    ffi::OsStr,
    os::fd::{AsFd, BorrowedFd, OwnedFd},
    path::Path,
};

use nix::{
    errno::Errno,
    fcntl::AtFlags,
    mount::{MntFlags, umount2},
    sys::stat::{Mode, SFlag, major, makedev, minor, mknodat},
    unistd::{Gid, Uid, UnlinkatFlags, fchownat, symlinkat, unlinkat},
};
use rvm_protocol::agent;

use super::paths::{Root, clean};
use crate::{
    error::{Error, Step, StepResult},
    storage::BlockDevice,
    sys::mount::{FsContext, attach, clone_tree, open_path},
};

/// One device node to be made.
#[derive(Debug, PartialEq, Eq)]
pub struct Device {
    path: String,
    kind: SFlag,
    number: u64,
    mode: Mode,
    owner: Uid,
    group: Gid,
}

/// What every container has: character devices, `(path, major, minor)`, mode 0666.
const DEFAULT: &[(&str, u64, u64)] = &[
    ("/dev/null", 1, 3),
    ("/dev/zero", 1, 5),
    ("/dev/full", 1, 7),
    ("/dev/tty", 5, 0),
    ("/dev/urandom", 1, 9),
    ("/dev/random", 1, 8),
];

/// What every container has: links, `(target, name in /dev)`.
const LINKS: &[(&str, &str)] = &[
    ("/proc/self/fd", "fd"),
    ("/proc/self/fd/0", "stdin"),
    ("/proc/self/fd/1", "stdout"),
    ("/proc/self/fd/2", "stderr"),
];

impl Device {
    /// Checks the device `devices[index]` of a request.
    pub fn plan(index: usize, device: &agent::Device) -> Result<Self, Error> {
        let field = |name: &str| format!("devices[{index}].{name}");
        let path = clean(&device.path);
        if !device.path.starts_with('/') || device.path.contains('\0') || path == Path::new("/") {
            return Err(Error::invalid(field("path"), format!("{:?} must be an absolute path", device.path)));
        }
        let kind = match device.type_.as_str() {
            "c" | "u" => SFlag::S_IFCHR,
            "b" => SFlag::S_IFBLK,
            "p" => SFlag::S_IFIFO,
            other => {
                return Err(Error::invalid(
                    field("type"),
                    format!("{other:?} must be \"c\", \"b\", \"u\" or \"p\""),
                ));
            }
        };
        let number = match device.block_serial.as_str() {
            "" => makedev(device.major.into(), device.minor.into()),
            serial => {
                let device = BlockDevice::with_serial(serial)?;
                makedev(device.major.into(), device.minor.into())
            }
        };
        // The OCI default, where the spec gives no mode.
        let mode = if device.file_mode == 0 { 0o666 } else { device.file_mode & 0o7777 };
        Ok(Self {
            path: path.to_string_lossy().into_owned(),
            kind,
            number,
            mode: Mode::from_bits_truncate(mode),
            owner: Uid::from_raw(device.uid),
            group: Gid::from_raw(device.gid),
        })
    }

    fn default(path: &str, major: u64, minor: u64) -> Self {
        Self {
            path: path.to_owned(),
            kind: SFlag::S_IFCHR,
            number: makedev(major, minor),
            mode: Mode::from_bits_truncate(0o666),
            owner: Uid::from_raw(0),
            group: Gid::from_raw(0),
        }
    }

    fn make(&self, root: &Root) -> nix::Result<()> {
        let (parent, name) = root.make_parent(Path::new(&self.path))?;
        match self.make_node(parent.as_fd(), &name) {
            // Bind-mounted by the spec, or in the image: theirs comes first.
            Err(Errno::EEXIST) => Ok(()),
            made => made,
        }
    }

    /// The file creation mask must be 0.
    fn make_node(&self, dir: BorrowedFd<'_>, name: &OsStr) -> nix::Result<()> {
        mknodat(dir, name, self.kind, self.mode, self.number)?;
        fchownat(dir, name, Some(self.owner), Some(self.group), AtFlags::AT_SYMLINK_NOFOLLOW)
    }

    /// Shows a node made elsewhere, where there is nothing of that name.
    fn bind(&self, node: &OwnedFd, root: &Root) -> nix::Result<()> {
        let path = Path::new(&self.path);
        match root.find(path) {
            Err(Errno::ENOENT) => attach(node, root.make_file(path)?),
            found => found.map(drop),
        }
    }
}

/// The spec's devices and the default ones.
pub fn all(devices: Vec<Device>) -> Vec<Device> {
    let default = DEFAULT.iter().map(|(path, major, minor)| Device::default(path, *major, *minor));
    // `/dev/ptmx` is a link into the container's own devpts.
    devices.into_iter().chain(default).filter(|device| device.path != "/dev/ptmx").collect()
}

/// Makes the nodes of devices where only the guest's root may, to be bound by
/// one who may not. `place` is a directory for the time being; they keep the
/// owners they have on the guest, as with runc.
pub fn make_elsewhere(devices: &[Device], place: &Path) -> StepResult<Vec<OwnedFd>> {
    let step = || "make devices";
    let here = FsContext::new("tmpfs").and_then(|tmpfs| tmpfs.mount(0)).step(step)?;
    attach(&here, open_path(place).step(step)?).step(step)?;
    let make = |(index, device): (usize, &Device)| {
        let name = index.to_string();
        device.make_node(here.as_fd(), OsStr::new(&name))?;
        clone_tree(&here, Path::new(&name), false)
    };
    let nodes = devices.iter().enumerate();
    let nodes = nodes.map(|node| make(node).step(|| format!("create device {:?}", node.1.path)));
    let nodes = nodes.collect::<StepResult<_>>()?;
    umount2(place, MntFlags::MNT_DETACH).step(step)?;
    Ok(nodes)
}

/// Makes devices, or shows those that were made elsewhere, and the links.
pub fn make_all(devices: &[Device], elsewhere: Option<&[OwnedFd]>, root: &Root) -> StepResult<()> {
    for (index, device) in devices.iter().enumerate() {
        let made = match elsewhere.map(|nodes| nodes.get(index)) {
            None => device.make(root),
            Some(Some(node)) => device.bind(node, root),
            Some(None) => Err(Errno::ENODEV),
        };
        made.step(|| format!("create device {:?}", device.path))?;
    }
    let dev = root.make_dir(Path::new("/dev")).step(|| "open /dev")?;
    let link = |target: &str, name: &str| match symlinkat(target, &dev, name) {
        Ok(()) | Err(Errno::EEXIST) => Ok(()),
        Err(errno) => Err(errno).step(|| format!("link /dev/{name}")),
    };
    for (target, name) in LINKS {
        link(target, name)?;
    }
    if root.find(Path::new("/proc/kcore")).is_ok() {
        link("/proc/kcore", "core")?;
    }
    match unlinkat(&dev, "ptmx", UnlinkatFlags::NoRemoveDir) {
        Ok(()) | Err(Errno::ENOENT) => {}
        Err(errno) => return Err(errno).step(|| "replace /dev/ptmx"),
    }
    link("pts/ptmx", "ptmx")
}

/// Turns the rules that are about the host's numbers of the devices `asked` for
/// into rules about the guest's: `planned`, in the same order.
pub fn renumber(rules: &mut [agent::DeviceRule], asked: &[agent::Device], planned: &[Device]) {
    for rule in rules.iter_mut().filter(|rule| rule.type_ == "b") {
        let meant = asked.iter().zip(planned).find(|(asked, _)| {
            !asked.block_serial.is_empty()
                && (rule.major, rule.minor) == (Some(asked.major), Some(asked.minor))
        });
        if let Some((_, device)) = meant {
            rule.major = u32::try_from(major(device.number)).ok();
            rule.minor = u32::try_from(minor(device.number)).ok();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn device(path: &str, kind: &str, mode: u32) -> agent::Device {
        agent::Device {
            path: path.into(),
            type_: kind.into(),
            major: 10,
            minor: 200,
            file_mode: mode,
            ..Default::default()
        }
    }

    #[test]
    fn devices_are_checked_by_field() {
        let tun = Device::plan(0, &device("/dev/net/tun", "c", 0o660)).unwrap();
        assert_eq!((tun.kind, tun.number, tun.mode.bits()), (SFlag::S_IFCHR, makedev(10, 200), 0o660));
        assert_eq!(Device::plan(0, &device("/dev/x", "u", 0)).unwrap().mode.bits(), 0o666);
        assert_eq!(
            Device::plan(3, &device("/dev/x", "q", 0)).unwrap_err().to_string(),
            "devices[3].type: \"q\" must be \"c\", \"b\", \"u\" or \"p\""
        );
        assert_eq!(
            Device::plan(1, &device("dev/x", "c", 0)).unwrap_err().to_string(),
            "devices[1].path: \"dev/x\" must be an absolute path"
        );
    }

    #[test]
    fn rules_follow_their_devices() {
        let asked = |minor, serial: &str| agent::Device {
            major: 254,
            minor,
            block_serial: serial.into(),
            ..device("/dev/x", "b", 0)
        };
        let planned = |minor| Device { kind: SFlag::S_IFBLK, ..Device::default("/dev/x", 254, minor) };
        let rule = |kind: &str, minor| agent::DeviceRule {
            type_: kind.into(),
            major: Some(254),
            minor,
            ..Default::default()
        };
        // What is one's number on the host is the other's in the guest.
        let mut rules =
            [rule("b", Some(0)), rule("b", Some(1)), rule("b", None), rule("c", Some(0)), rule("b", Some(2))];
        renumber(
            &mut rules,
            &[asked(0, "s0"), asked(1, "s1"), asked(2, "")],
            &[planned(1), planned(0), planned(9)],
        );
        let minors = rules.map(|rule| rule.minor);
        assert_eq!(minors, [Some(1), Some(0), None, Some(0), Some(2)]);
    }
}
