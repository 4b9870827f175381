//! `cargo xtask test`.

mod calls;
mod shards;
mod tally;
mod walls;

use std::path::PathBuf;
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, bail};

use crate::build::{self, Profile};
use crate::devhost;
use crate::docker;
use crate::e2e::{self, Output, Prepared};
use crate::fstest;
use crate::fuzz;
use crate::host::Host;
use crate::kernel;
use crate::packages::{self, Purpose};
use crate::parity;
use tally::{Reader, Tally};
pub use walls::{WallsArgs, run as walls};

/// Arguments of `cargo xtask test`.
#[derive(Default, clap::Args)]
pub struct Args {
    /// Run only the end-to-end cases whose names contain this, or begin with it where it names a module
    /// (`network::`), and nothing else.
    #[arg(long)]
    filter: Vec<String>,
    /// Run the end-to-end cases with the containerd and CNI plugins of this Debian release
    /// (`trixie`: 1.7, `sid`: 2.x) instead of the installed ones.
    #[arg(long, value_name = "RELEASE")]
    containerd: Option<String>,
    /// Run only the end-to-end cases with Docker, and with that of this Debian release
    /// (`trixie`: 26.1, `sid`: 28) on its own containerd.
    #[arg(long, value_name = "RELEASE", conflicts_with = "containerd")]
    docker: Option<String>,
    /// How the devhost has its cgroups.
    #[arg(long, value_enum, default_value_t)]
    cgroups: devhost::Cgroups,
    /// Enable AppArmor in the devhost.
    #[arg(long)]
    apparmor: bool,
    /// Processors of the devhost; the cases `processors::` take two.
    #[arg(long, default_value_t = e2e::CPUS)]
    cpus: u32,
    /// Also compare the system calls that the monitor's threads made with those that they are allowed, of
    /// which each has to be needed by some case. Without a filter, the longest cases are run too.
    #[arg(long)]
    calls: bool,
    /// Devhosts side by side, each with a part of the end-to-end cases. Each takes a processor
    /// and 4 GiB of memory.
    #[arg(long, value_name = "N", default_value_t = default_shards())]
    shards: usize,
    /// Everything of the gate, then what takes hours more: the longest cases, other releases of containerd,
    /// other cgroup hierarchies, file system tests, soaks.
    #[arg(long, conflicts_with_all = ["filter", "containerd", "docker", "cgroups", "apparmor", "cpus"])]
    all: bool,
}

/// Two where there are processors for them.
fn default_shards() -> usize {
    std::thread::available_parallelism().map_or(1, usize::from).min(2)
}

/// One part of the tests and how it went.
struct Part {
    name: String,
    took: Duration,
    outcome: Outcome,
}

/// How a part went.
struct Outcome {
    /// Its cases.
    tally: Tally,
    /// Said of it in the summary.
    note: String,
    /// Why it failed.
    error: Option<anyhow::Error>,
}

impl From<Result<String>> for Outcome {
    fn from(result: Result<String>) -> Self {
        match result {
            Ok(note) => Self { tally: Tally::default(), note, error: None },
            Err(error) => Self { tally: Tally::default(), note: String::new(), error: Some(error) },
        }
    }
}

/// Module of the cases for a KVM that cannot run a kernel.
const RING0: &str = "ring0::";

/// Module of the cases that do the same many times.
const SOAK: &str = "soak::";

/// What the names of the cases begin with in which something dies at each of many points.
const EVERY_FAULT: &str = "faults::every";

/// Module of the cases with volumes that fail, of which one waits for limits to pass.
const VOLUMES_FAULTS: &str = "volumes_faults::";

/// Module of the cases for a host with several processors.
const PROCESSORS: &str = "processors::";

/// Module of the session with Docker that is compared, which takes a quarter of an hour.
const DOCKER_SESSION: &str = "docker_session::";

