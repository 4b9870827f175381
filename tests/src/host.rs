//! What a sandbox could leave behind on its host, listed before and after.

use std::{
    collections::BTreeSet,
    fmt,
    fs::{read_dir, read_link, read_to_string},
    path::Path,
    time::{Duration, Instant},
};

use anyhow::{Context, Result};

use crate::stage::Stage;

/// Set inside the devhost, to the QEMU it runs in. Nothing but the tests runs there: everything that
/// appears counts, not only what bears one of our names.
pub const DEVHOST_ENV: &str = "RVM_DEVHOST";

/// KiB that a line of a file below `/proc` says: `VmRSS` of `1/status`, `Pss` of `1/smaps_rollup`, `MemAvailable` of `meminfo`.
///
/// # Errors
/// When there is no such line.
pub fn kib(file: &str, field: &str) -> Result<u64> {
    let text = read_to_string(Path::new("/proc").join(file)).with_context(|| file.to_owned())?;
    let line = text.lines().find_map(|line| line.strip_prefix(field)?.strip_prefix(':'));
    let value = line.with_context(|| format!("no {field} in {file}"))?;
    Ok(value.trim().trim_end_matches(" kB").parse()?)
}

/// Everything that counts, one line each.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct HostSnapshot {
    items: BTreeSet<String>,
}

/// What a case left behind and what it took away; displays one line each.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Difference {
    /// There afterwards, not before.
    pub left: Vec<String>,
    /// There before, not afterwards.
    pub gone: Vec<String>,
}

impl HostSnapshot {
    /// Lists the host as the calling thread sees it: processes, mounts, network
    /// interfaces, Unix sockets (abstract ones too), cgroups, and what is below
    /// `/run` and directly in `/tmp` and `/dev/shm`.
    ///
    /// Processes among `own` do not count: containerd's, which tests restart.
    pub fn take(stage: &Stage, own: &[libc::pid_t]) -> Self {
        let whole = std::env::var_os(DEVHOST_ENV).is_some();
        let mut items = BTreeSet::new();
        processes(&mut items, stage, own, whole);
        mounts(&mut items, "/proc/thread-self/mountinfo", whole);
        mounts(&mut items, "/proc/1/mountinfo", whole);
        for name in names("/sys/class/net") {
            items.insert(format!("network interface {name}"));
        }
        sockets(&mut items, whole);
        cgroups(&mut items, Path::new("/sys/fs/cgroup"), whole, 0);
        files(&mut items, Path::new("/run"), 0);
        for dir in ["/tmp", "/dev/shm"] {
            for name in names(dir) {
                if whole || name.starts_with("containerd") {
                    items.insert(format!("file {dir}/{name}"));
                }
            }
        }
        Self { items }
    }

    /// What has changed from `self` to `after`; none where nothing has.
    /// Processes may end: that is no loss.
    pub fn difference(&self, after: &Self) -> Option<Difference> {
        let gone = self.items.difference(&after.items).filter(|item| !item.starts_with(PROCESS));
        let left = after.items.difference(&self.items).cloned().collect();
        let difference = Difference { left, gone: gone.cloned().collect() };
        (difference != Difference::default()).then_some(difference)
    }

    /// Compares until nothing differs: containerd and the kernel tidy up after
    /// `ctr` has returned. What still differs after `limit` is an error.
    ///
    /// # Errors
    /// The difference.
    pub fn wait_until_same(&self, limit: Duration, mut take: impl FnMut() -> Self) -> Result<(), Difference> {
        let until = Instant::now() + limit;
        while let Some(difference) = self.difference(&take()) {
            if Instant::now() >= until {
                return Err(difference);
            }
            std::thread::sleep(Duration::from_millis(20));
        }
        Ok(())
    }

    /// How many things it lists.
    pub fn len(&self) -> usize {
        self.items.len()
    }

    /// Whether it lists nothing.
    pub fn is_empty(&self) -> bool {
        self.items.is_empty()
    }
}

impl fmt::Display for Difference {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for item in &self.left {
            writeln!(f, "  left: {item}")?;
        }
        for item in &self.gone {
            writeln!(f, "  gone: {item}")?;
        }
        Ok(())
    }
}

/// One process of the host.
#[derive(Clone, Debug)]
pub struct Process {
    /// Its process id.
    pub pid: libc::pid_t,
    /// Its parent's.
    pub parent: libc::pid_t,
    /// Kernel's name of it, 15 bytes at most.
    pub name: String,
    /// `R`, `S`, `Z`, ...
    pub state: char,
    /// Clock ticks from boot to its start: with the pid, its identity.
    pub start_ticks: u64,
    /// Its arguments; empty for kernel threads and zombies.
    pub args: Vec<String>,
}

impl fmt::Display for Process {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { pid, parent, name, state, args, .. } = self;
        write!(f, "process {pid} {name} state {state} parent {parent}: {}", args.join(" "))
    }
}

