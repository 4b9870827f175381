//! The VM's interrupt routes: fixed ones to the PICs' lines, and one per
//! MSI-X vector.

use std::io;
use std::os::fd::AsRawFd;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

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
    /// Of the numbers from [`PIC_LINES`] on.
    numbers: Mutex<Vec<Number>>,
}

/// What an interrupt number is used for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Number {
    Free,
    /// Given out, leading nowhere.
    Unrouted,
    Routed(MsiMessage),
}

/// An interrupt number of its own for a message-signalled interrupt, and the
/// eventfd that raises it while it is connected (an irqfd). Dropping it frees the
/// number.
pub struct MsiLine {
    routes: Arc<IrqRoutes>,
    gsi: u32,
    event: EventFd,
    /// Changed by one thread at a time.
    connected: AtomicBool,
}

impl IrqRoutes {
    /// Routes of a new VM, where KVM has already routed the PICs' lines.
    pub fn new(vm: Arc<VmFd>) -> Self {
        Self { vm, numbers: Mutex::new(Vec::new()) }
    }

    /// An eventfd that raises the PICs' `line`.
    pub fn connect_line(&self, line: u32) -> Result<EventFd, IrqError> {
        let event = new_event()?;
        self.vm.register_irqfd(&event, line).map_err(|e| IrqError::Kvm("KVM_IRQFD", e))?;
        Ok(event)
    }

    /// A number for a message-signalled interrupt, neither routed nor connected.
    pub fn allocate_msi(self: &Arc<Self>) -> Result<MsiLine, IrqError> {
        let event = new_event()?;
        let mut numbers = self.numbers();
        let index = match numbers.iter().position(|number| *number == Number::Free) {
            Some(free) => {
                numbers[free] = Number::Unrouted;
                free
            }
            None if numbers.len() + PIC_LINES as usize >= KVM_MAX_IRQ_ROUTES => {
                return Err(IrqError::Exhausted);
            }
            None => {
                numbers.push(Number::Unrouted);
                numbers.len() - 1
            }
        };
        drop(numbers);
        Ok(MsiLine {
            routes: Arc::clone(self),
            gsi: PIC_LINES + index as u32,
            event,
            connected: AtomicBool::new(false),
        })
    }

    /// Routes several lines at once; KVM waits for running interrupts on every
    /// change of its table.
    pub fn set_messages<'a>(
        &self,
        changes: impl IntoIterator<Item = (&'a MsiLine, MsiMessage)>,
    ) -> Result<(), IrqError> {
        let mut numbers = self.numbers();
        let mut changed = false;
        for (line, message) in changes {
            let number = &mut numbers[(line.gsi - PIC_LINES) as usize];
            changed |= *number != Number::Routed(message);
            *number = Number::Routed(message);
        }
        if !changed {
            return Ok(());
        }
        let messages = numbers.iter().zip(PIC_LINES..).filter_map(|(number, gsi)| match number {
            Number::Routed(message) => Some(message_route(gsi, *message)),
            Number::Free | Number::Unrouted => None,
        });
        let entries: Vec<_> = (0..PIC_LINES).map(line_route).chain(messages).collect();
        let table = KvmIrqRouting::from_entries(&entries).map_err(|_| IrqError::Exhausted)?;
        self.vm.set_gsi_routing(&table).map_err(|e| IrqError::Kvm("KVM_SET_GSI_ROUTING", e))
    }

    fn numbers(&self) -> MutexGuard<'_, Vec<Number>> {
        self.numbers.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl MsiLine {
    /// What raises it: in the guest while it is connected; else it is remembered
    /// until it is. Others (vhost) may be given a copy.
    pub fn event(&self) -> &EventFd {
        &self.event
    }

    /// Whether it has been raised and not been delivered.
    pub fn is_pending(&self) -> bool {
        let mut poll = libc::pollfd { fd: self.event.as_raw_fd(), events: libc::POLLIN, revents: 0 };
        // SAFETY: one valid pollfd, and no waiting.
        let ready = unsafe { libc::poll(&raw mut poll, 1, 0) };
        !self.is_connected() && ready == 1
    }

    fn is_connected(&self) -> bool {
        self.connected.load(Ordering::Acquire)
    }

    /// Has KVM deliver what raises it, also what has raised it before. It has a route.
    pub fn connect(&self) -> Result<(), IrqError> {
        if !self.is_connected() {
            self.routes
                .vm
                .register_irqfd(&self.event, self.gsi)
                .map_err(|e| IrqError::Kvm("KVM_IRQFD", e))?;
            self.connected.store(true, Ordering::Release);
        }
        Ok(())
    }

    /// Takes it off KVM; what raises it from now on waits.
    pub fn disconnect(&self) -> Result<(), IrqError> {
        if self.is_connected() {
            self.routes
                .vm
                .unregister_irqfd(&self.event, self.gsi)
                .map_err(|e| IrqError::Kvm("KVM_IRQFD", e))?;
            self.connected.store(false, Ordering::Release);
        }
        Ok(())
    }
}

impl Drop for MsiLine {
    fn drop(&mut self) {
        if let Err(e) = self.disconnect() {
            // KVM may still use the number: it is not given out again.
            return log::error!("interrupt {}: {e}", self.gsi);
        }
        self.routes.numbers()[(self.gsi - PIC_LINES) as usize] = Number::Free;
    }
}

fn new_event() -> Result<EventFd, IrqError> {
    EventFd::new(libc::EFD_CLOEXEC | libc::EFD_NONBLOCK).map_err(IrqError::EventFd)
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

    const MESSAGE: MsiMessage = MsiMessage { address_low: 0xfee0_0000, address_high: 0, data: 0x41 };

    #[test]
    fn every_vector_gets_its_own_number_until_it_is_dropped() {
        let vm = Host::open().unwrap().create_vm(1).unwrap();
        let first = vm.routes.allocate_msi().unwrap();
        let second = vm.routes.allocate_msi().unwrap();
        assert_eq!((first.gsi, second.gsi), (PIC_LINES, PIC_LINES + 1));
        vm.routes.set_messages([(&first, MESSAGE), (&second, MESSAGE)]).unwrap();
        drop(first);
        assert_eq!(vm.routes.allocate_msi().unwrap().gsi, PIC_LINES);
        for _ in 0..2 * KVM_MAX_IRQ_ROUTES {
            let line = vm.routes.allocate_msi().unwrap();
            vm.routes.set_messages([(&line, MESSAGE)]).unwrap();
            line.connect().unwrap();
        }
    }

    #[test]
    fn what_raises_a_line_that_is_not_connected_waits() {
        let vm = Host::open().unwrap().create_vm(1).unwrap();
        let line = vm.routes.allocate_msi().unwrap();
        assert!(!line.is_pending());
        line.event().write(1).unwrap();
        assert!(line.is_pending() && line.is_pending());
        vm.routes.set_messages([(&line, MESSAGE)]).unwrap();
        line.connect().unwrap();
        line.event().write(1).unwrap();
        line.disconnect().unwrap();
        assert!(!line.is_pending(), "KVM took it");
        line.event().write(1).unwrap();
        assert!(line.is_pending());
    }
}
