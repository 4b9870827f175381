//! User namespaces that only serve to say how ids are mapped.

use std::{
    fmt::Write as _,
    fs,
    io::{self, Read, Write},
    os::fd::OwnedFd,
};

use nix::{
    sched::{CloneFlags, unshare},
    sys::{signal::Signal, wait::waitpid},
    unistd::{ForkResult, Pid, fork, pipe},
};

/// One line of `/proc/PID/uid_map` (user_namespaces(7)).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct IdRange {
    /// First id inside.
    pub inside: u32,
    /// First id outside.
    pub outside: u32,
    /// How many.
    pub count: u32,
}

/// How users and groups are mapped.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct IdMap {
    /// Users.
    pub uids: Vec<IdRange>,
    /// Groups.
    pub gids: Vec<IdRange>,
}

impl IdRange {
    /// Ranges as snapshotters write them in mount options: `INSIDE:OUTSIDE:COUNT`, several with commas between them.
    pub fn parse_all(text: &str) -> Option<Vec<Self>> {
        let parse = |range: &str| {
            let mut numbers = range.split(':').map(|number| number.parse().ok());
            let range = Self { inside: numbers.next()??, outside: numbers.next()??, count: numbers.next()?? };
            (numbers.next().is_none() && range.count > 0).then_some(range)
        };
        text.split(',').map(parse).collect()
    }
}

impl IdMap {
    /// Every id there is in this process's user namespace is the same in the other one.
    pub fn identity() -> io::Result<Self> {
        let mapped = |file| Ok::<_, io::Error>(same(&fs::read_to_string(file)?));
        Ok(Self { uids: mapped("/proc/self/uid_map")?, gids: mapped("/proc/self/gid_map")? })
    }

    /// The user and group outside that these are inside; none where one is not mapped.
    pub fn outside(&self, uid: u32, gid: u32) -> Option<(u32, u32)> {
        let find = |ranges: &[IdRange], id: u32| {
            ranges.iter().find_map(|range| {
                let offset = id.checked_sub(range.inside).filter(|offset| *offset < range.count)?;
                range.outside.checked_add(offset)
            })
        };
        Some((find(&self.uids, uid)?, find(&self.gids, gid)?))
    }
}

/// The ranges that exist by a `/proc/PID/uid_map`, each of which is itself.
fn same(map: &str) -> Vec<IdRange> {
    let range = |line: &str| {
        let mut numbers = line.split_whitespace().map(|number| number.parse().ok());
        let (inside, _outside, count) = (numbers.next()??, numbers.next()??, numbers.next()??);
        Some(IdRange { inside, outside: inside, count })
    };
    map.lines().filter_map(range).collect()
}

/// A user namespace with this mapping. It is made by a child that lives until
/// the namespace is open, and has no other process in it.
pub fn user_namespace(map: &IdMap) -> io::Result<OwnedFd> {
    let (ready_read, ready_write) = pipe()?;
    let (release_read, release_write) = pipe()?;
    // SAFETY: until it exits the child calls nothing but unshare, close, write,
    // read and _exit, none of which allocates or takes a lock.
    match unsafe { fork() }? {
        ForkResult::Child => {
            drop((ready_read, release_write));
            let made = unshare(CloneFlags::CLONE_NEWUSER).is_ok();
            let _ = nix::unistd::write(&ready_write, &[u8::from(made)]);
            let _ = nix::unistd::read(&release_read, &mut [0]);
            // SAFETY: ends the child without running the parent's handlers.
            unsafe { libc::_exit(0) }
        }
        ForkResult::Parent { child } => {
            drop((ready_write, release_read));
            let result = map_and_open(child, fs::File::from(ready_read), map);
            drop(release_write);
            // The child may be stopped or slow; it holds nothing worth waiting for.
            let _ = nix::sys::signal::kill(child, Signal::SIGKILL);
            let _ = waitpid(child, None);
            result
        }
    }
}

fn map_and_open(child: Pid, mut ready: fs::File, map: &IdMap) -> io::Result<OwnedFd> {
    let mut made = [0];
    ready.read_exact(&mut made)?;
    if made != [1] {
        return Err(io::Error::from_raw_os_error(libc::EPERM));
    }
    for (name, ranges) in [("uid_map", &map.uids), ("gid_map", &map.gids)] {
        let mut text = String::new();
        for range in ranges {
            let _ = writeln!(text, "{} {} {}", range.inside, range.outside, range.count);
        }
        // One write: the kernel takes no second one.
        fs::File::options().write(true).open(format!("/proc/{child}/{name}"))?.write_all(text.as_bytes())?;
    }
    Ok(fs::File::open(format!("/proc/{child}/ns/user"))?.into())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_mapped_stays_itself() {
        let range = |inside, count| IdRange { inside, outside: inside, count };
        assert_eq!(same("         0          0 4294967295\n"), [range(0, u32::MAX)]);
        // As newuidmap(1) makes it for an ordinary user.
        let map = "         0       1000          1\n         1     100000      65536\n";
        assert_eq!(same(map), [range(0, 1), range(1, 65536)]);
    }

    #[test]
    fn ids_inside_are_others_outside() {
        let range = |inside, outside, count| IdRange { inside, outside, count };
        let map =
            IdMap { uids: vec![range(0, 1000, 10), range(20, 5, 1)], gids: vec![range(0, u32::MAX, 9)] };
        assert_eq!(map.outside(9, 0), Some((1009, u32::MAX)));
        assert_eq!(map.outside(20, 0), Some((5, u32::MAX)));
        for (uid, gid) in [(10, 0), (21, 0), (0, 1), (0, 9)] {
            assert_eq!(map.outside(uid, gid), None, "{uid}:{gid}");
        }
    }
}
