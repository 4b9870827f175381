//! A guest that attacks its monitor.
//!
//! As `/init` of a machine of its own, whose command line says `attack=NAME`, or as
//! a process of a privileged container: `rvm-hostile NAME [ARGUMENT]...`. It takes
//! the machine's virtio devices from their drivers and drives them itself, through
//! their BARs and with rings in memory whose physical addresses it knows.
//!
//! What it prints is for the test: `attacking` once it is at work, `round N` while
//! an attack without an end goes on, `finished` after one with an end.

mod attacks;
mod fuse;
mod memory;
mod out;
mod pci;
mod virtio;

use std::error::Error;

use nix::mount::{MsFlags, mount};

/// What went wrong with the attack itself.
type Result<T> = std::result::Result<T, Box<dyn Error>>;

fn main() -> Result<()> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    // A container's first process has the number of `/init`, too.
    if let Some((name, arguments)) = arguments.split_first() {
        return attacks::run(name, arguments);
    }
    for (kind, target) in [("proc", "/proc"), ("sysfs", "/sys")] {
        mount(Some(kind), target, Some(kind), MsFlags::empty(), None::<&str>)?;
    }
    out::to_kernel_log()?;
    // The kernel hands on what it does not know of its command line.
    let name = std::env::var("attack")?;
    if let Err(error) = attacks::run(&name, &[]) {
        out::say(&format!("failed: {error}"));
    }
    // Its end would be the machine's.
    loop {
        nix::unistd::pause();
    }
}
