//! `cargo xtask bench`.

use anyhow::Result;

/// Arguments of `cargo xtask bench`.
#[derive(clap::Args)]
pub struct Args {}

/// Runs `cargo xtask bench`.
pub fn run(_args: Args) -> Result<()> {
    anyhow::bail!("not built yet")
}
