//! Being the guest's first process: from the kernel's `execve` to ready, and out.
//!
//! The host waits for the announcement, so everything not needed to make it
//! comes after it: connections that arrive meanwhile wait in the listeners'
//! backlog, and are served once [`boot`] has returned.

pub mod announce;
pub mod console;
pub mod mounts;
pub mod shutdown;

use std::time::Instant;

pub use announce::Listeners;

use crate::sys::{loopback, process::raise_descriptor_limit};

/// Why the guest cannot come up.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A system call failed.
    #[error("cannot {step}")]
    Kernel {
        /// What was tried.
        step: &'static str,
        /// Why not.
        #[source]
        source: nix::errno::Errno,
    },
    /// An I/O operation failed.
    #[error("cannot {step}")]
    Io {
        /// What was tried.
        step: &'static str,
        /// Why not.
        #[source]
        source: std::io::Error,
    },
    /// The service cannot be started.
    #[error("cannot serve requests")]
    Serve(#[source] ttrpc::Error),
}

/// Brings the guest up as far as the agent needs it.
pub fn boot() -> Result<Listeners, Error> {
    let start = Instant::now();
    let listeners = announce::listen()?;
    announce::announce()?;
    let announced = start.elapsed();
    mounts::make_root_pivotable()?;
    mounts::mount_kernel_file_systems()?;
    if let Err(error) = console::show_kernel_errors() {
        // A kernel of the user's own may have no messages.
        log::warn!("the kernel's errors stay off the console: {error}");
    }
    mounts::make_directories()?;
    loopback::up().map_err(|source| Error::Kernel { step: "bring up the loopback interface", source })?;
    // Each process has three streams and more, and each is one here.
    raise_descriptor_limit()
        .map_err(|source| Error::Kernel { step: "raise the limit of descriptors", source })?;
    log::info!("announced after {announced:.1?}, up after {:.1?}", start.elapsed());
    Ok(listeners)
}
