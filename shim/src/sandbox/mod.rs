//! One microVM from its directory to its end.
//!
//! A sandbox is its directory, its share, its monitor and its agent. They come
//! in this order and go in the reverse one; whichever step fails, what was there
//! before it goes with the values that own it.

mod dir;
mod failure;
mod memory;
mod size;

use std::{
    fs::{self, File},
    io,
    path::{Path, PathBuf},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use rvm_protocol::{
    agent::{self as protocol, SetUpSandboxRequest, scratch::Backing},
    guest::{GUEST_CID, READY_PORT, SCRATCH_SERIAL, SHARE_TAG, ready_line},
    vmm::{CachePolicy, DiskConfig, ShareConfig, VmConfig, VsockConfig},
};
use tokio::{net::UnixListener, time::timeout};

use dir::SandboxDir;
pub use dir::clean_up;
pub use memory::GrowError;
use memory::Memory;
pub use size::{HostSize, Room, Size, guest_cpus};

use crate::{
    agent::{Agent, AgentError},
    cgroup::{Ceiling, CgroupError, Hierarchies, HostCgroup},
    config::{self, Config},
    process_id::ProcessId,
    rootfs::Layer,
    scratch::{Preparation, ScratchError},
    share::{Share, ShareError},
    spec::Bundle,
    state::{Phase, State},
    timeline::Timeline,
    vmm::{self, Exited, Monitor, MonitorError},
    vsock::{self, Vsock, VsockError},
};

/// The guest's console in the sandbox's directory.
pub const CONSOLE_LOG: &str = "console.log";

/// How long a guest may take to flush its file systems and power off.
const SHUTDOWN_TIMEOUT: Duration = Duration::from_secs(10);
/// The kernel's limit for a host name.
const MAX_HOSTNAME_LEN: usize = 64;

/// Why there is no sandbox.
#[derive(Debug, thiserror::Error)]
pub enum SandboxError {
    /// A name that cannot be part of a path.
    #[error("{what}: {name:?} must be letters, digits, '.', '_' and '-', starting with a letter or digit")]
    Name {
        /// Which name.
        what: &'static str,
        /// As given.
        name: String,
    },
    /// Its name is taken.
    #[error("sandbox {namespace}/{id} is running already")]
    Exists {
        /// containerd's namespace.
        namespace: String,
        /// Its id.
        id: String,
    },
    /// Its directory.
    #[error("{}: {source}", path.display())]
    Directory {
        /// The directory.
        path: PathBuf,
        /// Why not.
        #[source]
        source: io::Error,
    },
    /// A file the configuration names.
    #[error("{key}: {}: {source}", path.display())]
    File {
        /// The configuration's key.
        key: &'static str,
        /// The file.
        path: PathBuf,
        /// Why not.
        #[source]
        source: io::Error,
    },
    /// Its part of the file system.
    #[error(transparent)]
    Share(#[from] ShareError),
    /// Its cgroup on the host.
    #[error(transparent)]
    Cgroup(#[from] CgroupError),
    /// Where its writable layer lives.
    #[error(transparent)]
    Scratch(#[from] ScratchError),
    /// Its monitor was not started.
    #[error(transparent)]
    Monitor(#[from] MonitorError),
    /// A block device of the host, which its monitor was not given.
    #[error("{field}: {source}")]
    Disk {
        /// The field of the specification that asks for it.
        field: String,
        /// Why not.
        #[source]
        source: MonitorError,
    },
    /// More memory than it can have.
    #[error(
        "linux.resources.memory.limit: {limit} bytes do not fit: the running machine of {boot_mib} MiB can grow to \
         {most_mib} MiB on this host"
    )]
    NoRoom {
        /// What was asked for.
        limit: i64,
        /// What it started with.
        boot_mib: u64,
        /// The most it can have.
        most_mib: u64,
    },
    /// It did not grow.
    #[error(
        "linux.resources.memory.limit: the running machine was not made larger for {limit} bytes: {source}"
    )]
    Grow {
        /// What was asked for.
        limit: i64,
        /// Why not.
        #[source]
        source: GrowError,
    },
    /// Its sockets.
    #[error(transparent)]
    Vsock(#[from] VsockError),
    /// Its agent.
    #[error(transparent)]
    Agent(#[from] AgentError),
    /// Its agent is not the one that was installed with this program.
    #[error(
        "the agent announces itself as {found:?} instead of {expected:?}: shim and initramfs are of different versions"
    )]
    Version {
        /// What it said.
        found: String,
        /// What it should have said.
        expected: String,
    },
    /// It ended before its agent answered.
    #[error("the guest did not start: {0}")]
    Ended(String),
    /// It took too long.
    #[error("the guest did not answer within {} s (guest.boot_timeout_s){}", limit.as_secs(), console.as_ref().map(|text| format!("; its console ends with: {text}")).unwrap_or_default())]
    TimedOut {
        /// How long was waited.
        limit: Duration,
        /// The end of its console.
        console: Option<String>,
    },
}

/// What a sandbox is started with.
#[derive(Debug)]
pub struct Start<'a> {
    /// The configuration.
    pub config: &'a Config,
    /// containerd's namespace.
    pub namespace: &'a str,
    /// The sandbox's id.
    pub id: &'a str,
    /// Its first container.
    pub bundle: &'a Bundle,
    /// The container's layers.
    pub layers: &'a [Layer],
    /// Where the steps are noted.
    pub timeline: Arc<Timeline>,
}

