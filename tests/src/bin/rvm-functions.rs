//! The part of `cargo xtask kernel --order` that runs where KVM is: a container is started as most are, and the
//! addresses of its kernel's functions are printed.

use std::process::ExitCode;

use anyhow::Result;
use rvm_tests::{job::Input, scale, stage::Stage, world::World};

fn main() -> ExitCode {
    match functions() {
        Ok(symbols) => {
            println!("{symbols}");
            ExitCode::SUCCESS
        }
        Err(error) => {
            eprintln!("rvm-functions: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn functions() -> Result<String> {
    let world = World::new(Stage::from_env()?)?;
    let ctr = world.ctr();
    // Others are not shown addresses.
    let run = ctr.container("functions").with(&["--privileged"]).detached();
    run.run(&["sleep", "1000"])?.success()?;
    let symbols = ctr.exec(&run.id, &[], &["cat", "/proc/kallsyms"], Input::Nothing)?;
    let symbols = symbols.finish(scale::container())?.success()?.text();
    ctr.remove(&run.id)?;
    Ok(symbols)
}
