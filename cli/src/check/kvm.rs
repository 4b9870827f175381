//! KVM: whether it opens, has what the monitor uses, and really runs kernels.

use std::error::Error;

use rvm_vmm::{
    arch::vendor::Vendor,
    kvm::{
        Host, KvmError,
        probe::{self, ProbeError},
    },
};

use super::Check;

const VIRTUALIZATION: &str = "use a machine with hardware virtualization; enable it in the firmware, or nested \
                              virtualization in the hypervisor around this machine";

/// All checks of KVM.
pub(super) fn checks() -> Vec<Check> {
    vec![device(), runs_kernels()]
}

fn device() -> Check {
    let name = "kvm";
    let Err(error) = Host::open() else {
        return Check::ok(name, "/dev/kvm opens and has what the monitor uses");
    };
    let remedy = match &error {
        KvmError::NoDevice if Vendor::of_host().has_virtualization() => {
            "modprobe kvm_amd or kvm_intel".to_owned()
        }
        KvmError::NoDevice => VIRTUALIZATION.to_owned(),
        KvmError::Open(source) if [libc::EACCES, libc::EPERM].contains(&source.errno()) => {
            "run this as root, as containerd is".to_owned()
        }
        _ => "rvm needs Linux 5.10 or later with KVM".to_owned(),
    };
    Check::missing(name, chain(&error), remedy)
}

/// A `/dev/kvm` alone proves nothing: some only interpret what kernels do.
fn runs_kernels() -> Check {
    let name = "kvm-runs-kernels";
    match probe::check() {
        Ok(()) => Check::ok(name, "on the CPU"),
        Err(ProbeError::Emulated { how }) => Check::missing(
            name,
            format!("KVM only emulates ring 0 ({how}): this CPU offers neither vmx nor svm"),
            VIRTUALIZATION,
        ),
        Err(error) => Check::missing(name, format!("not tried: {}", chain(&error)), "see the line above"),
    }
}

/// An error with what caused it.
fn chain(error: &dyn Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        text.push_str(&format!(": {error}"));
        cause = error.source();
    }
    text
}
