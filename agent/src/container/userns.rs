//! User namespaces: made or found by the agent, as a descriptor with the ids it
//! maps, before there is any process of the container.
//!
//! A process has no privileges outside the user namespace it is in, so what
//! only the guest's root can do is done before it is entered (see
//! [`create`](super::create)).

use std::{
    fs::{self, File},
    io::Write,
    os::fd::{AsFd, BorrowedFd, OwnedFd},
};

use nix::{
    errno::Errno,
    fcntl::OFlag,
    sched::{CloneFlags, setns},
    unistd::{Gid, Pid, Uid, pause, pipe2, setgid, setgroups, setuid},
};
use rvm_protocol::agent::{self, IdMapping};

use super::user;
use crate::{
    error::{Error, Step, StepError, StepResult},
    sys::process::{Child, fork, send_signal, wait_for},
};

/// Lines the kernel takes for one mapping (`UID_GID_MAP_MAX_EXTENTS`).
const MAX_LINES: usize = 340;

/// A user namespace and what it maps.
#[derive(Debug)]
pub struct UserNamespace {
    fd: OwnedFd,
    /// The ids of its users.
    pub ids: Ids,
}

/// How a user namespace's ids appear in the guest's own.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Ids {
    uids: Map,
    gids: Map,
}

/// `(first inside, first outside, how many)`.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
struct Map(Vec<(u32, u32, u32)>);

impl Map {
    fn new(field: &str, mappings: &[IdMapping]) -> Result<Self, Error> {
        if mappings.is_empty() || mappings.len() > MAX_LINES {
            let reason = format!("a user namespace needs 1 to {MAX_LINES}, has {}", mappings.len());
            return Err(Error::invalid(field, reason));
        }
        let overlap = |a: (u32, u32), b: (u32, u32)| {
            u64::from(a.0) < u64::from(b.0) + u64::from(b.1)
                && u64::from(b.0) < u64::from(a.0) + u64::from(a.1)
        };
        for (index, one) in mappings.iter().enumerate() {
            let fits = |id: u32| id.checked_add(one.size).is_some();
            if one.size == 0 || !fits(one.container_id) || !fits(one.host_id) {
                let reason = format!("size {} must be above 0 and fit the ids", one.size);
                return Err(Error::invalid(format!("{field}[{index}]"), reason));
            }
            let twice = mappings.iter().take(index).position(|other| {
                overlap((one.container_id, one.size), (other.container_id, other.size))
                    || overlap((one.host_id, one.size), (other.host_id, other.size))
            });
            if let Some(other) = twice {
                let reason = format!("must not overlap {field}[{other}]");
                return Err(Error::invalid(format!("{field}[{index}]"), reason));
            }
        }
        Ok(Self(mappings.iter().map(|m| (m.container_id, m.host_id, m.size)).collect()))
    }

    /// From the text of `/proc/PID/uid_map`, as seen from the guest's own user namespace.
    fn parse(text: &str) -> Option<Self> {
        let line = |line: &str| {
            let mut numbers = line.split_whitespace().map(str::parse);
            let mut next = || numbers.next()?.ok();
            Some((next()?, next()?, next()?))
        };
        text.lines().map(line).collect::<Option<_>>().map(Self)
    }

    fn text(&self) -> String {
        self.0.iter().map(|(inside, outside, size)| format!("{inside} {outside} {size}\n")).collect()
    }

    fn outside(&self, id: u32) -> Option<u32> {
        self.0.iter().find_map(|(inside, outside, size)| {
            let offset = id.checked_sub(*inside).filter(|offset| offset < size)?;
            outside.checked_add(offset)
        })
    }
}

impl Ids {
    /// Checks the mappings of a request for a new user namespace.
    pub fn new(uids: &[IdMapping], gids: &[IdMapping]) -> Result<Self, Error> {
        Ok(Self { uids: Map::new("uid_mappings", uids)?, gids: Map::new("gid_mappings", gids)? })
    }

