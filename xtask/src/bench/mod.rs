//! `cargo xtask bench`: numbers, side by side with peers.

mod boot;
mod report;
mod tiny_init;

use anyhow::Result;

/// Arguments of `cargo xtask bench`.
#[derive(clap::Args)]
pub struct Args {
    #[command(subcommand)]
    what: What,
}

#[derive(clap::Subcommand)]
enum What {
    /// A microVM's start: time against QEMU's microvm, returns to user space, memory.
    Boot(boot::Args),
}

/// Runs `cargo xtask bench`.
pub fn run(args: Args) -> Result<()> {
    match args.what {
        What::Boot(args) => boot::run(args),
    }
}
