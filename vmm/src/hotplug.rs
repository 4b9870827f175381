//! Disks, network interfaces, memory and files as memory for the running machine.
//!
//! What the machine can grow by is reserved from the start and belongs to nobody
//! ([`memory::ram`](crate::memory::ram)). When its owner first asks for more,
//! the memory device is plugged in, and KVM is given as much of the region as
//! was asked for: a guest that does not care for what the device says has no
//! more than that either.

use std::collections::{BTreeMap, HashMap};
use std::fs::File;
use std::io;
use std::ops::Range;
use std::sync::Arc;

use rvm_protocol::vmm::{NetConfig, NetMetrics};
use thiserror::Error;
use vm_memory::GuestMemoryRegion;

use crate::arch::layout;
use crate::devices::virtio::blk::{Blk, BlkError};
use crate::devices::virtio::mem::{BLOCK_BYTES, Mem, MemControl};
use crate::devices::virtio::net::{Net, NetControl, NetError};
use crate::devices::virtio::pmem::Pmem;
use crate::kvm::{KvmError, Vm};
use crate::memory::windows::{WINDOWS, Window, WindowError};
use crate::memory::{GuestRam, Room};
use crate::pci::PciBus;
use crate::pci::virtio::function::{self, FunctionError};

/// Pieces in which KVM gets a region, at most: each is a slot of its own, since
/// one that the guest uses cannot be made larger, and KVM had 509 of them in all
/// before Linux 5.12: for two regions, what the machine starts with, and windows.
const MAX_SLOTS: u64 = 250;
/// The slot of KVM's of the first window, behind those of memory.
const WINDOW_SLOT: u32 = 2 + 2 * MAX_SLOTS as u32;

const _: () = assert!(WINDOW_SLOT as usize + WINDOWS <= 509);

/// Why something was not plugged in.
#[derive(Debug, Error)]
pub enum HotplugError {
    /// More than there is room for, or part of a block.
    #[error(
        "mib: {mib} given; must be a multiple of {block} up to {most} ({})",
        if *room == Room::Memory { "hotplug_memory_mib" } else { "hugetlb_memory_mib" },
        block = BLOCK_BYTES >> 20
    )]
    Size {
        /// Of what.
        room: Room,
        /// What was asked for.
        mib: u64,
        /// The largest size.
        most: u64,
    },
    /// The disk cannot be used.
    #[error("disk {serial}")]
    Disk {
        /// Its serial.
        serial: String,
        /// Why not.
        #[source]
        source: BlkError,
    },
    /// The request came without the disk's descriptor.
    #[error("disk {0}: no descriptor is attached to the request")]
    NoFile(String),
    /// There is a disk of that serial.
    #[error("disk {0} is there already")]
    DiskExists(String),
    /// There is no disk of that serial.
    #[error("there is no disk {0}")]
    NoDisk(String),
    /// The file cannot be a guest's memory.
    #[error("pmem")]
    Pmem(#[from] WindowError),
    /// The request came without the file's descriptor.
    #[error("pmem: no descriptor is attached to the request")]
    NoPmemFile,
    /// There is no file in that slot.
    #[error("there is no pmem {0}")]
    NoPmem(u8),
    /// The network interface cannot be used.
    #[error("net {slot}")]
    Net {
        /// Its slot.
        slot: u8,
        /// Why not.
        #[source]
        source: NetError,
    },
    /// There is a network interface in that slot.
    #[error("net {0} is there already")]
    NetExists(u8),
    /// There is no network interface in that slot.
    #[error("there is no net {0}")]
    NoNet(u8),
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
    /// Slots of the disks on the bus, by serial.
    disks: HashMap<String, usize>,
    /// Queues of a disk: a vCPU's each, of those the machine was built with.
    disk_queues: u16,
    /// The network interfaces on the bus, by slot.
    nets: BTreeMap<u8, NetControl>,
    /// Windows of the files on the bus, by slot.
    pmems: BTreeMap<u8, usize>,
    /// The memory devices, once they were needed.
    devices: HashMap<Room, MemControl>,
    /// Slots of KVM's given to them.
    slots: u32,
}

impl Hotplug {
    /// `vcpus`, `disks` and `nets` are those the machine was built with: the slots of disks by
    /// serial, interfaces by slot.
    pub fn new(
        memory: GuestRam,
        vm: Arc<Vm>,
        vcpus: usize,
        disks: HashMap<String, usize>,
        nets: BTreeMap<u8, NetControl>,
    ) -> Self {
        let disk_queues = u16::try_from(vcpus).unwrap_or(u16::MAX);
        Self {
            memory,
            vm,
            disks,
            disk_queues,
            nets,
            pmems: BTreeMap::new(),
            devices: HashMap::new(),
            slots: 0,
        }
    }