/// A running microVM whose agent answers.
pub struct Sandbox {
    monitor: Monitor,
    agent: Agent,
    vsock: Vsock,
    timeline: Arc<Timeline>,
    /// When the monitor was spawned, from the timeline's beginning.
    spawned: Duration,
    dir: Arc<File>,
    vcpus: u8,
    memory: Memory,
    scratch: protocol::Scratch,
    /// Whether the guest may hold data that belongs on the host.
    must_flush: bool,
    console: PathBuf,
    /// Gone once the sandbox is closed.
    owned: Mutex<Option<Owned>>,
}

/// What a sandbox leaves on the host unless it is removed, in the order in
/// which it has to go.
struct Owned {
    cgroup: HostCgroup,
    share: Share,
    state: State,
    dir: SandboxDir,
}

impl Sandbox {
    /// Starts a microVM and waits until its agent has set the sandbox up. On an
    /// error, and when the future is dropped, nothing is left.
    ///
    /// Has to be called on the process's main thread, in a mount namespace of
    /// the process's own ([`crate::mount::isolate`]).
    pub async fn start(start: Start<'_>) -> Result<Self, SandboxError> {
        let Start { config, namespace, id, bundle, layers, timeline } = start;
        check_config(config)?;
        let resources = &*bundle.container.resources;
        let host = HostSize::read();
        let size = Size::of(resources, &config.guest, host);
        let room = Room::of(size, host);
        let dir = SandboxDir::create(&config.host.state_dir, namespace, id)?;
        let cgroup = HostCgroup::create(
            Hierarchies::of_host()?,
            &bundle.container.cgroup_path,
            id,
            &Ceiling::of(resources, size.memory_mib),
        )?;
        let mut owned = Owned {
            share: Share::create(dir.path().join(dir::SHARE))?,
            state: first_state(size, namespace, id, bundle, &dir, &cgroup)?,
            cgroup,
            dir,
        };
        owned.share.add(bundle, layers)?;
        timeline.mark("rootfs mounted");

        let path = owned.dir.path().to_owned();
        let mut scratch = match config.scratch {
            config::Scratch::Tmpfs { .. } => None,
            config::Scratch::Block { size_bytes } => {
                let noted = timeline.clone();
                let done = move || noted.mark("scratch ready");
                Some(Preparation::start(size_bytes, &config.host.cache_dir, layers, &path, done)?)
            }
        };
        let vsock = Vsock::new(owned.dir.fd().clone());
        let ready = vsock.listen(READY_PORT)?;
        vmm::write_config(&path, &vm_config(config, size.vcpus, room, id, bundle))
            .map_err(|source| SandboxError::Directory { path: path.clone(), source })?;
        let spawned = timeline.elapsed();
        let monitor = Monitor::spawn(&config.host.monitor, &path, &owned.cgroup)?;
        timeline.mark("monitor spawned");
        owned.state.monitor = Some(monitor.id());
        owned.save();

        let console = path.join(CONSOLE_LOG);
        let boot = async {
            wait_ready(ready).await?;
            timeline.mark("agent ready");
            let scratch = match &mut scratch {
                Some(scratch) => Some(scratch.finished().await?),
                None => None,
            };
            // The guest finds them when it is told to use them.
            for (field, disk) in disks(bundle, scratch) {
                let plugged = vmm::add_disk(owned.dir.fd(), disk).await;
                plugged.map_err(|source| SandboxError::Disk { field, source })?;
            }
            let agent = Agent::connect(&vsock).await?;
            agent.set_up_sandbox(set_up_request(id)).await?;
            timeline.mark("sandbox set up");
            Ok(agent)
        };
        let agent = tokio::select! {
            // An end of the monitor explains a lost connection, not the other way round.
            biased;
            exited = monitor.exited() => Err(ended(&exited, &console)),
            agent = timeout(config.guest.boot_timeout, boot) => match agent {
                Ok(Ok(agent)) => Ok(agent),
                Ok(Err(error)) => Err(explain(error, &monitor, &console).await),
                Err(_) => Err(SandboxError::TimedOut {
                    limit: config.guest.boot_timeout,
                    console: failure::console_summary(&console),
                }),
            },
        }?;
        owned.state.phase = Phase::Created;
        owned.state.timeline = timeline.steps();
        owned.save();
        Ok(Self {
            monitor,
            agent,
            vsock,
            timeline,
            spawned,
            dir: owned.dir.fd().clone(),
            vcpus: size.vcpus,
            memory: Memory::new(room, resources),
            scratch: guest_scratch(config.scratch),
            must_flush: matches!(config.scratch, config::Scratch::Block { .. })
                || bundle.volumes.iter().any(|volume| !volume.readonly)
                || bundle.disks.iter().any(|disk| !disk.readonly),
            console,
            owned: Mutex::new(Some(owned)),
        })
    }

