//! What demo, tests and bench have in common: an installation of their own, the
//! image, and a program of `tests/` that runs where KVM can run a kernel.

use std::ffi::OsString;
use std::fs::File;
use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use anyhow::{Context, Result};

use crate::build::{self, Profile};
use crate::devhost::{self, Devhost};
use crate::host::Host;
use crate::install;
use crate::packages::{self, Purpose};

/// Emulated processors. With two, QEMU 7.2 now and then (one start in twenty)
/// leaves one of them in a nested guest for ever ("soft lockup"); see
/// docs/decisions/0803.
pub const CPUS: u32 = 1;

/// [`Prepared::limit`] of those that say nothing else.
const LIMIT: Duration = Duration::from_secs(50 * 60);

/// Ready to run.
pub struct Prepared {
    /// Where containers can run.
    pub host: Host,
    /// How the devhost has its cgroups.
    pub cgroups: devhost::Cgroups,
    /// Whether the devhost has AppArmor.
    pub apparmor: bool,
    /// Processors of the devhost.
    pub cpus: u32,
    /// Memory of the devhost in MiB.
    pub memory_mib: u32,
    /// Where the devhost writes what is executed: [`devhost::Options::trace`].
    pub trace: Option<PathBuf>,
    /// How long a program may take in the devhost; a person at a terminal may take longer.
    pub limit: Duration,
    prefix: PathBuf,
    env: Vec<(OsString, OsString)>,
}

/// Where KVM can run a kernel: a program at a time.
pub enum Place<'a> {
    /// This machine.
    Here(&'a Prepared),
    /// A devhost of its own.
    Devhost(&'a Prepared, Box<Devhost>),
}

/// Where a program's streams go.
pub enum Output<'a> {
    /// To this process's own.
    Inherit,
    /// To its terminal, which becomes the program's.
    Terminal,
    /// Line by line to the callback, both streams.
    Lines(&'a mut dyn FnMut(&str)),
}

impl Prepared {
    /// Installs missing packages, builds everything, stages it.
    pub fn new(profile: Profile) -> Result<Self> {
        let host = Host::detect();
        let mut purposes = vec![Purpose::Build, Purpose::GuestKernel, Purpose::Containers];
        if host != Host::Hardware {
            purposes.push(Purpose::Devhost);
        }
        packages::ensure(&purposes)?;
        let stages = build::target_dir().join("rvm").join("stage");
        let dir = stages.join(profile.as_str());
        std::fs::create_dir_all(&dir).with_context(|| format!("create {}", dir.display()))?;
        // Another run of the same target directory puts the same files in place.
        let lock = File::create(stages.join("lock"))?;
        lock.lock().context("lock the stage")?;
        let prefix = install::stage(&dir, profile)?;
        drop(lock);
        let image = build::busybox_image()?;
        // The names are those of tests/src/stage.rs.
        let env = vec![
            ("RVM_STAGE".into(), prefix.clone().into_os_string()),
            ("RVM_TEST_IMAGE".into(), image.into_os_string()),
        ];
        let options = devhost::Options::default();
        Ok(Self {
            host,
            cgroups: options.cgroups,
            apparmor: false,
            cpus: CPUS,
            memory_mib: options.memory_mib,
            trace: None,
            limit: LIMIT,
            prefix,
            env,
        })
    }

    /// The monitor that is run.
    pub fn monitor(&self) -> PathBuf {
        self.prefix.join("libexec/rvm/rvm-vmm")
    }

    /// Sets an environment variable of every program.
    pub fn set(&mut self, name: &str, value: impl Into<OsString>) {
        self.env.push((name.into(), value.into()));
    }

    /// Has the containerd and the CNI plugins of a Debian release run there, instead of the machine's own.
    pub fn set_containerd(&mut self, release: &str) -> Result<()> {
        let cache = build::debian_cache_dir()?;
        let fetch = |package| rootfs_builder::debian::fetch_from(release, package, &cache);
        self.set("RVM_CONTAINERD_DIR", fetch("containerd")?.join("usr/bin"));
        self.set("RVM_CNI_DIR", fetch("containernetworking-plugins")?.join("usr/lib/cni"));
        Ok(())
    }

    /// Runs a program as root where KVM can run a kernel: here or in the
    /// devhost. Returns its exit code.
    pub fn run_with_kvm(&self, program: &Path, arguments: &[String], output: Output<'_>) -> Result<i32> {
        let limit = (!matches!(output, Output::Terminal)).then_some(self.limit);
        self.place(limit)?.run(program, arguments, output)
    }

    /// Where KVM can run a kernel, for programs that take no longer than `limit` in the devhost.
    pub fn place(&self, limit: Option<Duration>) -> Result<Place<'_>> {
        if self.host == Host::Hardware {
            return Ok(Place::Here(self));
        }
        let options = devhost::Options {
            cpus: self.cpus,
            timeout: limit,
            cgroups: self.cgroups,
            apparmor: self.apparmor,
            memory_mib: self.memory_mib,
            trace: self.trace.clone(),
            ..devhost::Options::default()
        };
        Ok(Place::Devhost(self, Box::new(Devhost::new(options)?)))
    }

    /// Runs a program as root on this machine. Returns its exit code.
    pub fn run_here(&self, program: &Path, arguments: &[String], output: Output<'_>) -> Result<i32> {
        let mut command = if nix::unistd::geteuid().is_root() {
            let mut command = Command::new(program);
            command.envs(self.env.iter().map(|(name, value)| (name, value)));
            command
        } else {
            let mut command = Command::new("sudo");
            command.arg("env");
            for (name, value) in &self.env {
                let mut assignment = name.clone();
                assignment.push("=");
                assignment.push(value);
                command.arg(assignment);
            }
            command.arg(program);
            command
        };
        command.args(arguments).env("PATH", packages::path_with_sbin());
        let failed = || format!("run {}", program.display());
        let status = match output {
            Output::Inherit | Output::Terminal => command.status().with_context(failed)?,
            Output::Lines(callback) => lines(command, callback).with_context(failed)?,
        };
        Ok(status.code().unwrap_or(1))
    }
}

