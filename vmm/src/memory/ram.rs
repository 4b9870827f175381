//! Guest memory as the monitor reaches it: what the machine started with, and
//! regions behind that into which it can grow ([`Room`]).
//!
//! A whole region is there from the start, mapped and never touched, which
//! costs a mapping; but it is as long as what was granted of it, and to ask for
//! more is to ask for an address outside of memory. So a guest cannot have a
//! device write where the guest itself may not. A grant is never taken back
//! while the machine runs: what was found inside once stays inside.

use std::fmt;
use std::fs::File;
use std::io;
use std::ops::Range;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};

use vm_memory::bitmap::BS;
use vm_memory::{
    FileOffset, GuestAddress, GuestMemory, GuestMemoryError, GuestMemoryRegion, GuestMemoryRegionBytes,
    GuestRegionMmap, MemoryRegionAddress, VolatileSlice,
};

use super::backing::{self, Change};
use super::windows::{Window, WindowError};
use crate::arch::layout::PAGE_SIZE;

/// One mapping, of which the first bytes are guest memory.
#[derive(Debug)]
pub struct Region {
    mapping: GuestRegionMmap,
    granted: AtomicU64,
}

/// All of guest memory; clones are the same memory.
#[derive(Clone)]
pub struct GuestRam {
    /// Sorted, apart from each other; those that grow are the last.
    regions: Arc<[Region]>,
    boot_regions: usize,
    /// Which of them grows, by [`Room`].
    growing: [Option<usize>; 2],
    /// What is beside guest memory.
    windows: Arc<[Window]>,
    listeners: Arc<Mutex<Vec<Weak<dyn MemoryListener>>>>,
}

impl fmt::Debug for GuestRam {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("GuestRam").field("regions", &self.regions).finish_non_exhaustive()
    }
}

/// What a machine can grow into.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Room {
    /// Memory like that it started with.
    Memory,
    /// The host's huge pages (hugetlbfs).
    Hugetlb,
}

impl Room {
    /// All of them.
    pub const ALL: [Self; 2] = [Self::Memory, Self::Hugetlb];
}

/// Whoever has others look into guest memory, who have to know what it is (vhost).
pub trait MemoryListener: Send + Sync {
    /// More has become guest memory, or a file has come that the guest can read, which it has not
    /// been told yet; or such a file has gone.
    fn changed(&self);
}

impl Region {
    /// Where the mapping starts in this process.
    pub fn as_ptr(&self) -> *mut u8 {
        self.mapping.as_ptr()
    }

    /// Bytes of the mapping, granted or not.
    pub fn mapped(&self) -> u64 {
        self.mapping.len()
    }

    /// Allocates or discards the pages behind a range of it.
    pub fn change(&self, range: Range<u64>, change: Change) -> io::Result<()> {
        let backing = self.mapping.file_offset().ok_or(io::ErrorKind::NotFound)?;
        backing::change(backing, range, change)
    }

    /// Asks for huge pages, or for none, behind a range of it.
    pub(super) fn advise(&self, range: Range<u64>, huge: bool) {
        backing::advise(&self.mapping, range, huge);
    }
}

impl GuestMemoryRegion for Region {
    type B = ();

    fn len(&self) -> u64 {
        self.granted.load(Ordering::Acquire)
    }

    fn start_addr(&self) -> GuestAddress {
        self.mapping.start_addr()
    }

    fn last_addr(&self) -> GuestAddress {
        // Of an empty region nothing uses it: it is never found.
        GuestAddress(self.start_addr().0.saturating_add(self.len()).saturating_sub(1))
    }

    fn bitmap(&self) -> BS<'_, ()> {}

    fn get_host_address(&self, offset: MemoryRegionAddress) -> Result<*mut u8, GuestMemoryError> {
        self.check_address(offset).ok_or(GuestMemoryError::InvalidBackendAddress)?;
        self.mapping.get_host_address(offset)
    }

