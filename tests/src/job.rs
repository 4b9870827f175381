//! One child process: what it prints is collected while it runs, its end is
//! waited for with a limit, and it never outlives the test that started it.

use std::{
    fmt,
    fs::File,
    io::{self, Read, Write},
    os::{
        fd::{AsFd, AsRawFd, OwnedFd},
        unix::process::{CommandExt, ExitStatusExt},
    },
    process::{Child, Command, ExitStatus, Stdio},
    sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError},
    thread::JoinHandle,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail, ensure};

/// What a job gets on its standard input.
pub enum Input {
    /// End of file at once.
    Nothing,
    /// These bytes, then end of file.
    Bytes(Vec<u8>),
    /// What [`Job::write`] sends, until [`Job::close_input`].
    Open,
    /// A new pseudo terminal of this many columns and rows, which is also the
    /// job's output and its controlling terminal.
    Terminal(u16, u16),
}

/// A running child process.
pub struct Job {
    name: String,
    shared: Arc<Shared>,
    input: Option<File>,
    terminal: Option<File>,
    pid: libc::pid_t,
    started: Instant,
    waiter: Option<JoinHandle<()>>,
}

/// A child process that has ended.
#[derive(Clone)]
pub struct Finished {
    /// How it was called, for messages.
    pub name: String,
    /// How it ended.
    pub status: ExitStatus,
    /// What it wrote to standard output, or to its terminal.
    pub stdout: Vec<u8>,
    /// What it wrote to standard error.
    pub stderr: Vec<u8>,
    /// From its start to its end.
    pub took: Duration,
}

#[derive(Default)]
struct Shared {
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Default)]
struct State {
    stdout: Vec<u8>,
    stderr: Vec<u8>,
    open_outputs: usize,
    ended: Option<(ExitStatus, Duration)>,
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits until `done` says so; false where `limit` has passed first.
    fn wait(&self, limit: Duration, mut done: impl FnMut(&State) -> bool) -> bool {
        let (_state, result) = self
            .changed
            .wait_timeout_while(self.lock(), limit, |state| !done(state))
            .unwrap_or_else(PoisonError::into_inner);
        !result.timed_out()
    }
}

impl Job {
    /// Starts `command` in a process group of its own.
    ///
    /// # Errors
    /// When the program cannot be started.
    pub fn start(command: Command, input: Input) -> Result<Self> {
        Self::start_by(command, input, Command::spawn)
    }

    /// The same, where the process is spawned by `spawn`.
    ///
    /// # Errors
    /// When it cannot be started.
    pub fn start_by(
        mut command: Command,
        input: Input,
        spawn: impl FnOnce(&mut Command) -> io::Result<Child>,
    ) -> Result<Self> {
        let name = command_line(&command);
        let mut terminal = None;
        match input {
            Input::Terminal(columns, rows) => {
                let pair = nix::pty::openpty(&window(columns, rows), None).context("openpty")?;
                take_terminal(&mut command, &pair.slave)?;
                terminal = Some(File::from(pair.master));
            }
            Input::Nothing => {
                command.process_group(0).stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
            }
            Input::Bytes(_) | Input::Open => {
                command.process_group(0).stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
            }
        }
        let started = Instant::now();
        let mut child = spawn(&mut command).with_context(|| format!("starting {name}"))?;
        // The command holds the terminal's other end open as long as it lives.
        drop(command);

        let shared = Arc::new(Shared::default());
        if let Some(master) = &terminal {
            let master = master.try_clone().context("duplicating a terminal")?;
            collect(&shared, master, |state| &mut state.stdout);
        } else {
            let stdout = child.stdout.take().context("no stdout pipe")?;
            let stderr = child.stderr.take().context("no stderr pipe")?;
            collect(&shared, File::from(OwnedFd::from(stdout)), |state| &mut state.stdout);
            collect(&shared, File::from(OwnedFd::from(stderr)), |state| &mut state.stderr);
        }
        let mut pipe = child.stdin.take().map(|stdin| File::from(OwnedFd::from(stdin)));
        if let Input::Bytes(bytes) = input {
            let mut pipe = pipe.take().context("no stdin pipe")?;
            // The child may end without reading all: that shows in its output.
            std::thread::spawn(move || pipe.write_all(&bytes).is_ok());
        }
        let pid = libc::pid_t::try_from(child.id()).context("pid out of range")?;
        let waiter = wait_for_end(&shared, child, started);
        Ok(Self { name, shared, input: pipe, terminal, pid, started, waiter: Some(waiter) })
    }

    /// Its process id.
    pub fn pid(&self) -> libc::pid_t {
        self.pid
    }

    /// Sends bytes to its standard input or terminal.
    ///
    /// # Errors
    /// When it has no open input, or no longer reads.
    pub fn write(&mut self, bytes: &[u8]) -> Result<()> {
        let file = self.terminal.as_mut().or(self.input.as_mut()).context("the job has no open input")?;
        file.write_all(bytes).with_context(|| format!("writing to {}", self.name))
    }

