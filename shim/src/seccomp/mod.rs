//! `linux.seccomp`: profiles of system calls, compiled to the classic BPF that
//! seccomp(2) loads. The guest only loads what comes out; see docs/decisions/0611.
//!
//! [`profile`] reads and checks, [`compile`] makes the program with the
//! [`assembler`]; [`table`] and [`multiplexed`] know the numbers.

mod assembler;
mod compile;
mod multiplexed;
mod profile;
mod table;
#[cfg(test)]
mod tests;

use oci_spec::runtime::{self as oci, LinuxSeccompFilterFlag as Flag};
use rvm_protocol::agent::Seccomp;

use profile::Profile;

/// Returned for what no rule may decide, as libseccomp does.
const KILL_THREAD: u32 = libc::SECCOMP_RET_KILL_THREAD;
/// "There is no such call."
const ENOSYS: u32 = libc::SECCOMP_RET_ERRNO | libc::ENOSYS.cast_unsigned();

/// Why nobody is notified.
const NO_LISTENER: &str = "a listener on the host cannot serve the processes of a guest";

/// Why a profile is refused.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum SeccompError {
    /// A field whose value cannot be used.
    #[error("{field}: {problem}")]
    Field {
        /// Its path below the profile.
        field: String,
        /// What is wrong.
        problem: String,
    },
    /// A field that asks for something rvm does not do.
    #[error("{field}: {reason}")]
    Unsupported {
        /// Its path below the profile.
        field: String,
        /// Why.
        reason: String,
    },
    /// More comparisons than the kernel takes.
    #[error("makes a filter of {len} instructions; the kernel takes at most {most}")]
    TooLong {
        /// Instructions.
        len: usize,
        /// The kernel's limit.
        most: usize,
    },
}

impl SeccompError {
    fn field(field: impl Into<String>, problem: impl Into<String>) -> Self {
        Self::Field { field: field.into(), problem: problem.into() }
    }
}

/// Compiles a profile for the guest.
pub fn compile(profile: &oci::LinuxSeccomp) -> Result<Seccomp, SeccompError> {
    let listener = profile.listener_path().as_ref().is_some_and(|path| !path.as_os_str().is_empty());
    let metadata = profile.listener_metadata().as_ref().is_some_and(|text| !text.is_empty());
    for (given, field) in [(listener, "listenerPath"), (metadata, "listenerMetadata")] {
        if given {
            return Err(SeccompError::Unsupported { field: field.into(), reason: NO_LISTENER.into() });
        }
    }
    let instructions = compile::compile(&Profile::new(profile)?)?;
    let mut program = Vec::with_capacity(instructions.len() * 8);
    for instruction in instructions {
        program.extend(instruction.code.to_ne_bytes());
        program.extend([instruction.jt, instruction.jf]);
        program.extend(instruction.k.to_ne_bytes());
    }
    Ok(Seccomp { program, flags: flags(profile.flags().as_deref()), ..Default::default() })
}

/// SECCOMP_FILTER_FLAG_* that mean something to a filter that is loaded by a
/// process of one thread and has no listener.
fn flags(flags: Option<&[Flag]>) -> u32 {
    const LOG: u32 = libc::SECCOMP_FILTER_FLAG_LOG as u32;
    const SPEC_ALLOW: u32 = libc::SECCOMP_FILTER_FLAG_SPEC_ALLOW as u32;
    // Where nothing is said, runc leaves speculation as it is outside of filters.
    let Some(flags) = flags else { return SPEC_ALLOW };
    flags.iter().fold(0, |bits, flag| {
        bits | match flag {
            Flag::SeccompFilterFlagLog => LOG,
            Flag::SeccompFilterFlagSpecAllow => SPEC_ALLOW,
            Flag::SeccompFilterFlagTsync | Flag::SeccompFilterFlagWaitKillableRecv => 0,
        }
    })
}
