//! Virtual CPUs: their registers at the start, their threads, their exits.

pub mod exits;
pub mod state;
pub mod thread;

use std::sync::Arc;

use kvm_bindings::{CpuId, KVM_MP_STATE_RUNNABLE, kvm_mp_state};
use kvm_ioctls::VcpuFd;
use thiserror::Error;

use crate::arch::cpuid::{self, TooManyLeaves, Topology};
use crate::arch::vendor::Vendor;
use crate::arch::{lapic, msr, registers};
use crate::kvm::{Host, KvmError, Vm};

/// Why a vCPU could not be made.
#[derive(Debug, Error)]
pub enum VcpuError {
    /// KVM refused.
    #[error("vCPU {index}")]
    Kvm {
        /// Which one.
        index: u8,
        /// The refusal.
        #[source]
        source: KvmError,
    },
    /// The CPUID table is too long.
    #[error(transparent)]
    Cpuid(#[from] TooManyLeaves),
    /// KVM took only some of the MSRs.
    #[error("vCPU {index}: KVM does not know MSR {msr:#x}")]
    Msr {
        /// Which vCPU.
        index: u8,
        /// The first MSR it refused.
        msr: u32,
    },
}

/// Where the boot vCPU starts.
#[derive(Clone, Copy, Debug)]
pub struct BootEntry {
    /// Physical address of the kernel's entry point.
    pub entry: u64,
    /// Physical address of the boot page tables.
    pub pml4: u64,
}

/// Makes the vCPUs of a VM, at its start and later.
pub struct VcpuFactory {
    vm: Arc<Vm>,
    supported: CpuId,
    vendor: Vendor,
    tsc_deadline: bool,
    possible: u8,
    msrs: Arc<[u32]>,
    /// One that was made and could not be started.
    kept: Option<Vcpu>,
}

impl VcpuFactory {
    /// Of a VM that has at most `possible` vCPUs: all are told of all.
    pub fn new(host: &Host, vm: &Arc<Vm>, possible: u8) -> Result<Self, KvmError> {
        Ok(Self {
            vm: Arc::clone(vm),
            supported: host.supported_cpuid()?,
            vendor: host.vendor,
            tsc_deadline: host.has_tsc_deadline(),
            possible,
            msrs: host.msr_indices()?.into(),
            kept: None,
        })
    }

    /// Every MSR that a vCPU's state consists of.
    pub fn msrs(&self) -> &Arc<[u32]> {
        &self.msrs
    }

    /// The host CPU's vendor.
    pub fn vendor(&self) -> Vendor {
        self.vendor
    }

    /// The most vCPUs there can be.
    pub fn possible(&self) -> u8 {
        self.possible
    }

    /// Sets what a firmware would have set. `boot` is for the boot vCPU; the
    /// others wait for its startup interrupt.
    pub fn configure(&self, vcpu: &Vcpu, boot: Option<BootEntry>) -> Result<(), VcpuError> {
        let topology = Topology { apic_id: vcpu.index, vcpus: self.possible };
        let cpuid = cpuid::table(&self.supported, self.vendor, &topology, self.tsc_deadline)?;
        vcpu.configure(&cpuid, boot)
    }

    /// A vCPU beside those that run, which the guest can bring up.
    pub fn create(&mut self, index: u8) -> Result<Vcpu, VcpuError> {
        let vcpu = match self.kept.take_if(|vcpu| vcpu.index == index) {
            Some(vcpu) => vcpu,
            None => Vcpu::create(&self.vm, index)?,
        };
        match self.configure(&vcpu, None) {
            Ok(()) => Ok(vcpu),
            Err(error) => {
                self.keep(vcpu);
                Err(error)
            }
        }
    }

