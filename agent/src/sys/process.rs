//! Making, signalling and preparing processes.

use std::{
    os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd},
    sync::{
        OnceLock,
        atomic::{AtomicBool, Ordering},
    },
};

use nix::{
    errno::Errno,
    sys::resource::{Resource, getrlimit, setrlimit},
    unistd::Pid,
};

/// linux/sched.h; libc's own constant overflows its type.
const CLONE_INTO_CGROUP: u64 = 0x2_0000_0000;

/// Signals of Linux, real-time ones included.
pub const SIGNALS: u32 = 64;

/// Whether this process is a child that has not called `execve` yet.
static IN_CHILD: AtomicBool = AtomicBool::new(false);

/// Whether this process is a child made by [`spawn`]: its pid may well be 1, but
/// in a pid namespace of its own.
pub fn in_child() -> bool {
    IN_CHILD.load(Ordering::Relaxed)
}

/// For tests: this process is one that was forked and has one thread.
#[cfg(test)]
pub fn become_child() {
    IN_CHILD.store(true, Ordering::Relaxed);
}

/// A child as its parent sees it.
#[derive(Debug)]
pub struct Child {
    /// Its pid in the agent's pid namespace.
    pub pid: Pid,
    /// Refers to this very process even after its pid is used again.
    pub pidfd: OwnedFd,
}

/// Makes a child in `cgroup` with `clone3` and runs `body` in it, whose result
/// is the child's exit code where it does not call `execve`.
///
/// `body` should only borrow: what it owns is dropped in the child, and the
/// child has closed the descriptors it was not given ([`close_all_except`]).
/// `namespaces` are `CLONE_NEW*` flags. The caller must be the only thread of
/// its process, see the crate's invariants; otherwise this fails with `EDEADLK`.
pub fn spawn(cgroup: BorrowedFd<'_>, namespaces: u64, body: impl FnOnce() -> i32) -> nix::Result<Child> {
    clone_with_pidfd(CLONE_INTO_CGROUP | namespaces, cgroup.as_raw_fd() as u64, body)
}

/// As [`spawn`], in the caller's own cgroup. With clone(2), which filters let
/// through that answer ENOSYS to clone3(2) because they cannot look into its
/// arguments: Docker's is one.
pub fn fork(namespaces: u64, body: impl FnOnce() -> i32) -> nix::Result<Child> {
    let mut pidfd: RawFd = -1;
    let flags = (libc::CLONE_PIDFD | libc::SIGCHLD) as u64 | namespaces;
    // SAFETY: neither memory nor stack is shared; the kernel stores the pidfd
    // where the parent's tid would go otherwise.
    let pid = clone(body, || unsafe { libc::syscall(libc::SYS_clone, flags, 0, &raw mut pidfd, 0, 0) })?;
    // SAFETY: CLONE_PIDFD stored a new descriptor that nobody else owns.
    let pidfd = unsafe { OwnedFd::from_raw_fd(pidfd) };
    Ok(Child { pid, pidfd })
}

/// As [`fork`], but makes a child of the caller's parent, which collects it.
pub fn fork_sibling(namespaces: u64, body: impl FnOnce() -> i32) -> nix::Result<Pid> {
    // Its end is told by the same signal as the caller's.
    let flags = libc::CLONE_PARENT as u64 | namespaces;
    // SAFETY: neither memory nor stack is shared, and no pointer is passed.
    clone(body, || unsafe { libc::syscall(libc::SYS_clone, flags, 0, 0, 0, 0) })
}

fn clone_with_pidfd(flags: u64, cgroup: u64, body: impl FnOnce() -> i32) -> nix::Result<Child> {
    let mut pidfd: RawFd = -1;
    let args = libc::clone_args {
        flags: libc::CLONE_PIDFD as u64 | flags,
        pidfd: (&raw mut pidfd) as u64,
        child_tid: 0,
        parent_tid: 0,
        exit_signal: libc::SIGCHLD as u64,
        stack: 0,
        stack_size: 0,
        tls: 0,
        set_tid: 0,
        set_tid_size: 0,
        cgroup,
    };
    let size = size_of::<libc::clone_args>();
    // SAFETY: `args` is of the size given and outlives the call; neither memory
    // nor stack is shared.
    let pid = clone(body, || unsafe { libc::syscall(libc::SYS_clone3, &raw const args, size) })?;
    // SAFETY: CLONE_PIDFD stored a new descriptor that nobody else owns.
    let pidfd = unsafe { OwnedFd::from_raw_fd(pidfd) };
    Ok(Child { pid, pidfd })
}