/// Cases, or all of a module's, that take most of a minute or more each in a slow hour, or need the image of a whole Debian, whose
/// import takes four there: what is left of their modules shows the same of fewer containers, networks, deaths or programs.
const LONG: [&str; 31] = [
    DEBIAN,
    "docker::a_build_runs_its_steps_in_machines",
    DOCKER_SERVICES,
    "erofs_snapshotter::mounts::what_is_written_is_on_containerds_disk",
    "exec_robust::a_start_that_is_not_answered_has_one_exit",
    "exec_robust::three_hundred_at_once",
    "exec_robust::two_hundred_in_a_row_leave_nothing",
    "huge_pages::",
    "images::a_damaged_image_is_made_once_more",
    "images::an_image_has_all_that_its_layers_have",
    "images::an_image_that_goes_is_kept_by_who_has_it",
    "images::memory::a_larger_image_is_a_disk",
    "images::memory::an_image_comes_and_goes_with_its_containers",
    "images::memory::the_hosts_pages_are_the_only_ones",
    "interfaces::a_saved_machine_goes_on_with_its_network",
    "interfaces::limits_several_queues_and_what_is_no_vhost",
    "interfaces::the_monitor_moves_frames",
    "joined::a_crash_loop_leaves_nothing",
    "joined::three_come_and_go_in_every_order",
    "limits::a_limit_beyond_the_machine",
    "network::a_chain_of_plugins",
    "network::interfaces_come_and_go",
    "pod_volumes::directories_are_shared_and_hold_their_limits",
    "pod_volumes::what_kubelet_changes_is_seen",
    "pods::a_pods_processes_have_a_limit_together",
    "pods::limits_change_while_it_runs_and_what_is_used_is_told",
    "pods::parameters_of_a_pod_hold_in_its_containers",
    "pods::what_is_written_is_counted",
    "rootfs::a_hundred_layers",
    "rootless::beside_runc_in_a_delegated_cgroup",
    "run::twenty_one_after_another",
];

/// Releases of containerd and CNI plugins that `--all` tries, and the cases for which they matter.
const CONTAINERDS: [&str; 2] = ["trixie", "sid"];
const CONTAINERDS_CASES: [&str; 10] = [
    "run::",
    "erofs_snapshotter::",
    "exec::",
    "death::",
    "failures::",
    "network::",
    "process::",
    "pods::",
    "pod_volumes::",
    "pod_users::",
];

/// Hierarchies of cgroups that `--all` tries, and the cases about the host's cgroups.
const HIERARCHIES: [devhost::Cgroups; 2] = [devhost::Cgroups::Hybrid, devhost::Cgroups::V1];
const HIERARCHIES_CASES: [&str; 3] = ["size::", "run::exit_codes", "death::"];

/// Cases for which it matters that a host has AppArmor.
const APPARMOR_CASES: [&str; 1] = ["docker::what_a_host_with_apparmor_names"];

/// Modules of the cases in a whole Debian, which takes a while to make.
const DEBIAN: &str = "debian::";
const DOCKER_SERVICES: &str = "docker_network::services::";

/// Module of the cases with a guest that attacks.
const HOSTILE: &str = "hostile";

/// Module of the cases with a guest that fails, which the attacker brings about.
const GUEST_FAULTS: &str = "guest_faults::";

/// What the names of the modules with Docker begin with.
const DOCKER: &str = "docker";

/// Which end-to-end cases, and where.
struct Selection {
    /// What the summary calls it.
    name: String,
    /// Parts of the cases' names; all where there are none.
    filters: Vec<String>,
    /// Beginnings of names of cases that are left out.
    without: Vec<&'static str>,
    containerd: Option<String>,
    docker: String,
    cgroups: devhost::Cgroups,
    apparmor: bool,
    cpus: u32,
    calls: bool,
    shards: usize,
}

impl Selection {
    /// What the arguments ask for: without a filter the gate's, which leaves out what takes long. The record of calls is of
    /// the longest of its cases too: some make what no other does.
    fn of(args: &Args) -> Self {
        let gate = args.filter.is_empty() && !args.all;
        let mut without = vec![RING0];
        if gate {
            without.extend([SOAK, DOCKER_SESSION, EVERY_FAULT, GUEST_FAULTS, VOLUMES_FAULTS]);
            if !args.calls {
                without.extend(LONG);
            }
        }
        if args.cpus < 2 {
            without.push(PROCESSORS);
        }
        if let Some(release) = &args.docker {
            let all = Self::docker(release, args);
            return if args.filter.is_empty() { all } else { Self { filters: args.filter.clone(), ..all } };
        }
        Self {
            name: "end to end".to_owned(),
            filters: args.filter.clone(),
            without,
            containerd: args.containerd.clone(),
            docker: docker::RELEASE.to_owned(),
            cgroups: args.cgroups,
            apparmor: args.apparmor,
            cpus: args.cpus,
            calls: args.calls,
            shards: args.shards,
        }
    }