    /// Checks that a process's user exists, and root, who sets the container up.
    pub fn check_user(&self, field: &str, user: &agent::User) -> Result<(), Error> {
        let mapped = |map: &Map, field: String, id: u32| match map.outside(id) {
            Some(_) => Ok(()),
            None => Err(Error::invalid(field, format!("{id} is not mapped in the user namespace"))),
        };
        mapped(&self.uids, "uid_mappings".into(), 0)?;
        mapped(&self.gids, "gid_mappings".into(), 0)?;
        mapped(&self.uids, format!("{field}.uid"), user.uid)?;
        mapped(&self.gids, format!("{field}.gid"), user.gid)?;
        for (index, gid) in user.additional_gids.iter().enumerate() {
            mapped(&self.gids, format!("{field}.additional_gids[{index}]"), *gid)?;
        }
        Ok(())
    }

    /// The guest's number of a user and a group of the namespace.
    pub fn outside(&self, uid: u32, gid: u32) -> Option<(Uid, Gid)> {
        Some((Uid::from_raw(self.uids.outside(uid)?), Gid::from_raw(self.gids.outside(gid)?)))
    }

    /// While still privileged: gives the standard streams to a user of the namespace.
    pub fn own_standard_streams(&self, user: &agent::User) -> StepResult<()> {
        match self.outside(user.uid, user.gid) {
            Some((uid, _)) => user::own_standard_streams(uid),
            None => Ok(()),
        }
    }
}

impl UserNamespace {
    /// A new one.
    pub fn new(ids: Ids) -> StepResult<Self> {
        let fd = with_process_in(
            libc::CLONE_NEWUSER as u64,
            "the user namespace",
            || Ok(()),
            |pid| {
                let write = |file: &str, map: &Map| {
                    fs::write(format!("/proc/{pid}/{file}"), map.text())
                        .step(|| format!("write {file} of the user namespace"))
                };
                write("uid_map", &ids.uids)?;
                write("gid_map", &ids.gids)?;
                let namespace = File::open(format!("/proc/{pid}/ns/user"));
                Ok(namespace.step(|| "open the new user namespace")?.into())
            },
        )?;
        Ok(Self { fd, ids })
    }

    /// The one a descriptor refers to; `what` is its name in errors.
    pub fn join(fd: OwnedFd, what: &str) -> StepResult<Self> {
        let ids = with_process_in(
            0,
            what,
            || setns(&fd, CloneFlags::CLONE_NEWUSER),
            |pid| {
                let read = |file: &str| {
                    let step = || format!("read {file} of {what}");
                    let text = fs::read_to_string(format!("/proc/{pid}/{file}")).step(step)?;
                    Map::parse(&text).ok_or_else(|| StepError::Refused(format!("{}: {text:?}", step())))
                };
                Ok(Ids { uids: read("uid_map")?, gids: read("gid_map")? })
            },
        )?;
        Ok(Self { fd, ids })
    }

    /// Runs `look` while there is a process that has entered it and then done `act`.
    pub fn with_process<T>(
        &self,
        act: impl FnOnce() -> nix::Result<()>,
        look: impl FnOnce(Pid) -> StepResult<T>,
    ) -> StepResult<T> {
        let enter = || setns(&self.fd, CloneFlags::CLONE_NEWUSER).and_then(|()| act());
        with_process_in(0, "the user namespace", enter, look)
    }

    /// Enters it. This process keeps the ids it has, which the namespace may not know.
    pub fn enter(&self) -> StepResult<()> {
        setns(&self.fd, CloneFlags::CLONE_NEWUSER).step(|| "enter the user namespace")
    }
}

