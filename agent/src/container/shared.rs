//! What the containers of one sandbox can share: network, ipc and uts
//! namespaces, a pid namespace where that was asked for, and `/dev/shm`. They
//! belong to the sandbox: no container has to live for another to join.

use std::{
    collections::HashMap,
    fs::File,
    io,
    os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd},
    path::Path,
};

use nix::{
    mount::MsFlags,
    sched::{CloneFlags, setns, unshare},
    sys::signal::{SigSet, Signal},
    unistd::Pid,
};
use rvm_protocol::agent::{self, NamespaceType};

use super::{
    capabilities,
    child::{self, GivenUp},
    paths::Root,
    rootfs, sysctl,
    userns::{self, Ids, UserNamespace},
};
use crate::{
    channel::{self, Message},
    error::{Step, StepError, StepResult},
    init::mounts::{MOUNT_POINT, make_dir},
    io::ChildEnds,
    sys::{
        loopback,
        mount::{Attributes, FsContext, attach, open_path, set_attributes},
        process::{close_all, fork, wait_any},
    },
};

/// Where the sandbox's `/dev/shm` is in the guest.
pub const SHM_DIR: &str = "/run/rvm/shm";
/// Its size where nobody says otherwise, as of a container's own.
const SHM_BYTES: u64 = 64 << 20;

/// What is asked for when the sandbox is set up.
#[derive(Clone, Debug, Default)]
pub struct Wanted {
    /// A pid namespace too.
    pub pid: bool,
    /// Size of `/dev/shm` in bytes; 0: the usual one.
    pub shm_bytes: u64,
    /// Kernel parameters of its namespaces.
    pub sysctl: HashMap<String, String>,
    /// The user namespace that is to own it, where that is not the guest's.
    pub ids: Option<Ids>,
}

/// What the sandbox holds, made when the first container asks for it.
#[derive(Debug)]
pub struct Shared {
    network: OwnedFd,
    ipc: OwnedFd,
    uts: OwnedFd,
    pid: Option<OwnedFd>,
    user: Option<UserNamespace>,
}

impl Shared {
    /// Whether a container wants something of the sandbox's.
    pub fn is_wanted_by(request: &agent::CreateContainerRequest) -> bool {
        request.namespaces.iter().any(|namespace| namespace.sandbox)
            || request.mounts.iter().any(|mount| mount.from_sandbox && mount.memory.is_none())
    }

    /// Makes it.
    pub async fn make(wanted: Wanted) -> StepResult<Self> {
        let user = wanted.ids.map(UserNamespace::new).transpose()?;
        let made = match &user {
            None => make_namespaces()?,
            Some(user) => make_namespaces_of(user)?,
        };
        if !wanted.sysctl.is_empty() {
            within(|| {
                enter(&made)?;
                sysctl::apply(&wanted.sysctl)
            })?;
        }
        let [network, ipc, uts] = made;
        mount_shm(wanted.shm_bytes)?;
        let mut shared = Self { network, ipc, uts, pid: None, user };
        if wanted.pid {
            shared.pid = Some(shared.make_pid_namespace().await?);
        }
        Ok(shared)
    }

    /// The network namespace.
    pub fn network(&self) -> &OwnedFd {
        &self.network
    }

