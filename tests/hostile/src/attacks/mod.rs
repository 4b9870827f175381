//! The attacks, each by its name.
//!
//! * [`lengths`]: messages to a share that say they are 4 GiB long, and are.
//! * [`resets`]: a device is reset while it works on requests that take long.
//! * [`refills`]: a ring that is never empty, of buffers nobody can use.
//! * [`chains`]: everything that is wrong with a descriptor chain or a ring.
//! * [`registers`]: registers written at random, and notifications without an end.
//! * [`oops`]: a device writes into the kernel, which runs that.
//! * [`skeleton`]: what a share has around a container's volumes.

mod chains;
mod lengths;
mod oops;
mod refills;
mod registers;
mod resets;
mod skeleton;

use std::time::{Duration, Instant};

use crate::Result;
use crate::out::say;

/// Runs the attack of this name.
pub fn run(name: &str, arguments: &[String]) -> Result<()> {
    match name {
        "lengths" => lengths::run(),
        "resets" => resets::run(),
        "refills" => refills::run(),
        "chains" => chains::run(),
        "registers" => registers::run(),
        "oops" => oops::run(),
        "skeleton" => skeleton::run(arguments),
        _ => Err(format!("no attack {name:?}").into()),
    }
}

/// Tells of an attack without an end.
struct Rounds {
    count: u64,
    told: Instant,
}

impl Rounds {
    fn start() -> Self {
        say("attacking");
        Self { count: 0, told: Instant::now() }
    }

    /// One more; said once a second, since each character is an exit.
    fn next(&mut self) {
        self.count += 1;
        if self.told.elapsed() > Duration::from_secs(1) {
            say(&format!("round {}", self.count));
            self.told = Instant::now();
        }
    }
}

/// Numbers that look like chance, the same in each run (xorshift64).
struct Chance(u64);

impl Chance {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }

    fn below(&mut self, end: u64) -> u64 {
        self.next() % end
    }
}
