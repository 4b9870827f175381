//! The monitor as its owner sees it: the process, and what says when it ends.

use std::{
    collections::VecDeque,
    ffi::CString,
    fs::File,
    io::{self, PipeReader},
    os::{
        fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd},
        unix::process::{CommandExt, ExitStatusExt},
    },
    path::{Path, PathBuf},
    process::{Child, Command, ExitStatus, Stdio},
    sync::{Arc, Mutex, PoisonError, mpsc},
    time::Duration,
};

use nix::{
    sched::{CloneFlags, setns, unshare},
    sys::signal::Signal,
};
use rvm_protocol::vmm::{MAX_MESSAGE_LEN, Metrics, Request, Response, VmConfig};
use tokio::{
    io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader, unix::AsyncFd},
    net::{UnixStream, unix::pipe},
    sync::watch,
    time::{Instant, sleep_until},
};

use crate::{
    capabilities,
    cgroup::HostCgroup,
    mount::short_path,
    process_id::{ProcessId, pidfd_open, wait_for_end},
};

mod control;

pub use control::{Control, LIMIT};

/// The monitor's configuration in the sandbox's directory.
pub const CONFIG_FILE: &str = "vm.json";
/// The socket in the sandbox's directory on which a monitor tells its counters to
/// those who are not its owner.
pub const CONTROL_SOCKET: &str = "vmm.sock";

/// How long a monitor that was killed may keep the thread it is dropped on.
const END_LIMIT: Duration = Duration::from_secs(2);
/// How long after its end was asked for a monitor is waited for: what the host keeps for longer waits for something else of
/// the host's, as a file system that does not answer.
const KEPT_AFTER: Duration = Duration::from_secs(10);
/// Of the thread that starts a monitor and waits, in bytes.
const PARENT_STACK: usize = 64 << 10;
/// How much of what the monitor said last is kept for error messages.
const KEPT_LINES: usize = 8;
/// Longest line of the monitor's that is taken as one.
const MAX_LINE_LEN: usize = 1024;

/// Why the monitor does not run or does not answer.
#[derive(Debug, thiserror::Error)]
pub enum MonitorError {
    /// It was not started.
    #[error("starting the monitor {}: {source}", program.display())]
    Spawn {
        /// The program.
        program: PathBuf,
        /// Why not.
        #[source]
        source: io::Error,
    },
    /// The connection to it.
    #[error("asking the monitor ({request}): {source}")]
    Control {
        /// What was asked.
        request: &'static str,
        /// Why there is no answer.
        #[source]
        source: io::Error,
    },
    /// It does not answer.
    #[error("the monitor does not answer {request} within {} s", limit.as_secs_f64())]
    TimedOut {
        /// What was asked.
        request: &'static str,
        /// How long was waited.
        limit: Duration,
    },
    /// A disk it is to be given.
    #[error("{} cannot be opened: {source}", path.display())]
    Disk {
        /// The file or block device.
        path: PathBuf,
        /// Why not.
        #[source]
        source: io::Error,
    },
    /// It refuses a request.
    #[error("the monitor: {0}")]
    Refused(String),
}

/// How a monitor ended.
#[derive(Clone, Debug)]
pub struct Exited {
    /// Its exit status.
    pub status: ExitStatus,
    /// The last lines it wrote to its standard error.
    pub last_words: Vec<String>,
}

impl std::fmt::Display for Exited {
    fn fmt(&self, f: &mut std::fmt::Formatter) -> std::fmt::Result {
        match (self.status.code(), self.status.signal()) {
            (Some(code), _) => write!(f, "the monitor ended with code {code}")?,
            (None, Some(signal)) => write!(f, "the monitor was killed by signal {signal}")?,
            (None, None) => write!(f, "the monitor ended")?,
        }
        match self.last_words.last() {
            Some(line) => write!(f, ": {line}"),
            None => Ok(()),
        }
    }
}

/// A running monitor. Dropping it kills it and waits for its end, unless the host keeps it.
#[derive(Debug)]
pub struct Monitor {
    child: Mutex<Child>,
    id: ProcessId,
    pidfd: AsyncFd<OwnedFd>,
    control: Control,
    words: Words,
    /// When it was first killed.
    killed: watch::Sender<Option<Instant>>,
    /// Keeps the thread that started it, with which it would die.
    _parent: mpsc::Sender<()>,
}

