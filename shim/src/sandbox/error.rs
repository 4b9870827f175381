//! Why a sandbox is not there, or does not do what it should.

use std::{io, path::PathBuf, time::Duration};

use super::{GrowError, NetworkError};
use crate::{
    agent::AgentError, cgroup::CgroupError, name::NameError, scratch::ScratchError, share::ShareError,
    sysctl::SysctlError, vmm::MonitorError, vsock::VsockError,
};

/// Why there is no sandbox.
#[derive(Debug, thiserror::Error)]
pub enum SandboxError {
    /// A name that cannot be part of a path.
    #[error(transparent)]
    Name(#[from] NameError),
    /// Its name is taken.
    #[error("sandbox {namespace}/{id} is running already")]
    Exists {
        /// containerd's namespace.
        namespace: String,
        /// Its id.
        id: String,
    },
    /// Its directory.
    #[error("{}: {source}", path.display())]
    Directory {
        /// The directory.
        path: PathBuf,
        /// Why not.
        #[source]
        source: io::Error,
    },
    /// A file the configuration names.
    #[error("{key}: {}: {source}", path.display())]
    File {
        /// The configuration's key.
        key: &'static str,
        /// The file.
        path: PathBuf,
        /// Why not.
        #[source]
        source: io::Error,
    },
    /// A parameter of the host's kernel that cannot hold in the guest.
    #[error(transparent)]
    Sysctl(#[from] SysctlError),
    /// Its part of the file system.
    #[error(transparent)]
    Share(#[from] ShareError),
    /// Its cgroup on the host.
    #[error(transparent)]
    Cgroup(#[from] CgroupError),
    /// Where its writable layer lives.
    #[error(transparent)]
    Scratch(#[from] ScratchError),
    /// Its network.
    #[error(transparent)]
    Network(#[from] NetworkError),
    /// The process that stands for a container.
    #[error("starting the container's process on the host: {0}")]
    Holder(#[source] io::Error),
    /// Its monitor was not started.
    #[error(transparent)]
    Monitor(#[from] MonitorError),
    /// A block device of the host, which its monitor was not given.
    #[error("{field}: {source}")]
    Disk {
        /// The field of the specification that asks for it.
        field: String,
        /// Why not.
        #[source]
        source: MonitorError,
    },
    /// A block device of the host that another container holds read-only.
    #[error("{field}: another container of this sandbox uses the device, and read-only")]
    ReadonlyDisk {
        /// The field of the specification that asks for it.
        field: String,
    },
    /// More memory than it can have.
    #[error(
        "linux.resources.memory.limit: {limit} bytes do not fit: the running machine of {boot_mib} MiB can grow to \
         {most_mib} MiB on this host"
    )]
    NoRoom {
        /// What was asked for.
        limit: u64,
        /// What it started with.
        boot_mib: u64,
        /// The most it can have.
        most_mib: u64,
    },
    /// It did not grow.
    #[error(
        "linux.resources.memory.limit: the running machine was not made larger for {limit} bytes: {source}"
    )]
    Grow {
        /// What was asked for.
        limit: u64,
        /// Why not.
        #[source]
        source: GrowError,
    },
    /// More huge pages than there are.
    #[error(
        "linux.resources.hugepageLimits, or hugetlb.2MB.max of the pod's cgroup: {missing} more huge pages of 2 MiB \
         are needed, and {free} of the host's {total} are free (vm.nr_hugepages); this machine can have {most}"
    )]
    NoHugePages {
        /// Beside those it has.
        missing: u64,
        /// What nobody has of the host's.
        free: u64,
        /// All of them.
        total: u64,
        /// What it can have.
        most: u64,
    },
    /// It did not get them.
    #[error(
        "linux.resources.hugepageLimits: the running machine did not come to {wanted} huge pages of 2 MiB: {source}"
    )]
    HugePages {
        /// All it should have.
        wanted: u64,
        /// Why not.
        #[source]
        source: GrowError,
    },
    /// Not as many CPUs as its containers ask for.
    #[error("linux.resources.cpu: the running machine did not come to {vcpus} CPUs: {source}")]
    Vcpus {
        /// What was asked for.
        vcpus: u8,
        /// Why not.
        #[source]
        source: GrowError,
    },
    /// Its sockets.
    #[error(transparent)]
    Vsock(#[from] VsockError),
    /// Its agent.
    #[error(transparent)]
    Agent(#[from] AgentError),
    /// Its agent is not the one that was installed with this program.
    #[error(
        "the agent announces itself as {found:?} instead of {expected:?}: shim and initramfs are of different versions"
    )]
    Version {
        /// What it said.
        found: String,
        /// What it should have said.
        expected: String,
    },
    /// It ended before its agent answered.
    #[error("the guest did not start: {0}")]
    Ended(String),
    /// It took too long.
    #[error("the guest did not answer within {} s (guest.boot_timeout_s){}", limit.as_secs(), console.as_ref().map(|text| format!("; its console ends with: {text}")).unwrap_or_default())]
    TimedOut {
        /// How long was waited.
        limit: Duration,
        /// The end of its console.
        console: Option<String>,
    },
}
