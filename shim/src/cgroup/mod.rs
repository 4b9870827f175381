//! The host's cgroup of a sandbox: where the spec's `linux.cgroupsPath` says,
//! with the monitor, and with it the guest's memory and vCPUs, in it.
//!
//! The guest holds a container to its limits exactly; the host holds the machine
//! to a ceiling a little above, in case the guest's kernel is no longer on our
//! side (docs/decisions/0620).

mod hierarchy;
mod limits;

use std::{
    collections::HashMap,
    ffi::{CStr, CString},
    fs,
    io::{self, Write},
    os::unix::ffi::OsStrExt,
    path::{Component, Path, PathBuf},
};

use serde::{Deserialize, Serialize};

use crate::{huge_pages, rootless::is_rootless};
pub use hierarchy::Hierarchies;
pub use limits::{Ceiling, DEFAULT_PERIOD_US};

/// How often a directory is made again that somebody removes meanwhile.
const ATTEMPTS: usize = 100;
/// What version 1 says where there is no limit is a number, and not below this one.
const UNLIMITED: u64 = 1 << 62;
/// What a process writes to a `cgroup.procs` to move itself.
const MYSELF: &[u8] = b"0";

/// Why there is no cgroup.
#[derive(Debug, thiserror::Error)]
pub enum CgroupError {
    /// The kernel's list of mounts.
    #[error("cgroups: reading /proc/self/mountinfo: {0}")]
    Mounts(#[source] io::Error),
    /// A directory.
    #[error("linux.cgroupsPath: {}: {source}", path.display())]
    Directory {
        /// The cgroup.
        path: PathBuf,
        /// Why not.
        #[source]
        source: io::Error,
    },
    /// A limit the kernel does not take.
    #[error("{field}: the host refuses {value:?} for {}: {source}", path.display())]
    Limit {
        /// The specification's field.
        field: &'static str,
        /// The cgroup's file.
        path: PathBuf,
        /// What was written.
        value: String,
        /// Why not.
        #[source]
        source: io::Error,
    },
}

/// What [`HostCgroup::stats`] reads.
const STATS: [&str; 13] = [
    "cpu.pressure",
    "cpu.stat",
    "io.pressure",
    "io.stat",
    "memory.current",
    "memory.events",
    "memory.max",
    "memory.pressure",
    "memory.stat",
    "memory.swap.current",
    "memory.swap.max",
    "pids.current",
    "pids.max",
];

/// A sandbox's cgroups, one in each hierarchy of the host. Dropping it removes
/// them; no process may be left in them.
#[derive(Debug)]
pub struct HostCgroup {
    paths: Paths,
    hierarchies: Hierarchies,
    /// The same below each of them.
    relative: PathBuf,
    procs: Vec<CString>,
}

/// The directories of a sandbox's cgroups, as its state keeps them.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Paths(Vec<PathBuf>);

impl HostCgroup {
    /// Makes the cgroup `path` (absolute, without "..") of the sandbox `id` in
    /// each of `hierarchies`, with `ceiling` set. On an error nothing is left. Where
    /// a rootless user may make none, there is none, and the log says so.
    pub fn create(
        hierarchies: Hierarchies,
        path: &str,
        id: &str,
        ceiling: &Ceiling,
    ) -> Result<Self, CgroupError> {
        let mut relative = PathBuf::from(path.trim_start_matches('/'));
        if hierarchies.v2().is_some_and(|hierarchy| is_inner(&hierarchy.root.join(&relative))) {
            relative.push(id);
        }
        let none = Hierarchies::default();
        let mut made = Self { paths: Paths::default(), hierarchies: none, relative, procs: Vec::new() };
        let mut refused = None;
        for hierarchy in hierarchies.all {
            let dir = hierarchy.root.join(&made.relative);
            // First, so that a half-made one goes as well.
            made.paths.0.push(dir.clone());
            match make(&hierarchy, &made.relative) {
                Ok(()) => {}
                Err((path, source)) if is_refusal(&source) && is_rootless() => {
                    made.paths.0.pop();
                    refused.get_or_insert((path, source));
                    continue;
                }
                Err((path, source)) => return Err(CgroupError::Directory { path, source }),
            }
            let procs = CString::new(dir.join("cgroup.procs").as_os_str().as_bytes());
            made.procs.extend(procs);
            made.hierarchies.all.push(hierarchy);
        }
        if let Some((path, source)) = refused {
            log::warn!(
                "{}: {source}: the sandbox has no cgroup on the host, and its guest alone holds containers to limits",
                path.display()
            );
        }
        made.update(ceiling)?;
        Ok(made)
    }

