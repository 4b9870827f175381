//! Model-specific registers a vCPU starts with.
//!
//! KVM resets all others to what a CPU has after reset, which for 64-bit entry
//! is right.

use kvm_bindings::{Msrs, kvm_msr_entry};

const IA32_MISC_ENABLE: u32 = 0x1a0;
const MISC_ENABLE_FAST_STRING: u64 = 1;
const IA32_MTRR_DEF_TYPE: u32 = 0x2ff;
/// MTRRs on, all memory write-back.
const MTRR_ENABLED_WRITE_BACK: u64 = (1 << 11) | 6;

/// The boot-time MSRs as `(index, value)`.
pub const BOOT_MSRS: [(u32, u64); 2] =
    [(IA32_MISC_ENABLE, MISC_ENABLE_FAST_STRING), (IA32_MTRR_DEF_TYPE, MTRR_ENABLED_WRITE_BACK)];

/// A list KVM takes; `None` where it is too long for KVM.
pub fn list(msrs: &[(u32, u64)]) -> Option<Msrs> {
    let entries: Vec<_> =
        msrs.iter().map(|&(index, data)| kvm_msr_entry { index, data, ..Default::default() }).collect();
    Msrs::from_entries(&entries).ok()
}
