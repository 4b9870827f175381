//! A container's cgroup (v2).

use std::{
    fs,
    io::ErrorKind,
    os::fd::{AsFd, BorrowedFd, OwnedFd},
    path::{Component, Path, PathBuf},
};

use nix::{
    fcntl::{OFlag, open},
    sys::stat::Mode,
    unistd::Pid,
};
use tokio::io::Interest;

use crate::{
    error::{Error, Step, StepError, StepResult},
    init::mounts::CGROUP_ROOT,
    sys::register,
};

/// The cgroup of one container; others may have been made below it by the
/// container itself.
#[derive(Debug)]
pub struct Cgroup {
    path: PathBuf,
    dir: OwnedFd,
}

/// Checks `cgroup_path` of a request.
pub fn check(path: &str) -> Result<(), Error> {
    let mut parts = Path::new(path).components();
    let absolute = parts.next() == Some(Component::RootDir);
    let mut names = 0;
    let plain = parts.all(|part| {
        names += 1;
        matches!(part, Component::Normal(_))
    });
    if absolute && plain && names > 0 && !path.contains('\0') {
        return Ok(());
    }
    let reason = format!("{path:?} must be an absolute path below the root, without \"..\"");
    Err(Error::invalid("cgroup_path", reason))
}

impl Cgroup {
    /// Makes the cgroup `path`, which must not exist, and those above it where
    /// they do not, with every controller of the guest available in it.
    pub fn create(path: &str) -> StepResult<Self> {
        let mut here = PathBuf::from(CGROUP_ROOT);
        let mut names = Path::new(path.trim_start_matches('/')).components().peekable();
        while let Some(name) = names.next() {
            delegate_controllers(&here)?;
            here.push(name);
            match fs::create_dir(&here) {
                Err(error) if error.kind() == ErrorKind::AlreadyExists && names.peek().is_some() => {}
                made => made.step(|| format!("create cgroup {path:?}"))?,
            }
        }
        let flags = OFlag::O_DIRECTORY | OFlag::O_CLOEXEC;
        let dir = open(&here, flags, Mode::empty()).step(|| format!("open cgroup {path:?}"))?;
        Ok(Self { path: here, dir })
    }

    /// For `CLONE_INTO_CGROUP`.
    pub fn dir(&self) -> BorrowedFd<'_> {
        self.dir.as_fd()
    }

    /// All processes of this cgroup and those below.
    pub fn processes(&self) -> StepResult<Vec<Pid>> {
        let mut pids = Vec::new();
        for dir in self.tree() {
            let list = match fs::read_to_string(dir.join("cgroup.procs")) {
                Err(error) if error.kind() == ErrorKind::NotFound => continue,
                list => list.step(|| "list the container's processes")?,
            };
            // 0 stands for a process of another pid namespace.
            pids.extend(
                list.lines().filter_map(|pid| pid.parse().ok()).filter(|pid| *pid > 0).map(Pid::from_raw),
            );
        }
        Ok(pids)
    }

    /// Kills every process of this cgroup and those below.
    pub fn kill(&self) -> StepResult<()> {
        fs::write(self.path.join("cgroup.kill"), "1").step(|| "kill the container's processes")
    }

    /// Waits until no process is left.
    pub async fn empty(&self) -> StepResult<()> {
        let events = self.path.join("cgroup.events");
        let flags = OFlag::O_RDONLY | OFlag::O_CLOEXEC;
        let watch = open(&events, flags, Mode::empty()).step(|| "watch the container's processes")?;
        let watch = register(watch, Interest::PRIORITY).step(|| "watch the container's processes")?;
        loop {
            let populated = fs::read_to_string(&events).step(|| "watch the container's processes")?;
            if populated.lines().any(|line| line == "populated 0") {
                return Ok(());
            }
            let ready = watch.ready(Interest::PRIORITY).await;
            ready.step(|| "watch the container's processes")?.clear_ready();
        }
    }

    /// Removes it and those below it; they must be empty. Also those above that
    /// serve no other container.
    pub fn remove(&self) -> StepResult<()> {
        for dir in self.tree().iter().rev() {
            match fs::remove_dir(dir) {
                Err(error) if error.kind() != ErrorKind::NotFound => {
                    return Err(error).step(|| format!("remove cgroup {dir:?}"));
                }
                _ => {}
            }
        }
        let above = self.path.ancestors().skip(1).take_while(|dir| *dir != Path::new(CGROUP_ROOT));
        for dir in above {
            if fs::remove_dir(dir).is_err() {
                break;
            }
        }
        Ok(())
    }

    /// This cgroup's directory and all below, parents before children.
    fn tree(&self) -> Vec<PathBuf> {
        let mut dirs = vec![self.path.clone()];
        let mut next = 0;
        while let Some(dir) = dirs.get(next) {
            // What disappears meanwhile is not of interest.
            let entries = fs::read_dir(dir).into_iter().flatten().flatten();
            let below: Vec<PathBuf> = entries
                .filter(|entry| entry.file_type().is_ok_and(|kind| kind.is_dir()))
                .map(|entry| entry.path())
                .collect();
            dirs.extend(below);
            next += 1;
        }
        dirs
    }
}

/// Opens the cgroup a process is in.
pub fn cgroup_of(pid: Pid) -> StepResult<OwnedFd> {
    let step = || format!("find the cgroup of process {pid}");
    let list = fs::read_to_string(format!("/proc/{pid}/cgroup")).step(step)?;
    let path = list.lines().find_map(|line| line.strip_prefix("0::/")).unwrap_or_default();
    open(&Path::new(CGROUP_ROOT).join(path), OFlag::O_DIRECTORY | OFlag::O_CLOEXEC, Mode::empty()).step(step)
}

/// Makes every controller a cgroup has available to those below it.
fn delegate_controllers(dir: &Path) -> StepResult<()> {
    let read =
        |file: &str| fs::read_to_string(dir.join(file)).step(|| format!("read {file} of cgroup {dir:?}"));
    let missing = missing(&read("cgroup.controllers")?, &read("cgroup.subtree_control")?);
    if missing.is_empty() {
        return Ok(());
    }
    fs::write(dir.join("cgroup.subtree_control"), &missing).map_err(|error| {
        StepError::Refused(format!("enable controllers {missing:?} of cgroup {dir:?}: {error}"))
    })
}

fn missing(available: &str, enabled: &str) -> String {
    let enabled: Vec<&str> = enabled.split_whitespace().collect();
    let missing = available.split_whitespace().filter(|controller| !enabled.contains(controller));
    missing.map(|controller| format!("+{controller}")).collect::<Vec<_>>().join(" ")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_path_stays_below_the_root() {
        for path in ["/default/web", "/a", "/kubepods/pod1/c2"] {
            assert!(check(path).is_ok(), "{path}");
        }
        for path in ["", "/", "a", "/..", "/a/../..", "/a\0"] {
            let error = check(path).unwrap_err().to_string();
            assert!(error.starts_with("cgroup_path: "), "{error}");
        }
    }

    #[test]
    fn only_missing_controllers_are_enabled() {
        assert_eq!(missing("cpuset cpu io memory\n", "cpu memory\n"), "+cpuset +io");
        assert_eq!(missing("cpu\n", "cpu\n"), "");
        assert_eq!(missing("\n", "\n"), "");
    }
}
