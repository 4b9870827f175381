//! What the kernel is told: command line, memory map, page tables, GDT.
//!
//! Offsets are those of `struct boot_params` and `struct setup_header`
//! (Linux, `Documentation/arch/x86/zero-page.rst` and `boot.rst`).

use std::io;

use thiserror::Error;
use vm_memory::{Bytes, GuestAddress, GuestMemoryError};

use super::initramfs::LoadedInitramfs;
use crate::arch::layout::{
    BOOT_PARAMS_START, CMDLINE_MAX_SIZE, CMDLINE_START, GDT_START, HIGH_RAM_START, LOW_RAM_END, PAGE_SIZE,
    PAGE_TABLES_START, SEED_START, ranges,
};
use crate::memory::GuestRam;

/// Why the boot parameters could not be written.
#[derive(Debug, Error)]
pub enum ParamsError {
    /// The command line is longer than the kernel reads.
    #[error("the command line has {0} bytes; the kernel reads {max}", max = CMDLINE_MAX_SIZE - 1)]
    CmdlineTooLong(usize),
    /// The host gave no random bytes.
    #[error("the host's generator gave no seed for the guest's")]
    Seed(#[source] io::Error),
    /// Guest memory could not be written.
    #[error("guest memory could not be written")]
    Memory(#[source] GuestMemoryError),
}

impl From<GuestMemoryError> for ParamsError {
    fn from(source: GuestMemoryError) -> Self {
        Self::Memory(source)
    }
}

/// What the machine needs the kernel to know; it comes first, so that the
/// configured command line can still say otherwise.
///
/// `reboot=k`: the only way to end the machine is the keyboard controller's
/// reset line. `pci=conf1`: configuration ports, without a BIOS or a host bridge to vouch for them.
const MACHINE_CMDLINE: &str = "reboot=k pci=conf1";

const BOOT_PARAMS_SIZE: usize = 4096;
const E820_ENTRIES: usize = 0x1e8;
const BOOT_FLAG: usize = 0x1fe;
const HEADER_MAGIC: usize = 0x202;
const VERSION: usize = 0x206;
const TYPE_OF_LOADER: usize = 0x210;
const LOADFLAGS: usize = 0x211;
const RAMDISK_IMAGE: usize = 0x218;
const RAMDISK_SIZE: usize = 0x21c;
const CMD_LINE_PTR: usize = 0x228;
const CMDLINE_SIZE: usize = 0x238;
const SETUP_DATA: usize = 0x250;
const E820_TABLE: usize = 0x2d0;
const E820_ENTRY_SIZE: usize = 20;
const E820_RAM: u32 = 1;

/// Type of the `setup_data` that seeds the kernel's generator, from Linux 6.0 on.
const SETUP_RNG_SEED: u32 = 9;
/// Bytes of it: up to 256 [`libc::getrandom`] gives all of them at once.
const SEED_SIZE: usize = 64;

/// Boot protocol version 2.12: the first with `xloadflags` of 64-bit entry.
const PROTOCOL_VERSION: u16 = 0x020c;
/// "Undefined" loader.
const LOADER_UNDEFINED: u8 = 0xff;
/// The protected-mode code is loaded high.
const LOADED_HIGH: u8 = 1;

/// The command line with what the machine needs. `vcpus` of those that the MP
/// table names are there at first; without it all are.
pub fn full_cmdline(configured: &str, vcpus: Option<u8>) -> String {
    let limit = vcpus.map(|vcpus| format!(" maxcpus={vcpus}")).unwrap_or_default();
    format!("{MACHINE_CMDLINE}{limit} {configured}").trim_end().to_owned()
}

/// Writes the command line and `boot_params` for `memory_size` bytes of memory.
pub fn write_boot_params(
    memory: &GuestRam,
    memory_size: u64,
    cmdline: &str,
    initramfs: Option<LoadedInitramfs>,
) -> Result<(), ParamsError> {
    if cmdline.len() >= CMDLINE_MAX_SIZE {
        return Err(ParamsError::CmdlineTooLong(cmdline.len()));
    }
    // New memory is zero, and so is the byte that ends it.
    memory.write_slice(cmdline.as_bytes(), GuestAddress(CMDLINE_START))?;

    let mut params = [0; BOOT_PARAMS_SIZE];
    let mut put = |offset: usize, bytes: &[u8]| params[offset..offset + bytes.len()].copy_from_slice(bytes);
    put(BOOT_FLAG, &0xaa55u16.to_le_bytes());
    put(HEADER_MAGIC, b"HdrS");
    put(VERSION, &PROTOCOL_VERSION.to_le_bytes());
    put(TYPE_OF_LOADER, &[LOADER_UNDEFINED]);
    put(LOADFLAGS, &[LOADED_HIGH]);
    put(CMD_LINE_PTR, &(CMDLINE_START as u32).to_le_bytes());
    put(CMDLINE_SIZE, &(cmdline.len() as u32).to_le_bytes());
    if let Some(initramfs) = initramfs {
        // It lies in low memory, so both fit.
        put(RAMDISK_IMAGE, &(initramfs.address as u32).to_le_bytes());
        put(RAMDISK_SIZE, &(initramfs.size as u32).to_le_bytes());
    }
    put(SETUP_DATA, &SEED_START.to_le_bytes());
    let map = ram_map(memory_size);
    put(E820_ENTRIES, &[map.len() as u8]);
    for (i, (start, size)) in map.into_iter().enumerate() {
        let entry = E820_TABLE + i * E820_ENTRY_SIZE;
        put(entry, &start.to_le_bytes());
        put(entry + 8, &size.to_le_bytes());
        put(entry + 16, &E820_RAM.to_le_bytes());
    }
    memory.write_slice(&params, GuestAddress(BOOT_PARAMS_START))?;
    write_seed(memory)
}

/// Writes a `struct setup_data` that seeds the kernel's generator before anything
/// asks it for a byte. The kernel overwrites it once it has read it.
fn write_seed(memory: &GuestRam) -> Result<(), ParamsError> {
    let mut seed = [0; SEED_SIZE];
    // SAFETY: the pointer and length describe one writable array.
    let given = unsafe { libc::getrandom(seed.as_mut_ptr().cast(), seed.len(), 0) };
    if given.cast_unsigned() != seed.len() {
        return Err(ParamsError::Seed(io::Error::last_os_error()));
    }
    // After the address of the next one, of which there is none: new memory is zero.
    memory.write_obj(SETUP_RNG_SEED, GuestAddress(SEED_START + 8))?;
    memory.write_obj(SEED_SIZE as u32, GuestAddress(SEED_START + 12))?;
    memory.write_slice(&seed, GuestAddress(SEED_START + 16))?;
    Ok(())
}

/// Memory offered as RAM, `(start, size)`: conventional memory, then everything
/// from 1 MiB. What lies between holds the MP table and stays reserved.
fn ram_map(memory_size: u64) -> Vec<(u64, u64)> {
    let mut map = vec![(0, LOW_RAM_END)];
    for (start, size) in ranges(memory_size) {
        let first = start.max(HIGH_RAM_START);
        map.push((first, (start + size).saturating_sub(first)));
    }
    map
}

/// Page tables that map the first GiB to itself with 2 MiB pages; returns the
/// address of the PML4.
pub fn write_page_tables(memory: &GuestRam) -> Result<u64, ParamsError> {
    const PRESENT_WRITABLE: u64 = 0b11;
    const LARGE: u64 = 1 << 7;
    let (pml4, pdpt, pd) =
        (PAGE_TABLES_START, PAGE_TABLES_START + PAGE_SIZE, PAGE_TABLES_START + 2 * PAGE_SIZE);
    memory.write_obj(pdpt | PRESENT_WRITABLE, GuestAddress(pml4))?;
    memory.write_obj(pd | PRESENT_WRITABLE, GuestAddress(pdpt))?;
    let mut entries = [0; PAGE_SIZE as usize];
    for (i, entry) in entries.chunks_exact_mut(8).enumerate() {
        entry.copy_from_slice(&(((i as u64) << 21) | PRESENT_WRITABLE | LARGE).to_le_bytes());
    }
    memory.write_slice(&entries, GuestAddress(pd))?;
    Ok(pml4)
}

/// Flat 64-bit code and data segments (boot protocol: `__BOOT_CS` 0x10,
/// `__BOOT_DS` 0x18).
pub const GDT: [u64; 4] = [0, 0, 0x00af_9b00_0000_ffff, 0x00cf_9300_0000_ffff];

/// Writes the GDT the vCPU starts with.
pub fn write_gdt(memory: &GuestRam) -> Result<(), ParamsError> {
    for (i, entry) in GDT.iter().enumerate() {
        memory.write_obj(*entry, GuestAddress(GDT_START + 8 * i as u64))?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::arch::layout::HOLE_END;
    use crate::memory;

    #[test]
    fn memory_map_leaves_out_legacy_area_and_hole() {
        assert_eq!(ram_map(128 << 20), [(0, 0x9fc00), (0x10_0000, 127 << 20)]);
        assert_eq!(ram_map(4 << 30), [(0, 0x9fc00), (0x10_0000, (3 << 30) - (1 << 20)), (HOLE_END, 1 << 30)]);
    }

    #[test]
    fn boot_params_say_what_was_loaded() {
        let memory = memory::create(16 << 20).unwrap();
        let initramfs = LoadedInitramfs { address: 0xf0_0000, size: 1234 };
        write_boot_params(&memory, 16 << 20, "quiet", Some(initramfs)).unwrap();
        let at = |offset: usize| GuestAddress(BOOT_PARAMS_START + offset as u64);
        assert_eq!(memory.read_obj::<u32>(at(HEADER_MAGIC)).unwrap().to_le_bytes(), *b"HdrS");
        assert_eq!(memory.read_obj::<u32>(at(RAMDISK_IMAGE)).unwrap(), 0xf0_0000);
        assert_eq!(memory.read_obj::<u32>(at(RAMDISK_SIZE)).unwrap(), 1234);
        assert_eq!(memory.read_obj::<u8>(at(E820_ENTRIES)).unwrap(), 2);
        let size = memory.read_obj::<u32>(at(CMDLINE_SIZE)).unwrap() as usize;
        let seed = u64::from_le(memory.read_obj(at(SETUP_DATA)).unwrap());
        let header: [u32; 4] = memory.read_obj(GuestAddress(seed)).unwrap();
        assert_eq!(header, [0, 0, SETUP_RNG_SEED, SEED_SIZE as u32]);
        let last: u128 = memory.read_obj(GuestAddress(seed + SEED_SIZE as u64)).unwrap();
        assert_ne!(last, 0);
        let mut line = vec![0; size + 1];
        memory.read_slice(&mut line, GuestAddress(CMDLINE_START)).unwrap();
        assert_eq!(line, b"quiet\0");
    }

    #[test]
    fn long_command_line_is_refused() {
        let memory = memory::create(16 << 20).unwrap();
        let refused = write_boot_params(&memory, 16 << 20, &"x".repeat(CMDLINE_MAX_SIZE), None);
        assert!(matches!(refused, Err(ParamsError::CmdlineTooLong(CMDLINE_MAX_SIZE))));
    }

    #[test]
    fn page_tables_map_identically() {
        let memory = memory::create(16 << 20).unwrap();
        let pml4 = write_page_tables(&memory).unwrap();
        for address in [0u64, 0x1234_5678, BOOT_MAPPED_LAST] {
            let table = |base: u64, shift: u32| {
                let entry: u64 =
                    memory.read_obj(GuestAddress(base + ((address >> shift) & 511) * 8)).unwrap();
                assert_eq!(entry & 1, 1);
                entry & !0xfff
            };
            let page = table(table(table(pml4, 39), 30), 21);
            assert_eq!(page | (address & 0x1f_ffff), address);
        }
    }

    const BOOT_MAPPED_LAST: u64 = crate::arch::layout::BOOT_MAPPED_END - 1;
}
