//! vhost-net: the host's kernel moves the frames (`linux/vhost.h`).
//!
//! One descriptor of `/dev/vhost-net` serves one pair of queues. The kernel is given
//! the guest's memory as far as it was granted, where the rings lie, the eventfd that
//! KVM writes to when the driver notifies and the one that raises the queue's
//! interrupt: while the vector is masked that one is taken off KVM, and what vhost
//! writes waits in it ([`msix`](crate::pci::msix)). What it reads in the rings is the
//! guest's word; the kernel checks it against the memory it was given.
//!
//! These dozen requests are made here, since the `vhost` crate brings another
//! `vm-memory` than the rest of the monitor has.

use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::sync::{Arc, Mutex, PoisonError};

use virtio_bindings::virtio_config::VIRTIO_F_VERSION_1;
use virtio_bindings::virtio_net::VIRTIO_NET_F_MRG_RXBUF;
use virtio_bindings::virtio_ring::{VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC};
use vm_memory::{GuestAddress, GuestMemory, GuestMemoryRegion};
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};
use vmm_sys_util::ioctl::{ioctl, ioctl_with_mut_ref, ioctl_with_ptr, ioctl_with_ref};
use vmm_sys_util::{ioctl_ior_nr, ioctl_iow_nr, ioctl_iowr_nr};

use super::tap::Tap;
use crate::devices::virtio::ring::{Layout, Ring};
use crate::memory::GuestRam;
use crate::memory::ram::MemoryListener;
use crate::memory::windows::WINDOWS;

/// The features that concern the rings, which vhost must know of; the others are
/// between the guest and the tap.
const RING_FEATURES: u64 = 1 << VIRTIO_F_VERSION_1
    | 1 << VIRTIO_RING_F_EVENT_IDX
    | 1 << VIRTIO_RING_F_INDIRECT_DESC
    | 1 << VIRTIO_NET_F_MRG_RXBUF;
/// "None" where a descriptor is expected.
const UNBIND: RawFd = -1;
/// Regions of memory: two that the machine starts with, two it grows into, and files it can read.
const MAX_REGIONS: usize = 4 + WINDOWS;

const VHOST: libc::c_uint = 0xaf;

#[repr(C)]
#[derive(Clone, Copy, Default)]
struct VringState {
    index: u32,
    number: u32,
}

#[repr(C)]
#[derive(Clone, Copy, Default)]
struct VringFile {
    index: u32,
    fd: i32,
}

#[repr(C)]
#[derive(Clone, Copy, Default)]
struct VringAddress {
    index: u32,
    flags: u32,
    descriptors: u64,
    used: u64,
    avail: u64,
    log: u64,
}

#[repr(C)]
#[derive(Clone, Copy, Default)]
struct MemoryRegion {
    guest: u64,
    bytes: u64,
    user: u64,
    padding: u64,
}

#[repr(C)]
struct MemoryTable {
    count: u32,
    padding: u32,
    regions: [MemoryRegion; MAX_REGIONS],
}

/// `struct vhost_memory`, whose regions follow it.
#[repr(C)]
struct MemoryHeader {
    count: u32,
    padding: u32,
}

ioctl_ior_nr!(VHOST_GET_FEATURES, VHOST, 0x00, u64);
ioctl_iow_nr!(VHOST_SET_FEATURES, VHOST, 0x00, u64);
vmm_sys_util::ioctl_io_nr!(VHOST_SET_OWNER, VHOST, 0x01);
ioctl_iow_nr!(VHOST_SET_MEM_TABLE, VHOST, 0x03, MemoryHeader);
ioctl_iow_nr!(VHOST_SET_VRING_NUM, VHOST, 0x10, VringState);
ioctl_iow_nr!(VHOST_SET_VRING_ADDR, VHOST, 0x11, VringAddress);
ioctl_iow_nr!(VHOST_SET_VRING_BASE, VHOST, 0x12, VringState);
ioctl_iowr_nr!(VHOST_GET_VRING_BASE, VHOST, 0x12, VringState);
ioctl_iow_nr!(VHOST_SET_VRING_KICK, VHOST, 0x20, VringFile);
ioctl_iow_nr!(VHOST_SET_VRING_CALL, VHOST, 0x21, VringFile);
ioctl_iow_nr!(VHOST_SET_VRING_ERR, VHOST, 0x22, VringFile);
ioctl_iow_nr!(VHOST_NET_SET_BACKEND, VHOST, 0x30, VringFile);

/// Which step failed.
#[derive(Debug, thiserror::Error)]
#[error("{step}: {source}")]
pub(super) struct VhostError {
    step: &'static str,
    source: io::Error,
}

fn failed(step: &'static str) -> impl FnOnce(io::Error) -> VhostError {
    move |source| VhostError { step, source }
}

/// Whether the request that returned this was done.
fn done(step: &'static str, answer: libc::c_int) -> Result<(), VhostError> {
    if answer < 0 { Err(failed(step)(io::Error::last_os_error())) } else { Ok(()) }
}

