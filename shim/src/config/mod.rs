//! `/etc/rvm/config.toml`: which guest a sandbox gets and where things are.
//!
//! The file that is installed, `config.toml` beside this module, documents
//! every key and is also where the defaults come from: a user's file is laid
//! over it, and a key it does not have is unknown.

mod network;
mod table;
#[cfg(test)]
mod tests;

use std::{
    env, io,
    path::{Path, PathBuf},
    time::Duration,
};

use rvm_protocol::{guest::DEFAULT_CMDLINE, vmm::PMEM_STEP_MIB};

pub use network::{Network, Vhost};
use table::Table;

use crate::{rootless, sysctl};

/// The file that is installed: every key, its meaning and its default.
pub const DOCUMENTED: &str = include_str!("config.toml");
/// Where the configuration is looked for last.
pub const DEFAULT_PATH: &str = "/etc/rvm/config.toml";
/// Environment variable that names another file.
pub const PATH_VARIABLE: &str = "RVM_CONFIG";

/// Longest `guest.kernel_params`: with [`DEFAULT_CMDLINE`] and what the monitor
/// adds it has to stay below the 2048 bytes of x86's `COMMAND_LINE_SIZE`.
const MAX_KERNEL_PARAMS: usize = 1024;
/// Smallest guest a kernel and the agent come up in, in MiB.
const MIN_MEMORY_MIB: u64 = 64;
/// Smallest block device an ext4 with a journal of use fits on, in MiB.
const MIN_BLOCK_MIB: u64 = 64;
/// Size of a block device where none is configured, in MiB.
const DEFAULT_BLOCK_MIB: u64 = 10 << 10;
/// 16 TiB, far above what a host has and far below where sizes in bytes overflow.
const MAX_MIB: u64 = 16 << 20;
/// Largest image file as memory: a machine keeps four times as much of its addresses.
const MAX_MEMORY_IMAGE_MIB: u64 = 64 << 10;

/// What a sandbox is started with.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Config {
    /// The virtual machine.
    pub guest: Guest,
    /// Where writable layers live.
    pub scratch: Scratch,
    /// Where what a container writes goes, unless it says so itself.
    pub writes: Writes,
    /// Image files in place of layers.
    pub images: Images,
    /// How interfaces are carried into the machine.
    pub network: Network,
    /// Programs and directories of the host.
    pub host: Host,
    /// What is accepted from clients although it cannot be done.
    pub compat: Compat,
    /// What the shim logs.
    pub log_level: log::LevelFilter,
}

/// The virtual machine of a sandbox.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Guest {
    /// Uncompressed ELF kernel.
    pub kernel: PathBuf,
    /// Initial RAM file system with the agent.
    pub initramfs: PathBuf,
    /// Parameters after rvm's own; see [`Guest::cmdline`].
    pub kernel_params: String,
    /// Virtual CPUs, 1 to 255.
    pub vcpus: u8,
    /// Memory in MiB.
    pub memory_mib: u64,
    /// Whether the host may put pages of 2 MiB behind it.
    pub huge_pages: bool,
    /// Whether the host has back what the guest has freed.
    pub free_page_reporting: bool,
    /// Kernel parameters that are as on the host, see [`crate::sysctl`].
    pub host_sysctls: Vec<String>,
    /// From the start of the monitor until the agent has to answer.
    pub boot_timeout: Duration,
}

impl Guest {
    /// The kernel's command line: rvm's own parameters, then the user's.
    pub fn cmdline(&self) -> String {
        if self.kernel_params.is_empty() {
            return DEFAULT_CMDLINE.to_owned();
        }
        format!("{DEFAULT_CMDLINE} {}", self.kernel_params)
    }
}

/// Where containers' writable layers live.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Scratch {
    /// A tmpfs in the guest of at most this many bytes; 0 is half of its memory.
    Tmpfs {
        /// Size limit in bytes.
        size_bytes: u64,
    },
    /// An ext4 file system on a sparse file of the host.
    Block {
        /// Size of the file in bytes.
        size_bytes: u64,
    },
}

/// Image files in place of layers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Images {
    /// Whether containers have them, where they are there.
    pub enabled: bool,
    /// Whether new ones are made.
    pub make: bool,
    /// The largest that is made.
    pub size_limit_bytes: u64,
    /// What is left free on the disk they are on.
    pub free_bytes: u64,
    /// The largest that guests have as memory.
    pub memory_limit_bytes: u64,
}

impl Images {
    /// How much of its addresses a machine keeps for each that it has as memory, in MiB; 0 for none.
    pub fn window_mib(&self) -> u64 {
        let limit = if self.enabled { self.memory_limit_bytes >> 20 } else { 0 };
        limit.next_multiple_of(PMEM_STEP_MIB)
    }
}

/// Where what a container writes to its root file system goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Writes {
    /// To the scratch.
    Guest,
    /// To the client's own snapshot or directory.
    Host,
    /// To the guest's memory.
    Memory,
}

