//! The configuration: read, checked, every file in it opened.

use std::collections::HashSet;
use std::fs::File;
use std::hash::Hash;
use std::io;
use std::os::fd::RawFd;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use rvm_protocol::guest::NET_SLOTS;
use rvm_protocol::vmm::{InheritedNet, MAX_VCPUS, NetConfig, VmConfig};
use thiserror::Error;

use crate::arch::layout::{self, CMDLINE_MAX_SIZE, MEMORY_BLOCK};
use crate::arch::vendor::Vendor;
use crate::boot::params;
use crate::jail::{Jail, JailError};
use crate::memory::windows::WINDOWS;
use crate::process;

/// Smallest guest memory, in MiB: kernel, initramfs and a little.
pub const MIN_MEMORY_MIB: u64 = 32;
/// Largest guest memory, in MiB: 1 TiB. The CPU's addresses may reach less far.
pub const MAX_MEMORY_MIB: u64 = 1 << 20;
/// Longest path of a Unix socket.
const MAX_SOCKET_PATH: usize = 107;
/// Devices beside network interfaces, which have slots of their own.
const MAX_DEVICES: usize = NET_SLOTS.start as usize;

/// What is wrong with a configuration; every message starts with the field.
#[derive(Debug, Error)]
pub enum ConfigError {
    /// The file could not be read.
    #[error("{}", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// The system's answer.
        #[source]
        source: io::Error,
    },
    /// The file is not a `VmConfig`.
    #[error("{}: {field}: {source}", path.display())]
    Parse {
        /// The file.
        path: PathBuf,
        /// Path of the field in it.
        field: String,
        /// What was expected.
        source: serde_json::Error,
    },
    /// A value is out of range or contradicts another.
    #[error("{field}: {problem}")]
    Value {
        /// The field.
        field: &'static str,
        /// What is wrong, and what would be right.
        problem: String,
    },
    /// A file named in the configuration could not be opened.
    #[error("{field}: {}", path.display())]
    Open {
        /// The field.
        field: &'static str,
        /// The file.
        path: PathBuf,
        /// The system's answer.
        #[source]
        source: io::Error,
    },
    /// What the monitor is to be shut in is not there.
    #[error(transparent)]
    Jail(#[from] JailError),
}

/// A configuration with which a machine can be built.
#[derive(Debug)]
pub struct CheckedConfig {
    /// As written, apart from what a missing field stands for.
    pub vm: VmConfig,
    /// The kernel's file.
    pub kernel: File,
    /// The initramfs's file.
    pub initramfs: Option<File>,
    /// The whole command line.
    pub cmdline: String,
    /// The network interfaces.
    pub nets: Vec<NetFiles>,
    /// What the monitor is to be shut in.
    pub jail: Option<Jail>,
}

/// A network interface and the descriptors inherited for it.
#[derive(Debug)]
pub struct NetFiles {
    /// As configured.
    pub config: NetConfig,
    /// Its tap's, one per queue pair.
    pub taps: Vec<File>,
    /// vhost-net's.
    pub vhost: Vec<File>,
}

/// Reads and checks the configuration at `path`.
pub fn load(path: &Path) -> Result<CheckedConfig, ConfigError> {
    let text = std::fs::read(path).map_err(|source| ConfigError::Read { path: path.to_owned(), source })?;
    let mut parser = serde_json::Deserializer::from_slice(&text);
    let vm = serde_path_to_error::deserialize(&mut parser).map_err(|e| ConfigError::Parse {
        path: path.to_owned(),
        field: e.path().to_string(),
        source: e.into_inner(),
    })?;
    check(vm)
}

