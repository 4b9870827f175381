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
mod network;
mod sandbox;

use std::process::ExitCode;

fn main() -> ExitCode {
    let filter: Vec<String> = std::env::args().skip(1).filter(|arg| !arg.starts_with('-')).collect();
    if !nix::unistd::geteuid().is_root() {
        println!("the cases of containers need root");
        result(0, &[], cases::COUNT);
        return ExitCode::SUCCESS;
    }
    fixture::prepare_machine();
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime");
    let (passed, failed) = runtime.block_on(cases::run_all(&filter));
    if !failed.is_empty() {
        println!("\nfailures:\n    {}\n", failed.join("\n    "));
    }
    result(passed, &failed, 0);
    if failed.is_empty() { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

/// Tells the result as the test harness does, for who adds up results.
fn result(passed: usize, failed: &[&str], ignored: usize) {
    let word = if failed.is_empty() { "ok" } else { "FAILED" };
    println!("test result: {word}. {passed} passed; {} failed; {ignored} ignored; 0 measured", failed.len());
}
