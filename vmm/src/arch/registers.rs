//! Registers of the boot vCPU at the kernel's 64-bit entry point.

use kvm_bindings::{kvm_dtable, kvm_fpu, kvm_regs, kvm_segment, kvm_sregs};

use super::layout::{BOOT_PARAMS_START, GDT_START};
use crate::boot::params::GDT;

const CR0_PE: u64 = 1;
const CR0_PG: u64 = 1 << 31;
const CR4_PAE: u64 = 1 << 5;
const EFER_LME: u64 = 1 << 8;
const EFER_LMA: u64 = 1 << 10;
const BOOT_CS: u16 = 0x10;
const BOOT_DS: u16 = 0x18;

/// General registers: interrupts off, RSI = `boot_params`.
pub fn boot_regs(entry: u64) -> kvm_regs {
    kvm_regs { rip: entry, rsi: BOOT_PARAMS_START, rflags: 2, ..Default::default() }
}

/// x87 and SSE state after FNINIT and reset of MXCSR.
pub fn boot_fpu() -> kvm_fpu {
    kvm_fpu { fcw: 0x37f, mxcsr: 0x1f80, ..Default::default() }
}

/// Changes reset state to long mode with flat segments and the page tables at `pml4`.
pub fn set_boot_sregs(sregs: &mut kvm_sregs, pml4: u64) {
    let code = segment(BOOT_CS);
    let data = segment(BOOT_DS);
    sregs.cs = code;
    (sregs.ds, sregs.es, sregs.fs, sregs.gs, sregs.ss) = (data, data, data, data, data);
    sregs.gdt = kvm_dtable { base: GDT_START, limit: (GDT.len() * 8 - 1) as u16, ..Default::default() };
    sregs.idt = kvm_dtable::default();
    sregs.cr0 |= CR0_PE | CR0_PG;
    sregs.cr3 = pml4;
    sregs.cr4 |= CR4_PAE;
    sregs.efer |= EFER_LME | EFER_LMA;
}

/// What loading `selector` from the boot GDT would give.
fn segment(selector: u16) -> kvm_segment {
    let descriptor = GDT[usize::from(selector / 8)];
    let bits = |shift: u32, mask: u64| ((descriptor >> shift) & mask) as u8;
    kvm_segment {
        base: 0,
        // Granularity is set: the limit counts pages.
        limit: u32::MAX,
        selector,
        type_: bits(40, 0xf),
        s: bits(44, 1),
        dpl: bits(45, 3),
        present: bits(47, 1),
        l: bits(53, 1),
        db: bits(54, 1),
        g: bits(55, 1),
        ..Default::default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn code_segment_is_64_bit_and_data_is_flat() {
        let mut sregs = kvm_sregs::default();
        set_boot_sregs(&mut sregs, 0x9000);
        assert_eq!(
            (sregs.cs.l, sregs.cs.db, sregs.cs.s, sregs.cs.present, sregs.cs.type_),
            (1, 0, 1, 1, 0xb)
        );
        assert_eq!((sregs.ds.l, sregs.ds.db, sregs.ds.g, sregs.ds.type_), (0, 1, 1, 3));
        assert_eq!(sregs.efer, EFER_LME | EFER_LMA);
    }
}
