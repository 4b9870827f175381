//! `cargo xtask demo`.

use anyhow::Result;

use crate::build::Profile;
use crate::e2e::{self, Output, Prepared};

/// Arguments of `cargo xtask demo`.
#[derive(clap::Args)]
pub struct Args {
    /// An interactive shell in a microVM instead.
    #[arg(long)]
    shell: bool,
}

/// Runs `cargo xtask demo`.
pub fn run(args: Args) -> Result<()> {
    let prepared = Prepared::new(Profile::Fast)?;
    let program = e2e::program("rvm-demo", Profile::Fast)?;
    println!("{}", prepared.host);
    let (arguments, output) = match args.shell {
        true => (vec!["--shell".to_owned()], Output::Terminal),
        false => (vec![], Output::Inherit),
    };
    let code = prepared.run_with_kvm(&program, &arguments, output)?;
    println!("{}", prepared.host.to_string().replacen("Running", "This ran", 1));
    if code != 0 {
        std::process::exit(code);
    }
    Ok(())
}
