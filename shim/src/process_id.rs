//! Processes of the host that outlive the reader's knowledge of them: a pid
//! alone may have been given to somebody else meanwhile.

use std::{
    fs, io,
    os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd},
    time::{Duration, Instant},
};

use nix::{
    errno::Errno,
    poll::{PollFd, PollFlags, PollTimeout, poll},
    sys::signal::Signal,
};
use serde::{Deserialize, Serialize};

/// A process, told from others by when it started.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ProcessId {
    /// The process id.
    pub pid: u32,
    /// Start time in clock ticks since boot (proc(5), stat field 22).
    pub start_ticks: u64,
}

impl ProcessId {
    /// The running process `pid`.
    pub fn of(pid: u32) -> io::Result<Self> {
        let stat = fs::read_to_string(format!("/proc/{pid}/stat"))?;
        start_ticks(&stat)
            .map(|start_ticks| Self { pid, start_ticks })
            .ok_or_else(|| io::Error::new(io::ErrorKind::InvalidData, "unexpected /proc/PID/stat"))
    }

    /// The calling process.
    pub fn of_self() -> io::Result<Self> {
        Self::of(std::process::id())
    }

    /// Whether it still runs. One whose first thread has ended does not, though
    /// others of its threads may.
    pub fn is_alive(self) -> bool {
        let Ok(stat) = fs::read_to_string(format!("/proc/{}/stat", self.pid)) else { return false };
        start_ticks(&stat) == Some(self.start_ticks) && state(&stat) != Some('Z')
    }

    /// Whether the pid is still its own, as it is until it has been waited for.
    fn has_its_pid(self) -> bool {
        fs::read_to_string(format!("/proc/{}/stat", self.pid))
            .is_ok_and(|stat| start_ticks(&stat) == Some(self.start_ticks))
    }

    /// Sends `signal` if any of its threads still runs, and waits at most `limit`
    /// for the end of the last.
    pub fn kill_and_wait(self, signal: Signal, limit: Duration) -> io::Result<()> {
        // The descriptor first, the check second: what it refers to is the
        // process that was checked.
        let pidfd = match pidfd_open(self.pid) {
            Ok(pidfd) => pidfd,
            Err(error) if error.raw_os_error() == Some(libc::ESRCH) => return Ok(()),
            Err(error) => return Err(error),
        };
        if !self.has_its_pid() {
            return Ok(());
        }
        pidfd_send_signal(&pidfd, signal)?;
        if wait_for_end(pidfd.as_fd(), limit)? { Ok(()) } else { Err(io::ErrorKind::TimedOut.into()) }
    }
}

/// Waits at most `limit` for the end of the process a pidfd is of; whether it has come.
/// A process that was killed takes that long only where the host keeps it in a system call.
pub fn wait_for_end(pidfd: BorrowedFd, limit: Duration) -> io::Result<bool> {
    let until = Instant::now().checked_add(limit);
    loop {
        let left = until.map_or(limit, |until| until.saturating_duration_since(Instant::now()));
        let timeout = PollTimeout::try_from(left).unwrap_or(PollTimeout::MAX);
        match poll(&mut [PollFd::new(pidfd, PollFlags::POLLIN)], timeout) {
            Err(Errno::EINTR) => {}
            ended => return Ok(ended? > 0),
        }
    }
}

/// A descriptor that becomes readable when process `pid` ends.
pub fn pidfd_open(pid: u32) -> io::Result<OwnedFd> {
    // SAFETY: takes and keeps no pointer (pidfd_open(2), Linux 5.3).
    let fd = unsafe { libc::syscall(libc::SYS_pidfd_open, pid, 0) };
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    let fd = i32::try_from(fd).map_err(io::Error::other)?;
    // SAFETY: the kernel just returned this descriptor, and nothing else has it.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

fn pidfd_send_signal(pidfd: &OwnedFd, signal: Signal) -> io::Result<()> {
    let no_info = std::ptr::null::<libc::siginfo_t>();
    // SAFETY: a null siginfo is allowed (pidfd_send_signal(2)).
    let result = unsafe {
        libc::syscall(libc::SYS_pidfd_send_signal, pidfd.as_raw_fd(), signal as libc::c_int, no_info, 0)
    };
    match result {
        0 => Ok(()),
        _ => match io::Error::last_os_error() {
            error if error.raw_os_error() == Some(libc::ESRCH) => Ok(()),
            error => Err(error),
        },
    }
}

/// Fields after the name, which may itself hold spaces and parentheses.
fn fields(stat: &str) -> impl Iterator<Item = &str> {
    stat.rsplit_once(')').map_or("", |(_, rest)| rest).split_ascii_whitespace()
}

fn start_ticks(stat: &str) -> Option<u64> {
    fields(stat).nth(19)?.parse().ok()
}

fn state(stat: &str) -> Option<char> {
    fields(stat).next()?.chars().next()
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::process::Command;

    #[test]
    fn kills_the_process_it_means() {
        let mut child = Command::new("sleep").arg("1000").spawn().unwrap();
        let id = ProcessId::of(child.id()).unwrap();
        assert!(id.is_alive());
        let other = ProcessId { start_ticks: id.start_ticks + 1, ..id };
        other.kill_and_wait(Signal::SIGKILL, Duration::from_secs(10)).unwrap();
        assert!(id.is_alive());
        id.kill_and_wait(Signal::SIGKILL, Duration::from_secs(10)).unwrap();
        assert!(!id.is_alive());
        child.wait().unwrap();
        id.kill_and_wait(Signal::SIGKILL, Duration::from_secs(10)).unwrap();
    }

    #[test]
    fn names_do_not_confuse_the_fields() {
        let stat = "42 (a) b (c)) S 1 42 42 0 -1 4194560 1 0 0 0 0 0 0 0 20 0 1 0 777 1000 1";
        assert_eq!(start_ticks(stat), Some(777));
        assert_eq!(state(stat), Some('S'));
    }
}
