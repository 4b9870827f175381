//! A sandbox's network: the interfaces of its namespace on the host, and the
//! machine's (docs/decisions/0630).
//!
//! The namespace is whoever's who prepared it: a CNI plugin's, Docker's, or a new
//! one that a hook or nobody puts something into. For each interface in it there is
//! a tap beside it; what arrives on one leaves by the other, so that the host's side
//! looks as with a process in the namespace, and the guest's interface is the end
//! of the same wire. [`Network::sync`] compares namespace and machine and may be
//! called at any time.

mod answers;
mod namespace;
mod observe;
mod redirect;
mod resolver;
mod tap;
#[cfg(test)]
mod tests;
mod watch;

use std::{
    collections::BTreeMap,
    io,
    os::fd::{AsFd, AsRawFd, BorrowedFd},
    path::{Path, PathBuf},
    sync::{Arc, Mutex, MutexGuard, PoisonError, Weak},
};

use rvm_protocol::{
    agent::SyncNetworkRequest,
    guest::NET_SLOTS,
    netlink::{Refusal, Socket},
    vmm::{InheritedNet, NetConfig},
};
use tokio::{
    net::UnixListener,
    task::{AbortHandle, spawn_blocking},
};

use super::Sandbox;
use crate::{agent::AgentError, config, spec::HostNetwork, vmm::MonitorError, vsock::VsockError};
pub use namespace::Namespace;
use observe::{Kind, Link, Observed};
use redirect::Redirect;
use tap::Tap;
use watch::Watch;

/// More pairs of queues than this cost descriptors and bring nothing.
const MOST_QUEUE_PAIRS: u8 = 8;

