//! The running machine: its vCPU threads, and the thread that listens to its
//! owner (requests, the owner's end), to others (counters, signals) and to its end.

use std::collections::{BTreeMap, HashMap};
use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::sync::{Arc, PoisonError};
use std::time::{Duration, Instant};

use rvm_protocol::vmm::{ExitCounts, Metrics, Request, Response};
use thiserror::Error;
use vm_memory::GuestMemoryRegion;
use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};

use crate::arch::vendor::Vendor;
use crate::buses::Buses;
use crate::control::Served;
use crate::control::channel::OwnerChannel;
use crate::control::socket::ReadOnlySocket;
use crate::devices::virtio::fs::FsMeter;
use crate::devices::virtio::net::NetControl;
use crate::hotplug::Hotplug;
use crate::kvm::Vm;
use crate::kvm::state::VmState;
use crate::memory::{GuestRam, Resident, Room};
use crate::process::owned;
use crate::snapshot::{self, MachineState, SnapshotError};
use crate::timeline::Timeline;
use crate::vcpu::exits::End;
use crate::vcpu::thread::{EndReport, VcpuThread};
use crate::vcpu::{Vcpu, VcpuError, VcpuFactory};

/// Why a machine could not be run.
#[derive(Debug, Error)]
pub enum RunError {
    /// A vCPU's thread could not be started.
    #[error("a vCPU's thread could not be started")]
    Thread(#[source] io::Error),
    /// Events cannot be waited for.
    #[error("the event loop failed")]
    Events(#[source] io::Error),
}

/// Everything built, nothing running yet.
pub struct Machine {
    /// The VM.
    pub vm: Arc<Vm>,
    /// Its memory; outlives the vCPUs.
    pub memory: GuestRam,
    /// Its devices.
    pub buses: Arc<Buses>,
    /// Its vCPUs.
    pub vcpus: Vec<Vcpu>,
    /// Makes those that come later.
    pub more_vcpus: VcpuFactory,
    /// What its shares have done.
    pub shares: Vec<FsMeter>,
    /// Slots of its disks, by serial.
    pub disks: HashMap<String, usize>,
    /// Its network interfaces, by slot.
    pub nets: BTreeMap<u8, NetControl>,
    /// The socket for those who look.
    pub socket: Option<ReadOnlySocket>,
    /// How much of its memory it has.
    pub resident: Resident,
    /// The start so far.
    pub timeline: Arc<Timeline>,
}

/// How long devices may take to stand still or to stop. Only the host's own
/// storage keeps one that long in a request.
const PATIENCE: Duration = Duration::from_millis(800);

/// Signals that end in order a machine that nobody owns. An owner ends it itself, after
/// the guest has written what belongs on the host: it is sent them too when the host shuts
/// down.
const STOP_SIGNALS: [libc::c_int; 2] = [libc::SIGTERM, libc::SIGINT];

impl Machine {
    /// Runs the machine to its end: the guest's own, a request's, its owner's or, where it
    /// has none, one of the `signals`. Everything is stopped when it returns.
    pub fn run(self, signals: StopSignals, channel: Option<OwnerChannel>) -> Result<End, RunError> {
        let Self { vm, memory, buses, vcpus, more_vcpus, shares, disks, nets, socket, resident, timeline } =
            self;
        let report = Arc::new(EndReport::new().map_err(RunError::Events)?);
        let events =
            Events::new(&report, channel.as_ref(), socket.as_ref(), signals).map_err(RunError::Events)?;
        let hotplug = Hotplug::new(memory.clone(), Arc::clone(&vm), vcpus.len(), disks, nets);
        let mut owned = Owned {
            threads: Vec::new(),
            paused: false,
            buses,
            more_vcpus,
            report,
            shares,
            hotplug,
            memory,
            resident,
            timeline,
        };
        let started = vcpus.into_iter().try_for_each(|vcpu| owned.start(vcpu));
        if owned.more_vcpus.vendor() == Vendor::Amd
            && let Err(e) = vm.deny_old_counters()
        {
            log::warn!("{e}");
        }
        let result = match started {
            Ok(()) => listen(&events, &mut owned, channel, socket),
            Err(e) => Err(RunError::Thread(e)),
        };
        let buses = owned.stop();
        // The vCPUs have ended; now what they could have called for.
        buses.pci.shut_down(Instant::now() + PATIENCE);
        drop(buses);
        drop(vm);
        result
    }
}

/// What requests are about.
struct Owned {
    threads: Vec<VcpuThread>,
    paused: bool,
    buses: Arc<Buses>,
    more_vcpus: VcpuFactory,
    report: Arc<EndReport>,
    shares: Vec<FsMeter>,
    hotplug: Hotplug,
    memory: GuestRam,
    resident: Resident,
    timeline: Arc<Timeline>,
}

impl Owned {
    fn start(&mut self, vcpu: Vcpu) -> io::Result<()> {
        let (buses, report) = (Arc::clone(&self.buses), Arc::clone(&self.report));
        match VcpuThread::spawn(vcpu, buses, report, Arc::clone(&self.timeline)) {
            Ok(thread) => {
                self.threads.push(thread);
                Ok(())
            }
            Err((vcpu, error)) => {
                if let Some(vcpu) = vcpu {
                    self.more_vcpus.keep(vcpu);
                }
                Err(error)
            }
        }
    }

    /// What the owner's request is answered; `stop` is set where it is to end the machine.
    fn handle(&mut self, request: Request, mut files: Vec<File>, stop: &mut bool) -> Response {
        if let Some(problem) = wrong_number(&request, files.len()) {
            return Response::Error { message: problem.into() };
        }
        let pci = &self.buses.pci;
        match request {
            Request::AddDisk { serial, readonly } => {
                answer(self.hotplug.add_disk(pci, &serial, files.pop(), readonly))
            }
            Request::RemoveDisk { serial } => answer(self.hotplug.remove_disk(pci, &serial)),
            Request::AddPmem => match self.hotplug.add_pmem(pci, files.pop()) {
                Ok(slot) => Response::Plugged { slot },
                Err(error) => answer(Err(error)),
            },
            Request::RemovePmem { slot } => answer(self.hotplug.remove_pmem(pci, slot)),
            Request::AddNet(net) => answer(self.hotplug.add_net(pci, &net, files)),
            Request::RemoveNet { slot } => answer(self.hotplug.remove_net(pci, slot)),
            Request::SetLink { slot, up } => answer(self.hotplug.set_link(slot, up)),
            Request::Save => match files.pop() {
                Some(file) => answer(self.save(&file)),
                None => Response::Error { message: "no descriptor is attached to the request".into() },
            },
            Request::SetHotplugMemory { mib } => answer(self.hotplug.request(pci, Room::Memory, mib)),
            Request::SetHugetlbMemory { mib } => answer(self.hotplug.request(pci, Room::Hugetlb, mib)),
            Request::SetVcpus { count } => answer(self.set_vcpus(count)),
            Request::Metrics => self.metrics(),
            Request::Pause => self.pause(),
            Request::Resume => {
                self.paused = false;
                self.buses.pci.resume();
                self.threads.iter().for_each(VcpuThread::resume);
                Response::Ok
            }
            Request::Stop => {
                *stop = true;
                Response::Ok
            }
        }
    }

    /// First the vCPUs, then what works for them.
    fn pause(&mut self) -> Response {
        self.pause_vcpus();
        if !self.buses.pci.pause(Instant::now() + PATIENCE) {
            self.threads.iter().for_each(VcpuThread::resume);
            let message = "a device is in the middle of a request that the host does not finish".into();
            return Response::Error { message };
        }
        self.paused = true;
        Response::Ok
    }

    fn pause_vcpus(&self) {
        // All are asked first, so that they stop side by side.
        self.threads.iter().for_each(VcpuThread::pause);
        self.threads.iter().for_each(VcpuThread::wait_paused);
        self.buses.catch_up();
    }

    fn save(&self, file: &File) -> Result<(), SnapshotError> {
        if !self.paused {
            return Err(SnapshotError::Unsaved("it is not paused".into()));
        }
        let grown = |room| self.memory.growing(room).is_some_and(|region| region.len() > 0);
        if Room::ALL.into_iter().any(grown) {
            return Err(SnapshotError::Unsaved("memory was plugged in".into()));
        }
        let mut vcpus = Vec::with_capacity(self.threads.len());
        for thread in &self.threads {
            let saved = thread.save(self.more_vcpus.msrs());
            let saved = saved.ok_or_else(|| SnapshotError::Unsaved("a vCPU has ended".into()))?;
            vcpus.push(saved.map_err(SnapshotError::unsaved)?);
        }
        let pci = self
            .buses
            .pci
            .save()
            .map_err(|(slot, error)| SnapshotError::Unsaved(format!("slot {slot}: {error}")))?;
        let state = MachineState {
            memory: self.memory.boot_regions().iter().map(GuestMemoryRegion::len).collect(),
            max_vcpus: self.more_vcpus.possible(),
            vm: VmState::save(&self.buses.vm.fd).map_err(SnapshotError::unsaved)?,
            vcpus,
            pci,
            serial: self.buses.serial.lock().unwrap_or_else(PoisonError::into_inner).save(),
        };
        snapshot::write(file, &state, &self.memory)
    }

    fn set_vcpus(&mut self, count: u8) -> Result<(), SetVcpusError> {
        let most = self.more_vcpus.possible();
        if !(1..=most).contains(&count) {
            return Err(SetVcpusError::Count { count, most });
        }
        while let Some(index) = u8::try_from(self.threads.len()).ok().filter(|index| *index < count) {
            let vcpu = self.more_vcpus.create(index)?;
            self.start(vcpu)?;
            if self.paused {
                self.pause_vcpus();
            }
        }
        Ok(())
    }

    fn metrics(&self) -> Response {
        let mut exits = ExitCounts::default();
        self.threads.iter().for_each(|thread| thread.counters().add_to(&mut exits));
        let boot_bytes: u64 = self.memory.boot_regions().iter().map(GuestMemoryRegion::len).sum();
        let [plugged_bytes, hugetlb_bytes] = Room::ALL.map(|room| self.hotplug.plugged_bytes(room));
        let memory_resident_bytes = match self.resident.bytes(&self.memory) {
            Ok(bytes) => bytes,
            Err(e) => return Response::Error { message: format!("guest memory cannot be counted: {e}") },
        };
        Response::Metrics(Metrics {
            exits,
            start_us: self.timeline.steps_us(),
            memory_bytes: boot_bytes + plugged_bytes + hugetlb_bytes,
            memory_plugged_bytes: plugged_bytes,
            hugetlb_plugged_bytes: hugetlb_bytes,
            memory_resident_bytes,
            nets: self.hotplug.nets(),
            shares: self.shares.iter().map(FsMeter::metrics).collect(),
            pmem_bytes: self.hotplug.pmem_bytes(),
        })
    }

    /// Ends the vCPUs: all are told first; dropping each then waits for it.
    fn stop(self) -> Arc<Buses> {
        self.threads.iter().for_each(VcpuThread::stop);
        self.buses
    }
}

/// Why there are not as many vCPUs as were asked for.
#[derive(Debug, Error)]
enum SetVcpusError {
    #[error("count: {count} given; must be 1 to {most} (max_vcpus)")]
    Count { count: u8, most: u8 },
    #[error(transparent)]
    Create(#[from] VcpuError),
    #[error("a vCPU's thread could not be started")]
    Thread(#[from] io::Error),
}

/// What is wrong with so many descriptors attached to a request.
fn wrong_number(request: &Request, files: usize) -> Option<&'static str> {
    match (request, files) {
        (_, 0) | (Request::AddNet(_), _) => None,
        (Request::AddDisk { .. } | Request::AddPmem | Request::Save, 1) => None,
        (Request::AddDisk { .. } | Request::AddPmem | Request::Save, _) => {
            Some("this request takes one descriptor")
        }
        _ => Some("this request takes no descriptor"),
    }
}

/// What a request that may fail is answered: an error with what caused it, in one
/// line.
fn answer<E: std::error::Error>(done: Result<(), E>) -> Response {
    let Err(error) = done else { return Response::Ok };
    let causes = std::iter::successors(error.source(), |cause| cause.source());
    let message = causes.fold(error.to_string(), |text, cause| format!("{text}: {cause}"));
    Response::Error { message }
}

fn listen(
    events: &Events,
    owned: &mut Owned,
    mut channel: Option<OwnerChannel>,
    mut socket: Option<ReadOnlySocket>,
) -> Result<End, RunError> {
    loop {
        let mut stop = false;
        for event in events.wait().map_err(RunError::Events)? {
            match (event, &mut channel, &mut socket) {
                (Event::GuestEnded, _, _) => stop = true,
                (Event::Signal, _, _) => {
                    log::info!("stopped by a signal");
                    stop = true;
                }
                (Event::Owner, Some(channel), _) => {
                    let mut handle = |request, files| owned.handle(request, files, &mut stop);
                    if channel.serve(&mut handle) == Served::Closed {
                        log::warn!("stopped because its owner is gone");
                        stop = true;
                    }
                }
                (Event::NewClient, _, Some(socket)) => {
                    // What goes wrong with one who only looks ends no machine.
                    if let Some(fd) = socket.accept()
                        && let Err(e) = events.add(fd, fd as u64)
                    {
                        log::warn!("control socket: {e}");
                        socket.turn_away(fd);
                    }
                }
                (Event::Client(fd), _, Some(socket)) => {
                    if socket.serve(fd, &mut || owned.metrics()) == Served::Closed {
                        log::debug!("control client gone");
                    }
                }
                (Event::Owner | Event::NewClient | Event::Client(_), _, _) => {}
            }
        }
        if stop {
            return Ok(owned.report.get().unwrap_or(End::PoweredOff));
        }
    }
}

enum Event {
    GuestEnded,
    Signal,
    Owner,
    NewClient,
    Client(RawFd),
}

// Clients are known by their descriptors, which are far below these.
const GUEST_ENDED: u64 = u64::MAX;
const SIGNAL: u64 = u64::MAX - 1;
const OWNER: u64 = u64::MAX - 2;
const NEW_CLIENT: u64 = u64::MAX - 3;

/// What the listening thread waits for.
struct Events {
    epoll: Epoll,
    signals: StopSignals,
}

impl Events {
    fn new(
        report: &EndReport,
        channel: Option<&OwnerChannel>,
        socket: Option<&ReadOnlySocket>,
        signals: StopSignals,
    ) -> io::Result<Self> {
        let events = Self { epoll: Epoll::new()?, signals };
        events.add(report.event.as_raw_fd(), GUEST_ENDED)?;
        match channel {
            Some(channel) => events.add(channel.fd(), OWNER)?,
            None => events.add(events.signals.0.as_raw_fd(), SIGNAL)?,
        }
        if let Some(socket) = socket {
            events.add(socket.listener_fd(), NEW_CLIENT)?;
        }
        Ok(events)
    }

    /// Watches `fd` for reading; closing it ends that.
    fn add(&self, fd: RawFd, token: u64) -> io::Result<()> {
        self.epoll.ctl(ControlOperation::Add, fd, EpollEvent::new(EventSet::IN, token))
    }

    fn wait(&self) -> io::Result<Vec<Event>> {
        let mut events = [EpollEvent::default(); 16];
        let count = match self.epoll.wait(-1, &mut events) {
            Err(e) if e.kind() == io::ErrorKind::Interrupted => 0,
            result => result?,
        };
        let known = |event: &EpollEvent| match event.data() {
            GUEST_ENDED => Event::GuestEnded,
            SIGNAL => Event::Signal,
            OWNER => Event::Owner,
            NEW_CLIENT => Event::NewClient,
            fd => Event::Client(fd as RawFd),
        };
        Ok(events[..count].iter().map(known).collect())
    }
}

/// SIGTERM and SIGINT, kept until the machine listens to them.
pub struct StopSignals(OwnedFd);

impl StopSignals {
    /// Blocks them for this thread and those it will start. Called first of all,
    /// so that a monitor that is told to end while it builds leaves nothing behind.
    pub fn block() -> Result<Self, RunError> {
        block_stop_signals().map(Self).map_err(RunError::Events)
    }
}

fn block_stop_signals() -> io::Result<OwnedFd> {
    let set = vmm_sys_util::signal::create_sigset(&STOP_SIGNALS)
        .map_err(|e| io::Error::from_raw_os_error(e.errno()))?;
    // SAFETY: `set` is a valid signal set; the old mask is not asked for.
    let blocked = unsafe { libc::pthread_sigmask(libc::SIG_BLOCK, &set, std::ptr::null_mut()) };
    if blocked != 0 {
        return Err(io::Error::from_raw_os_error(blocked));
    }
    // SAFETY: `set` is a valid signal set; -1 asks for a new descriptor.
    let fd = unsafe { libc::signalfd(-1, &set, libc::SFD_CLOEXEC | libc::SFD_NONBLOCK) };
    owned(fd.into())
}