    /// The cases with the Docker of `release`, on its containerd.
    fn docker(release: &str, args: &Args) -> Self {
        Self {
            name: format!("end to end, Docker of {release}"),
            filters: vec![DOCKER.to_owned()],
            without: vec![RING0],
            containerd: Some(release.to_owned()),
            docker: release.to_owned(),
            cgroups: args.cgroups,
            apparmor: args.apparmor,
            cpus: args.cpus,
            calls: false,
            shards: args.shards,
        }
    }

    /// What `--all` runs beside the gate.
    fn others(args: &Args) -> Vec<Self> {
        let owned = |cases: &[&str]| cases.iter().map(|&case| case.to_owned()).collect();
        let containerds = CONTAINERDS.iter().map(|release| Self {
            name: format!("end to end, containerd of {release}"),
            filters: owned(&CONTAINERDS_CASES),
            containerd: Some((*release).to_owned()),
            ..Self::of(args)
        });
        let hierarchies = HIERARCHIES.iter().map(|&cgroups| Self {
            name: format!("end to end, cgroups {}", cgroups.as_str()),
            filters: owned(&HIERARCHIES_CASES),
            cgroups,
            ..Self::of(args)
        });
        let apparmor = Self {
            name: "end to end, AppArmor".to_owned(),
            filters: owned(&APPARMOR_CASES),
            apparmor: true,
            ..Self::of(args)
        };
        let processors = Self {
            name: "end to end, two processors".to_owned(),
            filters: vec![PROCESSORS.to_owned()],
            without: Vec::new(),
            cpus: 2,
            ..Self::of(args)
        };
        let docker = Self::docker(docker::NEWEST, args);
        containerds.chain(hierarchies).chain([apparmor, processors, docker]).collect()
    }
}

/// Runs `cargo xtask test`: every part, also after one has failed. Exits with 1
/// when one has.
pub fn run(args: Args) -> Result<()> {
    let mut parts = Parts::default();
    let whole = args.filter.is_empty() && args.docker.is_none();
    if whole {
        parts.act("formatting", || cargo(&["fmt", "--all", "--check"]).into());
        // A workspace of its own, which nothing else of this looks at.
        parts.act("lock file of the fuzzers", || {
            let manifest = build::workspace_dir().join(fuzz::MANIFEST);
            let manifest = manifest.to_string_lossy();
            cargo(&["fetch", "--locked", "--quiet", "--target", fuzz::TRIPLE, "--manifest-path", &manifest])
                .into()
        });
        // What compiling the tests takes, and so linting them.
        parts.act("packages", || packages::ensure(&[Purpose::Build]).map(|()| String::new()).into());
        parts.act("clippy", || clippy(&["--all-targets"]).into());
        // No test of the workspace's, so not among all its targets.
        parts.act("clippy, end-to-end cases", || clippy(&["--test", "e2e"]).into());
        parts.act("unit tests", unit_tests);
    }
    let selection = Selection::of(&args);
    end_to_end(&selection, &mut parts);
    if args.all {
        for other in Selection::others(&args) {
            end_to_end(&other, &mut parts);
        }
        parts
            .act("file system tests", || fstest::run(fstest::Args::default()).map(|()| String::new()).into());
    }
    if whole {
        parts.act("age of the guest kernel", || kernel::is_current().into());
    }
    parts.end()
}

/// What it takes to run a selection's cases.
struct Built {
    prepared: Prepared,
    program: PathBuf,
    cases: Vec<String>,
    /// Whether those for a KVM that cannot run a kernel are to be run.
    without_kvm: bool,
}

/// The end-to-end cases of a selection.
fn end_to_end(selection: &Selection, parts: &mut Parts) {
    let mut built = None;
    parts.act("build", || {
        build_for(selection)
            .map(|everything| {
                let place = everything.prepared.host.to_string();
                built = Some(everything);
                place
            })
            .into()
    });
    let Some(Built { prepared, program, cases, without_kvm }) = built else { return };
    if without_kvm {
        parts.act("end to end, without a KVM that runs kernels", || {
            let mut arguments = libtest_arguments();
            arguments.push(RING0.to_owned());
            libtest(|output| prepared.run_here(&program, &arguments, output))
        });
    }
    if cases.is_empty() {
        return;
    }
    let mut called = selection.calls.then(calls::Seen::new);
    parts.several(&selection.name, || {
        let most = if prepared.host == Host::Hardware { 1 } else { selection.shards };
        let is_long = |case: &String| {
            [SOAK, EVERY_FAULT].iter().chain(&LONG).any(|beginning| case.starts_with(beginning))
        };
        let limit = if cases.iter().any(is_long) { shards::LONG_LIMIT } else { shards::LIMIT };
        shards::run(&prepared, &program, &shards::plan(&cases, most), limit, called.as_mut())
    });
    if let Some(called) = called {
        parts.act("the monitor's calls", || calls::compare(&prepared.monitor(), &called).into());
    }
}

