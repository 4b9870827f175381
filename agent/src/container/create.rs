//! Making a container: everything up to the `execve` of its first process.
//!
//! Usually the child the agent makes becomes the first process. A container
//! with a user namespace takes two: one with the privileges of the guest's root,
//! which prepares what needs them, and its sibling, which is born into the user
//! namespace, and into the pid namespace that belongs to it, and goes on there.

use std::{
    cell::Cell,
    fs::File,
    io::Read,
    os::fd::{AsFd, AsRawFd, OwnedFd, RawFd},
    path::Path,
    sync::Arc,
};

use nix::{
    fcntl::OFlag,
    sched::{CloneFlags, unshare},
    unistd::{pipe2, sethostname, setsid},
};
use rvm_protocol::agent;

use super::{
    attributes,
    cgroup::{self, Cgroup, limits::Limits},
    channel,
    child::{self, Common, GivenUp},
    devices::{self, Device},
    exec,
    hooks::{self, Hooks},
    keyring,
    mounts::{self, Mount},
    namespaces::{Namespaces, born_in},
    paths::Root,
    rootfs::{self, Rootfs},
    seccomp::Filter,
    sysctl, terminal, user,
    userns::{self, UserNamespace},
};
use crate::{
    error::{Error, Step, StepResult},
    io::ChildEnds,
    sandbox::check_name,
    storage::Scratch,
    sys::process::{Child, fork_sibling, spawn},
};

/// A request that has been checked, with everything it refers to opened.
#[derive(Debug)]
pub struct Plan {
    request: agent::CreateContainerRequest,
    namespaces: Namespaces,
    rootfs: Rootfs,
    mounts: Vec<Mount>,
    devices: Vec<Device>,
    limits: Limits,
    common: Arc<Common>,
}

/// What takes the guest's root to make, ready to be put in place by whoever is
/// the container's; none where that is the same.
#[derive(Default)]
struct Parts {
    sources: Option<Vec<Option<OwnedFd>>>,
    devices: Option<Vec<OwnedFd>>,
}

/// Checks what describes a process, first or added.
pub fn check_process(field: &str, process: &agent::Process) -> Result<(), Error> {
    exec::check(field, process)?;
    attributes::check(field, process)?;
    user::check(field, process)
}

impl Plan {
    /// Checks a request for a container that writes to `scratch`. Makes nothing.
    pub fn new(mut request: agent::CreateContainerRequest, scratch: &Scratch) -> Result<Self, Error> {
        check_process("process", &request.process)?;
        cgroup::check(&request.cgroup_path)?;
        rootfs::check(&request)?;
        sysctl::check(&request.sysctl)?;
        hooks::check("create_container_hooks", &request.create_container_hooks)?;
        hooks::check("start_container_hooks", &request.start_container_hooks)?;
        let filter = request.seccomp.as_ref().map(Filter::new).transpose()?;
        let namespaces = Namespaces::plan(&request)?;
        for (field, name) in [("hostname", &request.hostname), ("domainname", &request.domainname)] {
            check_name(field, name)?;
            if !name.is_empty() && !namespaces.has_own_names() {
                return Err(Error::invalid(field, "cannot be set without a uts namespace"));
            }
        }
        let mounts = request.mounts.iter().enumerate();
        let mut mounts = mounts.map(|(i, mount)| Mount::plan(i, mount)).collect::<Result<Vec<_>, _>>()?;
        if !namespaces.has_own_cgroups() {
            mounts = mounts.into_iter().map(Mount::in_the_guests_cgroup_namespace).collect();
        }
        let devices = request.devices.iter().enumerate();
        let devices = devices.map(|(i, device)| Device::plan(i, device)).collect::<Result<Vec<_>, _>>()?;
        let limits = match request.resources.as_mut() {
            Some(resources) => {
                devices::renumber(&mut resources.device_rules, &request.devices, &devices);
                Limits::plan("resources", resources, scratch)?.with_devices()?
            }
            None => Limits::default(),
        };
        let devices = devices::all(devices);
        let rootfs = Rootfs::new(&request, scratch)?;
        let ids = namespaces.user.as_ref().map(|user| user.ids.clone());
        let container_id = request.container_id.clone();
        let common = Arc::new(Common { container_id, filter, personality: request.personality, ids });
        Ok(Self { request, namespaces, rootfs, mounts, devices, limits, common })
    }

    /// The first process.
    pub fn process(&self) -> &agent::Process {
        &self.request.process
    }

    /// What the first process shares with those that will be added.
    pub fn common(&self) -> &Arc<Common> {
        &self.common
    }

    /// Where the container's cgroup is to be.
    pub fn cgroup_path(&self) -> &str {
        &self.request.cgroup_path
    }

    /// What it may use.
    pub fn limits(&self) -> &Limits {
        &self.limits
    }

    /// Whether the end of the first process is the end of all.
    pub fn has_own_pids(&self) -> bool {
        self.namespaces.has_own_pids()
    }

    /// Makes a child that prepares the container and then waits, itself or,
    /// after it has said so, another one in its place.
    pub fn spawn(&self, cgroup: &Cgroup, ends: &ChildEnds) -> StepResult<(Child, channel::Parent)> {
        let (parent, channel) = channel::pair()?;
        let make = |namespaces, body: &dyn Fn() -> StepResult<GivenUp>| {
            spawn(cgroup.dir(), namespaces, || child::run(&channel, body))
                .step(|| "create the container's first process")
        };
        let child = match &self.namespaces.user {
            Some(user) => make(0, &|| self.prepare_for(user, &channel, ends))?,
            None => born_in(self.namespaces.pid.as_ref(), || {
                make(self.namespaces.born_into(), &|| self.first_process(&channel, ends))
            })?,
        };
        Ok((child, parent))
    }