    /// Plugs a disk into `bus`: the open file the request brought.
    pub fn add_disk(
        &mut self,
        bus: &PciBus,
        serial: &str,
        file: Option<File>,
        readonly: bool,
    ) -> Result<(), HotplugError> {
        if self.disks.contains_key(serial) {
            return Err(HotplugError::DiskExists(serial.to_owned()));
        }
        let file = file.ok_or_else(|| HotplugError::NoFile(serial.to_owned()))?;
        let disk = Blk::new(serial, file, readonly)
            .map_err(|source| HotplugError::Disk { serial: serial.to_owned(), source })?
            .with_queues(self.disk_queues);
        let slot = function::attach(bus, Box::new(disk), &self.memory, &self.vm)?;
        self.disks.insert(serial.to_owned(), slot);
        log::info!("disk {serial} plugged into slot {slot}");
        Ok(())
    }

    /// Takes a disk off `bus`. A guest that still uses it gets no more answers.
    pub fn remove_disk(&mut self, bus: &PciBus, serial: &str) -> Result<(), HotplugError> {
        let slot = self.disks.remove(serial).ok_or_else(|| HotplugError::NoDisk(serial.to_owned()))?;
        // What ends here is stopped and closed, its interrupts and its slot are free.
        drop(bus.remove(slot));
        log::info!("disk {serial} taken out of slot {slot}");
        Ok(())
    }

    /// Plugs the open file the request brought into `bus`, as memory that the guest can read; the slot.
    pub fn add_pmem(&mut self, bus: &PciBus, file: Option<File>) -> Result<u8, HotplugError> {
        let (window, bytes) = self.memory.map(&file.ok_or(HotplugError::NoPmemFile)?)?;
        let plugged = self.plug_window(bus, window, bytes);
        if plugged.is_err() {
            self.memory.take_back(window);
        }
        plugged
    }

    fn plug_window(&mut self, bus: &PciBus, window: usize, bytes: u64) -> Result<u8, HotplugError> {
        // It is from a moment ago.
        let place = self.memory.windows().get(window).ok_or(WindowError::Full)?;
        self.vm.add_window(window_slot(window), place, bytes)?;
        self.memory.lend(window, bytes);
        let start = place.start().0;
        let device = Box::new(Pmem::new(Range { start, end: start + bytes }));
        let slot = match function::attach(bus, device, &self.memory, &self.vm) {
            Ok(slot) => slot as u8,
            Err(error) => {
                self.vm.remove_window(window_slot(window), place)?;
                return Err(error.into());
            }
        };
        self.pmems.insert(slot, window);
        log::info!("pmem of {bytes} bytes plugged into slot {slot}");
        Ok(slot)
    }

    /// Takes a file off `bus`. A guest that still reads it reads what belongs to no device.
    pub fn remove_pmem(&mut self, bus: &PciBus, slot: u8) -> Result<(), HotplugError> {
        let window = self.pmems.remove(&slot).ok_or(HotplugError::NoPmem(slot))?;
        drop(bus.remove(slot.into()));
        let place = self.memory.windows().get(window).ok_or(HotplugError::NoPmem(slot))?;
        self.vm.remove_window(window_slot(window), place)?;
        self.memory.take_back(window);
        log::info!("pmem taken out of slot {slot}");
        Ok(())
    }

    /// Bytes of the files that the guest can read as memory.
    pub fn pmem_bytes(&self) -> u64 {
        self.memory.windows().iter().map(Window::len).sum()
    }

    /// Plugs a network interface into `bus`: the tap's descriptors, and vhost-net's
    /// behind them.
    pub fn add_net(
        &mut self,
        bus: &PciBus,
        net: &NetConfig,
        mut files: Vec<File>,
    ) -> Result<(), HotplugError> {
        let slot = net.slot;
        if self.nets.contains_key(&slot) {
            return Err(HotplugError::NetExists(slot));
        }
        let vhost = files.split_off(files.len().min(net.queue_pairs.into()));
        let device = Net::new(net, files, vhost).map_err(|source| HotplugError::Net { slot, source })?;
        let control = device.control();
        function::attach_at(bus, slot.into(), Box::new(device), &self.memory, &self.vm)?;
        self.nets.insert(slot, control);
        log::info!("net {slot} plugged in");
        Ok(())
    }

    /// Takes a network interface off `bus`. A guest that still uses it gets no more answers.
    pub fn remove_net(&mut self, bus: &PciBus, slot: u8) -> Result<(), HotplugError> {
        self.nets.remove(&slot).ok_or(HotplugError::NoNet(slot))?;
        drop(bus.remove(slot.into()));
        log::info!("net {slot} taken out");
        Ok(())
    }

