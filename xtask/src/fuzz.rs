//! `cargo xtask fuzz`: what a guest, a client or an image may send, at random, under libFuzzer.
//!
//! Built with this toolchain alone: coverage is the compiler's own pass, and the program brings libFuzzer
//! with it.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

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

const TRIPLE: &str = "x86_64-unknown-linux-gnu";
/// What cargo-fuzz gives the compiler, without a sanitizer, which this toolchain has none of.
const FLAGS: &str = "-Cpasses=sancov-module -Cllvm-args=-sanitizer-coverage-level=4 \
    -Cllvm-args=-sanitizer-coverage-inline-8bit-counters -Cllvm-args=-sanitizer-coverage-pc-table \
    -Cllvm-args=-sanitizer-coverage-trace-compares -Ccodegen-units=1 --cfg fuzzing";
/// The longest input.
const MOST: &str = "-max_len=16384";
/// Bytes of a corpus.
const KEPT: usize = 32 << 10;
/// One input takes no longer than this, in seconds, and no more memory than that, in MiB.
const BOUNDS: [&str; 2] = ["-timeout=20", "-rss_limit_mb=2048"];

/// Runs `cargo xtask fuzz`. Fails when there is a finding.
pub fn run(args: Args) -> Result<()> {
    if args.list {
        println!("{}", targets(&program()?)?.join("\n"));
        return Ok(());
    }
    let (count, found) = rounds(&args.targets, args.seconds)?;
    println!("\nfindings {} in {count} targets", found.len());
    ensure!(found.is_empty(), "findings in {}", found.join(", "));
    if args.keep {
        let program = program()?;
        let chosen = if args.targets.is_empty() { targets(&program)? } else { args.targets };
        chosen.iter().try_for_each(|target| keep(&program, target))?;
    }
    Ok(())
}

/// Runs each of these targets, or all where none is named, for a while: how many there were, and those
/// with a finding.
pub fn rounds(chosen: &[String], seconds: u64) -> Result<(usize, Vec<String>)> {
    let program = program()?;
    let all = targets(&program)?;
    if let Some(unknown) = chosen.iter().find(|target| !all.contains(target)) {
        bail!("{unknown}: no target; there are {}", all.join(", "));
    }
    let chosen = if chosen.is_empty() { all.as_slice() } else { chosen };
    let mut found = Vec::new();
    for target in chosen {
        println!("\n=== {target}");
        if let Err(error) = round(&program, target, Duration::from_secs(seconds)) {
            println!("{error:#}");
            found.push(target.clone());
        }
    }
    Ok((chosen.len(), found))
}

/// Where a target's inputs that were found are kept, and what is made of them.
fn work(target: &str) -> PathBuf {
    build::target_dir().join("fuzz/work").join(target)
}

/// Builds the program.
fn program() -> Result<PathBuf> {
    packages::ensure(&[Purpose::Build, Purpose::Fuzz])?;
    let dir = build::target_dir().join("fuzz");
    let manifest = build::workspace_dir().join("fuzz/libfuzzer/Cargo.toml");
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

/// What was found to reach most, of one target: inputs one behind the other, each after its length
/// in two bytes.
fn corpus(target: &str) -> PathBuf {
    build::workspace_dir().join("fuzz/corpus").join(target)
}

/// Inputs made by hand.
fn seeds(target: &str) -> PathBuf {
    build::workspace_dir().join("fuzz/seeds").join(target)
}

/// Puts the inputs of a corpus into a directory, a file each.
fn unpack(target: &str, dir: &Path) -> Result<()> {
    let Ok(packed) = fs::read(corpus(target)) else { return Ok(()) };
    let mut rest = packed.as_slice();
    let mut number = 0;
    while let Some((length, behind)) = rest.split_first_chunk() {
        let length = usize::from(u16::from_le_bytes(*length));
        let (input, behind) = behind.split_at_checked(length).context("the corpus ends within an input")?;
        fs::write(dir.join(format!("kept-{number}")), input)?;
        (rest, number) = (behind, number + 1);
    }
    Ok(())
}

/// The other way round, the shortest first, as many as there is room for.
fn pack(dir: &Path, target: &str) -> Result<()> {
    let read = |entry: std::io::Result<fs::DirEntry>| Ok(fs::read(entry?.path())?);
    let mut inputs = fs::read_dir(dir)?.map(read).collect::<Result<Vec<Vec<u8>>>>()?;
    inputs.sort_by(|a, b| (a.len(), a).cmp(&(b.len(), b)));
    let mut packed = Vec::new();
    for input in inputs.iter().filter(|input| !input.is_empty()) {
        let length = u16::try_from(input.len())?;
        if packed.len() + 2 + input.len() > KEPT {
            break;
        }
        packed.extend(length.to_le_bytes());
        packed.extend(input);
    }
    let path = corpus(target);
    fs::write(&path, packed).with_context(|| format!("write {}", path.display()))
}

/// One target for a while. What it finds on the way stays in the target directory, for the next round.
fn round(program: &Path, target: &str, seconds: Duration) -> Result<()> {
    let work = work(target);
    let (grown, crashes) = (work.join("corpus"), work.join("crashes"));
    for dir in [&grown, &crashes] {
        fs::create_dir_all(dir).with_context(|| format!("create {}", dir.display()))?;
    }
    let mut command = fuzzer(program, target);
    command.args(BOUNDS).args(["-close_fd_mask=1", "-print_final_stats=1", "-verbosity=1"]);
    command.arg(format!("-max_total_time={}", seconds.as_secs()));
    command.arg(format!("-artifact_prefix={}/", crashes.display()));
    unpack(target, &grown)?;
    command.arg(&grown);
    command.args(Some(seeds(target)).filter(|seeds| seeds.is_dir()));
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

/// A small set of inputs that reaches as much.
fn keep(program: &Path, target: &str) -> Result<()> {
    let work = work(target);
    let merged = work.join("merged");
    let _ = fs::remove_dir_all(&merged);
    fs::create_dir_all(&merged)?;
    let output = fuzzer(program, target)
        .args(["-set_cover_merge=1", "-close_fd_mask=1"])
        .args([&merged, &work.join("corpus")])
        .output()
        .context("run the fuzzer")?;
    ensure!(output.status.success(), "{target}: its corpus was not merged");
    pack(&merged, target)
}
