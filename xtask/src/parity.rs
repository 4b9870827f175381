//! `cargo xtask parity`.

use anyhow::Result;

use crate::build::{self, Profile};
use crate::e2e::{self, Output, Prepared};

/// Arguments of `cargo xtask parity`.
#[derive(clap::Args)]
pub struct Args {
    /// Only bundles whose names contain this.
    #[arg(long)]
    only: Vec<String>,
}

/// Runs `cargo xtask parity`. Exits with 1 when something is wrong.
pub fn run(args: Args) -> Result<()> {
    let mut prepared = Prepared::new(Profile::Fast)?;
    let program = e2e::program("rvm-parity", Profile::Fast)?;
    prepared.set(PROBE_ENV, build::probe()?);
    prepared.set("RVM_PARITY_ONLY", args.only.join(" "));
    eprintln!("{}", prepared.host);
    std::process::exit(prepared.run_with_kvm(&program, &[], Output::Inherit)?)
}

/// As in tests/src/parity.
pub const PROBE_ENV: &str = "RVM_TEST_PROBE";
