//! Port writes that wait in a ring (`KVM_CAP_COALESCED_PIO`).
//!
//! A configuration access is a write to the address port and an access to the
//! data port. With the address port registered here its writes cause no return
//! to user space: KVM puts them into a page shared with the monitor, and the
//! exit for the data port finds them there. That halves the exits of a PCI scan.

use std::ptr::NonNull;
use std::sync::atomic::{AtomicU32, Ordering, fence};
use std::sync::{Mutex, PoisonError};

use std::os::fd::AsRawFd;

use kvm_bindings::{KVM_COALESCED_MMIO_PAGE_OFFSET, kvm_coalesced_mmio, kvm_coalesced_mmio_ring};
use kvm_ioctls::{IoEventAddress, VcpuFd, VmFd};
use vmm_sys_util::errno;

use super::KvmError;
use crate::arch::layout::PAGE_SIZE;

const ENTRIES: usize =
    (PAGE_SIZE as usize - size_of::<kvm_coalesced_mmio_ring>()) / size_of::<kvm_coalesced_mmio>();

/// The ring of a VM.
pub struct PortRing {
    page: NonNull<kvm_coalesced_mmio_ring>,
    /// Held by the thread that takes entries out.
    reader: Mutex<()>,
}

// SAFETY: the page is mapped until drop and belongs to no thread; what is read
// from it is read by the holder of `reader` or atomically.
unsafe impl Send for PortRing {}
// SAFETY: as above.
unsafe impl Sync for PortRing {}

impl PortRing {
    /// Lets writes of `port` and the three after it wait; `vcpu` is any of the VM's.
    pub fn new(vm: &VmFd, vcpu: &VcpuFd, port: u16) -> Result<Self, KvmError> {
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
        let ring = Self { page: page.cast(), reader: Mutex::new(()) };
        vm.register_coalesced_mmio(IoEventAddress::Pio(port.into()), 4)
            .map_err(KvmError::request("KVM_REGISTER_COALESCED_MMIO"))?;
        Ok(ring)
    }

    /// Hands the waiting writes to `write`, oldest first.
    pub fn drain(&self, mut write: impl FnMut(u16, &[u8])) {
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
            let data = entry.data.get(..entry.len as usize).unwrap_or(&[]);
            write(entry.phys_addr as u16, data);
            first = (first + 1) % ENTRIES;
            fence(Ordering::Release);
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

impl Drop for PortRing {
    fn drop(&mut self) {
        // SAFETY: the mapping was made in `new` and nothing refers to it any more.
        unsafe { libc::munmap(self.page.as_ptr().cast(), PAGE_SIZE as usize) };
    }
}
