//! Guest memory.
//!
//! One file in memory ([`backing`]), mapped shared: its pages are allocated when
//! the guest first touches them, and other processes (vhost-user) can be given the
//! descriptor.
//! Files can be mapped over parts of it ([`map_file`]). Behind what the machine
//! starts with lies what it can be given while it runs ([`ram`]).

mod backing;
pub mod ram;
pub mod windows;

use std::fs::File;
use std::io::{self, Seek, SeekFrom};
use std::os::fd::{AsFd, AsRawFd};
use std::sync::Arc;

use thiserror::Error;
use vm_memory::mmap::MmapRegionBuilder;
use vm_memory::{
    Bytes, FileOffset, GuestAddress, GuestMemory, GuestMemoryError, GuestMemoryRegion, GuestRegionMmap,
};

use crate::arch::layout::{self, PAGE_SIZE, ranges};
use crate::procfs;
pub use backing::Change;
pub use ram::{GuestRam, Room};
use windows::{WINDOWS, Window};

/// Why guest memory could not be made or filled.
#[derive(Debug, Error)]
pub enum MemoryError {
    /// The file could not be created, sized or sealed.
    #[error("guest memory of {size} bytes could not be created")]
    Create {
        /// Bytes asked for.
        size: u64,
        /// The system's answer.
        #[source]
        source: io::Error,
    },
    /// The file could not be mapped.
    #[error("guest memory could not be mapped")]
    Map(#[source] vm_memory::mmap::MmapRegionError),
    /// A range lies outside guest memory.
    #[error("guest addresses {start:#x} to {end:#x} are not in guest memory")]
    OutOfRange {
        /// First address.
        start: u64,
        /// Address after the last.
        end: u64,
    },
    /// A file could not be mapped over guest memory.
    #[error("a file could not be mapped into guest memory")]
    MapFile(#[source] io::Error),
    /// There is no such place in a file.
    #[error("a file could not be read")]
    ReadFile(#[source] io::Error),
    /// A file could not be read into guest memory.
    #[error("a file could not be read into guest memory")]
    FillFrom(#[source] GuestMemoryError),
}

/// A large page of the CPU's.
pub const HUGE_PAGE: u64 = 2 << 20;

/// How guest memory is to be made.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Shape {
    /// Bytes the machine starts with, whole pages.
    pub boot: u64,
    /// Bytes behind that, at most, which nobody can use before they are granted.
    pub more: u64,
    /// The same of the host's huge pages (hugetlbfs).
    pub hugetlb: u64,
    /// Bytes of each window for a file of the host's, a multiple of 128 MiB; 0 for no windows.
    pub window: u64,
    /// Whether the host may put pages of 2 MiB behind it.
    pub huge_pages: bool,
}

/// Creates `size` bytes (whole pages) of guest memory.
pub fn create(size: u64) -> Result<GuestRam, MemoryError> {
    create_shaped(Shape { boot: size, ..Shape::default() })
}

/// Creates guest memory that can grow, and whose pages may be huge.
pub fn create_shaped(shape: Shape) -> Result<GuestRam, MemoryError> {
    let [growing, hugetlb] = layout::hotplug_regions(shape.boot, shape.more, shape.hugetlb);
    // A huge page is one of the file's, too: each region starts with one.
    let in_file = |len: u64| len.next_multiple_of(HUGE_PAGE);
    let boot = ranges(shape.boot);
    let size = boot.iter().chain(&growing).map(|(_, len)| in_file(*len)).sum();
    let file =
        backing::create(size, shape.huge_pages).map_err(|source| MemoryError::Create { size, source })?;
    let file = Arc::new(file);
    let mut offset = 0;
    let mut map = |(start, len): (u64, u64)| {
        let mapping = MmapRegionBuilder::new(len as usize)
            .with_mmap_prot(libc::PROT_READ | libc::PROT_WRITE)
            .with_mmap_flags(libc::MAP_SHARED | libc::MAP_NORESERVE)
            .with_file_offset(FileOffset::from_arc(Arc::clone(&file), offset))
            .build()
            .map_err(MemoryError::Map)?;
        backing::leave_out_of_dumps(&mapping);
        if shape.huge_pages {
            backing::advise(&mapping, 0..len, true);
        }
        offset += in_file(len);
        GuestRegionMmap::new(mapping, GuestAddress(start))
            .ok_or(MemoryError::OutOfRange { start, end: u64::MAX })
    };
    let boot = boot.into_iter().map(&mut map).collect::<Result<_, _>>()?;
    let growing = growing.map(&mut map).transpose()?;
    let hugetlb = hugetlb.map(map_hugetlb).transpose()?;
    Ok(GuestRam::new(boot, growing, hugetlb, windows(&shape)?))
}

/// Windows behind all memory there can be.
fn windows(shape: &Shape) -> Result<Vec<Window>, MemoryError> {
    let first = layout::windows(layout::end_of_addresses(shape.boot, shape.more, shape.hugetlb));
    let window = |index| Window::new(first + index * shape.window, shape.window);
    if shape.window == 0 { Ok(Vec::new()) } else { (0..WINDOWS as u64).map(window).collect() }
}

/// A region of the host's huge pages: each is allocated when the guest is given it, so that
/// no access finds the pool empty.
fn map_hugetlb((start, len): (u64, u64)) -> Result<GuestRegionMmap, MemoryError> {
    let file = backing::create_hugetlb(len).map_err(|source| MemoryError::Create { size: len, source })?;
    let mapping = MmapRegionBuilder::new(len as usize)
        .with_mmap_prot(libc::PROT_READ | libc::PROT_WRITE)
        .with_mmap_flags(libc::MAP_SHARED | libc::MAP_NORESERVE)
        .with_file_offset(FileOffset::new(file, 0))
        .build()
        .map_err(MemoryError::Map)?;
    backing::leave_out_of_dumps(&mapping);
    GuestRegionMmap::new(mapping, GuestAddress(start)).ok_or(MemoryError::OutOfRange { start, end: u64::MAX })
}

/// Makes `len` bytes of `file` from `offset` appear at guest address `start`.
///
/// Where address and offset agree modulo the page size, whole pages are mapped
/// copy-on-write, so that until the guest writes to them they are the file's
/// own page-cache pages, shared by all who map it; what remains at both edges
/// is read. Everything else in the touched pages is left as it was. The caller
/// has checked that the file has the bytes; it must not shrink afterwards.
pub fn map_file(
    memory: &GuestRam,
    start: u64,
    file: &File,
    offset: u64,
    len: u64,
) -> Result<(), MemoryError> {
    let out_of_range = MemoryError::OutOfRange { start, end: start.saturating_add(len) };
    let Some(end) = start.checked_add(len) else { return Err(out_of_range) };
    let inside = usize::try_from(len).is_ok_and(|l| memory.check_range(GuestAddress(start), l));
    if len == 0 || !inside || offset.checked_add(len).is_none() {
        return if len == 0 { Ok(()) } else { Err(out_of_range) };
    }

    let first_page = start.next_multiple_of(PAGE_SIZE);
    let last_page = end - end % PAGE_SIZE;
    if first_page >= last_page || start % PAGE_SIZE != offset % PAGE_SIZE {
        return read_file(memory, start, file, offset, len);
    }
    keep_edges_small(memory, first_page, last_page);
    read_file(memory, start, file, offset, first_page - start)?;
    map_pages(memory, first_page, file, offset + (first_page - start), last_page - first_page)?;
    read_file(memory, last_page, file, offset + (last_page - start), end - last_page)
}

/// Reads `len` bytes of `file` at `offset` to guest address `start`; the file's own
/// position is lost.
///
/// For what a guest writes to anyway: a mapping would cost it two faults a page.
pub fn read_file(
    memory: &GuestRam,
    start: u64,
    mut file: &File,
    offset: u64,
    len: u64,
) -> Result<(), MemoryError> {
    if len == 0 {
        return Ok(());
    }
    let out_of_range = || MemoryError::OutOfRange { start, end: start.saturating_add(len) };
    let count = usize::try_from(len).map_err(|_| out_of_range())?;
    if !memory.check_range(GuestAddress(start), count) {
        return Err(out_of_range());
    }
    file.seek(SeekFrom::Start(offset)).map_err(MemoryError::ReadFile)?;
    memory
        .read_exact_volatile_from(GuestAddress(start), &mut file.as_fd(), count)
        .map_err(MemoryError::FillFrom)
}

/// What is left of the huge pages at both edges of a mapping comes in small pages: a huge
/// one would be there in full, and of no use where the mapping hides it.
fn keep_edges_small(memory: &GuestRam, first: u64, last: u64) {
    let Some(region) = memory.find_region(GuestAddress(first)) else { return };
    let end = last.next_multiple_of(HUGE_PAGE).min(region.start_addr().0 + region.mapped());
    for edge in [first - first % HUGE_PAGE..first, last..end] {
        region.advise(
            edge.start.saturating_sub(region.start_addr().0)..edge.end - region.start_addr().0,
            false,
        );
    }
}

/// Maps whole pages; the range must be inside one region.
fn map_pages(memory: &GuestRam, start: u64, file: &File, offset: u64, len: u64) -> Result<(), MemoryError> {
    let out_of_range = || MemoryError::OutOfRange { start, end: start.saturating_add(len) };
    let region = memory.find_region(GuestAddress(start)).ok_or_else(out_of_range)?;
    let in_region = start - region.start_addr().0;
    if len > region.len() - in_region {
        return Err(out_of_range());
    }
    let file_offset = libc::off_t::try_from(offset).map_err(|_| out_of_range())?;
    let host = region.as_ptr().wrapping_add(in_region as usize);
    // SAFETY: `host..host + len` was just checked to lie inside the region's own
    // mapping, which stays mapped as long as the region does; guest memory is
    // only ever accessed through volatile accesses, never through references,
    // so exchanging what backs it breaks no aliasing rule.
    let mapped = unsafe {
        libc::mmap(
            host.cast(),
            len as usize,
            libc::PROT_READ | libc::PROT_WRITE,
            libc::MAP_PRIVATE | libc::MAP_FIXED | libc::MAP_NORESERVE,
            file.as_raw_fd(),
            file_offset,
        )
    };
    if mapped == libc::MAP_FAILED {
        return Err(MemoryError::MapFile(io::Error::last_os_error()));
    }
    Ok(())
}

/// How much of guest memory is resident in this process.
pub struct Resident {
    smaps: File,
}

impl Resident {
    /// Opens what tells it.
    pub fn open() -> io::Result<Self> {
        Ok(Self { smaps: procfs::open("smaps")? })
    }

    /// Bytes: pages of memory's own file, and pages of mapped files whether shared or already copied.
    pub fn bytes(&self, memory: &GuestRam) -> io::Result<u64> {
        let ranges: Vec<(u64, u64)> =
            memory.iter().map(|r| (r.as_ptr() as u64, r.as_ptr() as u64 + r.mapped())).collect();
        (&self.smaps).rewind()?;
        let smaps = io::read_to_string(&self.smaps)?;
        let mut inside = false;
        let mut kib = 0;
        for line in smaps.lines() {
            if let Some(rss) = line.strip_prefix("Rss:") {
                if inside {
                    kib += rss.trim().trim_end_matches(" kB").parse::<u64>().unwrap_or(0);
                }
            } else if let Some((start, _)) = line.split_once('-')
                && let Ok(start) = u64::from_str_radix(start, 16)
            {
                inside = ranges.iter().any(|&(from, to)| (from..to).contains(&start));
            }
        }
        Ok(kib * 1024)
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write;
    use std::os::unix::fs::FileExt;

    use super::*;

    fn resident_bytes(memory: &GuestRam) -> io::Result<u64> {
        Resident::open()?.bytes(memory)
    }
    use crate::arch::layout::{HOLE_END, HOLE_START};

    #[test]
    fn memory_leaves_the_hole_to_devices() {
        assert_eq!(ranges(128 << 20), [(0, 128 << 20)]);
        assert_eq!(ranges(HOLE_START), [(0, HOLE_START)]);
        assert_eq!(ranges(4 << 30), [(0, HOLE_START), (HOLE_END, 1 << 30)]);
        let memory = create(4 << 30).unwrap();
        memory.write_obj(7u64, GuestAddress(HOLE_END + (1 << 30) - 8)).unwrap();
        assert!(memory.write_obj(7u64, GuestAddress(HOLE_START)).is_err());
    }

    #[test]
    fn a_region_to_grow_into_costs_nothing_until_it_is_used() {
        // More than this machine has.
        let memory = create_shaped(Shape { boot: 64 << 20, more: 1 << 40, ..Shape::default() }).unwrap();
        let region = memory.growing(Room::Memory).unwrap();
        assert_eq!((region.start_addr().0, region.mapped()), (HOLE_END, 1 << 40));
        assert_eq!(region.file_offset().unwrap().start(), 64 << 20);
        memory.grant(Room::Memory, 1 << 30);
        memory.write_obj(7u64, GuestAddress(HOLE_END + (1 << 30) - 8)).unwrap();
        assert_eq!(resident_bytes(&memory).unwrap(), PAGE_SIZE);
        assert!(
            create_shaped(Shape { boot: 64 << 20, more: 1 << 20, ..Shape::default() })
                .unwrap()
                .growing(Room::Memory)
                .is_none(),
            "less than a block"
        );
    }

    #[test]
    fn what_is_plugged_in_can_have_huge_pages_however_odd_the_rest() {
        for boot in [65 << 20, (3 << 30) + (1 << 20), (64 << 20) + 4096] {
            let memory =
                create_shaped(Shape { boot, more: 256 << 20, huge_pages: true, ..Shape::default() }).unwrap();
            for region in memory.iter() {
                let offset = region.file_offset().unwrap().start();
                let start = region.start_addr().0;
                assert_eq!((offset % HUGE_PAGE, start % HUGE_PAGE), (0, 0), "{boot:#x}");
            }
        }
    }

    #[test]
    fn a_core_file_has_none_of_it() {
        let memory = create_shaped(Shape { boot: 64 << 20, more: 256 << 20, ..Shape::default() }).unwrap();
        let smaps = std::fs::read_to_string("/proc/self/smaps").unwrap();
        for region in memory.iter() {
            let start = format!("{:x}-", region.as_ptr() as u64);
            let mut flags = smaps.lines().skip_while(|line| !line.starts_with(&start));
            let flags = flags.find(|line| line.starts_with("VmFlags:")).unwrap();
            assert!(flags.split_whitespace().any(|flag| flag == "dd"), "{flags}");
        }
    }

    #[test]
    fn huge_pages_come_where_the_host_has_them() {
        const HUGE: u64 = 2 << 20;
        let shape = Shape { boot: 64 << 20, more: 1 << 30, huge_pages: true, ..Shape::default() };
        let memory = create_shaped(shape).unwrap();
        memory.grant(Room::Memory, shape.more);
        for start in [0, HOLE_END] {
            for page in 0..16 {
                memory.write_obj(page, GuestAddress(start + page * HUGE + page * PAGE_SIZE)).unwrap();
            }
            for page in 0..16 {
                let address = GuestAddress(start + page * HUGE + page * PAGE_SIZE);
                assert_eq!(memory.read_obj::<u64>(address).unwrap(), page);
            }
        }
        let small = 32 * PAGE_SIZE;
        let resident = resident_bytes(&memory).unwrap();
        if backing::has_huge_pages() {
            // One is enough: how many there are is the host's affair.
            assert!(resident >= HUGE, "{resident}");
        } else {
            assert_eq!(resident, small);
        }
    }

    #[test]
    fn beside_a_mapped_file_there_are_small_pages() {
        use std::os::unix::fs::MetadataExt;
        const START: u64 = 32 << 20;
        let memory = create_shaped(Shape { boot: 64 << 20, huge_pages: true, ..Shape::default() }).unwrap();
        map_file(&memory, START + PAGE_SIZE, &numbered_file(3), 0, 3 * PAGE_SIZE).unwrap();
        for beside in [START, START + 4 * PAGE_SIZE] {
            memory.write_obj(7u64, GuestAddress(beside)).unwrap();
        }
        let region = memory.find_region(GuestAddress(START)).unwrap();
        let allocated = region.file_offset().unwrap().file().metadata().unwrap().blocks() * 512;
        assert_eq!(allocated, 2 * PAGE_SIZE, "nothing is there that the mapping hides");
        memory.write_obj(7u64, GuestAddress(START + HUGE_PAGE)).unwrap();
        assert!(!backing::has_huge_pages() || resident_bytes(&memory).unwrap() >= HUGE_PAGE);
    }

    /// A file of `pages` pages and a half, each byte telling its page.
    fn numbered_file(pages: u8) -> File {
        let mut file = tempfile::tempfile().unwrap();
        for page in 0..pages {
            file.write_all(&[page + 1; PAGE_SIZE as usize]).unwrap();
        }
        file.write_all(&[0xee; PAGE_SIZE as usize / 2]).unwrap();
        file
    }

    #[test]
    fn mapped_file_is_copied_on_write_and_edges_are_kept() {
        let file = numbered_file(4);
        let memory = create(1 << 20).unwrap();
        let (start, offset) = (0x1_0800, 0x800);
        let len = 4 * PAGE_SIZE;
        memory.write_slice(&[0x55; 0x10], GuestAddress(start - 0x10)).unwrap();
        map_file(&memory, start, &file, offset, len).unwrap();

        let mut expected = vec![0; len as usize];
        file.read_exact_at(&mut expected, offset).unwrap();
        let mut seen = vec![0; len as usize];
        memory.read_slice(&mut seen, GuestAddress(start)).unwrap();
        assert_eq!(seen, expected);
        assert_eq!(memory.read_obj::<u8>(GuestAddress(start - 1)).unwrap(), 0x55);
        assert_eq!(memory.read_obj::<u8>(GuestAddress(start + len)).unwrap(), 0);

        memory.write_obj(0xffu8, GuestAddress(start + PAGE_SIZE)).unwrap();
        let mut byte = [0];
        file.read_exact_at(&mut byte, offset + PAGE_SIZE).unwrap();
        assert_eq!(byte, [2], "a guest's write must not reach the file");
    }

    #[test]
    fn file_out_of_step_with_pages_is_copied() {
        let file = numbered_file(3);
        let memory = create(1 << 20).unwrap();
        map_file(&memory, 0x1_0000, &file, 1, 2 * PAGE_SIZE).unwrap();
        assert_eq!(memory.read_obj::<u8>(GuestAddress(0x1_0000 + PAGE_SIZE - 2)).unwrap(), 1);
        assert_eq!(memory.read_obj::<u8>(GuestAddress(0x1_0000 + PAGE_SIZE - 1)).unwrap(), 2);
    }

    #[test]
    fn file_outside_memory_is_refused() {
        let file = numbered_file(1);
        let memory = create(1 << 20).unwrap();
        for start in [1 << 20, (1 << 20) - 1, u64::MAX - 10] {
            let refused = map_file(&memory, start, &file, 0, PAGE_SIZE);
            assert!(matches!(refused, Err(MemoryError::OutOfRange { .. })), "{start:#x}: {refused:?}");
        }
    }

    #[test]
    fn resident_counts_touched_pages() {
        let memory = create(64 << 20).unwrap();
        let before = resident_bytes(&memory).unwrap();
        for page in 0..100 {
            memory.write_obj(1u8, GuestAddress(page * PAGE_SIZE)).unwrap();
        }
        let after = resident_bytes(&memory).unwrap();
        assert_eq!(after - before, 100 * PAGE_SIZE);
    }
}
