//! Collecting ended processes: the agent is the parent of every process it
//! started, and of every orphan in the guest's root pid namespace.

use std::{
    collections::HashMap,
    convert::Infallible,
    sync::{Mutex, MutexGuard, PoisonError},
};

use nix::{
    sys::{
        signal::{SigSet, Signal},
        signalfd::{SfdFlags, SignalFd},
    },
    unistd::Pid,
};
use tokio::{io::Interest, sync::watch};

use crate::sys::{process::wait_any, register};

/// How a process ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Exit {
    /// 0 to 255; 128 + n after signal n.
    pub code: u32,
}

/// Resolves once the process has ended.
pub type ExitReceiver = watch::Receiver<Option<Exit>>;

/// Waits for processes on behalf of everyone.
#[derive(Debug, Default)]
pub struct Reaper {
    awaited: Mutex<HashMap<i32, watch::Sender<Option<Exit>>>>,
}

impl Reaper {
    fn awaited(&self) -> MutexGuard<'_, HashMap<i32, watch::Sender<Option<Exit>>>> {
        // One thread: a poisoned lock means a panic, and that rebooted the VM.
        self.awaited.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes care of a child. To be called before the next `await` after it was
    /// made, so that its end cannot be collected unnoticed.
    pub fn watch(&self, pid: Pid) -> ExitReceiver {
        let (sender, receiver) = watch::channel(None);
        self.awaited().insert(pid.as_raw(), sender);
        receiver
    }

    /// Collects children for ever.
    pub async fn run(&self) -> std::io::Result<Infallible> {
        let mut signals = SigSet::empty();
        signals.add(Signal::SIGCHLD);
        signals.thread_block()?;
        let flags = SfdFlags::SFD_NONBLOCK | SfdFlags::SFD_CLOEXEC;
        let signals = register(SignalFd::with_flags(&signals, flags)?, Interest::READABLE)?;
        loop {
            self.collect();
            let mut ready = signals.readable().await?;
            // One pending SIGCHLD may stand for many children.
            while signals.get_ref().read_signal()?.is_some() {}
            ready.clear_ready();
        }
    }

    /// Collects every child that has ended so far.
    fn collect(&self) {
        loop {
            let (pid, code) = match wait_any() {
                Ok(Some(ended)) => ended,
                Ok(None) => return,
                Err(errno) => return log::error!("wait for children: {errno}"),
            };
            if let Some(sender) = self.awaited().remove(&pid.as_raw()) {
                log::debug!("process {pid} ended with {code}");
                sender.send_replace(Some(Exit { code }));
            }
        }
    }
}

/// Resolves once the process has ended.
pub async fn ended(mut receiver: ExitReceiver) -> Option<Exit> {
    receiver.wait_for(Option::is_some).await.ok().and_then(|exit| *exit)
}
