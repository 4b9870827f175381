//! A profile as the specification writes it, checked, in the kernel's terms.

use oci_spec::runtime::{
    self as oci, Arch as OciArch, LinuxSeccompAction as Action, LinuxSeccompOperator as Operator,
};

use super::{
    NO_LISTENER, SeccompError,
    compile::{Calls, Clause},
    multiplexed, table,
};

/// Arguments a system call has.
const ARGUMENTS: usize = 6;

/// The ABIs of x86-64 kernels.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Arch {
    X86_64,
    X86,
    X32,
}

impl Arch {
    /// Whether the ABI's arguments have 64 bits.
    pub(super) fn is_64_bit(self) -> bool {
        self == Self::X86_64
    }
}

/// A condition on one argument, counted from 0.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Condition {
    pub(super) argument: u32,
    pub(super) comparison: Comparison,
}

/// How an argument is compared. Equality has a full mask.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Comparison {
    NotEqual(u64),
    Less(u64),
    LessOrEqual(u64),
    GreaterOrEqual(u64),
    Greater(u64),
    /// Mask and value.
    MaskedEqual(u64, u64),
}

/// A checked profile.
#[derive(Debug)]
pub(super) struct Profile {
    /// What the filter returns where no rule matches.
    pub(super) default: u32,
    /// Whether calls later than all the profile knows get ENOSYS.
    stub: bool,
    arches: Vec<Arch>,
    rules: Vec<Rule>,
}

/// One system call's rule.
#[derive(Debug)]
struct Rule {
    name: String,
    value: u32,
    conditions: Vec<Condition>,
}

impl Profile {
    /// Checks a profile.
    pub(super) fn new(profile: &oci::LinuxSeccomp) -> Result<Self, SeccompError> {
        let default =
            value("defaultAction", profile.default_action(), "defaultErrnoRet", profile.default_errno_ret())?;
        let mut arches = vec![Arch::X86_64];
        for arch in profile.architectures().iter().flatten() {
            let arch = match arch {
                OciArch::ScmpArchNative | OciArch::ScmpArchX86_64 => Arch::X86_64,
                OciArch::ScmpArchX86 => Arch::X86,
                OciArch::ScmpArchX32 => Arch::X32,
                // No call of theirs can be made here.
                _ => continue,
            };
            if !arches.contains(&arch) {
                arches.push(arch);
            }
        }
        let mut rules = Vec::new();
        for (n, syscall) in profile.syscalls().iter().flatten().enumerate() {
            add_rules(&format!("syscalls[{n}]"), syscall, &mut rules)?;
        }
        let stub = !matches!(
            profile.default_action(),
            Action::ScmpActAllow | Action::ScmpActLog | Action::ScmpActTrace
        );
        Ok(Self { default, stub, arches, rules })
    }

    /// Whether an ABI's calls are filtered by their rules; those of others end
    /// the caller.
    pub(super) fn has(&self, arch: Arch) -> bool {
        self.arches.contains(&arch)
    }

    /// The last call of an ABI that the profile names, where later ones get
    /// ENOSYS: a program built for a newer kernel then falls back, as it would
    /// on an older one, instead of failing with the default's error.
    pub(super) fn last(&self, arch: Arch) -> Option<u32> {
        if !self.stub {
            return None;
        }
        self.rules.iter().filter_map(|rule| number(&rule.name, arch)).max().filter(|last| *last != 0)
    }

    /// What the rules say about an ABI's calls. A rule without conditions
    /// overrules those with, whatever their order, and the first of several
    /// counts, as with libseccomp. Names the ABI does not have are left out.
    pub(super) fn calls(&self, arch: Arch) -> Calls {
        let mut calls = Calls::new();
        for rule in self.rules.iter().filter(|rule| rule.value != self.default) {
            if let Some(number) = number(&rule.name, arch) {
                add(&mut calls, number, Clause { conditions: rule.conditions.clone(), value: rule.value });
            }
            if arch == Arch::X86
                && let Some((number, selector)) = multiplexed::call(&rule.name)
            {
                // What is selected is the first argument; the call's own are in memory.
                let mut conditions = vec![selector];
                conditions.extend(rule.conditions.iter().filter(|condition| condition.argument != 0));
                add(&mut calls, number, Clause { conditions, value: rule.value });
            }
        }
        calls
    }
}

