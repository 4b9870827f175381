//! One run of QEMU's `microvm` machine under KVM.
//!
//! What QEMU's documentation recommends for the smallest and fastest microvm:
//! no legacy timers, interrupt controller or clock, no option ROMs. Without ACPI
//! it names its virtio-mmio devices on the kernel's command line.

use std::{path::Path, process::Command, time::Instant};

use anyhow::{Context, Result};
use rvm_protocol::guest::DEFAULT_CMDLINE;
use rvm_tests::{
    job::{Input, Job},
    scale,
};
use tempfile::TempDir;

use crate::{MEMORY_MIB, VCPUS, monitor::console, ready::Listener};

/// The machine; what is not switched off here is what a Linux guest needs.
pub const MACHINE: &str = "microvm,accel=kvm,acpi=off,x-option-roms=off,pit=off,pic=off,rtc=off";
/// Context id of the guest. vhost-vsock's are the host's, unlike rvm's.
const CID: u32 = 29_302;
/// What a trial kernel is told: a quiet console, and the way out of a panic.
const TRIAL_CMDLINE: &str = "console=ttyS0 quiet reboot=k panic=-1";
/// What the peer's `/init` prints.
pub const INIT_LINE: &str = "init-is-running";

/// How the guest says that it is there.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Announcement {
    /// rvm's agent connects to port 1025 of the host.
    Vsock,
    /// `/init` prints [`INIT_LINE`] on the serial console.
    Console,
}

/// A running QEMU.
pub struct Peer {
    dir: TempDir,
    job: Job,
    listener: Option<Listener>,
    started: Instant,
}

impl Peer {
    /// Starts one.
    pub fn start(kernel: &Path, initramfs: &Path, announcement: Announcement) -> Result<Self> {
        let dir = tempfile::Builder::new().prefix("rvm-bench").tempdir()?;
        let listener = match announcement {
            Announcement::Vsock => Some(Listener::vsock()?),
            Announcement::Console => None,
        };
        let (serial, cmdline) = match announcement {
            Announcement::Vsock => ("file:console.log", DEFAULT_CMDLINE),
            Announcement::Console => ("stdio", TRIAL_CMDLINE),
        };
        let mut command = Command::new("qemu-system-x86_64");
        command.current_dir(dir.path()).args(["-M", MACHINE, "-cpu", "host"]);
        command.args(["-nodefaults", "-no-user-config", "-display", "none", "-no-reboot", "-serial", serial]);
        command.args(["-m", &format!("{MEMORY_MIB}M"), "-smp", &VCPUS.to_string()]);
        command.arg("-kernel").arg(kernel).arg("-initrd").arg(initramfs).args(["-append", cmdline]);
        if announcement == Announcement::Vsock {
            // A vsock is a virtio 1 device.
            command.args(["-global", "virtio-mmio.force-legacy=false"]);
            command.args(["-device", &format!("vhost-vsock-device,guest-cid={CID}")]);
        }
        let started = Instant::now();
        let job = Job::start(command, Input::Nothing)?;
        Ok(Self { dir, job, listener, started })
    }

    /// Waits for the guest; milliseconds since the start.
    pub fn ready_ms(&self) -> Result<f64> {
        let result = match &self.listener {
            Some(listener) => listener.wait(scale::container()),
            None => self.job.wait_for(INIT_LINE, scale::container()),
        };
        let ms = self.started.elapsed().as_secs_f64() * 1e3;
        result.with_context(|| format!("QEMU: {}; {}", self.job.stderr(), console(self.dir.path())))?;
        Ok(ms)
    }

    /// Its process id.
    pub fn pid(&self) -> libc::pid_t {
        self.job.pid()
    }

    /// Ends it.
    pub fn stop(self) -> Result<()> {
        self.job.signal(nix::sys::signal::Signal::SIGKILL)?;
        self.job.finish(scale::command())?;
        Ok(())
    }
}

/// QEMU's version line.
pub fn version() -> Result<String> {
    let mut command = Command::new("qemu-system-x86_64");
    command.arg("--version");
    let text = rvm_tests::job::run(command, Input::Nothing, scale::command())?.success()?.text();
    Ok(text.lines().next().unwrap_or_default().to_owned())
}