/// The vhost-net descriptors of an interface, one per queue pair.
#[derive(Debug)]
pub(super) struct Vhost {
    pairs: Vec<File>,
    /// Of a device that has been started; held while the kernel is told of memory, so
    /// that the last to tell knows the most.
    memory: Mutex<Option<GuestRam>>,
    /// Written to, by the kernel or here, when vhost cannot go on.
    pub(super) trouble: EventFd,
}

impl Vhost {
    /// Makes the kernel's side work for this process.
    pub(super) fn new(pairs: Vec<File>) -> Result<Self, VhostError> {
        let trouble = EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC).map_err(failed("eventfd"))?;
        for pair in &pairs {
            // SAFETY: the request takes nothing.
            done("VHOST_SET_OWNER", unsafe { ioctl(pair, VHOST_SET_OWNER()) })?;
            let mut features = 0u64;
            // SAFETY: the request fills a number of that size.
            done("VHOST_GET_FEATURES", unsafe {
                ioctl_with_mut_ref(pair, VHOST_GET_FEATURES(), &mut features)
            })?;
            if features & RING_FEATURES != RING_FEATURES {
                let missing = RING_FEATURES & !features;
                let source = io::Error::other(format!("features {missing:#x} are missing"));
                return Err(failed("VHOST_GET_FEATURES")(source));
            }
        }
        Ok(Self { pairs, memory: Mutex::new(None), trouble })
    }

    /// Tells the kernel what was negotiated and what it may touch, and hears of more.
    pub(super) fn prepare(self: &Arc<Self>, features: u64, memory: &GuestRam) -> Result<(), VhostError> {
        let features = features & RING_FEATURES;
        for pair in &self.pairs {
            // SAFETY: the request reads a number of that size.
            done("VHOST_SET_FEATURES", unsafe { ioctl_with_ref(pair, VHOST_SET_FEATURES(), &features) })?;
        }
        let mut known = self.memory.lock().unwrap_or_else(PoisonError::into_inner);
        if known.is_none() {
            let listener: Arc<Self> = Arc::clone(self);
            memory.listen(Arc::downgrade(&(listener as Arc<dyn MemoryListener>)));
            *known = Some(memory.clone());
        }
        self.tell(memory)
    }

    /// Gives the kernel all memory there is for the guest, and none other.
    fn tell(&self, memory: &GuestRam) -> Result<(), VhostError> {
        let mut table = MemoryTable { count: 0, padding: 0, regions: [MemoryRegion::default(); MAX_REGIONS] };
        let granted =
            memory.iter().map(|region| (region.start_addr().0, region.len(), region.as_ptr() as u64));
        // What the guest can only read the kernel cannot write to either.
        let windows = memory.windows().iter();
        let lent = windows.map(|window| (window.start().0, window.len(), window.as_ptr() as u64));
        for (guest, bytes, user) in granted.chain(lent) {
            if bytes == 0 {
                continue;
            }
            let place = table.regions.get_mut(table.count as usize).ok_or_else(|| {
                failed("VHOST_SET_MEM_TABLE")(io::Error::other("there are too many regions of memory"))
            })?;
            *place = MemoryRegion { guest, bytes, user, padding: 0 };
            table.count += 1;
        }
        for pair in &self.pairs {
            let header = (&raw const table).cast::<MemoryHeader>();
            // SAFETY: a header and as many regions behind it as it says. They are
            // mapped as long as the guest's memory is, which the device outlives not.
            done("VHOST_SET_MEM_TABLE", unsafe { ioctl_with_ptr(pair, VHOST_SET_MEM_TABLE(), header) })?;
        }
        Ok(())
    }

    /// Hands a pair's rings, as far as they were served, and the tap to the kernel.
    pub(super) fn start(
        &self,
        index: usize,
        memory: &GuestRam,
        rings: [&Ring; 2],
        tap: &Tap,
    ) -> Result<(), VhostError> {
        let missing = || failed("vhost")(io::ErrorKind::NotFound.into());
        let pair = self.pairs.get(index).ok_or_else(missing)?;
        let started = self.set_up(pair, memory, rings).and_then(|()| {
            // The kernel begins with the first of these.
            (0..).zip(rings).try_for_each(|(ring, _)| set_backend(pair, ring, tap.as_raw_fd()))
        });
        if started.is_err() {
            let _ = self.stop(index);
        }
        started
    }

    fn set_up(&self, pair: &File, memory: &GuestRam, rings: [&Ring; 2]) -> Result<(), VhostError> {
        for (index, ring) in (0..).zip(rings) {
            let layout = ring.layout();
            let size = VringState { index, number: layout.size.into() };
            // SAFETY: the request reads such a structure.
            done("VHOST_SET_VRING_NUM", unsafe { ioctl_with_ref(pair, VHOST_SET_VRING_NUM(), &size) })?;
            let base = VringState { index, number: ring.next_avail().into() };
            // SAFETY: as above.
            done("VHOST_SET_VRING_BASE", unsafe { ioctl_with_ref(pair, VHOST_SET_VRING_BASE(), &base) })?;
            let address = address(index, memory, layout)
                .ok_or_else(|| failed("VHOST_SET_VRING_ADDR")(io::Error::other("a ring is in two pieces")))?;
            // SAFETY: as above; the kernel checks the addresses against its table.
            done("VHOST_SET_VRING_ADDR", unsafe { ioctl_with_ref(pair, VHOST_SET_VRING_ADDR(), &address) })?;
            let call = ring.interrupt_event().map_err(failed("eventfd"))?;
            let call = call.as_ref().map_or(UNBIND, AsRawFd::as_raw_fd);
            set_event(pair, Event::Call, index, call)?;
            set_event(pair, Event::Error, index, self.trouble.as_raw_fd())?;
            set_event(pair, Event::Kick, index, ring.kick().as_raw_fd())?;
        }
        Ok(())
    }

    /// Takes a pair's rings back; the next available entry of each, once nothing of it
    /// is under way.
    pub(super) fn stop(&self, index: usize) -> Result<[u16; 2], VhostError> {
        let Some(pair) = self.pairs.get(index) else { return Ok([0; 2]) };
        let mut next = [0; 2];
        for ring in 0..2 {
            set_backend(pair, ring, UNBIND)?;
        }
        for (ring, next) in (0..).zip(&mut next) {
            let mut state = VringState { index: ring, number: 0 };
            // SAFETY: the request reads and fills such a structure.
            done("VHOST_GET_VRING_BASE", unsafe {
                ioctl_with_mut_ref(pair, VHOST_GET_VRING_BASE(), &mut state)
            })?;
            *next = state.number as u16;
            for event in [Event::Kick, Event::Call, Event::Error] {
                set_event(pair, event, ring, UNBIND)?;
            }
        }
        Ok(next)
    }
}