/// Checks a configuration.
pub fn check(mut vm: VmConfig) -> Result<CheckedConfig, ConfigError> {
    let wrong = |field, problem: String| Err(ConfigError::Value { field, problem });
    if vm.id.is_empty() || vm.id.chars().any(char::is_control) {
        return wrong("id", "must be a name without control characters".into());
    }
    if !(1..=MAX_VCPUS).contains(&vm.vcpus) {
        return wrong("vcpus", format!("{} given; must be 1 to {MAX_VCPUS}", vm.vcpus));
    }
    if vm.max_vcpus == 0 {
        vm.max_vcpus = vm.vcpus;
    }
    if vm.max_vcpus < vm.vcpus {
        return wrong(
            "max_vcpus",
            format!("{} given; must be {} (vcpus) to {MAX_VCPUS}", vm.max_vcpus, vm.vcpus),
        );
    }
    if !(MIN_MEMORY_MIB..=MAX_MEMORY_MIB).contains(&vm.memory_mib) {
        let problem = format!("{} given; must be {MIN_MEMORY_MIB} to {MAX_MEMORY_MIB}", vm.memory_mib);
        return wrong("memory_mib", problem);
    }
    let block = MEMORY_BLOCK >> 20;
    let mut most = MAX_MEMORY_MIB - vm.memory_mib;
    for (field, hotplug) in
        [("hotplug_memory_mib", vm.hotplug_memory_mib), ("hugetlb_memory_mib", vm.hugetlb_memory_mib)]
    {
        if hotplug > most || !hotplug.is_multiple_of(block) {
            let problem =
                format!("{hotplug} given; must be a multiple of {block} up to {most} beside memory_mib");
            return wrong(field, problem);
        }
        most -= hotplug;
    }
    if vm.pmem_mib > MAX_MEMORY_MIB || !vm.pmem_mib.is_multiple_of(block) {
        let problem = format!("{} given; must be a multiple of {block} up to {MAX_MEMORY_MIB}", vm.pmem_mib);
        return wrong("pmem_mib", problem);
    }
    let bits = Vendor::address_bits();
    if let Some(problem) = beyond_reach(&vm, bits) {
        return wrong("memory_mib", problem);
    }
    if windows_beyond_reach(&vm, bits) {
        log::info!("pmem_mib: this CPU's addresses of {bits} bits leave no room behind memory");
        vm.pmem_mib = 0;
    }
    let cmdline = params::full_cmdline(&vm.cmdline, (vm.max_vcpus > vm.vcpus).then_some(vm.vcpus));
    if !cmdline.bytes().all(|b| b.is_ascii_graphic() || b == b' ') {
        return wrong("cmdline", "must consist of printable ASCII characters".into());
    }
    if cmdline.len() >= CMDLINE_MAX_SIZE {
        let most = CMDLINE_MAX_SIZE - 1 - (cmdline.len() - vm.cmdline.len());
        return wrong("cmdline", format!("{} bytes; the kernel takes {most}", vm.cmdline.len()));
    }
    if let Some(socket) = &vm.control_socket {
        let len = socket.as_os_str().as_bytes().len();
        if len > MAX_SOCKET_PATH {
            return wrong(
                "control_socket",
                format!("{len} bytes; a socket's path has at most {MAX_SOCKET_PATH}"),
            );
        }
    }
    if let Some(tag) = first_repeated(vm.shares.iter().map(|share| share.tag.as_str())) {
        return wrong("shares", format!("tag {tag:?} is used twice"));
    }
    if let Some(serial) = first_repeated(vm.disks.iter().map(|disk| disk.serial.as_str())) {
        return wrong("disks", format!("serial {serial:?} is used twice"));
    }
    let devices = vm.shares.len() + vm.disks.len() + usize::from(vm.vsock.is_some());
    if devices > MAX_DEVICES {
        return wrong("disks", format!("{devices} devices with shares and vsock; at most {MAX_DEVICES} fit"));
    }
    if let Some(slot) = first_repeated(vm.nets.iter().map(|net| net.net.slot)) {
        return wrong("nets", format!("slot {slot} is used twice"));
    }
    let nets = vm.nets.iter().map(net_files).collect::<Result<_, _>>()?;
    let kernel = open("kernel", &vm.kernel)?;
    let initramfs = vm.initramfs.as_deref().map(|path| open("initramfs", path)).transpose()?;
    let jail = vm.jail.as_ref().map(Jail::open).transpose()?;
    Ok(CheckedConfig { vm, kernel, initramfs, cmdline, nets, jail })
}

/// What is wrong with memory that addresses of `bits` do not reach.
fn beyond_reach(vm: &VmConfig, bits: u32) -> Option<String> {
    let reach = reach(bits);
    (end_of_addresses(vm) > reach).then(|| {
        format!(
            "{}, hotplug_memory_mib {} and hugetlb_memory_mib {} given; this CPU's addresses have {bits} bits, so \
             all and the room between them must end below {} MiB",
            vm.memory_mib,
            vm.hotplug_memory_mib,
            vm.hugetlb_memory_mib,
            reach >> 20
        )
    })
}

