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
    pub fn create(&self, index: u8) -> Result<Vcpu, VcpuError> {
        let vcpu = Vcpu::create(&self.vm, index)?;
        self.configure(&vcpu, None)?;
        Ok(vcpu)
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
