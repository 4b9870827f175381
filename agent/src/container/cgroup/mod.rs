//! A container's cgroup (v2): [`limits`] and [`devices`] are set on it, the
//! [`freezer`] stops it, [`stats`] and [`oom`] tell what happened in it.

mod controllers;
pub mod devices;
mod files;
mod freezer;
mod io;
pub mod limits;
mod oom;
pub mod stats;

use std::{
    fs,
    io::ErrorKind,
    os::fd::{AsFd, BorrowedFd, OwnedFd},
    path::{Component, Path, PathBuf},
    sync::{Mutex, PoisonError},
};

use nix::unistd::Pid;

use self::{devices::Filter, files::Watched};
use crate::{
    error::{Error, Step, StepResult},
    init::mounts::CGROUP_ROOT,
};

/// The cgroup of one container; others may have been made below it by the
/// container itself.
#[derive(Debug)]
pub struct Cgroup {
    path: PathBuf,
    dir: OwnedFd,
    /// The program that decides about devices.
    device_filter: Mutex<Option<OwnedFd>>,
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
            controllers::delegate(&here)?;
            here.push(name);
            match fs::create_dir(&here) {
                Err(error) if error.kind() == ErrorKind::AlreadyExists && names.peek().is_some() => {}
                made => made.step(|| format!("create cgroup {path:?}"))?,
            }
        }
        Self::at(here)
    }

    /// Limits the processes in the cgroup that contains it, which is that of a pod: those of all its containers
    /// together. 0 is no limit, and the root has none.
    pub fn limit_above(&self, pids: u64) -> StepResult<()> {
        let above = self.path.parent().filter(|above| pids > 0 && *above != Path::new(CGROUP_ROOT));
        let Some(above) = above else { return Ok(()) };
        fs::write(above.join("pids.max"), pids.to_string())
            .step(|| format!("limit the processes of {above:?} to {pids}"))
    }

    fn at(path: PathBuf) -> StepResult<Self> {
        let dir = files::open_dir(&path).step(|| format!("open cgroup {path:?}"))?;
        Ok(Self { path, dir, device_filter: Mutex::default() })
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

    /// Whether it has not been removed.
    pub fn exists(&self) -> bool {
        self.path.exists()
    }

    /// Waits until no process is left.
    pub async fn empty(&self) -> StepResult<()> {
        self.events()?.wait_for("populated", |populated| populated == 0).await.map(drop)
    }

    /// Some of its processes, each with its name and what it waits for.
    pub fn describe_processes(&self) -> String {
        const SOME: usize = 8;
        let describe = |pid: &Pid| {
            let read = |file: &str| fs::read_to_string(format!("/proc/{pid}/{file}")).unwrap_or_default();
            format!("{pid} ({}) in {:?}", read("comm").trim_end(), read("wchan"))
        };
        let processes = self.processes().unwrap_or_default();
        let some: Vec<String> = processes.iter().take(SOME).map(describe).collect();
        some.join(", ")
    }

    fn events(&self) -> StepResult<Watched> {
        Watched::open(self.dir(), "cgroup.events")
    }

    fn set_device_filter(&self, filter: &Filter) -> StepResult<()> {
        let mut present = self.device_filter.lock().unwrap_or_else(PoisonError::into_inner);
        *present = Some(filter.attach(self.dir(), present.as_ref())?);
        Ok(())
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
    files::open_dir(&Path::new(CGROUP_ROOT).join(path)).step(step)
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
}
