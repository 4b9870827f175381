//! A virtio device as a PCI function.

use std::io;
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicU8, AtomicU16, Ordering};
use std::time::{Duration, Instant};

use kvm_ioctls::{IoEventAddress, NoDatamatch};
use serde::{Deserialize, Serialize};
use thiserror::Error;
use virtio_bindings::virtio_config::VIRTIO_F_VERSION_1;
use virtio_bindings::virtio_ring::VIRTIO_RING_F_EVENT_IDX;
use virtio_queue::{Queue, QueueT};
use vm_memory::{Bytes, GuestAddress, GuestMemory};
use vmm_sys_util::errno;
use vmm_sys_util::eventfd::EventFd;

use super::common::{self, Action, CommonConfig, QueueSetup, TransportState};
use super::{
    BAR_END, BAR_SIZE, COMMON_OFFSET, DEVICE_OFFSET, ISR_OFFSET, MAX_QUEUES, MSIX_PENDING_OFFSET,
    MSIX_TABLE_OFFSET, NO_VECTOR, NOTIFY_MULTIPLIER, NOTIFY_OFFSET,
};
use crate::devices::virtio::worker::Threads;
use crate::devices::virtio::{
    ActivateError, Activation, ActiveQueue, Interrupt, Progress, StateError, VirtioDevice,
};
use crate::kvm::Vm;
use crate::kvm::irq::IrqError;
use crate::memory::GuestRam;
use crate::pci::config::{ConfigSpace, Identity};
use crate::pci::msix::{self, Msix, MsixState};
use crate::pci::{BusFull, PciBus, PciFunction, bar_address, table_entry};

