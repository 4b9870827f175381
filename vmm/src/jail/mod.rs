//! The monitor shuts itself in: what a guest that has taken it over can reach.
//!
//! Everything it needs of the host is open by then. Of namespaces it has its own of each
//! kind but the mounts', which it shares with its shim: the share's mounts come and go
//! there. Its root directory is the share, from which no way leads up, and nothing in that
//! namespace is its to mount or to unmount, which belongs to the host's user namespace. Its
//! own has all ids of the host and none of its power: what is left of that are the
//! capabilities a file server needs, about files it can reach, on the file servers' threads.
//! Landlock says once more which files these are, also of those that can be reached through
//! a descriptor. A thread can make the system calls that its duty takes; any other ends the monitor.
//!
//! What it needs of `/proc` it has from one of its own ([`procfs`](crate::procfs)), which
//! shows its own pid namespace and no kernel parameter.

mod calls;
mod capabilities;
mod landlock;
mod seccomp;
#[cfg(test)]
mod tests;

use std::ffi::CStr;
use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::fs::OpenOptionsExt;
use std::path::PathBuf;

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
    /// The root directory cannot be opened.
    #[error("jail.root: {}", path.display())]
    Root {
        /// As configured.
        path: PathBuf,
        /// Why not.
        #[source]
        source: io::Error,
    },
    /// The user namespace is not there.
    #[error("jail.user_namespace: descriptor {fd} must be an inherited user namespace")]
    UserNamespace {
        /// As configured.
        fd: i32,
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
    root: File,
    user_namespace: Option<OwnedFd>,
}

impl Jail {
    /// Opens what `config` names.
    pub fn open(config: &JailConfig) -> Result<Self, JailError> {
        let root = OpenOptions::new()
            .read(true)
            .custom_flags(libc::O_PATH | libc::O_DIRECTORY)
            .open(&config.root)
            .map_err(|source| JailError::Root { path: config.root.clone(), source })?;
        let user_namespace = config
            .user_namespace
            .map(|fd| process::inherited(fd).map_err(|source| JailError::UserNamespace { fd, source }))
            .transpose()?;
        Ok(Self { root, user_namespace })
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
        let proc = procfs::mount().map_err(step("its own /proc"))?;
        let flags = libc::CLONE_NEWIPC | libc::CLONE_NEWUTS | libc::CLONE_NEWCGROUP;
        // SAFETY: plain system call.
        ok(unsafe { libc::unshare(flags) }).map_err(step("namespaces"))?;
        if let Some(namespace) = &self.user_namespace {
            // SAFETY: plain system call on an open descriptor.
            ok(unsafe { libc::setns(namespace.as_raw_fd(), libc::CLONE_NEWUSER) })
                .map_err(step("user namespace"))?;
        }
        // After the user namespace, which nobody may make or enter whose root is another.
        change_root(&self.root).map_err(step("root directory"))?;
        capabilities::keep_for_files().map_err(step("capabilities"))?;
        // SAFETY: PR_SET_NO_NEW_PRIVS takes numbers.
        ok(unsafe { libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) }).map_err(step("no_new_privs"))?;
        // A change of the user namespace may have undone it.
        process::undumpable().map_err(step("PR_SET_DUMPABLE"))?;
        match landlock::restrict(self.root.as_fd(), proc.as_fd()) {
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

fn change_root(root: &File) -> io::Result<()> {
    const HERE: &CStr = c".";
    // SAFETY: plain system call on an open descriptor.
    ok(unsafe { libc::fchdir(root.as_raw_fd()) })?;
    // SAFETY: a C string.
    ok(unsafe { libc::chroot(HERE.as_ptr()) })
}
