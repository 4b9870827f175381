//! From rules to a program: a search tree over the system calls' numbers for
//! each architecture, and a chain of comparisons where a rule looks at arguments.

use std::collections::BTreeMap;

use super::{
    ENOSYS, KILL_THREAD, SeccompError,
    assembler::{ALU_AND_K, Assembler, Instruction, JEQ_K, JGE_K, JGT_K, LD_W_ABS, Label},
    profile::{Arch, Comparison, Condition, Profile},
};

// Offsets in struct seccomp_data (linux/seccomp.h).
const NUMBER: u32 = 0;
const ARCHITECTURE: u32 = 4;
const ARGUMENTS: u32 = 16;

// linux/audit.h
pub(super) const AUDIT_ARCH_X86_64: u32 = 0xc000_003e;
pub(super) const AUDIT_ARCH_I386: u32 = 0x4000_0003;

/// Tells x32's numbers from x86-64's (__X32_SYSCALL_BIT).
pub(super) const X32_BIT: u32 = 1 << 30;
/// The number of a call that a tracer has cancelled.
const NO_CALL: u32 = u32::MAX;

/// What happens for the numbers from `first` to the next range's.
struct Range<'a> {
    first: u32,
    outcome: Outcome<'a>,
}

#[derive(Clone, Copy)]
enum Outcome<'a> {
    Return(u32),
    Ask(Arch, &'a [Clause]),
}

/// A rule as it applies to one system call; no conditions: always.
#[derive(Debug)]
pub(super) struct Clause {
    pub(super) conditions: Vec<Condition>,
    pub(super) value: u32,
}

/// What a profile says about each system call of one architecture, by number.
pub(super) type Calls = BTreeMap<u32, Vec<Clause>>;

/// Compiles a profile.
pub(super) fn compile(profile: &Profile) -> Result<Vec<Instruction>, SeccompError> {
    let calls = |arch: Arch| profile.has(arch).then(|| profile.calls(arch));
    let (x86_64, x86, x32) = (profile.calls(Arch::X86_64), calls(Arch::X86), calls(Arch::X32));

    let mut out = Assembler::default();
    let other = out.ret(KILL_THREAD);
    let after_x86_64 = match &x86 {
        None => other,
        Some(calls) => {
            let x86 = section(&mut out, profile, x86_ranges(profile, calls));
            out.branch(JEQ_K, AUDIT_ARCH_I386, x86, other)
        }
    };
    let x86_64 = section(&mut out, profile, x86_64_ranges(profile, &x86_64, x32.as_ref()));
    out.branch(JEQ_K, AUDIT_ARCH_X86_64, x86_64, after_x86_64);
    out.statement(LD_W_ABS, ARCHITECTURE);
    out.finish()
}

fn section(out: &mut Assembler, profile: &Profile, ranges: Vec<Range<'_>>) -> Label {
    let tree = tree(out, profile, &ranges);
    out.go_to(tree);
    out.statement(LD_W_ABS, NUMBER)
}

fn x86_ranges<'a>(profile: &Profile, calls: &'a Calls) -> Vec<Range<'a>> {
    let mut ranges = Vec::new();
    segment(&mut ranges, profile, Arch::X86, 0, Some(calls), profile.last(Arch::X86));
    ranges
}

/// Bit 30 of the number tells x32 from x86-64.
fn x86_64_ranges<'a>(profile: &Profile, native: &'a Calls, x32: Option<&'a Calls>) -> Vec<Range<'a>> {
    let mut ranges = Vec::new();
    let last = profile.last(Arch::X86_64);
    let last_x32 = x32.and_then(|_| profile.last(Arch::X32));
    segment(&mut ranges, profile, Arch::X86_64, 0, Some(native), last);
    match x32 {
        Some(calls) => segment(&mut ranges, profile, Arch::X32, X32_BIT, Some(calls), last_x32),
        None => push(&mut ranges, X32_BIT, Outcome::Return(KILL_THREAD)),
    }
    // No kernel has calls up here.
    let rest = |known: bool, last: Option<u32>| match (known, last) {
        (_, Some(_)) => ENOSYS,
        (true, None) => profile.default,
        (false, None) => KILL_THREAD,
    };
    push(&mut ranges, 1 << 31, Outcome::Return(rest(x32.is_some(), last)));
    push(&mut ranges, 1 << 31 | X32_BIT, Outcome::Return(rest(x32.is_some(), last_x32)));
    if x32.is_none() {
        push(&mut ranges, NO_CALL, Outcome::Return(profile.default));
    }
    ranges
}

