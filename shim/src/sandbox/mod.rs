//! One microVM from its directory to its end, and the containers in it.
//!
//! The machine comes first: [`Plan`] says what it has, [`Boot`] starts it.
//! Containers come and go while it runs (`attach`); what they claim of it adds up
//! in the `ledger`, and the machine's size follows (`resize`). What a sandbox has
//! on the host comes in the order directory, cgroup, share, monitor and goes in
//! the reverse one; whichever step fails, what was there before it goes with the
//! values that own it.

mod attach;
mod dir;
mod error;
mod failure;
mod host_side;
mod ledger;
mod machine;
mod network;
mod plan;
mod record;
mod resize;

use std::{
    fs, io,
    path::{Path, PathBuf},
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, AtomicU32, Ordering},
    },
    time::Duration,
};

use dir::SandboxDir;
use host_side::HostSide;
use machine::{Boot, Machine};
use record::Record;
use rvm_protocol::agent::ContainerStats;
use tokio::time::timeout;

pub use attach::{Attached, Preparing};
pub use dir::{clean_up, is_held};
pub use error::SandboxError;
pub use ledger::{Claim, Ledger};
use network::Network;
pub use network::{Namespace, NetworkError, try_out as try_network};
pub use plan::{HostSize, Plan, Room, Size};
pub use record::Member;
pub use resize::{GrowError, Update};

use crate::{
    agent::Agent,
    background::{OffThread, off_thread},
    cgroup::{Ceiling, Hierarchies, HostCgroup},
    clock::Keeper,
    config::Config,
    fault,
    ids::{self, Ids},
    process_id::ProcessId,
    relay::Relay,
    remains,
    rootfs::Layer,
    share::Share,
    spec::{Bundle, HostNamespace, Shm, Users},
    state::{Phase, State},
    timeline::Timeline,
    vsock::Vsock,
};

/// How long what a sandbox has on the host may take to be removed, while somebody waits.
const CLOSE_LIMIT: Duration = Duration::from_secs(10);
/// Said of a machine's end where the host's kernel has killed a process of its cgroup for want of memory.
const KILLED_FOR_MEMORY: &str =
    "; the host killed it for want of memory (memory.max of its cgroup, or of one above)";
/// The guest's console in the sandbox's directory.
pub const CONSOLE_LOG: &str = "console.log";

/// What there is of a sandbox while its guest boots. Dropping it leaves nothing.
struct Base {
    first: String,
    shm: Option<Shm>,
    users: Option<Users>,
    pinned: Vec<HostNamespace>,
    timeline: Arc<Timeline>,
    sizing: resize::Sizing,
    host: Arc<HostSide>,
    owned: OffThread<Owned>,
}

/// A running microVM whose agent answers, and what it has on the host.
pub struct Sandbox {
    machine: Machine,
    /// The container it was made for.
    first: String,
    shm: Option<Shm>,
    users: Option<Users>,
    pinned: Vec<HostNamespace>,
    timeline: Arc<Timeline>,
    host: Arc<HostSide>,
    sizing: resize::Sizing,
    disks: attach::Disks,
    /// How many scratches were plugged in so far.
    scratches: AtomicU32,
    /// Whether the guest may hold data that belongs on the host.
    must_flush: AtomicBool,
    /// Gone once the sandbox is closed.
    owned: Mutex<Option<Owned>>,
}

/// What a sandbox leaves on the host unless it is removed, in the order in
/// which it has to go.
struct Owned {
    /// None where the host's kernel has none.
    _relay: Option<Relay>,
    _share: OwnedShare,
    cgroup: Arc<HostCgroup>,
    record: Record,
    _dir: SandboxDir,
}

/// Closes the host's side, whoever else knows of it.
struct OwnedShare(Arc<HostSide>);

impl Drop for OwnedShare {
    fn drop(&mut self) {
        self.0.close();
    }
}

