//! Making a container: everything up to the `execve` of its first process.

use std::os::fd::{AsFd, AsRawFd, RawFd};

use nix::unistd::sethostname;
use rvm_protocol::agent;

use super::{
    cgroup::{self, Cgroup, limits::Limits},
    channel,
    child::{self, GivenUp},
    devices::{self, Device},
    exec,
    mounts::{self, Mount},
    namespaces::{Namespaces, born_in},
    rootfs::{self, Rootfs},
    sysctl, terminal, user,
};
use crate::{
    error::{Error, Step, StepResult},
    io::ChildEnds,
    sandbox::check_name,
    storage::Storage,
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
}

/// Checks what describes a process, first or added.
pub fn check_process(field: &str, process: &agent::Process) -> Result<(), Error> {
    exec::check(field, process)?;
    user::check(field, process)
}

impl Plan {
    /// Checks a request. Makes nothing but the container's writable layer.
    pub fn new(request: agent::CreateContainerRequest, storage: &mut Storage) -> Result<Self, Error> {
        check_process("process", &request.process)?;
        cgroup::check(&request.cgroup_path)?;
        rootfs::check(&request)?;
        sysctl::check(&request.sysctl)?;
        let namespaces = Namespaces::plan(&request.namespaces)?;
        for (field, name) in [("hostname", &request.hostname), ("domainname", &request.domainname)] {
            check_name(field, name)?;
            if !name.is_empty() && !namespaces.has_own_names() {
                return Err(Error::invalid(field, "cannot be set without a uts namespace"));
            }
        }
        let mounts = request.mounts.iter().enumerate();
        let mut mounts =
            mounts.map(|(i, mount)| Mount::plan(i, mount, storage)).collect::<Result<Vec<_>, _>>()?;
        if !namespaces.has_own_cgroups() {
            mounts = mounts.into_iter().map(Mount::in_the_guests_cgroup_namespace).collect();
        }
        let devices = request.devices.iter().enumerate();
        let devices = devices.map(|(i, device)| Device::plan(i, device)).collect::<Result<_, _>>()?;
        let limits = match request.resources.as_ref() {
            Some(resources) => Limits::plan("resources", resources, storage)?.with_devices()?,
            None => Limits::default(),
        };
        let lower = storage.share_path(&request.rootfs.share_path);
        let layer = storage.layer(&request.container_id)?;
        let rootfs = Rootfs::new(&request, lower, layer)?;
        Ok(Self { request, namespaces, rootfs, mounts, devices, limits })
    }

    /// The first process.
    pub fn process(&self) -> &agent::Process {
        &self.request.process
    }

    /// Where the container's cgroup is to be.
    pub fn cgroup_path(&self) -> &str {
        &self.request.cgroup_path
    }

    /// What it may use.
    pub fn limits(&self) -> &Limits {
        &self.limits
    }

    /// Whether the container has no writable layer from before.
    pub fn has_fresh_layer(&self) -> bool {
        self.rootfs.is_fresh()
    }

    /// Whether the end of the first process is the end of all.
    pub fn has_own_pids(&self) -> bool {
        self.namespaces.has_own_pids()
    }

    /// Makes the first process, which prepares itself and then waits.
    pub fn spawn(&self, cgroup: &Cgroup, ends: &ChildEnds) -> StepResult<(Child, channel::Parent)> {
        let (parent, channel) = channel::pair()?;
        let child = born_in(self.namespaces.pid.as_ref(), || {
            spawn(cgroup.dir(), self.namespaces.born_into, || {
                child::run(&channel, || self.first_process(&channel, ends))
            })
            .step(|| "create the container's first process")
        })?;
        Ok((child, parent))
    }

    /// In the child: from a copy of the agent to the container's program.
    fn first_process(&self, channel: &channel::Child, ends: &ChildEnds) -> StepResult<GivenUp> {
        let process = &*self.request.process;
        let keep: Vec<RawFd> = self.namespaces.descriptors().chain([channel.as_fd().as_raw_fd()]).collect();
        child::begin(ends, &keep)?;
        user::apply_oom_score(process)?;

        self.namespaces.enter()?;
        self.set_names()?;
        sysctl::apply(&self.request.sysctl)?;

        let root = self.rootfs.mount()?;
        let unfinished = mounts::make_all(&self.mounts, &root)?;
        if !self.mounts.iter().any(Mount::brings_devices) {
            devices::make_all(&self.devices, &root)?;
        }
        rootfs::pivot(&root)?;

        let terminal = if process.terminal {
            let terminal = terminal::open_controlling()?;
            terminal.become_console()?;
            Some(terminal)
        } else {
            None
        };
        unfinished.finish()?;
        self.rootfs.protect()?;
        child::finish(process, terminal, ends, channel)
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
