//! `cargo xtask devhost`: a software-emulated machine that has KVM.
//!
//! QEMU without hardware acceleration emulates an AMD processor with SVM;
//! Debian's kernel in it has a real `kvm_amd`. Its root is this machine's own,
//! read-only, with changes kept in memory; one command runs in it per boot.

mod image;
mod kernel;
mod machine;
mod qemu;
mod terminal;
mod vmlinux;

use std::ffi::OsString;
use std::fs::{self, File};
use std::io::IsTerminal;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result, bail};

use crate::build;
use crate::packages::{self, Purpose};

/// Arguments of `cargo xtask devhost`.
#[derive(clap::Args)]
pub struct Args {
    /// Give the command a terminal; without a command, an interactive shell.
    #[arg(long)]
    shell: bool,
    /// Memory in MiB.
    #[arg(long, default_value_t = Options::default().memory_mib)]
    memory: u32,
    /// Emulated processors.
    #[arg(long, default_value_t = Options::default().cpus)]
    cpus: u32,
    /// End the machine after this many seconds.
    #[arg(long)]
    timeout: Option<u64>,
    /// How cgroups are mounted.
    #[arg(long, value_enum, default_value_t)]
    cgroups: Cgroups,
    /// Let time go by instructions executed, one a nanosecond, whatever else this machine does. The
    /// devhost has one processor then.
    #[arg(long)]
    instructions: bool,
    /// Enable AppArmor, as Debian and Ubuntu do.
    #[arg(long)]
    apparmor: bool,
    /// The command, run with this directory and this environment's PATH, CARGO*, RUST* and RVM_*.
    #[arg(trailing_var_arg = true, allow_hyphen_values = true, required_unless_present = "shell")]
    command: Vec<OsString>,
}

/// Runs `cargo xtask devhost`. Exits with the command's exit code.
pub fn run(args: Args) -> Result<()> {
    let devhost = Devhost::new(Options {
        memory_mib: args.memory,
        cpus: if args.instructions { 1 } else { args.cpus },
        instructions: args.instructions,
        timeout: args.timeout.map(Duration::from_secs),
        cgroups: args.cgroups,
        apparmor: args.apparmor,
        ..Options::default()
    })?;
    let argv = if args.command.is_empty() { vec!["/bin/bash".into(), "-i".into()] } else { args.command };
    let stdio = if args.shell { Stdio::Terminal } else { Stdio::Inherit };
    let code = devhost.run(&Command::new(argv), stdio)?;
    std::process::exit(code)
}

/// What the machine is made of.
#[derive(Clone, Debug)]
pub struct Options {
    /// Memory in MiB. The root's changes, `/tmp` and `/run` live in it as well.
    pub memory_mib: u32,
    /// Emulated processors.
    pub cpus: u32,
    /// How long the command may take.
    pub timeout: Option<Duration>,
    /// Directories of this machine to show in the guest although they lie
    /// below `/tmp` or `/run`, which are otherwise fresh. The
    /// checkout, the target directory and the cache always are.
    pub visible: Vec<PathBuf>,
    /// How cgroups are mounted.
    pub cgroups: Cgroups,
    /// Whether time goes by instructions executed, not by this machine's clock.
    pub instructions: bool,
    /// Where to write what is executed at a kernel's addresses, as QEMU translates it.
    pub trace: Option<PathBuf>,
    /// Whether its kernel has AppArmor, for whose profiles clients then run a parser that is slow here.
    pub apparmor: bool,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            memory_mib: 4096,
            cpus: 2,
            timeout: None,
            visible: Vec::new(),
            cgroups: Cgroups::V2,
            instructions: false,
            trace: None,
            apparmor: false,
        }
    }
}

/// How a host has its cgroups, as systemd names it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, clap::ValueEnum)]
pub enum Cgroups {
    /// One hierarchy at `/sys/fs/cgroup`.
    #[default]
    V2,
    /// One hierarchy per controller, and one of v2 without any.
    Hybrid,
    /// One hierarchy per controller.
    V1,
}

impl Cgroups {
    /// As on the command line.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::V2 => "v2",
            Self::Hybrid => "hybrid",
            Self::V1 => "v1",
        }
    }
}

