//! What can go only when a process that was killed has ended, where the host keeps that: it waits for a file system that
//! does not answer, and may do so for longer than anybody else has use for this shim.

use std::{
    os::fd::{AsFd, OwnedFd},
    sync::{Mutex, PoisonError},
    thread::{self, JoinHandle},
    time::Duration,
};

use crate::process_id::wait_for_end;

static WAITING: Mutex<Vec<JoinHandle<()>>> = Mutex::new(Vec::new());

/// Drops `value` when the process of `pidfd` has ended.
pub fn outlive(pidfd: OwnedFd, value: impl Send + 'static) {
    let waiting = thread::Builder::new().name("remains".into()).spawn(move || {
        // Without a limit, but for an error, after which there is nothing to wait for.
        while matches!(wait_for_end(pidfd.as_fd(), Duration::MAX), Ok(false)) {}
        drop(value);
    });
    match waiting {
        Ok(waiting) => WAITING.lock().unwrap_or_else(PoisonError::into_inner).push(waiting),
        Err(error) => log::error!("something of the sandbox stays: {error}"),
    }
}

/// Waits until everything is gone, however long that takes.
pub fn wait() {
    for waiting in std::mem::take(&mut *WAITING.lock().unwrap_or_else(PoisonError::into_inner)) {
        let _ = waiting.join();
    }
}

#[cfg(test)]
mod tests {
    use std::{process::Command, sync::mpsc::channel};

    use super::*;
    use crate::process_id::pidfd_open;

    #[test]
    fn what_outlives_a_process_goes_with_it() {
        struct Tells(std::sync::mpsc::Sender<()>);
        impl Drop for Tells {
            fn drop(&mut self) {
                let _ = self.0.send(());
            }
        }
        let mut child = Command::new("sleep").arg("1000").spawn().unwrap();
        let (tells, told) = channel();
        outlive(pidfd_open(child.id()).unwrap(), Tells(tells));
        assert!(told.recv_timeout(Duration::from_millis(50)).is_err());
        child.kill().unwrap();
        told.recv_timeout(Duration::from_secs(10)).unwrap();
        wait();
        child.wait().unwrap();
    }
}
