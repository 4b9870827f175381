//! The MP table (Intel MultiProcessor Specification 1.4): which CPUs and
//! interrupt lines there are, for a machine without ACPI.
//!
//! KVM has an I/O APIC, but the table names none: a kernel sets up all its pins
//! in some 600 accesses that KVM has to interpret, and the serial console is the
//! only device that has a line. It reaches the first CPU through the PIC.

use super::layout::{LAPIC_START, MP_TABLE_MAX_SIZE, MP_TABLE_START, SERIAL_GSI};

const SPEC_REVISION: u8 = 4;
const LAPIC_VERSION: u8 = 0x14;
const ISA_BUS: u8 = 0;
const DESTINATION_ALL: u8 = 0xff;

const ENTRY_PROCESSOR: u8 = 0;
const ENTRY_BUS: u8 = 1;
const ENTRY_IO_INTERRUPT: u8 = 3;
const ENTRY_LOCAL_INTERRUPT: u8 = 4;
const CPU_ENABLED: u8 = 1;
const CPU_BOOT: u8 = 2;
const INTERRUPT_VECTORED: u8 = 0;
const INTERRUPT_NMI: u8 = 1;
const INTERRUPT_EXTINT: u8 = 3;

const POINTER_SIZE: usize = 16;
const HEADER_SIZE: usize = 44;

/// The floating pointer structure and the table behind it, for [`MP_TABLE_START`].
/// APIC ids are 0 to `vcpus - 1`.
pub fn table(vcpus: u8) -> Vec<u8> {
    let mut entries = Vec::new();
    let mut count = 0u16;
    let mut push = |entry: &[u8]| {
        entries.extend_from_slice(entry);
        count += 1;
    };

    for apic_id in 0..vcpus {
        let flags = CPU_ENABLED | if apic_id == 0 { CPU_BOOT } else { 0 };
        let mut entry = [0; 20];
        entry[..4].copy_from_slice(&[ENTRY_PROCESSOR, apic_id, LAPIC_VERSION, flags]);
        // Family 6, and the features every x86-64 CPU has: FPU, APIC.
        entry[4..8].copy_from_slice(&0x600u32.to_le_bytes());
        entry[8..12].copy_from_slice(&0x201u32.to_le_bytes());
        push(&entry);
    }
    push(&[&[ENTRY_BUS, ISA_BUS][..], b"ISA   "].concat());
    // Linux takes a table without any line for a broken one, and makes up its own.
    let line = SERIAL_GSI as u8;
    push(&[ENTRY_IO_INTERRUPT, INTERRUPT_VECTORED, 0, 0, ISA_BUS, line, DESTINATION_ALL, line]);
    push(&[ENTRY_LOCAL_INTERRUPT, INTERRUPT_EXTINT, 0, 0, ISA_BUS, 0, 0, 0]);
    push(&[ENTRY_LOCAL_INTERRUPT, INTERRUPT_NMI, 0, 0, ISA_BUS, 0, DESTINATION_ALL, 1]);

    let mut pointer = [0; POINTER_SIZE];
    pointer[..4].copy_from_slice(b"_MP_");
    pointer[4..8].copy_from_slice(&(MP_TABLE_START as u32 + POINTER_SIZE as u32).to_le_bytes());
    pointer[8] = 1;
    pointer[9] = SPEC_REVISION;
    pointer[10] = checksum(&pointer);

    let mut header = [0; HEADER_SIZE];
    header[..4].copy_from_slice(b"PCMP");
    header[4..6].copy_from_slice(&((HEADER_SIZE + entries.len()) as u16).to_le_bytes());
    header[6] = SPEC_REVISION;
    header[8..16].copy_from_slice(b"RVM     ");
    header[16..28].copy_from_slice(b"MICROVM     ");
    header[34..36].copy_from_slice(&count.to_le_bytes());
    header[36..40].copy_from_slice(&(LAPIC_START as u32).to_le_bytes());
    header[7] = checksum(&header).wrapping_add(checksum(&entries));

    [&pointer[..], &header, &entries].concat()
}

/// The byte that makes all bytes add up to 0.
fn checksum(bytes: &[u8]) -> u8 {
    bytes.iter().fold(0u8, |sum, b| sum.wrapping_add(*b)).wrapping_neg()
}

const _: () = assert!(POINTER_SIZE + HEADER_SIZE + 255 * 20 + 8 * 4 <= MP_TABLE_MAX_SIZE);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn checksums_and_counts_hold() {
        for vcpus in [1, 2, 64, 255] {
            let bytes = table(vcpus);
            let (pointer, config) = bytes.split_at(POINTER_SIZE);
            assert_eq!(checksum(pointer), 0);
            assert_eq!(checksum(config), 0);
            assert_eq!(usize::from(u16::from_le_bytes([config[4], config[5]])), config.len());

            let (mut at, mut cpus, mut count) = (HEADER_SIZE, 0, 0);
            while at < config.len() {
                let kind = config[at];
                cpus += u32::from(kind == ENTRY_PROCESSOR);
                at += if kind == ENTRY_PROCESSOR { 20 } else { 8 };
                count += 1;
            }
            assert_eq!(cpus, u32::from(vcpus));
            assert_eq!(count, u16::from_le_bytes([config[34], config[35]]));
        }
    }
}
