//! One run of `rvm-vmm`, from its exec to the agent's announcement.

use std::{
    io::{BufRead, BufReader, Write},
    os::{
        fd::{AsFd, AsRawFd, OwnedFd},
        unix::{
            net::{UnixListener, UnixStream},
            process::CommandExt,
        },
    },
    path::Path,
    process::Command,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail, ensure};
use nix::sched::{CloneFlags, unshare};
use rvm_protocol::{
    guest::{DEFAULT_CMDLINE, GUEST_CID, READY_PORT, VOLUMES_TAG},
    vmm::{JailConfig, Metrics, Request, Response, ShareConfig, VmConfig, VsockConfig},
};
use rvm_shim::{
    mount::Namespace,
    user_namespace::{IdMap, user_namespace},
};
use rvm_tests::{
    job::{Input, Job},
    scale,
    stage::Stage,
};
use serde_json::{Value, json};
use tempfile::TempDir;

use crate::{MEMORY_MIB, VCPUS, median, ready::Listener};

/// The monitor's last step before the guest runs.
pub const FIRST_RUN: &str = "first_run";

/// A running monitor in a directory of its own.
pub struct Monitor {
    /// Its directory.
    dir: TempDir,
    job: Job,
    listener: Listener,
    /// Just before it was spawned.
    started: Instant,
}

impl Monitor {
    /// Starts one with the devices the shim gives every sandbox.
    pub fn start(stage: &Stage) -> Result<Self> {
        Self::start_with(stage, &[], None)
    }

    /// The same, shut in as the shim's are.
    pub fn start_jailed(stage: &Stage) -> Result<Self> {
        Self::start_with(stage, &[], Some(&Jail::new()?))
    }

    fn start_with(stage: &Stage, options: &[&str], jail: Option<&Jail>) -> Result<Self> {
        let dir = tempfile::Builder::new().prefix("rvm-bench").tempdir()?;
        if jail.is_none() {
            std::fs::create_dir(dir.path().join("share"))?;
        }
        let config = VmConfig {
            id: "bench".into(),
            vcpus: VCPUS,
            max_vcpus: 0,
            memory_mib: MEMORY_MIB,
            hotplug_memory_mib: 0,
            hugetlb_memory_mib: 0,
            pmem_mib: 0,
            huge_pages: true,
            free_page_reporting: true,
            kernel: stage.kernel(),
            cmdline: DEFAULT_CMDLINE.into(),
            initramfs: Some(stage.initramfs()),
            console_log: Some("console.log".into()),
            control_socket: Some("vmm.sock".into()),
            vsock: Some(VsockConfig { guest_cid: GUEST_CID, socket: "vsock.sock".into() }),
            shares: vec![ShareConfig {
                tag: VOLUMES_TAG.into(),
                dir: "share".into(),
                readonly: false,
                cache: Default::default(),
            }],
            disks: Vec::new(),
            nets: Vec::new(),
            jail: jail.map(Jail::config),
        };
        std::fs::write(dir.path().join("vm.json"), serde_json::to_vec(&config)?)?;
        let listener = UnixListener::bind(dir.path().join(format!("vsock.sock_{READY_PORT}")))?;
        let mut command = Command::new(stage.monitor());
        command.args(["--config", "vm.json"]).args(options).current_dir(dir.path());
        let started = Instant::now();
        let now = nix::time::clock_gettime(nix::time::ClockId::CLOCK_BOOTTIME)?;
        command.env("RVM_EXEC_BOOTTIME_NS", Duration::from(now).as_nanos().to_string());
        let job = match jail {
            None => Job::start(command, Input::Nothing)?,
            Some(jail) => jail.start(command)?,
        };
        Ok(Self { dir, job, listener: Listener::Unix(listener), started })
    }

    /// Waits for the agent; milliseconds since the start.
    pub fn ready_ms(&self) -> Result<f64> {
        let result = self.listener.wait(scale::container());
        let ms = self.started.elapsed().as_secs_f64() * 1e3;
        result.with_context(|| format!("rvm: {}", console(self.dir.path())))?;
        Ok(ms)
    }

    /// Its process id.
    pub fn pid(&self) -> libc::pid_t {
        self.job.pid()
    }

    /// Its counters.
    pub fn metrics(&self) -> Result<Metrics> {
        metrics(&self.dir.path().join("vmm.sock"))
    }

    /// Ends it.
    pub fn stop(self) -> Result<()> {
        self.job.signal(nix::sys::signal::Signal::SIGKILL)?;
        self.job.finish(scale::command())?;
        Ok(())
    }
}

/// What a monitor is shut in.
struct Jail {
    mounts: Namespace,
    users: OwnedFd,
}

impl Jail {
    fn new() -> Result<Self> {
        let stage = tempfile::tempdir()?;
        let mounts = Namespace::create(stage.path(), Path::new("/share"), &["share"])?;
        Ok(Self { mounts, users: user_namespace(&IdMap::identity()?)? })
    }

