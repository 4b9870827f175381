//! The monitor shuts itself in: what a guest that has taken it over can reach.
//!
//! Everything it needs of the host is open by then. It has namespaces of its own of each
//! kind. In that of mounts there is the share and nothing else; its shim makes the share's
//! mounts there, and nothing in it is the monitor's to mount or to unmount, as it belongs to
//! the host's user namespace. Its own user namespace has none of the host's power: what is left of that are the
//! capabilities a file server needs, about files it can reach, on the file servers' threads.
//! Landlock says once more which files can be written to, also of those that can be reached through
//! a descriptor. A thread can make the system calls that its duty takes; any other ends the monitor.
//!
//! What it needs of `/proc` it has from one of its own ([`procfs`](crate::procfs)), which
//! shows its own pid namespace and no kernel parameter.

mod calls;
mod capabilities;
mod landlock;
mod seccomp;
#[cfg(test)]
pub(crate) mod tests;

use std::ffi::CStr;
use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::path::{Path, PathBuf};

use rvm_protocol::vmm::JailConfig;
use thiserror::Error;

use crate::process::{self, ok};
use crate::procfs;

pub use calls::{Duty, own_calls};
pub use landlock::is_there as has_landlock;
pub use seccomp::is_in_force as is_entered;

/// Why the monitor is not shut in.
#[derive(Debug, Error)]
pub enum JailError {
    /// A namespace is not there, or the root directory of one.
    #[error("jail.{field}: descriptor {fd} must be {wanted}, and inherited")]
    Inherited {
        /// The field.
        field: &'static str,
        /// As configured.
        fd: i32,
        /// What it has to be.
        wanted: &'static str,
        /// Why not.
        #[source]
        source: io::Error,
    },
    /// It would see processes of others.
    #[error("jail: process {0} is not the first of a pid namespace of its own")]
    NotFirst(u32),
    /// A step failed.
    #[error("jail: {step}")]
    Step {
        /// Which.
        step: &'static str,
        /// Why.
        #[source]
        source: io::Error,
    },
}

/// What it takes to be shut in, all of it open.
#[derive(Debug)]
pub struct Jail {
    mount_namespace: OwnedFd,
    root: OwnedFd,
    user_namespace: Option<OwnedFd>,
}

impl Jail {
    /// Takes what `config` names.
    pub fn open(config: &JailConfig) -> Result<Self, JailError> {
        let take = |field, fd, wanted| {
            process::inherited(fd).map_err(|source| JailError::Inherited { field, fd, wanted, source })
        };
        let users = |fd| take("user_namespace", fd, "a user namespace");
        Ok(Self {
            mount_namespace: take("mount_namespace", config.mount_namespace, "a mount namespace")?,
            root: take("root", config.root, "a directory in it")?,
            user_namespace: config.user_namespace.map(users).transpose()?,
        })
    }

    /// What is at `path` from the root directory on, as long as the process is not shut in.
    pub fn path(&self, path: &Path) -> PathBuf {
        Path::new("/proc/self/fd").join(self.root.as_raw_fd().to_string()).join(path)
    }

    /// Shuts the process in, for good. It must have one thread, and everything open that it
    /// needs of the host.
    pub fn enter(self) -> Result<(), JailError> {
        self.close()?;
        seccomp::begin().map_err(|source| JailError::Step { step: "seccomp", source })
    }

    /// All of it but the filter of system calls.
    fn close(self) -> Result<(), JailError> {
        let step = |step| move |source| JailError::Step { step, source };
        if std::process::id() != 1 {
            return Err(JailError::NotFirst(std::process::id()));
        }
        process::limit().map_err(step("limits"))?;
        let proc = procfs::mount().map_err(step("its own /proc"))?;
        enter(&self.mount_namespace, libc::CLONE_NEWNS).map_err(step("mount namespace"))?;
        let flags = libc::CLONE_NEWIPC | libc::CLONE_NEWUTS | libc::CLONE_NEWCGROUP;
        // SAFETY: plain system call.
        ok(unsafe { libc::unshare(flags) }).map_err(step("namespaces"))?;
        if let Some(namespace) = &self.user_namespace {
            enter(namespace, libc::CLONE_NEWUSER).map_err(step("user namespace"))?;
            become_root().map_err(step("its root user"))?;
        }
        // After the user namespace, which nobody may make or enter whose root is another.
        change_root(&self.root).map_err(step("root directory"))?;
        capabilities::keep_for_files().map_err(step("capabilities"))?;
        // SAFETY: PR_SET_NO_NEW_PRIVS takes numbers.
        ok(unsafe { libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) }).map_err(step("no_new_privs"))?;
        // A change of the user namespace may have undone it.
        process::undumpable().map_err(step("PR_SET_DUMPABLE"))?;
        match landlock::restrict(self.root.as_fd()) {
            Ok(true) => {}
            Ok(false) => log::warn!("jail: this host's kernel has no Landlock, or too old a one"),
            Err(source) => {
                return Err(JailError::Step { step: "Landlock", source: io::Error::other(source) });
            }
        }
        procfs::use_own(&proc).map_err(step("its own /proc"))
    }
}

/// Leaves the calling thread what its duty takes, for good: no capabilities but a file server's, and,
/// where the monitor is shut in, its system calls. Those it starts have no more.
///
/// No thread goes on with more: the monitor ends where that cannot be.
pub fn take_up(duty: Duty) {
    let dropped = if duty == Duty::Files { Ok(()) } else { capabilities::drop_all() };
    if let Err(error) = dropped.and_then(|()| seccomp::narrow(duty)) {
        log::error!("a thread cannot be left its duty alone ({duty:?}): {error}");
        std::process::abort();
    }
}

/// In a user namespace without the user that it had outside, the process is nobody: it becomes that one's root.
fn become_root() -> io::Result<()> {
    // SAFETY: takes nothing.
    if unsafe { libc::geteuid() } == 0 {
        return Ok(());
    }
    // SAFETY: no groups.
    ok(unsafe { libc::setgroups(0, std::ptr::null()) })?;
    // SAFETY: numbers.
    ok(unsafe { libc::setresgid(0, 0, 0) })?;
    // SAFETY: numbers.
    ok(unsafe { libc::setresuid(0, 0, 0) })?;
    // Another user's process would outlive its parent.
    // SAFETY: PR_SET_PDEATHSIG takes a signal number.
    ok(unsafe { libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL) })
}

fn change_root(root: &OwnedFd) -> io::Result<()> {
    const HERE: &CStr = c".";
    // SAFETY: plain system call on an open descriptor.
    ok(unsafe { libc::fchdir(root.as_raw_fd()) })?;
    // SAFETY: a C string.
    ok(unsafe { libc::chroot(HERE.as_ptr()) })
}

fn enter(namespace: &OwnedFd, kind: libc::c_int) -> io::Result<()> {
    // SAFETY: plain system call on an open descriptor.
    ok(unsafe { libc::setns(namespace.as_raw_fd(), kind) })
}
