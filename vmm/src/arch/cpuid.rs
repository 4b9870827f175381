//! The CPUID table of each vCPU.
//!
//! It starts from what KVM supports on this host (`KVM_GET_SUPPORTED_CPUID`)
//! and is changed only for a reason named here. KVM's own leaves (0x40000000)
//! stay: the guest takes its clock, TLB flushes and IPIs from them.

use std::ops::Range;

use kvm_bindings::{CpuId, kvm_cpuid_entry2};
use thiserror::Error;

use super::vendor::Vendor;

/// Why no CPUID table could be made.
#[derive(Debug, Error)]
#[error("the CPUID table needs {0} entries, more than KVM takes")]
pub struct TooManyLeaves(usize);

/// Place of a vCPU: all are cores of one package, one thread each.
#[derive(Clone, Copy, Debug)]
pub struct Topology {
    /// The vCPU's APIC id, which is its index.
    pub apic_id: u8,
    /// Number of vCPUs, at least 1.
    pub vcpus: u8,
}

impl Topology {
    /// Bits of an APIC id that tell vCPUs apart.
    pub fn id_bits(&self) -> u32 {
        u32::from(self.vcpus).next_power_of_two().trailing_zeros()
    }
}

/// Replaces `bits` of `register` with `value`, cut to their width.
pub(super) fn set_bits(register: &mut u32, bits: Range<u32>, value: u32) {
    let mask = ((1u64 << (bits.end - bits.start)) - 1) as u32;
    *register = (*register & !(mask << bits.start)) | ((value & mask) << bits.start);
}

// Leaf 1, ECX.
const DTES64: u32 = 1 << 2;
const MONITOR: u32 = 1 << 3;
const DS_CPL: u32 = 1 << 4;
const VMX: u32 = 1 << 5;
const SMX: u32 = 1 << 6;
const PDCM: u32 = 1 << 15;
const X2APIC: u32 = 1 << 21;
const TSC_DEADLINE: u32 = 1 << 24;
const HYPERVISOR: u32 = 1 << 31;
// Leaf 1, EDX.
const DEBUG_STORE: u32 = 1 << 21;
const HTT: u32 = 1 << 28;
// Leaf 7, subleaf 0.
const SGX: u32 = 1 << 2;
const LA57: u32 = 1 << 16;
const SGX_LAUNCH: u32 = 1 << 30;
// Leaf 0x80000001, ECX.
const SVM: u32 = 1 << 2;
const PERFCTR: u32 = 0b11 << 23;

/// The table for the vCPU at `topology`, from what KVM supports.
pub fn table(
    supported: &CpuId,
    vendor: Vendor,
    topology: &Topology,
    tsc_deadline: bool,
) -> Result<CpuId, TooManyLeaves> {
    let mut entries: Vec<kvm_cpuid_entry2> = supported
        .as_slice()
        .iter()
        .filter_map(|entry| {
            let mut entry = *entry;
            let kept =
                adjust_common(&mut entry, topology, tsc_deadline) && vendor.adjust_leaf(&mut entry, topology);
            kept.then_some(entry)
        })
        .collect();
    // A host without leaf 0xB still needs one for x2APIC ids.
    entries.extend(extended_topology(topology));
    CpuId::from_entries(&entries).map_err(|_| TooManyLeaves(entries.len()))
}

/// Adjusts the leaves both vendors define; false where the leaf is to be hidden.
fn adjust_common(entry: &mut kvm_cpuid_entry2, topology: &Topology, tsc_deadline: bool) -> bool {
    match (entry.function, entry.index) {
        (0x0, _) => entry.eax = entry.eax.max(0xb),
        (0x1, _) => {
            set_bits(&mut entry.ebx, 16..24, u32::from(topology.vcpus));
            set_bits(&mut entry.ebx, 24..32, u32::from(topology.apic_id));
            // No nested virtualization, no performance monitoring, no MWAIT: a
            // container has no use for them, and each is attack surface in KVM.
            entry.ecx &= !(DTES64 | MONITOR | DS_CPL | VMX | SMX | PDCM);
            entry.edx &= !DEBUG_STORE;
            entry.ecx |= HYPERVISOR | X2APIC;
            if tsc_deadline {
                entry.ecx |= TSC_DEADLINE;
            }
            if topology.vcpus > 1 {
                entry.edx |= HTT;
            } else {
                entry.edx &= !HTT;
            }
        }
        (0x7, 0) => {
            // No guest has the 64 TiB that would need a fifth page table level.
            entry.ebx &= !SGX;
            entry.ecx &= !(LA57 | SGX_LAUNCH);
        }
        // Architectural performance monitoring, absent.
        (0xa, _) => (entry.eax, entry.ebx, entry.ecx, entry.edx) = (0, 0, 0, 0),
        // Topology with host values; `extended_topology` gives the guest's. SGX.
        (0xb | 0x1f | 0x12, _) => return false,
        (0x8000_0001, _) => entry.ecx &= !(SVM | PERFCTR),
        // SVM features, AMD performance monitoring.
        (0x8000_000a | 0x8000_0022, _) => return false,
        _ => {}
    }
    true
}

