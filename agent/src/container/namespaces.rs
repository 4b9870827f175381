//! Namespaces of a container: new ones and those it joins.

use std::{
    fs::{self, File},
    os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd},
    path::Path,
};

use nix::{
    errno::Errno,
    fcntl::{OFlag, open},
    sched::{CloneFlags, setns, unshare},
    sys::stat::{Mode, fstat, stat},
};
use rvm_protocol::agent::{CreateContainerRequest, Namespace, NamespaceType, TimeOffset};

use super::{
    shared::Shared,
    userns::{Ids, UserNamespace},
};
use crate::{
    error::{Error, Step, StepError, StepResult},
    sys::loopback,
};

/// `CLONE_NEWTIME`, unknown to `nix`.
const CLONE_NEWTIME: i32 = 0x80;
/// linux/nsfs.h: the `CLONE_NEW*` flag of a namespace's descriptor.
const NS_GET_NSTYPE: u64 = 0xb703;

/// The namespaces of a container to be made.
#[derive(Debug)]
pub struct Namespaces {
    /// The pid namespace to be born into, where it is joined.
    pub pid: Option<OwnedFd>,
    /// The user namespace that is to own the others, where it is not the guest's.
    pub user: Option<UserNamespace>,
    /// Joined by the child, with what each is called in errors.
    join: Vec<(CloneFlags, OwnedFd, String)>,
    /// New ones, but for the user namespace.
    new: CloneFlags,
    /// The content of `/proc/PID/timens_offsets` for a new time namespace.
    time_offsets: String,
}

fn name(kind: NamespaceType) -> &'static str {
    match kind {
        NamespaceType::UNSPECIFIED => "unspecified",
        NamespaceType::PID => "pid",
        NamespaceType::NETWORK => "network",
        NamespaceType::MOUNT => "mount",
        NamespaceType::IPC => "ipc",
        NamespaceType::UTS => "uts",
        NamespaceType::USER => "user",
        NamespaceType::CGROUP => "cgroup",
        NamespaceType::TIME => "time",
    }
}

fn flag(kind: NamespaceType) -> CloneFlags {
    match kind {
        NamespaceType::UNSPECIFIED => CloneFlags::empty(),
        NamespaceType::PID => CloneFlags::CLONE_NEWPID,
        NamespaceType::NETWORK => CloneFlags::CLONE_NEWNET,
        NamespaceType::MOUNT => CloneFlags::CLONE_NEWNS,
        NamespaceType::IPC => CloneFlags::CLONE_NEWIPC,
        NamespaceType::UTS => CloneFlags::CLONE_NEWUTS,
        NamespaceType::USER => CloneFlags::CLONE_NEWUSER,
        NamespaceType::CGROUP => CloneFlags::CLONE_NEWCGROUP,
        NamespaceType::TIME => CloneFlags::from_bits_retain(CLONE_NEWTIME),
    }
}

impl Namespaces {
    /// Checks what a request asks for, opens what is to be joined and makes the
    /// user namespace.
    pub fn plan(request: &CreateContainerRequest, shared: Option<&Shared>) -> Result<Self, Error> {
        let mut plan = Self {
            pid: None,
            user: None,
            join: Vec::new(),
            new: CloneFlags::empty(),
            time_offsets: time_offsets(&request.time_offsets)?,
        };
        let mut seen = Vec::new();
        for (index, namespace) in request.namespaces.iter().enumerate() {
            let field = format!("namespaces[{index}]");
            let kind = namespace.type_.enum_value().map_err(|number| {
                Error::invalid(format!("{field}.type"), format!("{number} is not a namespace type"))
            })?;
            if seen.contains(&kind) {
                return Err(Error::invalid(
                    format!("{field}.type"),
                    format!("{} is given twice", name(kind)),
                ));
            }
            seen.push(kind);
            plan.add(&field, kind, namespace, shared)?;
        }
        if !plan.new.contains(CloneFlags::CLONE_NEWNS) {
            return Err(Error::invalid("namespaces", "a container needs a new mount namespace"));
        }
        if !plan.time_offsets.is_empty() && !plan.new.contains(flag(NamespaceType::TIME)) {
            return Err(Error::invalid("time_offsets", "cannot be set without a new time namespace"));
        }
        if plan.new.contains(CloneFlags::CLONE_NEWUSER) {
            plan.new.remove(CloneFlags::CLONE_NEWUSER);
            let ids = Ids::new(&request.uid_mappings, &request.gid_mappings)?;
            ids.check_user("process.user", &request.process.user)?;
            plan.user = Some(UserNamespace::new(ids)?);
        } else if !request.uid_mappings.is_empty() || !request.gid_mappings.is_empty() {
            let reason = "cannot be set without a new user namespace";
            return Err(Error::invalid("uid_mappings, gid_mappings", reason));
        } else if let Some(user) = &plan.user {
            user.ids.check_user("process.user", &request.process.user)?;
        }
        Ok(plan)
    }