impl Base {
    /// Makes it, and starts a microVM.
    fn begin(
        config: &Config,
        mut plan: Plan,
        network: Arc<Network>,
        ids: Ids,
        timeline: Arc<Timeline>,
    ) -> Result<(Self, Boot), SandboxError> {
        check_config(config)?;
        let total = plan.ledger.total();
        let dir = SandboxDir::create(&config.host.state_dir, &plan.namespace, &plan.id)?;
        let ceiling = resize::ceiling(&plan.ledger, Ceiling::of(&total, plan.size.memory_mib), 0);
        let cgroup = HostCgroup::create(Hierarchies::of_host()?, &plan.cgroup_path, &plan.id, &ceiling)?;
        if let Some(lifted) = ceiling.lifted_quota() {
            cgroup.update(&lifted)?;
        }
        plan.ledger.set_huge_pages_above(cgroup.huge_pages_above());
        log::info!("sandbox {}: the monitor's ids: {ids}", plan.id);
        dir.let_in(ids.root())
            .map_err(|source| SandboxError::Directory { path: dir.path().to_owned(), source })?;
        let record = Record::begin(&plan, &dir, &cgroup, &ids)?;
        let share = Arc::new(Share::create(dir.path(), ids)?);
        let host = HostSide::new(dir.path(), share.clone(), cgroup.procs(), network);
        let mut owned = Owned {
            _relay: None,
            _share: OwnedShare(host.clone()),
            record,
            cgroup: Arc::new(cgroup),
            _dir: dir,
        };
        let dir = &owned._dir;
        let network = host.network();
        let boot =
            Boot::begin(config, &plan, (dir.path(), dir.fd()), &share, &owned.cgroup, network, &timeline)?;
        network.booted();
        let monitor = boot.id();
        owned._relay = relay_for(network, boot.vsock());
        owned.record.change(|state| state.monitor = Some(monitor));
        let sizing = resize::Sizing::new(plan.room, plan.size, plan.max_vcpus, plan.ledger, &total);
        let owned = OffThread::new(owned);
        Ok((
            Self {
                first: plan.first,
                shm: plan.shm,
                users: plan.users,
                pinned: plan.pinned,
                timeline,
                sizing,
                host,
                owned,
            },
            boot,
        ))
    }

    /// Removes what there is. Returns why it did not start, with what the host knows of that.
    async fn failed(self, error: SandboxError) -> SandboxError {
        let killed = self.owned.get().is_some_and(|owned| owned.cgroup.oom_kills() > 0);
        self.owned.end().await;
        match error {
            SandboxError::Ended(reason) if killed => SandboxError::Ended(reason + KILLED_FOR_MEMORY),
            error => error,
        }
    }

    /// The sandbox, whose agent has set it up.
    fn with(self, machine: Machine) -> Sandbox {
        let Self { first, shm, users, pinned, timeline, sizing, host, owned } = self;
        let sandbox = Sandbox {
            machine,
            first,
            shm,
            users,
            pinned,
            timeline,
            host,
            sizing,
            disks: attach::Disks::default(),
            scratches: AtomicU32::new(0),
            must_flush: AtomicBool::new(false),
            owned: Mutex::new(owned.into_inner()),
        };
        sandbox.record(|state| {
            state.phase = Phase::Created;
            state.timeline = sandbox.timeline.steps();
        });
        sandbox
    }
}

impl Sandbox {
    /// Starts a microVM for the container in `bundle`, whose part of the host is
    /// made while the guest boots. On an error, and when the future is dropped,
    /// nothing is left.
    pub async fn start_for(
        config: &Config,
        plan: Plan,
        bundle: &Bundle,
        layers: &[Layer],
        timeline: Arc<Timeline>,
    ) -> Result<(Arc<Self>, Attached), SandboxError> {
        let (network, ids) =
            tokio::join!(open_network(config, &plan), choose_ids(config, &plan, bundle, layers));
        let network = network?;
        timeline.mark("network opened");
        let (base, boot) = Base::begin(config, plan, network, ids, timeline)?;
        let started = async {
            let mut preparing = Preparing::begin(&base.host, config, bundle, layers, &base.timeline)?;
            let (agent, ()) = tokio::try_join!(boot.agent(), preparing.made(&boot))?;
            Ok((boot.machine(agent), preparing))
        };
        let (machine, preparing) = match started.await {
            Ok(started) => started,
            Err(error) => return Err(base.failed(error).await),
        };
        let sandbox = Arc::new(base.with(machine));
        match sandbox.attach(preparing).await {
            Ok(attached) => Ok((sandbox, attached)),
            Err(error) => {
                sandbox.close().await;
                Err(error)
            }
        }
    }