    /// The namespace of this type, if the sandbox holds one.
    pub fn namespace(&self, kind: NamespaceType) -> Option<BorrowedFd<'_>> {
        match kind {
            NamespaceType::NETWORK => Some(self.network.as_fd()),
            NamespaceType::IPC => Some(self.ipc.as_fd()),
            NamespaceType::UTS => Some(self.uts.as_fd()),
            NamespaceType::PID => self.pid.as_ref().map(AsFd::as_fd),
            NamespaceType::USER => self.user.as_ref().map(AsFd::as_fd),
            _ => None,
        }
    }

    /// Makes a pid namespace, whose end is that of its init. Whose it is, is whose `/proc` of it may be mounted.
    async fn make_pid_namespace(&self) -> StepResult<OwnedFd> {
        let step = || "create the sandbox's pid namespace";
        const NEW_PID: u64 = libc::CLONE_NEWPID as u64;
        let (child, heard) = {
            let (parent, channel) = channel::pair()?;
            let child = match &self.user {
                None => fork(NEW_PID, || {
                    child::run(&channel, || {
                        self.begin_init(&channel)?;
                        self.be_init(&channel)
                    })
                }),
                Some(user) => fork(0, || {
                    child::run(&channel, || {
                        self.begin_init(&channel)?;
                        user.enter()?;
                        child::hand_over(&channel, NEW_PID, || {
                            userns::become_root()?;
                            self.be_init(&channel)
                        })
                    })
                }),
            };
            (child.step(step)?, parent)
        };
        let open = |pid: Pid| File::open(format!("/proc/{pid}/ns/pid")).step(step);
        // Before the channel is heard: it is collected by whoever collects all.
        let namespace = match &self.user {
            None => open(child.pid)?,
            Some(_) => match heard.hear().await? {
                Message::Moved(pid) => {
                    let namespace = open(pid)?;
                    heard.adopted()?;
                    namespace
                }
                said => return Err(StepError::Refused(format!("{}: {said:?} was unexpected", step()))),
            },
        };
        heard.done(step()).await?;
        Ok(namespace.into())
    }

    fn namespaces(&self) -> [(&OwnedFd, CloneFlags); 3] {
        [
            (&self.network, CloneFlags::CLONE_NEWNET),
            (&self.ipc, CloneFlags::CLONE_NEWIPC),
            (&self.uts, CloneFlags::CLONE_NEWUTS),
        ]
    }

    /// The first steps of the init, with the privileges of the guest's root.
    fn begin_init(&self, channel: &channel::Child) -> StepResult<()> {
        let mut keep: Vec<_> = self.namespaces().iter().map(|(fd, _)| fd.as_raw_fd()).collect();
        keep.extend(self.user.as_ref().map(|user| user.as_fd().as_raw_fd()));
        keep.push(channel.as_fd().as_raw_fd());
        child::begin(&ChildEnds::default(), &keep)?;
        // The kernel is to take any other process first: all end with this one.
        match std::fs::write("/proc/self/oom_score_adj", "-1000") {
            // Of the guest's root this is no privilege; of a test's it may be.
            Err(error) if error.kind() == io::ErrorKind::PermissionDenied => Ok(()),
            written => written.step(|| "set oom_score_adj"),
        }
    }

    /// The init of the pid namespace: what containers will see as PID 1 has no
    /// files, no privileges and no part of the guest's own namespaces.
    fn be_init(&self, channel: &channel::Child) -> StepResult<GivenUp> {
        self.leave_the_guest()?;
        channel.done(false, None)?;
        close_all().step(|| "close descriptors")?;
        collect_for_ever().step(|| "collect ended processes")
    }

    fn leave_the_guest(&self) -> StepResult<()> {
        for (fd, flag) in self.namespaces() {
            setns(fd, flag).step(|| "join the sandbox's namespaces")?;
        }
        unshare(CloneFlags::CLONE_NEWNS).step(|| "create a mount namespace")?;
        let step = || "enter an empty root file system";
        let old = open_path(Path::new("/")).step(step)?;
        let slave = Attributes { propagation: MsFlags::MS_SLAVE.bits(), ..Attributes::default() };
        set_attributes(old.as_fd(), slave, true).step(step)?;
        let empty =
            FsContext::new("tmpfs").and_then(|tmpfs| tmpfs.mount(libc::MOUNT_ATTR_RDONLY)).step(step)?;
        let place = Path::new(MOUNT_POINT);
        attach(&empty, open_path(place).step(step)?).step(step)?;
        rootfs::pivot(&Root::open(place).step(step)?)?;
        let none = agent::Capabilities::default();
        capabilities::apply_bounding(&none)?;
        capabilities::apply(&none)?;
        capabilities::set_no_new_privileges()
    }
}

/// What [`make_namespaces`] makes, in the order of what is open of a process.
const KINDS: [CloneFlags; 3] = [CloneFlags::CLONE_NEWNET, CloneFlags::CLONE_NEWIPC, CloneFlags::CLONE_NEWUTS];

fn open_of(process: &str) -> StepResult<[OwnedFd; 3]> {
    let open = |name| {
        let namespace = File::open(format!("/proc/{process}/ns/{name}")).map(OwnedFd::from);
        namespace.step(|| "open the sandbox's namespaces")
    };
    let [net, ipc, uts] = ["net", "ipc", "uts"].map(open);
    Ok([net?, ipc?, uts?])
}

/// The same as [`make_namespaces`], but for a user namespace's own.
fn make_namespaces_of(user: &UserNamespace) -> StepResult<[OwnedFd; 3]> {
    let make = || {
        unshare(KINDS.into_iter().collect())?;
        loopback::up()
    };
    user.with_process(make, |pid| open_of(&pid.to_string()))
}

/// New network, ipc and uts namespaces, with the guest's host name and the
/// loopback interface up.
fn make_namespaces() -> StepResult<[OwnedFd; 3]> {
    within(|| {
        unshare(KINDS.into_iter().collect()).step(|| "create the sandbox's namespaces")?;
        loopback::up().step(|| "bring up the loopback interface")?;
        open_of("self")
    })
}

fn enter(namespaces: &[OwnedFd; 3]) -> StepResult<()> {
    for (namespace, kind) in namespaces.iter().zip(KINDS) {
        setns(namespace, kind).step(|| "join the sandbox's namespaces")?;
    }
    Ok(())
}

/// Has `act` change the agent's namespaces; it is in others for as long as that takes.
fn within<T>(act: impl FnOnce() -> StepResult<T>) -> StepResult<T> {
    let own = open_of("self")?;
    let result = act();
    for (namespace, kind) in own.iter().zip(KINDS) {
        setns(namespace, kind).step(|| "go back to the guest's own namespaces")?;
    }
    result
}

fn mount_shm(bytes: u64) -> StepResult<()> {
    make_dir(Path::new(SHM_DIR))?;
    let bytes = if bytes == 0 { SHM_BYTES } else { bytes };
    let flags = MsFlags::MS_NOSUID | MsFlags::MS_NODEV | MsFlags::MS_NOEXEC;
    let options = format!("mode=1777,size={bytes}");
    nix::mount::mount(Some("shm"), SHM_DIR, Some("tmpfs"), flags, Some(options.as_str()))
        .step(|| format!("mount the sandbox's /dev/shm ({options})"))
}

/// Collects orphans until it is killed, with the sandbox.
fn collect_for_ever() -> nix::Result<GivenUp> {
    let mut ended = SigSet::empty();
    ended.add(Signal::SIGCHLD);
    ended.thread_block()?;
    loop {
        while wait_any()?.is_some() {}
        ended.wait()?;
    }
}