/// Leaf 0xB: threads of a core, then cores of the package.
fn extended_topology(topology: &Topology) -> [kvm_cpuid_entry2; 3] {
    const SIGNIFICANT_INDEX: u32 = 1;
    let level = |index: u32, shift: u32, cpus: u32, kind: u32| kvm_cpuid_entry2 {
        function: 0xb,
        index,
        flags: SIGNIFICANT_INDEX,
        eax: shift,
        ebx: cpus,
        ecx: (kind << 8) | index,
        edx: u32::from(topology.apic_id),
        ..Default::default()
    };
    [level(0, 0, 1, 1), level(1, topology.id_bits(), u32::from(topology.vcpus), 2), level(2, 0, 0, 0)]
}

#[cfg(test)]
mod tests {
    use super::*;

    fn entry(function: u32, value: u32) -> kvm_cpuid_entry2 {
        kvm_cpuid_entry2 { function, eax: value, ebx: value, ecx: value, edx: value, ..Default::default() }
    }

    fn find(table: &CpuId, function: u32, index: u32) -> Option<kvm_cpuid_entry2> {
        table.as_slice().iter().find(|e| (e.function, e.index) == (function, index)).copied()
    }

    #[test]
    fn guest_sees_its_own_topology_and_no_nested_virtualization() {
        let host: Vec<_> = [0x0, 0x1, 0x7, 0xa, 0xb, 0x1f, 0x8000_0001, 0x8000_000a, 0x4000_0001]
            .map(|f| entry(f, u32::MAX))
            .to_vec();
        let supported = CpuId::from_entries(&host).unwrap();
        let topology = Topology { apic_id: 2, vcpus: 3 };
        let guest = table(&supported, Vendor::Intel, &topology, true).unwrap();

        let leaf1 = find(&guest, 1, 0).unwrap();
        assert_eq!((leaf1.ebx >> 24, (leaf1.ebx >> 16) & 0xff), (2, 3));
        assert_eq!(leaf1.ecx & (VMX | MONITOR | PDCM), 0);
        assert_eq!(leaf1.ecx & (HYPERVISOR | X2APIC | TSC_DEADLINE), HYPERVISOR | X2APIC | TSC_DEADLINE);
        assert_eq!(find(&guest, 0x8000_0001, 0).unwrap().ecx & (SVM | PERFCTR), 0);
        assert!(find(&guest, 0x8000_000a, 0).is_none());
        assert!(find(&guest, 0x1f, 0).is_none());
        assert_eq!(find(&guest, 0xa, 0).unwrap().eax, 0);
        let cores = find(&guest, 0xb, 1).unwrap();
        assert_eq!((cores.eax, cores.ebx, cores.ecx, cores.edx), (2, 3, 0x201, 2));
        let kvm = find(&guest, 0x4000_0001, 0).unwrap();
        assert_eq!(kvm.eax, u32::MAX, "KVM's features are kept as they are");
    }

    #[test]
    fn id_bits_cover_every_vcpu() {
        for (vcpus, bits) in [(1, 0), (2, 1), (3, 2), (4, 2), (5, 3), (128, 7), (254, 8)] {
            assert_eq!(Topology { apic_id: 0, vcpus }.id_bits(), bits, "{vcpus} vCPUs");
        }
    }

    #[test]
    fn set_bits_leaves_the_others() {
        let mut register = u32::MAX;
        set_bits(&mut register, 8..16, 0x12);
        assert_eq!(register, 0xffff_12ff);
        set_bits(&mut register, 0..32, 0);
        assert_eq!(register, 0);
    }
}
