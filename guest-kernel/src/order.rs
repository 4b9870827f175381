//! In which order functions lie in the image: those of a start first (`config/function-order.txt`).
//!
//! The list is made by `cargo xtask kernel --order`, of what an emulated processor was seen to execute
//! ([`of_trace`]). It need not be exact: a function that is missing lies where it would have without it.

use std::collections::{BTreeMap, HashSet};
use std::fmt::Write;
use std::io::{self, BufRead};

use crate::Flavour;

/// What has the compiler give each function a section of its own, named after it.
pub const COMPILER_FLAG: &str = "-ffunction-sections";

/// What the patch `functions-in-order-of-a-start` has the linker include.
pub const SCRIPT_NAME: &str = "function-order.lds";

const FUNCTIONS: &str = include_str!("../config/function-order.txt");

/// Fewer bytes of instructions in a row may be those of the machine around the guest at the same address.
const LEAST_BYTES: usize = 12;

/// Names of functions, one a line, in the order in which a start of the flavour comes to them. One that this kernel does
/// not have is passed over, and one that is not named lies behind all that are. The baseline of benchmarks has none.
pub fn of(flavour: Flavour) -> Option<&'static str> {
    match flavour {
        Flavour::Rvm | Flavour::Full | Flavour::Peer => Some(FUNCTIONS),
        Flavour::Trial => None,
    }
}

/// The part of a linker script that takes the sections of `functions` in this order.
pub fn script(functions: &str) -> String {
    functions.lines().fold(String::new(), |mut script, name| {
        let _ = writeln!(script, "*(.text.{name})");
        script
    })
}

/// The functions of a kernel in the order in which they are first executed.
///
/// `trace` is QEMU's log of blocks that it translated (`-d in_asm`) in a machine in which `image`, a `vmlinux`, ran as
/// a guest; what it has of the machine's own kernel at the same addresses is told by its bytes. `symbols` is the
/// guest's `/proc/kallsyms`.
pub fn of_trace(trace: impl BufRead, image: &[u8], symbols: &str) -> io::Result<Vec<String>> {
    let names = text_symbols(symbols);
    let mut order = Vec::new();
    let mut seen = HashSet::new();
    let mut executed = |block: &Block| {
        let Some(start) = block.start.filter(|_| block.bytes.len() >= LEAST_BYTES) else { return };
        if bytes_at(image, start, block.bytes.len()) != Some(&block.bytes) {
            return;
        }
        if let Some((address, names)) = names.range(..=start).next_back()
            && seen.insert(*address)
        {
            order.extend(names.iter().map(|name| (*name).to_owned()));
        }
    };
    let mut block = Block::default();
    for line in trace.lines() {
        let line = line?;
        match line.strip_prefix("0x") {
            Some(instruction) => block.add(instruction),
            None => executed(&std::mem::take(&mut block)),
        }
    }
    executed(&block);
    let mut named = HashSet::new();
    order.retain(|name| named.insert(name.clone()));
    Ok(order)
}

/// Instructions in a row, as QEMU's log has them.
#[derive(Default)]
struct Block {
    start: Option<u64>,
    bytes: Vec<u8>,
}

impl Block {
    /// Takes a line `ADDRESS:  BYTE BYTE ...   MNEMONIC` without its `0x`, or one with the rest of a long instruction's bytes.
    fn add(&mut self, line: &str) {
        let Some((address, rest)) = line.split_once(':') else { return };
        let Ok(address) = u64::from_str_radix(address, 16) else { return };
        self.start.get_or_insert(address);
        let is_byte = |word: &&str| word.len() == 2;
        let bytes = rest.split_whitespace().take_while(is_byte);
        self.bytes.extend(bytes.map_while(|byte| u8::from_str_radix(byte, 16).ok()));
    }
}

/// Names by address, of everything that is text.
fn text_symbols(symbols: &str) -> BTreeMap<u64, Vec<&str>> {
    let mut names = BTreeMap::<_, Vec<_>>::new();
    for line in symbols.lines() {
        let mut words = line.split_whitespace();
        let (Some(address), Some("t" | "T"), Some(name)) = (words.next(), words.next(), words.next()) else {
            continue;
        };
        if let Ok(address) = u64::from_str_radix(address, 16) {
            names.entry(address).or_default().push(name);
        }
    }
    names
}

/// What an ELF file of a 64-bit little-endian machine has at a virtual address.
fn bytes_at(image: &[u8], address: u64, len: usize) -> Option<&[u8]> {
    const PROGRAM_HEADER: usize = 56;
    let number = |at: usize, len: usize| {
        let bytes = image.get(at..at.checked_add(len)?)?;
        Some(bytes.iter().rev().fold(0u64, |number, byte| number << 8 | u64::from(*byte)))
    };
    let (headers, count) = (number(32, 8)? as usize, number(56, 2)? as usize);
    (0..count).find_map(|n| {
        let header = headers + n * PROGRAM_HEADER;
        let (offset, start, size) =
            (number(header + 8, 8)?, number(header + 16, 8)?, number(header + 32, 8)?);
        let within = address.checked_sub(start).filter(|within| *within < size)?;
        let at = (offset + within) as usize;
        image.get(at..at.checked_add(len)?)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_line_is_a_name_and_no_other_twice() {
        let mut seen = HashSet::new();
        for name in FUNCTIONS.lines() {
            let is_name = |b: u8| b.is_ascii_alphanumeric() || b == b'_' || b == b'.';
            assert!(!name.is_empty() && name.bytes().all(is_name), "{name:?}");
            assert!(seen.insert(name), "{name} is there twice");
        }
        assert!(seen.contains("do_idle"), "these are not a start's");
        assert_eq!(script(FUNCTIONS).lines().count(), seen.len());
    }

    #[test]
    fn functions_are_those_that_a_trace_comes_to() {
        // One segment of 64 bytes, from 0xffffffff81000000.
        let mut image = vec![0; 0x1000];
        image[32..40].copy_from_slice(&64u64.to_le_bytes());
        image[56..58].copy_from_slice(&1u16.to_le_bytes());
        for (at, value) in [(72, 0x1000u64), (80, 0xffff_ffff_8100_0000), (96, 64)] {
            image[at..at + 8].copy_from_slice(&value.to_le_bytes());
        }
        image.extend((0..64).collect::<Vec<u8>>());
        let line = |at: u8, bytes: std::ops::Range<u8>| {
            let bytes = bytes.fold(String::new(), |text, byte| format!("{text}{byte:02x} "));
            format!("0xffffffff810000{at:02x}:  {bytes}              addq     %rdi, %rax\n")
        };
        let trace = [
            "----------------\nIN: \n".to_owned(),
            line(32, 32..40),
            line(40, 40..48),
            "\n----------------\nIN: \n".to_owned(),
            // Too few, then another kernel's.
            line(0, 0..8),
            "\n----------------\nIN: \n".to_owned(),
            line(16, 17..33),
            "\n----------------\nIN: \n".to_owned(),
            line(4, 4..12),
            line(12, 12..16),
            "IN: \n".to_owned(),
            line(36, 36..40),
            line(40, 40..48),
        ];
        let symbols = "ffffffff81000000 T first\nffffffff81000010 t second\nffffffff81000020 T third\n\
                       ffffffff81000020 T also_third\nffffffff81000028 d data\n";
        let order = of_trace(trace.concat().as_bytes(), &image, symbols).unwrap();
        assert_eq!(order, ["third", "also_third", "first"]);
    }
}
