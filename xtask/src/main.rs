//! `cargo xtask`: everything a developer or CI does with this tree.

mod bench;
mod build;
mod demo;
mod devhost;
mod docker;
mod e2e;
mod fstest;
mod fuzz;
mod host;
mod install;
mod kernel;
mod packages;
mod parity;
mod progress;
mod test;

use std::process::ExitCode;

use clap::{Parser, Subcommand};

#[derive(Parser)]
#[command(name = "cargo xtask", about = "Build, try, test, measure and install rvm")]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Build everything and run containers in microVMs through containerd.
    Demo(demo::Args),
    /// Formatting, lints, unit tests, then the end-to-end tests.
    Test(test::Args),
    /// The same bundles under runc and under rvm: what containers see differently.
    Parity(parity::Args),
    /// Run a command on a software-emulated machine that has KVM.
    Devhost(devhost::Args),
    /// Measure, side by side with peers.
    Bench(bench::Args),
    /// pjdfstest and fsx inside a container, under runc and under rvm.
    Fstest(fstest::Args),
    /// Send the monitor, the shim and the agent what a guest, a client or an image may send, at random.
    Fuzz(fuzz::Args),
    /// What is to hold when a guest, a monitor or an image attacks, or something dies, by itself.
    Walls(test::WallsArgs),
    /// Build the guest kernel and print where it is.
    Kernel(kernel::Args),
    /// Put binaries, kernel, initramfs and configuration in place.
    Install(install::Args),
}

fn main() -> ExitCode {
    let outcome = match Cli::parse().command {
        Command::Demo(args) => demo::run(args),
        Command::Test(args) => test::run(args),
        Command::Parity(args) => parity::run(args),
        Command::Devhost(args) => devhost::run(args),
        Command::Bench(args) => bench::run(args),
        Command::Fstest(args) => fstest::run(args),
        Command::Walls(args) => test::walls(&args),
        Command::Fuzz(args) => fuzz::run(args),
        Command::Kernel(args) => kernel::run(args),
        Command::Install(args) => install::run(args),
    };
    if let Err(error) = outcome {
        // What went wrong in xtask's own words; where in xtask is nobody's question.
        eprintln!("error: {error:#}");
        return ExitCode::FAILURE;
    }
    ExitCode::SUCCESS
}
