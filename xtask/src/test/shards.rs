//! The end-to-end cases in several devhosts side by side, one processor of this
//! machine each.
//!
//! A module's cases stay together: some share what takes long to make. Those that try one
//! fault at every point, and the soaks, take so long that each is by itself. Which shard a module goes to
//! depends on the cases alone, so that two runs of one checkout are the same.

use std::collections::BTreeMap;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result};

use super::tally::{Ended, Reader};
use super::{Outcome, calls, libtest_arguments};
use crate::e2e::{Output, Place, Prepared};

/// Seconds that a case takes in the devhost, by module or its own name where it is by itself;
/// `cargo xtask test` prints what it saw. Wrong ones cost balance, nothing else.
const SECONDS: [(&str, f64); 47] = [
    ("clock", 20.0),
    ("dead_storage", 20.0),
    ("debian", 60.0),
    ("docker", 40.0),
    ("docker_network", 60.0),
    ("docker_session", 450.0),
    ("erofs_snapshotter", 28.0),
    ("exec", 22.0),
    ("exec_robust", 15.0),
    ("faults", 80.0),
    ("faults::every_answer_of_the_agent", 130.0),
    ("faults::every_long_stop", 550.0),
    ("faults::every_point_of_containerd", 1000.0),
    ("faults::every_point_of_the_monitor", 600.0),
    ("faults::every_point_of_the_shim", 570.0),
    ("faults::every_stop_of_containerd", 100.0),
    ("faults::every_stop_of_the_monitor", 220.0),
    ("faults::every_stop_of_the_shim", 210.0),
    ("hostile", 15.0),
    ("huge_pages", 65.0),
    ("images", 55.0),
    ("interfaces", 75.0),
    ("joined", 18.0),
    ("limits", 25.0),
    ("loopback", 9.0),
    ("network", 30.0),
    ("parity", 210.0),
    ("planted", 15.0),
    ("pod_streams", 35.0),
    ("pod_volumes", 50.0),
    ("pods", 42.0),
    ("rootfs", 30.0),
    ("rootless", 35.0),
    ("run", 12.0),
    ("sandbox_api", 10.0),
    ("scratch", 16.0),
    ("shortage", 14.0),
    ("size", 15.0),
    ("soak::a_pod_of_five_through_a_bad_day", 200.0),
    ("soak::a_thousand_sandboxes_or_an_hour_of_them", 3600.0),
    ("soak::added_processes_one_after_another", 200.0),
    ("soak::containers_one_after_another", 200.0),
    ("soak::five_hundred_come_and_go", 600.0),
    ("soak::networks_one_after_another", 600.0),
    ("soak::twenty_pods_at_once", 250.0),
    ("soak::twenty_sandboxes_of_one_image", 150.0),
    ("specifications", 20.0),
];
/// A case of any other module.
const OTHERWISE: f64 = 10.0;
/// Cases of which it is told how long each took.
const LONGEST: usize = 60;
/// What a shard has to have to do: a devhost boots in ten seconds.
const WORTH_A_DEVHOST: f64 = 60.0;
/// How long a shard may take: as long as the whole gate. Beside another full load on both processors it takes 50 minutes.
pub const LIMIT: Duration = Duration::from_secs(55 * 60);
/// How long one may take that has cases which take long by themselves: an hour's soak, a fault at each of many points.
pub const LONG_LIMIT: Duration = Duration::from_secs(5 * 60 * 60);

/// Cases for one devhost.
#[derive(Debug, PartialEq)]
pub struct Shard {
    /// Their names.
    pub cases: Vec<String>,
    /// Seconds they are taken to need.
    seconds: f64,
}

