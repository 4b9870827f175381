//! One PCI bus, reached by configuration ports (mechanism #1: an address port
//! and a data port).
//!
//! Every device has one function, one memory BAR and message-signalled interrupts
//! only. Device numbers are slots: a device that is added later takes a free one,
//! with the BAR address that belongs to it ([`bar_address`]), so nothing of the
//! others moves; one that is taken out leaves an empty slot, which reads as ones
//! like every other, and a BAR that reads as zeroes until the slot is used again: a
//! driver that was not asked resets the device before it lets go, and waits for the
//! status to be 0. There is no host bridge among them: Linux is told that the ports
//! are there (`pci=conf1`), and a device costs it some fifty accesses to look at.

pub mod config;
pub mod msix;
pub mod virtio;

use std::collections::HashMap;
use std::ops::Range;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError, RwLock};
use std::time::Instant;

use config::TOLD_SIZE;
use rvm_protocol::guest::NET_SLOTS;
use serde::{Deserialize, Serialize};
use thiserror::Error;
use virtio::function::{FunctionError, FunctionState};

use crate::arch::layout::{MP_TABLE_START, PCI_TABLE_START, PCI_WINDOW_END, PCI_WINDOW_START};

/// First configuration port; the address is written to the first four.
pub const CONFIG_ADDRESS_PORT: u16 = 0xcf8;
/// First of the four data ports.
pub const CONFIG_DATA_PORT: u16 = 0xcfc;
/// Last configuration port.
pub const CONFIG_LAST_PORT: u16 = 0xcff;

/// How what a guest is told of the bus begins, at [`PCI_TABLE_START`].
pub const TABLE_MAGIC: &[u8; 16] = b"rvm PCI devices.";

/// Devices a bus has room for.
pub const SLOTS: usize = 32;
/// Address space kept for the BAR of each slot.
const BAR_SPACING: u64 = 1 << 20;

const _: () = assert!(PCI_WINDOW_START + SLOTS as u64 * BAR_SPACING <= PCI_WINDOW_END);

/// Where the BAR of the device in `slot` lies before the guest moves it.
pub fn bar_address(slot: usize) -> u64 {
    PCI_WINDOW_START + slot as u64 * BAR_SPACING
}

/// Where a guest is told of the function in `slot`: what
/// [`ConfigSpace::told`](config::ConfigSpace::told) says, before the function is there.
/// Our guest kernel believes it of the first it finds in a slot, and spares the accesses; others do
/// not look.
pub fn table_entry(slot: usize) -> u64 {
    PCI_TABLE_START + (TABLE_MAGIC.len() + slot * TOLD_SIZE) as u64
}

const _: () = assert!(NET_SLOTS.end as usize <= SLOTS);
const _: () = assert!(PCI_TABLE_START + (TABLE_MAGIC.len() + SLOTS * TOLD_SIZE) as u64 <= MP_TABLE_START);

/// The bus has no free slot.
#[derive(Debug, Error)]
#[error("the PCI bus has room for {} devices and {} network interfaces", NET_SLOTS.start, NET_SLOTS.len())]
pub struct BusFull;

/// The bus as it was.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct BusState {
    address: u32,
    /// Slots and what is in them.
    functions: Vec<(usize, FunctionState)>,
}

/// A device's only function.
pub trait PciFunction: Send {
    /// Reads configuration space; `offset + data.len()` is at most 256.
    fn read_config(&mut self, offset: usize, data: &mut [u8]);

    /// Writes configuration space; `offset + data.len()` is at most 256.
    fn write_config(&mut self, offset: usize, data: &[u8]);

    /// The addresses its memory BAR answers to at present.
    fn memory(&self) -> Option<Range<u64>> {
        None
    }

    /// Reads from its BAR.
    fn read_memory(&mut self, _offset: u64, data: &mut [u8]) {
        data.fill(0xff);
    }

    /// Writes to its BAR.
    fn write_memory(&mut self, _offset: u64, _data: &[u8]) {}

    /// What it is, nothing of it being at work.
    fn save(&self) -> Result<FunctionState, FunctionError> {
        Err(FunctionError::State)
    }

    /// Takes on, and to work again, what such a function saved.
    fn restore(&mut self, _state: FunctionState) -> Result<(), FunctionError> {
        Err(FunctionError::State)
    }

    /// Asks what works behind it to stand still, for [`PciFunction::wait`].
    fn pause(&mut self) {}

    /// Lets what stands still go on.
    fn resume(&mut self) {}

