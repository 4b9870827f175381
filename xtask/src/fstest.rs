//! `cargo xtask fstest`: pjdfstest and fsx in a container, under runc and rvm.

use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail};

use crate::build::{self, Profile};
use crate::e2e::{self, Output, Prepared};
use crate::packages::{self, Purpose};
use crate::progress::Step;

/// Arguments of `cargo xtask fstest`.
#[derive(clap::Args)]
pub struct Args {
    /// Run pjdfstest's tests whose names contain one of these; all otherwise.
    patterns: Vec<String>,
    /// Operations of each run of fsx.
    #[arg(long, default_value_t = OPERATIONS)]
    operations: u32,
}

impl Default for Args {
    fn default() -> Self {
        Self { patterns: Vec::new(), operations: OPERATIONS }
    }
}

/// Operations of a run of fsx where nothing else is asked for.
const OPERATIONS: u32 = 1000;

/// The programs and their versions, from crates.io.
const TOOLS: [(&str, &str); 2] = [("pjdfstest", "0.2.2"), ("fsx", "0.3.2")];

/// Static programs: the container has no libraries.
const TARGET: &str = "x86_64-unknown-linux-gnu";

/// Runs `cargo xtask fstest`.
pub fn run(args: Args) -> Result<()> {
    let tools = tools()?;
    let prepared = Prepared::new(Profile::Fast)?;
    let program = e2e::program("rvm-fstest", Profile::Fast)?;
    let mut arguments = vec![tools.to_string_lossy().into_owned(), args.operations.to_string()];
    arguments.extend(args.patterns);
    let code = prepared.run_with_kvm(&program, &arguments, Output::Inherit)?;
    if code != 0 {
        bail!("what is WRONG above fails under rvm and passes under runc");
    }
    Ok(())
}

/// Builds the tools, once. Returns their directory.
fn tools() -> Result<PathBuf> {
    packages::ensure(&[Purpose::Build, Purpose::FileSystemTests])?;
    let dir = build::cache_dir()?.join("fstest");
    for (name, version) in TOOLS {
        let root = dir.join(format!("{name}-{version}"));
        if !root.join("bin").join(name).exists() {
            install(name, version, &root)?;
        }
        let link = dir.join(name);
        let _ = std::fs::remove_file(&link);
        std::os::unix::fs::symlink(root.join("bin").join(name), &link)?;
    }
    sleep(&dir)?;
    Ok(dir)
}

/// Compiles a program that sleeps whatever it is called. pjdfstest runs a copy of `sleep` under another name, and the
/// container's is one of busybox's, which ends at once then: whether it still runs when it is tried is chance.
fn sleep(dir: &Path) -> Result<()> {
    const SOURCE: &str = "fn main() { std::thread::sleep(std::time::Duration::from_secs(10)) }\n";
    let (source, program) = (dir.join("sleep.rs"), dir.join("sleep"));
    if program.exists() {
        return Ok(());
    }
    std::fs::write(&source, SOURCE)?;
    let status = Command::new(std::env::var_os("RUSTC").unwrap_or_else(|| "rustc".into()))
        .args(["-O", "--target", TARGET, "-C", "target-feature=+crt-static", "-o"])
        .args([&program, &source])
        .status()
        .context("run rustc")?;
    if !status.success() {
        bail!("rustc {} failed ({status})", source.display());
    }
    Ok(())
}

fn install(name: &str, version: &str, root: &Path) -> Result<()> {
    let step = Step::start(format!("Compiling {name} {version}"));
    let output = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()))
        .args(["install", "--quiet", "--locked", "--target", TARGET, "--version", version, "--root"])
        .arg(root)
        .arg(name)
        .env("RUSTFLAGS", "-C target-feature=+crt-static")
        .env("CARGO_TARGET_DIR", build::target_dir().join("fstest"))
        .output()
        .context("run cargo")?;
    if !output.status.success() {
        bail!("cargo install {name} failed:\n{}", String::from_utf8_lossy(&output.stderr));
    }
    step.done(version);
    Ok(())
}
