//! The running machine: its vCPU threads, and the thread that listens to its
//! owners (control socket, signals, the parent's death) and to its end.

use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::sync::Arc;

use rvm_protocol::vmm::{ExitCounts, Metrics, Request, Response};
use thiserror::Error;
use vm_memory::GuestMemoryRegion;
use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};

use crate::control::{ControlServer, Served};
use crate::hotplug::{Hotplug, HotplugError};
use crate::kvm::Vm;
use crate::machine::Machine;
use crate::memory::{self, GuestRam};
use crate::timeline::Timeline;
use crate::vcpu::Vcpu;
use crate::vcpu::exits::End;
use crate::vcpu::thread::{EndReport, VcpuThread};

/// Why a machine could not be run.
#[derive(Debug, Error)]
pub enum RunError {
    /// A vCPU's thread could not be started.
    #[error("a vCPU's thread could not be started")]
    Thread(#[source] io::Error),
    /// Events cannot be waited for.
    #[error("the event loop failed")]
    Events(#[source] io::Error),
    /// The parent's death could not be watched for.
    #[error("process {pid}, given as the parent, cannot be watched")]
    Parent {
        /// The parent.
        pid: libc::pid_t,
        /// The system's answer.
        #[source]
        source: io::Error,
    },
}

/// Everything built, nothing running yet.
pub struct Vmm {
    /// The VM.
    pub vm: Arc<Vm>,
    /// Its memory; outlives the vCPUs.
    pub memory: GuestRam,
    /// Its devices.
    pub machine: Arc<Machine>,
    /// Its vCPUs.
    pub vcpus: Vec<Vcpu>,
    /// The control socket.
    pub control: Option<ControlServer>,
    /// The start so far.
    pub timeline: Arc<Timeline>,
}

/// Signals that end the machine in order.
const STOP_SIGNALS: [libc::c_int; 2] = [libc::SIGTERM, libc::SIGINT];

impl Vmm {
    /// Runs the machine to its end: the guest's own, a request's, one of the
    /// `signals` or the death of the process `parent`. Everything is stopped
    /// when it returns.
    pub fn run(self, signals: StopSignals, parent: Option<libc::pid_t>) -> Result<End, RunError> {
        let Self { vm, memory, machine, vcpus, control, timeline } = self;
        let report = Arc::new(EndReport::new().map_err(RunError::Events)?);
        let events = Events::new(&report, control.as_ref(), signals, parent)?;
        let threads = vcpus
            .into_iter()
            .map(|vcpu| {
                VcpuThread::spawn(vcpu, Arc::clone(&machine), Arc::clone(&report), Arc::clone(&timeline))
            })
            .collect::<Result<Vec<_>, _>>();
        let result = match threads {
            Ok(threads) => {
                let hotplug = Hotplug::new(memory.clone(), Arc::clone(&vm));
                let owner =
                    Owner { threads, machine: &machine, memory: &memory, hotplug, timeline: &timeline };
                listen(events, owner, control, &report)
            }
            Err(e) => Err(RunError::Thread(e)),
        };
        // The vCPUs have ended; now what they could have called for.
        machine.pci.shut_down();
        drop(machine);
        drop(vm);
        result
    }
}

/// What requests are about.
struct Owner<'a> {
    threads: Vec<VcpuThread>,
    machine: &'a Machine,
    memory: &'a GuestRam,
    hotplug: Hotplug,
    timeline: &'a Timeline,
}

impl Owner<'_> {
    fn handle(&mut self, request: Request, stop: &mut bool) -> Response {
        match request {
            Request::Pause => {
                // All are asked first, so that they stop side by side.
                self.threads.iter().for_each(VcpuThread::pause);
                self.threads.iter().for_each(VcpuThread::wait_paused);
                self.machine.catch_up();
                Response::Ok
            }
            Request::Resume => {
                self.threads.iter().for_each(VcpuThread::resume);
                Response::Ok
            }
            Request::Stop => {
                *stop = true;
                Response::Ok
            }
            Request::Metrics => match self.metrics() {
                Ok(metrics) => Response::Metrics(metrics),
                Err(e) => Response::Error { message: format!("guest memory cannot be counted: {e}") },
            },
            Request::AddDisk { disk } => answer(self.hotplug.add_disk(&self.machine.pci, &disk)),
            Request::SetHotplugMemory { mib } => answer(self.hotplug.request(&self.machine.pci, mib)),
        }
    }