    fn add(
        &mut self,
        field: &str,
        kind: NamespaceType,
        namespace: &Namespace,
        shared: Option<&Shared>,
    ) -> Result<(), Error> {
        let path = namespace.path.as_str();
        if kind == NamespaceType::UNSPECIFIED {
            return Err(Error::invalid(format!("{field}.type"), "names no namespace type"));
        }
        if namespace.sandbox {
            if !path.is_empty() {
                return Err(Error::invalid(
                    format!("{field}.path"),
                    "must be empty for one of the sandbox's",
                ));
            }
            let held = shared.and_then(|shared| shared.namespace(kind)).ok_or_else(|| {
                let reason = format!("the sandbox holds no {} namespace", name(kind));
                Error::invalid(format!("{field}.sandbox"), reason)
            })?;
            let what = format!("the sandbox's {} namespace", name(kind));
            let fd = held.try_clone_to_owned().step(|| format!("join {what}"))?;
            return self.join_one(kind, fd, what);
        }
        if path.is_empty() {
            self.new |= flag(kind);
            return Ok(());
        }
        let field = format!("{field}.path");
        if kind == NamespaceType::MOUNT {
            return Err(Error::invalid(field, "a container cannot join a mount namespace"));
        }
        let fd = open_namespace(&field, kind, path)?;
        self.join_one(kind, fd, format!("the {} namespace {path:?}", name(kind)))
    }

    fn join_one(&mut self, kind: NamespaceType, fd: OwnedFd, what: String) -> Result<(), Error> {
        match kind {
            NamespaceType::PID => self.pid = Some(fd),
            // Nobody can join the user namespace they are in.
            NamespaceType::USER if is_own(&fd, "user").step(|| format!("inspect {what}"))? => {}
            NamespaceType::USER => self.user = Some(UserNamespace::join(fd, &what)?),
            _ => self.join.push((flag(kind), fd, what)),
        }
        Ok(())
    }

    /// The flags to make the container's first process with, unless it is to
    /// have another user namespace.
    pub fn born_into(&self) -> u64 {
        (self.new & CloneFlags::CLONE_NEWPID).bits() as u64
    }

    /// Whether the container's first process is PID 1 of a pid namespace, whose
    /// end the kernel makes the end of every process in it.
    pub fn has_own_pids(&self) -> bool {
        self.new.contains(CloneFlags::CLONE_NEWPID)
    }

    /// Whether names set by the container are its own.
    pub fn has_own_names(&self) -> bool {
        self.new.contains(CloneFlags::CLONE_NEWUTS)
            || self.join.iter().any(|(flag, ..)| *flag == CloneFlags::CLONE_NEWUTS)
    }

    /// Whether it sees its cgroup as the root of the hierarchy.
    pub fn has_own_cgroups(&self) -> bool {
        self.new.contains(CloneFlags::CLONE_NEWCGROUP)
            || self.join.iter().any(|(flag, ..)| *flag == CloneFlags::CLONE_NEWCGROUP)
    }

    /// Descriptors the child needs.
    pub fn descriptors(&self) -> impl Iterator<Item = RawFd> {
        let joined = self.join.iter().map(|(_, fd, _)| fd.as_raw_fd());
        let pid = self.pid.iter().map(AsRawFd::as_raw_fd);
        joined.chain(pid).chain(self.user.iter().map(|user| user.as_fd().as_raw_fd()))
    }

    /// In the child: joins what is to be joined, but for pid and user namespaces.
    pub fn join(&self) -> StepResult<()> {
        for (flag, fd, what) in &self.join {
            setns(fd, *flag).step(|| format!("join {what}"))?;
        }
        Ok(())
    }

    /// In the child: makes the new ones, but for pid, user and time namespaces.
    pub fn make(&self) -> StepResult<()> {
        let others = CloneFlags::CLONE_NEWPID | flag(NamespaceType::TIME);
        unshare(self.new - others).step(|| "create namespaces")?;
        if self.new.contains(CloneFlags::CLONE_NEWNET) {
            loopback::up().step(|| "bring up the loopback interface")?;
        }
        Ok(())
    }

    /// In the child: makes the time namespace, into which its children will be born.
    pub fn make_time(&self) -> StepResult<()> {
        if !self.new.contains(flag(NamespaceType::TIME)) {
            return Ok(());
        }
        unshare(flag(NamespaceType::TIME)).step(|| "create a time namespace")?;
        if self.time_offsets.is_empty() {
            return Ok(());
        }
        fs::write("/proc/self/timens_offsets", &self.time_offsets)
            .step(|| format!("set time offsets {:?}", self.time_offsets.trim_end()))
    }