impl Place<'_> {
    /// Runs a program as root. Returns its exit code.
    pub fn run(&self, program: &Path, arguments: &[String], output: Output<'_>) -> Result<i32> {
        let (prepared, devhost) = match self {
            Self::Here(prepared) => return prepared.run_here(program, arguments, output),
            Self::Devhost(prepared, devhost) => (prepared, devhost),
        };
        let argv = std::iter::once(program.into()).chain(arguments.iter().map(OsString::from));
        let mut command = devhost::Command::new::<OsString>(argv);
        for (name, value) in &prepared.env {
            command = command.env(name, value);
        }
        match output {
            Output::Inherit => devhost.run(&command, devhost::Stdio::Inherit),
            Output::Terminal => devhost.run(&command, devhost::Stdio::Terminal),
            Output::Lines(callback) => {
                devhost.run(&command, devhost::Stdio::Lines(&mut |_, line| callback(line)))
            }
        }
    }
}

/// Runs a command, both of its streams line by line to the callback.
pub fn lines(mut command: Command, callback: &mut dyn FnMut(&str)) -> Result<std::process::ExitStatus> {
    let (reader, writer) = std::io::pipe()?;
    command.stdin(Stdio::null()).stdout(writer.try_clone()?).stderr(writer);
    let mut child = command.spawn()?;
    // The command's copies of the pipe's end would keep it open.
    drop(command);
    for line in BufReader::new(reader).split(b'\n') {
        callback(&String::from_utf8_lossy(&line?));
    }
    Ok(child.wait()?)
}

/// A program of `tests/`, built.
pub fn program(name: &str, profile: Profile) -> Result<PathBuf> {
    build::cargo_build("Compiling the programs of tests/", profile, &["rvm-tests"], |_| {})?;
    Ok(build::target_dir().join(profile.as_str()).join(name))
}
