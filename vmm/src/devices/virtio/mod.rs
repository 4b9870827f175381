//! virtio devices, one folder each, behind one trait.
//!
//! The transport ([`crate::pci`]) owns what the driver negotiates (status,
//! features, queue addresses, MSI-X) and calls [`VirtioDevice::activate`] once
//! on DRIVER_OK. From then on the device serves its queues on threads of its
//! own, named after it: no lock is shared between a vCPU and the data path, one
//! slow device does not hold up another, and each kind of thread can have its
//! own seccomp filter. The threads ([`worker`]) are there from the start and wait.
//!
//! Everything read from a queue or written to the configuration space comes
//! from a hostile guest: lengths and addresses are checked, work per request is
//! bounded, and a malformed chain is completed with length 0 or the device
//! stops serving; it never panics.

pub mod balloon;
pub mod blk;
pub mod buffers;
pub mod fs;
pub mod mem;
pub mod net;
pub mod pmem;
pub mod ring;
pub mod vsock;
pub mod worker;

#[cfg(test)]
mod test_cost;
#[cfg(test)]
mod test_queue;

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicU16, Ordering};

use thiserror::Error;
use virtio_queue::Queue;
use vmm_sys_util::eventfd::EventFd;

use crate::jail::Duty;
use crate::memory::GuestRam;
use worker::{Asked, Threads};

/// Raises one of a device's interrupts in the guest.
pub trait Interrupt: Send + Sync {
    /// Raises the interrupt, or marks it pending where the guest masked it.
    fn trigger(&self) -> io::Result<()>;

    /// What others (vhost) write to, to raise it as it is set up at present: none
    /// where it leads nowhere.
    fn event(&self) -> io::Result<Option<EventFd>> {
        Ok(None)
    }
}

/// A queue the driver has set up.
pub struct ActiveQueue {
    /// The queue, configured and validated by the transport.
    pub queue: Queue,
    /// Written by KVM (ioeventfd) when the driver notifies the queue.
    pub kick: EventFd,
    /// Tells the driver that buffers were used; the device asks
    /// `Queue::needs_notification` first.
    pub interrupt: Arc<dyn Interrupt>,
    /// What is asked of the thread that serves it.
    pub asked: Asked,
    /// Where the transport sees how far it was served.
    pub progress: Arc<Progress>,
}

/// How far a queue was served: the indices of the next available and the next used
/// entry. They are of one moment while no thread is at work.
#[derive(Debug, Default)]
pub struct Progress {
    avail: AtomicU16,
    used: AtomicU16,
}

impl Progress {
    /// The next available and the next used entry.
    pub fn get(&self) -> (u16, u16) {
        (self.avail.load(Ordering::Acquire), self.used.load(Ordering::Acquire))
    }

    fn set_avail(&self, index: u16) {
        self.avail.store(index, Ordering::Release);
    }

    fn set_used(&self, index: u16) {
        self.used.store(index, Ordering::Release);
    }

    /// As it was when it was saved.
    pub fn set(&self, (avail, used): (u16, u16)) {
        self.set_avail(avail);
        self.set_used(used);
    }
}

/// What a device receives on DRIVER_OK.
pub struct Activation {
    /// Guest memory.
    pub memory: GuestRam,
    /// The device's queues in order; queues the driver left disabled are `None`.
    pub queues: Vec<Option<ActiveQueue>>,
    /// The features both sides agreed on.
    pub features: u64,
    /// Tells the driver that the configuration space changed.
    pub config_interrupt: Arc<dyn Interrupt>,
    /// The device's threads, as many as it asks for, with nothing to do.
    pub threads: Threads,
}

/// Why a device could not be activated; the transport then sets
/// DEVICE_NEEDS_RESET.
#[derive(Debug, Error)]
pub enum ActivateError {
    /// The driver did not enable a queue the device cannot do without.
    #[error("queue {0} is not enabled")]
    MissingQueue(usize),
    /// The device's thread or its event descriptors could not be made.
    #[error("the device's thread could not be given work")]
    Worker(#[source] io::Error),
}

/// Why a device's own state was not saved or taken on.
#[derive(Debug, Error)]
pub enum StateError {
    /// What it stands for cannot be part of a snapshot.
    #[error("a {0} device cannot be saved")]
    Unsaved(String),
    /// The saved state makes no sense.
    #[error("the device's state")]
    Malformed(#[from] serde_json::Error),
    /// It is another device's.
    #[error("{0}")]
    Other(String),
}

/// A virtio device (virtio specification 1.2), apart from its transport.
pub trait VirtioDevice: Send {
    /// Device type (section 5).
    fn device_type(&self) -> u32;

    /// The device's name in logs and thread names, at most 15 bytes.
    fn name(&self) -> &str;

    /// Largest size of each queue, a power of two.
    fn queue_sizes(&self) -> &[u16];

    /// Device-specific feature bits and ring feature bits the device offers;
    /// the transport adds VIRTIO_F_VERSION_1.
    fn features(&self) -> u64;

    /// Reads the device's configuration space; bytes beyond its end read as 0.
    fn read_config(&self, offset: u64, data: &mut [u8]);

    /// Writes the device's configuration space; ignored where read-only.
    fn write_config(&mut self, _offset: u64, _data: &[u8]) {}

    /// Another number after each change of the configuration space, so that the
    /// driver sees that what it read in several pieces does not belong together.
    fn config_generation(&self) -> u8 {
        0
    }

    /// How many threads it serves its queues on.
    fn threads(&self) -> usize {
        1
    }

    /// What its threads do.
    fn duty(&self) -> Duty;

    /// Starts serving the queues, on its threads.
    fn activate(&mut self, activation: Activation) -> Result<(), ActivateError>;

    /// What it is beside what the driver negotiated and how far its queues were
    /// served. None of its threads is at work.
    fn save(&self) -> Result<serde_json::Value, StateError> {
        Err(StateError::Unsaved(self.name().to_owned()))
    }

    /// Takes on what such a device saved; it is not active.
    fn restore(&mut self, _state: serde_json::Value) -> Result<(), StateError> {
        Err(StateError::Unsaved(self.name().to_owned()))
    }

    /// The driver has let go of it: what the device knows of the driver is to be
    /// forgotten. Its threads have been told to stop and may not have yet.
    fn reset(&mut self) {}
}

/// Answers a read of a configuration space that is `config` and zeroes beyond.
pub fn read_config_bytes(config: &[u8], offset: u64, data: &mut [u8]) {
    let rest = usize::try_from(offset).ok().and_then(|start| config.get(start..)).unwrap_or(&[]);
    for (index, byte) in data.iter_mut().enumerate() {
        *byte = rest.get(index).copied().unwrap_or(0);
    }
}