    /// Starts a microVM that has no container yet. On an error, and when the future is
    /// dropped, nothing is left.
    pub async fn start(
        config: &Config,
        plan: Plan,
        timeline: Arc<Timeline>,
    ) -> Result<Arc<Self>, SandboxError> {
        let network = open_network(config, &plan).await?;
        timeline.mark("network opened");
        let ids = Ids::Host(ids::OF_A_POD.to_owned());
        let (base, boot) = Base::begin(config, plan, network, ids, timeline)?;
        match boot.agent().await {
            Ok(agent) => {
                let sandbox = Arc::new(base.with(boot.machine(agent)));
                let ready = async {
                    sandbox.grow_huge_pages().await?;
                    sandbox.hold_to_quota().await
                };
                if let Err(error) = ready.await {
                    sandbox.close().await;
                    return Err(error);
                }
                Ok(sandbox)
            }
            Err(error) => Err(base.failed(error).await),
        }
    }

    /// The agent.
    pub fn agent(&self) -> &Agent {
        self.machine.agent()
    }

    /// Who keeps the guest's clock.
    pub fn clock(&self) -> &Keeper {
        self.machine.clock()
    }

    /// Connections to the guest.
    pub fn vsock(&self) -> &Vsock {
        self.machine.vsock()
    }

    /// The monitor's process id on the host.
    pub fn monitor_pid(&self) -> u32 {
        self.machine.id().pid
    }

    /// The steps of the start.
    pub fn timeline(&self) -> &Arc<Timeline> {
        &self.timeline
    }

    /// Adds what the monitor measured of its own start to the timeline.
    pub async fn note_monitor_steps(&self) {
        self.machine.note_steps(&self.timeline).await;
    }

    /// Waits for the end of the monitor, whatever its cause, and says why.
    pub async fn ended(&self) -> String {
        let reason = self.machine.ended().await;
        match self.killed_for_memory() {
            true => reason + KILLED_FOR_MEMORY,
            false => reason,
        }
    }

    /// Whether the host's kernel has killed the machine for want of memory.
    pub fn killed_for_memory(&self) -> bool {
        self.owned().as_ref().is_some_and(|owned| owned.cgroup.oom_kills() > 0)
    }

    /// Ends the guest at once: it does not answer, or not as it should.
    pub fn kill(&self) {
        self.machine.kill();
    }

    /// Whether it was made for this container.
    pub fn is_first(&self, container: &str) -> bool {
        self.first == container
    }

    /// The container it was made for.
    pub fn first(&self) -> &str {
        &self.first
    }

    /// The user namespace that owns what it holds, where that is not the guest's.
    pub fn users(&self) -> Option<&Users> {
        self.users.as_ref()
    }

    /// Namespaces of the host in whose place it has its own.
    pub fn pinned(&self) -> &[HostNamespace] {
        &self.pinned
    }

    /// The `/dev/shm` of the host's in whose place its containers share the guest's.
    pub fn shm(&self) -> Option<&Shm> {
        self.shm.as_ref()
    }

    /// Notes what a container is doing, for who reads its sandbox's record.
    pub fn set_phase(&self, container: &str, phase: Phase) {
        if let Some(owned) = self.owned().as_mut() {
            match self.is_first(container) {
                true => owned.record.change(|state| {
                    state.phase = phase;
                    state.timeline = self.timeline.steps();
                }),
                false => owned.record.change_member(container, |member| member.phase = phase),
            }
        }
    }

    /// Notes a container that has joined.
    pub fn add_member(&self, container: &str, bundle: &Path, holder: ProcessId) {
        if let Some(owned) = self.owned().as_mut() {
            owned.record.add_member(container, bundle, holder);
        }
    }

    /// Its directory.
    pub fn dir(&self) -> &Path {
        &self.host.dir
    }

    /// Where the files are that a pod's containers find in `/etc`, where no client makes them.
    pub fn files(&self) -> PathBuf {
        dir::files(self.dir())
    }

