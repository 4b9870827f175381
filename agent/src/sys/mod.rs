//! System calls that `nix` does not wrap, each as one safe function.

pub mod bpf;
pub mod device_mapper;
pub mod loopback;
pub mod mount;
pub mod namespace;
pub mod pci;
pub mod process;
pub mod uevent;

use std::os::fd::{AsFd, AsRawFd, OwnedFd};

use tokio::io::{Interest, unix::AsyncFd};

/// Registers a descriptor with the event loop, which must be running.
pub fn register<T: StableFd>(fd: T, interest: Interest) -> std::io::Result<AsyncFd<T>> {
    // SAFETY: a `StableFd` owns its descriptor and never replaces it.
    Ok(unsafe { AsyncFd::register_with_interest(fd, interest) }?)
}

/// Types that own one descriptor for as long as they live.
pub trait StableFd: AsFd + AsRawFd {}
impl StableFd for OwnedFd {}
impl StableFd for nix::sys::signalfd::SignalFd {}
