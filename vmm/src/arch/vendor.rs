//! What differs between CPU vendors, all of it.
//!
//! Intel: KVM needs addresses for a task state segment and an identity-mapped
//! page table; caches are described by CPUID leaf 4.
//! AMD (and Hygon): neither; caches are described by leaf 0x8000001D, the
//! package by 0x80000008 and 0x8000001E, extended topology by 0x80000026.

use std::arch::x86_64::__cpuid;

use kvm_bindings::kvm_cpuid_entry2;

use super::cpuid::{Topology, set_bits};

/// The host CPU's vendor.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Vendor {
    /// GenuineIntel.
    Intel,
    /// AuthenticAMD or HygonGenuine.
    Amd,
    /// Any other: nothing is adjusted that only one vendor defines.
    Other,
}

impl Vendor {
    /// The vendor of the CPU this process runs on.
    pub fn of_host() -> Self {
        let leaf = __cpuid(0);
        Self::from_signature([leaf.ebx, leaf.edx, leaf.ecx])
    }

    fn from_signature(registers: [u32; 3]) -> Self {
        let mut signature = [0; 12];
        for (part, register) in signature.chunks_exact_mut(4).zip(registers) {
            part.copy_from_slice(&register.to_le_bytes());
        }
        match &signature {
            b"GenuineIntel" => Self::Intel,
            b"AuthenticAMD" | b"HygonGenuine" => Self::Amd,
            _ => Self::Other,
        }
    }

    /// Whether the CPU says that it can run guests: VMX or SVM.
    pub fn has_virtualization(self) -> bool {
        const VMX: u32 = 1 << 5;
        const SVM: u32 = 1 << 2;
        let vmx = __cpuid(1).ecx & VMX != 0;
        let svm = __cpuid(0x8000_0000).eax > 0x8000_0000 && __cpuid(0x8000_0001).ecx & SVM != 0;
        match self {
            Self::Intel => vmx,
            Self::Amd => svm,
            Self::Other => vmx || svm,
        }
    }

    /// Bits of a physical address on this CPU, which a guest has, too: 39 on many of
    /// Intel's for desktops and laptops.
    pub fn address_bits() -> u32 {
        const DEFAULT: u32 = 36;
        if __cpuid(0x8000_0000).eax < 0x8000_0008 {
            return DEFAULT;
        }
        __cpuid(0x8000_0008).eax & 0xff
    }

    /// Whether KVM wants the addresses of its TSS and identity map before the
    /// first vCPU. Only a CPU known to be AMD's needs neither.
    pub fn needs_tss(self) -> bool {
        self != Self::Amd
    }

    /// Adjusts a leaf that only one vendor defines; false where the leaf is to
    /// be hidden.
    pub fn adjust_leaf(self, entry: &mut kvm_cpuid_entry2, topology: &Topology) -> bool {
        let last_cpu = u32::from(topology.vcpus - 1);
        match (self, entry.function) {
            // Deterministic cache parameters: type in 4:0, level in 7:5, CPUs
            // sharing the cache in 25:14, cores in the package in 31:26.
            (Self::Intel, 0x4) if entry.eax & 0x1f != 0 => {
                let level = (entry.eax >> 5) & 0x7;
                set_bits(&mut entry.eax, 14..26, if level >= 3 { last_cpu } else { 0 });
                set_bits(&mut entry.eax, 26..32, last_cpu.min(63));
            }
            // Cores in the package less one, and bits of an APIC id that number them.
            (Self::Amd, 0x8000_0008) => {
                set_bits(&mut entry.ecx, 0..8, last_cpu);
                set_bits(&mut entry.ecx, 12..16, topology.id_bits());
            }
            // The same layout as leaf 4, without the cores.
            (Self::Amd, 0x8000_001d) if entry.eax & 0x1f != 0 => {
                let level = (entry.eax >> 5) & 0x7;
                set_bits(&mut entry.eax, 14..26, if level >= 3 { last_cpu } else { 0 });
            }
            // Extended APIC id, core (one thread each), node.
            (Self::Amd, 0x8000_001e) => {
                entry.eax = u32::from(topology.apic_id);
                entry.ebx = u32::from(topology.apic_id) & 0xff;
                entry.ecx = 0;
                entry.edx = 0;
            }
            // Extended topology with host values: leaf 0xB says it already.
            (Self::Amd, 0x8000_0026) => return false,
            _ => {}
        }
        true
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn registers(signature: &[u8; 12]) -> [u32; 3] {
        let word = |i: usize| u32::from_le_bytes(signature[i..i + 4].try_into().unwrap());
        [word(0), word(4), word(8)]
    }

    #[test]
    fn vendors_are_told_apart() {
        assert_eq!(Vendor::from_signature(registers(b"GenuineIntel")), Vendor::Intel);
        assert_eq!(Vendor::from_signature(registers(b"AuthenticAMD")), Vendor::Amd);
        assert_eq!(Vendor::from_signature(registers(b"HygonGenuine")), Vendor::Amd);
        assert_eq!(Vendor::from_signature(registers(b"CentaurHauls")), Vendor::Other);
    }

    #[test]
    fn amd_topology_is_the_guests() {
        let topology = Topology { apic_id: 3, vcpus: 6 };
        let mut entry = kvm_cpuid_entry2 { function: 0x8000_0008, ecx: 0xf0ff, ..Default::default() };
        assert!(Vendor::Amd.adjust_leaf(&mut entry, &topology));
        assert_eq!((entry.ecx & 0xff, (entry.ecx >> 12) & 0xf), (5, 3));
        let mut entry = kvm_cpuid_entry2 { function: 0x8000_001e, ecx: 0x77, ..Default::default() };
        assert!(Vendor::Amd.adjust_leaf(&mut entry, &topology));
        assert_eq!((entry.eax, entry.ebx, entry.ecx), (3, 3, 0));
        let mut entry = kvm_cpuid_entry2 { function: 0x8000_0026, ..Default::default() };
        assert!(!Vendor::Amd.adjust_leaf(&mut entry, &topology));
    }

    #[test]
    fn intel_caches_are_shared_by_the_guests_cpus() {
        let topology = Topology { apic_id: 0, vcpus: 4 };
        let mut l3 = kvm_cpuid_entry2 { function: 4, index: 3, eax: 0xffff_c063, ..Default::default() };
        assert!(Vendor::Intel.adjust_leaf(&mut l3, &topology));
        assert_eq!(((l3.eax >> 14) & 0xfff, l3.eax >> 26, l3.eax & 0xff), (3, 3, 0x63));
        let mut l1 = kvm_cpuid_entry2 { function: 4, index: 0, eax: 0xffff_c021, ..Default::default() };
        assert!(Vendor::Intel.adjust_leaf(&mut l1, &topology));
        assert_eq!((l1.eax >> 14) & 0xfff, 0);
    }
}