impl Monitor {
    /// Starts `program` in the sandbox's directory `dir`, where `config` has
    /// been written. It is in `cgroup` before it has any memory, has no environment,
    /// is in the network namespace `network` and dies with this process. `oom_score_adj` is how soon the
    /// host's kernel takes it when memory runs out. It is the first process of a pid namespace
    /// of its own. It has the descriptors `inherited` under the numbers they have here, which
    /// its configuration names.
    pub fn spawn(
        program: &Path,
        dir: &Path,
        cgroup: &HostCgroup,
        network: BorrowedFd<'_>,
        oom_score_adj: i32,
        inherited: &[RawFd],
    ) -> Result<Self, MonitorError> {
        let spawn = |source| MonitorError::Spawn { program: program.to_owned(), source };
        let (reader, writer) = io::pipe().map_err(spawn)?;
        let (control, monitors_end) = Control::pair().map_err(spawn)?;
        let channel = monitors_end.as_raw_fd();
        let inherited = [inherited, &[channel]].concat();
        let network = network.as_raw_fd();
        let procs = cgroup.procs();
        let mut command = Command::new(program);
        command
            .args(["--config", CONFIG_FILE, "--control-fd", &channel.to_string()])
            .env_clear()
            .current_dir(dir)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(writer)
            .process_group(0);
        // SAFETY: the closure makes system calls only and allocates nothing, as
        // is required between fork and exec.
        unsafe { command.pre_exec(move || prepare_child(&procs, network, &inherited)) };
        let (mut child, parent) = in_a_pid_namespace(command).map_err(spawn)?;
        drop(monitors_end);
        set_oom_score_adj(child.id(), oom_score_adj);
        let watched = || -> io::Result<_> {
            // SAFETY: the AsyncFd owns the descriptor, which stays open and the
            // same for as long as it is registered.
            let pidfd = unsafe { AsyncFd::register(pidfd_open(child.id())?) }.map_err(io::Error::from)?;
            Ok((ProcessId::of(child.id())?, pidfd, Words::follow(reader)?))
        };
        match watched() {
            Ok((id, pidfd, words)) => Ok(Self {
                child: Mutex::new(child),
                id,
                pidfd,
                control,
                words,
                killed: watch::Sender::default(),
                _parent: parent,
            }),
            Err(error) => {
                let _ = child.kill();
                let _ = child.wait();
                Err(spawn(error))
            }
        }
    }

    /// The process.
    pub fn id(&self) -> ProcessId {
        self.id
    }

    /// What is asked of it.
    pub fn control(&self) -> &Control {
        &self.control
    }

    /// Waits for its end. One that was killed and is kept by the host has ended as far as anybody here is concerned.
    pub async fn exited(&self) -> Exited {
        let kept = async {
            let mut killed = self.killed.subscribe();
            let killed = killed.wait_for(Option::is_some).await.map_or(None, |at| *at);
            sleep_until(killed.unwrap_or_else(Instant::now) + KEPT_AFTER).await;
        };
        tokio::select! {
            biased;
            exited = self.reaped() => exited,
            () = kept => Exited {
                status: ExitStatus::from_raw(Signal::SIGKILL as i32),
                last_words: vec![format!("the host keeps its process {}", self.id.pid)],
            },
        }
    }

    /// Waits for the end of its process; every caller gets the same answer.
    async fn reaped(&self) -> Exited {
        loop {
            // An error would mean that the runtime is going down.
            let _ = self.pidfd.readable().await;
            let status = self.child.lock().unwrap_or_else(PoisonError::into_inner).try_wait();
            match status {
                Ok(Some(status)) => return Exited { status, last_words: self.words.all().await },
                Ok(None) => tokio::task::yield_now().await,
                Err(error) => {
                    log::error!("waiting for the monitor: {error}");
                    return Exited { status: ExitStatus::from_raw(0), last_words: self.words.all().await };
                }
            }
        }
    }

    /// Kills it, if it still runs.
    pub fn kill(&self) {
        let _ = self.child.lock().unwrap_or_else(PoisonError::into_inner).kill();
        self.killed.send_if_modified(|at| {
            let first = at.is_none();
            at.get_or_insert_with(Instant::now);
            first
        });
    }

    /// Its process, where that has not ended yet.
    pub fn kept(&self) -> Option<OwnedFd> {
        let pidfd = self.pidfd.get_ref();
        let ended = wait_for_end(pidfd.as_fd(), Duration::ZERO).unwrap_or(true);
        if ended { None } else { pidfd.try_clone().ok() }
    }
}

impl Drop for Monitor {
    fn drop(&mut self) {
        let child = self.child.get_mut().unwrap_or_else(PoisonError::into_inner);
        let _ = child.kill();
        match wait_for_end(self.pidfd.get_ref().as_fd(), END_LIMIT) {
            Ok(true) => drop(child.wait()),
            _ => log::error!("the monitor, process {}, does not end though it was killed", self.id.pid),
        }
    }
}

/// Starts the first process of a new pid namespace, on a thread of its own: the namespace for a thread's children is
/// its own, and only root of the host could go back to that which was before. The thread is there until the sender is
/// dropped.
fn in_a_pid_namespace(mut command: Command) -> io::Result<(Child, mpsc::Sender<()>)> {
    let (started, starting) = mpsc::channel();
    let (parent, over) = mpsc::channel::<()>();
    let run = move || {
        let child = unshare(CloneFlags::CLONE_NEWPID).map_err(io::Error::from).and_then(|()| command.spawn());
        // It holds the pipe's other end.
        drop(command);
        if started.send(child).is_ok() {
            let _ = over.recv();
        }
    };
    std::thread::Builder::new().name("monitor".into()).stack_size(PARENT_STACK).spawn(run)?;
    let child = starting.recv().map_err(io::Error::other)??;
    Ok((child, parent))
}

