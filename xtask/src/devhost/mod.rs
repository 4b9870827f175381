//! `cargo xtask devhost`.

use anyhow::Result;

/// Arguments of `cargo xtask devhost`.
#[derive(clap::Args)]
pub struct Args {}

/// Runs `cargo xtask devhost`.
pub fn run(_args: Args) -> Result<()> {
    anyhow::bail!("not built yet")
}
