//! `cargo xtask install`.

use anyhow::Result;

/// Arguments of `cargo xtask install`.
#[derive(clap::Args)]
pub struct Args {}

/// Runs `cargo xtask install`.
pub fn run(_args: Args) -> Result<()> {
    anyhow::bail!("not built yet")
}