/// Whether windows for files lie where addresses of `bits` do not reach.
fn windows_beyond_reach(vm: &VmConfig, bits: u32) -> bool {
    let first = layout::windows(end_of_addresses(vm));
    let end = first.saturating_add((WINDOWS as u64).saturating_mul(vm.pmem_mib << 20));
    vm.pmem_mib > 0 && end > reach(bits)
}

fn end_of_addresses(vm: &VmConfig) -> u64 {
    layout::end_of_addresses(vm.memory_mib << 20, vm.hotplug_memory_mib << 20, vm.hugetlb_memory_mib << 20)
}

/// The first address that one of `bits` cannot be.
fn reach(bits: u32) -> u64 {
    1u64.checked_shl(bits).unwrap_or(u64::MAX)
}

fn first_repeated<T: Copy + Eq + Hash>(mut names: impl Iterator<Item = T>) -> Option<T> {
    let mut seen = HashSet::new();
    names.find(|name| !seen.insert(*name))
}

/// Takes over the descriptors of a network interface, each of which is its alone.
fn net_files(InheritedNet { net, taps, vhost }: &InheritedNet) -> Result<NetFiles, ConfigError> {
    let inherited = |fd: &RawFd| {
        process::inherited(*fd).map(File::from).map_err(|source| ConfigError::Value {
            field: "nets",
            problem: format!("slot {}: descriptor {fd} must be inherited and named once: {source}", net.slot),
        })
    };
    let inherited = |fds: &[RawFd]| fds.iter().map(inherited).collect::<Result<_, _>>();
    Ok(NetFiles { config: net.clone(), taps: inherited(taps)?, vhost: inherited(vhost)? })
}

fn open(field: &'static str, path: &Path) -> Result<File, ConfigError> {
    let opened = File::open(path).and_then(|file| {
        // A pipe or a device cannot be mapped, and reading one may never end.
        if file.metadata()?.is_file() { Ok(file) } else { Err(io::Error::other("it is not a regular file")) }
    });
    opened.map_err(|source| ConfigError::Open { field, path: path.to_owned(), source })
}

#[cfg(test)]
mod tests {
    use std::os::fd::AsRawFd;

    use super::*;

    fn text(change: impl FnOnce(&mut serde_json::Value)) -> String {
        let mut config = serde_json::json!({
            "id": "c1", "vcpus": 1, "memory_mib": 128, "kernel": "/proc/self/exe", "cmdline": "quiet",
        });
        change(&mut config);
        config.to_string()
    }

