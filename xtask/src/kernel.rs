//! `cargo xtask kernel`.

use anyhow::{Result, bail};
use guest_kernel::Flavour;

use crate::build;

/// Arguments of `cargo xtask kernel`.
#[derive(clap::Args)]
pub struct Args {
    /// `rvm`, or `full`: with what only some containers need.
    #[arg(default_value = "rvm", value_parser = for_hosts)]
    flavour: Flavour,
    /// Ask Debian for a newer point release; what was built from the one before stays in the cache.
    #[arg(long)]
    refresh: bool,
}

/// Runs `cargo xtask kernel`: builds it where it is not in the cache, and prints where it is.
pub fn run(args: Args) -> Result<()> {
    let kernel = build::kernel_of(args.flavour, args.refresh)?;
    println!("{}", kernel.vmlinux.display());
    Ok(())
}

/// Fails where the kernel that is shipped is too old to have all security fixes; else says which it is.
pub fn is_current() -> Result<String> {
    let kernel = build::kernel(Flavour::Rvm)?;
    match build::outdated(&kernel) {
        None => Ok(kernel.package_version),
        Some(outdated) => bail!(outdated),
    }
}

/// The flavours that serve a host; the others are for benchmarks.
pub fn for_hosts(name: &str) -> Result<Flavour, String> {
    let flavours = [Flavour::Rvm, Flavour::Full];
    flavours
        .into_iter()
        .find(|flavour| flavour.as_str() == name)
        .ok_or_else(|| "must be rvm or full".to_owned())
}
