//! Everything a vCPU is, apart from its descriptor and thread.

use kvm_bindings::{
    CpuId, KVM_MAX_CPUID_ENTRIES, Msrs, kvm_cpuid_entry2, kvm_debugregs, kvm_lapic_state, kvm_mp_state,
    kvm_msr_entry, kvm_regs, kvm_sregs, kvm_vcpu_events, kvm_xcrs, kvm_xsave,
};
use kvm_ioctls::VcpuFd;
use serde::{Deserialize, Serialize};

use crate::arch::msr;
use crate::kvm::KvmError;

/// A paused vCPU's state.
#[derive(Debug, Serialize, Deserialize)]
pub struct VcpuState {
    cpuid: Vec<kvm_cpuid_entry2>,
    mp_state: kvm_mp_state,
    regs: kvm_regs,
    sregs: kvm_sregs,
    xsave: kvm_xsave,
    xcrs: kvm_xcrs,
    debug_regs: kvm_debugregs,
    lapic: kvm_lapic_state,
    msrs: Vec<(u32, u64)>,
    events: kvm_vcpu_events,
}

impl VcpuState {
    /// Reads the state of a vCPU that does not run. `msrs` are the indices KVM
    /// lists for this host; those it cannot read on this vCPU are left out.
    pub fn save(fd: &VcpuFd, msrs: &[u32]) -> Result<Self, KvmError> {
        // Reading the MP state lets KVM settle pending INIT and SIPI first.
        let mp_state = fd.get_mp_state().map_err(KvmError::request("KVM_GET_MP_STATE"))?;
        let cpuid = fd.get_cpuid2(KVM_MAX_CPUID_ENTRIES).map_err(KvmError::request("KVM_GET_CPUID2"))?;
        Ok(Self {
            cpuid: cpuid.as_slice().to_vec(),
            mp_state,
            regs: fd.get_regs().map_err(KvmError::request("KVM_GET_REGS"))?,
            sregs: fd.get_sregs().map_err(KvmError::request("KVM_GET_SREGS"))?,
            xsave: fd.get_xsave().map_err(KvmError::request("KVM_GET_XSAVE"))?,
            xcrs: fd.get_xcrs().map_err(KvmError::request("KVM_GET_XCRS"))?,
            debug_regs: fd.get_debug_regs().map_err(KvmError::request("KVM_GET_DEBUGREGS"))?,
            lapic: fd.get_lapic().map_err(KvmError::request("KVM_GET_LAPIC"))?,
            msrs: read_msrs(fd, msrs)?,
            events: fd.get_vcpu_events().map_err(KvmError::request("KVM_GET_VCPU_EVENTS"))?,
        })
    }

    /// Writes the state to a vCPU that has not run yet. The order matters: CPUID
    /// decides what the others may hold, the local APIC needs the APIC base in
    /// SREGS, the TSC deadline among the MSRs needs the local APIC's timer mode.
    pub fn restore(&self, fd: &VcpuFd) -> Result<(), KvmError> {
        let cpuid = CpuId::from_entries(&self.cpuid)
            .map_err(|_| KvmError::NoCapability("room for the saved CPUID table"))?;
        fd.set_cpuid2(&cpuid).map_err(KvmError::request("KVM_SET_CPUID2"))?;
        fd.set_mp_state(self.mp_state).map_err(KvmError::request("KVM_SET_MP_STATE"))?;
        fd.set_regs(&self.regs).map_err(KvmError::request("KVM_SET_REGS"))?;
        fd.set_sregs(&self.sregs).map_err(KvmError::request("KVM_SET_SREGS"))?;
        fd.set_xcrs(&self.xcrs).map_err(KvmError::request("KVM_SET_XCRS"))?;
        // SAFETY: `xsave` is as large as KVM_SET_XSAVE reads where no dynamic
        // feature (AMX) is enabled, which the monitor never asks for.
        unsafe { fd.set_xsave(&self.xsave) }.map_err(KvmError::request("KVM_SET_XSAVE"))?;
        fd.set_debug_regs(&self.debug_regs).map_err(KvmError::request("KVM_SET_DEBUGREGS"))?;
        fd.set_lapic(&self.lapic).map_err(KvmError::request("KVM_SET_LAPIC"))?;
        for part in self.msrs.chunks(MSRS_AT_ONCE) {
            let Some(list) = msr::list(part) else { continue };
            let written = fd.set_msrs(&list).map_err(KvmError::request("KVM_SET_MSRS"))?;
            if written < part.len() {
                return Err(KvmError::NoCapability("an MSR of the saved vCPU"));
            }
        }
        fd.set_vcpu_events(&self.events).map_err(KvmError::request("KVM_SET_VCPU_EVENTS"))
    }
}

const MSRS_AT_ONCE: usize = 128;

/// KVM stops at the first MSR it cannot read; that one is skipped.
fn read_msrs(fd: &VcpuFd, indices: &[u32]) -> Result<Vec<(u32, u64)>, KvmError> {
    let mut values = Vec::with_capacity(indices.len());
    let mut rest = indices;
    while !rest.is_empty() {
        let part = &rest[..rest.len().min(MSRS_AT_ONCE)];
        let entries: Vec<_> =
            part.iter().map(|&index| kvm_msr_entry { index, ..Default::default() }).collect();
        let Ok(mut list) = Msrs::from_entries(&entries) else { break };
        let read = fd.get_msrs(&mut list).map_err(KvmError::request("KVM_GET_MSRS"))?;
        values.extend(list.as_slice()[..read].iter().map(|m| (m.index, m.data)));
        let skipped = usize::from(read < part.len());
        rest = &rest[read + skipped..];
    }
    Ok(values)
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;
    use crate::arch::cpuid::{self, Topology};
    use crate::kvm::Host;
    use crate::vcpu::{BootEntry, Vcpu};

    #[test]
    fn state_round_trip() {
        let host = Host::open().unwrap();
        let indices = host.msr_indices().unwrap();
        let vcpu = || {
            let vm = Arc::new(host.create_vm(1).unwrap());
            (Vcpu::create(&vm, 0).unwrap(), vm)
        };
        let (first, _vm1) = vcpu();
        let topology = Topology { apic_id: 0, vcpus: 1 };
        let table = cpuid::table(&host.supported_cpuid().unwrap(), host.vendor, &topology, true).unwrap();
        first.configure(&table, Some(BootEntry { entry: 0x100_0000, pml4: 0x9000 })).unwrap();
        let saved = VcpuState::save(&first.fd, &indices).unwrap();
        assert_eq!(saved.regs.rip, 0x100_0000);
        assert!(saved.msrs.len() > 10);

        let text = serde_json::to_string(&saved).unwrap();
        let (second, _vm2) = vcpu();
        let mut loaded: VcpuState = serde_json::from_str(&text).unwrap();
        loaded.restore(&second.fd).unwrap();
        let mut again = VcpuState::save(&second.fd, &indices).unwrap();
        // The time stamp counter goes on by itself.
        for state in [&mut loaded, &mut again] {
            state.msrs.retain(|(index, _)| ![0x10, 0x3b].contains(index));
        }
        let fields = |state: &VcpuState| match serde_json::to_value(state).unwrap() {
            serde_json::Value::Object(fields) => fields,
            other => panic!("{other}"),
        };
        let (loaded, again) = (fields(&loaded), fields(&again));
        for (name, value) in &loaded {
            assert_eq!(&again[name], value, "{name}");
        }
    }
}