impl Writes {
    /// Their names, in configurations and annotations.
    pub const NAMES: [&str; 3] = ["guest", "host", "memory"];

    /// The one of that name.
    pub fn named(name: &str) -> Option<Self> {
        Some(match name {
            "guest" => Self::Guest,
            "host" => Self::Host,
            "memory" => Self::Memory,
            _ => return None,
        })
    }
}

/// Programs and directories of the host.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Host {
    /// `rvm-vmm`.
    pub monitor: PathBuf,
    /// Directory below which each sandbox has its own, `NAMESPACE/ID`.
    pub state_dir: PathBuf,
    /// Directory of what can be made again.
    pub cache_dir: PathBuf,
    /// Whether a monitor has ids of its own where it can ([`crate::ids`]).
    pub own_ids: bool,
}

/// What is accepted from clients although it cannot be done.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Compat {
    /// AppArmor profiles and SELinux labels have no effect instead of being
    /// refused.
    pub ignore_labels: bool,
}

/// Why there is no configuration.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// The file that was asked for cannot be read.
    #[error("{}: {source}", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// Why not.
        #[source]
        source: io::Error,
    },
    /// Not TOML.
    #[error("{file}:{line}:{column}: {message}")]
    Syntax {
        /// The file.
        file: String,
        /// From 1.
        line: usize,
        /// From 1.
        column: usize,
        /// What the parser says.
        message: String,
    },
    /// A key nobody reads, most likely misspelt.
    #[error("{file}: {key}: unknown; {known}")]
    UnknownKey {
        /// The file.
        file: String,
        /// With its section.
        key: String,
        /// What there is.
        known: String,
    },
    /// A value that cannot be used.
    #[error("{file}: {key} = {value}: {expected}")]
    WrongValue {
        /// The file.
        file: String,
        /// With its section.
        key: String,
        /// As given.
        value: String,
        /// What would be right.
        expected: String,
    },
}

impl Config {
    /// The configuration in effect: of the file `explicit` if there is one,
    /// else of the one `RVM_CONFIG` names, else of [`DEFAULT_PATH`] where that
    /// exists, else the defaults.
    pub fn load(explicit: Option<&Path>) -> Result<Self, ConfigError> {
        match Self::locate(explicit) {
            Some(path) => Self::read(&path),
            None => Self::defaults(),
        }
    }

    /// The usual configuration with `text` laid over it; `name` stands for the
    /// text in errors.
    pub fn load_with(text: &str, name: &str) -> Result<Self, ConfigError> {
        let table = match Self::locate(None) {
            Some(path) => Table::parse(&read(&path)?, &path.display().to_string())?,
            None => Table::parse("", "the defaults")?,
        };
        Self::of(&table.with(&without_type(text), name)?)
    }

    /// The file [`Config::load`] reads, if any.
    pub fn locate(explicit: Option<&Path>) -> Option<PathBuf> {
        locate(explicit, env::var_os(PATH_VARIABLE).map(PathBuf::from), Path::new(DEFAULT_PATH))
    }

    /// The configuration in one file.
    pub fn read(path: &Path) -> Result<Self, ConfigError> {
        Self::parse(&read(path)?, &path.display().to_string())
    }

    /// What holds where no file says otherwise.
    pub fn defaults() -> Result<Self, ConfigError> {
        Self::parse("", "the defaults")
    }

    /// The configuration in `text`; `file` names it in errors.
    pub fn parse(text: &str, file: &str) -> Result<Self, ConfigError> {
        Self::of(&Table::parse(text, file)?)
    }

    fn of(table: &Table) -> Result<Self, ConfigError> {
        Ok(Self {
            guest: Guest {
                kernel: table.path("guest", "kernel")?,
                initramfs: table.path("guest", "initramfs")?,
                kernel_params: kernel_params(table)?,
                vcpus: table.integer("guest", "vcpus", 1, 255)? as u8,
                memory_mib: table.integer("guest", "memory_mib", MIN_MEMORY_MIB, MAX_MIB)?,
                huge_pages: table.boolean("guest", "huge_pages")?,
                free_page_reporting: table.boolean("guest", "free_page_reporting")?,
                host_sysctls: host_sysctls(table)?,
                boot_timeout: Duration::from_secs(table.integer("guest", "boot_timeout_s", 1, 3600)?),
            },
            scratch: scratch(table)?,
            writes: writes(table)?,
            images: images(table)?,
            network: Network::of(table)?,
            host: Host {
                monitor: table.path("host", "monitor")?,
                state_dir: own_dir(table, "state_dir", rootless::runtime_dir)?,
                cache_dir: own_dir(table, "cache_dir", rootless::cache_dir)?,
                own_ids: table.boolean("host", "own_ids")?,
            },
            compat: Compat { ignore_labels: table.boolean("compat", "ignore_labels")? },
            log_level: log_level(table)?,
        })
    }
}