/// The calls from `first` on, the profile's default between them, and ENOSYS
/// after the last one the profile knows.
fn segment<'a>(
    ranges: &mut Vec<Range<'a>>,
    profile: &Profile,
    arch: Arch,
    first: u32,
    calls: Option<&'a Calls>,
    last: Option<u32>,
) {
    let mut next = first;
    for (&number, clauses) in calls.into_iter().flatten() {
        let number = number | first;
        if number > next {
            push(ranges, next, Outcome::Return(profile.default));
        }
        let outcome = match &clauses[..] {
            [Clause { conditions, value }, ..] if conditions.is_empty() => Outcome::Return(*value),
            clauses => Outcome::Ask(arch, clauses),
        };
        push(ranges, number, outcome);
        next = number + 1;
    }
    match last {
        None => push(ranges, next, Outcome::Return(profile.default)),
        Some(last) => {
            // The last one may be one of those that need no rule.
            if next <= last | first {
                push(ranges, next, Outcome::Return(profile.default));
            }
            push(ranges, (last | first) + 1, Outcome::Return(ENOSYS));
        }
    }
}

/// Adds a range, or lengthens the one before it.
fn push<'a>(ranges: &mut Vec<Range<'a>>, first: u32, outcome: Outcome<'a>) {
    if let (Some(Range { outcome: Outcome::Return(before), .. }), Outcome::Return(value)) =
        (ranges.last(), outcome)
        && *before == value
    {
        return;
    }
    ranges.push(Range { first, outcome });
}

/// Finds the range of the number in the accumulator.
fn tree(out: &mut Assembler, profile: &Profile, ranges: &[Range<'_>]) -> Label {
    match ranges {
        [] => out.ret(profile.default),
        [Range { outcome: Outcome::Return(value), .. }] => out.ret(*value),
        [Range { outcome: Outcome::Ask(arch, clauses), .. }] => chain(out, profile, *arch, clauses),
        ranges => {
            let (low, high) = ranges.split_at(ranges.len() / 2);
            let from = high[0].first;
            let high = tree(out, profile, high);
            let low = tree(out, profile, low);
            out.branch(JGE_K, from, high, low)
        }
    }
}

/// The first clause whose conditions hold decides, the default where none does.
fn chain(out: &mut Assembler, profile: &Profile, arch: Arch, clauses: &[Clause]) -> Label {
    let mut next = out.ret(profile.default);
    for clause in clauses.iter().rev() {
        let mut holds = out.ret(clause.value);
        for condition in clause.conditions.iter().rev() {
            holds = compare(out, arch, condition, holds, next);
        }
        next = holds;
    }
    next
}

/// Goes to `yes` where the condition holds, else to `no`. Arguments have 64
/// bits, of which the 32-bit ABIs use the lower half.
fn compare(out: &mut Assembler, arch: Arch, condition: &Condition, yes: Label, no: Label) -> Label {
    let Condition { argument, comparison } = *condition;
    let low = ARGUMENTS + 8 * argument;
    let halves = |value: u64| ((value >> 32) as u32, value as u32);
    match comparison {
        Comparison::NotEqual(value) => {
            let equal = Condition { argument, comparison: Comparison::MaskedEqual(u64::MAX, value) };
            compare(out, arch, &equal, no, yes)
        }
        Comparison::Less(value) => {
            let not = Condition { argument, comparison: Comparison::GreaterOrEqual(value) };
            compare(out, arch, &not, no, yes)
        }
        Comparison::LessOrEqual(value) => {
            let not = Condition { argument, comparison: Comparison::Greater(value) };
            compare(out, arch, &not, no, yes)
        }
        Comparison::MaskedEqual(mask, value) => {
            let ((mask_high, mask_low), (value_high, value_low)) = (halves(mask), halves(value));
            let label = equal(out, low, mask_low, value_low, yes, no);
            if arch.is_64_bit() && (mask_high, value_high) != (0, 0) {
                return equal(out, low + 4, mask_high, value_high, label, no);
            }
            label
        }
        Comparison::Greater(value) | Comparison::GreaterOrEqual(value) => {
            let (value_high, value_low) = halves(value);
            let code = if matches!(comparison, Comparison::Greater(_)) { JGT_K } else { JGE_K };
            out.branch(code, value_low, yes, no);
            let label = out.statement(LD_W_ABS, low);
            if !arch.is_64_bit() {
                return label;
            }
            let equal = out.branch(JEQ_K, value_high, label, no);
            out.branch(JGT_K, value_high, yes, equal);
            out.statement(LD_W_ABS, low + 4)
        }
    }
}

/// Compares one half of an argument.
fn equal(out: &mut Assembler, offset: u32, mask: u32, value: u32, yes: Label, no: Label) -> Label {
    out.branch(JEQ_K, value, yes, no);
    if mask != u32::MAX {
        out.statement(ALU_AND_K, mask);
    }
    out.statement(LD_W_ABS, offset)
}
