//! Ending the guest.
//!
//! There is no ACPI to power off with: the guest ends by a reset, which the
//! monitor takes for the end of the VM.

use std::convert::Infallible;

use nix::sys::reboot::{RebootMode, reboot as reboot_syscall};

use crate::sandbox::Sandbox;

/// Times the other tasks get to run before the guest goes down: the reply to
/// the request passes through two of them on its way to the host.
const TURNS_FOR_REPLY: usize = 16;

/// Returns never; shuts the guest down when `sandbox` is asked to.
pub async fn wait(sandbox: &Sandbox) -> Infallible {
    sandbox.shutdown_requested().await;
    for _ in 0..TURNS_FOR_REPLY {
        tokio::task::yield_now().await;
    }
    sandbox.release_storage();
    reboot()
}

/// Resets the VM without further ado.
pub fn reboot() -> ! {
    let error = reboot_syscall(RebootMode::RB_AUTOBOOT);
    // PID 1 must not return: that would be a kernel panic, whose reason would
    // hide ours. Only a process without CAP_SYS_BOOT gets here.
    match error {
        Ok(never) => match never {},
        Err(_) => std::process::exit(1),
    }
}