    /// The directories, for who removes them when this process is gone.
    pub fn paths(&self) -> &Paths {
        &self.paths
    }

    /// Sets another ceiling.
    pub fn update(&self, ceiling: &Ceiling) -> Result<(), CgroupError> {
        ceiling.apply(&self.hierarchies, &self.relative)
    }

    /// How many processes in it the host's kernel has killed for want of memory.
    pub fn oom_kills(&self) -> u64 {
        // Of v2, then of v1.
        let files = ["memory.events", "memory.oom_control"];
        let told = |dir: &PathBuf| {
            let text = files.iter().find_map(|file| fs::read_to_string(dir.join(file)).ok())?;
            text.lines().find_map(|line| line.strip_prefix("oom_kill ")?.trim().parse::<u64>().ok())
        };
        self.paths.0.iter().filter_map(told).sum()
    }

    /// How many processes the cgroups above it may have, at least one of which has a limit: kubelet's for a pod, or that
    /// of a slice of systemd's.
    pub fn pids_max_above(&self) -> Option<u64> {
        let hierarchy = self.hierarchies.v2().or_else(|| self.hierarchies.v1("pids"))?;
        let limit = |dir: &Path| {
            fs::read_to_string(hierarchy.root.join(dir).join("pids.max")).ok()?.trim().parse::<u64>().ok()
        };
        self.relative.ancestors().skip(1).filter_map(limit).min()
    }

    /// How many of the host's huge pages of 2 MiB the cgroup directly above may have: kubelet's for a pod; `None` where
    /// it has no limit.
    pub fn huge_pages_above(&self) -> Option<u64> {
        let (hierarchy, file) = match self.hierarchies.v1("hugetlb") {
            Some(hierarchy) => (hierarchy, "hugetlb.2MB.limit_in_bytes"),
            None => (self.hierarchies.v2()?, "hugetlb.2MB.max"),
        };
        let limit = fs::read_to_string(hierarchy.root.join(self.relative.parent()?).join(file)).ok()?;
        let bytes = limit.trim().parse::<u64>().ok().filter(|bytes| *bytes < UNLIMITED)?;
        Some(bytes / huge_pages::BYTES)
    }

    /// The files of version 2 that say what is used, by name; none on a host without it.
    pub fn stats(&self) -> HashMap<String, String> {
        let Some(root) = self.hierarchies.v2().map(|hierarchy| hierarchy.root.join(&self.relative)) else {
            return HashMap::new();
        };
        let read = |name: &&str| Some(((*name).to_owned(), fs::read_to_string(root.join(name)).ok()?));
        STATS.iter().filter_map(read).collect()
    }

    /// For a child between fork and exec: moves the calling process. Allocates
    /// nothing.
    pub fn enter(procs: &[CString]) -> io::Result<()> {
        for file in procs {
            // SAFETY: the path is a C string that outlives the call.
            let fd = unsafe { libc::open(file.as_ptr(), libc::O_WRONLY | libc::O_CLOEXEC) };
            if fd < 0 {
                return Err(io::Error::last_os_error());
            }
            // SAFETY: the pointer and the length are of one constant.
            let written = unsafe { libc::write(fd, MYSELF.as_ptr().cast(), MYSELF.len()) };
            let error = io::Error::last_os_error();
            // SAFETY: the descriptor was opened above and is used no more.
            unsafe { libc::close(fd) };
            if written < 0 {
                return Err(error);
            }
        }
        Ok(())
    }

