//! Writes that cause no return to user space (`KVM_CAP_COALESCED_MMIO`,
//! `KVM_CAP_COALESCED_PIO`).
//!
//! Many device registers only hold a value until another access makes use of
//! it: the PCI address port until the data port is read, a queue's address until
//! the driver sets DRIVER_OK. KVM puts writes to such registers into a page
//! shared with the monitor; every exit looks there first, so they take effect
//! before anything that comes after them. A PCI scan has half the exits that
//! way, setting up a virtio device a third.

use std::os::fd::AsRawFd;
use std::ptr::NonNull;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Mutex, PoisonError};

use kvm_bindings::{KVM_COALESCED_MMIO_PAGE_OFFSET, kvm_coalesced_mmio, kvm_coalesced_mmio_ring};
use kvm_ioctls::VcpuFd;
use vmm_sys_util::errno;

use super::KvmError;
use crate::arch::layout::PAGE_SIZE;

const ENTRIES: usize =
    (PAGE_SIZE as usize - size_of::<kvm_coalesced_mmio_ring>()) / size_of::<kvm_coalesced_mmio>();

/// Where a write went.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Target {
    /// A port.
    Port(u16),
    /// An address of device memory.
    Memory(u64),
}

/// A VM's page of writes that have not taken effect yet.
pub struct PostedWrites {
    page: NonNull<kvm_coalesced_mmio_ring>,
    /// Held by the thread that takes entries out.
    reader: Mutex<()>,
}

// SAFETY: the page is mapped until drop and belongs to no thread; what is read
// from it is read by the holder of `reader` or atomically.
unsafe impl Send for PostedWrites {}
// SAFETY: as above.
unsafe impl Sync for PostedWrites {}

impl PostedWrites {
    /// Maps the page; `vcpu` is any of the VM's.
    pub fn map(vcpu: &VcpuFd) -> Result<Self, KvmError> {
        // SAFETY: a fresh shared mapping of one page of the vCPU's descriptor,
        // which KVM has at that offset where the capability exists.
        let page = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                PAGE_SIZE as usize,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_SHARED,
                vcpu.as_raw_fd(),
                libc::off_t::from(KVM_COALESCED_MMIO_PAGE_OFFSET) * PAGE_SIZE as libc::off_t,
            )
        };
        let page = NonNull::new(page)
            .filter(|page| page.as_ptr() != libc::MAP_FAILED)
            .ok_or_else(errno::Error::last)
            .map_err(KvmError::request("mmap of the coalesced ring"))?;
        Ok(Self { page: page.cast(), reader: Mutex::new(()) })
    }

    /// Hands the waiting writes to `write`, oldest first. When it returns, all
    /// that the calling vCPU has written have taken effect.
    pub fn drain(&self, mut write: impl FnMut(Target, &[u8])) {
        // What the calling vCPU wrote is there: KVM put it in on this very thread.
        if self.first().load(Ordering::Relaxed) == self.last().load(Ordering::Acquire) {
            return;
        }
        let _reader = self.reader.lock().unwrap_or_else(PoisonError::into_inner);
        // Read once: another vCPU that never stops writing holds nobody up.
        let last = self.last().load(Ordering::Acquire) as usize;
        let mut first = self.first().load(Ordering::Relaxed) as usize;
        while first != last && first < ENTRIES {
            // SAFETY: `first` is below ENTRIES, so the entry is inside the page.
            let entry = unsafe { self.entries().add(first) };
            // SAFETY: KVM writes no entry between `first` and `last`.
            let entry = unsafe { entry.read() };
            // SAFETY: both members of the union are plain integers of one size.
            let is_port = unsafe { entry.__bindgen_anon_1.pio } != 0;
            let target =
                if is_port { Target::Port(entry.phys_addr as u16) } else { Target::Memory(entry.phys_addr) };
            write(target, entry.data.get(..entry.len as usize).unwrap_or(&[]));
            first = (first + 1) % ENTRIES;
            // Only now: whoever finds the page empty may rely on the write.
            self.first().store(first as u32, Ordering::Release);
        }
    }

    fn first(&self) -> &AtomicU32 {
        // SAFETY: the page is mapped as long as `self`; the place is a projection, not a read.
        let pointer = unsafe { &raw mut (*self.page.as_ptr()).first };
        // SAFETY: an aligned u32 that KVM and this process access atomically only.
        unsafe { AtomicU32::from_ptr(pointer) }
    }

    fn last(&self) -> &AtomicU32 {
        // SAFETY: as in `first`.
        let pointer = unsafe { &raw mut (*self.page.as_ptr()).last };
        // SAFETY: as in `first`.
        unsafe { AtomicU32::from_ptr(pointer) }
    }

    fn entries(&self) -> *const kvm_coalesced_mmio {
        // SAFETY: the page is mapped as long as `self`; only an address is taken.
        unsafe { (&raw const (*self.page.as_ptr()).coalesced_mmio).cast() }
    }
}

impl Drop for PostedWrites {
    fn drop(&mut self) {
        // SAFETY: the mapping was made in `map` and nothing refers to it any more.
        unsafe { libc::munmap(self.page.as_ptr().cast(), PAGE_SIZE as usize) };
    }
}
