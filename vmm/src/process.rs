//! What the monitor asks of the host's kernel for itself, before anything else.

use std::io;
use std::os::fd::{FromRawFd, OwnedFd, RawFd};
use std::path::Path;

use crate::{jail, logging};

/// Descriptors it takes where it may: what Linux allows where nobody has said otherwise
/// (`fs.nr_open`). A guest knows more files than a shell opens.
const DESCRIPTORS: libc::rlim_t = 1 << 20;

/// Descriptors there is room for from the start, which takes 32 KiB. A table of them that grows while threads share it waits
/// until every processor has been out of the kernel (`synchronize_rcu` in expand_fdtable()): 10 to 20 ms, amid what a
/// guest waits for.
const ROOM: libc::rlim_t = 4096;

/// linux/prctl.h
const PR_SET_MEMORY_MERGE: libc::c_int = 67;

/// Keeps the guest's memory out of core files, out of other processes' reach and unlike theirs, and
/// takes as many descriptors as it may have: a share needs one for each file that the
/// guest knows. What is refused is told on stderr, as there is no log yet.
pub fn prepare() {
    let done = [
        ("RLIMIT_CORE", no_core_file()),
        ("PR_SET_DUMPABLE", undumpable()),
        ("PR_SET_MEMORY_MERGE", unmerged()),
        ("RLIMIT_NOFILE", descriptors()),
        ("room for descriptors", make_room()),
    ];
    for (what, result) in done {
        if let Err(error) = result {
            logging::say(&format!("{what}: {error}"));
        }
    }
}

/// Takes over the descriptor `fd`, which this process was started with and which
/// nothing else of it uses: what it opens itself, or has taken over before, is closed
/// on exec, and what it was started with is not.
pub fn inherited(fd: RawFd) -> io::Result<OwnedFd> {
    // SAFETY: plain system call on a number; it fails where nothing is open.
    let flags = unsafe { libc::fcntl(fd, libc::F_GETFD) };
    if fd <= libc::STDERR_FILENO || flags < 0 || flags & libc::FD_CLOEXEC != 0 {
        return Err(io::Error::from_raw_os_error(libc::EBADF));
    }
    // SAFETY: plain system call.
    ok(unsafe { libc::fcntl(fd, libc::F_SETFD, flags | libc::FD_CLOEXEC) })?;
    // SAFETY: it is open, and has not been taken over by anything else.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// Removes a socket of this process's. One that is shut in leaves it to its owner: the name leads
/// elsewhere there.
pub(crate) fn remove_socket(path: &Path) {
    if !jail::is_entered()
        && let Err(error) = std::fs::remove_file(path)
    {
        log::debug!("socket {} cannot be removed: {error}", path.display());
    }
}

fn no_core_file() -> io::Result<()> {
    set_limit(libc::RLIMIT_CORE, &libc::rlimit { rlim_cur: 0, rlim_max: 0 })
}

/// Also: who may not trace everything may not look into its memory.
pub(crate) fn undumpable() -> io::Result<()> {
    // SAFETY: PR_SET_DUMPABLE takes a number.
    ok(unsafe { libc::prctl(libc::PR_SET_DUMPABLE, 0) })
}

/// Has no page of it merged with another process's (KSM), which whoever starts it may have asked for (systemd's
/// `MemoryKSM=`): the time a write takes tells what others have.
fn unmerged() -> io::Result<()> {
    // SAFETY: PR_SET_MEMORY_MERGE takes numbers.
    match ok(unsafe { libc::prctl(PR_SET_MEMORY_MERGE, 0, 0, 0, 0) }) {
        // Before Linux 6.4, or without KSM.
        Err(error) if error.raw_os_error() == Some(libc::EINVAL) => Ok(()),
        result => result,
    }
}

fn descriptors() -> io::Result<()> {
    let mut limit = limit_of_descriptors()?;
    let most = libc::rlimit { rlim_cur: DESCRIPTORS, rlim_max: DESCRIPTORS };
    if limit.rlim_max < DESCRIPTORS && set_limit(libc::RLIMIT_NOFILE, &most).is_ok() {
        return Ok(());
    }
    limit.rlim_cur = limit.rlim_max;
    set_limit(libc::RLIMIT_NOFILE, &limit)
}

/// Makes [`ROOM`], as long as there is one thread.
pub(crate) fn make_room() -> io::Result<()> {
    let last = ROOM.min(limit_of_descriptors()?.rlim_cur).saturating_sub(1) as libc::c_int;
    // SAFETY: plain system call on numbers.
    let high = unsafe { libc::fcntl(libc::STDERR_FILENO, libc::F_DUPFD_CLOEXEC, last) };
    // The table stays as long as it was for that.
    owned(high.into()).map(drop)
}

fn limit_of_descriptors() -> io::Result<libc::rlimit> {
    let mut limit = libc::rlimit { rlim_cur: 0, rlim_max: 0 };
    // SAFETY: a valid rlimit that the call fills.
    ok(unsafe { libc::getrlimit(libc::RLIMIT_NOFILE, &raw mut limit) })?;
    Ok(limit)
}

/// Threads it may have where it has a user of its own: more than a machine with all its devices takes.
const THREADS: libc::rlim_t = 4096;

/// Leaves it, of what the host's kernel counts for a process or a user, what a monitor needs. Descriptors and core
/// files are [prepared](prepare) for; memory and time are its cgroup's.
pub(crate) fn limit() -> io::Result<()> {
    let limits = [
        (libc::RLIMIT_NPROC, THREADS),
        (libc::RLIMIT_MEMLOCK, 0),
        (libc::RLIMIT_MSGQUEUE, 0),
        (libc::RLIMIT_RTPRIO, 0),
    ];
    for (which, most) in limits {
        set_limit(which, &libc::rlimit { rlim_cur: most, rlim_max: most })?;
    }
    Ok(())
}

fn set_limit(which: libc::__rlimit_resource_t, limit: &libc::rlimit) -> io::Result<()> {
    // SAFETY: a valid rlimit that the call only reads.
    ok(unsafe { libc::setrlimit(which, limit) })
}

/// The new descriptor that a system call returned, or its error.
pub(crate) fn owned(result: libc::c_long) -> io::Result<OwnedFd> {
    // Descriptors fit in an int.
    let fd = result as RawFd;
    ok(fd)?;
    // SAFETY: the system has just made it for us.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// What a system call says that returns a negative number when it fails.
pub(crate) fn ok(result: libc::c_int) -> io::Result<()> {
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_dump_is_made_of_this_process() {
        prepare();
        // SAFETY: PR_GET_DUMPABLE takes nothing.
        assert_eq!(unsafe { libc::prctl(libc::PR_GET_DUMPABLE) }, 0);
        let limits = std::fs::read_to_string("/proc/self/limits").unwrap();
        let words = |name: &str| {
            let line = limits.lines().find_map(|line| line.strip_prefix(name)).unwrap();
            line.split_whitespace().take(2).map(str::to_owned).collect::<Vec<_>>()
        };
        assert_eq!(words("Max core file size"), ["0", "0"]);
        let files = words("Max open files");
        assert_eq!(files[0], files[1]);
        let status = std::fs::read_to_string("/proc/self/status").unwrap();
        let room = status.lines().find_map(|line| line.strip_prefix("FDSize:")).unwrap().trim();
        assert!(room.parse::<u64>().unwrap() >= ROOM, "{room}");
    }
}