    fn file_offset(&self) -> Option<&FileOffset> {
        self.mapping.file_offset()
    }

    fn get_slice(
        &self,
        offset: MemoryRegionAddress,
        count: usize,
    ) -> Result<VolatileSlice<'_, ()>, GuestMemoryError> {
        match offset.0.checked_add(count as u64) {
            Some(end) if end <= self.len() => self.mapping.get_slice(offset, count),
            _ => Err(GuestMemoryError::InvalidBackendAddress),
        }
    }
}

impl GuestMemoryRegionBytes for Region {}

impl GuestMemory for GuestRam {
    type R = Region;

    fn num_regions(&self) -> usize {
        self.regions.len()
    }

    fn find_region(&self, addr: GuestAddress) -> Option<&Region> {
        let inside = |region: &&Region| region.to_region_addr(addr).is_some();
        self.regions.iter().find(inside)
    }

    fn iter(&self) -> impl Iterator<Item = &Region> {
        self.regions.iter()
    }
}

impl GuestRam {
    /// Memory of `boot` and, behind it, `growing` and `hugetlb`, of which nothing is granted,
    /// and `windows`, which are free.
    pub(super) fn new(
        boot: Vec<GuestRegionMmap>,
        growing: Option<GuestRegionMmap>,
        hugetlb: Option<GuestRegionMmap>,
        windows: Vec<Window>,
    ) -> Self {
        let boot_regions = boot.len();
        let places = [
            growing.is_some().then_some(boot_regions),
            hugetlb.is_some().then_some(boot_regions + usize::from(growing.is_some())),
        ];
        let whole = |mapping: GuestRegionMmap| {
            let granted = AtomicU64::new(mapping.len());
            Region { mapping, granted }
        };
        let none = |mapping| Region { mapping, granted: AtomicU64::new(0) };
        let more = growing.into_iter().chain(hugetlb).map(none);
        let regions = boot.into_iter().map(whole).chain(more).collect();
        Self { regions, boot_regions, growing: places, windows: windows.into(), listeners: Arc::default() }
    }

    /// What the machine starts with.
    pub fn boot_regions(&self) -> &[Region] {
        self.regions.get(..self.boot_regions).unwrap_or_default()
    }

    /// A region it can grow into.
    pub fn growing(&self, room: Room) -> Option<&Region> {
        let [memory, hugetlb] = self.growing;
        let place = match room {
            Room::Memory => memory,
            Room::Hugetlb => hugetlb,
        };
        place.and_then(|place| self.regions.get(place))
    }

    /// Makes the first `bytes` of a region it can grow into guest memory; what
    /// was granted before stays.
    pub fn grant(&self, room: Room, bytes: u64) {
        if let Some(region) = self.growing(room) {
            region.granted.fetch_max(bytes.min(region.mapped()), Ordering::AcqRel);
        }
        self.tell();
    }

