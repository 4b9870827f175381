//! `cargo xtask test`.

use anyhow::Result;

/// Arguments of `cargo xtask test`.
#[derive(clap::Args)]
pub struct Args {}

/// Runs `cargo xtask test`.
pub fn run(_args: Args) -> Result<()> {
    anyhow::bail!("not built yet")
}
