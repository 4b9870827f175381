//! `cargo xtask bench`: numbers, side by side with peers.

mod boot;
mod container;
mod device;
mod files;
mod fs_server;
mod many;
mod neighbour;
mod net;
mod pod;
mod report;
mod requests;
mod tiny_init;
mod virtiofsd;
mod workloads;

use std::fmt::Write;
use std::path::PathBuf;

use anyhow::{Context, Result, bail};
use serde_json::{Value, json};

use crate::build::Profile;
use crate::e2e::{self, Output, Prepared};

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
    /// Many containers started at once and removed at once, against runc.
    Many(many::Args),
    /// What programs do with files of an image and of a volume, against runc.
    Files(files::Args),
    /// What operations on files cost of round trips, exits and system calls, and their time against runc's.
    Requests(requests::Args),
    /// Files of images and volumes, against QEMU's microvm with virtiofsd and against runc.
    Virtiofsd(virtiofsd::Args),
    /// What developers and services do with files (git, npm, cargo, pip, apt, PostgreSQL, SQLite), against runc.
    Workloads(workloads::Args),
    /// The monitor's file server without a guest: requests a second, and processor time of each.
    FsServer(fs_server::Args),
    /// What a sandbox loses by a neighbour that takes all it can, beside what one loses under runc.
    Neighbour(neighbour::Args),
    /// A container's network, against runc's and QEMU's: throughput, loss, latency and what they cost.
    Net(net::Args),
    /// A pod by containerd's CRI plugin and its containers, against runc.
    Pod(pod::Args),
}

/// Runs `cargo xtask bench`.
pub fn run(args: Args) -> Result<()> {
    match args.what {
        What::Boot(args) => boot::run(args),
        What::Container(args) => container::run(args),
        What::Many(args) => many::run(args),
        What::Files(args) => files::run(args),
        What::Requests(args) => requests::run(args),
        What::Virtiofsd(args) => virtiofsd::run(args),
        What::Workloads(args) => workloads::run(args),
        What::FsServer(args) => fs_server::run(args),
        What::Neighbour(args) => neighbour::run(args),
        What::Net(args) => net::run(args),
        What::Pod(args) => pod::run(args),
    }
}

/// What most benchmarks are told.
#[derive(clap::Args)]
struct Common {
    /// Print one JSON object on standard output, and nothing else there.
    #[arg(long)]
    json: bool,
    /// Measure what tests run instead of what is installed: builds in a fraction of the time.
    #[arg(long)]
    fast: bool,
}

/// Whose containerd it is, and where that keeps its files.
#[derive(clap::Args)]
struct Containerd {
    /// With the containerd of this Debian release (`sid`: 2.1 or later, which has the EROFS snapshotter).
    #[arg(long, value_name = "RELEASE")]
    containerd: Option<String>,
    /// What it keeps its files on: ext4, which another release's has by itself, or XFS. Else it is the machine's own, in
    /// the devhost a tmpfs.
    #[arg(long, value_name = "KIND", value_parser = ["ext4", "xfs"])]
    file_system: Option<String>,
}

impl Containerd {
    fn set(&self, prepared: &mut Prepared) -> Result<()> {
        if let Some(kind) = &self.file_system {
            prepared.set("RVM_CONTAINERD_FILE_SYSTEM", kind);
        }
        self.containerd.iter().try_for_each(|release| prepared.set_containerd(release))
    }
}

/// The head of a report for people: where and how it was measured, and whether each ratio is what
/// it may be at most.
fn aims(result: &Value, aims: &[(&str, f64)]) -> String {
    let conditions = &result["conditions"];
    let mut text = format!(
        "{}\nMedians of {} runs in turn, host kernel {}, profile {}.\n\n",
        conditions["where"].as_str().unwrap_or_default(),
        conditions["runs"],
        conditions["host_kernel"].as_str().unwrap_or_default(),
        conditions["profile"].as_str().unwrap_or_default(),
    );
    for (name, aim) in aims {
        let ratio = result["ratios"][name].as_f64().unwrap_or(f64::NAN);
        let verdict = if ratio <= *aim { "ok    " } else { "MISSED" };
        let _ = writeln!(text, "{verdict} {name:<64} {ratio:>6.2}  (aim: at most {aim})");
    }
    text.push('\n');
    text
}

