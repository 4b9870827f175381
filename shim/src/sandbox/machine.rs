//! A microVM: its monitor, its agent, and what is plugged into it while it runs.

use std::{
    fs::File,
    io,
    os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd},
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use rvm_protocol::{
    agent::{SetUpSandboxRequest, SyncNetworkRequest},
    guest::{GUEST_CID, LAYERS_TAG, READY_PORT, VOLUMES_TAG, ready_line},
    vmm::{CachePolicy, InheritedNet, JailConfig, NetConfig, ShareConfig, VmConfig, VsockConfig},
};
use tokio::{net::UnixListener, task::spawn_blocking, time::timeout};

use super::{
    CONSOLE_LOG, Plan, SandboxError, failure,
    network::{self, Network},
};
use crate::{
    agent::{Agent, AgentError},
    cgroup::HostCgroup,
    clock::Keeper,
    config::Config,
    fault, mount,
    process_id::ProcessId,
    share::{self, Share},
    spec::Users,
    sysctl,
    timeline::Timeline,
    user_namespace::{IdMap, user_namespace},
    vmm::{self, Exited, Monitor, MonitorError},
    vsock::{self, Vsock, VsockError},
};

/// How long a guest may take to flush its file systems and power off.
const SHUTDOWN_TIMEOUT: Duration = Duration::from_secs(10);
/// How long after what it causes a monitor's end may come to be known.
const MOMENT: Duration = Duration::from_millis(500);
/// The kernel's limit for a host name.
const MAX_HOSTNAME_LEN: usize = 64;

/// A microVM whose guest is booting. Dropping it ends it.
pub(super) struct Boot {
    monitor: Monitor,
    vsock: Vsock,
    ready: UnixListener,
    console: PathBuf,
    set_up: SetUpSandboxRequest,
    limit: Duration,
    timeline: Arc<Timeline>,
    /// When the monitor was spawned, from the timeline's beginning.
    spawned: Duration,
}

/// A microVM whose agent answers. Dropping it ends it.
pub(super) struct Machine {
    monitor: Monitor,
    agent: Agent,
    clock: Keeper,
    vsock: Vsock,
    console: PathBuf,
    spawned: Duration,
    /// The guest can have files as memory.
    has_pmem: bool,
}

impl Boot {
    /// Starts the monitor in the sandbox's directory `path`, which is open as
    /// `dir`.
    pub(super) fn begin(
        config: &Config,
        plan: &Plan,
        (path, dir): (&Path, &Arc<File>),
        share: &Share,
        cgroup: &HostCgroup,
        network: &Network,
        timeline: &Arc<Timeline>,
    ) -> Result<Self, SandboxError> {
        let sysctl = sysctl::of_host(&config.guest.host_sysctls)?;
        let vsock = Vsock::new(dir.clone()).of_monitor(share.ids().root());
        let ready = vsock.listen(READY_PORT)?;
        let nets = network.inherited();
        let mut named: Vec<_> =
            nets.iter().flat_map(|net| net.taps.iter().chain(&net.vhost)).copied().collect();
        let without_power = if share.ids().users().is_none() { powerless_users() } else { None };
        let users = share.ids().users().or(without_power.as_ref().map(AsFd::as_fd));
        let jail = JailConfig {
            mount_namespace: share.namespace().as_fd().as_raw_fd(),
            root: share.namespace().top().as_raw_fd(),
            user_namespace: users.as_ref().map(AsRawFd::as_raw_fd),
        };
        named.extend([jail.mount_namespace, jail.root].into_iter().chain(jail.user_namespace));
        vmm::write_config(path, &vm_config(config, plan, nets, jail))
            .map_err(|source| SandboxError::Directory { path: path.to_owned(), source })?;
        let spawned = timeline.elapsed();
        let namespace = network.namespace().as_fd();
        let monitor =
            Monitor::spawn(&config.host.monitor, path, cgroup, namespace, plan.oom_score_adj, &named)?;
        fault::monitor_is(monitor.id().pid);
        timeline.mark("monitor spawned");
        Ok(Self {
            monitor,
            vsock,
            ready,
            console: path.join(CONSOLE_LOG),
            set_up: SetUpSandboxRequest { sysctl, ..set_up_request(plan) },
            limit: config.guest.boot_timeout,
            timeline: timeline.clone(),
            spawned,
        })
    }

