//! `cargo xtask demo`.

use anyhow::Result;

/// Arguments of `cargo xtask demo`.
#[derive(clap::Args)]
pub struct Args {}

/// Runs `cargo xtask demo`.
pub fn run(_args: Args) -> Result<()> {
    anyhow::bail!("not built yet")
}
