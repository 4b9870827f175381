//! One process of a container: its state machine, its streams, its exit.
//!
//! ```text
//! Created ──start──> Running ──exit──> Stopped
//!    └───────────────exit────────────────^
//! ```

use std::{
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::SystemTime,
};

use tokio::sync::watch;

use crate::{
    error::Error,
    io::{ProcessIo, Stdio},
};

/// How and when a process ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Exit {
    /// 0 to 255; 128 + n after signal n.
    pub status: u32,
    /// On the host's clock.
    pub at: SystemTime,
}

impl Exit {
    /// The status of a process whose machine went away.
    pub const KILLED: u32 = 128 + libc::SIGKILL as u32;

    /// An end seen now.
    pub fn now(status: u32) -> Self {
        Self { status: status.min(255), at: SystemTime::now() }
    }
}

/// What a process is doing.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Phase {
    /// It waits for its start.
    Created,
    /// It was started.
    Running,
    /// It has ended.
    Stopped(Exit),
}

/// One process.
pub struct Process {
    /// Empty for the container's first one.
    pub exec_id: String,
    /// As containerd asked for.
    pub stdio: Stdio,
    inner: Mutex<Inner>,
    /// Set last, when everything the exit entails has been done.
    exit: watch::Sender<Option<Exit>>,
    /// Held while the process is started, so that its exit is told after its start.
    pub(crate) starting: tokio::sync::Mutex<()>,
}

struct Inner {
    phase: Phase,
    pid: u32,
    io: Option<Arc<ProcessIo>>,
    stdin_closed: bool,
}

impl Process {
    /// A created process; `pid` is 0 where it has none yet.
    pub fn new(exec_id: &str, stdio: Stdio, pid: u32) -> Self {
        Self {
            exec_id: exec_id.to_owned(),
            stdio,
            inner: Mutex::new(Inner { phase: Phase::Created, pid, io: None, stdin_closed: false }),
            exit: watch::Sender::new(None),
            starting: tokio::sync::Mutex::new(()),
        }
    }

    /// What it is doing.
    pub fn phase(&self) -> Phase {
        self.inner().phase
    }

    /// Its pid as containerd knows it.
    pub fn pid(&self) -> u32 {
        self.inner().pid
    }

    /// Its exit, once it has ended.
    pub fn exited(&self) -> Option<Exit> {
        match self.phase() {
            Phase::Stopped(exit) => Some(exit),
            _ => None,
        }
    }

    /// Refuses anything but the start of a created process.
    pub fn check_can_start(&self) -> Result<(), Error> {
        match self.phase() {
            Phase::Created => Ok(()),
            Phase::Running => Err(Error::FailedPrecondition("the process was started already".into())),
            Phase::Stopped(_) => Err(Error::FailedPrecondition("the process has ended already".into())),
        }
    }

    /// It was started; without effect where it has ended meanwhile.
    pub fn set_running(&self, pid: u32) {
        let mut inner = self.inner();
        if inner.phase == Phase::Created {
            inner.phase = Phase::Running;
        }
        inner.pid = pid;
    }

    /// It has ended. `publish` runs for the first end that is told, before
    /// anybody who waits learns of it; later ones change nothing.
    pub fn set_exited(&self, exit: Exit, publish: impl FnOnce()) -> bool {
        {
            let mut inner = self.inner();
            if matches!(inner.phase, Phase::Stopped(_)) {
                return false;
            }
            inner.phase = Phase::Stopped(exit);
        }
        publish();
        self.exit.send_replace(Some(exit));
        true
    }

    /// Waits for its end; `None` where it is forgotten without one.
    pub async fn wait(&self) -> Option<Exit> {
        let mut exit = self.exit.subscribe();
        exit.wait_for(Option::is_some).await.ok().and_then(|exit| *exit)
    }

    /// Its streams, from when they are connected.
    pub fn io(&self) -> Option<Arc<ProcessIo>> {
        self.inner().io.clone()
    }

    /// Connects its streams.
    pub fn set_io(&self, io: ProcessIo) {
        let mut inner = self.inner();
        if inner.stdin_closed {
            io.close_stdin();
        }
        inner.io = Some(Arc::new(io));
    }

    /// Lets its standard input end, now or as soon as it is connected.
    pub fn close_stdin(&self) {
        let mut inner = self.inner();
        inner.stdin_closed = true;
        if let Some(io) = &inner.io {
            io.close_stdin();
        }
    }

    /// Ends the copies of its streams and lets go of the FIFOs.
    pub fn drop_io(&self) {
        self.inner().io = None;
    }

    fn inner(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn process() -> Process {
        Process::new("", Stdio::default(), 7)
    }

    #[test]
    fn starts_once() {
        let process = process();
        process.check_can_start().unwrap();
        process.set_running(7);
        assert_eq!(process.phase(), Phase::Running);
        assert!(process.check_can_start().is_err());
    }

    #[test]
    fn an_end_before_the_start_stays_an_end() {
        let process = process();
        assert!(process.set_exited(Exit::now(1), || {}));
        process.set_running(7);
        assert_eq!(process.exited().unwrap().status, 1);
        assert!(process.check_can_start().is_err());
    }

    #[tokio::test]
    async fn the_first_end_counts_and_is_told_once() {
        let process = Arc::new(process());
        let waiters: Vec<_> = (0..3)
            .map(|_| {
                let process = process.clone();
                tokio::spawn(async move { process.wait().await.unwrap().status })
            })
            .collect();
        tokio::task::yield_now().await;
        let mut published = Vec::new();
        for status in [42, 137] {
            process.set_exited(Exit::now(status), || published.push(status));
        }
        assert_eq!(published, [42]);
        for waiter in waiters {
            assert_eq!(waiter.await.unwrap(), 42);
        }
        assert_eq!(process.wait().await.unwrap().status, 42);
    }

    #[tokio::test]
    async fn who_waits_learns_after_the_event() {
        let process = Arc::new(process());
        let waiter = tokio::spawn({
            let process = process.clone();
            async move { process.wait().await }
        });
        tokio::task::yield_now().await;
        process.set_exited(Exit::now(0), || assert!(process.exit.borrow().is_none()));
        assert!(waiter.await.unwrap().is_some());
    }

    #[test]
    fn statuses_fit_a_byte() {
        assert_eq!(Exit::now(u32::MAX).status, 255);
    }
}
