//! `cargo xtask bench fs-server`: the monitor's file server without a guest, on this machine.

use anyhow::Result;

/// Arguments of `cargo xtask bench fs-server`.
#[derive(clap::Args)]
pub struct Args {}

/// Runs `cargo xtask bench fs-server`: a test that drives the device with messages made by hand, as a guest's
/// kernel makes them.
pub fn run(Args {}: Args) -> Result<()> {
    super::device("fs::tests::native::what_requests_cost")
}