    /// In the child: enters the time namespace it has made.
    pub fn enter_time(&self) -> StepResult<()> {
        if !self.new.contains(flag(NamespaceType::TIME)) {
            return Ok(());
        }
        let made = File::open("/proc/self/ns/time_for_children").step(|| "open the time namespace")?;
        setns(made, flag(NamespaceType::TIME)).step(|| "enter the time namespace")
    }

    /// In the child: lets its children be born into the pid namespace that is
    /// joined, if any. Returns the flags to make them with.
    pub fn children_pid(&self) -> StepResult<u64> {
        if let Some(pid) = &self.pid {
            setns(pid, CloneFlags::CLONE_NEWPID).step(|| "join the pid namespace")?;
        }
        Ok(self.born_into())
    }
}

/// Opens the namespace at a path of the guest; what else may be there is refused.
fn open_namespace(field: &str, kind: NamespaceType, path: &str) -> Result<OwnedFd, Error> {
    let wrong = |reason: &str| Error::invalid(field, format!("{path:?} {reason}"));
    // Non-blocking: a FIFO must not keep the agent waiting.
    let flags = OFlag::O_RDONLY | OFlag::O_NONBLOCK | OFlag::O_CLOEXEC;
    let fd = match open(Path::new(path), flags, Mode::empty()) {
        Err(Errno::ENOENT | Errno::ENOTDIR) => return Err(wrong("does not exist in the sandbox")),
        opened => opened.step(|| format!("open the {} namespace {path:?}", name(kind)))?,
    };
    // SAFETY: NS_GET_NSTYPE takes no argument.
    let found = unsafe { libc::ioctl(fd.as_raw_fd(), NS_GET_NSTYPE as _) };
    if found != flag(kind).bits() {
        return Err(wrong(&format!("is no {} namespace", name(kind))));
    }
    Ok(fd)
}

/// Whether a descriptor refers to this process's namespace `name`.
fn is_own(fd: impl AsFd, name: &str) -> nix::Result<bool> {
    let (this, own) = (fstat(fd)?, stat(Path::new("/proc/self/ns").join(name).as_path())?);
    Ok((this.st_dev, this.st_ino) == (own.st_dev, own.st_ino))
}

fn time_offsets(offsets: &[TimeOffset]) -> Result<String, Error> {
    let mut text = String::new();
    for (index, offset) in offsets.iter().enumerate() {
        let field = |name: &str| format!("time_offsets[{index}].{name}");
        if !matches!(offset.clock.as_str(), "monotonic" | "boottime") {
            let reason = format!("{:?} must be \"monotonic\" or \"boottime\"", offset.clock);
            return Err(Error::invalid(field("clock"), reason));
        }
        if offset.nanosecs >= 1_000_000_000 {
            let reason = format!("{} must be below 1000000000", offset.nanosecs);
            return Err(Error::invalid(field("nanosecs"), reason));
        }
        text.push_str(&format!("{} {} {}\n", offset.clock, offset.secs, offset.nanosecs));
    }
    Ok(text)
}

/// In the child of an additional process: joins all namespaces of the process a
/// pidfd refers to; its pid namespace is joined by the children made from here
/// on. The user namespace only where the container has another than the guest's.
pub fn enter_all_of(process: BorrowedFd<'_>, user: bool) -> StepResult<()> {
    let mut flags = CloneFlags::CLONE_NEWNS
        | CloneFlags::CLONE_NEWPID
        | CloneFlags::CLONE_NEWUTS
        | CloneFlags::CLONE_NEWIPC
        | CloneFlags::CLONE_NEWNET
        | CloneFlags::CLONE_NEWCGROUP
        | flag(NamespaceType::TIME);
    flags.set(CloneFlags::CLONE_NEWUSER, user);
    match setns(process, flags) {
        Err(Errno::ESRCH) => Err(StepError::Refused("create a process: the container has stopped".into())),
        joined => joined.step(|| "join the container's namespaces"),
    }
}

#[cfg(test)]
mod tests {
    use rvm_protocol::agent::IdMapping;

    use super::*;

    fn namespace(kind: NamespaceType, path: &str) -> Namespace {
        Namespace { type_: kind.into(), path: path.into(), ..Default::default() }
    }

    fn request(namespaces: &[Namespace]) -> CreateContainerRequest {
        CreateContainerRequest { namespaces: namespaces.to_vec(), ..Default::default() }
    }

