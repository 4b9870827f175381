//! `cargo xtask test`.

use std::path::PathBuf;
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};

use crate::build::{self, Profile};
use crate::devhost;
use crate::e2e::{self, Output, Prepared};
use crate::host::Host;
use crate::parity;

/// Arguments of `cargo xtask test`.
#[derive(clap::Args)]
pub struct Args {
    /// Run only the end-to-end cases whose names contain this, and nothing else.
    #[arg(long)]
    filter: Vec<String>,
    /// Run the end-to-end cases with the containerd of this Debian release
    /// (`trixie`: 1.7, `sid`: 2.x) instead of the installed one.
    #[arg(long, value_name = "RELEASE")]
    containerd: Option<String>,
    /// How the devhost has its cgroups.
    #[arg(long, value_enum, default_value_t)]
    cgroups: devhost::Cgroups,
}

/// One part of the tests and how it went.
struct Part {
    name: &'static str,
    took: Duration,
    outcome: Result<String>,
}

/// Module of the cases for a KVM that cannot run a kernel.
const RING0: &str = "ring0::";

/// Module of the cases in a whole Debian, which takes a while to make.
const DEBIAN: &str = "debian";

/// Runs `cargo xtask test`: every part, also after one has failed.
pub fn run(args: Args) -> Result<()> {
    let mut parts = Vec::new();
    if args.filter.is_empty() {
        part(&mut parts, "formatting", || cargo(&["fmt", "--all", "--check"]));
        part(&mut parts, "clippy", || {
            cargo(&["clippy", "--workspace", "--all-targets", "--quiet", "--", "-D", "warnings"])
        });
        part(&mut parts, "unit tests", || cargo(&["test", "--workspace", "--quiet"]));
    }
    let mut prepared = None;
    part(&mut parts, "build", || {
        let mut everything = Prepared::new(Profile::Fast)?;
        let cases = cases()?;
        let place = everything.host.to_string();
        if args.filter.is_empty() || args.filter.iter().any(|filter| filter.contains(DEBIAN)) {
            everything.set("RVM_TEST_DEBIAN_IMAGE", build::debian_image()?);
        }
        prepared = Some((everything, cases, build::probe()?));
        Ok(place)
    });
    if let Some((mut prepared, cases, probe)) = prepared {
        prepared.set("RUST_BACKTRACE", "0");
        prepared.cgroups = args.cgroups;
        prepared.set(parity::PROBE_ENV, probe);
        if let Some(release) = &args.containerd {
            let cache = build::debian_cache_dir()?;
            let unpacked = rootfs_builder::debian::fetch_from(release, "containerd", &cache)?;
            prepared.set("RVM_CONTAINERD_DIR", unpacked.join("usr/bin"));
        }
        let on_ring0 = prepared.host != Host::Hardware;
        if on_ring0 && (args.filter.is_empty() || args.filter.iter().any(|filter| filter.contains("ring0"))) {
            part(&mut parts, "end to end, without a KVM that runs kernels", || {
                libtest(|output| prepared.run_here(&cases, &arguments(&[RING0.to_owned()], &[]), output))
            });
        }
        part(&mut parts, "end to end", || {
            libtest(|output| prepared.run_with_kvm(&cases, &arguments(&args.filter, &[RING0]), output))
        });
    }
    summary(&parts)
}

fn part(parts: &mut Vec<Part>, name: &'static str, act: impl FnOnce() -> Result<String>) {
    println!("\n=== {name}");
    let started = Instant::now();
    let outcome = act();
    if let Err(error) = &outcome {
        println!("{error:#}");
    }
    parts.push(Part { name, took: started.elapsed(), outcome });
}

fn summary(parts: &[Part]) -> Result<()> {
    println!("\n=== summary");
    for Part { name, took, outcome } in parts {
        let (word, text) = match outcome {
            Ok(text) => ("ok    ", text.as_str()),
            Err(_) => ("FAILED", "see above"),
        };
        println!("{word} {:>7.1} s  {name:<44} {text}", took.as_secs_f64());
    }
    let total: Duration = parts.iter().map(|part| part.took).sum();
    println!("       {:>7.1} s", total.as_secs_f64());
    let failed: Vec<&str> = parts.iter().filter(|part| part.outcome.is_err()).map(|part| part.name).collect();
    if !failed.is_empty() {
        bail!("failed: {}", failed.join(", "));
    }
    Ok(())
}