impl MemoryListener for Vhost {
    /// The guest may name it from now on: one that the kernel cannot be told of is one
    /// it cannot serve.
    fn changed(&self) {
        let known = self.memory.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(Err(error)) = known.as_ref().map(|memory| self.tell(memory)) {
            log::error!("vhost-net: {error}");
            let _ = self.trouble.write(1);
        }
    }
}

#[derive(Clone, Copy)]
enum Event {
    Kick,
    Call,
    Error,
}

fn set_event(pair: &File, event: Event, index: u32, fd: RawFd) -> Result<(), VhostError> {
    let (step, request) = match event {
        Event::Kick => ("VHOST_SET_VRING_KICK", VHOST_SET_VRING_KICK()),
        Event::Call => ("VHOST_SET_VRING_CALL", VHOST_SET_VRING_CALL()),
        Event::Error => ("VHOST_SET_VRING_ERR", VHOST_SET_VRING_ERR()),
    };
    // SAFETY: each of them reads such a structure.
    done(step, unsafe { ioctl_with_ref(pair, request, &VringFile { index, fd }) })
}

fn set_backend(pair: &File, index: u32, fd: RawFd) -> Result<(), VhostError> {
    let file = VringFile { index, fd };
    // SAFETY: the request reads such a structure.
    done("VHOST_NET_SET_BACKEND", unsafe { ioctl_with_ref(pair, VHOST_NET_SET_BACKEND(), &file) })
}

/// Where a ring lies in this process, where its parts are each in one region.
fn address(index: u32, memory: &GuestRam, layout: Layout) -> Option<VringAddress> {
    let size = usize::from(layout.size);
    let place = |start: GuestAddress, bytes: usize| {
        let slice = memory.get_slice(start, bytes).ok()?;
        Some(slice.ptr_guard_mut().as_ptr() as u64)
    };
    Some(VringAddress {
        index,
        flags: 0,
        descriptors: place(layout.descriptors, 16 * size)?,
        used: place(layout.used, 6 + 8 * size)?,
        avail: place(layout.avail, 6 + 2 * size)?,
        log: 0,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn requests_have_the_numbers_of_the_kernels_header() {
        let numbers = [
            (VHOST_GET_FEATURES(), 0x8008_af00),
            (VHOST_SET_FEATURES(), 0x4008_af00),
            (VHOST_SET_OWNER(), 0xaf01),
            (VHOST_SET_MEM_TABLE(), 0x4008_af03),
            (VHOST_SET_VRING_NUM(), 0x4008_af10),
            (VHOST_SET_VRING_ADDR(), 0x4028_af11),
            (VHOST_SET_VRING_BASE(), 0x4008_af12),
            (VHOST_GET_VRING_BASE(), 0xc008_af12),
            (VHOST_SET_VRING_KICK(), 0x4008_af20),
            (VHOST_SET_VRING_CALL(), 0x4008_af21),
            (VHOST_SET_VRING_ERR(), 0x4008_af22),
            (VHOST_NET_SET_BACKEND(), 0x4008_af30),
        ];
        for (ours, kernels) in numbers {
            assert_eq!(ours, kernels, "{kernels:#x}");
        }
    }

    #[test]
    fn what_is_no_vhost_is_refused() {
        let error = Vhost::new(vec![tempfile::tempfile().unwrap()]).unwrap_err().to_string();
        assert!(error.starts_with("VHOST_SET_OWNER: "), "{error}");
    }
}