/// A report's table of medians under both runtimes, with names of so many characters.
fn medians(result: &Value, width: usize) -> String {
    let mut text = format!("   {:<width$} {:>9} {:>9} {:>8}\n", "ms", "rvm", "runc", "rvm/runc");
    for row in result["medians_ms, rvm and runc"].as_array().into_iter().flatten() {
        let name = row[0].as_str().unwrap_or_default();
        let [rvm, runc] = [&row[1], &row[2]].map(|value| value.as_f64().unwrap_or(f64::NAN));
        let _ = writeln!(text, "   {name:<width$} {rvm:>9.1} {runc:>9.1} {:>8.2}", rvm / runc);
    }
    text
}

/// The names of all that a result compares, where it compares more than two.
fn kinds(result: &Value) -> Vec<&str> {
    result["kinds"].as_array().into_iter().flatten().filter_map(Value::as_str).collect()
}

/// A report's table of medians of each of its [`kinds`].
fn columns(result: &Value) -> String {
    let mut text = format!("{}\n", result["conditions"]["units"].as_str().unwrap_or_default());
    let kinds = kinds(result);
    let width = kinds.iter().map(|kind| kind.len()).fold(16, usize::max);
    let mut row = |name: &str, cells: Vec<String>| {
        let cells: String = cells.iter().map(|cell| format!(" {cell:>width$}")).collect();
        let _ = writeln!(text, "   {name:<48}{cells}");
    };
    row("", kinds.into_iter().map(str::to_owned).collect());
    for median in result["medians"].as_array().into_iter().flatten() {
        let values = median[1].as_array().into_iter().flatten();
        let cells = values.map(|value| format!("{:.3}", value.as_f64().unwrap_or(f64::NAN))).collect();
        row(median[0].as_str().unwrap_or_default(), cells);
    }
    text
}

/// A benchmark that is one part of the program, against a peer in one run.
struct Bench {
    part: &'static str,
    profile: Profile,
    program: PathBuf,
    /// What it runs in and is told.
    prepared: Prepared,
}

impl Bench {
    /// Builds what is measured: with `fast` what tests run, else what is installed.
    fn new(part: &'static str, fast: bool, runs: u32) -> Result<Self> {
        let profile = if fast { Profile::Fast } else { Profile::Release };
        let mut prepared = Prepared::new(profile)?;
        let program = e2e::program("rvm-bench", Profile::Fast)?;
        prepared.set("RVM_BENCH_RUNS", runs.to_string());
        // For each round: who asks for more of them waits longer.
        prepared.limit *= runs.max(1);
        Ok(Self { part, profile, program, prepared })
    }

    /// Measures, and prints the result: one JSON object, or what `text` makes of it.
    fn report(&self, as_json: bool, text: impl Fn(&Value) -> String) -> Result<()> {
        print(&self.measure()?, as_json, text)
    }

    /// Measures; the result.
    fn measure(&self) -> Result<Value> {
        let Self { part, profile, program, prepared } = self;
        eprintln!("{}", prepared.host);
        let mut all = result(part, |output| prepared.run_with_kvm(program, &[(*part).to_owned()], output))?;
        all["conditions"]["where"] = json!(prepared.host.to_string());
        all["conditions"]["profile"] = json!(profile.as_str());
        Ok(all)
    }
}

/// Prints a result: one JSON object, or what `text` makes of it.
fn print(result: &Value, as_json: bool, text: impl Fn(&Value) -> String) -> Result<()> {
    if as_json {
        println!("{}", serde_json::to_string(result)?);
    } else {
        print!("{}", text(result));
    }
    Ok(())
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
        bail!("bench {part} failed with exit code {code}");
    }
    let json = found.with_context(|| format!("bench {part} gave no result"))?;
    serde_json::from_str(&json).with_context(|| format!("bench {part} gave {json:?}"))
}