/// Why a sandbox does not have the network it should.
#[derive(Debug, thiserror::Error)]
pub enum NetworkError {
    /// The namespace a specification names.
    #[error("{field}: {}: {problem}", path.display())]
    Namespace {
        /// The field.
        field: String,
        /// What it names.
        path: PathBuf,
        /// What is wrong with it.
        problem: String,
    },
    /// There is no namespace for it.
    #[error("making a network namespace: {0}")]
    NewNamespace(#[source] io::Error),
    /// A thread did not get into the namespace.
    #[error("entering the network namespace: {0}")]
    Enter(#[source] io::Error),
    /// What is in the namespace is not known.
    #[error("reading the {what} of the network namespace: {source}")]
    Read {
        /// Which part.
        what: &'static str,
        /// Why not.
        #[source]
        source: Refusal,
    },
    /// Its kernel parameters are not known.
    #[error("reading kernel parameters of the network namespace: {0}")]
    Parameters(#[source] io::Error),
    /// An interface that cannot be carried into a guest.
    #[error("interface {interface:?} of the network namespace cannot be the guest's: {reason}")]
    Unsupported {
        /// Its name.
        interface: String,
        /// Why not, and what to do instead where there is something.
        reason: String,
    },
    /// A rule that cannot be carried into a guest.
    #[error("rule {priority} of the network namespace (ip rule) cannot be the guest's: it asks for {word}")]
    UnsupportedRule {
        /// Its priority.
        priority: u32,
        /// Its part that cannot.
        word: &'static str,
    },
    /// More interfaces than a machine has places for.
    #[error("interface {interface:?}: a machine has at most {} interfaces", NET_SLOTS.len())]
    TooMany {
        /// The one too many.
        interface: String,
    },
    /// Two sandboxes cannot have one namespace.
    #[error(
        "the network namespace is another sandbox's already; a container shares one only within its pod \
         (Docker: --network container:NAME works for none with a machine of its own)"
    )]
    InUse,
    /// A device of the host.
    #[error("{device}: {source}")]
    Device {
        /// Its path.
        device: &'static str,
        /// Why it cannot be used.
        #[source]
        source: io::Error,
    },
    /// A change in the namespace that the kernel refuses.
    #[error("{what} {on}: {source}")]
    Step {
        /// What was to be done.
        what: &'static str,
        /// With which interface.
        on: String,
        /// Why not.
        #[source]
        source: Refusal,
    },
    /// The monitor does not plug it in or out.
    #[error("interface {interface:?}: {source}")]
    Monitor {
        /// Its name.
        interface: String,
        /// Why not.
        #[source]
        source: MonitorError,
    },
    /// Nothing takes what the guest asks Docker's name server.
    #[error("carrying queries to Docker's name server: {0}")]
    Resolver(#[source] VsockError),
    /// The guest's namespace is not what it should be.
    #[error("the guest's network: {0}")]
    Guest(#[source] AgentError),
}

/// The machine as its network needs it.
pub trait Machine: Sync {
    /// Plugs an interface in.
    fn add_net(
        &self,
        net: &NetConfig,
        taps: &[BorrowedFd<'_>],
        vhost: &[BorrowedFd<'_>],
    ) -> impl Future<Output = Result<(), MonitorError>> + Send;
    /// Takes one out that the guest has let go of.
    fn remove_net(&self, slot: u8) -> impl Future<Output = Result<(), MonitorError>> + Send;
    /// Where connections of the guest to a port of the host arrive.
    fn listen(&self, port: u32) -> Result<UnixListener, VsockError>;
    /// Makes the guest's namespace what it should be.
    fn apply(&self, wanted: &SyncNetworkRequest) -> impl Future<Output = Result<(), AgentError>> + Send;
}

/// A sandbox's network. [`Network::close`] takes back what it has in the namespace.
pub struct Network {
    host: Arc<Host>,
    queue_pairs: u8,
    settings: config::Network,
    /// Held by who compares namespace and machine.
    syncing: tokio::sync::Mutex<()>,
    state: Mutex<State>,
}

/// The namespace, and what speaks to its kernel.
struct Host {
    namespace: Namespace,
    socket: Mutex<Socket>,
}

#[derive(Default)]
struct State {
    /// By the number of the interface on the host.
    carried: BTreeMap<u32, Carried>,
    /// What the guest was told last.
    told: Option<SyncNetworkRequest>,
    /// Once Docker's name server has been seen, which is there again when dockerd is.
    resolver: Option<resolver::Relay>,
    /// The one that follows the namespace's changes.
    follower: Option<AbortHandle>,
    closed: bool,
}

impl Network {
    /// Opens the namespace a specification names, or makes one, and looks whether
    /// it can be a guest's. Has to be called where waiting for the kernel harms nobody.
    pub fn open(
        wanted: Option<&HostNetwork>,
        vcpus: u8,
        settings: &config::Network,
    ) -> Result<Self, NetworkError> {
        let namespace = match wanted {
            Some(wanted) => Namespace::open(&wanted.field, &wanted.path)?,
            None => Namespace::new()?,
        };
        let socket = namespace.socket()?;
        Ok(Self {
            host: Arc::new(Host { namespace, socket: Mutex::new(socket) }),
            queue_pairs: vcpus.clamp(1, MOST_QUEUE_PAIRS),
            settings: settings.clone(),
            syncing: tokio::sync::Mutex::default(),
            state: Mutex::default(),
        })
    }

    /// The namespace.
    pub fn namespace(&self) -> &Namespace {
        &self.host.namespace
    }

    /// Prepares what is in the namespace before the machine boots, for the monitor
    /// to inherit; [`Network::booted`] follows. Has to be called where waiting for
    /// the kernel harms nobody.
    pub fn prepare(&self) -> Result<(), NetworkError> {
        let seen = self.host.observe()?;
        for link in self.missing(&seen)? {
            let slot = self.free_slot(&link)?;
            let carried = self.carry(&link, slot)?;
            self.state().carried.insert(link.index, carried);
        }
        Ok(())
    }

    /// What the monitor is to inherit, with the descriptors' numbers in this process.
    pub fn inherited(&self) -> Vec<InheritedNet> {
        let numbers = |fds: Vec<BorrowedFd<'_>>| fds.iter().map(AsRawFd::as_raw_fd).collect();
        let state = self.state();
        let inherited = |carried: &Carried| InheritedNet {
            net: carried.config.clone(),
            taps: numbers(carried.tap.queues()),
            vhost: numbers(carried.tap.vhost()),
        };
        state.carried.values().map(inherited).collect()
    }

    /// The monitor has its descriptors.
    pub fn booted(&self) {
        for carried in self.state().carried.values_mut() {
            carried.tap.handed_over();
        }
    }

    /// Makes the machine's interfaces those of the namespace, and the guest's
    /// namespace like it. What was not done is taken back; calling it again does
    /// what is missing.
    pub async fn sync(self: &Arc<Self>, machine: &impl Machine) -> Result<(), NetworkError> {
        let _syncing = self.syncing.lock().await;
        if self.state().closed {
            return Ok(());
        }
        let seen = self.on_a_thread(|network| network.host.observe()).await?;
        if self.state().carried.is_empty() && self.state().told.is_none() && seen.is_bare() {
            return Ok(());
        }
        let mut added = Vec::new();
        let applied = async {
            self.add_missing(machine, &seen, &mut added).await?;
            self.follow_resolver(machine, &seen).await?;
            self.apply(machine, &seen).await
        };
        let applied = applied.await;
        if applied.is_err() {
            for index in added {
                self.take_out(machine, index).await;
            }
            return applied;
        }
        let gone: Vec<u32> = {
            let state = self.state();
            let gone = |(index, carried): &(&u32, &Carried)| {
                !seen.links.get(index).is_some_and(|link| carried.is_for(link))
            };
            state.carried.iter().filter(gone).map(|(index, _)| *index).collect()
        };
        for index in gone {
            self.take_out(machine, index).await;
        }
        self.follow_mtus(&seen).await
    }

    /// Plugs in what is not there yet; `added` are those that were.
    async fn add_missing(
        self: &Arc<Self>,
        machine: &impl Machine,
        seen: &Observed,
        added: &mut Vec<u32>,
    ) -> Result<(), NetworkError> {
        for link in self.missing(seen)? {
            // The guest still has the one that was there under its number.
            if self.state().carried.contains_key(&link.index) {
                self.let_go(machine, link.index).await?;
            }
            let slot = self.free_slot(&link)?;
            let index = link.index;
            let mut carried = self.on_a_thread(move |network| network.carry(&link, slot)).await?;
            let plugged = machine.add_net(&carried.config, &carried.tap.queues(), &carried.tap.vhost()).await;
            carried.tap.handed_over();
            if let Err(source) = plugged {
                let interface = carried.name.clone();
                self.on_a_thread(move |_| drop(carried)).await;
                return Err(NetworkError::Monitor { interface, source });
            }
            added.push(index);
            let late = {
                let mut state = self.state();
                match state.closed {
                    true => Some(carried),
                    false => state.carried.insert(index, carried),
                }
            };
            if let Some(late) = late {
                self.on_a_thread(move |_| drop(late)).await;
            }
        }
        Ok(())
    }

    /// Has Docker's name server reach the guest, and others' answers reach it.
    async fn follow_resolver(
        self: &Arc<Self>,
        machine: &impl Machine,
        seen: &Observed,
    ) -> Result<(), NetworkError> {
        if self.state().resolver.is_none() {
            if !seen.resolver {
                return Ok(());
            }
            let relay = resolver::Relay::start(machine, &self.host)?;
            self.state().resolver = Some(relay);
        }
        if self.state().carried.values().any(|carried| !carried.lets_answers_through) {
            self.on_a_thread(|network| {
                network.state().carried.values_mut().for_each(Carried::let_answers_through);
            })
            .await;
        }
        Ok(())
    }

    /// Tells the guest, unless it knows.
    async fn apply(&self, machine: &impl Machine, seen: &Observed) -> Result<(), NetworkError> {
        let wanted = {
            let state = self.state();
            let known = |(index, carried): (&u32, &Carried)| {
                seen.links
                    .get(index)
                    .is_some_and(|link| carried.is_for(link))
                    .then_some((*index, carried.config.slot))
            };
            SyncNetworkRequest {
                resolver: state.resolver.is_some(),
                ..seen.wanted(&state.carried.iter().filter_map(known).collect())
            }
        };
        if self.state().told.as_ref() == Some(&wanted) {
            return Ok(());
        }
        // What is in force after an error is not known.
        self.state().told = None;
        machine.apply(&wanted).await.map_err(NetworkError::Guest)?;
        self.state().told = Some(wanted);
        Ok(())
    }

    /// Has the guest let go of one interface, and takes it out.
    async fn let_go(self: &Arc<Self>, machine: &impl Machine, index: u32) -> Result<(), NetworkError> {
        let Some(mut told) = self.state().told.take() else {
            self.take_out(machine, index).await;
            return Ok(());
        };
        let slot = self.state().carried.get(&index).map(|carried| u32::from(carried.config.slot));
        let name = told.interfaces.iter().find(|interface| Some(interface.slot) == slot);
        let name = name.map(|interface| interface.name.clone()).unwrap_or_default();
        told.interfaces.retain(|interface| Some(interface.slot) != slot);
        told.neighbours.retain(|neighbour| neighbour.interface != name);
        told.routes.retain(|route| route.next_hops.iter().all(|hop| hop.interface != name));
        machine.apply(&told).await.map_err(NetworkError::Guest)?;
        self.take_out(machine, index).await;
        Ok(())
    }

    /// Takes an interface out of the machine that the guest has let go of, or that
    /// it is not to have.
    async fn take_out(self: &Arc<Self>, machine: &impl Machine, index: u32) {
        let Some(carried) = self.state().carried.remove(&index) else { return };
        if let Err(error) = machine.remove_net(carried.config.slot).await {
            log::warn!("interface {:?} stays plugged in: {error}", carried.name);
        }
        self.on_a_thread(move |_| drop(carried)).await;
    }

    /// Interfaces the machine has none for.
    fn missing(&self, seen: &Observed) -> Result<Vec<Link>, NetworkError> {
        let state = self.state();
        let ours = |tap: &u32| state.carried.values().any(|carried| carried.tap.index == *tap);
        if !seen.taps.iter().all(ours) {
            return Err(NetworkError::InUse);
        }
        let is_missing = |link: &&Link| {
            let is_carried = state.carried.get(&link.index).is_some_and(|carried| carried.is_for(link));
            link.kind == Kind::Ethernet && !is_carried
        };
        Ok(seen.links.values().filter(is_missing).cloned().collect())
    }

    fn free_slot(&self, link: &Link) -> Result<u8, NetworkError> {
        let state = self.state();
        let is_free = |slot: &u8| state.carried.values().all(|carried| carried.config.slot != *slot);
        NET_SLOTS
            .into_iter()
            .find(is_free)
            .ok_or_else(|| NetworkError::TooMany { interface: link.name.clone() })
    }

    fn carry(&self, link: &Link, slot: u8) -> Result<Carried, NetworkError> {
        let config = NetConfig {
            slot,
            mac: link.mac.as_slice().try_into().unwrap_or_default(),
            // It may be changed while the container runs.
            mtu: 0,
            queue_pairs: self.queue_pairs,
            receive: self.settings.receive,
            transmit: self.settings.transmit,
        };
        Carried::create(&self.host, link, config, self.settings.vhost)
    }

    /// A tap has its interface's MTU.
    async fn follow_mtus(self: &Arc<Self>, seen: &Observed) -> Result<(), NetworkError> {
        let mut changed = Vec::new();
        for (index, carried) in &mut self.state().carried {
            if let Some(link) = seen.links.get(index).filter(|link| link.mtu != carried.mtu) {
                carried.mtu = link.mtu;
                changed.push((carried.tap.index, link.clone()));
            }
        }
        if changed.is_empty() {
            return Ok(());
        }
        self.on_a_thread(move |network| {
            for (tap, link) in changed {
                tap::set_mtu(&network.host.socket(), tap, link.mtu).map_err(|source| NetworkError::Step {
                    what: "setting the MTU of the tap of",
                    on: link.name,
                    source,
                })?;
            }
            Ok(())
        })
        .await
    }

    async fn on_a_thread<T: Send + 'static>(
        self: &Arc<Self>,
        work: impl FnOnce(&Self) -> T + Send + 'static,
    ) -> T {
        let network = self.clone();
        // A panic on that thread is a fault of ours.
        spawn_blocking(move || work(&network))
            .await
            .unwrap_or_else(|error| std::panic::resume_unwind(error.into_panic()))
    }

    /// Has a sandbox follow what changes in the namespace, until it is closed.
    /// Calling it again does nothing.
    pub fn follow(&self, sandbox: Weak<Sandbox>) -> Result<(), NetworkError> {
        let mut state = self.state();
        if state.closed || state.follower.is_some() {
            return Ok(());
        }
        let watch = Watch::begin(self)?;
        state.follower = Some(tokio::spawn(follow(watch, sandbox)).abort_handle());
        Ok(())
    }

    /// Takes everything back that is in the namespace for the machine. Has to be
    /// called where waiting for the kernel harms nobody; calling it again does nothing.
    pub fn close(&self) {
        let carried = {
            let mut state = self.state();
            state.closed = true;
            if let Some(follower) = state.follower.take() {
                follower.abort();
            }
            state.resolver = None;
            std::mem::take(&mut state.carried)
        };
        drop(carried);
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Network {
    fn drop(&mut self) {
        self.close();
    }
}

impl Host {
    fn observe(&self) -> Result<Observed, NetworkError> {
        Observed::read(&self.namespace, &self.socket())
    }

    fn socket(&self) -> MutexGuard<'_, Socket> {
        self.socket.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// An interface that the machine has one for. Dropping it gives the interface
/// back to the namespace's own network stack.
struct Carried {
    host: Arc<Host>,
    name: String,
    identity: (u32, Option<u32>),
    config: NetConfig,
    mtu: u32,
    tap: Tap,
    /// To the guest last.
    redirects: Vec<Redirect>,
    /// See [`answers`].
    lets_answers_through: bool,
}

impl Carried {
    fn create(
        host: &Arc<Host>,
        link: &Link,
        config: NetConfig,
        vhost: config::Vhost,
    ) -> Result<Self, NetworkError> {
        let socket = host.socket();
        let place = (config.slot, link.mtu);
        let tap = Tap::create(&host.namespace, &socket, place, config.queue_pairs, vhost)?;
        let (tap_index, redirects) = (tap.index, Vec::with_capacity(2));
        let mut carried = Self {
            host: host.clone(),
            name: link.name.clone(),
            identity: link.identity(),
            config,
            mtu: link.mtu,
            tap,
            redirects,
            lets_answers_through: false,
        };
        for (from, to, what) in [
            (tap_index, link.index, "redirecting frames to"),
            (link.index, tap_index, "redirecting frames from"),
        ] {
            let redirect = || Redirect::create(&socket, from, to);
            let made = match from == link.index {
                true => tap::keeping_queue(&socket, link, redirect),
                false => redirect(),
            };
            match made {
                Ok(redirect) => carried.redirects.push(redirect),
                Err(source) => {
                    drop(socket);
                    return Err(NetworkError::Step { what, on: link.name.clone(), source });
                }
            }
        }
        drop(socket);
        Ok(carried)
    }

    /// Has Docker's name server hear what others answer. Without that it still knows the
    /// names of Docker's own.
    fn let_answers_through(&mut self) {
        if std::mem::replace(&mut self.lets_answers_through, true) {
            return;
        }
        let Some(to_guest) = self.redirects.last() else { return };
        let program = match answers::load(self.tap.index) {
            Ok(program) => program,
            Err(error) => {
                return log::warn!("interface {:?}: no names from outside by Docker: {error}", self.name);
            }
        };
        if let Err(refusal) = to_guest.except(&self.host.socket(), program.as_fd()) {
            log::warn!("interface {:?}: no names from outside by Docker: {refusal}", self.name);
        }
    }

    /// Whether it stands in for this very interface.
    fn is_for(&self, link: &Link) -> bool {
        self.identity == link.identity()
    }
}

impl Drop for Carried {
    fn drop(&mut self) {
        let socket = self.host.socket();
        for redirect in self.redirects.drain(..).rev() {
            redirect.remove(&socket);
        }
    }
}

/// Whether this host can carry an interface: tries it in a namespace of its own.
pub fn try_out() -> Result<(), NetworkError> {
    let settings = config::Network { vhost: config::Vhost::Off, receive: None, transmit: None };
    let network = Network::open(None, 1, &settings)?;
    let socket = network.host.socket();
    let tap = Tap::create(network.namespace(), &socket, (NET_SLOTS.start, 1500), 1, settings.vhost)?;
    let lo = redirect::index_of(&socket, "lo");
    let tried = lo.and_then(|lo| Redirect::create(&socket, lo, tap.index));
    let failed = |source| NetworkError::Step { what: "redirecting frames from", on: "lo".into(), source };
    tried.map(drop).map_err(failed)
}

async fn follow(mut watch: Watch, sandbox: Weak<Sandbox>) {
    loop {
        if let Err(error) = watch.changed().await {
            return log::error!("changes of the network namespace are not followed any more: {error}");
        }
        let Some(sandbox) = sandbox.upgrade() else { return };
        // Half of somebody's changes may be no state to be in; the rest follows.
        if let Err(error) = sandbox.sync_network().await {
            log::warn!("{error}");
        }
    }
}

/// Takes off what a sandbox whose shim was killed has left in the namespace at
/// `path`; its machine has ended.
pub fn clean_up(path: &Path) -> Result<(), NetworkError> {
    let Ok(namespace) = Namespace::open("", path) else { return Ok(()) };
    let socket = namespace.socket()?;
    let failed = |what| move |source| NetworkError::Read { what, source };
    let links = observe::every_link(&socket).map_err(failed("interfaces"))?;
    // Somebody else's by now.
    if links.iter().any(Link::is_our_tap) {
        return Ok(());
    }
    for link in links {
        redirect::clean_up(&socket, link.index).map_err(failed("filters"))?;
    }
    Ok(())
}