    fn load_text(text: &str) -> Result<CheckedConfig, ConfigError> {
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), text).unwrap();
        load(file.path())
    }

    fn error(text: &str) -> String {
        let e = load_text(text).unwrap_err();
        let cause = std::error::Error::source(&e).map(|s| format!(": {s}")).unwrap_or_default();
        format!("{e}{cause}")
    }

    #[test]
    fn minimal_configuration_is_enough() {
        let config = load_text(&text(|_| {})).unwrap();
        assert_eq!(config.vm.vcpus, 1);
        assert!(config.cmdline.ends_with(" quiet"));
    }

    #[test]
    fn more_vcpus_than_there_are_at_first_are_held_back() {
        let with = |vcpus: u8, max: u8| {
            text(|c| {
                c["vcpus"] = vcpus.into();
                c["max_vcpus"] = max.into();
            })
        };
        let config = load_text(&with(2, 4)).unwrap();
        assert!(config.cmdline.contains(" maxcpus=2 "), "{}", config.cmdline);
        for max in [0, 2] {
            let config = load_text(&with(2, max)).unwrap();
            assert_eq!((config.vm.max_vcpus, config.cmdline.contains("maxcpus")), (2, false));
        }
        assert_eq!(error(&with(4, 3)), "max_vcpus: 3 given; must be 4 (vcpus) to 255");
    }

    #[test]
    fn memory_ends_where_the_cpus_addresses_do() {
        let end = |boot: u64, more: u64, bits| {
            let config = text(|c| {
                c["memory_mib"] = boot.into();
                c["hotplug_memory_mib"] = more.into();
            });
            beyond_reach(&serde_json::from_str(&config).unwrap(), bits)
        };
        assert_eq!(end(1024, 0, 39), None);
        assert_eq!(end(1024, (512 << 10) - 4096, 39), None);
        assert!(end(1024, (512 << 10) - 4096 + 128, 39).unwrap().contains("39 bits"));
        assert!(end((512 << 10) - 1024, 0, 39).is_none(), "a GiB of addresses is the devices'");
        assert!(end(512 << 10, 0, 39).is_some());
        assert_eq!(end(512 << 10, 512 << 10, 46), None);
        assert_eq!(end(1, 1, 64), None);
    }

    #[test]
    fn windows_end_where_the_cpus_addresses_do() {
        let beyond = |boot: u64, window: u64, bits| {
            let config = text(|c| {
                c["memory_mib"] = boot.into();
                c["pmem_mib"] = window.into();
            });
            windows_beyond_reach(&serde_json::from_str(&config).unwrap(), bits)
        };
        assert!(!beyond(1024, 1024, 39));
        assert!(!beyond(1024, (508 << 10) / 4, 39));
        assert!(beyond(1024, (508 << 10) / 4 + 128, 39));
        assert!(beyond((511 << 10) - 128, 128, 39), "a machine without windows");
        assert!(!beyond((511 << 10) - 128, 0, 39));
    }

    #[test]
    fn every_error_names_its_field() {
        let with = |field: &str, value: serde_json::Value| error(&text(|c| c[field] = value));
        for (field, value, says) in [
            ("vcpus", 0.into(), "1 to 255"),
            ("vcpus", 1000.into(), "u8"),
            ("vcpus", "two".into(), "expected u8"),
            ("max_vcpus", 256.into(), "u8"),
            ("memory_mib", 16.into(), "32 to"),
            ("memory_mib", (-1).into(), "u64"),
            ("hotplug_memory_mib", 2.into(), "multiple of 128"),
            ("hotplug_memory_mib", (1 << 20).into(), "up to 1048448"),
            ("hotplug_memory_mib", u64::MAX.into(), "up to"),
            ("pmem_mib", 1.into(), "multiple of 128"),
            ("pmem_mib", u64::MAX.into(), "up to 1048576"),
            ("kernel", "/nonexistent".into(), "No such file"),
            ("kernel", "/dev/null".into(), "regular file"),
            ("initramfs", "/nonexistent".into(), "No such file"),
            ("cmdline", "a\nb".into(), "printable"),
            ("cmdline", "x".repeat(3000).into(), "3000 bytes"),
            ("control_socket", "x".repeat(108).into(), "at most 107"),
            ("id", "".into(), "control characters"),
        ] {
            let e = with(field, value);
            assert!(e.contains(&format!("{field}: ")) && e.contains(says), "{e}");
            assert!(!e.contains('\n'));
        }
        assert!(with("surprise", 1.into()).contains("unknown field `surprise`"));
        let share = serde_json::json!([{"tag": "a", "dir": "/"}, {"tag": "a", "dir": "/"}]);
        assert_eq!(with("shares", share), "shares: tag \"a\" is used twice");
        let share = serde_json::json!([{"tag": "a", "dir": 1}]);
        assert!(with("shares", share).contains("shares[0].dir: "));
        let net = |slot: u8, tap: i32| {
            serde_json::json!({
                "net": {"slot": slot, "mac": [2, 0, 0, 0, 0, 1], "queue_pairs": 1}, "taps": [tap],
            })
        };
        assert_eq!(with("nets", serde_json::json!([net(24, 0), net(24, 0)])), "nets: slot 24 is used twice");
        for fd in [-1, 0, 2, 1_000_000] {
            let refused = with("nets", serde_json::json!([net(24, fd)]));
            assert!(
                refused.starts_with(&format!("nets: slot 24: descriptor {fd} must be inherited")),
                "{refused}"
            );
        }
        // One of its own.
        let ours = File::open("/dev/null").unwrap();
        let refused = with("nets", serde_json::json!([net(24, ours.as_raw_fd())]));
        assert!(refused.contains("must be inherited"), "{refused}");
        assert!(error("{").contains("EOF"));
    }
}