/// Runs `body` in the child that `make` makes, a system call without `CLONE_VM`:
/// the child has a copy of this address space and stack and returns as after
/// fork(2).
fn clone(body: impl FnOnce() -> i32, make: impl FnOnce() -> libc::c_long) -> nix::Result<Pid> {
    // "." and ".." and one entry for every thread. A child has one by
    // construction, and not necessarily a /proc.
    if !in_child() && nix::sys::stat::stat("/proc/self/task")?.st_nlink != 3 {
        return Err(Errno::EDEADLK);
    }
    // glibc does not see the clone, so its cached thread id is wrong in the
    // child; nothing the child calls uses it. The process has one thread, so no
    // lock is held by a missing one.
    match Errno::result(make())? {
        0 => {
            IN_CHILD.store(true, Ordering::Relaxed);
            exit_child(body())
        }
        pid => Ok(Pid::from_raw(pid as i32)),
    }
}

/// A child that was made by another child ([`fork_sibling`]). It must not have
/// been collected yet.
pub fn adopt(pid: Pid) -> nix::Result<Child> {
    // SAFETY: takes and keeps no pointer.
    let fd = Errno::result(unsafe { libc::syscall(libc::SYS_pidfd_open, pid.as_raw(), 0) })?;
    // SAFETY: the descriptor is new and nobody else owns it; it fits in an int.
    let pidfd = unsafe { OwnedFd::from_raw_fd(fd as RawFd) };
    Ok(Child { pid, pidfd })
}

/// Waits for a child of one's own: its exit code, or 128 + the signal that ended it.
pub fn wait_for(pid: Pid) -> nix::Result<u32> {
    loop {
        if let Some((_, code)) = wait(pid.as_raw(), 0)? {
            return Ok(code);
        }
    }
}

/// Ends a child at once: no destructors, no `atexit`, which are the parent's.
pub fn exit_child(code: i32) -> ! {
    // SAFETY: `_exit` has no preconditions.
    unsafe { libc::_exit(code) }
}

/// Sends a signal to the process a pidfd refers to.
pub fn send_signal(pidfd: impl AsFd, signal: i32) -> nix::Result<()> {
    // SAFETY: a null siginfo asks the kernel to fill in that of kill(2).
    let result = unsafe {
        libc::syscall(
            libc::SYS_pidfd_send_signal,
            pidfd.as_fd().as_raw_fd(),
            signal,
            std::ptr::null::<libc::siginfo_t>(),
            0,
        )
    };
    Errno::result(result).map(drop)
}

/// Collects one child that has ended: its pid, and its exit code or 128 + the
/// signal that ended it.
pub fn wait_any() -> nix::Result<Option<(Pid, u32)>> {
    match wait(-1, libc::WNOHANG) {
        Err(Errno::ECHILD) => Ok(None),
        waited => waited,
    }
}

/// Not `nix`'s `waitpid`, which knows no real-time signals.
fn wait(pid: i32, flags: i32) -> nix::Result<Option<(Pid, u32)>> {
    let mut status = 0;
    loop {
        // SAFETY: `status` is a valid int for the call to fill in.
        let pid = unsafe { libc::waitpid(pid, &raw mut status, flags | libc::__WALL) };
        let code = match Errno::result(pid) {
            Ok(0) => return Ok(None),
            Err(Errno::EINTR) => continue,
            Err(errno) => return Err(errno),
            Ok(_) if libc::WIFEXITED(status) => libc::WEXITSTATUS(status),
            Ok(_) if libc::WIFSIGNALED(status) => 128 + libc::WTERMSIG(status),
            // Stops and continues are not asked for.
            Ok(_) => continue,
        };
        return Ok(Some((Pid::from_raw(pid), code.unsigned_abs())));
    }
}

/// Closes every descriptor of this process except 0, 1, 2 and those in `keep`.
pub fn close_all_except(keep: &[RawFd]) -> nix::Result<()> {
    let mut keep: Vec<u32> = keep.iter().filter_map(|&fd| u32::try_from(fd).ok()).collect();
    keep.extend([0, 1, 2]);
    keep.sort_unstable();
    keep.dedup();
    let mut first = 0;
    for fd in keep {
        if first < fd {
            close_range(first, fd - 1)?;
        }
        first = fd + 1;
    }
    close_range(first, u32::MAX)
}

