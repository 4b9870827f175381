//! Network namespaces.

use std::{fs::File, io, os::fd::AsFd};

use nix::sched::{CloneFlags, setns};

/// Makes something, a socket say, in a network namespace, to which it belongs from then
/// on. The agent has one thread, which is in there for as long as that takes.
pub fn within<T>(namespace: impl AsFd, make: impl FnOnce() -> io::Result<T>) -> io::Result<T> {
    let own = File::open("/proc/self/ns/net")?;
    setns(namespace, CloneFlags::CLONE_NEWNET)?;
    let made = make();
    setns(own, CloneFlags::CLONE_NEWNET)?;
    made
}
