//! What KVM keeps for a VM as a whole: interrupt controllers and clock.

use kvm_bindings::{
    KVM_IRQCHIP_IOAPIC, KVM_IRQCHIP_PIC_MASTER, KVM_IRQCHIP_PIC_SLAVE, kvm_clock_data, kvm_irqchip,
};
use kvm_ioctls::VmFd;
use serde::{Deserialize, Serialize};

use super::KvmError;

const CHIPS: [u32; 3] = [KVM_IRQCHIP_PIC_MASTER, KVM_IRQCHIP_PIC_SLAVE, KVM_IRQCHIP_IOAPIC];

/// The state of a VM whose vCPUs are paused. Interrupt routes belong to the
/// devices, which set them again from their own state.
#[derive(Debug, Serialize, Deserialize)]
pub struct VmState {
    chips: Vec<kvm_irqchip>,
    /// The guest's time in nanoseconds (KVM's clock).
    clock_ns: u64,
}

impl VmState {
    /// Reads the state.
    pub fn save(fd: &VmFd) -> Result<Self, KvmError> {
        let mut chips = Vec::with_capacity(CHIPS.len());
        for chip_id in CHIPS {
            let mut chip = kvm_irqchip { chip_id, ..Default::default() };
            fd.get_irqchip(&mut chip).map_err(KvmError::request("KVM_GET_IRQCHIP"))?;
            chips.push(chip);
        }
        let clock_ns = fd.get_clock().map_err(KvmError::request("KVM_GET_CLOCK"))?.clock;
        Ok(Self { chips, clock_ns })
    }

    /// Writes the state to a VM whose vCPUs have not run: the guest's time goes
    /// on from where it was saved.
    pub fn restore(&self, fd: &VmFd) -> Result<(), KvmError> {
        for chip in &self.chips {
            fd.set_irqchip(chip).map_err(KvmError::request("KVM_SET_IRQCHIP"))?;
        }
        let clock = kvm_clock_data { clock: self.clock_ns, ..Default::default() };
        fd.set_clock(&clock).map_err(KvmError::request("KVM_SET_CLOCK"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kvm::Host;

    #[test]
    fn state_round_trip() {
        let host = Host::open().unwrap();
        let first = host.create_vm(1).unwrap();
        let mut saved = VmState::save(&first.fd).unwrap();
        // SAFETY: the I/O APIC's member is the one KVM filled in.
        let ioapic = unsafe { &mut saved.chips[2].chip.ioapic };
        ioapic.redirtbl[4].bits = 0x1_0041;
        saved.clock_ns = 3_600_000_000_000;
        let text = serde_json::to_string(&saved).unwrap();

        let second = host.create_vm(1).unwrap();
        let loaded: VmState = serde_json::from_str(&text).unwrap();
        loaded.restore(&second.fd).unwrap();
        let again = VmState::save(&second.fd).unwrap();
        assert_eq!(serde_json::to_value(&again.chips).unwrap(), serde_json::to_value(&saved.chips).unwrap());
        assert!((saved.clock_ns..saved.clock_ns + 60_000_000_000).contains(&again.clock_ns));
    }
}