impl Process {
    /// Reads one process; none where it is gone.
    pub fn read(pid: libc::pid_t) -> Option<Self> {
        let stat = read_to_string(format!("/proc/{pid}/stat")).ok()?;
        let (name, fields) = parse_stat(&stat)?;
        let name = name.to_owned();
        let args = std::fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
        let args = args.split(|&byte| byte == 0).filter(|arg| !arg.is_empty());
        Some(Self {
            pid,
            parent: fields.get(1)?.parse().ok()?,
            name,
            state: fields.first()?.chars().next()?,
            start_ticks: fields.get(19)?.parse().ok()?,
            args: args.map(|arg| String::from_utf8_lossy(arg).into_owned()).collect(),
        })
    }

    /// Every process of the host.
    pub fn all() -> Vec<Self> {
        pids().into_iter().filter_map(Self::read).collect()
    }
}

/// Ids of every process of the host.
pub fn pids() -> Vec<libc::pid_t> {
    names("/proc").iter().filter_map(|name| name.parse().ok()).collect()
}

/// The name in a `/proc/PID/stat`, which may hold spaces and parentheses, and the fields behind it, of which the first
/// is the third of proc_pid_stat(5).
pub fn parse_stat(stat: &str) -> Option<(&str, Vec<&str>)> {
    // `pid (name) state ppid ...`
    let (head, tail) = stat.rsplit_once(") ")?;
    Some((head.split_once(" (")?.1, tail.split_whitespace().collect()))
}

/// Processes whose program is one of the installation under test.
pub fn sandbox_processes(stage: &Stage) -> Vec<Process> {
    let ours = |process: &Process| {
        read_link(format!("/proc/{}/exe", process.pid)).is_ok_and(|exe| exe.starts_with(&stage.prefix))
    };
    Process::all().into_iter().filter(ours).collect()
}

/// What a process's line starts with.
const PROCESS: &str = "process ";

/// Where each thread of a process is in the kernel, for reports of what hangs.
pub fn threads(pid: libc::pid_t) -> String {
    let mut text = String::new();
    for thread in names(&format!("/proc/{pid}/task")) {
        let read =
            |file: &str| read_to_string(format!("/proc/{pid}/task/{thread}/{file}")).unwrap_or_default();
        let stack = read("stack");
        let stack: Vec<&str> = stack.lines().take(4).filter_map(|line| line.split(' ').nth(1)).collect();
        text += &format!("  thread {thread} {}: {}\n", read("comm").trim(), stack.join(" < "));
    }
    text
}

fn processes(items: &mut BTreeSet<String>, stage: &Stage, own: &[libc::pid_t], whole: bool) {
    let own_pid = std::process::id().cast_signed();
    let own_namespace = read_link("/proc/thread-self/ns/mnt").ok();
    for process in Process::all() {
        let pid = process.pid;
        if pid == own_pid || own.contains(&pid) {
            continue;
        }
        let zombie = process.state == 'Z';
        if process.args.is_empty() && !zombie {
            continue; // a kernel thread
        }
        let counts = whole
            || read_link(format!("/proc/{pid}/exe")).is_ok_and(|exe| exe.starts_with(&stage.prefix))
            || (own_namespace.is_some() && read_link(format!("/proc/{pid}/ns/mnt")).ok() == own_namespace)
            || (zombie && bears_our_name(&process.name));
        if counts {
            let Process { name, start_ticks, args, .. } = &process;
            let zombie = if zombie { format!(" (zombie of {})", process.parent) } else { String::new() };
            items.insert(format!("{PROCESS}{pid} {name} started {start_ticks}{zombie}: {}", args.join(" ")));
        }
    }
}

fn mounts(items: &mut BTreeSet<String>, path: &str, whole: bool) {
    for line in read_to_string(path).unwrap_or_default().lines() {
        // proc_pid_mountinfo(5): id parent major:minor root mountpoint options ... - type source options
        let fields: Vec<&str> = line.split(' ').collect();
        let point = fields.get(4).copied().unwrap_or_default();
        let kind = line.split_once(" - ").map_or("", |(_, tail)| tail);
        if (whole || bears_our_name(line)) && !is_dockerds(point) {
            items.insert(format!("mount on {point}: {kind} ({path})"));
        }
    }
}

fn sockets(items: &mut BTreeSet<String>, whole: bool) {
    // proc_net(5): eight columns, the last the path, which may hold spaces.
    for line in read_to_string("/proc/net/unix").unwrap_or_default().lines().skip(1) {
        let path = line.split_whitespace().skip(7).collect::<Vec<_>>().join(" ");
        // A containerd of the machine's own has sockets of the same names, in another `/run`.
        let here = path.starts_with('@') || Path::new(&path).exists();
        if !path.is_empty() && !is_dockerds(&path) && (whole || (here && bears_our_name(&path))) {
            items.insert(format!("socket {path}"));
        }
    }
}

/// Removes the cgroup above those of the namespace's containers: runc makes it and leaves it.
/// rvm removes what it made, and that it did could not be seen with runc's there.
pub fn remove_runcs_parent() {
    let root = Path::new("/sys/fs/cgroup");
    let hierarchies = names("/sys/fs/cgroup").into_iter().map(|name| root.join(name).join("default"));
    for dir in hierarchies.chain([root.join("default")]) {
        // Most hierarchies have none; one with a container in it stays, and is reported.
        let _ = std::fs::remove_dir(dir);
    }
}

