//! The process on the host that stands for a container (docs/decisions/0602).
//!
//! Clients use a task's pid as they do with containers on the host: they open
//! `/proc/PID/ns/net`, kill it, look whether it is still there. So each container
//! has a process that is in its sandbox's network namespace and cgroup, does
//! nothing, and ends when the container has ended; when somebody ends it, the
//! container ends.

use std::{
    ffi::CString,
    fs, io,
    ops::Range,
    os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd},
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use nix::{
    sched::{CloneFlags, setns},
    sys::{
        signal::{SigSet, SigmaskHow, Signal, kill, sigprocmask},
        wait::{WaitPidFlag, waitpid},
    },
    unistd::{ForkResult, Pid, fork, pipe, setsid},
};
use tokio::io::unix::AsyncFd;

use crate::{
    capabilities,
    cgroup::HostCgroup,
    process_id::{ProcessId, pidfd_open, wait_for_end},
};

/// How long one that was killed may take to end.
const END_LIMIT: Duration = Duration::from_secs(2);
/// What tools show as its name.
pub(crate) const NAME: &std::ffi::CStr = c"rvm-container";

/// A container's process on the host. Dropping it ends it.
pub struct Holder {
    id: ProcessId,
    pidfd: AsyncFd<OwnedFd>,
    ended: AtomicBool,
}

impl Holder {
    /// Starts one in the cgroups with these `procs` files and in the namespace
    /// `network`. It dies with the calling thread, which has to
    /// be the process's main thread. [`Holder::ready`] must follow.
    pub fn start(network: BorrowedFd, procs: &[CString]) -> io::Result<Starting> {
        let (ready, done) = pipe()?;
        let parent = std::process::id();
        let network = network.as_raw_fd();
        let environment = environment()?;
        // SAFETY: until it is killed the child makes system calls only, and
        // allocates nothing.
        let child = match unsafe { fork() }? {
            ForkResult::Child => {
                // SAFETY: the caller's descriptor is open in this copy of the table.
                let network = unsafe { BorrowedFd::borrow_raw(network) };
                let problem = match settle(parent, network, procs) {
                    Ok(()) => 0,
                    Err(error) => error.raw_os_error().unwrap_or(libc::EIO),
                };
                // SAFETY: it is this copy's alone, and nothing here reads it any more.
                unsafe { std::ptr::write_bytes(environment.start as *mut u8, 0, environment.len()) };
                let _ = nix::unistd::write(&done, &problem.to_ne_bytes());
                // SAFETY: nothing in this process uses a descriptor any more.
                unsafe { libc::syscall(libc::SYS_close_range, 0, libc::c_uint::MAX, 0) };
                loop {
                    // SAFETY: pause(2) takes nothing.
                    unsafe { libc::pause() };
                }
            }
            ForkResult::Parent { child } => child,
        };
        drop(done);
        let pid = child.as_raw().cast_unsigned();
        let pidfd = pidfd_open(pid).inspect_err(|_| {
            let _ = kill(child, Signal::SIGKILL);
        })?;
        let watched = || -> io::Result<_> {
            // SAFETY: the AsyncFd owns the descriptor, which stays open and the
            // same for as long as it is registered.
            let watched = unsafe { AsyncFd::register(pidfd.try_clone()?) }.map_err(io::Error::from)?;
            Ok((ProcessId::of(pid)?, watched))
        };
        match watched() {
            Ok((id, pidfd)) => {
                Ok(Starting { holder: Arc::new(Self { id, pidfd, ended: AtomicBool::new(false) }), ready })
            }
            Err(error) => {
                end(child, pidfd.as_fd());
                Err(error)
            }
        }
    }

    /// The process.
    pub fn id(&self) -> ProcessId {
        self.id
    }

    /// Waits until somebody has ended it.
    pub async fn killed(&self) {
        // An error would mean that the runtime is going down.
        let _ = self.pidfd.readable().await;
    }

    /// Ends it: its pid is gone afterwards, unless somebody has frozen it. Calling it
    /// again does nothing.
    pub fn end(&self) {
        if !self.ended.swap(true, Ordering::Relaxed) {
            end(Pid::from_raw(self.id.pid.cast_signed()), self.pidfd.get_ref().as_fd());
        }
    }
}

impl Drop for Holder {
    fn drop(&mut self) {
        self.end();
    }
}