    /// Tells the guest whether an interface's link is up.
    pub fn set_link(&mut self, slot: u8, up: bool) -> Result<(), HotplugError> {
        let net = self.nets.get(&slot).ok_or(HotplugError::NoNet(slot))?;
        net.set_link(up).map_err(HotplugError::Interrupt)
    }

    /// Counters of the network interfaces.
    pub fn nets(&self) -> Vec<NetMetrics> {
        self.nets.values().map(NetControl::metrics).collect()
    }

    /// Bytes the guest has plugged.
    pub fn plugged_bytes(&self, room: Room) -> u64 {
        self.devices.get(&room).map_or(0, MemControl::plugged_bytes)
    }

    /// Offers the guest `mib` MiB of `room` beside what it started with, or asks for all
    /// above that back; plugs the device into `bus` where it is not there yet.
    pub fn request(&mut self, bus: &PciBus, room: Room, mib: u64) -> Result<(), HotplugError> {
        let most = self.memory.growing(room).map_or(0, |region| region.mapped());
        let wanted =
            mib.checked_mul(1 << 20).filter(|bytes| *bytes <= most && bytes.is_multiple_of(BLOCK_BYTES));
        let Some(wanted) = wanted else { return Err(HotplugError::Size { room, mib, most: most >> 20 }) };
        let granted = self.grant(room, wanted)?;
        let control = match self.devices.get(&room) {
            Some(control) => control.clone(),
            None if wanted == 0 => return Ok(()),
            None => self.plug_in(bus, room)?,
        };
        control.request(granted, wanted).map_err(HotplugError::Interrupt)
    }

    /// Lets the guest use at least `wanted` bytes of the region; returns how many
    /// it can use. What it could use before stays so.
    fn grant(&mut self, room: Room, wanted: u64) -> Result<u64, KvmError> {
        let Some(region) = self.memory.growing(room) else { return Ok(0) };
        let granted = region.len();
        let boot = self.memory.boot_regions().iter().map(GuestMemoryRegion::len).sum();
        let wanted = wanted.next_multiple_of(step(boot, region.mapped())).min(region.mapped());
        if wanted <= granted {
            return Ok(granted);
        }
        let slot = self.memory.boot_regions().len() as u32 + self.slots;
        self.vm.add_memory(slot, region, granted..wanted)?;
        self.slots += 1;
        self.memory.grant(room, wanted);
        Ok(wanted)
    }

    fn plug_in(&mut self, bus: &PciBus, room: Room) -> Result<MemControl, FunctionError> {
        let device = Box::new(Mem::new(&self.memory, room));
        let control = device.control();
        let slot = function::attach(bus, device, &self.memory, &self.vm)?;
        log::info!("memory ({room:?}) plugged into slot {slot}");
        self.devices.insert(room, control.clone());
        Ok(control)
    }
}