    /// The monitor's process.
    pub(super) fn id(&self) -> ProcessId {
        self.monitor.id()
    }

    /// Connections to the guest that boots.
    pub(super) fn vsock(&self) -> &Vsock {
        &self.vsock
    }

    /// Waits until the agent has set the sandbox up; it, and whether the guest can have files as
    /// memory.
    pub(super) async fn agent(&self) -> Result<(Agent, bool), SandboxError> {
        let Self { monitor, vsock, ready, console, set_up, limit, timeline, .. } = self;
        let boot = async {
            wait_ready(ready).await?;
            timeline.mark("agent ready");
            let agent = Agent::connect(vsock).await?;
            let can = agent.set_up_sandbox(set_up.clone()).await?;
            timeline.mark("sandbox set up");
            Ok((agent, can.pmem))
        };
        tokio::select! {
            // An end of the monitor explains a lost connection, not the other way round.
            biased;
            exited = monitor.exited() => Err(SandboxError::Ended(describe_end(&exited, console))),
            agent = timeout(*limit, boot) => match agent {
                Ok(Ok(agent)) => Ok(agent),
                Ok(Err(error)) => Err(explain(error, monitor, console).await),
                Err(_) => {
                    Err(SandboxError::TimedOut { limit: *limit, console: failure::console_summary(console) })
                }
            },
        }
    }

    /// Plugs in the file at `path` as soon as there is a machine: a guest that has not
    /// looked at its bus yet need not look again. Of a monitor that ends meanwhile
    /// [`agent`](Self::agent) tells.
    pub(super) async fn add_disk(
        &self,
        serial: &str,
        path: &Path,
        readonly: bool,
    ) -> Result<(), MonitorError> {
        self.added(add_disk(&self.monitor, serial, path, readonly, self.limit).await).await
    }

    /// The same of a file that is to be memory; the slot it is in.
    pub(super) async fn add_pmem(&self, path: &Path) -> Result<u8, MonitorError> {
        self.added(add_pmem(&self.monitor, path, self.limit).await).await
    }

    async fn added<T>(&self, added: Result<T, MonitorError>) -> Result<T, MonitorError> {
        match added {
            Err(MonitorError::Control { .. }) if timeout(MOMENT, self.monitor.exited()).await.is_ok() => {
                std::future::pending().await
            }
            added => added,
        }
    }

    /// The machine, whose agent this is, and what [`agent`](Self::agent) says of it.
    pub(super) fn machine(self, (agent, has_pmem): (Agent, bool)) -> Machine {
        let Self { monitor, vsock, console, spawned, .. } = self;
        let clock = Keeper::start(agent.clone());
        Machine { monitor, agent, clock, vsock, console, spawned, has_pmem }
    }
}

impl Machine {
    pub(super) fn agent(&self) -> &Agent {
        &self.agent
    }

    pub(super) fn clock(&self) -> &Keeper {
        &self.clock
    }

    pub(super) fn vsock(&self) -> &Vsock {
        &self.vsock
    }

    pub(super) fn id(&self) -> ProcessId {
        self.monitor.id()
    }

    /// Adds what the monitor measured of its own start to the timeline.
    pub(super) async fn note_steps(&self, timeline: &Timeline) {
        match self.monitor.control().metrics().await {
            Ok(metrics) => {
                for (name, us) in metrics.start_us {
                    let after = self.spawned + Duration::from_micros(us);
                    timeline.mark_at(&format!("monitor: {name}"), after);
                }
            }
            Err(error) => log::warn!("no steps from the monitor: {error}"),
        }
    }

    /// Waits for the end of the monitor, whatever its cause, and says why.
    pub(super) async fn ended(&self) -> String {
        describe_end(&self.monitor.exited().await, &self.console)
    }

    pub(super) fn kill(&self) {
        self.monitor.kill();
    }

    /// Its monitor, where that was killed and the host keeps it.
    pub(super) fn kept(&self) -> Option<OwnedFd> {
        self.monitor.kept()
    }

