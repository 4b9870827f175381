//! The devices as a vCPU sees them: ports and memory addresses.

use std::sync::{Arc, Mutex, PoisonError};

use crate::arch::layout::SERIAL_PORT;
use crate::devices::legacy::i8042;
use crate::devices::legacy::serial::{PORTS as SERIAL_PORTS, Serial};
use crate::kvm::Vm;
use crate::kvm::coalesced::Target;
use crate::pci::{CONFIG_ADDRESS_PORT, CONFIG_LAST_PORT, PciBus};

const SERIAL_LAST_PORT: u16 = SERIAL_PORT + SERIAL_PORTS - 1;

/// What an access belonged to, for the exit counters.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Access {
    /// PCI configuration space.
    PciConfig,
    /// The serial console.
    Serial,
    /// Another port.
    OtherPort,
    /// The reset line was pulled.
    Reset,
}

/// Everything on the machine's buses.
pub struct Buses {
    /// The PCI bus.
    pub pci: PciBus,
    /// The serial console.
    pub serial: Mutex<Serial>,
    /// The VM, which holds the writes that have not taken effect yet.
    pub vm: Arc<Vm>,
}

impl Buses {
    /// Lets the writes that caused no exit take effect; call it first on every exit.
    pub fn catch_up(&self) {
        if let Some(posted) = self.vm.posted() {
            posted.drain(|target, data| match target {
                Target::Port(port) => {
                    self.write_port(port, data);
                }
                Target::Memory(address) => self.write_memory(address, data),
            });
        }
    }

    /// Reads a port; one without a device reads as ones.
    pub fn read_port(&self, port: u16, data: &mut [u8]) -> Access {
        match port {
            CONFIG_ADDRESS_PORT..=CONFIG_LAST_PORT => {
                self.pci.read_port(port, data);
                Access::PciConfig
            }
            SERIAL_PORT..=SERIAL_LAST_PORT => {
                let mut serial = self.serial.lock().unwrap_or_else(PoisonError::into_inner);
                data.iter_mut().for_each(|byte| *byte = serial.read(port - SERIAL_PORT));
                Access::Serial
            }
            i8042::DATA_PORT | i8042::COMMAND_PORT => {
                i8042::read(data);
                Access::OtherPort
            }
            _ => {
                data.fill(0xff);
                Access::OtherPort
            }
        }
    }

    /// Writes a port; one without a device takes everything.
    pub fn write_port(&self, port: u16, data: &[u8]) -> Access {
        match port {
            CONFIG_ADDRESS_PORT..=CONFIG_LAST_PORT => {
                self.pci.write_port(port, data);
                Access::PciConfig
            }
            SERIAL_PORT..=SERIAL_LAST_PORT => {
                let mut serial = self.serial.lock().unwrap_or_else(PoisonError::into_inner);
                for byte in data {
                    if let Err(e) = serial.write(port - SERIAL_PORT, *byte) {
                        serial.discard_output(&e);
                    }
                }
                Access::Serial
            }
            _ if i8042::is_reset(port, data) => Access::Reset,
            _ => Access::OtherPort,
        }
    }

    /// Reads device memory; what belongs to no device reads as ones.
    pub fn read_memory(&self, address: u64, data: &mut [u8]) {
        if !self.pci.read_memory(address, data) {
            data.fill(0xff);
        }
    }

    /// Writes device memory.
    pub fn write_memory(&self, address: u64, data: &[u8]) {
        self.pci.write_memory(address, data);
    }
}
