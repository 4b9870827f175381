//! Where everything lies in guest physical address space.
//!
//! ```text
//! 0x0000_0000  low memory starts
//! 0x0000_0500    boot GDT
//! 0x0000_7000    boot_params ("zero page")
//! 0x0000_8000    seed of the kernel's random number generator
//! 0x0000_9000    boot page tables (PML4, PDPT, PD)
//! 0x0002_0000    kernel command line
//! 0x0009_fc00    end of conventional memory; nothing up to 1 MiB is offered as RAM
//! 0x000e_0000    what is on the PCI bus, for our guest kernel
//! 0x000f_0000    MP table, where a BIOS has it
//! 0x0010_0000    the kernel's segments at their own physical addresses
//!         ...    the initramfs, at the end of low memory
//! 0xc000_0000  low memory ends at the latest; PCI memory window
//! 0xfec0_0000  I/O APIC          0xfee0_0000  local APICs
//! 0xfffb_c000  pages KVM needs on Intel
//! 0x1_0000_0000  the rest of memory
//!         ...    memory that is plugged in while the machine runs
//!         ...    the same of the host's huge pages
//!         ...    windows for files of the host's
//! ```

/// Size of a page.
pub const PAGE_SIZE: u64 = 4096;

/// Global descriptor table used until the kernel loads its own.
pub const GDT_START: u64 = 0x500;
/// `boot_params` of the Linux boot protocol.
pub const BOOT_PARAMS_START: u64 = 0x7000;
/// Seed of the kernel's random number generator, a `struct setup_data`.
pub const SEED_START: u64 = 0x8000;
/// First of the three boot page tables.
pub const PAGE_TABLES_START: u64 = 0x9000;
/// Kernel command line.
pub const CMDLINE_START: u64 = 0x2_0000;
/// Longest command line with its final NUL: `COMMAND_LINE_SIZE` of Linux on x86.
pub const CMDLINE_MAX_SIZE: usize = 2048;
/// End of conventional memory.
pub const LOW_RAM_END: u64 = 0x9_fc00;
/// What is on the PCI bus when the machine starts.
pub const PCI_TABLE_START: u64 = 0xe_0000;
/// MP table.
pub const MP_TABLE_START: u64 = 0xf_0000;
/// Largest MP table.
pub const MP_TABLE_MAX_SIZE: usize = 0x1_0000;
/// Start of memory that is free for the kernel and the initramfs.
pub const HIGH_RAM_START: u64 = 0x10_0000;
/// What the boot page tables map: 512 entries of 2 MiB. The kernel must lie below.
pub const BOOT_MAPPED_END: u64 = 1 << 30;

/// Memory at and above this address moves above 4 GiB.
pub const HOLE_START: u64 = 0xc000_0000;
/// End of the hole.
pub const HOLE_END: u64 = 1 << 32;

/// Linux adds and removes memory in blocks of this size, aligned to it ...
pub const MEMORY_BLOCK: u64 = 128 << 20;
/// ... and where the memory it started with ends at this address or above, in
/// blocks of up to [`LARGE_MEMORY_BLOCK`] (`probe_memory_block_size`).
const LARGE_BLOCKS_FROM: u64 = 64 << 30;
/// See [`LARGE_BLOCKS_FROM`].
const LARGE_MEMORY_BLOCK: u64 = 2 << 30;

/// Start of the window for PCI memory BARs.
pub const PCI_WINDOW_START: u64 = HOLE_START;
/// End of the window for PCI memory BARs.
pub const PCI_WINDOW_END: u64 = IOAPIC_START;
/// Registers of KVM's I/O APIC, which the guest is not told of.
pub const IOAPIC_START: u64 = 0xfec0_0000;
/// Local APIC registers.
pub const LAPIC_START: u64 = 0xfee0_0000;
/// One page for KVM's identity-mapped page table (Intel without "unrestricted guest").
pub const KVM_IDENTITY_MAP_START: u64 = 0xfffb_c000;
/// Three pages for KVM's task state segment (Intel).
pub const KVM_TSS_START: u64 = KVM_IDENTITY_MAP_START + PAGE_SIZE;

