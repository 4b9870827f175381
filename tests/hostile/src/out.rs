//! What is said to the test.

use std::fs::{File, OpenOptions};
use std::io::Write;
use std::sync::OnceLock;

use nix::sys::stat::{Mode, SFlag, makedev, mknod};

use crate::Result;

/// The kernel's log, where this is `/init`: it is written to the console character
/// by character, whatever the console's own interrupt has come to.
static LOG: OnceLock<File> = OnceLock::new();

/// Has everything said in the kernel's log, as its most urgent lines.
pub fn to_kernel_log() -> Result<()> {
    const NODE: &str = "/kmsg";
    std::fs::write("/proc/sys/kernel/printk_devkmsg", "on\n")?;
    mknod(NODE, SFlag::S_IFCHR, Mode::S_IWUSR, makedev(1, 11))?;
    let log = OpenOptions::new().write(true).open(NODE)?;
    LOG.set(log).map_err(|_| "the log is open already")?;
    Ok(())
}

/// Says a line.
pub fn say(line: &str) {
    match LOG.get() {
        // Nobody else could be told.
        Some(mut log) => drop(log.write_all(format!("<0>{line}\n").as_bytes())),
        None => println!("{line}"),
    }
}