    /// Ends the guest, after it has written what belongs on the host where
    /// `flush`.
    pub(super) async fn end(&self, flush: bool) {
        let stop = async {
            if flush {
                // The answer may be lost with the connection; what counts is the end, which may be long ago.
                tokio::select! {
                    biased;
                    _ = self.monitor.exited() => {}
                    () = async { drop(self.agent.shut_down().await) } => drop(self.monitor.exited().await),
                }
            }
        };
        if timeout(SHUTDOWN_TIMEOUT, stop).await.is_err() {
            log::warn!("the guest did not power off within {} s", SHUTDOWN_TIMEOUT.as_secs());
        }
        self.monitor.kill();
        // At most as long as the host may keep it.
        self.monitor.exited().await;
    }

    /// Plugs the file or block device at `path` in as a disk. The guest finds it
    /// when it is told to use it.
    pub(super) async fn add_disk(
        &self,
        serial: &str,
        path: &Path,
        readonly: bool,
    ) -> Result<(), MonitorError> {
        add_disk(&self.monitor, serial, path, readonly, vmm::LIMIT).await
    }

    /// Whether the guest can have files as memory.
    pub(super) fn has_pmem(&self) -> bool {
        self.has_pmem
    }

    /// Plugs the file at `path` in as memory that the guest can read; the slot it is in.
    pub(super) async fn add_pmem(&self, path: &Path) -> Result<u8, MonitorError> {
        add_pmem(&self.monitor, path, vmm::LIMIT).await
    }

    /// Takes such a file out that the guest has let go of.
    pub(super) async fn remove_pmem(&self, slot: u8) -> Result<(), MonitorError> {
        self.monitor.control().remove_pmem(slot).await
    }

    /// Takes a disk out that the guest has let go of.
    pub(super) async fn remove_disk(&self, serial: &str) -> Result<(), MonitorError> {
        self.monitor.control().remove_disk(serial).await
    }

    /// Makes so many vCPUs exist, for the guest to bring them up.
    pub(super) async fn set_vcpus(&self, count: u8) -> Result<(), MonitorError> {
        self.monitor.control().set_vcpus(count).await
    }

    /// Bytes of memory the guest has plugged in.
    pub(super) async fn plugged_bytes(&self) -> Result<u64, MonitorError> {
        Ok(self.monitor.control().metrics().await?.memory_plugged_bytes)
    }

    /// And of the host's huge pages.
    pub(super) async fn hugetlb_bytes(&self) -> Result<u64, MonitorError> {
        Ok(self.monitor.control().metrics().await?.hugetlb_plugged_bytes)
    }

    /// Offers the guest so much of the host's huge pages.
    pub(super) async fn offer_hugetlb(&self, mib: u64) -> Result<(), MonitorError> {
        self.monitor.control().set_hugetlb_memory(mib).await
    }

    /// Offers the guest so much memory beside what it started with.
    pub(super) async fn offer_memory(&self, mib: u64) -> Result<(), MonitorError> {
        self.monitor.control().set_hotplug_memory(mib).await
    }
}

