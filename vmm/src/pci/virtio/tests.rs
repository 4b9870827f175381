//! The transport from the driver's side: a device on a real VM, notified by a vCPU.

use std::sync::atomic::{AtomicU16, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use kvm_bindings::{kvm_regs, kvm_segment};
use rvm_protocol::vmm::ExitCounts;
use vm_memory::{Bytes, GuestAddress};
use vmm_sys_util::epoll::{Epoll, EpollEvent};
use vmm_sys_util::eventfd::EventFd;

use super::function::VirtioFunction;
use super::*;
use crate::buses::Buses;
use crate::devices::legacy::serial::Serial;
use crate::devices::virtio::ring::Ring;
use crate::devices::virtio::worker::Handler;
use crate::devices::virtio::{ActivateError, Activation, Interrupt, StateError, VirtioDevice};
use crate::jail::Duty;
use crate::kvm::Host;
use crate::memory::{self, GuestRam};
use crate::pci::config::TOLD_SIZE;
use crate::pci::{CONFIG_ADDRESS_PORT, CONFIG_DATA_PORT, PciBus, PciFunction, bar_address, table_entry};
use crate::vcpu::Vcpu;
use crate::vcpu::exits::{End, ExitCounters, Next, run_once};

const DESCRIPTORS: u64 = 0x1000;
const AVAILABLE: u64 = 0x2000;
const USED: u64 = 0x3000;
const BUFFER: u64 = 0x4000;
const CODE: u64 = 0x5000;

struct Guest {
    buses: Buses,
    memory: GuestRam,
    vcpu: Vcpu,
    counters: ExitCounters,
    bar: u64,
}

impl Guest {
    fn new() -> Self {
        Self::with_posting(false)
    }

    fn with_posting(posting: bool) -> Self {
        Self::with(posting, Box::new(Slow::default()))
    }

    fn with(posting: bool, device: Box<dyn VirtioDevice>) -> Self {
        let vm = Arc::new(Host::open().unwrap().create_vm(1).unwrap());
        let memory = memory::create(1 << 20).unwrap();
        vm.set_memory(&memory).unwrap();
        let pci = PciBus::default();
        let slot = function::attach(&pci, device, &memory, &vm).unwrap();
        let serial = Serial::new(None, EventFd::new(0).unwrap());
        let buses = Buses { pci, serial: Mutex::new(serial), vm: Arc::clone(&vm) };
        let vcpu = Vcpu::create(&vm, 0).unwrap();
        if posting {
            vm.start_posting(&vcpu.fd).unwrap();
        }
        let bar = bar_address(slot);
        let guest = Self { buses, memory, vcpu, counters: ExitCounters::default(), bar };
        guest.set_config(0x04, 2);
        guest
    }

    fn config(&self, register: u32) -> u32 {
        self.buses.write_port(CONFIG_ADDRESS_PORT, &(0x8000_0000 | register).to_le_bytes());
        let mut data = [0; 4];
        self.buses.read_port(CONFIG_DATA_PORT, &mut data);
        u32::from_le_bytes(data)
    }

    fn set_config(&self, register: u32, value: u32) {
        self.buses.write_port(CONFIG_ADDRESS_PORT, &(0x8000_0000 | register).to_le_bytes());
        self.buses.write_port(CONFIG_DATA_PORT, &value.to_le_bytes());
    }

    /// Registers of the capabilities with this id.
    fn capabilities(&self, id: u8) -> Vec<u32> {
        let mut found = Vec::new();
        let mut at = self.config(0x34) & 0xff;
        while at != 0 {
            let header = self.config(at);
            if header as u8 == id {
                found.push(at);
            }
            at = (header >> 8) & 0xff;
        }
        found
    }

    fn get(&self, offset: u64, len: usize) -> u32 {
        let mut data = [0; 4];
        self.buses.read_memory(self.bar + offset, &mut data[..len]);
        u32::from_le_bytes(data)
    }

    fn put(&self, offset: u64, len: usize, value: u32) {
        self.buses.write_memory(self.bar + offset, &value.to_le_bytes()[..len]);
    }

    fn status(&self) -> u8 {
        self.get(0x14, 1) as u8
    }

    /// Turns MSI-X on with every vector masked, so that interrupts can be seen
    /// in the pending bits.
    fn mask_interrupts(&self) {
        let msix = self.capabilities(0x11)[0];
        self.set_config(msix, 0x8000 << 16);
    }

    fn pending(&self) -> u32 {
        self.get(MSIX_PENDING_OFFSET, 1)
    }

    /// Drives the device with one queue of 8 entries whose used ring is at `used`.
    fn drive(&self, used: u64) {
        self.put(0x14, 1, 0);
        assert_eq!(self.status(), 0);
        self.put(0x14, 1, 3);
        self.put(0x08, 4, 1);
        self.put(0x0c, 4, 1);
        self.put(0x14, 1, 11);
        assert_eq!(self.status(), 11);
        self.put(0x10, 2, 0);
        self.put(0x16, 2, 0);
        self.put(0x18, 2, 8);
        for (register, address) in [(0x20, DESCRIPTORS), (0x28, AVAILABLE), (0x30, used)] {
            self.put(register, 4, address as u32);
            self.put(register + 4, 4, (address >> 32) as u32);
        }
        self.put(0x1a, 2, 1);
        self.put(0x1c, 2, 1);
        self.put(0x14, 1, 15);
    }

    /// Offers one buffer of 64 bytes as entry `index` of the available ring.
    fn offer_buffer(&self, index: u16) {
        let write = |value: &[u8], at: u64| self.memory.write_slice(value, GuestAddress(at)).unwrap();
        write(&BUFFER.to_le_bytes(), DESCRIPTORS);
        write(&64u32.to_le_bytes(), DESCRIPTORS + 8);
        write(&2u16.to_le_bytes(), DESCRIPTORS + 12);
        write(&[0; 64], BUFFER);
        write(&(index + 1).to_le_bytes(), AVAILABLE + 2);
    }

    /// Lets a vCPU write to `address`; the exits that took for the write.
    fn write_from_vcpu(&mut self, address: u64) -> u64 {
        // mov dword [address], 0; mov al, 0xfe; out 0x64, al
        let mut code = vec![0xc7, 0x05];
        code.extend((address as u32).to_le_bytes());
        code.extend([0, 0, 0, 0, 0xb0, 0xfe, 0xe6, 0x64]);
        self.memory.write_slice(&code, GuestAddress(CODE)).unwrap();
        let mut sregs = self.vcpu.fd.get_sregs().unwrap();
        let flat = |type_| kvm_segment {
            limit: u32::MAX,
            selector: 8,
            type_,
            s: 1,
            present: 1,
            db: 1,
            g: 1,
            ..Default::default()
        };
        sregs.cs = flat(0xb);
        (sregs.ds, sregs.ss) = (flat(0x3), flat(0x3));
        sregs.cr0 |= 1;
        self.vcpu.fd.set_sregs(&sregs).unwrap();
        self.vcpu.fd.set_regs(&kvm_regs { rip: CODE, rflags: 2, ..Default::default() }).unwrap();
        let exits = |counters: &ExitCounters| {
            let mut counts = ExitCounts::default();
            counters.add_to(&mut counts);
            counts.mmio
        };
        let before = exits(&self.counters);
        loop {
            match run_once(&mut self.vcpu.fd, &self.buses, &self.counters) {
                Next::Run | Next::Check => {}
                Next::End(end) => {
                    assert_eq!(end, End::PoweredOff);
                    return exits(&self.counters) - before;
                }
            }
        }
    }

    fn wait_used(&self, index: u16) {
        let started = Instant::now();
        while self.memory.read_obj::<u16>(GuestAddress(USED + 2)).unwrap() != index || self.pending() == 0 {
            assert!(started.elapsed() < Duration::from_secs(10), "the buffer was not used");
            std::thread::sleep(Duration::from_millis(1));
        }
        let mut bytes = [0; 64];
        self.memory.read_slice(&mut bytes, GuestAddress(BUFFER)).unwrap();
        assert_ne!(bytes, [0; 64]);
    }

    fn wait_status(&self, status: u8) {
        let started = Instant::now();
        while self.status() != status {
            assert!(started.elapsed() < Duration::from_secs(10), "{:#x}", self.status());
            std::thread::sleep(Duration::from_millis(1));
        }
    }

    fn notify_address(&self) -> u64 {
        self.bar + NOTIFY_OFFSET
    }
}

#[test]
fn notification_reaches_the_device_without_an_exit_and_it_interrupts() {
    let mut guest = Guest::new();
    guest.mask_interrupts();
    guest.drive(USED);
    assert_eq!(guest.status(), 15);
    guest.offer_buffer(0);
    assert_eq!(guest.write_from_vcpu(guest.notify_address()), 0);
    guest.wait_used(1);
    assert_eq!(guest.pending(), 0b10, "the queue's vector");
    assert_eq!(guest.get(ISR_OFFSET, 1), 1);
    assert_eq!(guest.get(ISR_OFFSET, 1), 0, "reading acknowledges");

    guest.put(0x14, 1, 0);
    assert_eq!(guest.status(), 0);
    assert_eq!(guest.write_from_vcpu(guest.notify_address()), 1, "nobody listens after a reset");
}

/// A device that fills a buffer, is in a request as long as `host` is locked, and
/// cannot serve the one after the third.
#[derive(Default)]
struct Slow {
    host: Arc<Mutex<()>>,
    served: Arc<AtomicU16>,
    /// The configuration's, of a device that is active.
    interrupt: Arc<Mutex<Option<Arc<dyn Interrupt>>>>,
}

#[derive(serde::Serialize, serde::Deserialize)]
#[serde(deny_unknown_fields)]
struct SlowState {}

struct SlowWorker {
    memory: GuestRam,
    ring: Ring,
    host: Arc<Mutex<()>>,
    served: Arc<AtomicU16>,
}

impl VirtioDevice for Slow {
    fn device_type(&self) -> u32 {
        2
    }

    fn name(&self) -> &str {
        "slow"
    }

    fn queue_sizes(&self) -> &[u16] {
        &[8]
    }

    fn features(&self) -> u64 {
        0
    }

    fn read_config(&self, _offset: u64, data: &mut [u8]) {
        data.fill(0x5a);
    }

    fn save(&self) -> Result<serde_json::Value, StateError> {
        Ok(serde_json::to_value(SlowState {})?)
    }

    fn restore(&mut self, state: serde_json::Value) -> Result<(), StateError> {
        let SlowState {} = serde_json::from_value(state)?;
        Ok(())
    }

    fn duty(&self) -> Duty {
        Duty::Disk
    }

    fn activate(&mut self, activation: Activation) -> Result<(), ActivateError> {
        let Activation { memory, queues, features, config_interrupt, threads } = activation;
        *self.interrupt.lock().unwrap() = Some(config_interrupt);
        let queue = queues.into_iter().next().flatten().ok_or(ActivateError::MissingQueue(0))?;
        let ring = Ring::new(queue, features);
        let (host, served) = (Arc::clone(&self.host), Arc::clone(&self.served));
        threads.start(SlowWorker { memory, ring, host, served }).map_err(ActivateError::Worker)
    }
}

impl Handler for SlowWorker {
    type Error = std::io::Error;

    fn register(&mut self, epoll: &Epoll) -> std::io::Result<()> {
        self.ring.register(epoll, 0)
    }

    fn handle(&mut self, _epoll: &Epoll, _ready: &[EpollEvent]) -> std::io::Result<()> {
        let (host, served, memory) = (&self.host, &self.served, &self.memory);
        let answer = |_| {
            served.fetch_add(1, Ordering::SeqCst);
            let _host = host.lock();
            memory.write_slice(&[0x5a; 64], GuestAddress(BUFFER)).map_or(0, |()| 64)
        };
        self.ring.serve(&self.memory, answer).map_err(std::io::Error::other)?;
        if served.load(Ordering::SeqCst) > 3 { Err(std::io::Error::other("it is tired")) } else { Ok(()) }
    }
}

fn slow() -> (Guest, Arc<Mutex<()>>, Arc<AtomicU16>) {
    let (host, served) = (Arc::default(), Arc::default());
    let device = Slow { host: Arc::clone(&host), served: Arc::clone(&served), ..Slow::default() };
    (Guest::with(false, Box::new(device)), host, served)
}

fn wait_for(served: &AtomicU16, count: u16) {
    let started = Instant::now();
    while served.load(Ordering::SeqCst) != count {
        assert!(started.elapsed() < Duration::from_secs(10), "{served:?}");
        std::thread::sleep(Duration::from_millis(1));
    }
}

fn within_a_second<T>(act: impl FnOnce() -> T) -> T {
    let started = Instant::now();
    let done = act();
    assert!(started.elapsed() < Duration::from_secs(1), "{:?}", started.elapsed());
    done
}

#[test]
fn a_reset_in_the_middle_of_a_request_waits_for_nobody() {
    let (mut guest, host, served) = slow();
    guest.mask_interrupts();
    guest.drive(USED);
    let held = host.lock().unwrap();
    (0..3).for_each(|index| guest.offer_buffer(index));
    guest.write_from_vcpu(guest.notify_address());
    wait_for(&served, 1);
    within_a_second(|| {
        assert!(!guest.buses.pci.pause(Instant::now() + Duration::from_millis(100)));
        guest.put(0x14, 1, 0);
        assert_ne!(guest.status(), 0, "it is not done");
        // What is written meanwhile changes nothing; what is read is there.
        guest.put(0x14, 1, 15);
        assert_eq!(guest.get(DEVICE_OFFSET, 1), 0x5a);
        assert_ne!(guest.status(), 0);
    });
    drop(held);
    guest.wait_status(0);
    assert_eq!(served.load(Ordering::SeqCst), 1, "the rest of the queue is left alone");
    guest.memory.write_slice(&[0; 8], GuestAddress(USED)).unwrap();
    guest.drive(USED);
    assert_eq!(guest.status(), 15);
    guest.write_from_vcpu(guest.notify_address());
    wait_for(&served, 4);
}

#[test]
fn a_device_in_the_middle_of_a_request_is_left_behind_at_the_end() {
    let (mut guest, host, served) = slow();
    guest.drive(USED);
    let held = host.lock().unwrap();
    guest.offer_buffer(0);
    guest.write_from_vcpu(guest.notify_address());
    wait_for(&served, 1);
    within_a_second(|| guest.buses.pci.shut_down(Instant::now() + Duration::from_millis(100)));
    within_a_second(|| drop(guest.buses.pci.remove(0)));
    drop(held);
}

#[test]
fn who_still_has_an_interrupt_of_a_device_that_is_gone_has_nothing_of_kvm() {
    let device = Slow::default();
    let interrupt = Arc::clone(&device.interrupt);
    let guest = Guest::with(false, Box::new(device));
    guest.put(MSIX_TABLE_OFFSET, 4, 0xfee0_0000);
    guest.put(MSIX_TABLE_OFFSET + 12, 4, 0);
    guest.set_config(guest.capabilities(0x11)[0], 0x8000 << 16);
    guest.drive(USED);
    // As a thread does that the host keeps.
    let kept = interrupt.lock().unwrap().take().unwrap();
    let event = kept.event().unwrap().unwrap();
    let is_left = || event.read().is_ok();
    kept.trigger().unwrap();
    assert!(!is_left(), "KVM took it");
    drop(guest.buses.pci.remove(0));
    kept.trigger().unwrap();
    assert!(is_left(), "the last to let go of it would have to ask KVM to");
}

#[test]
fn a_paused_device_serves_nothing_and_goes_on_where_it_was() {
    let (mut guest, _host, served) = slow();
    guest.drive(USED);
    guest.offer_buffer(0);
    guest.write_from_vcpu(guest.notify_address());
    wait_for(&served, 1);
    for count in 2..=3 {
        assert!(guest.buses.pci.pause(Instant::now() + Duration::from_secs(10)));
        guest.offer_buffer(count - 1);
        guest.write_from_vcpu(guest.notify_address());
        std::thread::sleep(Duration::from_millis(10));
        assert_eq!(served.load(Ordering::SeqCst), count - 1);
        guest.buses.pci.resume();
        wait_for(&served, count);
    }
}

#[test]
fn a_device_that_gives_up_says_so() {
    let (mut guest, _host, served) = slow();
    guest.mask_interrupts();
    guest.drive(USED);
    (0..4).for_each(|index| guest.offer_buffer(index));
    guest.write_from_vcpu(guest.notify_address());
    wait_for(&served, 4);
    guest.wait_status(15 | 64);
    assert_eq!(guest.pending() & 1, 1, "the configuration's vector");
    guest.put(0x14, 1, 0);
    guest.wait_status(0);
}

#[test]
fn posted_writes_take_effect_before_what_follows() {
    let mut guest = Guest::with_posting(true);
    assert_eq!(guest.write_from_vcpu(guest.bar + 0x16), 0, "queue_select");
    assert_eq!(guest.write_from_vcpu(guest.bar + MSIX_TABLE_OFFSET), 0, "a message's address");
    assert_eq!(guest.write_from_vcpu(guest.bar + MSIX_TABLE_OFFSET + 12), 1, "a vector's mask");
    assert_eq!(guest.write_from_vcpu(guest.bar + 0x14), 1, "the status");

    guest.put(0x08, 4, 1);
    assert_eq!(guest.get(0x08, 4), 1);
    assert_eq!(guest.write_from_vcpu(guest.bar + 0x08), 0);
    assert_eq!(guest.get(0x08, 4), 0, "the next exit found the write");

    guest.bar = 0xd000_0000;
    guest.set_config(0x10, guest.bar as u32);
    assert_eq!(guest.write_from_vcpu(guest.bar + 0x16), 0);
    assert_eq!(guest.write_from_vcpu(bar_address(0) + 0x16), 1, "the old place is nobody's");
}

#[test]
fn notification_follows_the_bar() {
    let mut guest = Guest::new();
    guest.mask_interrupts();
    guest.drive(USED);
    let old = guest.notify_address();
    guest.bar = 0xd000_0000;
    guest.set_config(0x10, guest.bar as u32);
    assert_eq!(guest.status(), 15);
    guest.offer_buffer(0);
    assert_eq!(guest.write_from_vcpu(old), 1);
    assert_eq!(guest.write_from_vcpu(guest.notify_address()), 0);
    guest.wait_used(1);
    guest.set_config(0x04, 0);
    assert_eq!(guest.write_from_vcpu(guest.notify_address()), 1, "decoding is off");
}

#[test]
fn rings_outside_memory_need_a_reset() {
    let guest = Guest::new();
    guest.mask_interrupts();
    for used in [1 << 20, (1 << 20) - 8, USED + 1, u64::MAX - 7] {
        guest.drive(used);
        assert_eq!(guest.status(), 15 | 64, "{used:#x}");
        assert_eq!(guest.pending() & 1, 1, "a configuration interrupt tells the driver");
    }
    guest.drive(USED);
    assert_eq!(guest.status(), 15, "after a reset it works");
}

#[test]
fn bar_can_be_reached_through_configuration_space() {
    let guest = Guest::new();
    let windows: Vec<_> =
        guest.capabilities(0x09).into_iter().filter(|&at| guest.config(at) >> 24 == 5).collect();
    let [window] = windows[..] else { panic!("{windows:?}") };
    guest.set_config(window + 8, 0x12);
    guest.set_config(window + 12, 2);
    assert_eq!(guest.config(window + 16) & 0xffff, 1, "number of queues");
    guest.set_config(window + 8, 0x14);
    guest.set_config(window + 12, 1);
    guest.set_config(window + 16, 3);
    assert_eq!(guest.status(), 3);
    for (bar, offset, length) in [(1, 0x14, 1), (0, 0x14, 8), (0, 0x15, 2), (0, 0x4000, 4), (0, 0, 0)] {
        guest.set_config(window + 4, bar);
        guest.set_config(window + 8, offset);
        guest.set_config(window + 12, length);
        guest.set_config(window + 16, 0);
        guest.config(window + 16);
    }
    assert_eq!(guest.status(), 3, "what is no access to the BAR does nothing");
}

/// A guest may write anything anywhere, in any order.
#[test]
fn no_access_panics() {
    let guest = Guest::new();
    let mut random = 0x9e37_79b9_7f4a_7c15u64;
    let mut next = move || {
        random ^= random << 13;
        random ^= random >> 7;
        random ^= random << 17;
        random
    };
    for _ in 0..20_000 {
        let (value, at, len) = (next(), next(), 1 << (next() % 4));
        match next() % 4 {
            0 => guest.buses.write_memory(guest.bar + at % 0x4000, &value.to_le_bytes()[..len]),
            1 => guest.buses.write_memory(guest.bar + at % 0x38, &value.to_le_bytes()[..len]),
            2 => guest.buses.read_memory(guest.bar + at % 0x4000, &mut [0; 8][..len]),
            _ => {
                // All but the BAR, so that the accesses above go on reaching it.
                let register = 0x40 + ((at as u32 % 0xc0) & !3);
                guest.set_config(register, value as u32);
                guest.config(register);
            }
        }
    }
    guest.buses.pci.shut_down(Instant::now() + Duration::from_secs(10));
}

#[test]
fn state_round_trip() {
    let make = || {
        let vm = Arc::new(Host::open().unwrap().create_vm(1).unwrap());
        let memory = memory::create(1 << 20).unwrap();
        (VirtioFunction::new(Box::new(Slow::default()), memory, Arc::clone(&vm), 1).unwrap(), vm)
    };
    let (mut first, _vm1) = make();
    first.write_config(0x04, &[6, 0]);
    first.write_memory(0x14, &[3]);
    first.write_memory(MSIX_TABLE_OFFSET, &0xfee0_0000u32.to_le_bytes());
    let saved = first.save().unwrap();
    let (mut second, _vm2) = make();
    assert_ne!(second.save().unwrap(), saved);
    let text = serde_json::to_value(&saved).unwrap();
    second.restore(serde_json::from_value(text.clone()).unwrap()).unwrap();
    assert_eq!(second.save().unwrap(), saved);

    // What another function saved, or nobody.
    let changes: [(&str, serde_json::Value); 8] = [
        ("/progress", serde_json::json!([])),
        ("/config/registers/0", 7.into()),
        ("/config/registers", serde_json::json!([1, 2])),
        ("/config/bar_size", 1.into()),
        ("/transport/queues/0/size", 3.into()),
        ("/transport/queues", serde_json::json!([])),
        ("/transport/vectors", serde_json::json!([1])),
        ("/device", serde_json::json!({"surprise": 1})),
    ];
    for (place, value) in changes {
        let mut changed = text.clone();
        *changed.pointer_mut(place).unwrap() = value;
        let (mut other, _vm) = make();
        assert!(other.restore(serde_json::from_value(changed).unwrap()).is_err(), "{place}");
    }
    let mut changed = text.clone();
    changed["transport"]["status"] = 15.into();
    changed["transport"]["driver_features"] = u64::MAX.into();
    let (mut other, _vm) = make();
    assert!(other.restore(serde_json::from_value(changed).unwrap()).is_err(), "features nobody offered");
}

#[test]
fn the_table_says_what_a_guest_would_find_out() {
    let guest = Guest::new();
    let mut told = [0; TOLD_SIZE];
    guest.memory.read_slice(&mut told, GuestAddress(table_entry(0))).unwrap();
    // As it was plugged in.
    guest.set_config(0x04, 0);
    let plain = u64::from_le_bytes(told[..8].try_into().unwrap());
    let word = |at: usize| u32::from_le_bytes(told[at..at + 4].try_into().unwrap());
    let data = guest.capabilities(0x09).last().unwrap() + 16;
    assert_eq!(plain, !(1 << (data / 4)));
    for register in (0..256).step_by(4).filter(|register| *register != data) {
        let (holds, writable) = (word(8 + register as usize), word(264 + register as usize));
        assert_eq!(holds, guest.config(register), "{register:#x}");
        for value in [u32::MAX, 0, holds] {
            guest.set_config(register, value);
            assert_eq!(guest.config(register), (holds & !writable) | (value & writable), "{register:#x}");
        }
    }
}