/// A command for the guest.
#[derive(Clone, Debug)]
pub struct Command {
    argv: Vec<OsString>,
    env: Vec<(OsString, OsString)>,
    dir: PathBuf,
}

impl Command {
    /// `argv` in this process's directory, with this process's `PATH`, `HOME`,
    /// `LANG`, `TERM`, `CARGO*`, `RUST*` and `RVM_*`.
    pub fn new<S: Into<OsString>>(argv: impl IntoIterator<Item = S>) -> Self {
        let passed = |name: &str| {
            matches!(name, "PATH" | "HOME" | "LANG" | "TERM")
                || ["CARGO", "RUST", "RVM_"].iter().any(|prefix| name.starts_with(prefix))
        };
        Self {
            argv: argv.into_iter().map(Into::into).collect(),
            env: std::env::vars_os().filter(|(name, _)| name.to_str().is_some_and(passed)).collect(),
            dir: std::env::current_dir().unwrap_or_else(|_| "/".into()),
        }
    }

    /// Sets an environment variable.
    pub fn env(mut self, name: impl Into<OsString>, value: impl Into<OsString>) -> Self {
        self.env.push((name.into(), value.into()));
        self
    }
}

/// An output stream of the command.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stream {
    /// Its standard output.
    Stdout,
    /// Its standard error.
    Stderr,
}

/// Where the command's streams go.
pub enum Stdio<'a> {
    /// To and from this process's own.
    Inherit,
    /// Output line by line (without newline) to the callback; no input.
    Lines(&'a mut dyn FnMut(Stream, &str)),
    /// This process's terminal becomes the command's.
    Terminal,
}

/// Environment variable set inside: which QEMU it runs in.
pub const ENV_DEVHOST: &str = "RVM_DEVHOST";
/// Environment variable set inside: by what to multiply time limits.
pub const ENV_TIME_SCALE: &str = "RVM_TIME_SCALE";
/// Environment variable set inside: a writable directory, see [`Devhost::out_dir`].
pub const ENV_OUT: &str = "RVM_OUT";
/// How much slower than hardware the devhost is taken to be.
const TIME_SCALE: u32 = 20;
/// Where the guest sees [`Devhost::out_dir`].
const GUEST_OUT: &str = "/run/devhost/out";

/// The machine, prepared to boot.
pub struct Devhost {
    options: Options,
    qemu: qemu::Qemu,
    kernel: PathBuf,
    modules: PathBuf,
    initramfs: PathBuf,
    slot: Slot,
}

/// A directory below the target directory for the files of one machine, which
/// no other one uses as long as this lives: several machines run side by side.
struct Slot {
    dir: PathBuf,
    _lock: File,
}

/// Machines of one target directory that may run at the same time: a bound for
/// what is left behind in it, not for the machine.
const SLOTS: u32 = 16;

impl Slot {
    /// The first that is free below `dir`.
    fn take(dir: &Path) -> Result<Self> {
        for number in 0..SLOTS {
            let dir = dir.join(number.to_string());
            fs::create_dir_all(dir.join("out")).with_context(|| format!("create {}", dir.display()))?;
            let lock = File::create(dir.join("lock"))?;
            if lock.try_lock().is_ok() {
                return Ok(Self { dir, _lock: lock });
            }
        }
        bail!("{SLOTS} devhosts run with this target directory ({})", dir.display())
    }
}

impl Devhost {
    /// Fetches and builds what the machine needs; quick when it is cached.
    pub fn new(options: Options) -> Result<Self> {
        packages::ensure(&[Purpose::Devhost])?;
        let slot = Slot::take(&build::target_dir().join("devhost"))?;
        let packages = build::debian_cache_dir()?;
        let qemu = qemu::Qemu::find(&packages)?;
        let kernel = kernel::Kernel::fetch(&packages)?;
        let cache = build::cache_dir()?.join("devhost");
        let initramfs = image::initramfs(&kernel, &cache)?;
        let vmlinux = kernel.vmlinux(&cache)?;
        Ok(Self { options, qemu, kernel: vmlinux, modules: kernel.modules, initramfs, slot })
    }

    /// A directory the command can write to, as `$RVM_OUT`; it is kept.
    pub fn out_dir(&self) -> PathBuf {
        self.slot.dir.join("out")
    }