impl network::Machine for Machine {
    async fn add_net(
        &self,
        net: &NetConfig,
        taps: &[BorrowedFd<'_>],
        vhost: &[BorrowedFd<'_>],
    ) -> Result<(), MonitorError> {
        self.monitor.control().add_net(net, taps, vhost).await
    }

    async fn remove_net(&self, slot: u8) -> Result<(), MonitorError> {
        self.monitor.control().remove_net(slot).await
    }

    fn listen(&self, port: u32) -> Result<UnixListener, VsockError> {
        self.vsock.listen(port)
    }

    async fn apply(&self, wanted: &SyncNetworkRequest) -> Result<(), AgentError> {
        self.agent.sync_network(wanted).await
    }
}

async fn add_disk(
    monitor: &Monitor,
    serial: &str,
    path: &Path,
    readonly: bool,
    limit: Duration,
) -> Result<(), MonitorError> {
    let file = open(path, readonly).await?;
    monitor.control().add_disk(serial, readonly, file.as_fd(), limit).await
}

async fn add_pmem(monitor: &Monitor, path: &Path, limit: Duration) -> Result<u8, MonitorError> {
    let file = open(path, true).await?;
    monitor.control().add_pmem(file.as_fd(), limit).await
}

async fn open(path: &Path, readonly: bool) -> Result<File, MonitorError> {
    let open = {
        let path = path.to_owned();
        // Opening a device may wait for it.
        move || match readonly {
            true => mount::lend(&path),
            false => File::options().read(true).write(true).open(path),
        }
    };
    let opened = spawn_blocking(open).await.map_err(io::Error::other).flatten();
    opened.map_err(|source| MonitorError::Disk { path: path.to_owned(), source })
}

fn vm_config(config: &Config, plan: &Plan, nets: Vec<InheritedNet>, jail: JailConfig) -> VmConfig {
    VmConfig {
        id: plan.id.clone(),
        vcpus: plan.size.vcpus,
        max_vcpus: plan.max_vcpus,
        memory_mib: plan.room.boot_mib,
        hotplug_memory_mib: plan.room.hotplug_mib,
        hugetlb_memory_mib: plan.room.hugetlb_mib,
        pmem_mib: config.images.window_mib(),
        huge_pages: config.guest.huge_pages,
        free_page_reporting: config.guest.free_page_reporting,
        kernel: config.guest.kernel.clone(),
        cmdline: config.guest.cmdline(),
        initramfs: Some(config.guest.initramfs.clone()),
        console_log: Some(CONSOLE_LOG.into()),
        control_socket: Some(vmm::CONTROL_SOCKET.into()),
        vsock: Some(VsockConfig { guest_cid: GUEST_CID, socket: vsock::SOCKET.into() }),
        shares: vec![
            ShareConfig {
                tag: LAYERS_TAG.into(),
                dir: share::LAYERS.into(),
                readonly: true,
                cache: CachePolicy::Always,
            },
            // Each mount in it says for itself whether it may be written to.
            ShareConfig {
                tag: VOLUMES_TAG.into(),
                dir: share::VOLUMES.into(),
                readonly: false,
                cache: CachePolicy::Auto,
            },
        ],
        disks: Vec::new(),
        nets,
        jail: Some(jail),
    }
}

/// A user namespace with every id that its shim has, for the monitor: its root is the shim's where
/// a file's owner is asked for, and has no power over anything else. A host that makes none
/// leaves the monitor fewer capabilities in its own.
fn powerless_users() -> Option<OwnedFd> {
    IdMap::identity()
        .and_then(|map| user_namespace(&map))
        .inspect_err(|error| log::warn!("the monitor gets no user namespace of its own: {error}"))
        .ok()
}

/// The host's name: what a new UTS namespace on it would begin with. A container
/// whose specification names none keeps it, as under runc.
fn host_name() -> Option<String> {
    let name = nix::unistd::gethostname().ok()?.into_string().ok()?;
    (!name.is_empty() && name.len() <= MAX_HOSTNAME_LEN).then_some(name)
}

fn set_up_request(plan: &Plan) -> SetUpSandboxRequest {
    let Users { uids: uid_mappings, gids: gid_mappings, .. } = plan.users.clone().unwrap_or_default();
    SetUpSandboxRequest {
        uid_mappings,
        gid_mappings,
        hostname: plan
            .hostname
            .clone()
            .or_else(host_name)
            .unwrap_or_else(|| plan.id.chars().take(MAX_HOSTNAME_LEN).collect()),
        shared_pid: plan.shared_pid,
        pod_sysctl: plan.sysctl.clone(),
        layers_tag: LAYERS_TAG.into(),
        volumes_tag: VOLUMES_TAG.into(),
        shm_bytes: plan.shm.as_ref().map_or(0, |shm| shm.bytes),
        ..Default::default()
    }
}

async fn wait_ready(listener: &UnixListener) -> Result<(), SandboxError> {
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
    if !matches!(
        error,
        SandboxError::Vsock(_) | SandboxError::Agent(AgentError::Lost { .. } | AgentError::Connect(_))
    ) {
        return error;
    }
    match timeout(MOMENT, monitor.exited()).await {
        Ok(exited) => SandboxError::Ended(describe_end(&exited, console)),
        Err(_) => error,
    }
}

fn describe_end(exited: &Exited, console: &Path) -> String {
    match failure::console_summary(console) {
        Some(text) => format!("{exited}; its console ends with: {text}"),
        None => exited.to_string(),
    }
}