    /// Waits until nothing is at work; false if something still is at `until`.
    fn wait(&mut self, _until: Instant) -> bool {
        true
    }

    /// Stops what works behind it; the machine is ending.
    fn shut_down(&mut self) {}

    /// Waits for that; what still is at work at `until` is left behind.
    fn wait_for_end(&mut self, _until: Instant) {}
}

type Slot = Mutex<Option<Box<dyn PciFunction>>>;

/// The bus.
pub struct PciBus {
    /// The last address written to [`CONFIG_ADDRESS_PORT`].
    address: AtomicU32,
    slots: [Slot; SLOTS],
    /// Which addresses belong to which slot, those of empty slots last; never held
    /// together with a slot's lock except by a change of that slot's BAR.
    windows: RwLock<Vec<(Range<u64>, usize)>>,
}

impl Default for PciBus {
    fn default() -> Self {
        Self {
            address: AtomicU32::new(0),
            slots: std::array::from_fn(|_| Mutex::new(None)),
            windows: RwLock::new(Vec::new()),
        }
    }
}

impl PciBus {
    /// Adds the function `make` makes for the lowest free slot that is not kept for
    /// network interfaces.
    pub fn add<E: From<BusFull>>(
        &self,
        make: impl FnOnce(usize) -> Result<Box<dyn PciFunction>, E>,
    ) -> Result<usize, E> {
        let free = (0..usize::from(NET_SLOTS.start)).find(|&i| self.lock(i).is_none()).ok_or(BusFull)?;
        self.add_at(free, make)?;
        Ok(free)
    }

    /// Adds the function `make` makes for the slot `index`, which is free.
    pub fn add_at<E: From<BusFull>>(
        &self,
        index: usize,
        make: impl FnOnce(usize) -> Result<Box<dyn PciFunction>, E>,
    ) -> Result<(), E> {
        let free = self.slots.get(index).is_some() && self.lock(index).is_none();
        let function = make(free.then_some(index).ok_or(BusFull)?)?;
        let mut slot = self.lock(index);
        self.update_window(index, function.memory());
        *slot = Some(function);
        Ok(())
    }

    /// Takes the function out of a slot; whoever reads its configuration from now on
    /// reads ones, and zeroes where its BAR was.
    /// It is stopped by dropping it, which no access to the bus waits for.
    pub fn remove(&self, slot: usize) -> Option<Box<dyn PciFunction>> {
        let mut place = self.lock(slot);
        let mut windows = self.windows.write().unwrap_or_else(PoisonError::into_inner);
        // In the way of no other that the guest puts there.
        windows.sort_by_key(|(_, other)| *other == slot);
        place.take()
    }

    /// The bus and what is on it; the slot of what cannot be saved, and why.
    pub fn save(&self) -> Result<BusState, (usize, FunctionError)> {
        let mut functions = Vec::new();
        for index in 0..SLOTS {
            if let Some(function) = self.lock(index).as_ref() {
                functions.push((index, function.save().map_err(|error| (index, error))?));
            }
        }
        Ok(BusState { address: self.address.load(Ordering::Relaxed), functions })
    }

    /// Takes on a saved state of a bus with such functions in the same slots; the
    /// slot where another is, or none, and why.
    pub fn restore(&self, state: BusState) -> Result<(), (usize, FunctionError)> {
        self.address.store(state.address, Ordering::Relaxed);
        let mut saved: HashMap<usize, FunctionState> = state.functions.into_iter().collect();
        for index in 0..SLOTS {
            let mut slot = self.lock(index);
            match (slot.as_mut(), saved.remove(&index)) {
                (None, None) => {}
                (Some(function), Some(state)) => {
                    function.restore(state).map_err(|error| (index, error))?;
                    self.update_window(index, function.memory());
                }
                _ => return Err((index, FunctionError::State)),
            }
        }
        match saved.into_keys().next() {
            Some(index) => Err((index, FunctionError::State)),
            None => Ok(()),
        }
    }

    /// Has everything behind the bus stand still; false, and everything goes on, if
    /// something is still at work at `until`.
    pub fn pause(&self, until: Instant) -> bool {
        self.each(|function| function.pause());
        let mut still = true;
        self.each(|function| still &= function.wait(until));
        if !still {
            self.resume();
        }
        still
    }

    /// Lets what stands still go on.
    pub fn resume(&self) {
        self.each(|function| function.resume());
    }

    /// Stops everything behind the bus, all at once, and waits for it until `until`.
    pub fn shut_down(&self, until: Instant) {
        self.each(|function| function.shut_down());
        self.each(|function| function.wait_for_end(until));
    }

