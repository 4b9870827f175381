//! Work that may take longer than whoever waits for this process does.

use std::{
    fs::File,
    io::{self, PipeReader, Read, Write},
    os::fd::AsFd,
    time::{Duration, Instant},
};

use log::{LevelFilter, Log, Metadata, Record};
use nix::{
    poll::{PollFd, PollFlags, PollTimeout, poll},
    sys::wait::{WaitPidFlag, waitpid},
    unistd::{ForkResult, dup2_stderr, dup2_stdin, dup2_stdout, fork, setsid},
};
use tokio::task::spawn_blocking;

/// Does `work`, which the host may keep as long as it likes, on a thread of its own. The
/// one thread that serves everybody goes on meanwhile.
pub async fn off_thread<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> T {
    // A panic on that thread is a fault of ours.
    spawn_blocking(work).await.unwrap_or_else(|error| std::panic::resume_unwind(error.into_panic()))
}

/// A value whose end may take as long as the host likes: that is on another thread,
/// where there is somebody else to be served on this one.
pub struct OffThread<T: Send + 'static>(Option<T>);

impl<T: Send + 'static> OffThread<T> {
    /// Of a value.
    pub fn new(value: T) -> Self {
        Self(Some(value))
    }

    /// The value, as long as it has not ended.
    pub fn get(&self) -> Option<&T> {
        self.0.as_ref()
    }

    /// The value, whose end is its new owner's business.
    pub fn into_inner(mut self) -> Option<T> {
        self.0.take()
    }

    /// Ends the value and waits for that.
    pub async fn end(self) {
        let value = self.into_inner();
        off_thread(move || drop(value)).await;
    }
}

impl<T: Send + 'static> Drop for OffThread<T> {
    fn drop(&mut self) {
        let Some(value) = self.0.take() else { return };
        match tokio::runtime::Handle::try_current() {
            Ok(runtime) => drop(runtime.spawn_blocking(move || drop(value))),
            Err(_) => drop(value),
        }
    }
}

/// Does `work` in a process of its own and waits for it at most `limit`; that
/// process is returned where it goes on. What it logs until then is copied to
/// this one's standard error.
///
/// To be called while the process has one thread.
pub fn within(limit: Duration, work: impl FnOnce()) -> io::Result<Option<libc::pid_t>> {
    let (reader, writer) = io::pipe()?;
    let null = File::options().read(true).write(true).open("/dev/null")?;
    // SAFETY: there is one thread, so the child may do whatever the parent may.
    match unsafe { fork() }? {
        ForkResult::Child => {
            drop(reader);
            // Whoever started this process waits for all that hold its streams.
            let _ = setsid();
            let _ = dup2_stdin(null.as_fd());
            let _ = dup2_stdout(null.as_fd());
            let _ = dup2_stderr(writer.as_fd());
            drop((null, writer));
            if log::set_logger(&ToStderr).is_ok() {
                log::set_max_level(LevelFilter::Info);
            }
            work();
            std::process::exit(0)
        }
        ForkResult::Parent { child } => {
            drop(writer);
            let ended = copy_until_end(reader, limit)?;
            let _ = waitpid(child, Some(WaitPidFlag::WNOHANG));
            Ok((!ended).then_some(child.as_raw()))
        }
    }
}

/// Copies what arrives to the standard error; whether it ended within `limit`.
fn copy_until_end(mut reader: PipeReader, limit: Duration) -> io::Result<bool> {
    let until = Instant::now() + limit;
    let mut buffer = [0; 4096];
    loop {
        let left = until.saturating_duration_since(Instant::now());
        let timeout = PollTimeout::try_from(left).unwrap_or(PollTimeout::MAX);
        match poll(&mut [PollFd::new(reader.as_fd(), PollFlags::POLLIN)], timeout) {
            Ok(0) => return Ok(false),
            Err(nix::errno::Errno::EINTR) => continue,
            ready => ready?,
        };
        match reader.read(&mut buffer)? {
            0 => return Ok(true),
            count => io::stderr().write_all(&buffer[..count])?,
        }
    }
}

/// The log of a process that nobody gave one: a line per message.
struct ToStderr;

impl Log for ToStderr {
    fn enabled(&self, metadata: &Metadata) -> bool {
        metadata.level() <= log::max_level()
    }

    fn log(&self, record: &Record) {
        if self.enabled(record.metadata()) {
            // The reader may be gone.
            let _ = writeln!(io::stderr(), "{}", record.args());
        }
    }

    fn flush(&self) {}
}