    /// The agent.
    pub fn agent(&self) -> &Agent {
        &self.agent
    }

    /// Where its container's writes go, in the guest.
    pub fn scratch(&self) -> protocol::Scratch {
        self.scratch.clone()
    }

    /// Connections to the guest.
    pub fn vsock(&self) -> &Vsock {
        &self.vsock
    }

    /// The monitor's process id on the host.
    pub fn pid(&self) -> u32 {
        self.monitor.id().pid
    }

    /// The steps of the start.
    pub fn timeline(&self) -> &Timeline {
        &self.timeline
    }

    /// Adds what the monitor measured of its own start to the timeline.
    pub async fn note_monitor_steps(&self) {
        const LIMIT: Duration = Duration::from_secs(1);
        let Ok(answer) = timeout(LIMIT, vmm::metrics(&self.dir)).await else {
            return log::warn!("the monitor does not answer on its control socket");
        };
        match answer {
            Ok(metrics) => {
                for (name, us) in metrics.start_us {
                    let after = self.spawned + Duration::from_micros(us);
                    self.timeline.mark_at(&format!("monitor: {name}"), after);
                }
            }
            Err(error) => log::debug!("no steps from the monitor: {error}"),
        }
    }

    /// Waits for the end of the monitor, whatever its cause, and says why.
    pub async fn ended(&self) -> String {
        describe_end(&self.monitor.exited().await, &self.console)
    }

    /// Ends the guest at once: it does not answer, or not as it should.
    pub fn kill(&self) {
        self.monitor.kill();
    }

    /// Notes what the sandbox is doing, for who reads its state.
    pub fn set_phase(&self, phase: Phase) {
        if let Some(owned) = self.owned().as_mut() {
            owned.state.phase = phase;
            owned.state.timeline = self.timeline.steps();
            owned.save();
        }
    }

    /// Ends the sandbox and removes what it has on the host. Calling it again
    /// does nothing.
    pub async fn close(&self) {
        let stop = async {
            if self.must_flush {
                // The answer may be lost with the connection; what counts is the end.
                let _ = self.agent.shut_down().await;
                self.monitor.exited().await;
            }
        };
        if timeout(SHUTDOWN_TIMEOUT, stop).await.is_err() {
            log::warn!("the guest did not power off within {} s", SHUTDOWN_TIMEOUT.as_secs());
        }
        self.monitor.kill();
        self.monitor.exited().await;
        self.owned().take();
    }