    /// Gives the whole pages of a range that its driver does not use back to the host; they are zeroes when they are
    /// used again. Those that came from the host's huge pages stay, as there might be no more of them then; so
    /// does what a file is mapped over.
    pub fn discard(&self, start: GuestAddress, bytes: u64) -> io::Result<()> {
        let inside = |region: &&Region| {
            let end = start.0.checked_add(bytes);
            let end_of_region = region.start_addr().0 + region.len();
            region.start_addr() <= start && end.is_some_and(|end| end <= end_of_region)
        };
        let hugetlb = self.growing(Room::Hugetlb).map(GuestMemoryRegion::start_addr);
        let region = self.regions.iter().find(inside).ok_or(io::ErrorKind::InvalidInput)?;
        if Some(region.start_addr()) == hugetlb || !(start.0 | bytes).is_multiple_of(PAGE_SIZE) {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        let first = start.0 - region.start_addr().0;
        region.change(first..first + bytes, Change::Discard)
    }

    /// Maps `file` into a window that is free; which one. The guest can't see it there before
    /// KVM is told of [`GuestRam::windows`], and drivers can't before [`GuestRam::lend`].
    pub fn map(&self, file: &File) -> Result<(usize, u64), WindowError> {
        let free = self.windows.iter().position(Window::is_empty).ok_or(WindowError::Full)?;
        let bytes = self.windows.get(free).ok_or(WindowError::Full)?.map(file)?;
        Ok((free, bytes))
    }

    /// Lets drivers have the first `bytes` of a window read, where a file was mapped.
    pub fn lend(&self, window: usize, bytes: u64) {
        if let Some(window) = self.windows.get(window) {
            window.lend(bytes);
        }
        self.tell();
    }

    /// Lets go of the file behind a window, which the guest does not see any more.
    pub fn take_back(&self, window: usize) {
        let Some(window) = self.windows.get(window) else { return };
        window.take_back();
        self.tell();
    }

    /// The windows.
    pub fn windows(&self) -> &[Window] {
        &self.windows
    }

    /// What a driver can have read at `address` that is no guest memory. For the host's kernel
    /// alone, which may not be able to either.
    pub fn lent(&self, address: GuestAddress, bytes: usize) -> Option<VolatileSlice<'_>> {
        self.windows.iter().find_map(|window| window.slice(address, bytes))
    }

    fn tell(&self) {
        let listeners = self.listeners().clone();
        listeners.iter().filter_map(Weak::upgrade).for_each(|listener| listener.changed());
    }

    /// Has `listener` hear of what changes from now on, as long as it is there.
    pub fn listen(&self, listener: Weak<dyn MemoryListener>) {
        let mut listeners = self.listeners();
        listeners.retain(|listener| listener.strong_count() > 0);
        listeners.push(listener);
    }

    fn listeners(&self) -> MutexGuard<'_, Vec<Weak<dyn MemoryListener>>> {
        self.listeners.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The same with a window, for tests.
    #[cfg(test)]
    pub fn with_window(mut self, start: u64, bytes: u64) -> Self {
        self.windows = [Window::new(start, bytes).unwrap()].into();
        self
    }

    /// Anonymous memory at these addresses, for tests.
    #[cfg(test)]
    pub fn from_ranges(ranges: &[(GuestAddress, usize)]) -> Self {
        let region = |&(start, len)| GuestRegionMmap::from_range(start, len, None).unwrap();
        Self::new(ranges.iter().map(region).collect(), None, None, Vec::new())
    }
}

#[cfg(test)]
mod tests {
    use vm_memory::Bytes;

    use super::*;

    const GROWING: u64 = 0x10_0000;

    fn ram() -> GuestRam {
        let region = |start, len| GuestRegionMmap::from_range(GuestAddress(start), len, None).unwrap();
        GuestRam::new(
            vec![region(0, 0x1_0000), region(GROWING - 0x1000, 0x1000)],
            Some(region(GROWING, 0x4000)),
            None,
            vec![Window::new(1 << 30, 4 << 20).unwrap()],
        )
    }

    #[test]
    fn what_was_not_granted_is_not_memory() {
        let ram = ram();
        for address in [GROWING, GROWING + 1, GROWING + 0x3fff] {
            assert!(ram.find_region(GuestAddress(address)).is_none());
            assert!(ram.write_obj(1u8, GuestAddress(address)).is_err());
        }
        assert!(!ram.check_range(GuestAddress(GROWING - 8), 16));
        assert!(ram.get_slices(GuestAddress(GROWING - 8), 16).any(|slice| slice.is_err()));

        ram.grant(Room::Memory, 0x2000);
        assert!(ram.check_range(GuestAddress(GROWING - 8), 16));
        ram.write_obj(7u64, GuestAddress(GROWING + 0x1ff8)).unwrap();
        assert!(ram.write_obj(7u64, GuestAddress(GROWING + 0x1ffc)).is_err(), "across the end");
        assert!(ram.get_host_address(GuestAddress(GROWING + 0x2000)).is_err());

        ram.grant(Room::Memory, 0x1000);
        assert!(ram.check_range(GuestAddress(GROWING), 0x2000), "a grant is not taken back");
        ram.grant(Room::Memory, u64::MAX);
        assert!(ram.check_range(GuestAddress(GROWING), 0x4000));
        assert!(!ram.check_range(GuestAddress(GROWING), 0x4001));
    }