/// Builds everything that the cases need, and their program.
fn build_for(selection: &Selection) -> Result<Built> {
    let mut prepared = Prepared::new(Profile::Fast)?;
    let program = cases()?;
    let known = shards::cases(&program)?;
    let is_known = |beginning: &&&str| known.iter().any(|case| case.starts_with(**beginning));
    if let Some(gone) = selection.without.iter().find(|beginning| !is_known(beginning)) {
        bail!("no case is named like {gone}, which is to be left out");
    }
    let cases = shards::chosen(&known, &selection.filters, &selection.without);
    let without_kvm = prepared.host != Host::Hardware
        && shards::chosen(&known, &selection.filters, &[]).iter().any(|case| case.starts_with(RING0));
    if cases.is_empty() && !without_kvm {
        bail!("no case is named like {:?}", selection.filters);
    }
    let has = |modules: &str| cases.iter().any(|case| case.starts_with(modules));
    if has(DEBIAN) || has(DOCKER_SERVICES) {
        prepared.set("RVM_TEST_DEBIAN_IMAGE", build::debian_image()?);
    }
    if has(DOCKER) {
        prepared.set(docker::DIR_ENV, docker::stage(&selection.docker)?);
    }
    prepared.set("RUST_BACKTRACE", "0");
    prepared.cgroups = selection.cgroups;
    prepared.apparmor = selection.apparmor;
    prepared.cpus = selection.cpus;
    if selection.apparmor {
        packages::ensure(&[Purpose::AppArmor])?;
    }
    prepared.set(parity::PROBE_ENV, build::probe()?);
    if has(HOSTILE) || has(GUEST_FAULTS) {
        // The names are those of tests/src/machine.rs.
        let (program, initramfs) = build::hostile()?;
        prepared.set("RVM_TEST_HOSTILE", program);
        prepared.set("RVM_TEST_HOSTILE_INITRAMFS", initramfs);
    }
    if let Some(release) = &selection.containerd {
        prepared.set_containerd(release)?;
    }
    Ok(Built { prepared, program, cases, without_kvm })
}

/// What has been run so far.
#[derive(Default)]
struct Parts(Vec<Part>);

impl Parts {
    /// Runs one part.
    fn act(&mut self, name: &str, act: impl FnOnce() -> Outcome) {
        println!("\n=== {name}");
        let started = Instant::now();
        let outcome = act();
        if let Some(error) = &outcome.error {
            println!("{error:#}");
        }
        self.0.push(Part { name: name.to_owned(), took: started.elapsed(), outcome });
    }

    /// Runs a part that has several, at the same time, which have said why they failed.
    fn several(&mut self, name: &str, act: impl FnOnce() -> Result<Vec<Outcome>>) {
        println!("\n=== {name}");
        let started = Instant::now();
        let outcomes = act().unwrap_or_else(|error| {
            println!("{error:#}");
            vec![Err(error).into()]
        });
        let took = started.elapsed();
        let count = outcomes.len();
        for (number, outcome) in outcomes.into_iter().enumerate() {
            let shard = if count > 1 { format!(", shard {}", number + 1) } else { String::new() };
            let took = if number == 0 { took } else { Duration::ZERO };
            self.0.push(Part { name: format!("{name}{shard}"), took, outcome });
        }
    }

    /// The summary: each part, the cases that failed, and last the sums. Ends this process when
    /// something failed.
    fn end(&self) -> Result<()> {
        println!("\n=== summary");
        for Part { name, took, outcome } in &self.0 {
            let (word, text) = match outcome.error {
                None => ("ok    ", outcome.note.as_str()),
                Some(_) if outcome.note.is_empty() => ("FAILED", "see above"),
                Some(_) => ("FAILED", outcome.note.as_str()),
            };
            println!("{word} {:>7.1} s  {name:<44} {text}", took.as_secs_f64());
        }
        let total: Duration = self.0.iter().map(|part| part.took).sum();
        println!("       {:>7.1} s\n", total.as_secs_f64());
        let all = self.tally();
        if !all.failures.is_empty() {
            println!("failed:\n    {}\n", all.failures.join("\n    "));
        }
        if let Some(comparison) = all.comparison() {
            println!("runc beside rvm: {comparison}\n");
        }
        println!("{}", all.text());
        if all.failed > 0 {
            std::process::exit(1);
        }
        Ok(())
    }