fn add(calls: &mut Calls, number: u32, clause: Clause) {
    let clauses = calls.entry(number).or_default();
    if clauses.first().is_some_and(|first| first.conditions.is_empty()) {
        return;
    }
    if clause.conditions.is_empty() {
        clauses.clear();
    }
    clauses.push(clause);
}

fn number(name: &str, arch: Arch) -> Option<u32> {
    let [x86_64, x86, x32] = table::numbers(name)?;
    match arch {
        Arch::X86_64 => x86_64,
        Arch::X86 => x86,
        Arch::X32 => x32,
    }
}

fn add_rules(at: &str, syscall: &oci::LinuxSyscall, rules: &mut Vec<Rule>) -> Result<(), SeccompError> {
    let value =
        value(&format!("{at}.action"), syscall.action(), &format!("{at}.errnoRet"), syscall.errno_ret())?;
    let conditions = conditions(at, syscall.args().as_deref().unwrap_or_default())?;
    // Several conditions on one argument are alternatives, as with runc.
    let repeated = conditions
        .iter()
        .enumerate()
        .any(|(n, condition)| conditions[..n].iter().any(|other| other.argument == condition.argument));
    let alternatives: Vec<Vec<Condition>> = if repeated {
        conditions.into_iter().map(|condition| vec![condition]).collect()
    } else {
        vec![conditions]
    };
    for (n, name) in syscall.names().iter().enumerate() {
        if name.is_empty() {
            return Err(SeccompError::field(
                format!("{at}.names[{n}]"),
                "is empty; it must be a system call",
            ));
        }
        rules.extend(alternatives.iter().map(|conditions| Rule {
            name: name.clone(),
            value,
            conditions: conditions.clone(),
        }));
    }
    Ok(())
}

fn conditions(at: &str, args: &[oci::LinuxSeccompArg]) -> Result<Vec<Condition>, SeccompError> {
    let condition = |(n, arg): (usize, &oci::LinuxSeccompArg)| {
        if arg.index() >= ARGUMENTS {
            return Err(SeccompError::field(
                format!("{at}.args[{n}].index"),
                format!("must be 0 to {}, is {}", ARGUMENTS - 1, arg.index()),
            ));
        }
        let value = arg.value();
        let comparison = match arg.op() {
            Operator::ScmpCmpNe => Comparison::NotEqual(value),
            Operator::ScmpCmpLt => Comparison::Less(value),
            Operator::ScmpCmpLe => Comparison::LessOrEqual(value),
            Operator::ScmpCmpEq => Comparison::MaskedEqual(u64::MAX, value),
            Operator::ScmpCmpGe => Comparison::GreaterOrEqual(value),
            Operator::ScmpCmpGt => Comparison::Greater(value),
            // What the mask leaves out is left out of the value too.
            Operator::ScmpCmpMaskedEq => Comparison::MaskedEqual(value, arg.value_two().unwrap_or(0) & value),
        };
        Ok(Condition { argument: arg.index() as u32, comparison })
    };
    args.iter().enumerate().map(condition).collect()
}

/// What a filter returns for an action (SECCOMP_RET_*).
fn value(
    action_field: &str,
    action: Action,
    errno_field: &str,
    errno: Option<u32>,
) -> Result<u32, SeccompError> {
    let data = match errno {
        Some(errno @ 0..=0xffff) => errno,
        Some(errno) => {
            return Err(SeccompError::field(
                errno_field,
                format!("must be an error number up to 65535, is {errno}"),
            ));
        }
        None => libc::EPERM.cast_unsigned(),
    };
    Ok(match action {
        Action::ScmpActKill | Action::ScmpActKillThread => super::KILL_THREAD,
        Action::ScmpActKillProcess => libc::SECCOMP_RET_KILL_PROCESS,
        Action::ScmpActTrap => libc::SECCOMP_RET_TRAP,
        Action::ScmpActErrno => libc::SECCOMP_RET_ERRNO | data,
        Action::ScmpActTrace => libc::SECCOMP_RET_TRACE | data,
        Action::ScmpActLog => libc::SECCOMP_RET_LOG,
        Action::ScmpActAllow => libc::SECCOMP_RET_ALLOW,
        Action::ScmpActNotify => {
            return Err(SeccompError::Unsupported { field: action_field.into(), reason: NO_LISTENER.into() });
        }
    })
}
