//! Hooks of the OCI runtime specification that run on the host; see
//! docs/decisions/0612 for their order.
//!
//! A hook is a program of the host in the host's mount namespace. It is given
//! the container's state on its standard input, and is ended, with whatever is
//! in its process group, when its time is over or nobody waits for it any more.

use std::{
    ffi::CString,
    fs::{self, File},
    io::{self, PipeReader, Seek, Write},
    os::{
        fd::OwnedFd,
        unix::{ffi::OsStrExt, process::CommandExt, process::ExitStatusExt},
    },
    path::{Path, PathBuf},
    process::{Child, Command, ExitStatus},
    sync::{Arc, Mutex, PoisonError, mpsc},
    time::Duration,
};

use nix::{
    sys::{
        memfd::{MFdFlags, memfd_create},
        signal::{Signal, killpg},
    },
    unistd::Pid,
};
use tokio::{
    io::{AsyncReadExt, unix::AsyncFd},
    net::unix::pipe,
    sync::oneshot,
    time::timeout,
};

use crate::{
    own_file,
    process_id::pidfd_open,
    spec::{Bundle, Hook, HostHooks},
};

/// In the bundle while poststop hooks are due.
const DUE_FILE: &str = "rvm-poststop";
/// How much of what a hook says last is kept for the error.
const MAX_OUTPUT: usize = 4 << 10;
/// How long a hook's output is read after its end: a process that it has left
/// behind may hold it open.
const OUTPUT_TIMEOUT: Duration = Duration::from_millis(100);

/// Why a hook failed.
#[derive(Debug, thiserror::Error)]
pub enum HookError {
    /// It was not run.
    #[error("{field}: {}: {source}", path.display())]
    Run {
        /// The field that names it.
        field: String,
        /// The program.
        path: PathBuf,
        /// Why not.
        #[source]
        source: io::Error,
    },
    /// It says so.
    #[error("{field}: {} {end}{said}", path.display())]
    Failed {
        /// The field that names it.
        field: String,
        /// The program.
        path: PathBuf,
        /// How it ended.
        end: String,
        /// What it said last, behind a colon.
        said: String,
    },
    /// It took longer than it may.
    #[error("{field}.timeout: {} did not end within {seconds} s{said}", path.display())]
    TimedOut {
        /// The field that names it.
        field: String,
        /// The program.
        path: PathBuf,
        /// How long it was given.
        seconds: u32,
        /// What it said last, behind a colon.
        said: String,
    },
}

/// A container's hooks and what they are told.
#[derive(Debug)]
pub struct Hooks {
    hooks: HostHooks,
    state: serde_json::Value,
    bundle: PathBuf,
}

impl Hooks {
    /// The hooks of the container in a bundle.
    pub fn of(bundle: &Bundle) -> Self {
        let state = serde_json::json!({
            "ociVersion": bundle.oci_version,
            "id": bundle.container.container_id,
            "bundle": bundle.dir,
            "annotations": bundle.annotations,
        });
        Self { hooks: bundle.hooks.clone(), state, bundle: bundle.dir.clone() }
    }

    /// Runs those that come before the container, whose sandbox, with the
    /// network namespace it will have, is the process `pid`. From now on
    /// [`Hooks::after_stop`] is due.
    pub async fn before_create(&self, pid: u32) -> Result<(), HookError> {
        if !self.hooks.poststop.is_empty()
            && let Err(error) = own_file::create(&self.bundle.join(DUE_FILE))
        {
            log::warn!("{}: {error}", self.bundle.join(DUE_FILE).display());
        }
        let state = self.state("creating", pid);
        for hook in self.hooks.prestart.iter().chain(&self.hooks.create_runtime) {
            self.run(hook, &state).await?;
        }
        Ok(())
    }

    /// Runs those that come after the container's process was started.
    pub async fn after_start(&self, pid: u32) -> Result<(), HookError> {
        let state = self.state("running", pid);
        for hook in &self.hooks.poststart {
            self.run(hook, &state).await?;
        }
        Ok(())
    }

    /// Runs those that come after the container's end. One that fails is logged
    /// and the others run.
    pub async fn after_stop(&self) {
        if self.hooks.poststop.is_empty() {
            return;
        }
        let state = self.state("stopped", 0);
        for hook in &self.hooks.poststop {
            if let Err(error) = self.run(hook, &state).await {
                log::warn!("{error}");
            }
        }
        let _ = fs::remove_file(self.bundle.join(DUE_FILE));
    }