    /// Ends its standard input.
    pub fn close_input(&mut self) {
        self.input = None;
    }

    /// Changes the size of its terminal, which tells it by SIGWINCH.
    ///
    /// # Errors
    /// When it has no terminal.
    pub fn resize(&self, columns: u16, rows: u16) -> Result<()> {
        let terminal = self.terminal.as_ref().context("the job has no terminal")?;
        let size = window(columns, rows);
        // SAFETY: TIOCSWINSZ reads one winsize from the pointer, which is valid for the call.
        let result = unsafe { libc::ioctl(terminal.as_raw_fd(), libc::TIOCSWINSZ, &raw const size) };
        nix::errno::Errno::result(result).context("TIOCSWINSZ")?;
        Ok(())
    }

    /// What it has written to standard output, or to its terminal, so far.
    pub fn stdout(&self) -> String {
        String::from_utf8_lossy(&self.shared.lock().stdout).into_owned()
    }

    /// What it has written to standard error so far.
    pub fn stderr(&self) -> String {
        String::from_utf8_lossy(&self.shared.lock().stderr).into_owned()
    }

    /// Waits until its standard output contains `text`.
    ///
    /// # Errors
    /// When it ends first or the limit passes, with what it printed.
    pub fn wait_for(&self, text: &str, limit: Duration) -> Result<()> {
        let has = |state: &State| String::from_utf8_lossy(&state.stdout).contains(text);
        self.shared.wait(limit, |state| has(state) || (state.ended.is_some() && state.open_outputs == 0));
        let state = self.shared.lock();
        ensure!(
            has(&state),
            "{}: no {text:?} within {limit:?} (ended: {:?})\nstdout: {}\nstderr: {}",
            self.name,
            state.ended,
            String::from_utf8_lossy(&state.stdout),
            String::from_utf8_lossy(&state.stderr)
        );
        Ok(())
    }

    /// Waits until its standard output is longer than `seen` bytes, it has ended,
    /// or the limit has passed; returns the length then.
    pub fn wait_for_more(&self, seen: usize, limit: Duration) -> usize {
        self.shared.wait(limit, |state| state.stdout.len() > seen || state.ended.is_some());
        self.shared.lock().stdout.len()
    }

    /// Whether it has ended.
    pub fn has_ended(&self) -> bool {
        self.shared.lock().ended.is_some()
    }

    /// Sends a signal to it alone.
    ///
    /// # Errors
    /// When it is gone.
    pub fn signal(&self, signal: nix::sys::signal::Signal) -> Result<()> {
        ensure!(!self.has_ended(), "{} has ended", self.name);
        nix::sys::signal::kill(nix::unistd::Pid::from_raw(self.pid), signal)?;
        Ok(())
    }

    /// Waits for its end.
    ///
    /// # Errors
    /// When the limit passes: it is killed, and the error holds its output.
    pub fn finish(mut self, limit: Duration) -> Result<Finished> {
        if self.terminal.is_none() {
            self.close_input();
        }
        let ended = self.shared.wait(limit, |state| state.ended.is_some() && state.open_outputs == 0);
        let mut state = self.shared.lock();
        if !ended {
            bail!(
                "{}: {} after {limit:?}\nstdout: {}\nstderr: {}",
                self.name,
                if state.ended.is_some() {
                    "ended, but its output is still held open"
                } else {
                    "still running"
                },
                String::from_utf8_lossy(&state.stdout),
                String::from_utf8_lossy(&state.stderr)
            );
        }
        let (status, took) = state.ended.context("ended without a status")?;
        Ok(Finished {
            name: std::mem::take(&mut self.name),
            status,
            stdout: std::mem::take(&mut state.stdout),
            stderr: std::mem::take(&mut state.stderr),
            took,
        })
    }

    /// Since its start.
    pub fn age(&self) -> Duration {
        self.started.elapsed()
    }
}

impl Drop for Job {
    fn drop(&mut self) {
        {
            // Under the lock the waiter has not reaped it, so the pid is still its own.
            let state = self.shared.lock();
            if state.ended.is_none() {
                let _ = nix::sys::signal::killpg(
                    nix::unistd::Pid::from_raw(self.pid),
                    nix::sys::signal::Signal::SIGKILL,
                );
            }
        }
        if let Some(waiter) = self.waiter.take() {
            let _ = waiter.join();
        }
    }
}

impl Finished {
    /// Standard output as text.
    pub fn text(&self) -> String {
        String::from_utf8_lossy(&self.stdout).into_owned()
    }

    /// Standard error as text.
    pub fn errors(&self) -> String {
        String::from_utf8_lossy(&self.stderr).into_owned()
    }

    /// The exit code; 128 + n after signal n, as a shell says it.
    pub fn code(&self) -> i32 {
        self.status.code().unwrap_or_else(|| 128 + self.status.signal().unwrap_or(0))
    }

    /// Itself, where it exited with 0.
    ///
    /// # Errors
    /// Otherwise, with its output.
    pub fn success(self) -> Result<Self> {
        self.exited(0)
    }