    /// All cases. A part that failed though none of its cases did is a failure by itself.
    fn tally(&self) -> Tally {
        let mut all = Tally::default();
        for Part { name, outcome, .. } in &self.0 {
            let mut tally = outcome.tally.clone();
            if let Some(error) = &outcome.error
                && tally.failed == 0
            {
                tally.failed = 1;
                let reason = format!("{error:#}");
                tally.failures.push(reason.lines().next().unwrap_or_default().to_owned());
            }
            for failure in &mut tally.failures {
                *failure = format!("{name}: {failure}");
            }
            all.add(&tally);
        }
        all
    }
}

/// One case after another (they share one containerd), each with what it saw.
fn libtest_arguments() -> Vec<String> {
    vec!["--test-threads=1".to_owned(), "--nocapture".to_owned()]
}

/// Runs libtest programs, passing their lines on; the outcome is the sum of
/// their results, and at least one case must have run.
fn libtest(run: impl FnOnce(Output<'_>) -> Result<i32>) -> Outcome {
    let mut reader = Reader::new();
    let ran = run(Output::Lines(&mut |line| {
        println!("{line}");
        reader.line(line);
    }));
    let (tally, _) = reader.finish(&[]);
    let error = match ran {
        Ok(0) if tally.passed > 0 => None,
        Ok(0) => Some(anyhow!("no test ran")),
        Ok(code) => Some(anyhow!("exit code {code}: {}", tally.text())),
        Err(error) => Some(error),
    };
    Outcome { note: tally.text(), tally, error }
}

/// The tests of every crate, also after one has failed.
fn unit_tests() -> Outcome {
    let mut command = cargo_command(&["test", "--workspace", "--quiet", "--no-fail-fast"]);
    command.env("RUST_BACKTRACE", "0");
    libtest(|output| {
        let Output::Lines(callback) = output else { bail!("lines are expected") };
        Ok(e2e::lines(command, callback)?.code().unwrap_or(1))
    })
}

/// Lints these targets of the workspace: of one package the libraries would have other features, and be compiled anew.
fn clippy(targets: &[&str]) -> Result<String> {
    // What tests and benchmarks run.
    let features = "rvm-shim/faults,rvm-agent/faults,rvm-vmm/record";
    let before = ["clippy", "--workspace", "--features", features, "--quiet"];
    cargo(&[&before, targets, &["--", "-D", "warnings"]].concat())
}

/// Runs cargo in the checkout, passing its output on.
fn cargo(arguments: &[&str]) -> Result<String> {
    let status = cargo_command(arguments).status().context("run cargo")?;
    if !status.success() {
        bail!("cargo {} failed ({status})", arguments[0]);
    }
    Ok(String::new())
}

fn cargo_command(arguments: &[&str]) -> Command {
    let mut command = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    command.args(arguments).current_dir(build::workspace_dir());
    command
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
    // With the features that unit tests are built with.
    let output = cargo_command(&["test", "--quiet", "--no-run", "--workspace", "--test", "e2e"])
        .args(["--message-format", "json-render-diagnostics"])
        .output()
        .context("run cargo")?;
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
    fn a_part_without_cases_that_fails_is_a_failure() {
        let mut parts = Parts::default();
        parts.act("formatting", || Err(anyhow!("not formatted\nat all")).into());
        parts.several("end to end", || {
            let tally = |passed, failures: &[&str]| Tally {
                passed,
                failed: failures.len() as u64,
                failures: failures.iter().map(|&name| name.to_owned()).collect(),
                ..Tally::default()
            };
            let outcome = |tally: Tally, error| Outcome { note: tally.text(), tally, error };
            Ok(vec![
                outcome(tally(5, &[]), None),
                outcome(tally(3, &["a::b"]), Some(anyhow!("exit code 101"))),
            ])
        });
        let all = parts.tally();
        assert_eq!(all.text(), "8 passed, 2 failed");
        assert_eq!(all.failures, ["formatting: not formatted", "end to end, shard 2: a::b"]);
    }
}