    fn plan(namespaces: &[Namespace]) -> Result<Namespaces, String> {
        Namespaces::plan(&request(namespaces), None).map_err(|error| error.to_string())
    }

    #[test]
    fn the_usual_six() {
        let plan = plan(&[
            namespace(NamespaceType::PID, ""),
            namespace(NamespaceType::NETWORK, ""),
            namespace(NamespaceType::IPC, ""),
            namespace(NamespaceType::UTS, ""),
            namespace(NamespaceType::MOUNT, ""),
            namespace(NamespaceType::CGROUP, ""),
        ])
        .unwrap();
        assert!(plan.has_own_pids() && plan.has_own_names() && plan.user.is_none());
        assert_eq!(plan.born_into(), libc::CLONE_NEWPID as u64);
        assert!(plan.new.contains(CloneFlags::CLONE_NEWCGROUP | CloneFlags::CLONE_NEWNS));
    }

    #[test]
    fn joined_ones_are_opened_and_kept_for_the_child() {
        let plan = plan(&[
            namespace(NamespaceType::MOUNT, ""),
            namespace(NamespaceType::NETWORK, "/proc/self/ns/net"),
            namespace(NamespaceType::PID, "/proc/self/ns/pid"),
            // One's own needs no joining.
            namespace(NamespaceType::USER, "/proc/self/ns/user"),
        ])
        .unwrap();
        assert!(!plan.has_own_pids() && plan.pid.is_some() && plan.user.is_none());
        assert_eq!(plan.descriptors().count(), 2);
    }

    #[test]
    fn what_cannot_be_done_is_refused_by_name() {
        let mount = || namespace(NamespaceType::MOUNT, "");
        let joined = |kind, path: &str| vec![mount(), namespace(kind, path)];
        let of_sandbox = |path: &str| {
            let shared = Namespace { sandbox: true, ..namespace(NamespaceType::IPC, path) };
            vec![mount(), shared]
        };
        for (requested, expected) in [
            (of_sandbox("/a"), "namespaces[1].path: must be empty for one of the sandbox's"),
            (of_sandbox(""), "namespaces[1].sandbox: the sandbox holds no ipc namespace"),
            (vec![], "namespaces: a container needs a new mount namespace"),
            (vec![mount(), mount()], "namespaces[1].type: mount is given twice"),
            (
                vec![mount(), namespace(NamespaceType::USER, "")],
                "uid_mappings: a user namespace needs 1 to 340, has 0",
            ),
            (
                vec![namespace(NamespaceType::MOUNT, "/proc/1/ns/mnt")],
                "namespaces[0].path: a container cannot join a mount namespace",
            ),
            (
                joined(NamespaceType::IPC, "/nonexistent"),
                "namespaces[1].path: \"/nonexistent\" does not exist in the sandbox",
            ),
            (
                joined(NamespaceType::IPC, "/proc/self/ns/net"),
                "namespaces[1].path: \"/proc/self/ns/net\" is no ipc namespace",
            ),
            (
                joined(NamespaceType::UTS, "/dev/null"),
                "namespaces[1].path: \"/dev/null\" is no uts namespace",
            ),
        ] {
            assert_eq!(plan(&requested).unwrap_err(), expected);
        }
        let mut request = request(&[mount()]);
        request.gid_mappings.push(IdMapping { size: 1, ..Default::default() });
        assert_eq!(
            Namespaces::plan(&request, None).unwrap_err().to_string(),
            "uid_mappings, gid_mappings: cannot be set without a new user namespace"
        );
    }

    #[test]
    fn time_offsets_are_checked_and_written_as_the_kernel_reads_them() {
        let offset = |clock: &str, secs, nanosecs| TimeOffset {
            clock: clock.into(),
            secs,
            nanosecs,
            ..Default::default()
        };
        assert_eq!(
            time_offsets(&[offset("monotonic", 86400, 5), offset("boottime", -7, 0)]).unwrap(),
            "monotonic 86400 5\nboottime -7 0\n"
        );
        for (offset, expected) in [
            (
                offset("realtime", 1, 0),
                "time_offsets[0].clock: \"realtime\" must be \"monotonic\" or \"boottime\"",
            ),
            (
                offset("boottime", 1, 1_000_000_000),
                "time_offsets[0].nanosecs: 1000000000 must be below 1000000000",
            ),
        ] {
            assert_eq!(time_offsets(&[offset]).unwrap_err().to_string(), expected);
        }
        let mut request = request(&[namespace(NamespaceType::MOUNT, "")]);
        request.time_offsets.push(offset("boottime", 1, 0));
        assert_eq!(
            Namespaces::plan(&request, None).unwrap_err().to_string(),
            "time_offsets: cannot be set without a new time namespace"
        );
    }
}