    /// In the child: from a copy of the agent to the container's program.
    fn first_process(&self, channel: &channel::Child, ends: &ChildEnds) -> StepResult<GivenUp> {
        self.begin(channel, ends)?;
        self.namespaces.make()?;
        self.namespaces.make_time()?;
        self.namespaces.enter_time()?;
        let root = self.rootfs.mount()?;
        self.complete(root, Parts::default(), channel, ends)
    }

    /// In the first of two children: prepares everything for the second, which
    /// it makes in the user namespace.
    fn prepare_for(
        &self,
        user: &UserNamespace,
        channel: &channel::Child,
        ends: &ChildEnds,
    ) -> StepResult<GivenUp> {
        self.begin(channel, ends)?;
        user.ids.own_standard_streams(&self.request.process.user)?;
        unshare(CloneFlags::CLONE_NEWNS).step(|| "create a mount namespace")?;
        self.rootfs.mount()?;
        let place = Path::new(rootfs::MOUNT_POINT);
        let devices = devices::make_elsewhere(&self.devices, place)?;
        let parts = Parts { sources: Some(mounts::open_sources(&self.mounts)?), devices: Some(devices) };

        attributes::raise_limits(&self.request.process)?;
        let born_into = self.namespaces.children_pid()?;
        user.enter()?;
        self.namespaces.make_time()?;
        // Closed once the agent knows whom it is to hear from.
        let (wait, go) = pipe2(OFlag::O_CLOEXEC).step(|| "create a pipe")?;
        let go = Cell::new(Some(go));
        let step = || "create the container's first process";
        let first = fork_sibling(born_into, || {
            // In the memory of the second child alone.
            drop(go.take());
            child::run(channel, || {
                File::from(wait).read_to_end(&mut Vec::new()).step(step)?;
                self.first_process_in_user_namespace(parts, channel, ends)
            })
        })
        .step(step)?;
        channel.moved(first)?;
        Ok(GivenUp)
    }

    /// In the second of two children.
    fn first_process_in_user_namespace(
        &self,
        parts: Parts,
        channel: &channel::Child,
        ends: &ChildEnds,
    ) -> StepResult<GivenUp> {
        setsid().step(|| "create a session")?;
        userns::become_root()?;
        self.namespaces.make()?;
        let root = rootfs::mount_again()?;
        self.complete(root, parts, channel, ends)
    }

    fn begin(&self, channel: &channel::Child, ends: &ChildEnds) -> StepResult<()> {
        let own = self.mounts.iter().filter_map(Mount::descriptor).chain([channel.as_fd().as_raw_fd()]);
        let keep: Vec<RawFd> = self.namespaces.descriptors().chain(own).collect();
        child::begin(ends, &keep)?;
        user::apply_oom_score(&self.request.process)?;
        self.namespaces.join()
    }

    /// In the container's namespaces: from an empty root file system to `execve`.
    fn complete(
        &self,
        root: Root,
        parts: Parts,
        channel: &channel::Child,
        ends: &ChildEnds,
    ) -> StepResult<GivenUp> {
        let process = &*self.request.process;
        let ring = keyring::join_session(&self.request.container_id)?;
        keyring::open_to(ring, self.namespaces.user.is_some())?;
        self.set_names()?;
        sysctl::apply(&self.request.sysctl)?;

        let unfinished = mounts::make_all(&self.mounts, parts.sources, &root)?;
        if !self.mounts.iter().any(Mount::brings_devices) {
            devices::make_all(&self.devices, parts.devices.as_deref(), &root)?;
        }
        self.hooks("createContainer", &self.request.create_container_hooks, "creating")
            .run(Some(root.as_fd()))?;
        rootfs::pivot(&root)?;

        if process.terminal {
            let terminal = terminal::open_controlling()?;
            terminal.become_console()?;
            channel.terminal(terminal.master.as_fd())?;
        }
        unfinished.finish()?;
        self.rootfs.protect()?;
        let hooks = self.hooks("startContainer", &self.request.start_container_hooks, "created");
        child::finish(process, &self.common, Some(hooks), ends, channel)
    }

    fn hooks<'a>(&'a self, kind: &'static str, hooks: &'a [agent::Hook], status: &'static str) -> Hooks<'a> {
        Hooks { kind, hooks, state: &self.request.hook_state, status }
    }

    fn set_names(&self) -> StepResult<()> {
        let (hostname, domainname) = (&self.request.hostname, &self.request.domainname);
        if !hostname.is_empty() {
            sethostname(hostname).step(|| format!("set the host name {hostname:?}"))?;
        }
        if !domainname.is_empty() {
            set_domain_name(domainname).step(|| format!("set the domain name {domainname:?}"))?;
        }
        Ok(())
    }
}

fn set_domain_name(name: &str) -> nix::Result<()> {
    // SAFETY: the kernel reads `len` bytes, which `name` has.
    nix::errno::Errno::result(unsafe { libc::setdomainname(name.as_ptr().cast(), name.len()) }).map(drop)
}
