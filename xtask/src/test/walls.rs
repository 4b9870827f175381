//! `cargo xtask walls`: what is to hold when something is taken over or dies, by itself.

use anyhow::Result;

use super::{Args, Parts, Selection, cargo_command, end_to_end, libtest};
use crate::{e2e, fuzz};

/// Arguments of `cargo xtask walls`.
#[derive(clap::Args)]
pub struct WallsArgs {
    /// Seconds of fuzzing for each target.
    #[arg(long, default_value_t = 20)]
    seconds: u64,
    /// Devhosts side by side.
    #[arg(long, value_name = "N", default_value_t = super::default_shards())]
    shards: usize,
}

/// Cases in which a guest attacks, and what its monitor could do with the host.
const ATTACKS: [&str; 3] = ["jail::", "hostile::", "volumes::device_nodes_are_the_guests_own"];

/// Cases in which something dies, is missing, is full or does not answer: those of the table in
/// `docs/specification.md`.
const FAULTS: [&str; 27] = [
    "death::",
    "faults::",
    "failures::",
    "dead_storage::",
    "clock::",
    "guest_faults::",
    "volumes_faults::",
    "exec_robust::outlives_its_caller",
    "exec_robust::a_start_that_is_not_answered_has_one_exit",
    "hooks::",
    "joined::a_crash_loop_leaves_nothing",
    "joined::limits_and_ends_are_each_container_s_own",
    "joined::containerd_is_restarted_in_between",
    "joined::monitor_killed_under_three",
    "joined::shim_killed_under_three",
    "joined::the_sandbox_s_container_goes_first",
    "joined::nothing_to_join",
    "limits::memory_that_runs_out",
    "limits::a_fork_bomb",
    "limits::a_machine_that_does_not_grow",
    "loopback::",
    "network::what_cannot_be_and_what_dies_leaves_nothing",
    "pods::",
    "sandbox_api::",
    "shortage::",
    "scratch::a_full_scratch_says_so_and_goes_on",
    "scratch::a_killed_sandbox_leaves_a_file_system_that_mounts_again",
];

/// Runs `cargo xtask walls`. Exits with 1 when one does not hold.
pub fn run(args: &WallsArgs) -> Result<()> {
    let mut parts = Parts::default();
    parts.act("escapes from the jail", || {
        let arguments = ["test", "--quiet", "--package", "rvm-vmm", "--lib", "jail::"];
        libtest(|output| {
            let e2e::Output::Lines(callback) = output else { anyhow::bail!("lines are expected") };
            Ok(e2e::lines(cargo_command(&arguments), callback)?.code().unwrap_or(1))
        })
    });
    let select = |name: &str, cases: &[&str]| Selection {
        name: name.to_owned(),
        filters: cases.iter().map(|&case| case.to_owned()).collect(),
        // What a gate leaves out for its length is among them.
        without: Vec::new(),
        ..Selection::of(&Args { shards: args.shards, cpus: e2e::CPUS, ..Args::default() })
    };
    end_to_end(&select("attacks", &ATTACKS), &mut parts);
    let attacks = parts.tally();
    let mut rounds = fuzz::Rounds::default();
    parts.act("fuzzing", || {
        let done = fuzz::rounds(&[], args.seconds).and_then(|done| {
            rounds = done;
            rounds.check()
        });
        done.map(|()| rounds.text()).into()
    });
    let before = parts.tally();
    end_to_end(&select("faults", &FAULTS), &mut parts);
    let all = parts.tally();
    let (passed, failed) = (all.passed - before.passed, all.failed - before.failed);
    println!(
        "\nescapes {} of {}, {}, faults {passed} of {}",
        attacks.failed,
        attacks.passed + attacks.failed,
        rounds.text(),
        passed + failed,
    );
    parts.end()
}