    fn owned(&self) -> MutexGuard<'_, Option<Owned>> {
        self.owned.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Owned {
    fn save(&self) {
        if let Err(error) = self.state.write(self.dir.path()) {
            log::warn!("writing {}: {error}", self.dir.path().join(crate::state::FILE).display());
        }
    }
}

/// Refuses what no monitor could use before anything is made.
fn check_config(config: &Config) -> Result<(), SandboxError> {
    for (key, path) in [
        ("guest.kernel", &config.guest.kernel),
        ("guest.initramfs", &config.guest.initramfs),
        ("host.monitor", &config.host.monitor),
    ] {
        let found = fs::metadata(path).and_then(|found| match found.is_file() {
            true => Ok(()),
            false => Err(io::Error::other("is not a file")),
        });
        found.map_err(|source| SandboxError::File { key, path: path.clone(), source })?;
    }
    Ok(())
}

fn first_state(
    size: Size,
    namespace: &str,
    id: &str,
    bundle: &Bundle,
    dir: &SandboxDir,
    cgroup: &HostCgroup,
) -> Result<State, SandboxError> {
    let failed = |source| SandboxError::Directory { path: dir.path().to_owned(), source };
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    let state = State {
        id: id.into(),
        namespace: namespace.into(),
        phase: Phase::Starting,
        bundle: bundle.dir.clone(),
        shim: ProcessId::of_self().map_err(failed)?,
        monitor: None,
        created_ms: u64::try_from(now.as_millis()).unwrap_or(u64::MAX),
        vcpus: size.vcpus,
        memory_mib: size.memory_mib,
        cgroups: cgroup.paths().clone(),
        timeline: Vec::new(),
        not_applied: bundle.not_applied.clone(),
    };
    state.write(dir.path()).map_err(failed)?;
    Ok(state)
}

fn vm_config(config: &Config, vcpus: u8, room: Room, id: &str, bundle: &Bundle) -> VmConfig {
    VmConfig {
        id: id.into(),
        vcpus,
        memory_mib: room.boot_mib,
        hotplug_memory_mib: room.hotplug_mib,
        huge_pages: config.guest.huge_pages,
        kernel: config.guest.kernel.clone(),
        cmdline: config.guest.cmdline(),
        initramfs: Some(config.guest.initramfs.clone()),
        console_log: Some(CONSOLE_LOG.into()),
        control_socket: Some(vmm::CONTROL_SOCKET.into()),
        vsock: Some(VsockConfig { guest_cid: GUEST_CID, socket: vsock::SOCKET.into() }),
        shares: vec![ShareConfig {
            tag: SHARE_TAG.into(),
            dir: dir::SHARE.into(),
            // Each mount in it says for itself whether it may be written to; where
            // none may, the monitor refuses it of itself, and the guest opens
            // files without asking.
            readonly: bundle.volumes.iter().all(|volume| volume.readonly),
            // Layers never change; what the host shares with others does.
            cache: if bundle.volumes.is_empty() { CachePolicy::Always } else { CachePolicy::Auto },
        }],
        disks: Vec::new(),
    }
}

/// What is plugged in when the agent has answered, with the field that asked for it.
fn disks(bundle: &Bundle, scratch: Option<PathBuf>) -> impl Iterator<Item = (String, DiskConfig)> {
    let scratch = scratch.map(|path| {
        ("scratch".to_owned(), DiskConfig { serial: SCRATCH_SERIAL.into(), path, readonly: false })
    });
    let of_host = bundle.disks.iter().map(|disk| {
        let config = DiskConfig { serial: disk.serial(), path: disk.path.clone(), readonly: disk.readonly };
        (disk.field.clone(), config)
    });
    scratch.into_iter().chain(of_host)
}

/// The host's name: what a new UTS namespace on it would begin with. A container
/// whose specification names none keeps it, as under runc.
fn host_name() -> Option<String> {
    let name = nix::unistd::gethostname().ok()?.into_string().ok()?;
    (!name.is_empty() && name.len() <= MAX_HOSTNAME_LEN).then_some(name)
}

/// The scratch as the agent is told of it.
fn guest_scratch(scratch: config::Scratch) -> protocol::Scratch {
    let backing = match scratch {
        config::Scratch::Tmpfs { size_bytes } => Backing::TmpfsBytes(size_bytes),
        config::Scratch::Block { .. } => Backing::BlockSerial(SCRATCH_SERIAL.into()),
    };
    protocol::Scratch { backing: Some(backing), ..Default::default() }
}

fn set_up_request(id: &str) -> SetUpSandboxRequest {
    SetUpSandboxRequest {
        hostname: host_name().unwrap_or_else(|| id.chars().take(MAX_HOSTNAME_LEN).collect()),
        layers_tag: SHARE_TAG.into(),
        volumes_tag: SHARE_TAG.into(),
        ..Default::default()
    }
}

async fn wait_ready(listener: UnixListener) -> Result<(), SandboxError> {
    let io = |source| VsockError::Io { port: READY_PORT, source };
    let (mut stream, _) = listener.accept().await.map_err(io)?;
    let found = vsock::read_line(&mut stream).await.map_err(io)?;
    let expected = ready_line();
    if found == expected.trim_end() {
        return Ok(());
    }
    Err(SandboxError::Version {
        found: crate::agent::printable(found),
        expected: expected.trim_end().to_owned(),
    })
}

/// A connection that fails because the monitor is going down is told as the
/// monitor's end, which is known a moment later.
async fn explain(error: SandboxError, monitor: &Monitor, console: &Path) -> SandboxError {
    const MOMENT: Duration = Duration::from_millis(500);
    if !matches!(
        error,
        SandboxError::Vsock(_) | SandboxError::Agent(AgentError::Lost(_) | AgentError::Connect(_))
    ) {
        return error;
    }
    match timeout(MOMENT, monitor.exited()).await {
        Ok(exited) => ended(&exited, console),
        Err(_) => error,
    }
}

fn ended(exited: &Exited, console: &Path) -> SandboxError {
    SandboxError::Ended(describe_end(exited, console))
}

fn describe_end(exited: &Exited, console: &Path) -> String {
    match failure::console_summary(console) {
        Some(text) => format!("{exited}; its console ends with: {text}"),
        None => exited.to_string(),
    }
}