    fn state(&self, status: &str, pid: u32) -> Vec<u8> {
        let mut state = self.state.clone();
        state["status"] = status.into();
        if pid != 0 {
            state["pid"] = pid.into();
        }
        state.to_string().into_bytes()
    }

    async fn run(&self, hook: &Hook, state: &[u8]) -> Result<(), HookError> {
        let (field, path) = (hook.field.clone(), hook.path.clone());
        let mut running = match Running::start(hook, state, &self.bundle).await {
            Ok(running) => running,
            Err(source) => return Err(HookError::Run { field, path, source }),
        };
        let limit = hook.timeout_s.map(|seconds| Duration::from_secs(seconds.into()));
        let ended = match limit {
            Some(limit) => timeout(limit, running.ended()).await.ok(),
            None => Some(running.ended().await),
        };
        match ended {
            Some(Ok(status)) if status.success() => Ok(()),
            Some(Ok(status)) => {
                let said = running.said().await;
                Err(HookError::Failed { field, path, end: how(status), said })
            }
            Some(Err(source)) => Err(HookError::Run { field, path, source }),
            None => {
                running.group.kill();
                let said = running.said().await;
                Err(HookError::TimedOut { field, path, seconds: hook.timeout_s.unwrap_or(0), said })
            }
        }
    }
}

/// Runs the poststop hooks of a container whose shim is gone, unless they have
/// run. Needs no runtime around it.
pub fn after_dead_shim(bundle: &Path, id: &str) {
    if !bundle.join(DUE_FILE).exists() {
        return;
    }
    // Whatever was refused would not have come so far.
    let compat = crate::config::Compat { ignore_labels: true };
    let loaded = Bundle::load(bundle, id, &compat).map_err(|error| error.to_string());
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    match (loaded, runtime) {
        (Ok(bundle), Ok(runtime)) => runtime.block_on(Hooks::of(&bundle).after_stop()),
        (Err(error), _) => log::warn!("{id}: no poststop hooks: {error}"),
        (_, Err(error)) => log::warn!("{id}: no poststop hooks: {error}"),
    }
}

fn how(status: ExitStatus) -> String {
    match (status.code(), status.signal()) {
        (Some(code), _) => format!("ended with code {code}"),
        (None, Some(signal)) => format!("was killed by signal {signal}"),
        (None, None) => "ended".into(),
    }
}

/// A hook's process. Dropping it ends it, if it still runs.
struct Running {
    group: Group,
    pidfd: AsyncFd<OwnedFd>,
    output: Arc<Mutex<Vec<u8>>>,
    reading: tokio::task::JoinHandle<()>,
    /// Keeps the thread that started it, with which it would die.
    _parent: mpsc::Sender<()>,
}

impl Running {
    async fn start(hook: &Hook, state: &[u8], bundle: &Path) -> io::Result<Self> {
        let (reader, writer) = io::pipe()?;
        let mut command = Command::new(&hook.path);
        if let [name, args @ ..] = &hook.args[..] {
            command.arg0(name).args(args);
        }
        if let Some(env) = &hook.env {
            command.env_clear();
            command.envs(env.iter().filter_map(|entry| entry.split_once('=')));
        }
        command.stdin(input(state)?).stdout(writer.try_clone()?).stderr(writer).process_group(0);
        let (parent, directory) = (std::process::id(), CString::new(bundle.as_os_str().as_bytes())?);
        let prepare = move || {
            // SAFETY: PR_SET_PDEATHSIG takes a signal number and no pointer.
            if unsafe { libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL) } != 0 {
                return Err(io::Error::last_os_error());
            }
            if nix::unistd::getppid().as_raw().cast_unsigned() != parent {
                return Err(io::Error::from_raw_os_error(libc::ESRCH));
            }
            // It may be gone when the last hooks run.
            let _ = nix::unistd::chdir(directory.as_c_str());
            Ok(())
        };
        // SAFETY: the closure makes system calls only and allocates nothing, as
        // is required between fork and exec.
        unsafe { command.pre_exec(prepare) };
        let (group, parent) = spawn(command).await?;
        // SAFETY: the AsyncFd owns the descriptor, which stays open and the
        // same for as long as it is registered.
        let pidfd = unsafe { AsyncFd::register(pidfd_open(group.child.id())?) }.map_err(io::Error::from)?;
        let output = Arc::new(Mutex::new(Vec::new()));
        let reading = follow(reader, output.clone())?;
        Ok(Self { group, pidfd, output, reading, _parent: parent })
    }

    async fn ended(&mut self) -> io::Result<ExitStatus> {
        loop {
            let _ = self.pidfd.readable().await?;
            if let Some(status) = self.group.child.try_wait()? {
                self.group.ended = true;
                return Ok(status);
            }
            tokio::task::yield_now().await;
        }
    }

    /// What it wrote last, in one line behind a colon.
    async fn said(&mut self) -> String {
        let _ = timeout(OUTPUT_TIMEOUT, &mut self.reading).await;
        let output = self.output.lock().unwrap_or_else(PoisonError::into_inner);
        let text = String::from_utf8_lossy(&output);
        let lines: Vec<_> =
            text.split(|c: char| c.is_control()).map(str::trim).filter(|line| !line.is_empty()).collect();
        if lines.is_empty() { String::new() } else { format!(": {}", lines.join("; ")) }
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        self.reading.abort();
    }
}

