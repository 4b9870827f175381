//! `cargo xtask bench`: numbers, side by side with peers.

mod boot;
mod container;
mod report;
mod tiny_init;

use anyhow::{Context, Result, bail};
use serde_json::Value;

use crate::e2e::Output;

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
    /// A container's start and an added process: time against runc, and where it goes.
    Container(container::Args),
}

/// Runs `cargo xtask bench`.
pub fn run(args: Args) -> Result<()> {
    match args.what {
        What::Boot(args) => boot::run(args),
        What::Container(args) => container::run(args),
    }
}

/// What the program's result line starts with.
const MARK: &str = "@result ";

/// Runs a part of the program; its result is one line, everything else is passed on.
fn result(part: &str, run: impl FnOnce(Output<'_>) -> Result<i32>) -> Result<Value> {
    let mut found = None;
    let code = run(Output::Lines(&mut |line| match line.strip_prefix(MARK) {
        Some(json) => found = Some(json.to_owned()),
        None => eprintln!("{line}"),
    }))?;
    if code != 0 {
        bail!("rvm-bench {part} failed with exit code {code}");
    }
    let json = found.with_context(|| format!("rvm-bench {part} gave no result"))?;
    serde_json::from_str(&json).with_context(|| format!("rvm-bench {part} gave {json:?}"))
}