    /// Keeps one that could not be started for the next request: KVM has its number taken
    /// as long as there is the VM, whoever lets go of it.
    pub fn keep(&mut self, vcpu: Vcpu) {
        self.kept = Some(vcpu);
    }
}

/// A virtual CPU that has not been started.
pub struct Vcpu {
    /// Its number and APIC id.
    pub index: u8,
    /// Its descriptor.
    pub fd: VcpuFd,
}

impl Vcpu {
    /// Creates vCPU `index`.
    pub fn create(vm: &Arc<Vm>, index: u8) -> Result<Self, VcpuError> {
        let fd = vm
            .fd
            .create_vcpu(index.into())
            .map_err(KvmError::request("KVM_CREATE_VCPU"))
            .map_err(|source| VcpuError::Kvm { index, source })?;
        Ok(Self { index, fd })
    }

    /// Sets what a firmware would have set. `boot` is for the boot vCPU; the
    /// others wait for its startup interrupt.
    pub fn configure(&self, cpuid: &CpuId, boot: Option<BootEntry>) -> Result<(), VcpuError> {
        let index = self.index;
        self.set_registers(cpuid, boot).map_err(|source| VcpuError::Kvm { index, source })?;
        if let Some(list) = msr::list(&msr::BOOT_MSRS) {
            let written = self
                .fd
                .set_msrs(&list)
                .map_err(KvmError::request("KVM_SET_MSRS"))
                .map_err(|source| VcpuError::Kvm { index, source })?;
            if let Some((msr, _)) = msr::BOOT_MSRS.get(written) {
                return Err(VcpuError::Msr { index, msr: *msr });
            }
        }
        Ok(())
    }

    fn set_registers(&self, cpuid: &CpuId, boot: Option<BootEntry>) -> Result<(), KvmError> {
        let fd = &self.fd;
        fd.set_cpuid2(cpuid).map_err(KvmError::request("KVM_SET_CPUID2"))?;
        let mut lapic = fd.get_lapic().map_err(KvmError::request("KVM_GET_LAPIC"))?;
        lapic::set_virtual_wire(&mut lapic);
        fd.set_lapic(&lapic).map_err(KvmError::request("KVM_SET_LAPIC"))?;
        let Some(boot) = boot else { return Ok(()) };
        fd.set_fpu(&registers::boot_fpu()).map_err(KvmError::request("KVM_SET_FPU"))?;
        let mut sregs = fd.get_sregs().map_err(KvmError::request("KVM_GET_SREGS"))?;
        registers::set_boot_sregs(&mut sregs, boot.pml4);
        fd.set_sregs(&sregs).map_err(KvmError::request("KVM_SET_SREGS"))?;
        fd.set_regs(&registers::boot_regs(boot.entry)).map_err(KvmError::request("KVM_SET_REGS"))?;
        fd.set_mp_state(kvm_mp_state { mp_state: KVM_MP_STATE_RUNNABLE })
            .map_err(KvmError::request("KVM_SET_MP_STATE"))
    }
}

#[cfg(test)]
mod tests {
    use kvm_bindings::{KVM_MAX_CPUID_ENTRIES, kvm_cpuid_entry2};

    use super::*;

    #[test]
    fn a_vcpu_that_could_not_be_started_is_the_next_one() {
        let host = Host::open().unwrap();
        let vm = Arc::new(host.create_vm(2).unwrap());
        let mut factory = VcpuFactory::new(&host, &vm, 2).unwrap();
        let leaf = kvm_cpuid_entry2 { function: 0x8000_0000, ..Default::default() };
        let too_many = CpuId::from_entries(&[leaf; KVM_MAX_CPUID_ENTRIES]).unwrap();
        let supported = std::mem::replace(&mut factory.supported, too_many);
        for _ in 0..2 {
            assert!(matches!(factory.create(1), Err(VcpuError::Cpuid(_))));
        }
        factory.supported = supported;
        // It was made, and its thread is not to be had.
        let vcpu = factory.create(1).unwrap();
        factory.keep(vcpu);
        // In nobody else's place.
        assert_eq!(factory.create(0).unwrap().index, 0);
        let vcpu = factory.create(1).unwrap();
        assert_eq!(vcpu.index, 1);
        assert!(matches!(factory.create(1), Err(VcpuError::Kvm { index: 1, .. })), "it is in use");
    }
}