/// The slot of KVM's that belongs to a window.
fn window_slot(window: usize) -> u32 {
    WINDOW_SLOT + window as u32
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
    use crate::memory::{self, Room, Shape};
    use crate::pci::{CONFIG_ADDRESS_PORT, CONFIG_DATA_PORT};

    const GIB: u64 = 1 << 30;

    fn hotplug(region: u64) -> (Hotplug, GuestRam) {
        let vm = Arc::new(Host::open().unwrap().create_vm(1).unwrap());
        let shape = Shape { boot: 64 << 20, more: region, window: 128 << 20, ..Shape::default() };
        let memory = memory::create_shaped(shape).unwrap();
        vm.set_memory(&memory).unwrap();
        (Hotplug::new(memory.clone(), vm, 1, HashMap::new(), BTreeMap::new()), memory)
    }

    #[test]
    fn memory_is_granted_as_it_is_asked_for() {
        let (mut hotplug, memory) = hotplug(8 * GIB);
        let bus = PciBus::default();
        let has = |bytes: u64| memory.check_range(GuestAddress(4 * GIB), bytes as usize);
        assert!(!has(1));
        hotplug.request(&bus, Room::Memory, 2).unwrap();
        assert!(has(MEMORY_BLOCK) && !has(MEMORY_BLOCK + 1));
        hotplug.request(&bus, Room::Memory, 128).unwrap();
        assert_eq!(hotplug.slots, 1);
        hotplug.request(&bus, Room::Memory, 1024).unwrap();
        hotplug.request(&bus, Room::Memory, 0).unwrap();
        assert!(has(GIB) && !has(GIB + 1));
        hotplug.request(&bus, Room::Memory, 8192).unwrap();
        assert!(has(8 * GIB));
        assert_eq!((hotplug.slots, hotplug.plugged_bytes(Room::Memory)), (3, 0));
        for mib in [8194, 1, u64::MAX] {
            let error = hotplug.request(&bus, Room::Memory, mib).unwrap_err().to_string();
            assert!(error.contains("multiple of 2 up to 8192"), "{error}");
        }
    }

    #[test]
    fn a_machine_without_room_to_grow_says_so() {
        let (mut hotplug, _) = hotplug(0);
        let error = hotplug.request(&PciBus::default(), Room::Memory, 128).unwrap_err().to_string();
        assert!(error.contains("up to 0"), "{error}");
    }

    #[test]
    fn disks_come_and_go_without_a_trace() {
        let (mut hotplug, _memory) = hotplug(0);
        let bus = PciBus::default();
        let file = tempfile::tempfile().unwrap();
        file.set_len(8192).unwrap();
        let disk = || Some(file.try_clone().unwrap());
        let vendor = |slot: u32| {
            let mut data = [0; 2];
            bus.write_port(CONFIG_ADDRESS_PORT, &(1 << 31 | slot << 11).to_le_bytes());
            bus.read_port(CONFIG_DATA_PORT, &mut data);
            u16::from_le_bytes(data)
        };
        // More often than there are interrupt numbers.
        for round in 0..3000 {
            hotplug.add_disk(&bus, "a", disk(), false).unwrap();
            hotplug.add_disk(&bus, "b", disk(), true).unwrap();
            assert_eq!([0, 1, 2].map(vendor), [0x1af4, 0x1af4, 0xffff], "round {round}");
            let error = hotplug.add_disk(&bus, "a", disk(), false).unwrap_err().to_string();
            assert_eq!(error, "disk a is there already");
            hotplug.remove_disk(&bus, "a").unwrap();
            assert_eq!([0, 1].map(vendor), [0xffff, 0x1af4]);
            hotplug.remove_disk(&bus, "b").unwrap();
        }
        assert_eq!(hotplug.remove_disk(&bus, "b").unwrap_err().to_string(), "there is no disk b");
        assert!(hotplug.add_disk(&bus, "c", None, false).unwrap_err().to_string().contains("no descriptor"));
        // Nobody holds the file, or it could not be locked.
        assert!(file.try_lock().is_ok());
    }

    #[test]
    fn files_come_and_go_without_a_trace() {
        let (mut hotplug, memory) = hotplug(0);
        let bus = PciBus::default();
        let file = tempfile::tempfile().unwrap();
        file.set_len(3 << 20).unwrap();
        let copy = || Some(file.try_clone().unwrap());
        let start = GuestAddress(4 * GIB);
        for _ in 0..500 {
            assert_eq!((0..WINDOWS).map(|_| hotplug.add_pmem(&bus, copy()).unwrap()).max(), Some(3));
            assert_eq!(hotplug.pmem_bytes(), WINDOWS as u64 * (4 << 20));
            assert!(matches!(hotplug.add_pmem(&bus, copy()), Err(HotplugError::Pmem(WindowError::Full))));
            assert!(memory.lent(start, 4 << 20).is_some());
            (0..WINDOWS as u8).for_each(|slot| hotplug.remove_pmem(&bus, slot).unwrap());
            assert!(hotplug.pmem_bytes() == 0 && memory.lent(start, 1).is_none());
        }
        assert_eq!(hotplug.remove_pmem(&bus, 0).unwrap_err().to_string(), "there is no pmem 0");
        assert!(hotplug.add_pmem(&bus, None).unwrap_err().to_string().contains("no descriptor"));
        // The bus is full: nothing stays mapped.
        let disk = tempfile::tempfile().unwrap();
        disk.set_len(8192).unwrap();
        for name in 0..24 {
            hotplug.add_disk(&bus, &format!("{name}"), Some(disk.try_clone().unwrap()), true).unwrap();
        }
        assert!(matches!(hotplug.add_pmem(&bus, copy()), Err(HotplugError::Pci(_))));
        assert_eq!(hotplug.pmem_bytes(), 0);
        hotplug.remove_disk(&bus, "7").unwrap();
        assert_eq!(hotplug.add_pmem(&bus, copy()).unwrap(), 7);
    }

    #[test]
    fn slots_are_few_however_large_the_region() {
        assert_eq!(step(GIB, 4 * GIB), MEMORY_BLOCK);
        assert_eq!(step(GIB, 62 * GIB), 2 * MEMORY_BLOCK);
        assert_eq!(step(64 * GIB, 4 * GIB), 2 * GIB);
        assert!((1024 * GIB).div_ceil(step(GIB, 1024 * GIB)) <= MAX_SLOTS);
    }
}