/// One case after another (they share one containerd), each with what it saw.
fn arguments(filters: &[String], skip: &[&str]) -> Vec<String> {
    let mut arguments = vec!["--test-threads=1".to_owned(), "--nocapture".to_owned()];
    arguments.extend(skip.iter().flat_map(|name| ["--skip".to_owned(), (*name).to_owned()]));
    arguments.extend(filters.iter().cloned());
    arguments
}

/// Runs libtest programs, passing their lines on; the outcome is the sum of
/// their results, and at least one case must have run.
fn libtest(run: impl FnOnce(Output<'_>) -> Result<i32>) -> Result<String> {
    let mut tally = Tally::default();
    let code = run(Output::Lines(&mut |line| {
        println!("{line}");
        tally.line(line);
    }))?;
    if code != 0 {
        bail!("exit code {code}: {}", tally.text());
    }
    if tally.passed == 0 {
        bail!("no test ran");
    }
    Ok(tally.text())
}

#[derive(Default)]
struct Tally {
    passed: u64,
    failed: u64,
    ignored: u64,
}

impl Tally {
    /// Counts a line such as `test result: ok. 3 passed; 0 failed; 1 ignored; ...`.
    fn line(&mut self, line: &str) {
        let Some((_, counts)) = line.strip_prefix("test result: ").and_then(|rest| rest.split_once(". "))
        else {
            return;
        };
        for count in counts.split("; ") {
            let Some((number, kind)) = count.split_once(' ') else { continue };
            let number: u64 = number.parse().unwrap_or(0);
            match kind {
                "passed" => self.passed += number,
                "failed" => self.failed += number,
                "ignored" => self.ignored += number,
                _ => {}
            }
        }
    }

    fn text(&self) -> String {
        format!("{} passed, {} failed, {} ignored", self.passed, self.failed, self.ignored)
    }
}

/// Runs cargo in the checkout, passing its output on.
fn cargo(arguments: &[&str]) -> Result<String> {
    let mut command = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    command.args(arguments).current_dir(build::workspace_dir());
    if arguments[0] == "test" {
        return libtest(|output| {
            let Output::Lines(callback) = output else { bail!("lines are expected") };
            Ok(e2e::lines(command, callback)?.code().unwrap_or(1))
        });
    }
    let status = command.status().context("run cargo")?;
    if !status.success() {
        bail!("cargo {} failed ({status})", arguments[0]);
    }
    Ok(String::new())
}

/// The end-to-end cases, built. Returns their program.
fn cases() -> Result<PathBuf> {
    #[derive(serde::Deserialize)]
    struct Message {
        executable: Option<PathBuf>,
        target: Target,
    }
    #[derive(serde::Deserialize)]
    struct Target {
        name: String,
    }
    let mut command = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    command.args(["test", "--quiet", "--no-run", "--package", "rvm-tests", "--test", "e2e"]);
    command.args(["--message-format", "json-render-diagnostics"]).current_dir(build::workspace_dir());
    let output = command.output().context("run cargo")?;
    if !output.status.success() {
        bail!("building the end-to-end cases failed:\n{}", String::from_utf8_lossy(&output.stderr));
    }
    let text = String::from_utf8_lossy(&output.stdout);
    text.lines()
        .filter_map(|line| serde_json::from_str::<Message>(line).ok())
        // The package's programs are built, and named, along with its cases.
        .find_map(|message| message.executable.filter(|_| message.target.name == "e2e"))
        .context("cargo built no end-to-end program")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn results_of_several_programs_add_up() {
        let mut tally = Tally::default();
        for line in [
            "test result: ok. 3 passed; 0 failed; 1 ignored; 0 measured; 0 filtered out; finished in 0.1s",
            "test something ... ok",
            "test result: FAILED. 1 passed; 2 failed; 0 ignored; 0 measured; 0 filtered out; finished in 0.1s",
        ] {
            tally.line(line);
        }
        assert_eq!(tally.text(), "4 passed, 2 failed, 1 ignored");
    }
}