/// A process group and its first process, a child of this one. Dropping it ends them, from the moment they are there:
/// who has started a hook may be gone before it is told so.
struct Group {
    child: Child,
    /// The first process has been waited for.
    ended: bool,
}

impl Group {
    /// Ends it. Its number is nobody else's as long as its first process has not been waited for.
    fn kill(&mut self) {
        if !self.ended {
            let _ = killpg(Pid::from_raw(self.child.id().cast_signed()), Signal::SIGKILL);
            let _ = self.child.wait();
            self.ended = true;
        }
    }
}

impl Drop for Group {
    fn drop(&mut self) {
        self.kill();
    }
}

/// Starts a hook on a thread of its own: its program may lie on a file system that
/// does not answer. The thread is there until the sender is dropped.
async fn spawn(mut command: Command) -> io::Result<(Group, mpsc::Sender<()>)> {
    let (started, starting) = oneshot::channel();
    let (parent, over) = mpsc::channel::<()>();
    let run = move || {
        let group = command.spawn().map(|child| Group { child, ended: false });
        // It holds the pipe's other end.
        drop(command);
        if started.send(group).is_ok() {
            let _ = over.recv();
        }
    };
    std::thread::Builder::new().name("hook".into()).spawn(run)?;
    let group = starting.await.map_err(io::Error::other)??;
    Ok((group, parent))
}

/// A file with `state` in it, at its beginning.
fn input(state: &[u8]) -> io::Result<File> {
    let mut file = File::from(memfd_create(c"state", MFdFlags::MFD_CLOEXEC)?);
    file.write_all(state)?;
    file.rewind()?;
    Ok(file)
}

