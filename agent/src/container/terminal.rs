//! Opening a terminal inside a container.

use std::{
    os::fd::{AsRawFd, FromRawFd, OwnedFd},
    path::Path,
};

use nix::{
    errno::Errno,
    fcntl::{OFlag, open},
    sys::stat::{Mode, fstat, makedev},
    unistd::{dup2_stderr, dup2_stdin, dup2_stdout},
};

use super::paths::Root;
use crate::{
    error::{Step, StepError, StepResult},
    sys::mount::{attach, clone_tree},
};

/// The kernel's own, which 64-bit programs get with every open; libc's is 0.
const O_LARGEFILE: i32 = 0o100_000;

/// Both sides of a terminal.
#[derive(Debug)]
pub struct Terminal {
    /// For the agent; non-blocking.
    pub master: OwnedFd,
    /// For the process, which has it as its standard streams; not closed by `execve`.
    pub slave: OwnedFd,
}

/// Opens a terminal in the devpts of the root file system this process is in,
/// and makes it this session's controlling terminal and standard streams.
pub fn open_controlling() -> StepResult<Terminal> {
    let step = || "open a terminal in /dev/pts";
    // Non-blocking also keeps a FIFO put in its place from holding us up.
    let flags = OFlag::O_RDWR | OFlag::O_NOCTTY | OFlag::O_NONBLOCK | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC;
    let master = open("/dev/pts/ptmx", flags, Mode::empty()).step(step)?;
    if fstat(&master).step(step)?.st_rdev != makedev(5, 2) {
        return Err(StepError::Refused("open a terminal: /dev/pts/ptmx is not one".into()));
    }
    let unlock: i32 = 0;
    // SAFETY: TIOCSPTLCK reads an int.
    let result = unsafe { libc::ioctl(master.as_raw_fd(), libc::TIOCSPTLCK, &raw const unlock) };
    Errno::result(result).step(step)?;
    // The ioctl takes the flags as they are, and so the program sees them: those
    // an ordinary open leaves. Whoever gets the descriptor closes it in time.
    let flags = libc::O_RDWR | libc::O_NOCTTY | O_LARGEFILE;
    // SAFETY: TIOCGPTPEER takes open flags and returns a new descriptor.
    let result = unsafe { libc::ioctl(master.as_raw_fd(), libc::TIOCGPTPEER, flags) };
    let slave = Errno::result(result).step(step)?;
    // SAFETY: the descriptor is new and nobody else owns it.
    let slave = unsafe { OwnedFd::from_raw_fd(slave) };
    // SAFETY: TIOCSCTTY takes an int: 0, do not steal it.
    let result = unsafe { libc::ioctl(slave.as_raw_fd(), libc::TIOCSCTTY, 0) };
    Errno::result(result).step(|| "make the terminal the controlling one")?;
    dup2_stdin(&slave)
        .and_then(|()| dup2_stdout(&slave))
        .and_then(|()| dup2_stderr(&slave))
        .step(|| "connect the terminal")?;
    Ok(Terminal { master, slave })
}

impl Terminal {
    /// Makes it `/dev/console`, for programs that write there.
    pub fn become_console(&self) -> StepResult<()> {
        let step = || "mount the terminal at /dev/console";
        let console = Root::open(Path::new("/")).and_then(|root| root.make_file(Path::new("/dev/console")));
        let slave = clone_tree(&self.slave, Path::new(""), false).step(step)?;
        attach(slave, console.step(step)?).step(step)
    }
}
