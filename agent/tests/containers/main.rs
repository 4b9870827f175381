//! Makes containers for real: namespaces, mounts, cgroups and processes of the
//! kernel this test runs on, seen from inside by the programs of this machine,
//! whose root file system is the image.
//!
//! Needs root. Everything happens in a mount namespace of its own.

// A test is no test to clippy without the test harness, which has threads.
#![allow(clippy::unwrap_used)]

mod cases;
mod confinement;
mod fixture;
mod hooks;
mod isolation;
mod lifecycle;
mod limits;
mod mounts;

use std::process::ExitCode;

fn main() -> ExitCode {
    if !nix::unistd::geteuid().is_root() {
        println!("containers: not run, needs root");
        return ExitCode::SUCCESS;
    }
    let filter: Vec<String> = std::env::args().skip(1).filter(|arg| !arg.starts_with('-')).collect();
    fixture::prepare_machine();
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime");
    let failed = runtime.block_on(cases::run_all(&filter));
    if failed == 0 { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}
