//! `cargo xtask bench fs-server`: the monitor's file server without a guest, on this machine.

use std::process::Command;

use anyhow::{Context, Result, ensure};

/// Arguments of `cargo xtask bench fs-server`.
#[derive(clap::Args)]
pub struct Args {}

/// Runs `cargo xtask bench fs-server`: a test that drives the device with messages made by hand, as a guest's
/// kernel makes them.
pub fn run(Args {}: Args) -> Result<()> {
    let status = Command::new(env!("CARGO"))
        .args(["test", "--quiet", "--release", "-p", "rvm-vmm", "--lib", "--"])
        .args([
            "--ignored",
            "--nocapture",
            "--exact",
            "devices::virtio::fs::tests::native::what_requests_cost",
        ])
        .status()
        .context("running cargo test")?;
    ensure!(status.success(), "what requests cost was not measured");
    Ok(())
}