    fn config(&self) -> JailConfig {
        JailConfig {
            mount_namespace: self.mounts.as_fd().as_raw_fd(),
            root: self.mounts.top().as_raw_fd(),
            user_namespace: Some(self.users.as_raw_fd()),
        }
    }

    /// Starts `command` as the first process of a pid namespace, with what is named in the configuration.
    fn start(&self, mut command: Command) -> Result<Job> {
        let JailConfig { mount_namespace, root, user_namespace } = self.config();
        let inherit = move || {
            for fd in [Some(mount_namespace), Some(root), user_namespace].into_iter().flatten() {
                // SAFETY: plain system call; 0 clears FD_CLOEXEC.
                if unsafe { nix::libc::fcntl(fd, nix::libc::F_SETFD, 0) } < 0 {
                    return Err(std::io::Error::last_os_error());
                }
            }
            Ok(())
        };
        // SAFETY: the closure makes system calls only.
        unsafe { command.pre_exec(inherit) };
        // For the child of one thread alone, which can start no more threads then.
        let spawn = |command: &mut Command| {
            std::thread::scope(|scope| {
                let spawn = || {
                    unshare(CloneFlags::CLONE_NEWPID)?;
                    command.spawn()
                };
                scope.spawn(spawn).join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
            })
        };
        Job::start_by(command, Input::Nothing, spawn)
    }
}

/// Asks a monitor for its counters.
pub fn metrics(socket: &Path) -> Result<Metrics> {
    let mut stream =
        UnixStream::connect(socket).with_context(|| format!("connecting to {}", socket.display()))?;
    let mut line = serde_json::to_vec(&Request::Metrics)?;
    line.push(b'\n');
    stream.write_all(&line)?;
    let mut answer = String::new();
    BufReader::new(stream).read_line(&mut answer)?;
    match serde_json::from_str(&answer).with_context(|| format!("the monitor answered {answer:?}"))? {
        Response::Metrics(metrics) => Ok(metrics),
        other => bail!("the monitor answered {other:?}"),
    }
}

/// The end of a guest's console, for messages.
pub fn console(dir: &Path) -> String {
    let text = std::fs::read(dir.join("console.log")).unwrap_or_default();
    let text = String::from_utf8_lossy(&text);
    let lines: Vec<&str> = text.lines().collect();
    format!("console ends with\n{}", lines[lines.len().saturating_sub(10)..].join("\n"))
}

/// Medians of when each step of the start was reached, in milliseconds since exec.
pub fn step_medians(runs: &[Metrics]) -> Vec<(String, f64)> {
    let Some(first) = runs.first() else { return Vec::new() };
    let at = |name: &str| -> Vec<f64> {
        let of =
            |metrics: &Metrics| metrics.start_us.iter().find(|(step, _)| step == name).map(|step| step.1);
        runs.iter().filter_map(of).map(|us| us as f64 / 1e3).collect()
    };
    first.start_us.iter().map(|(name, _)| (name.clone(), median(&at(name)))).collect()
}

/// Exec to first `KVM_RUN`, on any `/dev/kvm`: what runs afterwards is not waited for. In turn shut in and not.
pub fn first_run(stage: &Stage, runs: usize) -> Result<Value> {
    let (mut open, mut shut) = (Vec::new(), Vec::new());
    for _ in 0..runs {
        open.push(until_first_run(stage, None)?);
        shut.push(until_first_run(stage, Some(&Jail::new()?))?);
    }
    let [open, shut] = [open, shut].map(|all| step_medians(&all));
    let total = |steps: &[(String, f64)]| steps.iter().find(|(name, _)| name == FIRST_RUN).map(|step| step.1);
    let ratio = total(&shut).zip(total(&open)).map(|(shut, open)| shut / open);
    Ok(json!({
        "runs": runs,
        "ratios": { "rvm/rvm without its jail, to the first KVM_RUN": ratio },
        "first_kvm_run_ms": total(&open),
        "first_kvm_run_ms, shut in": total(&shut),
        "steps_ms": open,
        "steps_ms, shut in": shut,
    }))
}

fn until_first_run(stage: &Stage, jail: Option<&Jail>) -> Result<Metrics> {
    // A KVM that only interprets ring 0 is good enough to get there.
    let monitor = Monitor::start_with(stage, &["--any-kvm"], jail)?;
    let until = Instant::now() + scale::command();
    let metrics = loop {
        // The monitor notes its times itself: asking may be late, and must not disturb.
        std::thread::sleep(Duration::from_millis(20));
        let ended = monitor.job.has_ended() || Instant::now() > until;
        match monitor.metrics() {
            Ok(metrics) if metrics.start_us.iter().any(|(name, _)| name == FIRST_RUN) => break metrics,
            Err(error) if ended => return Err(error).with_context(|| monitor.job.stderr()),
            result => ensure!(!ended, "no first KVM_RUN: {result:?}"),
        }
    };
    monitor.stop()?;
    Ok(metrics)
}
