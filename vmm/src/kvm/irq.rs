//! The VM's interrupt routes: fixed ones to the PICs' lines, and one per
//! MSI-X vector.

use std::io;
use std::sync::{Arc, Mutex, PoisonError};

use kvm_bindings::{
    KVM_IRQ_ROUTING_IRQCHIP, KVM_IRQ_ROUTING_MSI, KVM_IRQCHIP_PIC_MASTER, KVM_IRQCHIP_PIC_SLAVE,
    KVM_MAX_IRQ_ROUTES, KvmIrqRouting, kvm_irq_routing_entry, kvm_irq_routing_entry__bindgen_ty_1,
    kvm_irq_routing_irqchip, kvm_irq_routing_msi,
};
use kvm_ioctls::VmFd;
use serde::{Deserialize, Serialize};
use thiserror::Error;
use vmm_sys_util::eventfd::EventFd;

use crate::arch::layout::PIC_LINES;

/// Why an interrupt could not be set up.
#[derive(Debug, Error)]
pub enum IrqError {
    /// KVM has no room for another route.
    #[error("no interrupt route is left")]
    Exhausted,
    /// KVM refused.
    #[error("KVM refused {0}")]
    Kvm(&'static str, #[source] vmm_sys_util::errno::Error),
    /// The eventfd could not be created.
    #[error("an eventfd could not be created")]
    EventFd(#[source] io::Error),
}

/// Where a message-signalled interrupt goes: what its sender writes, and to
/// which address.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct MsiMessage {
    /// Low half of the address.
    pub address_low: u32,
    /// High half of the address.
    pub address_high: u32,
    /// The data.
    pub data: u32,
}

/// Routes from interrupt numbers (GSIs) to interrupt controllers.
pub struct IrqRoutes {
    vm: Arc<VmFd>,
    /// Routes of the numbers from [`PIC_LINES`] on.
    messages: Mutex<Vec<Option<MsiMessage>>>,
}

impl IrqRoutes {
    /// Routes of a new VM, where KVM has already routed the PICs' lines.
    pub fn new(vm: Arc<VmFd>) -> Self {
        Self { vm, messages: Mutex::new(Vec::new()) }
    }

    /// An eventfd that raises the PICs' `line`.
    pub fn connect_line(&self, line: u32) -> Result<EventFd, IrqError> {
        self.connect(line)
    }

    /// A number for a message-signalled interrupt, not yet routed, and the
    /// eventfd that raises it.
    pub fn allocate_msi(&self) -> Result<(u32, EventFd), IrqError> {
        let gsi = {
            let mut messages = self.messages.lock().unwrap_or_else(PoisonError::into_inner);
            if messages.len() + PIC_LINES as usize >= KVM_MAX_IRQ_ROUTES {
                return Err(IrqError::Exhausted);
            }
            messages.push(None);
            PIC_LINES + messages.len() as u32 - 1
        };
        Ok((gsi, self.connect(gsi)?))
    }

    fn connect(&self, gsi: u32) -> Result<EventFd, IrqError> {
        let fd = EventFd::new(libc::EFD_CLOEXEC | libc::EFD_NONBLOCK).map_err(IrqError::EventFd)?;
        self.vm.register_irqfd(&fd, gsi).map_err(|e| IrqError::Kvm("KVM_IRQFD", e))?;
        Ok(fd)
    }

    /// Routes several numbers from [`allocate_msi`](Self::allocate_msi) at once;
    /// KVM waits for running interrupts on every change of its table.
    pub fn set_messages(&self, changes: &[(u32, MsiMessage)]) -> Result<(), IrqError> {
        let mut messages = self.messages.lock().unwrap_or_else(PoisonError::into_inner);
        let mut changed = false;
        for &(gsi, message) in changes {
            let slot = gsi.checked_sub(PIC_LINES).and_then(|i| messages.get_mut(i as usize));
            let Some(slot) = slot else { return Err(IrqError::Exhausted) };
            changed |= *slot != Some(message);
            *slot = Some(message);
        }
        if !changed {
            return Ok(());
        }
        let entries: Vec<_> = (0..PIC_LINES)
            .map(line_route)
            .chain(messages.iter().zip(PIC_LINES..).filter_map(|(m, gsi)| m.map(|m| message_route(gsi, m))))
            .collect();
        let table = KvmIrqRouting::from_entries(&entries).map_err(|_| IrqError::Exhausted)?;
        self.vm.set_gsi_routing(&table).map_err(|e| IrqError::Kvm("KVM_SET_GSI_ROUTING", e))
    }
}

fn line_route(line: u32) -> kvm_irq_routing_entry {
    let (irqchip, pin) =
        if line < 8 { (KVM_IRQCHIP_PIC_MASTER, line) } else { (KVM_IRQCHIP_PIC_SLAVE, line - 8) };
    kvm_irq_routing_entry {
        gsi: line,
        type_: KVM_IRQ_ROUTING_IRQCHIP,
        u: kvm_irq_routing_entry__bindgen_ty_1 { irqchip: kvm_irq_routing_irqchip { irqchip, pin } },
        ..Default::default()
    }
}

fn message_route(gsi: u32, message: MsiMessage) -> kvm_irq_routing_entry {
    kvm_irq_routing_entry {
        gsi,
        type_: KVM_IRQ_ROUTING_MSI,
        u: kvm_irq_routing_entry__bindgen_ty_1 {
            msi: kvm_irq_routing_msi {
                address_lo: message.address_low,
                address_hi: message.address_high,
                data: message.data,
                ..Default::default()
            },
        },
        ..Default::default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kvm::Host;

    #[test]
    fn every_vector_gets_its_own_number() {
        let vm = Host::open().unwrap().create_vm(1).unwrap();
        let message = MsiMessage { address_low: 0xfee0_0000, address_high: 0, data: 0x41 };
        let (first, _fd1) = vm.routes.allocate_msi().unwrap();
        let (second, _fd2) = vm.routes.allocate_msi().unwrap();
        assert_eq!((first, second), (PIC_LINES, PIC_LINES + 1));
        vm.routes.set_messages(&[(first, message), (second, message)]).unwrap();
        assert!(vm.routes.set_messages(&[(second + 1, message)]).is_err());
        assert!(vm.routes.set_messages(&[(0, message)]).is_err());
    }
}