    #[test]
    fn the_hosts_huge_pages_are_not_discarded() {
        let region = |start, len| GuestRegionMmap::from_range(GuestAddress(start), len, None).unwrap();
        let hugetlb = Some(region(GROWING, 0x4000));
        let ram = GuestRam::new(vec![region(0, 0x1_0000)], None, hugetlb, Vec::new());
        ram.grant(Room::Hugetlb, 0x4000);
        let kind = |start, bytes| ram.discard(GuestAddress(start), bytes).unwrap_err().kind();
        // There is no file behind this one, which is found out last.
        assert_eq!(kind(0x1000, 0x1000), io::ErrorKind::NotFound);
        assert_eq!(kind(GROWING, 0x1000), io::ErrorKind::InvalidInput);
        assert_eq!(kind(0xf000, 0x2000), io::ErrorKind::InvalidInput, "over the end");
    }

    #[test]
    fn listeners_hear_of_a_grant_when_it_holds_as_long_as_they_are_there() {
        struct Listener(GuestRam, AtomicU64);
        impl MemoryListener for Listener {
            fn changed(&self) {
                self.1.store(self.0.growing(Room::Memory).unwrap().len(), Ordering::Relaxed);
            }
        }
        let ram = ram();
        let listener = Arc::new(Listener(ram.clone(), AtomicU64::new(0)));
        for _ in 0..2 {
            let gone: Arc<dyn MemoryListener> = Arc::new(Listener(ram.clone(), AtomicU64::new(0)));
            ram.listen(Arc::downgrade(&gone));
        }
        let weak: Weak<dyn MemoryListener> = Arc::downgrade(&(Arc::clone(&listener) as _));
        ram.listen(weak);
        assert_eq!(ram.listeners().len(), 1);
        ram.clone().grant(Room::Memory, 0x2000);
        assert_eq!(listener.1.load(Ordering::Relaxed), 0x2000);
        drop(listener);
        ram.grant(Room::Memory, 0x3000);
    }

    #[test]
    fn a_window_is_no_memory_but_can_be_read_by_the_hosts_kernel() {
        let ram = ram();
        let file = tempfile::tempfile().unwrap();
        file.set_len(3 << 20).unwrap();
        let start = GuestAddress(1 << 30);
        let (window, bytes) = ram.map(&file).unwrap();
        assert_eq!((window, bytes), (0, 4 << 20));
        assert!(ram.lent(start, 1).is_none());
        ram.lend(window, bytes);
        assert!(matches!(ram.map(&file), Err(WindowError::Full)));
        assert_eq!(ram.lent(start, 4 << 20).unwrap().len(), 4 << 20);
        assert!(ram.lent(start, (4 << 20) + 1).is_none());
        // Neither a ring nor an answer can lie there.
        assert!(!ram.check_range(start, 1) && ram.write_obj(1u8, start).is_err());
        assert!(ram.iter().all(|region| region.start_addr() != start));
        ram.take_back(window);
        assert!(ram.lent(start, 1).is_none());
    }

    #[test]
    fn clones_are_the_same_memory() {
        let (ram, other) = (ram(), ram().clone());
        drop(other);
        let other = ram.clone();
        ram.grant(Room::Memory, 0x4000);
        ram.write_obj(7u64, GuestAddress(GROWING)).unwrap();
        assert_eq!(other.read_obj::<u64>(GuestAddress(GROWING)).unwrap(), 7);
    }
}