impl AsFd for UserNamespace {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

/// From nobody to root of the user namespace this process is in.
pub fn become_root() -> StepResult<()> {
    let step = || "become root of the user namespace";
    setgroups(&[]).step(step)?;
    setgid(Gid::from_raw(0)).step(step)?;
    setuid(Uid::from_raw(0)).step(step)
}

/// Runs `look` while there is a process in a user namespace: a new one by
/// `flags`, or `what` it is told to `enter`.
fn with_process_in<T>(
    flags: u64,
    what: &str,
    enter: impl FnOnce() -> nix::Result<()>,
    look: impl FnOnce(Pid) -> StepResult<T>,
) -> StepResult<T> {
    let step = || "make a process in the user namespace";
    let (said, say) = pipe2(OFlag::O_CLOEXEC).step(step)?;
    let Child { pid, pidfd } = fork(flags, || {
        let errno = enter().err().map_or(0, |errno| errno as i32);
        if File::from(say).write_all(&errno.to_ne_bytes()).is_ok() && errno == 0 {
            // Until it is killed.
            pause();
        }
        0
    })
    .step(step)?;
    let mut errno = [0; 4];
    let heard = nix::unistd::read(&said, &mut errno);
    let looked = match (heard, i32::from_ne_bytes(errno)) {
        (Ok(4), 0) => look(pid),
        (Ok(4), errno) => Err(Errno::from_raw(errno)).step(|| format!("join {what}")),
        _ => Err(StepError::Refused(format!("{}: it was killed", step()))),
    };
    // Nothing else can be done about a process that cannot be killed or waited for.
    let _ = send_signal(&pidfd, libc::SIGKILL);
    let _ = wait_for(pid);
    looked
}

#[cfg(test)]
mod tests {
    use super::*;

    fn mapping(container_id: u32, host_id: u32, size: u32) -> IdMapping {
        IdMapping { container_id, host_id, size, ..Default::default() }
    }

    fn map(mappings: &[IdMapping]) -> Result<Map, String> {
        Map::new("uid_mappings", mappings).map_err(|error| error.to_string())
    }

    #[test]
    fn ids_are_translated() {
        let map = map(&[mapping(0, 100_000, 1000), mapping(1000, 5, 1)]).unwrap();
        assert_eq!(map.outside(0), Some(100_000));
        assert_eq!(map.outside(999), Some(100_999));
        assert_eq!(map.outside(1000), Some(5));
        assert_eq!(map.outside(1001), None);
        assert_eq!(map.text(), "0 100000 1000\n1000 5 1\n");
        assert_eq!(Map::parse("         0     100000       1000\n      1000 5 1\n"), Some(map));
        assert_eq!(Map::parse("0 x 1\n"), None);
    }

    #[test]
    fn mappings_are_checked_by_field() {
        for (mappings, expected) in [
            (vec![], "uid_mappings: a user namespace needs 1 to 340, has 0"),
            (vec![mapping(0, 1, 0)], "uid_mappings[0]: size 0 must be above 0 and fit the ids"),
            (vec![mapping(0, u32::MAX, 2)], "uid_mappings[0]: size 2 must be above 0 and fit the ids"),
            (
                vec![mapping(0, 1000, 10), mapping(9, 5000, 1)],
                "uid_mappings[1]: must not overlap uid_mappings[0]",
            ),
            (
                vec![mapping(0, 1000, 10), mapping(10, 1009, 1)],
                "uid_mappings[1]: must not overlap uid_mappings[0]",
            ),
        ] {
            assert_eq!(map(&mappings).unwrap_err(), expected);
        }
        assert!(map(&vec![mapping(0, 0, 1); 341]).is_err());
    }

    #[test]
    fn a_user_must_exist() {
        let ids = Ids::new(&[mapping(0, 1000, 10)], &[mapping(0, 1000, 10)]).unwrap();
        let user = |uid, gid, more: &[u32]| agent::User {
            uid,
            gid,
            additional_gids: more.to_vec(),
            ..Default::default()
        };
        assert!(ids.check_user("user", &user(9, 9, &[1])).is_ok());
        for (user, expected) in [
            (user(10, 0, &[]), "user.uid: 10 is not mapped in the user namespace"),
            (user(0, 10, &[]), "user.gid: 10 is not mapped in the user namespace"),
            (user(0, 0, &[1, 11]), "user.additional_gids[1]: 11 is not mapped in the user namespace"),
        ] {
            assert_eq!(ids.check_user("user", &user).unwrap_err().to_string(), expected);
        }
        let ids = Ids::new(&[mapping(1, 1000, 10)], &[mapping(0, 1000, 10)]).unwrap();
        let error = ids.check_user("user", &user(1, 1, &[])).unwrap_err().to_string();
        assert_eq!(error, "uid_mappings: 0 is not mapped in the user namespace");
    }
}