fn cgroups(items: &mut BTreeSet<String>, dir: &Path, whole: bool, depth: usize) {
    for entry in read_dir(dir).into_iter().flatten().flatten() {
        if depth < 16 && entry.file_type().is_ok_and(|kind| kind.is_dir()) {
            let path = entry.path();
            let text = path.to_string_lossy().into_owned();
            if whole || text.contains("rvm") || text.contains("/default/") {
                items.insert(format!("cgroup {text}"));
            }
            cgroups(items, &path, whole, depth + 1);
        }
    }
}

/// Everything below `dir`, except what containerd keeps of its own (images, databases) and
/// the directory tests share.
fn files(items: &mut BTreeSet<String>, dir: &Path, depth: usize) {
    for entry in read_dir(dir).into_iter().flatten().flatten() {
        let path = entry.path();
        let text = path.to_string_lossy().into_owned();
        let own = [
            "/io.containerd.content",
            "/io.containerd.metadata",
            "/io.containerd.mount-manager",
            "/rvm-tests/rootfs",
        ];
        // mount(8) keeps its books in /run/mount, and leaves them.
        if text == "/run/mount" || own.iter().any(|part| text.contains(part)) {
            continue;
        }
        if !made_once(&text) && !is_dockerds(&text) {
            items.insert(format!("file {text}"));
        }
        // A snapshot is one item, whatever it holds.
        let in_snapshots = dir.file_name().is_some_and(|name| name == "snapshots");
        if depth < 16 && !in_snapshots && entry.file_type().is_ok_and(|kind| kind.is_dir()) {
            files(items, &path, depth + 1);
        }
    }
}

/// A socket of dockerd's, for hooks, of which each start makes one, a network namespace, which it
/// removes within a minute, or something temporary, which it removes when it starts.
fn is_dockerds(path: &str) -> bool {
    ["/run/docker/libnetwork/", "/run/docker/netns/", "/run/rvm-tests/docker/tmp/"]
        .iter()
        .any(|dir| path.starts_with(dir))
}

/// Directories that the first container ever makes and that hold those of all others.
fn made_once(path: &str) -> bool {
    const BESIDE: [&str; 4] = ["/fifo", "/s", "/runc", "/runc/default"];
    // In containerd's state and in its root.
    const PLUGINS: [&str; 7] = [
        "/io.containerd.runtime.v2.task/default",
        "/io.containerd.runtime.v2.task/k8s.io",
        "/io.containerd.sandbox.controller.v1.shim/k8s.io",
        "/io.containerd.grpc.v1.cri",
        "/io.containerd.grpc.v1.cri/containers",
        "/io.containerd.grpc.v1.cri/image-volumes",
        "/io.containerd.grpc.v1.cri/sandboxes",
    ];
    const RVM: [&str; 4] = ["/run/rvm", "/run/rvm/default", "/run/rvm/moby", "/run/rvm/k8s.io"];
    let of_containerd =
        |rest: &str| BESIDE.contains(&rest) || PLUGINS.contains(&rest) || rest == "/runc/k8s.io";
    RVM.contains(&path)
        || path.strip_prefix("/run/containerd").is_some_and(of_containerd)
        || path.strip_prefix("/run/rvm-tests/containerd").is_some_and(|rest| PLUGINS.contains(&rest))
}

fn bears_our_name(text: &str) -> bool {
    text.contains("rvm") || text.contains("containerd")
}

fn names(dir: &str) -> Vec<String> {
    let entries = read_dir(dir).into_iter().flatten().flatten();
    entries.map(|entry| entry.file_name().to_string_lossy().into_owned()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_itself() {
        let process = Process::read(std::process::id().cast_signed()).expect("this process");
        assert_eq!(process.parent, nix::unistd::getppid().as_raw());
        assert!(!process.args.is_empty() && process.state != 'Z' && process.start_ticks > 0);
    }

    #[test]
    fn difference_names_both_directions() {
        let snapshot =
            |items: &[&str]| HostSnapshot { items: items.iter().map(|&item| item.to_owned()).collect() };
        assert_eq!(snapshot(&["a"]).difference(&snapshot(&["a"])), None);
        let difference = snapshot(&["a", "b"]).difference(&snapshot(&["b", "c"])).expect("they differ");
        assert_eq!(difference.to_string(), "  left: c\n  gone: a\n");
    }

    #[test]
    fn a_leaked_socket_is_seen() {
        let dir = tempfile::Builder::new().prefix("rvm-leak").tempdir().expect("a directory");
        let stage = Stage {
            prefix: dir.path().to_owned(),
            image: dir.path().to_owned(),
            containerd_dir: None,
            file_system: None,
            runtime: String::new(),
        };
        let before = HostSnapshot::take(&stage, &[]);
        let _socket = std::os::unix::net::UnixListener::bind(dir.path().join("s")).expect("a socket");
        let difference = before.difference(&HostSnapshot::take(&stage, &[])).expect("they differ");
        let expected = format!("socket {}/s", dir.path().display());
        assert!(difference.left.contains(&expected), "{difference}");
    }
}
