//! The part of `cargo xtask parity` that runs where KVM is: every bundle under
//! runc and under rvm, and what differs.

use std::process::ExitCode;

use anyhow::Result;
use rvm_tests::{parity, stage::Stage, world::World};

fn main() -> ExitCode {
    match compare() {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("parity: {error:#}");
            ExitCode::from(2)
        }
    }
}

/// Whether nothing is wrong.
fn compare() -> Result<bool> {
    let world = World::new(Stage::from_env()?)?;
    let report = parity::run(&world);
    if report.is_err() {
        eprintln!("containerd's log ends with:\n{}", world.log_tail(0, 20));
    }
    for killed in world.sweep() {
        eprintln!("parity: left behind: {killed}");
    }
    let report = report?;
    println!("{report}");
    let wrong = parity::wrong(&report);
    for wrong in &wrong {
        println!("wrong: {wrong}");
    }
    Ok(wrong.is_empty())
}
