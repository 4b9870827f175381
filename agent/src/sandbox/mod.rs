//! The sandbox: what this guest is set up as, and the containers in it.

mod clock;
mod cpus;
mod memory;
pub mod network;
mod resolver;
mod set_up;

use std::{
    collections::{HashMap, HashSet},
    os::fd::OwnedFd,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use network::{Network, State as NetworkState};
use resolver::Resolver;
use rvm_protocol::{agent, guest::StreamHeader};
use tokio::{
    sync::{Notify, OnceCell},
    time::timeout,
};

use crate::{
    container::{
        Container,
        create::{Plan, check_process},
        process::Process,
        rootfs,
        shared::{self, Shared},
        sysctl,
        userns::Ids,
    },
    error::{Error, Step, StepError, StepResult, check_id},
    helper::{self, Outcome},
    io::Attachment,
    reaper::{Exit, Reaper},
    storage::{self, BlockDevice, Images, Scratch, share},
    sys::{pci, process::SIGNALS},
};

/// How long the deletion of a container waits for its volumes to be unmounted.
const UNMOUNT_LIMIT: Duration = Duration::from_secs(10);

/// Everything the agent knows.
#[derive(Debug, Default)]
pub struct Sandbox {
    state: Mutex<State>,
    reaper: Reaper,
    memory: memory::Memory,
    network: Network,
    resolver: Resolver,
    shared: OnceCell<Shared>,
    images: Images,
    shutdown: Notify,
}

#[derive(Debug, Default)]
struct State {
    /// By `SetUpSandbox`.
    is_set_up: bool,
    wanted: shared::Wanted,
    /// Names of kernel parameters that a container sets: the host's namespace has no say in them.
    own_sysctl: HashSet<String>,
    /// None: the name is taken by one that is about to be made.
    containers: HashMap<String, Option<Arc<Container>>>,
    /// Those that are being made, and whether they were deleted meanwhile.
    making: HashMap<String, bool>,
    volumes: share::Users,
}

impl State {
    fn check_set_up(&self) -> Result<(), Error> {
        match self.is_set_up {
            true => Ok(()),
            false => Err(Error::Precondition("the sandbox has not been set up".into())),
        }
    }

    /// Takes a name for a container.
    fn reserve(&mut self, id: &str) -> Result<(), Error> {
        self.check_set_up()?;
        if self.containers.contains_key(id) {
            return Err(Error::AlreadyExists(format!("container {id:?} exists")));
        }
        self.containers.insert(id.to_owned(), None);
        self.making.insert(id.to_owned(), false);
        Ok(())
    }

    /// Has a container that is being made removed when it is made; whether there is one.
    fn withdraw(&mut self, id: &str) -> bool {
        let unwanted = self.making.get_mut(id);
        unwanted.map(|unwanted| *unwanted = true).is_some()
    }
}

impl Sandbox {
    /// A sandbox that has not been set up.
    pub fn new() -> Self {
        Self::default()
    }

    /// A sandbox whose share is in place and that needs no setting up.
    pub fn already_set_up(wanted: shared::Wanted) -> Self {
        let state = State { is_set_up: true, wanted, ..State::default() };
        Self { state: Mutex::new(state), ..Self::default() }
    }

    /// The same with other interfaces than the guest's own.
    pub fn with_network(self, network: Network) -> Self {
        Self { network, ..self }
    }

    /// Never held across an `await`.
    fn state(&self) -> MutexGuard<'_, State> {
        // One thread: a poisoned lock means a panic, and that rebooted the VM.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Collects ended processes.
    pub fn reaper(&self) -> &Reaper {
        &self.reaper
    }

    /// Prepares the guest for its first container.
    pub fn set_up(&self, request: &agent::SetUpSandboxRequest) -> Result<(), Error> {
        let ids = match request.uid_mappings.is_empty() && request.gid_mappings.is_empty() {
            true => None,
            false => Some(Ids::new(&request.uid_mappings, &request.gid_mappings)?),
        };
        let mut state = self.state();
        if state.is_set_up {
            return Err(Error::Precondition("the sandbox has been set up already".into()));
        }
        check_id("layers_tag", &request.layers_tag)?;
        check_id("volumes_tag", &request.volumes_tag)?;
        sysctl::check(&request.pod_sysctl)?;
        clock::set(request.wall_clock_ns)?;
        set_up::hostname(&request.hostname)?;
        sysctl::apply_to_guest(&request.sysctl)?;
        storage::prepare()?;
        share::mount(&request.layers_tag, &request.volumes_tag)?;
        state.wanted = shared::Wanted {
            pid: request.shared_pid,
            shm_bytes: request.shm_bytes,
            sysctl: request.pod_sysctl.clone(),
            ids,
        };
        state.is_set_up = true;
        Ok(())
    }

    /// What its containers share.
    async fn shared(&self) -> StepResult<&Shared> {
        let wanted = self.state().wanted.clone();
        self.shared.get_or_try_init(|| Shared::make(wanted)).await
    }

    /// The network namespace its containers share, once one has asked for it.
    pub fn network_namespace(&self) -> StepResult<OwnedFd> {
        let shared = self.shared.get();
        let shared = shared.ok_or_else(|| StepError::Refused("no container shares a network".into()))?;
        shared.network().try_clone().step(|| "keep the sandbox's network namespace")
    }

    /// Makes the network namespace its containers share what the request says.
    pub async fn sync_network(&self, request: &agent::SyncNetworkRequest) -> Result<(), Error> {
        let mut wanted = NetworkState::new(request)?;
        {
            let state = self.state();
            state.check_set_up()?;
            wanted.leave_out(state.wanted.sysctl.keys().chain(&state.own_sysctl));
        }
        let shared = self.shared().await?;
        self.network.sync(wanted, shared.network(), &self.reaper).await?;
        if request.resolver {
            self.resolver.serve(shared.network())?;
        }
        Ok(())
    }

    fn container(&self, id: &str) -> Result<Arc<Container>, Error> {
        let container = self.state().containers.get(id).cloned();
        container.flatten().ok_or_else(|| Error::NotFound(format!("no such container: {id:?}")))
    }

    fn process(&self, process: &agent::ProcessRef) -> Result<Arc<Process>, Error> {
        self.container(&process.container_id)?.process(&process.exec_id)
    }

    /// Makes a container up to the `execve` of its first process. Returns that
    /// process's pid.
    pub async fn create_container(&self, request: agent::CreateContainerRequest) -> Result<u32, Error> {
        check_id("container_id", &request.container_id)?;
        let id = request.container_id.clone();
        self.state().reserve(&id)?;
        let made = self.make_container(&id, request).await;
        let unwanted = self.state().making.remove(&id).unwrap_or_default();
        match made {
            Ok(_) if unwanted => {
                self.remove(&id, &*self.container(&id)?).await?;
                Err(Error::Precondition(format!("container {id:?} was deleted while it was made")))
            }
            Ok(pid) => Ok(pid),
            Err(error) => {
                self.state().containers.remove(&id);
                Err(error)
            }
        }
    }

    /// Lets go of a container's layers and volumes. One that the host's file system keeps stays until that answers, and
    /// nobody waits for it.
    async fn release_volumes(&self, id: &str) {
        let gone = self.state().volumes.release(id);
        if gone.is_empty() {
            return;
        }
        let unmount = || {
            share::unmount_all(&gone);
            Ok(Outcome::default())
        };
        match timeout(UNMOUNT_LIMIT, helper::run(&self.reaper, "unmount volumes", unmount)).await {
            Ok(Ok(_)) => {}
            Ok(Err(error)) => log::warn!("container {id}: {error}"),
            Err(_) => log::warn!("container {id}: a volume is not unmounted within {UNMOUNT_LIMIT:?}"),
        }
    }

    async fn make_container(&self, id: &str, request: agent::CreateContainerRequest) -> Result<u32, Error> {
        let scratch = Arc::new(match request.rootfs.on_volumes {
            true => Scratch::none(),
            false => Scratch::mount(id, &request.scratch, &self.reaper).await?,
        });
        self.state().volumes.add(&request);
        let made = self.make_container_on(id, request, &scratch).await;
        if made.is_err() {
            self.release_volumes(id).await;
            if let Err(error) = scratch.discard(&self.reaper).await {
                log::error!("container {id}: {error}");
            }
            self.images.release(id).await;
        }
        made
    }

    async fn make_container_on(
        &self,
        id: &str,
        request: agent::CreateContainerRequest,
        scratch: &Arc<Scratch>,
    ) -> Result<u32, Error> {
        self.state().own_sysctl.extend(request.sysctl.keys().cloned());
        let shared = match Shared::is_wanted_by(&request) {
            true => Some(self.shared().await?),
            false => None,
        };
        self.find_disks(&request).await?;
        rootfs::check_images(&request.rootfs)?;
        self.images.mount(&request.rootfs.images, id, &self.reaper).await?;
        let mut plan = Plan::new(request, scratch, shared)?;
        plan.open_mounts(&self.reaper).await?;
        let (container, preparing) = Container::create(id, &plan, Arc::clone(scratch), &self.reaper)?;
        self.state().containers.insert(id.to_owned(), Some(Arc::clone(&container)));
        if let Err(error) = container.ready(preparing, &self.reaper).await {
            // What the client asked for failed with this error, not with one
            // that comes after it.
            if let Err(error) = container.remove().await {
                log::error!("container {id}: {error}");
            }
            return Err(error.into());
        }
        let pid = container.process("")?.pid();
        Ok(pid.map_or(0, |pid| pid.as_raw().unsigned_abs()))
    }

    /// Makes the disks known that were plugged in for a container.
    async fn find_disks(&self, request: &agent::CreateContainerRequest) -> StepResult<()> {
        let serials: Vec<&str> = disks(request).filter(|serial| !serial.is_empty()).collect();
        for serial in &serials {
            if BlockDevice::known(serial)?.is_none() {
                let find = || BlockDevice::find_all(serials.iter().copied()).map(|()| Outcome::default());
                return helper::run(&self.reaper, "look for plugged disks", find).await.map(drop);
            }
        }
        Ok(())
    }

    /// Removes a container with everything it owned in the guest.
    async fn remove(&self, id: &str, container: &Container) -> Result<(), Error> {
        container.remove().await?;
        self.release_volumes(id).await;
        container.scratch().unmount(&self.reaper).await?;
        self.images.release(id).await;
        self.state().containers.remove(id);
        Ok(())
    }

    /// Registers a process to be added to a container.
    pub fn create_exec(&self, request: agent::CreateExecRequest) -> Result<(), Error> {
        check_id("exec_id", &request.exec_id)?;
        check_process("process", &request.process)?;
        let container = self.container(&request.container_id)?;
        container.add(&request.exec_id, request.process.unwrap_or_default())
    }

    /// Runs the program of a created process. Returns its pid in the guest's root
    /// pid namespace.
    pub async fn start_process(&self, process: &agent::ProcessRef) -> Result<u32, Error> {
        self.container(&process.container_id)?.start(&process.exec_id, &self.reaper).await
    }

    /// Waits for the end of a process.
    pub async fn wait_process(&self, process: &agent::ProcessRef) -> Result<Exit, Error> {
        // Holding the process would keep it from being forgotten meanwhile.
        let exit = self.process(process)?.exit_receiver();
        let exit = crate::reaper::ended(exit).await;
        exit.ok_or_else(|| Error::NotFound("the process was deleted without having been started".into()))
    }

    /// How many processes of a container the kernel has killed for want of
    /// memory: who is told of an end can tell why.
    pub fn oom_kills(&self, container_id: &str) -> u64 {
        self.container(container_id).map_or(0, |container| container.oom_kills())
    }

    /// Sends a signal.
    pub fn signal_process(&self, request: &agent::SignalProcessRequest) -> Result<(), Error> {
        if !(1..=SIGNALS).contains(&request.signal) {
            let reason = format!("{} must be between 1 and {SIGNALS}", request.signal);
            return Err(Error::invalid("signal", reason));
        }
        let container = self.container(&request.process.container_id)?;
        container.signal(&request.process.exec_id, request.signal as i32, request.all)
    }

    /// Sets the size of a process's terminal.
    pub fn resize_pty(&self, request: &agent::ResizePtyRequest) -> Result<(), Error> {
        self.process(&request.process)?.streams.resize(&request.size)
    }

    /// Ends a process's standard input.
    pub fn close_stdin(&self, process: &agent::ProcessRef) -> Result<(), Error> {
        self.process(process)?.streams.close_stdin();
        Ok(())
    }

    /// Lists the processes of a container.
    pub fn list_processes(&self, container: &agent::ContainerRef) -> Result<Vec<agent::ProcessInfo>, Error> {
        self.container(&container.container_id)?.processes()
    }

    /// Stops the processes of a container where they are.
    pub async fn pause(&self, container: &agent::ContainerRef) -> Result<(), Error> {
        self.container(&container.container_id)?.pause().await
    }

    /// Lets them go on.
    pub fn resume(&self, container: &agent::ContainerRef) -> Result<(), Error> {
        self.container(&container.container_id)?.resume()
    }

    /// Changes the limits of a container that are set in the request.
    pub fn update_resources(&self, request: &agent::UpdateResourcesRequest) -> Result<(), Error> {
        self.container(&request.container_id)?.update(&request.resources)
    }

    /// Waits until so many bytes of memory are plugged in, or no more can be;
    /// returns how many are.
    pub async fn wait_memory(&self, request: &agent::WaitMemoryRequest) -> Result<u64, Error> {
        Ok(self.memory.wait_for(request.plugged_bytes, &self.reaper).await?)
    }

    /// Has the kernel keep so many huge pages ready; returns how many it keeps.
    pub async fn set_huge_pages(&self, count: u64) -> Result<u64, Error> {
        let set = move || memory::set_huge_pages(count).map(|()| Outcome::default());
        helper::run(&self.reaper, "set huge pages apart", set).await?;
        Ok(memory::huge_pages()?)
    }

    /// Brings CPUs up or down until so many are online; returns how many are.
    pub async fn online_cpus(&self, request: &agent::OnlineCpusRequest) -> Result<u32, Error> {
        cpus::check(request.count)?;
        let bring = || cpus::bring_online(request.count).map(|()| Outcome::default());
        helper::run(&self.reaper, "bring up CPUs", bring).await?;
        Ok(cpus::online()?)
    }

    /// Moves the wall clock; returns what it is then, in nanoseconds since the epoch.
    pub fn adjust_clock(&self, request: &agent::AdjustClockRequest) -> Result<i64, Error> {
        Ok(clock::adjust(request.ahead_ns)?)
    }

    /// Lets go of disks that are about to be unplugged.
    pub async fn remove_disks(&self, request: &agent::RemoveDisksRequest) -> Result<(), Error> {
        let agent::RemoveDisksRequest { serials, pmem_slots, .. } = request.clone();
        let remove = move || {
            for serial in &serials {
                if let Some(disk) = BlockDevice::known(serial)? {
                    disk.remove()?;
                }
            }
            pmem_slots.iter().try_for_each(|slot| pci::remove(*slot))?;
            Ok(Outcome::default())
        };
        Ok(helper::run(&self.reaper, "remove disks", remove).await.map(drop)?)
    }

    /// What a container has used.
    pub fn stats(&self, container: &agent::ContainerRef) -> Result<agent::ContainerStats, Error> {
        self.container(&container.container_id)?.stats()
    }

    /// Waits until the kernel has killed more processes of a container than are
    /// known of.
    pub async fn wait_oom(&self, request: &agent::WaitOomRequest) -> Result<u64, Error> {
        self.container(&request.container_id)?.more_oom_kills(request.known).await
    }

    /// Forgets an exec, or removes a container.
    pub async fn delete_process(&self, process: &agent::ProcessRef) -> Result<(), Error> {
        if process.exec_id.is_empty() && self.state().withdraw(&process.container_id) {
            let text = format!("container {:?} is being made, and is removed then", process.container_id);
            return Err(Error::Precondition(text));
        }
        let container = self.container(&process.container_id)?;
        if !process.exec_id.is_empty() {
            return container.remove_added(&process.exec_id);
        }
        container.check_removable()?;
        self.remove(&process.container_id, &container).await
    }

    /// Finds what a stream connection is to carry.
    pub fn attach(&self, header: &StreamHeader) -> Result<Attachment, Error> {
        self.container(&header.container_id)?.process(&header.exec_id)?.streams.attach(header.stream)
    }

    /// Asks for the end of the guest, after the reply to whoever asks.
    pub fn request_shutdown(&self) {
        self.shutdown.notify_one();
    }

    /// Resolves when the end of the guest has been asked for.
    pub async fn shutdown_requested(&self) {
        self.shutdown.notified().await;
    }

    /// Writes everything out and unmounts what was mounted for the sandbox.
    pub async fn release_storage(&self) {
        let containers: Vec<_> = self.state().containers.values().flatten().cloned().collect();
        let release = || {
            nix::unistd::sync();
            containers.iter().for_each(|container| container.scratch().release());
            share::release();
            Ok(Outcome::default())
        };
        if let Err(error) = helper::run(&self.reaper, "write everything out", release).await {
            log::error!("{error}");
        }
    }
}

/// The serials of the disks a container is to have.
fn disks(request: &agent::CreateContainerRequest) -> impl Iterator<Item = &str> {
    let mounts = request.mounts.iter().map(|mount| mount.block_serial.as_str());
    let devices = request.devices.iter().map(|device| device.block_serial.as_str());
    let rules = request.resources.device_rules.iter().map(|rule| rule.block_serial.as_str());
    let limits = request.resources.io_limits.iter().map(|limit| limit.serial.as_str());
    mounts.chain(devices).chain(rules).chain(limits)
}
