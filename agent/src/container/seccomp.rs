//! Loading a compiled seccomp filter (seccomp(2)).

use nix::errno::Errno;
use rvm_protocol::agent;

use crate::error::{Error, Step, StepResult};

/// Instructions the kernel takes (`BPF_MAXINSNS`).
const MAX_INSTRUCTIONS: usize = 4096;

/// Flags that change how a filter acts. The others make a descriptor on which
/// somebody would have to answer.
const FLAGS: u64 = libc::SECCOMP_FILTER_FLAG_TSYNC
    | libc::SECCOMP_FILTER_FLAG_LOG
    | libc::SECCOMP_FILTER_FLAG_SPEC_ALLOW
    | libc::SECCOMP_FILTER_FLAG_TSYNC_ESRCH;

/// A filter that can be loaded.
#[derive(Debug)]
pub struct Filter {
    instructions: Vec<libc::sock_filter>,
    flags: u32,
}

impl Filter {
    /// Checks the form of a filter; its sense is the kernel's to check.
    pub fn new(seccomp: &agent::Seccomp) -> Result<Self, Error> {
        let (instructions, rest) = seccomp.program.as_chunks::<{ size_of::<libc::sock_filter>() }>();
        if !rest.is_empty() || instructions.is_empty() || instructions.len() > MAX_INSTRUCTIONS {
            let reason = format!(
                "must hold 1 to {MAX_INSTRUCTIONS} instructions of 8 bytes, has {} bytes",
                seccomp.program.len()
            );
            return Err(Error::invalid("seccomp.program", reason));
        }
        if u64::from(seccomp.flags) & !FLAGS != 0 {
            let reason = format!("{:#x} must be a combination of {FLAGS:#x}", seccomp.flags);
            return Err(Error::invalid("seccomp.flags", reason));
        }
        let instruction = |[c0, c1, jt, jf, k0, k1, k2, k3]: &[u8; 8]| libc::sock_filter {
            code: u16::from_ne_bytes([*c0, *c1]),
            jt: *jt,
            jf: *jf,
            k: u32::from_ne_bytes([*k0, *k1, *k2, *k3]),
        };
        Ok(Self { instructions: instructions.iter().map(instruction).collect(), flags: seccomp.flags })
    }

    /// Puts the filter in force for this process and what it becomes. Needs
    /// `no_new_privs` or `CAP_SYS_ADMIN`.
    pub fn load(&self) -> StepResult<()> {
        let program = libc::sock_fprog {
            // At most MAX_INSTRUCTIONS.
            len: self.instructions.len() as u16,
            filter: self.instructions.as_ptr().cast_mut(),
        };
        // SAFETY: the kernel reads `len` instructions, which outlive the call.
        let result = unsafe {
            libc::syscall(libc::SYS_seccomp, libc::SECCOMP_SET_MODE_FILTER, self.flags, &raw const program)
        };
        Errno::result(result).map(drop).step(|| "load the seccomp filter")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn filter(length: usize, flags: u32) -> Result<Filter, String> {
        let seccomp = agent::Seccomp { program: vec![7; length], flags, ..Default::default() };
        Filter::new(&seccomp).map_err(|error| error.to_string())
    }

    #[test]
    fn the_form_is_checked() {
        let filter_of_two = filter(16, libc::SECCOMP_FILTER_FLAG_LOG as u32).unwrap();
        assert_eq!(filter_of_two.instructions.len(), 2);
        assert_eq!(filter_of_two.instructions[1].k, 0x0707_0707);
        assert!(filter(MAX_INSTRUCTIONS * 8, 0).is_ok());
        for length in [0, 7, 12, MAX_INSTRUCTIONS * 8 + 8] {
            let expected =
                format!("seccomp.program: must hold 1 to 4096 instructions of 8 bytes, has {length} bytes");
            assert_eq!(filter(length, 0).unwrap_err(), expected);
        }
        let error = filter(8, libc::SECCOMP_FILTER_FLAG_NEW_LISTENER as u32).unwrap_err();
        assert!(error.starts_with("seccomp.flags: 0x8 must be"), "{error}");
    }
}
