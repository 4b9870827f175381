//! Namespaces of a container: new ones and those it joins.

use std::{
    fs::File,
    os::fd::{AsFd, AsRawFd, OwnedFd, RawFd},
};

use nix::sched::{CloneFlags, setns, unshare};
use rvm_protocol::agent::{Namespace, NamespaceType};

use crate::{
    error::{Error, Step, StepResult},
    init::loopback,
};

/// `CLONE_NEWTIME`, unknown to `nix`.
const CLONE_NEWTIME: i32 = 0x80;

/// The namespaces of a container to be made.
#[derive(Debug)]
pub struct Namespaces {
    /// Flags for `clone3`: a pid or time namespace is entered by being born in it.
    pub born_into: u64,
    /// The pid namespace to be born into, where it is joined.
    pub pid: Option<OwnedFd>,
    /// Joined by the child, with what each is called in errors.
    join: Vec<(CloneFlags, OwnedFd, String)>,
    /// Made by the child.
    unshare: CloneFlags,
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
    /// Checks what is asked for and opens what is to be joined.
    pub fn plan(requested: &[Namespace]) -> Result<Self, Error> {
        let mut plan = Self { born_into: 0, pid: None, join: Vec::new(), unshare: CloneFlags::empty() };
        let mut seen = Vec::new();
        for (index, namespace) in requested.iter().enumerate() {
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
            plan.add(&field, kind, &namespace.path)?;
        }
        if !plan.unshare.contains(CloneFlags::CLONE_NEWNS) {
            return Err(Error::invalid("namespaces", "a container needs a new mount namespace"));
        }
        Ok(plan)
    }

    fn add(&mut self, field: &str, kind: NamespaceType, path: &str) -> Result<(), Error> {
        match (kind, path) {
            (NamespaceType::UNSPECIFIED, _) => {
                Err(Error::invalid(format!("{field}.type"), "names no namespace type"))
            }
            (NamespaceType::USER, _) => {
                Err(Error::invalid(format!("{field}.type"), "user namespaces are not supported"))
            }
            (NamespaceType::MOUNT, path) if !path.is_empty() => {
                Err(Error::invalid(format!("{field}.path"), "a container cannot join a mount namespace"))
            }
            (NamespaceType::PID | NamespaceType::TIME, "") => {
                self.born_into |= flag(kind).bits() as u64;
                Ok(())
            }
            (_, "") => {
                self.unshare |= flag(kind);
                Ok(())
            }
            (_, path) => {
                let file = File::open(path).step(|| format!("open the {} namespace {path:?}", name(kind)))?;
                if kind == NamespaceType::PID {
                    self.pid = Some(file.into());
                } else {
                    let what = format!("join the {} namespace {path:?}", name(kind));
                    self.join.push((flag(kind), file.into(), what));
                }
                Ok(())
            }
        }
    }

    /// Whether the container's first process is PID 1 of a pid namespace, whose
    /// end the kernel makes the end of every process in it.
    pub fn has_own_pids(&self) -> bool {
        self.born_into & (libc::CLONE_NEWPID as u64) != 0
    }

    /// Whether names set by the container are its own.
    pub fn has_own_names(&self) -> bool {
        self.unshare.contains(CloneFlags::CLONE_NEWUTS)
            || self.join.iter().any(|(flag, ..)| *flag == CloneFlags::CLONE_NEWUTS)
    }

    /// Whether it sees its cgroup as the root of the hierarchy.
    pub fn has_own_cgroups(&self) -> bool {
        self.unshare.contains(CloneFlags::CLONE_NEWCGROUP)
            || self.join.iter().any(|(flag, ..)| *flag == CloneFlags::CLONE_NEWCGROUP)
    }

    /// Descriptors the child needs.
    pub fn descriptors(&self) -> impl Iterator<Item = RawFd> {
        self.join.iter().map(|(_, fd, _)| fd.as_raw_fd())
    }