    fn metrics(&self) -> io::Result<Metrics> {
        let mut exits = ExitCounts::default();
        self.threads.iter().for_each(|thread| thread.counters().add_to(&mut exits));
        let boot_bytes: u64 = self.memory.boot_regions().iter().map(GuestMemoryRegion::len).sum();
        let plugged_bytes = self.hotplug.plugged_bytes();
        Ok(Metrics {
            exits,
            start_us: self.timeline.steps_us(),
            memory_bytes: boot_bytes + plugged_bytes,
            memory_plugged_bytes: plugged_bytes,
            memory_resident_bytes: memory::resident_bytes(self.memory)?,
        })
    }
}

/// What a request to plug something in is answered: an error with what caused
/// it, in one line.
fn answer(plugged: Result<(), HotplugError>) -> Response {
    let Err(error) = plugged else { return Response::Ok };
    let error: &dyn std::error::Error = &error;
    let causes = std::iter::successors(error.source(), |cause| cause.source());
    let message = causes.fold(error.to_string(), |text, cause| format!("{text}: {cause}"));
    Response::Error { message }
}

impl Drop for Owner<'_> {
    fn drop(&mut self) {
        // All are told first; dropping each then waits for it.
        self.threads.iter().for_each(VcpuThread::stop);
    }
}

fn listen(
    events: Events,
    mut owner: Owner<'_>,
    mut control: Option<ControlServer>,
    report: &EndReport,
) -> Result<End, RunError> {
    loop {
        let mut stop = false;
        for event in events.wait().map_err(RunError::Events)? {
            match (event, &mut control) {
                (Event::GuestEnded, _) => stop = true,
                (Event::Signal, _) => {
                    log::info!("stopped by a signal");
                    stop = true;
                }
                (Event::ParentDied, _) => {
                    log::warn!("stopped because the parent died");
                    stop = true;
                }
                (Event::NewClient, Some(control)) => {
                    if let Some(fd) = control.accept().map_err(RunError::Events)? {
                        events.add(fd, fd as u64).map_err(RunError::Events)?;
                    }
                }
                (Event::Client(fd), Some(control)) => {
                    let served = control.serve(fd, &mut |request| owner.handle(request, &mut stop));
                    if let Served::Closed = served {
                        log::debug!("control client gone");
                    }
                }
                (Event::NewClient | Event::Client(_), None) => {}
            }
        }
        if stop {
            return Ok(report.get().unwrap_or(End::PoweredOff));
        }
    }
}

enum Event {
    GuestEnded,
    Signal,
    ParentDied,
    NewClient,
    Client(RawFd),
}

// Clients are known by their descriptors, which are far below these.
const GUEST_ENDED: u64 = u64::MAX;
const SIGNAL: u64 = u64::MAX - 1;
const PARENT_DIED: u64 = u64::MAX - 2;
const NEW_CLIENT: u64 = u64::MAX - 3;

/// What the listening thread waits for.
struct Events {
    epoll: Epoll,
    signals: StopSignals,
    /// Only held.
    _parent: Option<OwnedFd>,
}

impl Events {
    fn new(
        report: &EndReport,
        control: Option<&ControlServer>,
        signals: StopSignals,
        parent: Option<libc::pid_t>,
    ) -> Result<Self, RunError> {
        let parent = parent
            .map(|pid| open_process(pid).map_err(|source| RunError::Parent { pid, source }))
            .transpose()?;
        let build = || {
            let epoll = Epoll::new()?;
            let events = Self { epoll, signals, _parent: None };
            events.add(report.event.as_raw_fd(), GUEST_ENDED)?;
            events.add(events.signals.0.as_raw_fd(), SIGNAL)?;
            if let Some(parent) = &parent {
                events.add(parent.as_raw_fd(), PARENT_DIED)?;
            }
            if let Some(control) = control {
                events.add(control.listener_fd(), NEW_CLIENT)?;
            }
            Ok(events)
        };
        let events = build().map_err(RunError::Events)?;
        Ok(Self { _parent: parent, ..events })
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
            PARENT_DIED => Event::ParentDied,
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
    owned(fd)
}

/// A descriptor that becomes readable when process `pid`, our parent, ends.
fn open_process(pid: libc::pid_t) -> io::Result<OwnedFd> {
    // SAFETY: plain system call without pointers.
    let fd = unsafe { libc::syscall(libc::SYS_pidfd_open, pid, 0) };
    let fd = owned(fd as RawFd)?;
    // Only now is it sure that the process is the one we were told of.
    // SAFETY: plain system call.
    if unsafe { libc::getppid() } != pid {
        return Err(io::Error::new(io::ErrorKind::NotFound, "it is not the parent"));
    }
    Ok(fd)
}

fn owned(fd: RawFd) -> io::Result<OwnedFd> {
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the descriptor was just returned to us by the system.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}
