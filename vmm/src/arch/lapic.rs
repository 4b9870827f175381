//! The local APIC's interrupt lines in virtual wire mode (Intel MP
//! specification 3.6.2.2): LINT0 takes the PIC's interrupts, LINT1 is NMI.

use kvm_bindings::kvm_lapic_state;

const LVT_LINT0: usize = 0x350;
const LVT_LINT1: usize = 0x360;
const DELIVERY_MODE_SHIFT: u32 = 8;
const DELIVERY_MODE_MASK: u32 = 0b111 << DELIVERY_MODE_SHIFT;
const MODE_NMI: u32 = 0b100;
const MODE_EXTINT: u32 = 0b111;

/// Sets the delivery modes of both lines.
pub fn set_virtual_wire(lapic: &mut kvm_lapic_state) {
    set_delivery_mode(lapic, LVT_LINT0, MODE_EXTINT);
    set_delivery_mode(lapic, LVT_LINT1, MODE_NMI);
}

fn set_delivery_mode(lapic: &mut kvm_lapic_state, offset: usize, mode: u32) {
    let mut register = [0; 4];
    for (byte, value) in register.iter_mut().zip(&lapic.regs[offset..offset + 4]) {
        *byte = *value as u8;
    }
    let value = (u32::from_le_bytes(register) & !DELIVERY_MODE_MASK) | (mode << DELIVERY_MODE_SHIFT);
    for (slot, byte) in lapic.regs[offset..offset + 4].iter_mut().zip(value.to_le_bytes()) {
        *slot = byte as _;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn modes_are_set_and_the_rest_is_kept() {
        let mut lapic = kvm_lapic_state::default();
        lapic.regs[LVT_LINT0] = 0x55;
        lapic.regs[LVT_LINT0 + 2] = 1;
        set_virtual_wire(&mut lapic);
        assert_eq!(lapic.regs[LVT_LINT0..LVT_LINT0 + 4], [0x55, 0x07, 1, 0]);
        assert_eq!(lapic.regs[LVT_LINT1..LVT_LINT1 + 4], [0, 0x04, 0, 0]);
    }
}