/// Spreads the cases over at most `most` shards, the longest module first, each to
/// the shard that has the least to do.
pub fn plan(cases: &[String], most: usize) -> Vec<Shard> {
    let mut modules: BTreeMap<&str, Vec<String>> = BTreeMap::new();
    for case in cases {
        modules.entry(together(case)).or_default().push(case.clone());
    }
    let mut modules: Vec<(f64, Vec<String>)> = modules
        .into_iter()
        .map(|(name, cases)| {
            let seconds = SECONDS.iter().find(|(known, _)| *known == name).map_or(OTHERWISE, |known| known.1);
            (seconds * cases.len() as f64, cases)
        })
        .collect();
    // Modules of equal length stay in the order of their names.
    modules.sort_by(|a, b| b.0.total_cmp(&a.0));
    let total: f64 = modules.iter().map(|module| module.0).sum();
    let count = ((total / WORTH_A_DEVHOST) as usize).clamp(1, most.max(1));
    let mut shards: Vec<Shard> = (0..count).map(|_| Shard { cases: Vec::new(), seconds: 0.0 }).collect();
    for (seconds, cases) in modules {
        if let Some(least) = shards.iter_mut().min_by(|a, b| a.seconds.total_cmp(&b.seconds)) {
            least.seconds += seconds;
            least.cases.extend(cases);
        }
    }
    shards.retain(|shard| !shard.cases.is_empty());
    shards
}

/// What the cases have in common that stay together: their module, or a name.
fn together(case: &str) -> &str {
    match case.split_once("::") {
        Some((module, _)) if ![super::EVERY_FAULT, super::SOAK].iter().any(|long| case.starts_with(long)) => {
            module
        }
        _ => case,
    }
}

/// Runs each shard in a devhost of its own (the only one on this machine, where
/// it needs no devhost). A shard that does not end, or whose devhost dies, is its
/// own failure; the others' results stand. Lines begin with the shard's number.
///
/// What the monitor called meanwhile is added to `called`, where that is wanted.
pub fn run(
    prepared: &Prepared,
    program: &Path,
    shards: &[Shard],
    limit: Duration,
    mut called: Option<&mut calls::Seen>,
) -> Result<Vec<Outcome>> {
    let record = called.is_some();
    // One after another: they share what they fetch and build.
    let places: Vec<Place<'_>> = shards.iter().map(|_| prepared.place(Some(limit))).collect::<Result<_>>()?;
    let mut seen: Vec<Ended> = Vec::new();
    let outcomes = std::thread::scope(|scope| {
        let threads: Vec<_> = shards
            .iter()
            .zip(&places)
            .enumerate()
            .map(|(number, (shard, place))| {
                let prefix = if shards.len() > 1 { format!("[{}] ", number + 1) } else { String::new() };
                scope.spawn(move || one(place, program, shard, &prefix, record))
            })
            .collect();
        threads
            .into_iter()
            .map(|thread| {
                let (outcome, ended, calls) =
                    thread.join().map_err(|_| anyhow::anyhow!("a shard's thread panicked"))?;
                seen.extend(ended);
                if let Some(called) = &mut called {
                    called.extend(calls);
                }
                Ok(outcome)
            })
            .collect::<Result<Vec<_>>>()
    })?;
    println!("{}", seconds(&seen));
    println!("{}", longest(&mut seen));
    Ok(outcomes)
}

fn one(
    place: &Place<'_>,
    program: &Path,
    shard: &Shard,
    prefix: &str,
    record: bool,
) -> (Outcome, Vec<Ended>, calls::Seen) {
    let mut arguments = libtest_arguments();
    arguments.push("--exact".to_owned());
    arguments.extend(shard.cases.iter().cloned());
    let (program, arguments) =
        if record { calls::recorded(program, arguments) } else { (program, arguments) };
    let mut reader = Reader::new();
    let mut called = calls::Seen::new();
    let ran = place.run(
        program,
        &arguments,
        Output::Lines(&mut |line| {
            if calls::line(line, &mut called) {
                return;
            }
            println!("{prefix}{line}");
            reader.line(line);
        }),
    );
    let (tally, ended) = reader.finish(&shard.cases);
    let error = match ran {
        Ok(0) => None,
        Ok(code) => Some(anyhow::anyhow!("exit code {code}: {}", tally.text())),
        Err(error) => Some(error),
    };
    if let Some(error) = &error {
        for line in format!("{error:#}").lines() {
            println!("{prefix}{line}");
        }
    }
    (Outcome { note: tally.text(), tally, error }, ended, called)
}

/// What [`SECONDS`] should be.
fn seconds(seen: &[Ended]) -> String {
    let mut modules: BTreeMap<&str, (f64, u32)> = BTreeMap::new();
    for case in seen {
        let (total, count) = modules.entry(together(&case.name)).or_default();
        *total += case.took.as_secs_f64();
        *count += 1;
    }
    let modules: Vec<String> = modules
        .into_iter()
        .map(|(name, (total, count))| format!("{name} {:.0} ({count})", total / f64::from(count)))
        .collect();
    format!("seconds a case, by module (and cases): {}", modules.join(", "))
}

