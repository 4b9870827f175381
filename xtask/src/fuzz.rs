//! `cargo xtask fuzz`: what a guest, a client or an image may send, at random, under libFuzzer.
//!
//! Built with this toolchain alone: coverage is the compiler's own pass, and the program brings libFuzzer
//! with it.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail, ensure};

use crate::build;
use crate::packages::{self, Purpose};

/// Arguments of `cargo xtask fuzz`.
#[derive(clap::Args)]
pub struct Args {
    /// The targets; all where none is named.
    targets: Vec<String>,
    /// Seconds for each.
    #[arg(long, default_value_t = 20)]
    seconds: u64,
    /// Put what was found to reach more into `fuzz/corpus`, as little of it as does.
    #[arg(long)]
    keep: bool,
    /// Print the targets.
    #[arg(long)]
    list: bool,
}

/// What the fuzzers are built for.
pub const TRIPLE: &str = "x86_64-unknown-linux-gnu";
/// Their workspace, in this one's directory.
pub const MANIFEST: &str = "fuzz/libfuzzer/Cargo.toml";
/// What cargo-fuzz gives the compiler, without a sanitizer, which this toolchain has none of.
const FLAGS: &str = "-Cpasses=sancov-module -Cllvm-args=-sanitizer-coverage-level=4 \
    -Cllvm-args=-sanitizer-coverage-inline-8bit-counters -Cllvm-args=-sanitizer-coverage-pc-table \
    -Cllvm-args=-sanitizer-coverage-trace-compares -Ccodegen-units=1 --cfg fuzzing";
/// The longest input.
const MOST: &str = "-max_len=16384";
/// One input takes no longer than this, in seconds, and no more memory than that, in MiB.
const BOUNDS: [&str; 2] = ["-timeout=20", "-rss_limit_mb=2048"];

/// Runs `cargo xtask fuzz`. Fails when there is a finding.
pub fn run(args: Args) -> Result<()> {
    if args.list {
        println!("{}", targets(&program()?)?.join("\n"));
        return Ok(());
    }
    let rounds = rounds(&args.targets, args.seconds)?;
    println!("\n{}", rounds.text());
    rounds.check()?;
    if args.keep {
        let program = program()?;
        let chosen = if args.targets.is_empty() { targets(&program)? } else { args.targets };
        chosen.iter().try_for_each(|target| keep(&program, target))?;
    }
    Ok(())
}

/// What rounds have come to.
#[derive(Default)]
pub struct Rounds {
    /// How many targets there were.
    targets: usize,
    /// Those with a finding.
    found: Vec<String>,
}

impl Rounds {
    /// `findings 0 in 19 targets`.
    pub fn text(&self) -> String {
        format!("findings {} in {} targets", self.found.len(), self.targets)
    }

    /// Fails where there is a finding.
    pub fn check(&self) -> Result<()> {
        ensure!(self.found.is_empty(), "findings in {}", self.found.join(", "));
        Ok(())
    }
}

/// Runs each of these targets, or all where none is named, for a while.
pub fn rounds(chosen: &[String], seconds: u64) -> Result<Rounds> {
    let program = program()?;
    let all = targets(&program)?;
    if let Some(unknown) = chosen.iter().find(|target| !all.contains(target)) {
        bail!("{unknown}: no target; there are {}", all.join(", "));
    }
    let chosen = if chosen.is_empty() { all.as_slice() } else { chosen };
    let mut found = Vec::new();
    for target in chosen {
        println!("\n=== {target}");
        if let Err(error) = round(&program, target, seconds) {
            println!("{error:#}");
            found.push(target.clone());
        }
    }
    Ok(Rounds { targets: chosen.len(), found })
}

/// Where a target leaves the inputs that it found.
fn work(target: &str) -> PathBuf {
    build::target_dir().join("fuzz/work").join(target)
}

/// Builds the program.
fn program() -> Result<PathBuf> {
    packages::ensure(&[Purpose::Build, Purpose::Fuzz])?;
    let dir = build::target_dir().join("fuzz");
    let manifest = build::workspace_dir().join(MANIFEST);
    let status = Command::new(env!("CARGO"))
        .args(["build", "--quiet", "--locked", "--release", "--target", TRIPLE, "--manifest-path"])
        .arg(manifest)
        .arg("--target-dir")
        .arg(&dir)
        .env("RUSTFLAGS", FLAGS)
        .status()
        .context("run cargo")?;
    ensure!(status.success(), "the fuzzer was not built");
    Ok(dir.join(TRIPLE).join("release/rvm-libfuzzer"))
}

fn targets(program: &Path) -> Result<Vec<String>> {
    let output = Command::new(program).env("RVM_FUZZ_LIST", "1").output().context("run the fuzzer")?;
    let targets: Vec<String> = String::from_utf8(output.stdout)?.lines().map(str::to_owned).collect();
    ensure!(!targets.is_empty(), "the fuzzer has no targets");
    Ok(targets)
}

/// Inputs of a target that are kept: those made by hand, and what was found to reach more.
fn corpus(target: &str) -> PathBuf {
    build::workspace_dir().join("fuzz/corpus").join(target)
}

/// One target for a while. What it finds on the way stays in the target directory, for the next round.
fn round(program: &Path, target: &str, seconds: u64) -> Result<()> {
    let work = work(target);
    let (grown, crashes) = (work.join("corpus"), work.join("crashes"));
    for dir in [&grown, &crashes] {
        fs::create_dir_all(dir).with_context(|| format!("create {}", dir.display()))?;
    }
    let mut command = fuzzer(program, target);
    command.args(BOUNDS).args(["-close_fd_mask=1", "-print_final_stats=1", "-verbosity=1"]);
    command.arg(format!("-max_total_time={}", seconds));
    command.arg(format!("-artifact_prefix={}/", crashes.display()));
    command.arg(&grown);
    command.args(Some(corpus(target)).filter(|corpus| corpus.is_dir()));
    let output = command.output().context("run the fuzzer")?;
    let said = String::from_utf8_lossy(&output.stderr);
    let lines: Vec<&str> = said.lines().collect();
    if !output.status.success() {
        let last = lines.len().saturating_sub(40);
        bail!(
            "{}\n{target}: a finding ({}); what did it is in {}",
            lines[last..].join("\n"),
            output.status,
            crashes.display()
        );
    }
    let done = lines.iter().rev().find(|line| line.contains("cov:")).unwrap_or(&"");
    println!("{}", done.trim());
    Ok(())
}

fn fuzzer(program: &Path, target: &str) -> Command {
    let mut command = Command::new(program);
    command.env("RVM_FUZZ_TARGET", target).arg(MOST);
    command
}

/// Adds to the corpus what reaches more than it does, few inputs rather than many.
fn keep(program: &Path, target: &str) -> Result<()> {
    let corpus = corpus(target);
    fs::create_dir_all(&corpus).with_context(|| format!("create {}", corpus.display()))?;
    let output = fuzzer(program, target)
        .args(["-set_cover_merge=1", "-close_fd_mask=1"])
        .args([&corpus, &work(target).join("corpus")])
        .output()
        .context("run the fuzzer")?;
    ensure!(output.status.success(), "{target}: its corpus was not merged");
    Ok(())
}
