//! The host's cgroup hierarchies: one (v2), one per group of controllers (v1),
//! or both (hybrid).

use std::{
    fs, io,
    path::{Path, PathBuf},
};

use super::CgroupError;

/// Controllers of v1 in whose hierarchies a sandbox gets a cgroup: those that
/// limit or count something of a process.
const V1_CONTROLLERS: [&str; 8] =
    ["blkio", "cpu", "cpuacct", "cpuset", "hugetlb", "memory", "perf_event", "pids"];
/// systemd's own hierarchy, which has no controller.
const V1_SYSTEMD: &str = "name=systemd";
/// What a machine's ceiling is set with on v2.
const V2_WANTED: [&str; 5] = ["cpu", "cpuset", "hugetlb", "io", "memory"];

/// One mounted hierarchy.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Hierarchy {
    /// Where it is mounted.
    pub root: PathBuf,
    /// Its version.
    pub version: Version,
    /// Its controllers (v1).
    pub controllers: Vec<String>,
}

/// cgroup v1 or v2.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Version {
    /// One hierarchy per group of controllers.
    V1,
    /// One hierarchy.
    V2,
}

/// Every hierarchy of the host in which sandboxes get a cgroup.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Hierarchies {
    /// In the order in which they were mounted.
    pub all: Vec<Hierarchy>,
}

impl Hierarchies {
    /// Those mounted in this process's mount namespace.
    pub fn of_host() -> Result<Self, CgroupError> {
        let table = fs::read_to_string("/proc/self/mountinfo").map_err(CgroupError::Mounts)?;
        Ok(Self::parse(&table))
    }

    /// From the text of a `mountinfo` (proc(5)).
    fn parse(table: &str) -> Self {
        let mut all: Vec<Hierarchy> = Vec::new();
        for line in table.lines() {
            let Some((mount, file_system)) = line.split_once(" - ") else { continue };
            let fields: Vec<&str> = mount.split(' ').collect();
            let (Some(&root), Some(&point)) = (fields.get(3), fields.get(4)) else { continue };
            let mut file_system = file_system.split(' ');
            let (kind, options) = (file_system.next(), file_system.nth(1).unwrap_or_default());
            let (version, controllers) = match kind {
                Some("cgroup2") => (Version::V2, Vec::new()),
                Some("cgroup") => {
                    let known = |option: &&str| V1_CONTROLLERS.contains(option) || *option == V1_SYSTEMD;
                    (Version::V1, options.split(',').filter(known).map(str::to_owned).collect())
                }
                _ => continue,
            };
            let unusable = version == Version::V1 && controllers.is_empty();
            let hierarchy = Hierarchy { root: point.into(), version, controllers };
            // A second mount of one hierarchy, or of a part of it, adds nothing.
            let same = |other: &Hierarchy| {
                other.version == version
                    && (version == Version::V2 || other.controllers == hierarchy.controllers)
            };
            if root == "/" && !unusable && !all.iter().any(same) {
                all.push(hierarchy);
            }
        }
        Self { all }
    }

    /// The v1 hierarchy with a controller.
    pub fn v1(&self, controller: &str) -> Option<&Hierarchy> {
        self.all.iter().find(|hierarchy| hierarchy.controllers.iter().any(|name| name == controller))
    }

    /// The v2 hierarchy.
    pub fn v2(&self) -> Option<&Hierarchy> {
        self.all.iter().find(|hierarchy| hierarchy.version == Version::V2)
    }
}

impl Hierarchy {
    /// Makes controllers available below `dir` (v2). What cannot be enabled is
    /// missed by the limit that needs it, which then says so.
    pub fn delegate(&self, dir: &Path) {
        if self.version != Version::V2 {
            return;
        }
        let read = |file: &str| fs::read_to_string(dir.join(file)).unwrap_or_default();
        let (available, enabled) = (read("cgroup.controllers"), read("cgroup.subtree_control"));
        let has = |list: &str, name: &str| list.split_ascii_whitespace().any(|other| other == name);
        for name in V2_WANTED.iter().filter(|name| has(&available, name) && !has(&enabled, name)) {
            // Each by itself: one that is refused does not take the others with it.
            if let Err(error) = fs::write(dir.join("cgroup.subtree_control"), format!("+{name}")) {
                log::debug!("{}: +{name}: {error}", dir.display());
            }
        }
    }

    /// Fills in what a new cgroup of v1's cpuset lacks before it takes a process.
    pub fn inherit(&self, dir: &Path) -> io::Result<()> {
        if !self.controllers.iter().any(|name| name == "cpuset") {
            return Ok(());
        }
        let Some(parent) = dir.parent() else { return Ok(()) };
        for file in ["cpuset.cpus", "cpuset.mems"] {
            if fs::read_to_string(dir.join(file))?.trim().is_empty() {
                fs::write(dir.join(file), fs::read(parent.join(file))?)?;
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn roots(table: &str) -> Vec<(String, Version)> {
        let all = Hierarchies::parse(table).all;
        all.into_iter().map(|it| (it.root.display().to_string(), it.version)).collect()
    }

    #[test]
    fn unified() {
        let table = "29 23 0:26 / /sys/fs/cgroup rw,nosuid - cgroup2 cgroup2 rw,nsdelegate\n\
                     40 23 0:26 /a /mnt rw - cgroup2 cgroup2 rw\n\
                     41 23 0:30 / /tmp rw - tmpfs tmpfs rw\n";
        assert_eq!(roots(table), [("/sys/fs/cgroup".into(), Version::V2)]);
    }

    #[test]
    fn hybrid() {
        let table = "29 23 0:26 / /sys/fs/cgroup/unified rw - cgroup2 cgroup2 rw\n\
                     30 23 0:27 / /sys/fs/cgroup/systemd rw - cgroup cgroup rw,xattr,name=systemd\n\
                     31 23 0:28 / /sys/fs/cgroup/cpu,cpuacct rw - cgroup cgroup rw,cpu,cpuacct\n\
                     32 23 0:29 / /sys/fs/cgroup/memory rw - cgroup cgroup rw,memory\n\
                     33 23 0:30 / /sys/fs/cgroup/freezer rw - cgroup cgroup rw,freezer\n";
        let found = Hierarchies::parse(table);
        assert_eq!(found.all.len(), 4, "the freezer's limits nothing: {found:?}");
        assert_eq!(found.v1("cpuacct").unwrap().root, Path::new("/sys/fs/cgroup/cpu,cpuacct"));
        assert_eq!(found.v2().unwrap().root, Path::new("/sys/fs/cgroup/unified"));
        assert!(found.v1("cpuset").is_none());
    }
}
