//! Tells whether `/dev/kvm` really runs kernels.
//!
//! Some machines offer a `/dev/kvm` without hardware virtualization under it:
//! every request succeeds, but code in ring 0 is interpreted, a thousand times
//! too slowly, until an instruction the interpreter lacks. So a CPU that does
//! not claim VMX or SVM is put to the test with a short loop in a throw-away VM.

use std::sync::Arc;
use std::time::{Duration, Instant};

use kvm_bindings::kvm_regs;
use kvm_ioctls::{VcpuExit, VmFd};
use thiserror::Error;
use vm_memory::{Bytes, GuestAddress, GuestMemoryError};

use super::{KvmError, Vm, open_device};
use crate::arch::layout::PAGE_SIZE;
use crate::arch::vendor::Vendor;
use crate::memory::{self, MemoryError};

/// Why this host cannot run guests.
#[derive(Debug, Error)]
pub enum ProbeError {
    /// KVM is missing, forbidden or refuses.
    #[error(transparent)]
    Kvm(#[from] KvmError),
    /// KVM interprets ring 0.
    #[error(
        "this host's /dev/kvm only emulates kernels ({how}): its CPU offers no vmx or svm; \
         use a machine with hardware virtualization, or enable nested virtualization for this one"
    )]
    Emulated {
        /// What the test loop showed.
        how: String,
    },
    /// The test's memory could not be made.
    #[error(transparent)]
    Memory(#[from] MemoryError),
    /// The test's code could not be written.
    #[error("the test's code could not be written")]
    Write(#[source] GuestMemoryError),
}

/// Checks that `/dev/kvm` can be opened and runs kernels on the CPU. Takes
/// microseconds where the CPU has VMX or SVM, at most some 100 ms elsewhere.
pub fn check() -> Result<(), ProbeError> {
    let kvm = open_device()?;
    if Vendor::of_host().has_virtualization() {
        return Ok(());
    }
    match time_loop(kvm.create_vm().map_err(KvmError::request("KVM_CREATE_VM"))?)? {
        Ran::Done(time) if time <= LONGEST => Ok(()),
        Ran::Done(time) => {
            let rate = 2.0 * f64::from(ITERATIONS) / time.as_secs_f64() / 1e6;
            Err(ProbeError::Emulated { how: format!("{rate:.1} million instructions per second") })
        }
        Ran::Failed(how) => Err(ProbeError::Emulated { how }),
    }
}

/// Two instructions each: microseconds on a CPU, 25 ms where they are interpreted.
const ITERATIONS: u16 = 10_000;
/// Hardware needs a thousandth of it.
const LONGEST: Duration = Duration::from_millis(5);

enum Ran {
    Done(Duration),
    Failed(String),
}

/// Times the loop in real mode, which is ring 0.
fn time_loop(fd: VmFd) -> Result<Ran, ProbeError> {
    let [low, high] = ITERATIONS.to_le_bytes();
    // mov cx, ITERATIONS; again: dec cx; jnz again; hlt
    let code = [0xb9, low, high, 0x49, 0x75, 0xfd, 0xf4];
    let memory = memory::create(PAGE_SIZE)?;
    memory.write_slice(&code, GuestAddress(0)).map_err(ProbeError::Write)?;
    let vm = Vm::new(Arc::new(fd));
    vm.set_memory(&memory)?;

    let mut vcpu = vm.fd.create_vcpu(0).map_err(KvmError::request("KVM_CREATE_VCPU"))?;
    let mut sregs = vcpu.get_sregs().map_err(KvmError::request("KVM_GET_SREGS"))?;
    (sregs.cs.base, sregs.cs.selector) = (0, 0);
    vcpu.set_sregs(&sregs).map_err(KvmError::request("KVM_SET_SREGS"))?;
    let regs = kvm_regs { rflags: 2, ..Default::default() };
    vcpu.set_regs(&regs).map_err(KvmError::request("KVM_SET_REGS"))?;

    let start = Instant::now();
    loop {
        match vcpu.run() {
            Ok(VcpuExit::Hlt) => return Ok(Ran::Done(start.elapsed())),
            Ok(exit) => return Ok(Ran::Failed(format!("a loop of two instructions ended with {exit:?}"))),
            Err(e) if [libc::EINTR, libc::EAGAIN].contains(&e.errno()) => {}
            Err(e) => return Ok(Ran::Failed(format!("KVM_RUN: {e}"))),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The loop and the CPU's flags must agree, whichever machine this is.
    #[test]
    fn flags_and_loop_agree() {
        let vm = open_device().unwrap().create_vm().unwrap();
        let fast = matches!(time_loop(vm).unwrap(), Ran::Done(time) if time <= LONGEST);
        assert_eq!(fast, Vendor::of_host().has_virtualization());
        assert_eq!(check().is_ok(), fast);
    }
}
