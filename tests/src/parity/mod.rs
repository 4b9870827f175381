//! The same bundles under runc and under rvm, what a program in them sees
//! compared line by line.
//!
//! * [`place`]: one bundle under one runtime: its files, its specification, its run.
//! * [`bundles`]: the bundles.
//! * [`network`]: the one of a prepared network namespace.
//! * [`compare`]: lines side by side, and what of them is wrong.
//! * [`intended`]: the differences `docs/specification.md` gives reasons for.
//!
//! What is compared is printed by `tests/probe`.

pub mod bundles;
pub mod compare;
pub mod intended;
pub mod network;
pub mod place;

use std::{path::PathBuf, time::Instant};

use anyhow::{Context, Result, ensure};

use crate::{host, stage, world::World};
use bundles::Bundle;
use compare::{Lines, Report};
use place::Place;

/// The probe, linked statically.
pub const PROBE_ENV: &str = "RVM_TEST_PROBE";
/// Only bundles whose names contain one of these words, separated by spaces.
pub const ONLY_ENV: &str = "RVM_PARITY_ONLY";

/// The kernel of the host that the table of intended differences is written for: what a container
/// has under runc is the host's. On another one, rows may have nothing to excuse.
const TABLES_KERNEL: &str = "6.1.";

/// runc's runtime name.
const RUNC: &str = "io.containerd.runc.v2";

/// The program that looks at a container from inside.
///
/// # Errors
/// When [`PROBE_ENV`] names none.
pub fn probe() -> Result<PathBuf> {
    let probe: PathBuf = std::env::var_os(PROBE_ENV)
        .map(PathBuf::from)
        .with_context(|| format!("{PROBE_ENV} is not set; `cargo xtask parity` and `test` set it"))?;
    ensure!(probe.is_file(), "{PROBE_ENV}: {} is not a file", probe.display());
    Ok(probe)
}

/// What `ctr run --mount` takes to have it at `place` in a container.
///
/// # Errors
/// As [`probe`] has.
pub fn probe_at(place: &str) -> Result<String> {
    Ok(format!("type=bind,src={},dst={place},options=rbind:ro", probe()?.display()))
}

/// Runs every bundle under both runtimes and compares.
///
/// # Errors
/// When something beside the containers fails.
pub fn run(world: &World) -> Result<Report> {
    let probe = probe()?;
    let only = std::env::var(ONLY_ENV).unwrap_or_default();
    let only: Vec<&str> = only.split_whitespace().collect();
    let mut report = Report::new(intended::table()?);
    for bundle in bundles::ALL {
        if !only.is_empty() && !only.iter().any(|word| bundle.name.contains(word)) {
            continue;
        }
        let started = Instant::now();
        let runc = lines(world, bundle, RUNC, &probe)?;
        let after_runc = started.elapsed();
        let rvm = lines(world, bundle, stage::RUNTIME, &probe)?;
        let known = report.wrong().len();
        report.compare(bundle.name, &runc, &rvm);
        // At once: a run may be ended before its report.
        for difference in &report.wrong()[known..] {
            eprintln!("wrong: {difference}");
        }
        eprintln!(
            "parity: {:<16} {:>4} lines under runc in {} ms, {:>4} under rvm in {} ms",
            bundle.name,
            runc.len(),
            after_runc.as_millis(),
            rvm.len(),
            (started.elapsed() - after_runc).as_millis()
        );
    }
    ensure!(report.checks() > 0, "no bundle is named like {only:?}");
    Ok(report)
}

/// What is wrong: differences nothing excuses, and, where every bundle was compared on the host
/// that the table is for, excuses nothing needs.
pub fn wrong(report: &Report) -> Vec<String> {
    let mut wrong: Vec<String> = report.wrong().iter().map(ToString::to_string).collect();
    let all = std::env::var(ONLY_ENV).unwrap_or_default().is_empty();
    let kernel = std::fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default();
    if all && kernel.starts_with(TABLES_KERNEL) {
        let unused = report.unused().into_iter();
        wrong.extend(
            unused.map(|key| format!("{key}: the table of intended differences has it, and nothing differs")),
        );
    }
    wrong
}

/// What the probe printed. A container that cannot be run is one line that says so.
fn lines(world: &World, bundle: &Bundle, runtime: &str, probe: &std::path::Path) -> Result<Lines> {
    let place = Place::new(world, bundle.name, runtime, probe)?;
    let result = (bundle.run)(&place);
    if result.is_err() {
        // Its container may still be there, and the next one has its name.
        world.sweep();
    }
    place.remove()?;
    if runtime == RUNC {
        host::remove_runcs_parent();
    }
    Ok(match result {
        Ok(text) => compare::parse(&text),
        Err(error) => Lines::from([("run".to_owned(), format!("{error:#}"))]),
    })
}