fn prepare_child(procs: &[CString], network: RawFd, inherited: &[RawFd]) -> io::Result<()> {
    // Of a parent that is gone already the control channel tells.
    // SAFETY: PR_SET_PDEATHSIG takes a signal number and no pointer.
    if unsafe { libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL) } != 0 {
        return Err(io::Error::last_os_error());
    }
    for &fd in inherited {
        // SAFETY: plain system call; 0 clears FD_CLOEXEC.
        if unsafe { libc::fcntl(fd, libc::F_SETFD, 0) } < 0 {
            return Err(io::Error::last_os_error());
        }
    }
    // A core file would hold the guest's memory.
    let none = libc::rlimit { rlim_cur: 0, rlim_max: 0 };
    // SAFETY: a valid rlimit that the call only reads.
    if unsafe { libc::setrlimit(libc::RLIMIT_CORE, &raw const none) } < 0 {
        return Err(io::Error::last_os_error());
    }
    HostCgroup::enter(procs)?;
    // Its own network is the sandbox's, never the host's.
    // SAFETY: the caller's descriptor, open in this copy of the table.
    let network = unsafe { BorrowedFd::borrow_raw(network) };
    setns(network, CloneFlags::CLONE_NEWNET)?;
    capabilities::MONITOR.bound()
}

/// What it would inherit is containerd's, which must not die before its
/// containers do. Who may not set it, natively without CAP_SYS_RESOURCE for one,
/// does without.
fn set_oom_score_adj(pid: u32, value: i32) {
    if let Err(error) = std::fs::write(format!("/proc/{pid}/oom_score_adj"), value.to_string()) {
        log::warn!("process.oomScoreAdj: {value} is not set for the monitor: {error}");
    }
}

/// What the monitor says on its standard error: logged, and the last lines kept.
#[derive(Debug)]
struct Words {
    kept: Arc<Mutex<VecDeque<String>>>,
    ended: watch::Receiver<()>,
}

impl Words {
    fn follow(reader: PipeReader) -> io::Result<Self> {
        let receiver = pipe::Receiver::from_owned_fd(reader.into())?;
        let kept = Arc::new(Mutex::new(VecDeque::with_capacity(KEPT_LINES)));
        let (end, ended) = watch::channel(());
        let lines = kept.clone();
        tokio::spawn(async move {
            let _end = end;
            let mut reader = BufReader::with_capacity(MAX_LINE_LEN, receiver);
            while let Some(line) = bounded_line(&mut reader).await {
                log::warn!("{line}");
                let mut lines = lines.lock().unwrap_or_else(PoisonError::into_inner);
                if lines.len() == KEPT_LINES {
                    lines.pop_front();
                }
                lines.push_back(line);
            }
        });
        Ok(Self { kept, ended })
    }

    /// The last lines, once the monitor can say no more.
    async fn all(&self) -> Vec<String> {
        let mut ended = self.ended.clone();
        while ended.changed().await.is_ok() {}
        self.kept.lock().unwrap_or_else(PoisonError::into_inner).iter().cloned().collect()
    }
}

/// The next line, or the next piece of one that is too long.
async fn bounded_line(reader: &mut (impl AsyncBufReadExt + Unpin)) -> Option<String> {
    let mut line = Vec::new();
    loop {
        let count = (&mut *reader).take(MAX_LINE_LEN as u64).read_until(b'\n', &mut line).await.ok()?;
        if count == 0 && line.is_empty() {
            return None;
        }
        let text = String::from_utf8_lossy(&line);
        let text: String = text.trim_end().chars().filter(|c| !c.is_control()).collect();
        if !text.is_empty() {
            return Some(text);
        }
        line.clear();
    }
}

/// The counters of the monitor in the directory `dir`, for those who are not its
/// owner. There is no deadline: who asks knows how long it can wait.
pub async fn metrics(dir: &File) -> Result<Metrics, MonitorError> {
    let asked = async {
        let mut stream = UnixStream::connect(short_path(dir, CONTROL_SOCKET)).await?;
        let mut line = serde_json::to_vec(&Request::Metrics)?;
        line.push(b'\n');
        stream.write_all(&line).await?;
        let mut answer = Vec::new();
        BufReader::new(stream).take(MAX_MESSAGE_LEN as u64).read_until(b'\n', &mut answer).await?;
        Ok(serde_json::from_slice(&answer)?)
    };
    match asked.await.map_err(|source| MonitorError::Control { request: "metrics", source })? {
        Response::Metrics(metrics) => Ok(metrics),
        Response::Error { message } => Err(MonitorError::Refused(message)),
        Response::Ok | Response::Plugged { .. } => {
            Err(MonitorError::Refused("answers metrics without any".into()))
        }
    }
}

/// Writes the monitor's configuration into the sandbox's directory.
pub fn write_config(dir: &Path, config: &VmConfig) -> io::Result<()> {
    std::fs::write(dir.join(CONFIG_FILE), serde_json::to_vec(config)?)
}