    /// What [`HostCgroup::enter`] takes.
    pub fn procs(&self) -> Vec<CString> {
        self.procs.clone()
    }
}

impl Drop for HostCgroup {
    fn drop(&mut self) {
        self.paths.remove();
    }
}

impl Paths {
    /// Removes the cgroups, and those above them that were made for them and
    /// are empty. It is fine that they are gone.
    pub fn remove(&self) {
        for dir in &self.0 {
            match fs::remove_dir(dir) {
                Err(error) if error.kind() != io::ErrorKind::NotFound => {
                    log::warn!("{} stays: {error}", dir.display());
                    continue;
                }
                _ => {}
            }
            for above in dir.ancestors().skip(1) {
                if !is_made_by_us(above) || fs::remove_dir(above).is_err() {
                    break;
                }
            }
        }
    }
}

/// Moves this process into the cgroup `relative`, which somebody made, of each
/// hierarchy that has it.
///
/// # Errors
/// With its first directory, where that is in none or cannot be entered.
pub fn join(hierarchies: &Hierarchies, relative: &Path) -> Result<(), (PathBuf, io::Error)> {
    let mut missing = None;
    let mut joined = false;
    for hierarchy in &hierarchies.all {
        let dir = hierarchy.root.join(relative);
        match fs::File::options()
            .write(true)
            .open(dir.join("cgroup.procs"))
            .and_then(|mut file| file.write_all(MYSELF))
        {
            Ok(()) => joined = true,
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                missing.get_or_insert((dir, error));
            }
            Err(error) => return Err((dir, error)),
        }
    }
    match missing {
        Some(missing) if !joined => Err(missing),
        _ => Ok(()),
    }
}

/// Makes `relative` in a hierarchy. Another sandbox may be removing a directory
/// above it, with the last one in it, at the same time.
fn make(hierarchy: &hierarchy::Hierarchy, relative: &Path) -> Result<(), (PathBuf, io::Error)> {
    let mut attempts = ATTEMPTS;
    loop {
        match make_once(hierarchy, relative) {
            Err((_, error)) if error.kind() == io::ErrorKind::NotFound && attempts > 0 => attempts -= 1,
            result => return result,
        }
    }
}

fn make_once(hierarchy: &hierarchy::Hierarchy, relative: &Path) -> Result<(), (PathBuf, io::Error)> {
    let mut here = hierarchy.root.clone();
    for part in relative.components() {
        let Component::Normal(name) = part else { continue };
        hierarchy.delegate(&here);
        here.push(name);
        match fs::create_dir(&here) {
            Ok(()) => mark(&here),
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
            Err(error) => return Err((here, error)),
        }
        hierarchy.inherit(&here).map_err(|error| (here.clone(), error))?;
    }
    Ok(())
}

/// Whether a cgroup of v2 has given controllers to those below it: it takes no
/// processes then (cgroups(7), "no internal processes").
fn is_inner(dir: &Path) -> bool {
    fs::read_to_string(dir.join("cgroup.subtree_control")).is_ok_and(|list| !list.trim().is_empty())
}

/// Extended attribute of the directories made here: whoever removes the last
/// sandbox below one may remove it, and no other.
fn made_by_us() -> &'static CStr {
    if is_rootless() { c"user.rvm" } else { c"trusted.rvm" }
}

/// Whether it says whose the directory is.
fn is_refusal(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::PermissionDenied | io::ErrorKind::ReadOnlyFilesystem)
}

fn mark(dir: &Path) {
    let Ok(path) = CString::new(dir.as_os_str().as_bytes()) else { return };
    let (value, name) = (b"1", made_by_us().as_ptr());
    // SAFETY: both strings are C strings, and the value has the length given.
    let result = unsafe { libc::setxattr(path.as_ptr(), name, value.as_ptr().cast(), value.len(), 0) };
    if result != 0 {
        log::debug!("{}: {}", dir.display(), io::Error::last_os_error());
    }
}

fn is_made_by_us(dir: &Path) -> bool {
    let Ok(path) = CString::new(dir.as_os_str().as_bytes()) else { return false };
    // SAFETY: both are C strings; with a length of 0 nothing is written.
    unsafe { libc::getxattr(path.as_ptr(), made_by_us().as_ptr(), std::ptr::null_mut(), 0) >= 0 }
}

#[cfg(test)]
mod tests {
    use super::*;
    use hierarchy::{Hierarchy, Version};