    /// In the child: joins and makes namespaces.
    pub fn enter(&self) -> StepResult<()> {
        for (flag, fd, what) in &self.join {
            setns(fd, *flag).step(|| what.clone())?;
        }
        unshare(self.unshare).step(|| "create namespaces")?;
        if self.unshare.contains(CloneFlags::CLONE_NEWNET) {
            loopback::up().step(|| "bring up the loopback interface")?;
        }
        Ok(())
    }
}

/// Runs `spawn` such that the child it makes is born into `pid_namespace`.
///
/// Joining a pid namespace changes where children are born, not the caller; the
/// agent goes back to its own before it returns.
pub fn born_in<T>(pid_namespace: Option<impl AsFd>, spawn: impl FnOnce() -> StepResult<T>) -> StepResult<T> {
    let Some(pid_namespace) = pid_namespace else { return spawn() };
    let own = File::open("/proc/self/ns/pid").step(|| "open the agent's pid namespace")?;
    setns(pid_namespace, CloneFlags::CLONE_NEWPID).step(|| "join the pid namespace")?;
    let result = spawn();
    setns(&own, CloneFlags::CLONE_NEWPID).step(|| "go back to the agent's pid namespace")?;
    result
}

/// In the child of an additional process: joins all namespaces of the process a
/// pidfd refers to, except the pid namespace, into which the child was born.
pub fn enter_all_of(process: impl AsFd) -> StepResult<()> {
    let flags = CloneFlags::CLONE_NEWNS
        | CloneFlags::CLONE_NEWUTS
        | CloneFlags::CLONE_NEWIPC
        | CloneFlags::CLONE_NEWNET
        | CloneFlags::CLONE_NEWCGROUP
        | CloneFlags::from_bits_retain(CLONE_NEWTIME);
    setns(process, flags).step(|| "join the container's namespaces")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn namespace(kind: NamespaceType, path: &str) -> Namespace {
        Namespace { type_: kind.into(), path: path.into(), ..Default::default() }
    }

    #[test]
    fn the_usual_six() {
        let plan = Namespaces::plan(&[
            namespace(NamespaceType::PID, ""),
            namespace(NamespaceType::NETWORK, ""),
            namespace(NamespaceType::IPC, ""),
            namespace(NamespaceType::UTS, ""),
            namespace(NamespaceType::MOUNT, ""),
            namespace(NamespaceType::CGROUP, ""),
        ])
        .unwrap();
        assert!(plan.has_own_pids() && plan.has_own_names());
        assert_eq!(plan.born_into, libc::CLONE_NEWPID as u64);
        assert!(plan.unshare.contains(CloneFlags::CLONE_NEWCGROUP | CloneFlags::CLONE_NEWNS));
    }

    #[test]
    fn joined_ones_are_opened_and_kept_for_the_child() {
        let plan = Namespaces::plan(&[
            namespace(NamespaceType::MOUNT, ""),
            namespace(NamespaceType::NETWORK, "/proc/self/ns/net"),
            namespace(NamespaceType::PID, "/proc/self/ns/pid"),
        ])
        .unwrap();
        assert!(!plan.has_own_pids() && plan.pid.is_some());
        assert_eq!(plan.descriptors().count(), 1);
    }

    #[test]
    fn what_cannot_be_done_is_refused_by_name() {
        let mount = || namespace(NamespaceType::MOUNT, "");
        for (requested, expected) in [
            (vec![], "namespaces: a container needs a new mount namespace"),
            (vec![mount(), mount()], "namespaces[1].type: mount is given twice"),
            (
                vec![namespace(NamespaceType::USER, "")],
                "namespaces[0].type: user namespaces are not supported",
            ),
            (
                vec![namespace(NamespaceType::MOUNT, "/proc/1/ns/mnt")],
                "namespaces[0].path: a container cannot join a mount namespace",
            ),
            (
                vec![mount(), namespace(NamespaceType::IPC, "/nonexistent")],
                "open the ipc namespace \"/nonexistent\": no such file or directory",
            ),
        ] {
            assert_eq!(Namespaces::plan(&requested).unwrap_err().to_string(), expected);
        }
    }
}