/// First ports of the serial console.
pub const SERIAL_PORT: u16 = 0x3f8;
/// Interrupt line of the serial console.
pub const SERIAL_GSI: u32 = 4;
/// Lines of the two PICs; message-signalled interrupts use the numbers after them.
pub const PIC_LINES: u32 = 16;

/// Address ranges `(start, size)` for `size` bytes of memory, leaving the hole
/// below 4 GiB to devices.
pub fn ranges(size: u64) -> Vec<(u64, u64)> {
    if size <= HOLE_START { vec![(0, size)] } else { vec![(0, HOLE_START), (HOLE_END, size - HOLE_START)] }
}

/// The largest blocks a guest that starts with `boot` bytes may add memory in.
pub fn memory_block(boot: u64) -> u64 {
    if end_of_memory(boot) < LARGE_BLOCKS_FROM { MEMORY_BLOCK } else { LARGE_MEMORY_BLOCK }
}

/// Where memory of a machine that starts with `boot` bytes is plugged in, and
/// how much of `bytes` that is in whole blocks; `None` where it is not even one.
pub fn hotplug_region(boot: u64, bytes: u64) -> Option<(u64, u64)> {
    let block = memory_block(boot);
    let start = end_of_memory(boot).max(HOLE_END).next_multiple_of(block);
    let len = bytes - bytes % block;
    (len > 0).then_some((start, len))
}

/// The same, and behind it where `hugetlb` bytes of the host's huge pages are plugged in, or
/// a little more: whole blocks.
pub fn hotplug_regions(boot: u64, more: u64, hugetlb: u64) -> [Option<(u64, u64)>; 2] {
    let growing = hotplug_region(boot, more);
    let before = growing.map_or(0, |(_, len)| len);
    let hugetlb = hugetlb.next_multiple_of(memory_block(boot));
    let hugetlb =
        hotplug_region(boot, hugetlb).and_then(|(start, len)| Some((start.checked_add(before)?, len)));
    [growing, hugetlb]
}

/// The address after the last of the memory of a machine which starts with `boot` bytes and
/// can have `more`, and `hugetlb`.
pub fn end_of_addresses(boot: u64, more: u64, hugetlb: u64) -> u64 {
    let last = hotplug_regions(boot, more, hugetlb).into_iter().flatten().last();
    last.map_or_else(|| end_of_memory(boot), |(start, len)| start.saturating_add(len))
}

/// Where the first of the windows for files of the host's begins, behind what
/// [`end_of_addresses`] is the end of.
pub fn windows(end: u64) -> u64 {
    end.max(HOLE_END).next_multiple_of(MEMORY_BLOCK)
}

fn end_of_memory(boot: u64) -> u64 {
    ranges(boot).last().map_or(0, |(start, size)| start + size)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memory_is_plugged_in_behind_all_else_in_whole_blocks() {
        const GIB: u64 = 1 << 30;
        assert_eq!(hotplug_region(GIB / 2, 4 * GIB), Some((4 * GIB, 4 * GIB)));
        assert_eq!(hotplug_region(GIB / 2, GIB - 1), Some((4 * GIB, GIB - MEMORY_BLOCK)));
        assert_eq!(hotplug_region(4 * GIB + 4096, GIB), Some((5 * GIB + MEMORY_BLOCK, GIB)));
        assert_eq!(hotplug_region(63 * GIB, 3 * GIB), Some((64 * GIB, 2 * GIB)), "blocks of 2 GiB");
        assert_eq!(hotplug_region(GIB, MEMORY_BLOCK - 1), None);
        assert_eq!(hotplug_regions(GIB, 2 * GIB, GIB), [Some((4 * GIB, 2 * GIB)), Some((6 * GIB, GIB))]);
        assert_eq!(hotplug_regions(GIB, 0, GIB), [None, Some((4 * GIB, GIB))]);
        assert_eq!(
            [(0, GIB), (GIB, 0), (0, 0)].map(|(more, huge)| end_of_addresses(GIB, more, huge)),
            [5 * GIB, 5 * GIB, GIB]
        );
    }
}