/// Keeps the last of what comes out of a pipe.
fn follow(reader: PipeReader, output: Arc<Mutex<Vec<u8>>>) -> io::Result<tokio::task::JoinHandle<()>> {
    let mut receiver = pipe::Receiver::from_owned_fd(reader.into())?;
    Ok(tokio::spawn(async move {
        let mut buffer = [0; MAX_OUTPUT];
        while let Ok(count @ 1..) = receiver.read(&mut buffer).await {
            let mut output = output.lock().unwrap_or_else(PoisonError::into_inner);
            output.extend_from_slice(&buffer[..count]);
            let excess = output.len().saturating_sub(MAX_OUTPUT);
            output.drain(..excess);
        }
    }))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Hooks of a container in `dir`, each a shell script.
    fn hooks(dir: &Path, of: impl FnOnce(&mut HostHooks)) -> Hooks {
        let mut hooks = HostHooks::default();
        of(&mut hooks);
        let state = serde_json::json!({"ociVersion": "1.0.2", "id": "web", "bundle": dir, "annotations": {}});
        Hooks { hooks, state, bundle: dir.to_owned() }
    }

    fn script(field: &str, text: &str) -> Hook {
        Hook {
            field: field.into(),
            path: "/bin/sh".into(),
            args: ["sh", "-c", text].map(str::to_owned).to_vec(),
            env: Some(vec!["PATH=/usr/bin:/bin".into(), "COLOUR=red=blue".into()]),
            timeout_s: None,
        }
    }

    #[tokio::test]
    async fn hooks_are_told_the_state_and_run_in_order() {
        let dir = tempfile::tempdir().unwrap();
        let hooks = hooks(dir.path(), |hooks| {
            hooks.prestart.push(script("p", "cat > one; echo $COLOUR $0 $# >> order"));
            hooks.create_runtime.push(script("c", "echo two >> order"));
            hooks.poststop.push(script("s", "cat > three; exit 1"));
            hooks.poststop.push(script("s", "echo four >> order"));
        });
        hooks.before_create(77).await.unwrap();
        assert!(dir.path().join(DUE_FILE).exists());
        hooks.after_start(77).await.unwrap();
        hooks.after_stop().await;
        assert!(!dir.path().join(DUE_FILE).exists());
        let read = |name: &str| fs::read_to_string(dir.path().join(name)).unwrap();
        assert_eq!(read("order"), "red=blue sh 0\ntwo\nfour\n");
        let state = |name: &str| serde_json::from_str::<serde_json::Value>(&read(name)).unwrap();
        assert_eq!((&state("one")["status"], &state("one")["pid"]), (&"creating".into(), &77.into()));
        assert_eq!((&state("three")["status"], state("three").get("pid")), (&"stopped".into(), None));
        assert_eq!(state("one")["id"], "web");
    }

    #[tokio::test]
    async fn the_first_failure_is_the_last_hook() {
        let dir = tempfile::tempdir().unwrap();
        let error = |hook: Hook| async {
            let hooks = hooks(dir.path(), |hooks| hooks.prestart = vec![hook, script("next", "touch next")]);
            hooks.before_create(1).await.unwrap_err().to_string()
        };
        let failing = script("hooks.prestart[0]", "echo out; echo err >&2; exit 3");
        assert_eq!(error(failing).await, "hooks.prestart[0]: /bin/sh ended with code 3: out; err");
        let silent = script("h", "kill -9 $$");
        assert_eq!(error(silent).await, "h: /bin/sh was killed by signal 9");
        let missing = Hook { path: "/no/such".into(), ..script("h", "") };
        assert_eq!(error(missing).await, "h: /no/such: No such file or directory (os error 2)");
        assert!(!dir.path().join("next").exists());
    }

    #[tokio::test]
    async fn much_output_or_somebody_who_holds_it_open_delays_nobody() {
        let dir = tempfile::tempdir().unwrap();
        let noisy = script(
            "h",
            "sleep 30 & echo $! > pid; head -c 1000000 /dev/zero | tr '\\0' x; echo; echo end; exit 1",
        );
        let hooks = hooks(dir.path(), |hooks| hooks.prestart.push(noisy));
        let error =
            timeout(Duration::from_secs(20), hooks.before_create(1)).await.unwrap().unwrap_err().to_string();
        assert!(error.ends_with("; end") && error.len() < 2 * MAX_OUTPUT, "{}", error.len());
        let pid = fs::read_to_string(dir.path().join("pid")).unwrap().trim().parse().unwrap();
        nix::sys::signal::kill(Pid::from_raw(pid), Signal::SIGKILL).unwrap();
    }

    #[tokio::test]
    async fn time_is_limited_for_all_of_a_hook() {
        let dir = tempfile::tempdir().unwrap();
        let mut hook = script("h", "sleep 1000 & echo $! > pid; echo here; wait");
        hook.timeout_s = Some(1);
        let hooks = hooks(dir.path(), |hooks| hooks.prestart.push(hook));
        let error = hooks.before_create(1).await.unwrap_err().to_string();
        assert_eq!(error, "h.timeout: /bin/sh did not end within 1 s: here");
        assert_gone(dir.path());
    }

    #[tokio::test]
    async fn a_hook_nobody_waits_for_ends() {
        let dir = tempfile::tempdir().unwrap();
        let waiting = script("h", "sleep 1000 & echo $! > pid; wait");
        let hooks = hooks(dir.path(), |hooks| hooks.prestart.push(waiting));
        let started = async {
            while !fs::read_to_string(dir.path().join("pid")).is_ok_and(|pid| pid.ends_with('\n')) {
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
        };
        tokio::select! {
            result = hooks.before_create(1) => panic!("{result:?}"),
            () = started => {}
        }
        assert_gone(dir.path());
    }

    /// The process whose number a hook has written down has been killed; whoever
    /// adopts it may not have waited for it yet.
    fn assert_gone(dir: &Path) {
        let pid = fs::read_to_string(dir.join("pid")).unwrap();
        for _ in 0..3000 {
            let stat = fs::read_to_string(format!("/proc/{}/stat", pid.trim())).unwrap_or_default();
            match stat.rsplit_once(") ") {
                Some((_, rest)) if !rest.starts_with(['Z', 'X']) => {
                    std::thread::sleep(Duration::from_millis(10))
                }
                _ => return,
            }
        }
        panic!("{pid} is still there");
    }
}