/// A holder that is on its way to where it belongs.
pub struct Starting {
    holder: Arc<Holder>,
    ready: OwnedFd,
}

impl Starting {
    /// The process.
    pub fn holder(&self) -> &Arc<Holder> {
        &self.holder
    }

    /// Waits until it is there.
    pub async fn ready(self) -> io::Result<Arc<Holder>> {
        let mut receiver = tokio::net::unix::pipe::Receiver::from_owned_fd(self.ready)?;
        let mut problem = [0; size_of::<i32>()];
        tokio::io::AsyncReadExt::read_exact(&mut receiver, &mut problem).await?;
        match i32::from_ne_bytes(problem) {
            0 => Ok(self.holder),
            errno => Err(io::Error::from_raw_os_error(errno)),
        }
    }
}

/// In the child: everything but waiting.
fn settle(parent: u32, network: BorrowedFd, procs: &[CString]) -> io::Result<()> {
    // SAFETY: PR_SET_PDEATHSIG takes a signal number and no pointer.
    if unsafe { libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL) } != 0 {
        return Err(io::Error::last_os_error());
    }
    if nix::unistd::getppid().as_raw().cast_unsigned() != parent {
        return Err(io::Error::from_raw_os_error(libc::ESRCH));
    }
    // Whatever can be blocked: it has handlers of a runtime that is not there.
    sigprocmask(SigmaskHow::SIG_BLOCK, Some(&SigSet::all()), None)?;
    let _ = setsid();
    // SAFETY: PR_SET_NAME reads a C string of at most 16 bytes.
    unsafe { libc::prctl(libc::PR_SET_NAME, NAME.as_ptr()) };
    HostCgroup::enter(procs)?;
    setns(network, CloneFlags::CLONE_NEWNET)?;
    nix::unistd::chdir(c"/")?;
    // SAFETY: PR_SET_DUMPABLE takes a number.
    unsafe { libc::prctl(libc::PR_SET_DUMPABLE, 0) };
    capabilities::NONE.keep_for_good()
}

/// Where this process has the environment it was started with, as `/proc/PID/environ`
/// shows it: containerd's, which is nobody's business in a process that stands for a
/// container.
fn environment() -> io::Result<Range<usize>> {
    // proc(5): env_start and env_end, counted from the state, the third field.
    const START: usize = 50 - 3;
    let stat = fs::read_to_string("/proc/self/stat")?;
    let fields = stat.rsplit_once(") ").map(|(_, rest)| rest).unwrap_or_default();
    let mut places = fields.split(' ').skip(START).map_while(|field| field.parse().ok());
    match (places.next(), places.next()) {
        (Some(start), Some(end)) if start <= end => Ok(start..end),
        _ => Err(io::Error::new(io::ErrorKind::InvalidData, "unexpected /proc/self/stat")),
    }
}

/// Kills a child and collects it.
fn end(child: Pid, pidfd: BorrowedFd) {
    let _ = kill(child, Signal::SIGKILL);
    match wait_for_end(pidfd, END_LIMIT) {
        Ok(true) => drop(waitpid(child, Some(WaitPidFlag::WNOHANG))),
        _ => log::error!("{child}, the process of a container, does not end though it was killed"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn it_is_named_knows_nothing_and_goes() {
        if !nix::unistd::geteuid().is_root() {
            return;
        }
        let of = pidfd_open(std::process::id()).unwrap();
        let holder = Holder::start(of.as_fd(), &[]).unwrap().ready().await.unwrap();
        let file = |name: &str| fs::read(format!("/proc/{}/{name}", holder.id().pid)).unwrap();
        assert_eq!(file("comm"), b"rvm-container\n");
        assert!(!fs::read("/proc/self/environ").unwrap().is_empty());
        assert!(file("environ").iter().all(|byte| *byte == 0));
        let status = String::from_utf8(file("status")).unwrap();
        let field = |name: &str| status.lines().find_map(|line| line.strip_prefix(name)).unwrap().trim();
        for set in ["CapInh:", "CapPrm:", "CapEff:", "CapBnd:", "CapAmb:"] {
            assert_eq!(field(set), "0000000000000000", "{status}");
        }
        assert_eq!(field("NoNewPrivs:"), "1");
        holder.end();
        assert!(!holder.id().is_alive());
    }
}