/// A directory of the host's root, in whose place a user has one of its own unless the configuration names another.
fn own_dir(
    table: &Table,
    key: &str,
    users: impl FnOnce() -> Option<PathBuf>,
) -> Result<PathBuf, ConfigError> {
    let dir = table.path("host", key)?;
    let is_hosts = rootless::is_rootless() && table.is_documented("host", key);
    Ok(if is_hosts { users().unwrap_or(dir) } else { dir })
}

fn read(path: &Path) -> Result<String, ConfigError> {
    std::fs::read_to_string(path).map_err(|source| ConfigError::Read { path: path.to_owned(), source })
}

/// containerd's own key, which stands beside a runtime's in its configuration,
/// before the first section.
fn without_type(text: &str) -> String {
    let mut in_section = false;
    let kept = |line: &&str| {
        let line = line.trim_start();
        in_section |= line.starts_with('[');
        let key = line.strip_prefix("TypeUrl").map(str::trim_start);
        in_section || !key.is_some_and(|rest| rest.starts_with('='))
    };
    text.lines().filter(kept).map(|line| format!("{line}\n")).collect()
}

fn locate(explicit: Option<&Path>, variable: Option<PathBuf>, default: &Path) -> Option<PathBuf> {
    explicit
        .map(Path::to_owned)
        .or_else(|| variable.filter(|path| !path.as_os_str().is_empty()))
        .or_else(|| default.exists().then(|| default.to_owned()))
}

/// Parameters that would break the command line around them are refused here
/// rather than by a guest that does not come up.
fn kernel_params(table: &Table) -> Result<String, ConfigError> {
    let refuse = |expected: String| table.wrong("guest", "kernel_params", expected);
    let params = table.string("guest", "kernel_params")?.trim();
    if params.len() > MAX_KERNEL_PARAMS {
        return Err(refuse(format!("must not be longer than {MAX_KERNEL_PARAMS} bytes")));
    }
    if !params.bytes().all(|byte| byte == b' ' || byte.is_ascii_graphic()) {
        return Err(refuse("must be printable ASCII in one line".into()));
    }
    if params.bytes().filter(|byte| *byte == b'"').count() % 2 != 0 {
        return Err(refuse("must close every quotation mark".into()));
    }
    if params.split(' ').any(|param| param == "--") {
        return Err(refuse("must not contain \"--\": what follows it is not a kernel parameter".into()));
    }
    Ok(params.to_owned())
}

fn host_sysctls(table: &Table) -> Result<Vec<String>, ConfigError> {
    let names = table.strings("guest", "host_sysctls")?;
    match names.iter().find(|name| !sysctl::is_name(name)) {
        None => Ok(names),
        Some(name) => {
            let expected =
                format!("must be names of kernel parameters, like \"vm.max_map_count\"; {name:?} is none");
            Err(table.wrong("guest", "host_sysctls", expected))
        }
    }
}

fn scratch(table: &Table) -> Result<Scratch, ConfigError> {
    let backing = table.one_of("scratch", "backing", &["tmpfs", "block"])?;
    let size_mib = table.integer("scratch", "size_mib", 0, MAX_MIB)?;
    if backing == "tmpfs" {
        return Ok(Scratch::Tmpfs { size_bytes: size_mib << 20 });
    }
    let size_mib = if size_mib == 0 { DEFAULT_BLOCK_MIB } else { size_mib };
    if size_mib < MIN_BLOCK_MIB {
        let expected = format!("must be 0 or {MIN_BLOCK_MIB} to {MAX_MIB} with backing = \"block\"");
        return Err(table.wrong("scratch", "size_mib", expected));
    }
    Ok(Scratch::Block { size_bytes: size_mib << 20 })
}

fn writes(table: &Table) -> Result<Writes, ConfigError> {
    let name = table.one_of("scratch", "writes", &Writes::NAMES)?;
    Writes::named(name).ok_or_else(|| {
        table.wrong("scratch", "writes", format!("must be one of {}", Writes::NAMES.join(", ")))
    })
}

fn images(table: &Table) -> Result<Images, ConfigError> {
    let enabled = table.boolean("images", "enabled")?;
    Ok(Images {
        enabled,
        make: enabled && table.boolean("images", "make")?,
        size_limit_bytes: table.integer("images", "size_limit_mib", 1, MAX_MIB)? << 20,
        free_bytes: table.integer("images", "free_mib", 0, MAX_MIB)? << 20,
        memory_limit_bytes: table.integer("images", "memory_limit_mib", 0, MAX_MEMORY_IMAGE_MIB)? << 20,
    })
}

fn log_level(table: &Table) -> Result<log::LevelFilter, ConfigError> {
    let names = ["off", "error", "warn", "info", "debug", "trace"];
    let name = table.one_of("log", "level", &names)?;
    name.parse().map_err(|_| table.wrong("log", "level", format!("must be one of {}", names.join(", "))))
}
