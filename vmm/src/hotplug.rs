//! Disks and memory for the running machine.
//!
//! What the machine can grow by is reserved from the start and belongs to nobody
//! ([`memory::ram`](crate::memory::ram)). When its owner first asks for more,
//! the memory device is plugged in, and KVM is given as much of the region as
//! was asked for: a guest that does not care for what the device says has no
//! more than that either.

use std::io;
use std::sync::Arc;

use rvm_protocol::vmm::DiskConfig;
use thiserror::Error;
use vm_memory::GuestMemoryRegion;

use crate::arch::layout;
use crate::devices::virtio::blk::{Blk, BlkError};
use crate::devices::virtio::mem::{BLOCK_BYTES, Mem, MemControl};
use crate::kvm::{KvmError, Vm};
use crate::memory::GuestRam;
use crate::pci::PciBus;
use crate::pci::virtio::function::{self, FunctionError};

/// Pieces in which KVM gets the region, at most: each is a slot of its own, since
/// one that the guest uses cannot be made larger, and KVM had 509 of them in all
/// before Linux 5.12.
const MAX_SLOTS: u64 = 256;

/// Why something was not plugged in.
#[derive(Debug, Error)]
pub enum HotplugError {
    /// More than there is room for, or part of a block.
    #[error("mib: {mib} given; must be a multiple of {block} up to {most} (hotplug_memory_mib)", block = BLOCK_BYTES >> 20)]
    Size {
        /// What was asked for.
        mib: u64,
        /// The largest size.
        most: u64,
    },
    /// The disk cannot be used.
    #[error(transparent)]
    Disk(#[from] BlkError),
    /// KVM did not take the memory.
    #[error(transparent)]
    Kvm(#[from] KvmError),
    /// The device was not plugged in.
    #[error("PCI")]
    Pci(#[from] FunctionError),
    /// The guest was not told.
    #[error("the guest's driver could not be interrupted")]
    Interrupt(#[source] io::Error),
}

/// What has been plugged into the running machine.
pub struct Hotplug {
    memory: GuestRam,
    vm: Arc<Vm>,
    /// The memory device, once it was needed.
    device: Option<MemControl>,
    /// Slots of KVM's given to it.
    slots: u32,
}

impl Hotplug {
    /// Nothing yet.
    pub fn new(memory: GuestRam, vm: Arc<Vm>) -> Self {
        Self { memory, vm, device: None, slots: 0 }
    }

    /// Plugs a disk into `bus`.
    pub fn add_disk(&self, bus: &PciBus, config: &DiskConfig) -> Result<(), HotplugError> {
        let disk = Box::new(Blk::new(config)?);
        let slot = function::attach(bus, disk, &self.memory, &self.vm)?;
        log::info!("disk {} plugged into slot {slot}", config.serial);
        Ok(())
    }

    /// Bytes the guest has plugged.
    pub fn plugged_bytes(&self) -> u64 {
        self.device.as_ref().map_or(0, MemControl::plugged_bytes)
    }

    /// Offers the guest `mib` MiB beside what it started with, or asks for all
    /// above that back; plugs the device into `bus` where it is not there yet.
    pub fn request(&mut self, bus: &PciBus, mib: u64) -> Result<(), HotplugError> {
        let most = self.memory.growing().map_or(0, |region| region.mapped());
        let wanted =
            mib.checked_mul(1 << 20).filter(|bytes| *bytes <= most && bytes.is_multiple_of(BLOCK_BYTES));
        let Some(wanted) = wanted else { return Err(HotplugError::Size { mib, most: most >> 20 }) };
        let granted = self.grant(wanted)?;
        let control = match &self.device {
            Some(control) => control.clone(),
            None if wanted == 0 => return Ok(()),
            None => self.plug_in(bus)?,
        };
        control.request(granted, wanted).map_err(HotplugError::Interrupt)
    }

    /// Lets the guest use at least `wanted` bytes of the region; returns how many
    /// it can use. What it could use before stays so.
    fn grant(&mut self, wanted: u64) -> Result<u64, KvmError> {
        let Some(region) = self.memory.growing() else { return Ok(0) };
        let granted = region.len();
        let boot = self.memory.boot_regions().iter().map(GuestMemoryRegion::len).sum();
        let wanted = wanted.next_multiple_of(step(boot, region.mapped())).min(region.mapped());
        if wanted <= granted {
            return Ok(granted);
        }
        let slot = self.memory.boot_regions().len() as u32 + self.slots;
        self.vm.add_memory(slot, region, granted..wanted)?;
        self.slots += 1;
        self.memory.grant(wanted);
        Ok(wanted)
    }

    fn plug_in(&mut self, bus: &PciBus) -> Result<MemControl, FunctionError> {
        let device = Box::new(Mem::new(&self.memory));
        let control = device.control();
        let slot = function::attach(bus, device, &self.memory, &self.vm)?;
        log::info!("memory plugged into slot {slot}");
        self.device = Some(control.clone());
        Ok(control)
    }
}

/// What a grant is a multiple of: a block of the guest's, and so much that there
/// are [`MAX_SLOTS`] at most.
fn step(boot: u64, region: u64) -> u64 {
    let block = layout::memory_block(boot);
    (region / MAX_SLOTS).next_multiple_of(block).max(block)
}

#[cfg(test)]
mod tests {
    use vm_memory::{GuestAddress, GuestMemory};

    use super::*;
    use crate::arch::layout::MEMORY_BLOCK;
    use crate::kvm::Host;
    use crate::memory::{self, Shape};

    const GIB: u64 = 1 << 30;

    fn hotplug(region: u64) -> (Hotplug, GuestRam) {
        let vm = Arc::new(Host::open().unwrap().create_vm(1).unwrap());
        let memory =
            memory::create_shaped(Shape { boot: 64 << 20, more: region, ..Shape::default() }).unwrap();
        vm.set_memory(&memory).unwrap();
        (Hotplug::new(memory.clone(), vm), memory)
    }

    #[test]
    fn memory_is_granted_as_it_is_asked_for() {
        let (mut hotplug, memory) = hotplug(8 * GIB);
        let bus = PciBus::default();
        let has = |bytes: u64| memory.check_range(GuestAddress(4 * GIB), bytes as usize);
        assert!(!has(1));
        hotplug.request(&bus, 2).unwrap();
        assert!(has(MEMORY_BLOCK) && !has(MEMORY_BLOCK + 1));
        hotplug.request(&bus, 128).unwrap();
        assert_eq!(hotplug.slots, 1);
        hotplug.request(&bus, 1024).unwrap();
        hotplug.request(&bus, 0).unwrap();
        assert!(has(GIB) && !has(GIB + 1));
        hotplug.request(&bus, 8192).unwrap();
        assert!(has(8 * GIB));
        assert_eq!((hotplug.slots, hotplug.plugged_bytes()), (3, 0));
        for mib in [8194, 1, u64::MAX] {
            let error = hotplug.request(&bus, mib).unwrap_err().to_string();
            assert!(error.contains("multiple of 2 up to 8192"), "{error}");
        }
    }

    #[test]
    fn a_machine_without_room_to_grow_says_so() {
        let (mut hotplug, _) = hotplug(0);
        let error = hotplug.request(&PciBus::default(), 128).unwrap_err().to_string();
        assert!(error.contains("up to 0"), "{error}");
    }

    #[test]
    fn slots_are_few_however_large_the_region() {
        assert_eq!(step(GIB, 4 * GIB), MEMORY_BLOCK);
        assert_eq!(step(GIB, 64 * GIB), 2 * MEMORY_BLOCK);
        assert_eq!(step(64 * GIB, 4 * GIB), 2 * GIB);
        assert!((1024 * GIB).div_ceil(step(GIB, 1024 * GIB)) <= MAX_SLOTS);
    }
}