/// Why a device cannot be put on the bus.
#[derive(Debug, Error)]
pub enum FunctionError {
    /// No slot is free.
    #[error(transparent)]
    BusFull(#[from] BusFull),
    /// An interrupt could not be set up.
    #[error(transparent)]
    Interrupt(#[from] IrqError),
    /// The device's threads could not be made.
    #[error("the device's threads could not be started")]
    Threads(#[source] io::Error),
    /// More queues than the BAR has room for.
    #[error("{0} queues; a device may have {MAX_QUEUES}")]
    TooManyQueues(usize),
    /// A saved state is that of another kind of device.
    #[error("the saved state is another device's")]
    State,
    /// The device's own state.
    #[error(transparent)]
    Device(#[from] StateError),
}

/// Why a device was not started at the driver's word.
#[derive(Debug, Error)]
enum StartError {
    #[error("queue {0} has rings outside guest memory")]
    Queue(usize),
    #[error("an eventfd could not be created")]
    EventFd(#[source] io::Error),
    #[error("KVM refused KVM_IOEVENTFD")]
    Register(#[source] errno::Error),
    #[error(transparent)]
    Device(#[from] ActivateError),
}

/// ISR status: a queue has been used.
const ISR_QUEUE: u8 = 1;
/// ISR status: the configuration has changed.
const ISR_CONFIG: u8 = 2;

/// PCI capability id "vendor-specific".
const VENDOR_CAPABILITY: u8 = 0x09;
// Structures (4.1.4).
const STRUCTURE_COMMON: u8 = 1;
const STRUCTURE_NOTIFY: u8 = 2;
const STRUCTURE_ISR: u8 = 3;
const STRUCTURE_DEVICE: u8 = 4;
const STRUCTURE_PCI: u8 = 5;
/// Offset of a capability's `bar` field.
const CAPABILITY_BAR: usize = 4;
/// Offset of the data behind the PCI configuration access capability.
const PCI_DATA: usize = 16;

/// Puts `device` into the bus's lowest free slot and returns the slot. A guest
/// that runs already finds it when it scans the bus again.
pub fn attach(
    bus: &PciBus,
    device: Box<dyn VirtioDevice>,
    memory: &GuestRam,
    vm: &Arc<Vm>,
) -> Result<usize, FunctionError> {
    bus.add(|slot| make(device, memory, vm, slot))
}

/// Puts `device` into the bus's slot number `slot`, which no other is in.
pub fn attach_at(
    bus: &PciBus,
    slot: usize,
    device: Box<dyn VirtioDevice>,
    memory: &GuestRam,
    vm: &Arc<Vm>,
) -> Result<(), FunctionError> {
    bus.add_at(slot, |slot| make(device, memory, vm, slot))
}

/// The function, of which the guest has been told.
fn make(
    device: Box<dyn VirtioDevice>,
    memory: &GuestRam,
    vm: &Arc<Vm>,
    slot: usize,
) -> Result<Box<dyn PciFunction>, FunctionError> {
    let function = VirtioFunction::new(device, memory.clone(), Arc::clone(vm), slot)?;
    // A guest that has no memory there looks for itself.
    let _ = memory.write_slice(&function.told(), GuestAddress(table_entry(slot)));
    Ok(Box::new(function))
}

/// What a function needs to be as it was.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct FunctionState {
    /// Configuration space.
    pub config: ConfigSpace,
    /// What was negotiated.
    pub transport: TransportState,
    /// Interrupts.
    pub msix: MsixState,
    /// ISR status.
    pub isr: u8,
    /// Of each queue, the next available and the next used entry.
    pub progress: Vec<(u16, u16)>,
    /// The device's own.
    pub device: serde_json::Value,
}

/// How long a driver's write of the status may wait for threads that let go of
/// their work at once, as nearly all do; a driver reads the status until it is 0.
const RESET_PATIENCE: Duration = Duration::from_millis(5);

/// A virtio device behind its transport.
pub struct VirtioFunction {
    device: Box<dyn VirtioDevice>,
    threads: Threads,
    /// The driver wants a reset, which is done when no thread is at work.
    resetting: bool,
    /// How far each queue has been served.
    progress: Vec<Arc<Progress>>,
    memory: GuestRam,
    vm: Arc<Vm>,
    config: ConfigSpace,
    msix_control: usize,
    pci_access: usize,
    common: CommonConfig,
    msix: Arc<Msix>,
    isr: Arc<AtomicU8>,
    /// Notification eventfds of a device that has been started, by queue.
    kicks: Vec<Option<EventFd>>,
    /// Where KVM watches for notifications.
    watched: Option<u64>,
    /// Where KVM lets writes wait for the next exit.
    posted: Option<u64>,
}

impl VirtioFunction {
    /// Puts `device` behind a transport for `slot`.
    pub fn new(
        device: Box<dyn VirtioDevice>,
        memory: GuestRam,
        vm: Arc<Vm>,
        slot: usize,
    ) -> Result<Self, FunctionError> {
        let queues = device.queue_sizes().len();
        if queues > MAX_QUEUES {
            return Err(FunctionError::TooManyQueues(queues));
        }
        let vectors = queues as u16 + 1;
        let msix = Arc::new(Msix::new(Arc::clone(&vm.routes), vectors)?);
        let common = CommonConfig::new(device.features(), device.queue_sizes(), vectors);

        let mut config = ConfigSpace::new(&identity(device.device_type()));
        config.set_memory_bar(BAR_SIZE, bar_address(slot));
        // First: Linux looks for it more often than for the others, each time from the start.
        let body = msix.capability(MSIX_TABLE_OFFSET as u32, MSIX_PENDING_OFFSET as u32);
        let control = (msix::CONTROL_ENABLE | msix::CONTROL_MASK_ALL).to_le_bytes();
        let msix_control = config.add_capability(msix::CAPABILITY_ID, &body, &control) + 2;
        let structures = [
            (STRUCTURE_COMMON, COMMON_OFFSET, common::SIZE),
            (STRUCTURE_ISR, ISR_OFFSET, 1),
            (STRUCTURE_DEVICE, DEVICE_OFFSET, (NOTIFY_OFFSET - DEVICE_OFFSET) as u32),
        ];
        for (kind, offset, length) in structures {
            config.add_capability(VENDOR_CAPABILITY, &capability(kind, offset, length, &[]), &[]);
        }
        let notify = capability(
            STRUCTURE_NOTIFY,
            NOTIFY_OFFSET,
            queues as u32 * NOTIFY_MULTIPLIER,
            &NOTIFY_MULTIPLIER.to_le_bytes(),
        );
        config.add_capability(VENDOR_CAPABILITY, &notify, &[]);
        let access = capability(STRUCTURE_PCI, 0, 0, &[0; 4]);
        // The driver chooses BAR, offset and length, and writes the data.
        let mut writable = [0; PCI_DATA + 2];
        writable[CAPABILITY_BAR - 2] = 0xff;
        writable[6..].fill(0xff);
        let pci_access = config.add_capability(VENDOR_CAPABILITY, &access, &writable);

        let threads = Threads::new(device.name(), device.threads(), device.duty());
        let threads = threads.map_err(FunctionError::Threads)?;
        Ok(Self {
            device,
            threads,
            resetting: false,
            progress: (0..queues).map(|_| Arc::default()).collect(),
            memory,
            vm,
            config,
            msix_control,
            pci_access,
            common,
            msix,
            isr: Arc::new(AtomicU8::new(0)),
            kicks: Vec::new(),
            watched: None,
            posted: None,
        })
    }

    fn told(&self) -> Vec<u8> {
        self.config.told(self.pci_access + PCI_DATA)
    }

    fn start(&mut self) {
        if let Err(e) = self.try_start() {
            let cause = std::error::Error::source(&e).map(|s| format!(": {s}")).unwrap_or_default();
            log::error!("{}: not started: {e}{cause}", self.device.name());
            self.stop();
            self.common.set_needs_reset();
            let interrupt = self.interrupt(0, ISR_CONFIG);
            if let Err(e) = interrupt.trigger() {
                log::error!("{}: {e}", self.device.name());
            }
        }
    }

    fn try_start(&mut self) -> Result<(), StartError> {
        let features = self.common.features();
        self.threads.begin(self.interrupt(0, ISR_CONFIG));
        let mut queues = Vec::new();
        for (index, setup) in self.common.queues().iter().enumerate() {
            if !setup.enabled {
                self.kicks.push(None);
                queues.push(None);
                continue;
            }
            let maximum = self.device.queue_sizes()[index];
            let mut queue =
                checked_queue(setup, maximum, features, &self.memory).ok_or(StartError::Queue(index))?;
            let progress = Arc::clone(&self.progress[index]);
            let (next_avail, next_used) = progress.get();
            queue.set_next_avail(next_avail);
            queue.set_next_used(next_used);
            let kick = new_eventfd()?;
            self.kicks.push(Some(kick.try_clone().map_err(StartError::EventFd)?));
            queues.push(Some(ActiveQueue {
                queue,
                kick,
                interrupt: self.interrupt(index + 1, ISR_QUEUE),
                asked: self.threads.asked(),
                progress,
            }));
        }
        self.watch()?;
        self.device.activate(Activation {
            memory: self.memory.clone(),
            queues,
            features,
            config_interrupt: self.interrupt(0, ISR_CONFIG),
            threads: self.threads.clone(),
        })?;
        Ok(())
    }

    /// Has the device let go of its driver. Its threads may take a moment.
    fn stop(&mut self) {
        self.threads.stop();
        self.device.reset();
        self.unwatch();
        self.kicks.clear();
    }

    fn reset(&mut self) {
        self.stop();
        self.resetting = true;
        self.settle(RESET_PATIENCE);
    }

    /// Takes note of what the device's threads have done: a reset is complete when
    /// they are through, and one that gave up needs one.
    fn settle(&mut self, patience: Duration) {
        if self.resetting {
            if self.threads.wait(Instant::now() + patience) {
                self.resetting = false;
                self.common.reset();
                self.isr.store(0, Ordering::Release);
                self.progress.iter().for_each(|progress| progress.set((0, 0)));
            }
        } else if self.threads.have_failed() && self.common.is_driven() {
            self.common.set_needs_reset();
        }
    }

    fn interrupt(&self, register: usize, isr_bit: u8) -> Arc<dyn Interrupt> {
        Arc::new(VectorInterrupt {
            msix: Arc::clone(&self.msix),
            vectors: self.common.vectors(),
            register,
            isr: Arc::clone(&self.isr),
            isr_bit,
        })
    }

    /// Lets KVM watch the notification addresses where the BAR is at present.
    fn watch(&mut self) -> Result<(), StartError> {
        let wanted = self.config.memory().map(|range| range.start).filter(|_| !self.kicks.is_empty());
        if self.watched == wanted {
            return Ok(());
        }
        self.unwatch();
        if let Some(base) = wanted {
            // First, so that a failure halfway is undone.
            self.watched = wanted;
            for (address, kick) in notify_addresses(base, &self.kicks) {
                self.vm.fd.register_ioevent(kick, &address, NoDatamatch).map_err(StartError::Register)?;
            }
        }
        Ok(())
    }

    fn unwatch(&mut self) {
        if let Some(base) = self.watched.take() {
            for (address, kick) in notify_addresses(base, &self.kicks) {
                // Fails for those that were never registered.
                let _ = self.vm.fd.unregister_ioevent(kick, &address, NoDatamatch);
            }
        }
    }

    /// Parts of the BAR where a write only leaves a value for later: all of the
    /// common configuration but the status, and the messages of the MSI-X table,
    /// which count once they are unmasked.
    fn posted_ranges(&self, base: u64) -> impl Iterator<Item = Range<u64>> + use<> {
        let common =
            common::POSTED.map(|range| base + COMMON_OFFSET + range.start..base + COMMON_OFFSET + range.end);
        let table = (0..u64::from(self.msix.count())).map(move |vector| {
            let entry = base + MSIX_TABLE_OFFSET + vector * msix::ENTRY_SIZE;
            entry..entry + msix::MESSAGE_SIZE
        });
        common.into_iter().chain(table)
    }

    /// Lets writes be posted where the BAR is at present. It only saves exits: a
    /// range KVM has no room for goes without.
    fn post(&mut self) {
        let wanted = self.config.memory().map(|range| range.start);
        if self.posted == wanted {
            return;
        }
        self.unpost();
        self.posted = wanted;
        if let Some(base) = wanted {
            for range in self.posted_ranges(base) {
                if let Err(e) = self.vm.post_memory_writes(range) {
                    log::warn!("{}: {e}", self.device.name());
                    break;
                }
            }
        }
    }

    fn unpost(&mut self) {
        if let Some(base) = self.posted.take() {
            for range in self.posted_ranges(base) {
                // Fails for those that were never registered.
                let _ = self.vm.unpost_memory_writes(range);
            }
        }
    }

    /// The access to the BAR that the PCI configuration access capability
    /// describes (4.1.4.9), offset and length; `None` where it describes none.
    fn pci_window(&self) -> Option<(u64, usize)> {
        let bar = self.config.u32(self.pci_access + CAPABILITY_BAR) as u8;
        let offset = self.config.u32(self.pci_access + 8);
        let length = self.config.u32(self.pci_access + 12) as usize;
        let valid = bar == 0
            && matches!(length, 1 | 2 | 4)
            && (offset as usize).is_multiple_of(length)
            && u64::from(offset) < BAR_END;
        valid.then_some((u64::from(offset), length))
    }
}

impl PciFunction for VirtioFunction {
    fn read_config(&mut self, offset: usize, data: &mut [u8]) {
        let window = self.pci_access + PCI_DATA..self.pci_access + PCI_DATA + 4;
        if window.contains(&offset)
            && let Some((address, length)) = self.pci_window()
        {
            let mut bytes = [0; 4];
            self.read_memory(address, &mut bytes[..length]);
            self.config.set(window.start, &bytes);
        }
        self.config.read(offset, data);
    }

    fn write_config(&mut self, offset: usize, data: &[u8]) {
        self.config.write(offset, data);
        let end = offset + data.len();
        let control = self.msix_control..self.msix_control + 2;
        if offset < control.end && end > control.start {
            self.msix.set_control(self.config.u32(self.msix_control) as u16);
        }
        let window = self.pci_access + PCI_DATA;
        if (window..window + 4).contains(&offset)
            && let Some((address, length)) = self.pci_window()
        {
            let bytes = self.config.u32(window).to_le_bytes();
            self.write_memory(address, &bytes[..length]);
        }
        self.post();
        if let Err(e) = self.watch() {
            log::error!("{}: {e}", self.device.name());
            self.stop();
            self.common.set_needs_reset();
        }
    }

    fn memory(&self) -> Option<Range<u64>> {
        self.config.memory()
    }

    fn read_memory(&mut self, offset: u64, data: &mut [u8]) {
        data.fill(0);
        match offset {
            COMMON_OFFSET..ISR_OFFSET => {
                self.settle(Duration::ZERO);
                self.common.set_config_generation(self.device.config_generation());
                self.common.read(offset, data);
            }
            // Reading acknowledges.
            ISR_OFFSET => {
                if let Some(byte) = data.first_mut() {
                    *byte = self.isr.swap(0, Ordering::AcqRel);
                }
            }
            DEVICE_OFFSET..NOTIFY_OFFSET => self.device.read_config(offset - DEVICE_OFFSET, data),
            MSIX_TABLE_OFFSET..MSIX_PENDING_OFFSET => self.msix.read_table(offset - MSIX_TABLE_OFFSET, data),
            MSIX_PENDING_OFFSET..BAR_END => self.msix.read_pending(offset - MSIX_PENDING_OFFSET, data),
            _ => {}
        }
    }

    fn write_memory(&mut self, offset: u64, data: &[u8]) {
        match offset {
            COMMON_OFFSET..ISR_OFFSET => {
                self.settle(Duration::ZERO);
                // A driver waits until a reset is done.
                if self.resetting {
                    return;
                }
                match self.common.write(offset, data) {
                    Action::None => {}
                    Action::Activate => self.start(),
                    Action::Reset => self.reset(),
                }
            }
            DEVICE_OFFSET..NOTIFY_OFFSET => self.device.write_config(offset - DEVICE_OFFSET, data),
            // KVM takes notifications of a started device before they get here,
            // except through the PCI configuration access capability.
            NOTIFY_OFFSET..MSIX_TABLE_OFFSET => {
                let queue = (offset - NOTIFY_OFFSET) / u64::from(NOTIFY_MULTIPLIER);
                if let Some(Some(kick)) = self.kicks.get(queue as usize)
                    && let Err(e) = kick.write(1)
                {
                    log::error!("{}: {e}", self.device.name());
                }
            }
            MSIX_TABLE_OFFSET..MSIX_PENDING_OFFSET => self.msix.write_table(offset - MSIX_TABLE_OFFSET, data),
            _ => {}
        }
    }

    fn save(&self) -> Result<FunctionState, FunctionError> {
        if self.resetting {
            return Err(StateError::Other("the device is being reset".into()).into());
        }
        Ok(FunctionState {
            config: self.config.clone(),
            transport: self.common.save(),
            msix: self.msix.save(),
            isr: self.isr.load(Ordering::Relaxed),
            progress: self.progress.iter().map(|progress| progress.get()).collect(),
            device: self.device.save()?,
        })
    }

    fn restore(&mut self, state: FunctionState) -> Result<(), FunctionError> {
        let fits = state.progress.len() == self.progress.len()
            && self.config.restore(&state.config)
            && self.common.restore(state.transport);
        if !fits {
            return Err(FunctionError::State);
        }
        self.device.restore(state.device)?;
        self.msix.restore(state.msix)?;
        self.isr.store(state.isr, Ordering::Relaxed);
        for (progress, saved) in self.progress.iter().zip(state.progress) {
            progress.set(saved);
        }
        self.post();
        if self.common.is_driven() {
            self.start();
        }
        // Requests may wait of which KVM told the device before.
        for kick in self.kicks.iter().flatten() {
            kick.write(1).map_err(IrqError::EventFd)?;
        }
        Ok(())
    }

    fn pause(&mut self) {
        self.threads.pause();
    }

    fn resume(&mut self) {
        self.threads.resume();
    }

    fn wait(&mut self, until: Instant) -> bool {
        self.threads.wait(until)
    }

    fn shut_down(&mut self) {
        self.stop();
    }

    fn wait_for_end(&mut self, until: Instant) {
        self.threads.wait_for_end(until);
    }
}

/// Taken off the bus: nothing of it stays with KVM.
impl Drop for VirtioFunction {
    fn drop(&mut self) {
        self.stop();
        self.unpost();
        // A thread that the host keeps in a system call has a share in the vectors and may be
        // the last to let go of them: its calls are not KVM's.
        self.msix.disconnect_all();
    }
}

/// One of a device's interrupts: whatever vector its register names.
struct VectorInterrupt {
    msix: Arc<Msix>,
    vectors: Arc<[AtomicU16]>,
    register: usize,
    isr: Arc<AtomicU8>,
    isr_bit: u8,
}

impl VectorInterrupt {
    fn vector(&self) -> u16 {
        self.vectors.get(self.register).map_or(NO_VECTOR, |vector| vector.load(Ordering::Relaxed))
    }
}

impl Interrupt for VectorInterrupt {
    fn trigger(&self) -> io::Result<()> {
        self.isr.fetch_or(self.isr_bit, Ordering::AcqRel);
        match self.vector() {
            NO_VECTOR => Ok(()),
            vector => self.msix.trigger(vector),
        }
    }

    fn event(&self) -> io::Result<Option<EventFd>> {
        self.msix.event(self.vector())
    }
}

fn identity(device_type: u32) -> Identity {
    const VIRTIO_VENDOR: u16 = 0x1af4;
    const FIRST_MODERN_DEVICE: u16 = 0x1040;
    let device = FIRST_MODERN_DEVICE + device_type as u16;
    // Revision 1 and a subsystem id of at least 0x40 say "not transitional"
    // (4.1.2); the class says "none of the classes".
    Identity {
        vendor: VIRTIO_VENDOR,
        device,
        revision: 1,
        class: 0xff_0000,
        subsystem_vendor: VIRTIO_VENDOR,
        subsystem: device,
    }
}

/// Body of a `virtio_pci_cap` (4.1.4) behind id and link: its length, the kind,
/// BAR 0, id 0, padding, offset, length, and `more`.
fn capability(kind: u8, offset: u64, length: u32, more: &[u8]) -> Vec<u8> {
    let total = 16 + more.len() as u8;
    let mut body = vec![total, kind, 0, 0, 0, 0];
    body.extend((offset as u32).to_le_bytes());
    body.extend(length.to_le_bytes());
    body.extend(more);
    body
}

fn notify_addresses(
    base: u64,
    kicks: &[Option<EventFd>],
) -> impl Iterator<Item = (IoEventAddress, &EventFd)> {
    kicks.iter().enumerate().filter_map(move |(index, kick)| {
        let address = base + NOTIFY_OFFSET + index as u64 * u64::from(NOTIFY_MULTIPLIER);
        kick.as_ref().map(|kick| (IoEventAddress::Mmio(address), kick))
    })
}

fn new_eventfd() -> Result<EventFd, StartError> {
    EventFd::new(libc::EFD_CLOEXEC | libc::EFD_NONBLOCK).map_err(StartError::EventFd)
}

/// The queue as the driver set it up, where its rings lie in guest memory and
/// are aligned.
fn checked_queue(setup: &QueueSetup, maximum: u16, features: u64, memory: &GuestRam) -> Option<Queue> {
    let size = usize::from(setup.size);
    // 2.7: descriptors of 16 bytes; rings of 2 and 8 bytes per entry, with flags,
    // index and event index.
    for (address, length) in
        [(setup.descriptors, 16 * size), (setup.driver, 6 + 2 * size), (setup.device, 6 + 8 * size)]
    {
        if !memory.check_range(GuestAddress(address), length) {
            return None;
        }
    }
    let mut queue = Queue::new(maximum).ok()?;
    queue.try_set_size(setup.size).ok()?;
    queue.try_set_desc_table_address(GuestAddress(setup.descriptors)).ok()?;
    queue.try_set_avail_ring_address(GuestAddress(setup.driver)).ok()?;
    queue.try_set_used_ring_address(GuestAddress(setup.device)).ok()?;
    queue.set_event_idx(features & (1 << VIRTIO_RING_F_EVENT_IDX) != 0);
    queue.set_ready(true);
    debug_assert!(features & (1 << VIRTIO_F_VERSION_1) != 0);
    queue.is_valid(memory).then_some(queue)
}
