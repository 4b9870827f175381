//! The network namespace on the host that belongs to a sandbox.

use std::{
    fs::File,
    io,
    os::{
        fd::{AsFd, AsRawFd, BorrowedFd},
        unix::fs::MetadataExt,
    },
    path::Path,
    thread,
};

use nix::sched::{CloneFlags, setns, unshare};
use rvm_protocol::netlink::{Attributes, Socket};

use super::NetworkError;

/// Where a thread finds its own.
const OF_THIS_THREAD: &str = "/proc/thread-self/ns/net";
/// `lo` in every namespace.
const LO_INDEX: u32 = 1;

/// A network namespace of the host, which is there as long as this is.
#[derive(Debug)]
pub struct Namespace(File);

impl Namespace {
    /// A new one, with nothing in it but `lo`, which is up as under runc.
    pub fn new() -> Result<Self, NetworkError> {
        let made = thread::scope(|scope| {
            let made = || {
                unshare(CloneFlags::CLONE_NEWNET)?;
                let namespace = Self(File::open(OF_THIS_THREAD)?);
                set_up(&Socket::open()?, LO_INDEX).map_err(|refusal| io::Error::from(refusal.errno))?;
                Ok(namespace)
            };
            joined(scope.spawn(made))
        });
        made.map_err(NetworkError::NewNamespace)
    }

    /// The one at `path`; `field` of the specification named it.
    pub fn open(field: &str, path: &Path) -> Result<Self, NetworkError> {
        let failed = |problem: String| NetworkError::Namespace {
            field: field.to_owned(),
            path: path.to_owned(),
            problem,
        };
        let file = File::open(path).map_err(|error| failed(error.to_string()))?;
        // SAFETY: NS_GET_NSTYPE takes no argument; on what is no namespace it fails.
        let kind = unsafe { libc::ioctl(file.as_raw_fd(), libc::NS_GET_NSTYPE) };
        if kind != libc::CLONE_NEWNET {
            return Err(failed("is no network namespace".into()));
        }
        let opened = Self(file);
        let own = File::open(OF_THIS_THREAD).map(Self).map_err(|error| failed(error.to_string()))?;
        if opened.identity().ok() == own.identity().ok() {
            let problem = "is the host's network, which a microVM cannot share; leave the path out for a \
                           network of its own, or name a namespace that was made for the container \
                           (ctr: no --net-host; Docker: another --network than host; Kubernetes: \
                           hostNetwork: false)";
            return Err(failed(problem.into()));
        }
        Ok(opened)
    }

    /// What tells it from every other one: device and inode.
    pub fn identity(&self) -> io::Result<(u64, u64)> {
        let found = self.0.metadata()?;
        Ok((found.dev(), found.ino()))
    }

    /// A socket that speaks to its kernel.
    pub fn socket(&self) -> Result<Socket, NetworkError> {
        let opened = self.run(Socket::open).map_err(NetworkError::Enter)?;
        opened.map_err(|errno| NetworkError::Enter(errno.into()))
    }

    /// Does `work` on a thread that is in it, and waits for its end.
    pub fn run<T: Send>(&self, work: impl FnOnce() -> T + Send) -> io::Result<T> {
        let work = || {
            setns(&self.0, CloneFlags::CLONE_NEWNET)?;
            Ok(work())
        };
        thread::scope(|scope| joined(thread::Builder::new().spawn_scoped(scope, work)?))
    }
}

impl AsFd for Namespace {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

fn joined<T>(thread: thread::ScopedJoinHandle<'_, T>) -> T {
    // A panic on that thread is a fault of ours.
    thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
}

/// Sets an interface up.
pub(super) fn set_up(socket: &Socket, index: u32) -> Result<(), rvm_protocol::netlink::Refusal> {
    let up = libc::IFF_UP.cast_unsigned();
    let mut header = [0; 16];
    header[4..8].copy_from_slice(&index.to_ne_bytes());
    header[8..12].copy_from_slice(&up.to_ne_bytes());
    header[12..16].copy_from_slice(&up.to_ne_bytes());
    socket.request(libc::RTM_NEWLINK, 0, &header, &Attributes::default())
}