    /// Boots, runs one command, powers off. Returns its exit code as a shell
    /// would give it.
    ///
    /// Fails, with the end of the machine's console, when the machine does not
    /// get to the command, or dies under it.
    pub fn run(&self, command: &Command, stdio: Stdio<'_>) -> Result<i32> {
        let run = image::RunFiles {
            command: self.script(command),
            visible: self.visible()?,
            terminal: matches!(stdio, Stdio::Terminal),
            cgroups: self.options.cgroups,
            modules: self.modules.clone(),
        };
        if run.terminal && !std::io::stdin().is_terminal() {
            bail!("a terminal was asked for, but standard input is none");
        }
        let initrd = self.slot.dir.join("initrd.cpio");
        run.append_to(&self.initramfs, &initrd)?;
        machine::Machine {
            options: &self.options,
            qemu: &self.qemu,
            kernel: &self.kernel,
            initrd: &initrd,
            out: &self.out_dir(),
            console: &self.slot.dir.join("console.log"),
        }
        .run(stdio)
    }

    fn visible(&self) -> Result<Vec<PathBuf>> {
        let mut visible = vec![build::workspace_dir(), build::target_dir(), build::cache_dir()?];
        visible.extend(self.options.visible.iter().cloned());
        Ok(visible)
    }

    /// The command as a shell script.
    fn script(&self, command: &Command) -> Vec<u8> {
        let mut script = Vec::new();
        let own = [
            (ENV_DEVHOST, format!("QEMU {}", self.qemu.version)),
            (ENV_TIME_SCALE, TIME_SCALE.to_string()),
            (ENV_OUT, GUEST_OUT.to_owned()),
        ];
        let own = own.map(|(name, value)| (name.into(), value.into()));
        for (name, value) in own.iter().chain(&command.env) {
            script.extend_from_slice(b"export ");
            script.extend_from_slice(name.as_encoded_bytes());
            script.push(b'=');
            quote(&mut script, value.as_encoded_bytes());
            script.push(b'\n');
        }
        script.extend_from_slice(b"cd ");
        quote(&mut script, command.dir.as_os_str().as_encoded_bytes());
        script.extend_from_slice(b" || exit 125\nexec");
        for argument in &command.argv {
            script.push(b' ');
            quote(&mut script, argument.as_encoded_bytes());
        }
        script.push(b'\n');
        script
    }
}

/// Appends `word` in single quotes.
fn quote(script: &mut Vec<u8>, word: &[u8]) {
    script.push(b'\'');
    for &byte in word {
        if byte == b'\'' {
            script.extend_from_slice(b"'\\''");
        } else {
            script.push(byte);
        }
    }
    script.push(b'\'');
}

/// The last lines of a file, for an error message.
fn tail(path: &Path, lines: usize) -> String {
    let text = fs::read(path).unwrap_or_default();
    let text = String::from_utf8_lossy(&text);
    let all: Vec<&str> = text.lines().collect();
    all[all.len().saturating_sub(lines)..].join("\n")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn machines_side_by_side_have_directories_of_their_own() {
        let dir = std::env::temp_dir().join(format!("rvm-slots-{}", std::process::id()));
        let first = Slot::take(&dir).unwrap();
        let second = Slot::take(&dir).unwrap();
        assert_ne!(first.dir, second.dir);
        let freed = first.dir.clone();
        drop(first);
        // A program that another test starts has the lock's descriptor until it is executed.
        while Slot::take(&dir).unwrap().dir != freed {
            std::thread::yield_now();
        }
        fs::remove_dir_all(dir).unwrap();
    }

    #[test]
    fn quoting_survives_a_shell() {
        let words = ["", "plain", "two words", "it's", "$HOME `x` \"y\" \\", "line\nbreak", "''"];
        let mut script = b"printf '%s\\0'".to_vec();
        for word in words {
            script.push(b' ');
            quote(&mut script, word.as_bytes());
        }
        let output = std::process::Command::new("sh")
            .arg("-c")
            .arg(String::from_utf8(script).unwrap())
            .output()
            .unwrap();
        let expected: String = words.iter().map(|word| format!("{word}\0")).collect();
        assert_eq!(String::from_utf8(output.stdout).unwrap(), expected);
    }
}
