//! `cargo xtask kernel`.

use std::fs::File;
use std::io::BufReader;
use std::path::Path;

use anyhow::{Context, Result, bail, ensure};
use guest_kernel::{Flavour, order};

use crate::build::{self, Profile};
use crate::e2e::{self, Output, Prepared};
use crate::host::Host;

/// Arguments of `cargo xtask kernel`.
#[derive(clap::Args)]
pub struct Args {
    /// `rvm`, or `full`: with what only some containers need.
    #[arg(default_value = "rvm", value_parser = for_hosts)]
    flavour: Flavour,
    /// Ask Debian for a newer point release; what was built from the one before stays in the cache.
    #[arg(long)]
    refresh: bool,
    /// Watch a container's start in the devhost, and write anew which functions it comes to
    /// (`guest-kernel/config/function-order.txt`). The next build puts those first.
    #[arg(long, conflicts_with_all = ["flavour", "refresh"])]
    order: bool,
}

/// Runs `cargo xtask kernel`: builds it where it is not in the cache, and prints where it is.
pub fn run(args: Args) -> Result<()> {
    if args.order {
        return write_order();
    }
    let kernel = build::kernel_of(args.flavour, args.refresh)?;
    println!("{}", kernel.vmlinux.display());
    Ok(())
}

/// Has a container started in a devhost that tells what is executed, and writes the list of that.
fn write_order() -> Result<()> {
    let mut prepared = Prepared::new(Profile::Fast)?;
    ensure!(
        prepared.host != Host::Hardware,
        "only an emulated processor can be watched, and this machine has a real one"
    );
    let program = e2e::program("rvm-functions", Profile::Fast)?;
    let trace = build::target_dir().join("rvm").join("trace.log");
    prepared.trace = Some(trace.clone());
    eprintln!("{}", prepared.host);
    let mut symbols = String::new();
    let code = prepared.run_with_kvm(
        &program,
        &[],
        Output::Lines(&mut |line| {
            symbols.push_str(line);
            symbols.push('\n');
        }),
    )?;
    ensure!(code == 0, "rvm-functions failed with exit code {code}:\n{symbols}");
    let image = build::kernel(Flavour::Rvm)?.vmlinux;
    let image = std::fs::read(&image).with_context(|| format!("read {}", image.display()))?;
    let lines = BufReader::new(File::open(&trace).with_context(|| format!("open {}", trace.display()))?);
    let order = order::of_trace(lines, &image, &symbols).context("read what was executed")?;
    ensure!(!order.is_empty(), "the trace has no function of the guest's kernel: {}", trace.display());
    std::fs::remove_file(&trace)?;
    let list = Path::new(env!("CARGO_MANIFEST_DIR")).join("../guest-kernel/config/function-order.txt");
    std::fs::write(&list, order.join("\n") + "\n").with_context(|| format!("write {}", list.display()))?;
    println!("{} functions", order.len());
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
