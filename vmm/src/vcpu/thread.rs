//! The thread of a vCPU, and how others make it pause, go on or end.
//!
//! A request is put down, then `immediate_exit` is set and the thread gets a
//! signal: if it is in the guest the signal brings it out, if it is about to
//! enter, `immediate_exit` keeps it out. The thread clears `immediate_exit`
//! before it reads the request, so none is lost; between exits it looks at
//! nothing, so an ordinary exit pays nothing for this.

use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::thread::JoinHandleExt;
use std::ptr::NonNull;
use std::sync::atomic::{AtomicU8, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;

use kvm_bindings::kvm_run;
use kvm_ioctls::VcpuFd;
use vmm_sys_util::eventfd::EventFd;
use vmm_sys_util::signal::{SIGRTMIN, register_signal_handler};

use super::Vcpu;
use super::exits::{End, ExitCounters, Next, run_once};
use super::state::VcpuState;
use crate::arch::layout::PAGE_SIZE;
use crate::buses::Buses;
use crate::jail::{self, Duty};
use crate::kvm::KvmError;
use crate::timeline::Timeline;

/// Where vCPUs report how the guest ended; the first report counts.
pub struct EndReport {
    end: Mutex<Option<End>>,
    /// Readable once there is a report.
    pub event: EventFd,
}

impl EndReport {
    /// No report yet.
    pub fn new() -> io::Result<Self> {
        Ok(Self { end: Mutex::new(None), event: EventFd::new(libc::EFD_CLOEXEC | libc::EFD_NONBLOCK)? })
    }

    /// How the guest ended, if it has.
    pub fn get(&self) -> Option<End> {
        self.end.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    fn put(&self, end: End) {
        self.end.lock().unwrap_or_else(PoisonError::into_inner).get_or_insert(end);
        if let Err(e) = self.event.write(1) {
            log::error!("the guest's end cannot be reported: {e}");
        }
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Request {
    Run,
    Pause,
    Stop,
}

struct Desk {
    request: Request,
    parked: bool,
    /// The thread has ended.
    ended: bool,
    /// MSRs to be saved with the rest.
    save: Option<Arc<[u32]>>,
    saved: Option<Result<VcpuState, KvmError>>,
}

struct Shared {
    desk: Mutex<Desk>,
    changed: Condvar,
    immediate_exit: ImmediateExit,
    counters: ExitCounters,
}

impl Shared {
    fn desk(&self) -> MutexGuard<'_, Desk> {
        self.desk.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn wait<'a>(&self, desk: MutexGuard<'a, Desk>) -> MutexGuard<'a, Desk> {
        self.changed.wait(desk).unwrap_or_else(PoisonError::into_inner)
    }
}

/// A running vCPU.
pub struct VcpuThread {
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
}

impl VcpuThread {
    /// Starts `vcpu`, which is given back where that fails. The boot vCPU notes its
    /// first entry of the guest in the timeline.
    pub fn spawn(
        vcpu: Vcpu,
        buses: Arc<Buses>,
        report: Arc<EndReport>,
        timeline: Arc<Timeline>,
    ) -> Result<Self, (Option<Vcpu>, io::Error)> {
        let index = vcpu.index;
        let immediate_exit = match install_kick_handler().and_then(|()| ImmediateExit::of(&vcpu.fd)) {
            Ok(immediate_exit) => immediate_exit,
            Err(error) => return Err((Some(vcpu), error)),
        };
        let shared = Arc::new(Shared {
            desk: Mutex::new(Desk {
                request: Request::Run,
                parked: false,
                ended: false,
                save: None,
                saved: None,
            }),
            changed: Condvar::new(),
            immediate_exit,
            counters: ExitCounters::default(),
        });
        let of_thread = Arc::clone(&shared);
        // All that a thread that does not start has been given is dropped with it.
        let seat = Arc::new(Mutex::new(Some(vcpu)));
        let at_start = Arc::clone(&seat);
        let run = move || {
            jail::take_up(Duty::Vcpu);
            let Some(mut vcpu) = take(&at_start) else { return };
            if vcpu.index == 0 {
                timeline.reached("first_run");
            }
            loop {
                match run_once(&mut vcpu.fd, &buses, &of_thread.counters) {
                    Next::Run => {}
                    Next::Check => {
                        of_thread.immediate_exit.set(false);
                        if !answer(&of_thread, &vcpu.fd) {
                            break;
                        }
                    }
                    Next::End(End::Crashed(cause)) => {
                        report.put(End::Crashed(format!("vCPU {}: {cause}", vcpu.index)));
                        break;
                    }
                    Next::End(end) => {
                        report.put(end);
                        break;
                    }
                }
            }
            // Whoever waits for this vCPU to pause has waited long enough.
            let mut desk = of_thread.desk();
            (desk.parked, desk.ended) = (true, true);
            drop(desk);
            of_thread.changed.notify_all();
        };
        match std::thread::Builder::new().name(format!("vcpu{index}")).spawn(run) {
            Ok(thread) => Ok(Self { shared, thread: Some(thread) }),
            Err(error) => Err((take(&seat), error)),
        }
    }

    /// Asks for a pause; [`wait_paused`](Self::wait_paused) tells when it is there.
    pub fn pause(&self) {
        self.request(Request::Pause);
    }

    /// Waits until the vCPU is between two instructions, or has ended.
    pub fn wait_paused(&self) {
        let mut desk = self.shared.desk();
        while !desk.parked {
            desk = self.shared.wait(desk);
        }
    }

    /// The state of a paused vCPU, with the MSRs of these indices; `None` of one
    /// that has ended.
    pub fn save(&self, msrs: &Arc<[u32]>) -> Option<Result<VcpuState, KvmError>> {
        let mut desk = self.shared.desk();
        desk.save = Some(Arc::clone(msrs));
        self.shared.changed.notify_all();
        while desk.saved.is_none() && !desk.ended {
            desk = self.shared.wait(desk);
        }
        desk.saved.take()
    }

    /// Lets the vCPU go on.
    pub fn resume(&self) {
        self.shared.desk().request = Request::Run;
        self.shared.changed.notify_all();
    }

    /// Asks the vCPU to end; dropping it waits for that.
    pub fn stop(&self) {
        self.request(Request::Stop);
    }

    /// Its counters.
    pub fn counters(&self) -> &ExitCounters {
        &self.shared.counters
    }

    fn request(&self, request: Request) {
        self.shared.desk().request = request;
        self.shared.changed.notify_all();
        self.shared.immediate_exit.set(true);
        if let Some(thread) = &self.thread {
            // SAFETY: the thread has not been joined, so its id is valid even if it has ended.
            unsafe { libc::pthread_kill(thread.as_pthread_t(), SIGRTMIN()) };
        }
    }
}

impl Drop for VcpuThread {
    fn drop(&mut self) {
        self.stop();
        if let Some(thread) = self.thread.take()
            && thread.join().is_err()
        {
            log::error!("a vCPU's thread panicked");
        }
    }
}

fn take(seat: &Mutex<Option<Vcpu>>) -> Option<Vcpu> {
    seat.lock().unwrap_or_else(PoisonError::into_inner).take()
}

/// Does what was asked for; false to end.
fn answer(shared: &Shared, fd: &VcpuFd) -> bool {
    let mut desk = shared.desk();
    loop {
        match desk.request {
            Request::Stop => return false,
            Request::Run => {
                desk.parked = false;
                return true;
            }
            Request::Pause => {
                if !desk.parked {
                    // The guest's watchdogs must not count the pause; a guest
                    // without KVM's clock has none to tell.
                    let _ = fd.kvmclock_ctrl();
                    desk.parked = true;
                    shared.changed.notify_all();
                }
                if let Some(msrs) = desk.save.take() {
                    desk.saved = Some(VcpuState::save(fd, &msrs));
                    shared.changed.notify_all();
                }
                desk = shared.wait(desk);
            }
        }
    }
}

extern "C" fn ignore_kick(_: libc::c_int, _: *mut libc::siginfo_t, _: *mut libc::c_void) {}

/// The signal only has to interrupt `KVM_RUN`.
fn install_kick_handler() -> io::Result<()> {
    register_signal_handler(SIGRTMIN(), ignore_kick).map_err(|e| io::Error::from_raw_os_error(e.errno()))
}

/// A vCPU's `immediate_exit` flag, in a mapping of its own of the page shared
/// with KVM: it stays valid whoever drops the vCPU first.
struct ImmediateExit {
    page: NonNull<kvm_run>,
}

// SAFETY: the page is mapped until drop, and the flag is only accessed atomically.
unsafe impl Send for ImmediateExit {}
// SAFETY: as above.
unsafe impl Sync for ImmediateExit {}

impl ImmediateExit {
    fn of(fd: &VcpuFd) -> io::Result<Self> {
        // SAFETY: a fresh shared mapping of the first page of the vCPU's descriptor.
        let page = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                PAGE_SIZE as usize,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_SHARED,
                fd.as_raw_fd(),
                0,
            )
        };
        match NonNull::new(page) {
            Some(page) if page.as_ptr() != libc::MAP_FAILED => Ok(Self { page: page.cast() }),
            _ => Err(io::Error::last_os_error()),
        }
    }

    fn set(&self, on: bool) {
        // SAFETY: the page is mapped as long as `self`; the place is a projection, not a read.
        let flag = unsafe { &raw mut (*self.page.as_ptr()).immediate_exit };
        // SAFETY: one byte that KVM and this process access atomically.
        unsafe { AtomicU8::from_ptr(flag) }.store(on.into(), Ordering::SeqCst);
    }
}

impl Drop for ImmediateExit {
    fn drop(&mut self) {
        // SAFETY: the mapping was made in `of` and nothing refers to it any more.
        unsafe { libc::munmap(self.page.as_ptr().cast(), PAGE_SIZE as usize) };
    }
}