    fn each(&self, mut act: impl FnMut(&mut dyn PciFunction)) {
        for index in 0..SLOTS {
            if let Some(function) = self.lock(index).as_mut() {
                act(function.as_mut());
            }
        }
    }

    /// Reads a configuration port.
    pub fn read_port(&self, port: u16, data: &mut [u8]) {
        data.fill(0xff);
        if port < CONFIG_DATA_PORT {
            if port == CONFIG_ADDRESS_PORT && data.len() == 4 {
                data.copy_from_slice(&self.address.load(Ordering::Relaxed).to_le_bytes());
            }
        } else if let Some((slot, offset)) = self.target(port, data.len())
            && let Some(function) = self.lock(slot).as_mut()
        {
            function.read_config(offset, data);
        }
    }

    /// Writes a configuration port.
    pub fn write_port(&self, port: u16, data: &[u8]) {
        if port < CONFIG_DATA_PORT {
            // Narrower accesses are not configuration accesses (PCI 3.0, 3.2.2.3.2).
            if let (CONFIG_ADDRESS_PORT, Ok(bytes)) = (port, data.try_into()) {
                self.address.store(u32::from_le_bytes(bytes), Ordering::Relaxed);
            }
        } else if let Some((slot, offset)) = self.target(port, data.len())
            && let Some(function) = self.lock(slot).as_mut()
        {
            let before = function.memory();
            function.write_config(offset, data);
            let after = function.memory();
            if before != after {
                self.update_window(slot, after);
            }
        }
    }

    /// Reads from the device whose BAR has `address`; false where none has or had.
    pub fn read_memory(&self, address: u64, data: &mut [u8]) -> bool {
        self.with_memory(address, |function, offset| match function {
            Some(function) => function.read_memory(offset, data),
            None => data.fill(0),
        })
    }

    /// Writes to the device whose BAR has `address`; false where none has or had.
    pub fn write_memory(&self, address: u64, data: &[u8]) -> bool {
        self.with_memory(address, |function, offset| {
            if let Some(function) = function {
                function.write_memory(offset, data);
            }
        })
    }

    /// None of the function, where it has been taken out.
    fn with_memory(&self, address: u64, access: impl FnOnce(Option<&mut Box<dyn PciFunction>>, u64)) -> bool {
        let found = {
            let windows = self.windows.read().unwrap_or_else(PoisonError::into_inner);
            windows
                .iter()
                .find(|(range, _)| range.contains(&address))
                .map(|(range, slot)| (range.start, *slot))
        };
        let Some((start, slot)) = found else { return false };
        access(self.lock(slot).as_mut(), address - start);
        true
    }

    /// Slot and register the address port selects; `None` where no function can be.
    fn target(&self, port: u16, len: usize) -> Option<(usize, usize)> {
        const ENABLE: u32 = 1 << 31;
        const BUS_AND_FUNCTION: u32 = 0x00ff_0700;
        let address = self.address.load(Ordering::Relaxed);
        if address & ENABLE == 0 || address & BUS_AND_FUNCTION != 0 {
            return None;
        }
        let within = usize::from(port - CONFIG_DATA_PORT);
        let offset = (address & 0xfc) as usize + within;
        (within + len <= 4).then_some(((address >> 11) as usize & (SLOTS - 1), offset))
    }

    fn update_window(&self, slot: usize, memory: Option<Range<u64>>) {
        let mut windows = self.windows.write().unwrap_or_else(PoisonError::into_inner);
        windows.retain(|(_, other)| *other != slot);
        if let Some(range) = memory {
            windows.insert(0, (range, slot));
        }
    }

    fn lock(&self, slot: usize) -> MutexGuard<'_, Option<Box<dyn PciFunction>>> {
        self.slots[slot].lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::config::{ConfigSpace, Identity};
    use super::*;

    struct Memory {
        config: ConfigSpace,
        byte: u8,
    }

    impl PciFunction for Memory {
        fn read_config(&mut self, offset: usize, data: &mut [u8]) {
            self.config.read(offset, data);
        }

        fn write_config(&mut self, offset: usize, data: &[u8]) {
            self.config.write(offset, data);
        }

        fn memory(&self) -> Option<Range<u64>> {
            self.config.memory()
        }

        fn read_memory(&mut self, _: u64, data: &mut [u8]) {
            data.fill(self.byte);
        }
    }