    /// Itself, where it exited with `code`.
    ///
    /// # Errors
    /// Otherwise, with its output.
    pub fn exited(self, code: i32) -> Result<Self> {
        ensure!(self.code() == code, "expected exit code {code}: {self}");
        Ok(self)
    }
}

impl fmt::Display for Finished {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "{} -> {} after {} ms\nstdout: {}\nstderr: {}",
            self.name,
            self.status,
            self.took.as_millis(),
            self.text(),
            self.errors()
        )
    }
}

/// Runs a command to its end.
///
/// # Errors
/// When it cannot be started or does not end within the limit.
pub fn run(command: Command, input: Input, limit: Duration) -> Result<Finished> {
    Job::start(command, input)?.finish(limit)
}

fn command_line(command: &Command) -> String {
    let program = command.get_program().to_string_lossy();
    let program = program.rsplit('/').next().unwrap_or(&program).to_owned();
    command.get_args().fold(program, |line, arg| line + " " + &arg.to_string_lossy())
}

fn window(columns: u16, rows: u16) -> nix::pty::Winsize {
    nix::pty::Winsize { ws_row: rows, ws_col: columns, ws_xpixel: 0, ws_ypixel: 0 }
}

/// Makes `slave` the command's three standard streams and controlling terminal.
fn take_terminal(command: &mut Command, slave: &OwnedFd) -> Result<()> {
    let clone = || slave.as_fd().try_clone_to_owned().context("duplicating a terminal");
    command.stdin(clone()?).stdout(clone()?).stderr(clone()?);
    let take = || {
        nix::unistd::setsid()?;
        // SAFETY: standard input is the terminal; the argument 0 steals it from nobody.
        nix::errno::Errno::result(unsafe { libc::ioctl(0, libc::TIOCSCTTY, 0) })?;
        Ok(())
    };
    // SAFETY: only setsid and ioctl, both async-signal-safe, run between fork and exec.
    unsafe { command.pre_exec(take) };
    Ok(())
}

/// Appends what `file` yields to the stream `select` picks, until its end.
fn collect(shared: &Arc<Shared>, mut file: File, select: fn(&mut State) -> &mut Vec<u8>) {
    shared.lock().open_outputs += 1;
    let shared = Arc::clone(shared);
    std::thread::spawn(move || {
        let mut buffer = vec![0; 64 * 1024];
        // A terminal's end is an error (EIO), a pipe's is 0.
        while let Ok(count @ 1..) = file.read(&mut buffer) {
            select(&mut shared.lock()).extend_from_slice(&buffer[..count]);
            shared.changed.notify_all();
        }
        shared.lock().open_outputs -= 1;
        shared.changed.notify_all();
    });
}

/// Waits without reaping, then reaps under the lock: a pid seen there as not
/// ended is never another process's.
fn wait_for_end(shared: &Arc<Shared>, mut child: Child, started: Instant) -> JoinHandle<()> {
    let shared = Arc::clone(shared);
    std::thread::spawn(move || {
        use nix::sys::wait::{Id, WaitPidFlag, waitid};
        let pid = nix::unistd::Pid::from_raw(child.id().cast_signed());
        while waitid(Id::Pid(pid), WaitPidFlag::WEXITED | WaitPidFlag::WNOWAIT)
            == Err(nix::errno::Errno::EINTR)
        {}
        let mut state = shared.lock();
        if let Ok(status) = child.wait() {
            state.ended = Some((status, started.elapsed()));
        }
        shared.changed.notify_all();
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn shell(script: &str) -> Command {
        let mut command = Command::new("sh");
        command.args(["-c", script]);
        command
    }

    #[test]
    fn output_input_and_code() -> Result<()> {
        let input = Input::Bytes(b"hello".to_vec());
        let finished = run(shell("cat; echo oops >&2; exit 7"), input, Duration::from_secs(10))?;
        assert_eq!((finished.text().as_str(), finished.errors().as_str()), ("hello", "oops\n"));
        assert_eq!(finished.code(), 7);
        Ok(())
    }

    #[test]
    fn limit_kills_the_whole_group() -> Result<()> {
        let started = Instant::now();
        let result =
            run(shell("echo begun; sleep 100 & sleep 100"), Input::Nothing, Duration::from_millis(300));
        let error = result.map(|finished| finished.to_string()).expect_err("must not end");
        assert!(
            error.to_string().contains("still running") && error.to_string().contains("begun"),
            "{error}"
        );
        assert!(started.elapsed() < Duration::from_secs(50));
        Ok(())
    }

    #[test]
    fn terminal_size_and_resize() -> Result<()> {
        let mut job = Job::start(shell("stty size; read x; stty size"), Input::Terminal(81, 23))?;
        job.wait_for("23 81", Duration::from_secs(10))?;
        job.resize(132, 50)?;
        job.write(b"\n")?;
        let finished = job.finish(Duration::from_secs(10))?;
        assert!(finished.text().contains("50 132"), "{finished}");
        Ok(())
    }
}