/// Closes every descriptor of this process, its standard streams too.
pub fn close_all() -> nix::Result<()> {
    close_range(0, u32::MAX)
}

fn close_range(first: u32, last: u32) -> nix::Result<()> {
    // SAFETY: only called by a child that owns none of these descriptors any more.
    let result = unsafe { libc::syscall(libc::SYS_close_range, first, last, 0) };
    match Errno::result(result) {
        // A filter that is older than the call.
        Err(Errno::ENOSYS | Errno::EPERM) => {
            let (open, _) = getrlimit(Resource::RLIMIT_NOFILE)?;
            for fd in first..=last.min(open.try_into().unwrap_or(u32::MAX)) {
                // SAFETY: as above. Most are not open, which is no harm.
                unsafe { libc::close(fd.cast_signed()) };
            }
            Ok(())
        }
        closed => closed.map(drop),
    }
}

/// Descriptors of an ordinary process, `(soft, hard)`: the limits this one was
/// started with.
static DESCRIPTORS: OnceLock<(u64, u64)> = OnceLock::new();

/// Lets this process have as many descriptors as the kernel allows, or its limit.
pub fn raise_descriptor_limit() -> nix::Result<()> {
    let started_with = getrlimit(Resource::RLIMIT_NOFILE)?;
    let most = std::fs::read_to_string("/proc/sys/fs/nr_open").ok().and_then(|text| text.trim().parse().ok());
    let most = most.unwrap_or(started_with.1).max(started_with.1);
    let (_, hard) = started_with;
    setrlimit(Resource::RLIMIT_NOFILE, most, most)
        .or_else(|_| setrlimit(Resource::RLIMIT_NOFILE, hard, hard))?;
    // It is called once.
    let _ = DESCRIPTORS.set(started_with);
    Ok(())
}

/// In a child: as if its parent had not raised its limit.
pub fn restore_descriptor_limit() -> nix::Result<()> {
    match DESCRIPTORS.get() {
        Some((soft, hard)) => setrlimit(Resource::RLIMIT_NOFILE, *soft, *hard),
        None => Ok(()),
    }
}

/// Keeps other processes from looking into this one through `/proc`, its
/// executable included, until `execve`.
pub fn set_undumpable() -> nix::Result<()> {
    // SAFETY: PR_SET_DUMPABLE takes an integer.
    Errno::result(unsafe { libc::prctl(libc::PR_SET_DUMPABLE, 0, 0, 0, 0) }).map(drop)
}

/// Default disposition for every signal and none blocked: what a process
/// expects of whoever starts it.
pub fn reset_signals() -> nix::Result<()> {
    // The kernel's own sigaction, of which all zeroes is SIG_DFL and nothing
    // else: glibc refuses to touch the two signals it keeps for itself.
    let default = [0u64; 4];
    for signal in 1..=SIGNALS {
        // SIGKILL and SIGSTOP cannot be set and need not be.
        // SAFETY: `default` is as large as the kernel's sigaction and outlives
        // the call; it installs no handler.
        unsafe {
            libc::syscall(
                libc::SYS_rt_sigaction,
                signal,
                default.as_ptr(),
                std::ptr::null_mut::<u64>(),
                size_of::<u64>(),
            )
        };
    }
    nix::sys::signal::SigSet::empty().thread_set_mask()
}

#[cfg(test)]
mod tests {
    use std::os::fd::IntoRawFd;

    use super::*;

    #[test]
    fn closes_everything_but_what_is_kept() {
        // In a forked process: the test's own descriptors must survive.
        // SAFETY: the child only makes system calls and exits.
        match unsafe { nix::unistd::fork() }.unwrap() {
            nix::unistd::ForkResult::Child => {
                let open = || std::fs::File::open("/dev/null").map(IntoRawFd::into_raw_fd).unwrap_or(-1);
                let (a, b, c) = (open(), open(), open());
                let closed = close_all_except(&[b]).is_ok();
                // SAFETY: F_GETFD has no effect.
                let is_open = |fd| unsafe { libc::fcntl(fd, libc::F_GETFD) } >= 0;
                let right = closed && !is_open(a) && is_open(b) && !is_open(c) && is_open(2);
                exit_child(i32::from(!right));
            }
            nix::unistd::ForkResult::Parent { child } => {
                let status = nix::sys::wait::waitpid(child, None).unwrap();
                assert_eq!(status, nix::sys::wait::WaitStatus::Exited(child, 0));
            }
        }
    }
}