    fn bus() -> PciBus {
        let bus = PciBus::default();
        for byte in [0, 1, 2] {
            let make = |slot| {
                let mut config = ConfigSpace::new(&Identity::default());
                config.set_memory_bar(0x4000, bar_address(slot));
                Ok(Box::new(Memory { config, byte }) as Box<dyn PciFunction>)
            };
            bus.add::<BusFull>(make).unwrap();
        }
        bus
    }

    fn read(bus: &PciBus, slot: u32, register: u32) -> u32 {
        bus.write_port(CONFIG_ADDRESS_PORT, &(0x8000_0000 | slot << 11 | register).to_le_bytes());
        let mut data = [0; 4];
        bus.read_port(CONFIG_DATA_PORT, &mut data);
        u32::from_le_bytes(data)
    }

    fn write(bus: &PciBus, slot: u32, register: u32, value: u32) {
        bus.write_port(CONFIG_ADDRESS_PORT, &(0x8000_0000 | slot << 11 | register).to_le_bytes());
        bus.write_port(CONFIG_DATA_PORT, &value.to_le_bytes());
    }

    #[test]
    fn empty_slots_and_other_buses_read_as_ones() {
        let bus = bus();
        assert_eq!(read(&bus, 2, 0), 0);
        assert_eq!(read(&bus, 3, 0), u32::MAX);
        assert_eq!(read(&bus, 1 << 5 | 1, 0), u32::MAX, "bus 1");
        bus.write_port(CONFIG_ADDRESS_PORT, &0u32.to_le_bytes());
        let mut data = [0; 4];
        bus.read_port(CONFIG_DATA_PORT, &mut data);
        assert_eq!(data, [0xff; 4], "disabled");
        bus.read_port(CONFIG_ADDRESS_PORT, &mut data);
        assert_eq!(data, [0; 4]);
    }

    #[test]
    fn accesses_across_the_data_ports_reach_nothing() {
        let bus = bus();
        bus.write_port(CONFIG_ADDRESS_PORT, &0x8000_00fcu32.to_le_bytes());
        let mut data = [0; 4];
        bus.read_port(CONFIG_LAST_PORT, &mut data);
        assert_eq!(data, [0xff; 4]);
        bus.write_port(CONFIG_LAST_PORT, &[0; 4]);
        bus.write_port(CONFIG_DATA_PORT, &[0; 4096]);
    }

    #[test]
    fn bars_answer_where_the_guest_puts_them() {
        let bus = bus();
        let at = |address: u64| {
            let mut byte = [0];
            bus.read_memory(address, &mut byte).then_some(byte[0])
        };
        assert_eq!(at(bar_address(1)), None, "decoding is off until the guest turns it on");
        write(&bus, 1, 4, 2);
        write(&bus, 2, 4, 2);
        assert_eq!((at(bar_address(1)), at(bar_address(2) + 0x3fff)), (Some(1), Some(2)));
        assert_eq!(at(bar_address(2) + 0x4000), None);

        write(&bus, 1, 0x10, 0xffff_ffff);
        assert_eq!(read(&bus, 1, 0x10), 0xffff_c000, "the size is told by the bits that stay 0");
        write(&bus, 1, 0x10, 0xd000_0000);
        assert_eq!((at(0xd000_0000), at(bar_address(1))), (Some(1), None));
        write(&bus, 1, 4, 0);
        assert_eq!(at(0xd000_0000), None);
    }

    #[test]
    fn a_bar_whose_device_was_taken_out_reads_as_reset() {
        let bus = bus();
        let at = |address: u64| {
            let mut byte = [7];
            bus.read_memory(address, &mut byte).then_some(byte[0])
        };
        write(&bus, 1, 4, 2);
        write(&bus, 2, 4, 2);
        drop(bus.remove(1).unwrap());
        assert_eq!(read(&bus, 1, 0), u32::MAX);
        assert_eq!((at(bar_address(1)), at(bar_address(2))), (Some(0), Some(2)));
        assert!(bus.write_memory(bar_address(1), &[1]));
        // Another that is put where it was.
        write(&bus, 2, 0x10, bar_address(1) as u32);
        assert_eq!(at(bar_address(1)), Some(2));
        // The slot is used again.
        let make = |slot| {
            let mut config = ConfigSpace::new(&Identity::default());
            config.set_memory_bar(0x4000, bar_address(slot));
            Ok(Box::new(Memory { config, byte: 9 }) as Box<dyn PciFunction>)
        };
        assert_eq!(bus.add::<BusFull>(make).unwrap(), 1);
        write(&bus, 2, 0x10, bar_address(2) as u32);
        assert_eq!(at(bar_address(1)), None, "decoding is off");
    }
}
