//! Making a container: everything up to the `execve` of its first process.
//!
//! Usually the child the agent makes becomes the first process. Two kinds of
//! container take two: one with the privileges of the guest's root, which
//! prepares what needs them, and its sibling, which goes on
//!
//! * in the user namespace of the container, into which it is born, and into the
//!   pid namespace that belongs to it;
//! * in the pid namespace that the container joins, where others must not find
//!   anything of the agent's: the root file system is the container's by then.

use std::{
    os::fd::{AsFd, AsRawFd, OwnedFd, RawFd},
    path::Path,
    sync::Arc,
};

use nix::{
    sched::{CloneFlags, unshare},
    unistd::sethostname,
};
use rvm_protocol::agent;

use super::{
    attributes,
    cgroup::{self, Cgroup, limits::Limits},
    child::{self, Common, GivenUp},
    devices::{self, Device},
    hooks::{self, Hooks},
    keyring,
    mounts::{self, Mount},
    namespaces::Namespaces,
    paths::Root,
    program,
    rootfs::{self, Rootfs},
    seccomp::Filter,
    shared::Shared,
    sysctl, terminal, user,
    userns::{self, UserNamespace},
};
use crate::{
    channel,
    error::{Error, Step, StepResult, check_name},
    init::mounts::MOUNT_POINT,
    io::ChildEnds,
    reaper::Reaper,
    storage::Scratch,
    sys::process::{Child, spawn},
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
    program::check(field, process)?;
    attributes::check(field, process)?;
    user::check(field, process)
}