/// The cases that a cheaper gate begins with.
fn longest(seen: &mut [Ended]) -> String {
    seen.sort_by_key(|case| std::cmp::Reverse(case.took));
    let cases: Vec<String> = seen
        .iter()
        .take(LONGEST)
        .map(|case| format!("{} {:.0}", case.name, case.took.as_secs_f64()))
        .collect();
    format!("seconds of the longest: {}", cases.join(", "))
}

/// The names of all of the program's cases.
pub fn cases(program: &Path) -> Result<Vec<String>> {
    let output = std::process::Command::new(program)
        .args(["--list", "--format", "terse"])
        .output()
        .with_context(|| format!("run {}", program.display()))?;
    let text = String::from_utf8_lossy(&output.stdout);
    Ok(text.lines().filter_map(|line| line.strip_suffix(": test")).map(str::to_owned).collect())
}

/// Those of `cases` that one of `filters` names (all, where there are none) and that begin with none of `without`.
pub fn chosen(cases: &[String], filters: &[String], without: &[&str]) -> Vec<String> {
    let wanted = |name: &&String| filters.is_empty() || filters.iter().any(|filter| names(filter, name));
    let left_out = |name: &&String| without.iter().any(|beginning| name.starts_with(beginning));
    cases.iter().filter(|name| !left_out(name)).filter(wanted).cloned().collect()
}

/// Whether a filter names a case: one with a module does so from the module's beginning
/// (`network::` none of `docker_network::`), any other wherever it is in the name.
fn names(filter: &str, case: &str) -> bool {
    if filter.contains("::") { case.starts_with(filter) } else { case.contains(filter) }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn named(modules: &[(&str, usize)]) -> Vec<String> {
        let mut names = Vec::new();
        for (module, count) in modules {
            names.extend((0..*count).map(|n| format!("{module}::case_{n}")));
        }
        names
    }

    #[test]
    fn every_case_is_in_one_shard_and_modules_stay_together() {
        let cases =
            named(&[("death", 10), ("debian", 4), ("exec", 9), ("limits", 14), ("parity", 1), ("run", 16)]);
        let shards = plan(&cases, 2);
        let mut all: Vec<String> = shards.iter().flat_map(|shard| shard.cases.clone()).collect();
        all.sort();
        let mut sorted = cases.clone();
        sorted.sort();
        assert_eq!(all, sorted);
        let of =
            |name: &str| shards.iter().filter(|s| s.cases.iter().any(|case| together(case) == name)).count();
        assert!(["death", "debian", "exec", "limits", "parity", "run"].iter().all(|name| of(name) == 1));
        let times: Vec<f64> = shards.iter().map(|shard| shard.seconds).collect();
        assert!((times[0] - times[1]).abs() < 0.25 * times[0], "{times:?}");
        assert_eq!(plan(&cases, 2), shards);
    }

    #[test]
    fn long_cases_are_each_by_themselves() {
        let sizes = |cases: &[&str]| {
            let cases: Vec<String> = cases.iter().map(|&case| case.to_owned()).collect();
            plan(&cases, 2).iter().map(|shard| shard.cases.len()).collect::<Vec<_>>()
        };
        assert_eq!(
            sizes(&["faults::every_long_stop", "faults::every_point_of_the_shim", "faults::some_points"]),
            [1, 2]
        );
        assert_eq!(
            sizes(&[
                "soak::a_thousand_sandboxes_or_an_hour_of_them",
                "soak::five_hundred_come_and_go",
                "soak::twenty_pods_at_once"
            ]),
            [1, 2]
        );
    }

    #[test]
    fn modules_are_named_from_their_beginning() {
        assert!(names("network::", "network::kinds_of_interfaces") && names("work::", "work::a"));
        assert!(!names("network::", "docker_network::a_web_server") && !names("run::a", "rerun::a"));
        assert!(names("web", "docker_network::a_web_server"));
    }

    #[test]
    fn few_cases_are_one_shard() {
        assert_eq!(plan(&named(&[("exec", 2), ("run", 2)]), 2).len(), 1);
        assert!(plan(&[], 2).is_empty());
    }
}
