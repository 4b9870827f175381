//! The monitor: the process, and its control socket.

use std::{
    collections::VecDeque,
    ffi::CString,
    fs::File,
    io::{self, PipeReader},
    os::{
        fd::OwnedFd,
        unix::process::{CommandExt, ExitStatusExt},
    },
    path::{Path, PathBuf},
    process::{Child, Command, ExitStatus, Stdio},
    sync::{Arc, Mutex, PoisonError},
};

use nix::sched::{CloneFlags, unshare};
use rvm_protocol::vmm::{DiskConfig, Metrics, Request, Response, VmConfig};
use tokio::{
    io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader, unix::AsyncFd},
    net::{UnixStream, unix::pipe},
    sync::watch,
};

use crate::{
    cgroup::HostCgroup,
    mount::short_path,
    process_id::{ProcessId, pidfd_open},
};

/// The monitor's configuration in the sandbox's directory.
pub const CONFIG_FILE: &str = "vm.json";
/// The monitor's control socket in the sandbox's directory.
pub const CONTROL_SOCKET: &str = "vmm.sock";

/// How much of what the monitor said last is kept for error messages.
const KEPT_LINES: usize = 8;
/// Longest line of the monitor's that is taken as one.
const MAX_LINE_LEN: usize = 1024;
/// Longest answer on the control socket.
const MAX_ANSWER_LEN: u64 = 64 << 10;

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
    /// The control socket.
    #[error("the monitor's control socket: {0}")]
    Control(#[from] io::Error),
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

/// A running monitor. Dropping it kills it and waits for its end.
#[derive(Debug)]
pub struct Monitor {
    child: Mutex<Child>,
    id: ProcessId,
    pidfd: AsyncFd<OwnedFd>,
    words: Words,
}

impl Monitor {
    /// Starts `program` in the sandbox's directory `dir`, where `config` has
    /// been written. It is in `cgroup` before it has any memory, gets a network
    /// namespace of its own and dies with the calling thread, which therefore
    /// must be the process's main thread.
    pub fn spawn(program: &Path, dir: &Path, cgroup: &HostCgroup) -> Result<Self, MonitorError> {
        let spawn = |source| MonitorError::Spawn { program: program.to_owned(), source };
        let (reader, writer) = io::pipe().map_err(spawn)?;
        let parent = std::process::id();
        let procs = cgroup.procs();
        let mut command = Command::new(program);
        command
            .args(["--config", CONFIG_FILE])
            .current_dir(dir)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(writer)
            .process_group(0);
        // SAFETY: the closure makes system calls only and allocates nothing, as
        // is required between fork and exec.
        unsafe { command.pre_exec(move || prepare_child(parent, &procs)) };
        let mut child = command.spawn().map_err(spawn)?;
        drop(command);
        let watched = || -> io::Result<_> {
            // SAFETY: the AsyncFd owns the descriptor, which stays open and the
            // same for as long as it is registered.
            let pidfd = unsafe { AsyncFd::register(pidfd_open(child.id())?) }.map_err(io::Error::from)?;
            Ok((ProcessId::of(child.id())?, pidfd, Words::follow(reader)?))
        };
        match watched() {
            Ok((id, pidfd, words)) => Ok(Self { child: Mutex::new(child), id, pidfd, words }),
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

    /// Waits for its end; every caller gets the same answer.
    pub async fn exited(&self) -> Exited {
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
    }
}

impl Drop for Monitor {
    fn drop(&mut self) {
        let child = self.child.get_mut().unwrap_or_else(PoisonError::into_inner);
        let _ = child.kill();
        let _ = child.wait();
    }
}

fn prepare_child(parent: u32, procs: &[CString]) -> io::Result<()> {
    // SAFETY: PR_SET_PDEATHSIG takes a signal number and no pointer.
    if unsafe { libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL) } != 0 {
        return Err(io::Error::last_os_error());
    }
    if nix::unistd::getppid().as_raw().cast_unsigned() != parent {
        return Err(io::Error::from_raw_os_error(libc::ESRCH));
    }
    HostCgroup::enter(procs)?;
    // Whoever looks up the container's network namespace by the task's pid
    // finds the monitor: it must never be the host's.
    Ok(unshare(CloneFlags::CLONE_NEWNET)?)
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

/// Asks a monitor's control socket in the directory `dir`.
pub async fn request(dir: &File, request: &Request) -> Result<Response, MonitorError> {
    let mut stream = UnixStream::connect(short_path(dir, CONTROL_SOCKET)).await?;
    let mut line = serde_json::to_vec(request).map_err(io::Error::from)?;
    line.push(b'\n');
    stream.write_all(&line).await?;
    let mut answer = Vec::new();
    BufReader::new(stream).take(MAX_ANSWER_LEN).read_until(b'\n', &mut answer).await?;
    match serde_json::from_slice(&answer).map_err(io::Error::from)? {
        Response::Error { message } => Err(MonitorError::Refused(message)),
        answer => Ok(answer),
    }
}

/// A monitor's counters.
pub async fn metrics(dir: &File) -> Result<Metrics, MonitorError> {
    match request(dir, &Request::Metrics).await? {
        Response::Metrics(metrics) => Ok(metrics),
        other => Err(MonitorError::Refused(format!("answers metrics with {other:?}"))),
    }
}

/// Plugs a disk into the running machine.
pub async fn add_disk(dir: &File, disk: DiskConfig) -> Result<(), MonitorError> {
    match request(dir, &Request::AddDisk { disk }).await? {
        Response::Ok => Ok(()),
        other => Err(MonitorError::Refused(format!("answers add_disk with {other:?}"))),
    }
}

/// Offers the running machine so much memory beside what it started with.
pub async fn set_hotplug_memory(dir: &File, mib: u64) -> Result<(), MonitorError> {
    match request(dir, &Request::SetHotplugMemory { mib }).await? {
        Response::Ok => Ok(()),
        other => Err(MonitorError::Refused(format!("answers set_hotplug_memory with {other:?}"))),
    }
}

/// Writes the monitor's configuration into the sandbox's directory.
pub fn write_config(dir: &Path, config: &VmConfig) -> io::Result<()> {
    std::fs::write(dir.join(CONFIG_FILE), serde_json::to_vec(config)?)
}
