//! The sandbox: what this guest is set up as, and the containers in it.

mod set_up;

use std::sync::{Mutex, MutexGuard, PoisonError};

use rvm_protocol::agent;
use tokio::sync::Notify;

use crate::{
    error::{Error, check_id},
    init::reaper::Reaper,
    storage::Storage,
};

/// Everything the agent knows.
#[derive(Debug, Default)]
pub struct Sandbox {
    state: Mutex<State>,
    reaper: Reaper,
    shutdown: Notify,
}

#[derive(Debug, Default)]
struct State {
    /// Set by `SetUpSandbox`.
    storage: Option<Storage>,
}

impl Sandbox {
    /// A sandbox that has not been set up.
    pub fn new() -> Self {
        Self::default()
    }

    /// Never held across an `await`.
    fn state(&self) -> MutexGuard<'_, State> {
        // One thread: a poisoned lock means a panic, and that rebooted the VM.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Collects ended processes.
    pub fn reaper(&self) -> &Reaper {
        &self.reaper
    }

    /// Prepares the guest for its first container.
    pub fn set_up(&self, request: &agent::SetUpSandboxRequest) -> Result<(), Error> {
        let mut state = self.state();
        if state.storage.is_some() {
            return Err(Error::Precondition("the sandbox has been set up already".into()));
        }
        check_id("share_tag", &request.share_tag)?;
        set_up::clock(request.wall_clock_ns)?;
        set_up::hostname(&request.hostname)?;
        state.storage = Some(Storage::set_up(&request.share_tag, &request.scratch)?);
        Ok(())
    }

    /// Asks for the end of the guest, after the reply to whoever asks.
    pub fn request_shutdown(&self) {
        self.shutdown.notify_one();
    }

    /// Resolves when the end of the guest has been asked for.
    pub async fn shutdown_requested(&self) {
        self.shutdown.notified().await;
    }

    /// Writes everything out and unmounts what was mounted for the sandbox.
    pub fn release_storage(&self) {
        if let Some(storage) = &mut self.state().storage {
            storage.release();
        }
    }
}
