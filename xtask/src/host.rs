//! What this machine is: hardware virtualization or not.

use std::fmt;
use std::fs::{self, File};

/// Where containers in microVMs can run.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Host {
    /// On this machine itself.
    Hardware,
    /// On the software-emulated machine.
    NeedsDevhost {
        /// What is missing here, as part of a sentence.
        why: String,
    },
}

impl Host {
    /// Looks at the processor's flags and at `/dev/kvm`. Neither is enough
    /// alone: a device without flags belongs to a KVM that interprets ring 0,
    /// too slowly and too incompletely for a kernel.
    pub fn detect() -> Self {
        let cpuinfo = fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
        let device = File::options().read(true).write(true).open("/dev/kvm").map(drop);
        Self::from_parts(&cpuinfo, device)
    }

    fn from_parts(cpuinfo: &str, device: std::io::Result<()>) -> Self {
        let virtualization = cpuinfo
            .lines()
            .filter(|line| line.starts_with("flags"))
            .any(|line| line.split_whitespace().any(|flag| flag == "vmx" || flag == "svm"));
        match (virtualization, device) {
            (true, Ok(())) => Self::Hardware,
            (true, Err(error)) => Self::NeedsDevhost { why: format!("/dev/kvm cannot be opened: {error}") },
            (false, _) => Self::NeedsDevhost {
                why: "the processor shows neither vmx nor svm (see /proc/cpuinfo)".into(),
            },
        }
    }
}

impl fmt::Display for Host {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Hardware => write!(f, "Running on this machine's hardware virtualization."),
            Self::NeedsDevhost { why } => {
                write!(f, "Running in the devhost, a software-emulated machine with KVM, because {why}.")
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io;

    #[test]
    fn flags_and_device_are_both_needed() {
        let denied = || Err(io::Error::from(io::ErrorKind::PermissionDenied));
        assert_eq!(Host::from_parts("flags\t\t: fpu svm sse\n", Ok(())), Host::Hardware);
        assert_eq!(Host::from_parts("flags\t\t: fpu vmx\n", Ok(())), Host::Hardware);
        assert!(
            matches!(Host::from_parts("flags : fpu svm\n", denied()), Host::NeedsDevhost { why } if why.contains("/dev/kvm"))
        );
        assert!(
            matches!(Host::from_parts("flags : fpu\n", Ok(())), Host::NeedsDevhost { why } if why.contains("vmx"))
        );
        // "svm_lock" and the like are not svm.
        assert!(matches!(Host::from_parts("flags : svm_lock\n", Ok(())), Host::NeedsDevhost { .. }));
    }
}