    /// Makes the machine's network that of its namespace on the host, as that is now.
    pub async fn sync_network(&self) -> Result<(), SandboxError> {
        Ok(self.host.network().sync(&self.machine).await?)
    }

    /// The same, and from then on whenever the namespace changes.
    pub async fn follow_network(self: &Arc<Self>) -> Result<(), SandboxError> {
        let network = self.host.network();
        network.follow(Arc::downgrade(self))?;
        Ok(network.sync(&self.machine).await?)
    }

    /// What its machine uses of the host: the files of its cgroup, where that is of version 2.
    pub fn host_stats(&self) -> ContainerStats {
        let files = self.owned().as_ref().map(|owned| owned.cgroup.stats()).unwrap_or_default();
        ContainerStats { files, ..Default::default() }
    }

    /// How many processes the cgroup that contains its own on the host may have; 0 where there is no limit.
    pub fn pids_max_above(&self) -> u64 {
        self.owned().as_ref().and_then(|owned| owned.cgroup.pids_max_above()).unwrap_or_default()
    }

    /// Device and inode of its network namespace on the host.
    pub fn network_identity(&self) -> Option<(u64, u64)> {
        self.host.network().namespace().identity().ok()
    }

    /// Ends the sandbox and removes what it has on the host. Calling it again
    /// does nothing.
    pub async fn close(&self) {
        fault::point("to end the machine");
        self.machine.end(self.must_flush.load(Ordering::Relaxed)).await;
        fault::point("the machine has ended");
        let owned = self.owned().take();
        if let (Some(monitor), Some(owned)) = (self.machine.kept(), &owned) {
            log::error!("the monitor does not end though it was killed; its cgroup goes when it does");
            remains::outlive(monitor, owned.cgroup.clone());
        }
        if timeout(CLOSE_LIMIT, off_thread(move || drop(owned))).await.is_err() {
            let dir = self.dir().display();
            log::error!(
                "{dir}: is not removed within {} s; its mounts go with this process",
                CLOSE_LIMIT.as_secs()
            );
        }
        fault::point("the sandbox is removed");
    }

    /// Whether [`Sandbox::close`] has removed it.
    fn is_closed(&self) -> bool {
        self.owned().is_none()
    }

    fn record(&self, change: impl FnOnce(&mut State)) {
        if let Some(owned) = self.owned().as_mut() {
            owned.record.change(change);
        }
    }

    fn owned(&self) -> MutexGuard<'_, Option<Owned>> {
        self.owned.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The network of the machine to be: what is wrong with its namespace ends the
/// start before there is a machine.
/// Which of the host's ids the monitor has.
async fn choose_ids(config: &Config, plan: &Plan, bundle: &Bundle, layers: &[Layer]) -> Ids {
    if !config.host.own_ids {
        return Ids::Host("host.own_ids is false".to_owned());
    }
    let (config, id) = (config.clone(), plan.id.clone());
    let (bundle, layers) = (bundle.clone(), layers.to_vec());
    tokio::task::spawn_blocking(move || Ids::choose(&config, &id, &bundle, &layers))
        .await
        .unwrap_or_else(|error| Ids::Host(error.to_string()))
}

async fn open_network(config: &Config, plan: &Plan) -> Result<Arc<Network>, SandboxError> {
    let (wanted, vcpus, settings) = (plan.network.clone(), plan.size.vcpus, config.network.clone());
    let opened = tokio::task::spawn_blocking(move || {
        let network = Network::open(wanted.as_ref(), vcpus, &settings)?;
        network.prepare()?;
        Ok(Arc::new(network))
    });
    // A panic on that thread is a fault of ours.
    opened.await.unwrap_or_else(|error| std::panic::resume_unwind(error.into_panic()))
}

/// Relays what is dialled at the loopback addresses of the sandbox's network
/// namespace on the host.
fn relay_for(network: &Network, vsock: &Vsock) -> Option<Relay> {
    Relay::open(network.namespace(), vsock)
        .inspect_err(|error| log::warn!("the sandbox's loopback cannot be reached from the host: {error}"))
        .ok()
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