impl Plan {
    /// Checks a request for a container that writes to `scratch`, with what the
    /// sandbox shares where it wants some of that. Makes nothing.
    pub fn new(
        mut request: agent::CreateContainerRequest,
        scratch: &Scratch,
        shared: Option<&Shared>,
    ) -> Result<Self, Error> {
        check_process("process", &request.process)?;
        cgroup::check(&request.cgroup_path)?;
        rootfs::check(&request)?;
        sysctl::check(&request.sysctl)?;
        hooks::check("create_container_hooks", &request.create_container_hooks)?;
        hooks::check("start_container_hooks", &request.start_container_hooks)?;
        let filter = request.seccomp.as_ref().map(Filter::new).transpose()?;
        let namespaces = Namespaces::plan(&request, shared)?;
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

    /// Makes what its mounts show and is not there yet: memory volumes, file systems of the host's block devices.
    pub async fn open_mounts(&mut self, reaper: &Reaper) -> StepResult<()> {
        for mount in &mut self.mounts {
            mount.open(reaper).await?;
        }
        Ok(())
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

    /// How many processes the cgroup that contains it may have.
    pub fn pids_max_above(&self) -> u64 {
        self.request.pids_max_above
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
        let child = match (&self.namespaces.user, &self.namespaces.pid) {
            (Some(user), _) => make(0, &|| self.prepare_for(user, &channel, ends))?,
            (None, Some(_)) => make(0, &|| self.prepare_to_join(&channel, ends))?,
            (None, None) => make(self.namespaces.born_into(), &|| self.first_process(&channel, ends))?,
        };
        Ok((child, parent))
    }

    /// Whether another child than the one that is made goes on as the first process.
    pub fn moves(&self) -> bool {
        self.namespaces.user.is_some() || self.namespaces.pid.is_some()
    }

    /// In the child: from a copy of the agent to the container's program.
    fn first_process(&self, channel: &channel::Child, ends: &ChildEnds) -> StepResult<GivenUp> {
        let root = self.begin_in_namespaces(channel, ends)?;
        let unfinished = self.fill(&root, Parts::default())?;
        rootfs::pivot(&root)?;
        self.complete(unfinished, channel, ends)
    }

    /// In the first of two children: prepares everything for the second, which
    /// it makes in the pid namespace that is joined.
    fn prepare_to_join(&self, channel: &channel::Child, ends: &ChildEnds) -> StepResult<GivenUp> {
        let root = self.begin_in_namespaces(channel, ends)?;
        let parts = Parts { sources: Some(mounts::open_sources(&self.mounts)?), devices: None };
        rootfs::pivot(&root)?;
        let born_into = self.namespaces.children_pid()?;
        child::hand_over(channel, born_into, || {
            // What shows processes shows those of the pid namespace it is made in.
            let root = Root::open(Path::new("/")).step(|| "open the root file system")?;
            let unfinished = self.fill(&root, parts)?;
            self.complete(unfinished, channel, ends)
        })
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
        let place = Path::new(MOUNT_POINT);
        let devices = devices::make_elsewhere(&self.devices, place)?;
        let parts = Parts { sources: Some(mounts::open_sources(&self.mounts)?), devices: Some(devices) };

        attributes::raise_limits(&self.request.process)?;
        let born_into = self.namespaces.children_pid()?;
        user.enter()?;
        self.namespaces.make_time()?;
        child::hand_over(channel, born_into, || self.first_process_in_user_namespace(parts, channel, ends))
    }

    /// In the second of two children.
    fn first_process_in_user_namespace(
        &self,
        parts: Parts,
        channel: &channel::Child,
        ends: &ChildEnds,
    ) -> StepResult<GivenUp> {
        userns::become_root()?;
        self.namespaces.make()?;
        let root = rootfs::mount_again()?;
        self.set_names_and_parameters()?;
        let unfinished = self.fill(&root, parts)?;
        rootfs::pivot(&root)?;
        self.complete(unfinished, channel, ends)
    }

    /// In the child: into the container's namespaces, those that are not its first
    /// child's to be born into; returns its root file system, mounted.
    fn begin_in_namespaces(&self, channel: &channel::Child, ends: &ChildEnds) -> StepResult<Root> {
        self.begin(channel, ends)?;
        self.namespaces.make()?;
        self.namespaces.make_time()?;
        self.namespaces.enter_time()?;
        let root = self.rootfs.mount()?;
        self.set_names_and_parameters()?;
        Ok(root)
    }

    fn begin(&self, channel: &channel::Child, ends: &ChildEnds) -> StepResult<()> {
        let own = self.mounts.iter().filter_map(Mount::descriptor).chain([channel.as_fd().as_raw_fd()]);
        let keep: Vec<RawFd> = self.namespaces.descriptors().chain(own).collect();
        child::begin(ends, &keep)?;
        user::apply_oom_score(&self.request.process)?;
        mounts::reach_volumes(&self.mounts)?;
        self.namespaces.join()
    }

    /// In the container's namespaces, while the agent's `/proc` is in sight.
    fn set_names_and_parameters(&self) -> StepResult<()> {
        self.set_names()?;
        sysctl::apply(&self.request.sysctl)
    }

    /// In the container's namespaces: mounts and devices below `root`.
    fn fill(&self, root: &Root, parts: Parts) -> StepResult<mounts::Unfinished> {
        let ring = keyring::join_session(&self.request.container_id)?;
        keyring::open_to(ring, self.namespaces.user.is_some())?;
        let unfinished = mounts::make_all(&self.mounts, parts.sources, root)?;
        if !self.mounts.iter().any(Mount::brings_devices) {
            devices::make_all(&self.devices, parts.devices.as_deref(), root)?;
        }
        self.hooks("createContainer", &self.request.create_container_hooks, "creating")
            .run(Some(root.as_fd()))?;
        Ok(unfinished)
    }

    /// In the container's root file system: to `execve`.
    fn complete(
        &self,
        unfinished: mounts::Unfinished,
        channel: &channel::Child,
        ends: &ChildEnds,
    ) -> StepResult<GivenUp> {
        let process = &*self.request.process;
        if process.terminal {
            let terminal = terminal::open_controlling()?;
            terminal.become_console()?;
            channel.terminal(terminal.master.as_fd())?;
        }
        make_cwd(&process.cwd)?;
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

/// As runc does, whatever the image, the user and the read-only flag of the root
/// file system: a working directory that is not there is made, for root.
fn make_cwd(cwd: &str) -> StepResult<()> {
    let made = Root::open(Path::new("/")).and_then(|root| root.make_dir(Path::new(cwd)));
    made.map(drop).step(|| format!("make the working directory {cwd:?}"))
}

fn set_domain_name(name: &str) -> nix::Result<()> {
    // SAFETY: the kernel reads `len` bytes, which `name` has.
    nix::errno::Errno::result(unsafe { libc::setdomainname(name.as_ptr().cast(), name.len()) }).map(drop)
}