    #[test]
    fn a_cgroup_that_is_there_is_joined() {
        let root = tempfile::tempdir().unwrap();
        let hierarchy = Hierarchy { root: root.path().into(), version: Version::V2, controllers: vec![] };
        let hierarchies = Hierarchies { all: vec![hierarchy] };
        let procs = root.path().join("a/cgroup.procs");
        let (dir, error) = join(&hierarchies, Path::new("a")).unwrap_err();
        assert_eq!((dir, error.kind()), (root.path().join("a"), io::ErrorKind::NotFound));
        assert!(!procs.exists(), "it is somebody else's to make");
        fs::create_dir(root.path().join("a")).unwrap();
        fs::write(&procs, "").unwrap();
        join(&hierarchies, Path::new("a")).unwrap();
        assert_eq!(fs::read(procs).unwrap(), MYSELF);
    }

    #[test]
    fn kills_are_counted_in_either_version() {
        let dir = tempfile::tempdir().unwrap();
        let (v1, v2) = (dir.path().join("v1"), dir.path().join("v2"));
        for dir in [&v1, &v2] {
            fs::create_dir(dir).unwrap();
        }
        fs::write(v1.join("memory.oom_control"), "oom_kill_disable 0\nunder_oom 0\noom_kill 2\n").unwrap();
        fs::write(v2.join("memory.events"), "low 0\nhigh 0\nmax 9\noom 1\noom_kill 1\n").unwrap();
        let cgroup = HostCgroup {
            paths: Paths(vec![v1, v2, dir.path().join("none")]),
            hierarchies: Hierarchies { all: Vec::new() },
            relative: PathBuf::new(),
            procs: Vec::new(),
        };
        assert_eq!(cgroup.oom_kills(), 3);
    }

    #[test]
    fn the_lowest_limit_above_counts() {
        let root = tempfile::tempdir().unwrap();
        let hierarchy = Hierarchy { root: root.path().into(), version: Version::V2, controllers: vec![] };
        let cgroup = HostCgroup {
            paths: Paths::default(),
            hierarchies: Hierarchies { all: vec![hierarchy] },
            relative: PathBuf::from("kubepods/pod/sandbox"),
            procs: Vec::new(),
        };
        fs::create_dir_all(root.path().join("kubepods/pod/sandbox")).unwrap();
        assert_eq!(cgroup.pids_max_above(), None);
        for (dir, limit, least) in [
            ("kubepods/pod/sandbox", "3\n", None),
            ("kubepods", "500\n", Some(500)),
            ("kubepods/pod", "max\n", Some(500)),
            ("kubepods/pod", "40\n", Some(40)),
        ] {
            fs::write(root.path().join(dir).join("pids.max"), limit).unwrap();
            assert_eq!(cgroup.pids_max_above(), least, "{dir} {limit}");
        }
    }

    #[test]
    fn huge_pages_are_those_of_the_cgroup_directly_above() {
        let root = tempfile::tempdir().unwrap();
        let cgroup = |version, controllers| HostCgroup {
            paths: Paths::default(),
            hierarchies: Hierarchies {
                all: vec![Hierarchy { root: root.path().into(), version, controllers }],
            },
            relative: PathBuf::from("kubepods/pod/sandbox"),
            procs: Vec::new(),
        };
        let (v2, v1) = (cgroup(Version::V2, vec![]), cgroup(Version::V1, vec!["hugetlb".into()]));
        fs::create_dir_all(root.path().join("kubepods/pod")).unwrap();
        assert_eq!([&v1, &v2].map(HostCgroup::huge_pages_above), [None; 2]);
        let write =
            |file: &str, limit: &str| fs::write(root.path().join("kubepods").join(file), limit).unwrap();
        write("hugetlb.2MB.max", "2097152\n");
        for (limit, pages) in [("max\n", None), ("0\n", Some(0)), ("6291456\n", Some(3))] {
            write("pod/hugetlb.2MB.max", limit);
            assert_eq!(v2.huge_pages_above(), pages, "{limit}");
        }
        for (limit, pages) in [("9223372036854771712\n", None), ("4194304\n", Some(2))] {
            write("pod/hugetlb.2MB.limit_in_bytes", limit);
            assert_eq!(v1.huge_pages_above(), pages, "{limit}");
        }
    }

    #[test]
    fn a_cgroup_with_controllers_below_it_takes_no_processes() {
        let dir = tempfile::tempdir().unwrap();
        assert!(!is_inner(dir.path()));
        for (list, inner) in [("\n", false), ("cpu memory\n", true)] {
            fs::write(dir.path().join("cgroup.subtree_control"), list).unwrap();
            assert_eq!(is_inner(dir.path()), inner);
        }
    }
}
