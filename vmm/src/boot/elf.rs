//! The parts of an ELF file that matter for loading a kernel.
//!
//! The file may be anything: every field is checked before it is used.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

use thiserror::Error;

/// Size of an ELF64 header.
const HEADER_SIZE: usize = 64;
/// Size of an ELF64 program header.
const PROGRAM_HEADER_SIZE: usize = 56;
/// More program headers than any kernel has.
const MAX_PROGRAM_HEADERS: usize = 64;

const MAGIC: &[u8] = b"\x7fELF";
const CLASS_64: u8 = 2;
const DATA_LITTLE_ENDIAN: u8 = 1;
const TYPE_EXECUTABLE: u16 = 2;
const MACHINE_X86_64: u16 = 62;
const SEGMENT_LOAD: u32 = 1;
const SEGMENT_EXECUTABLE: u32 = 1;
const SEGMENT_WRITABLE: u32 = 2;
/// Where a bzImage says "HdrS" (Linux boot protocol, real-mode header).
const BZIMAGE_MAGIC_OFFSET: u64 = 0x202;

/// Why a file is not a kernel that can be loaded.
#[derive(Debug, Error)]
pub enum ElfError {
    /// The file could not be read.
    #[error("it cannot be read")]
    Read(#[source] io::Error),
    /// The file is a compressed kernel.
    #[error("it is a bzImage; an uncompressed ELF kernel (vmlinux) is needed")]
    BzImage,
    /// The file is not an ELF file.
    #[error("it is not an ELF file; an uncompressed ELF kernel (vmlinux) is needed")]
    NotElf,
    /// The file is an ELF file of another kind.
    #[error("it is not a 64-bit x86 executable ELF file")]
    NotX86_64Executable,
    /// The program headers are missing, too many or outside the file.
    #[error("its program headers are damaged")]
    ProgramHeaders,
    /// A segment lies outside the file, wraps around or holds more than it occupies.
    #[error("its segment {index} is damaged or cut off")]
    Segment {
        /// Index of the program header.
        index: usize,
    },
    /// Nothing to load.
    #[error("it has no loadable segment")]
    NoSegment,
    /// The entry point is in no segment.
    #[error("its entry point {0:#x} lies in no loadable segment")]
    Entry(u64),
}

/// A loadable segment; `offset + file_size` is inside the file and
/// `address + memory_size` does not wrap.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Segment {
    /// Where its bytes are in the file.
    pub offset: u64,
    /// How many bytes the file has.
    pub file_size: u64,
    /// Physical address to load it to.
    pub address: u64,
    /// How many bytes it occupies; those beyond `file_size` are zero.
    pub memory_size: u64,
    /// Whether the program writes to it and never runs it.
    pub data: bool,
}

/// What to load and where to start it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ElfImage {
    /// Physical address of the entry point.
    pub entry: u64,
    /// Loadable segments that occupy memory, in file order.
    pub segments: Vec<Segment>,
}

/// Reads an ELF executable's headers.
pub fn parse(file: &File) -> Result<ElfImage, ElfError> {
    let file_size = file.metadata().map_err(ElfError::Read)?.len();
    let mut header = [0; HEADER_SIZE];
    if file_size < HEADER_SIZE as u64 {
        return Err(ElfError::NotElf);
    }
    file.read_exact_at(&mut header, 0).map_err(ElfError::Read)?;
    if !header.starts_with(MAGIC) {
        return Err(if is_bzimage(file) { ElfError::BzImage } else { ElfError::NotElf });
    }
    let fields = Fields(&header);
    if header[4] != CLASS_64
        || header[5] != DATA_LITTLE_ENDIAN
        || fields.u16(16) != TYPE_EXECUTABLE
        || fields.u16(18) != MACHINE_X86_64
    {
        return Err(ElfError::NotX86_64Executable);
    }

    let (table, entry_size, count) = (fields.u64(32), fields.u16(54), usize::from(fields.u16(56)));
    if usize::from(entry_size) != PROGRAM_HEADER_SIZE || count > MAX_PROGRAM_HEADERS {
        return Err(ElfError::ProgramHeaders);
    }
    let mut headers = vec![0; count * PROGRAM_HEADER_SIZE];
    if table.checked_add(headers.len() as u64).is_none_or(|end| end > file_size) {
        return Err(ElfError::ProgramHeaders);
    }
    file.read_exact_at(&mut headers, table).map_err(ElfError::Read)?;

    let mut segments = Vec::with_capacity(count);
    for (index, header) in headers.chunks_exact(PROGRAM_HEADER_SIZE).enumerate() {
        let fields = Fields(header);
        let segment = Segment {
            offset: fields.u64(8),
            file_size: fields.u64(32),
            address: fields.u64(24),
            memory_size: fields.u64(40),
            data: fields.u32(4) & (SEGMENT_WRITABLE | SEGMENT_EXECUTABLE) == SEGMENT_WRITABLE,
        };
        if fields.u32(0) != SEGMENT_LOAD || segment.memory_size == 0 {
            continue;
        }
        let in_file = segment.offset.checked_add(segment.file_size).is_some_and(|end| end <= file_size);
        let in_space = segment.address.checked_add(segment.memory_size).is_some();
        if !in_file || !in_space || segment.file_size > segment.memory_size {
            return Err(ElfError::Segment { index });
        }
        segments.push(segment);
    }
    if segments.is_empty() {
        return Err(ElfError::NoSegment);
    }
    let entry = fields.u64(24);
    if !segments.iter().any(|s| (s.address..s.address + s.file_size).contains(&entry)) {
        return Err(ElfError::Entry(entry));
    }
    Ok(ElfImage { entry, segments })
}

fn is_bzimage(file: &File) -> bool {
    let mut magic = [0; 4];
    file.read_exact_at(&mut magic, BZIMAGE_MAGIC_OFFSET).is_ok() && &magic == b"HdrS"
}

/// Little-endian fields of a header; offsets are constants within its size.
struct Fields<'a>(&'a [u8]);

impl Fields<'_> {
    fn bytes<const N: usize>(&self, offset: usize) -> [u8; N] {
        let mut bytes = [0; N];
        bytes.copy_from_slice(&self.0[offset..offset + N]);
        bytes
    }

    fn u16(&self, offset: usize) -> u16 {
        u16::from_le_bytes(self.bytes(offset))
    }

    fn u32(&self, offset: usize) -> u32 {
        u32::from_le_bytes(self.bytes(offset))
    }

    fn u64(&self, offset: usize) -> u64 {
        u64::from_le_bytes(self.bytes(offset))
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use std::io::Write;

    use super::*;

    /// An ELF file with the given segments, its program headers behind the header.
    pub(crate) fn image(entry: u64, segments: &[Segment], size: usize) -> Vec<u8> {
        let mut bytes = vec![0; size.max(HEADER_SIZE + segments.len() * PROGRAM_HEADER_SIZE)];
        bytes[..4].copy_from_slice(MAGIC);
        bytes[4] = CLASS_64;
        bytes[5] = DATA_LITTLE_ENDIAN;
        bytes[16..18].copy_from_slice(&TYPE_EXECUTABLE.to_le_bytes());
        bytes[18..20].copy_from_slice(&MACHINE_X86_64.to_le_bytes());
        bytes[24..32].copy_from_slice(&entry.to_le_bytes());
        bytes[32..40].copy_from_slice(&(HEADER_SIZE as u64).to_le_bytes());
        bytes[54..56].copy_from_slice(&(PROGRAM_HEADER_SIZE as u16).to_le_bytes());
        bytes[56..58].copy_from_slice(&(segments.len() as u16).to_le_bytes());
        for (i, s) in segments.iter().enumerate() {
            let header = &mut bytes[HEADER_SIZE + i * PROGRAM_HEADER_SIZE..][..PROGRAM_HEADER_SIZE];
            header[..4].copy_from_slice(&SEGMENT_LOAD.to_le_bytes());
            let flags = if s.data { SEGMENT_WRITABLE } else { SEGMENT_EXECUTABLE };
            header[4..8].copy_from_slice(&flags.to_le_bytes());
            header[8..16].copy_from_slice(&s.offset.to_le_bytes());
            header[24..32].copy_from_slice(&s.address.to_le_bytes());
            header[32..40].copy_from_slice(&s.file_size.to_le_bytes());
            header[40..48].copy_from_slice(&s.memory_size.to_le_bytes());
        }
        bytes
    }

    pub(crate) fn file(bytes: &[u8]) -> File {
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(bytes).unwrap();
        file
    }

    const TEXT: Segment =
        Segment { offset: 0x1000, file_size: 0x1800, address: 0x100_0000, memory_size: 0x4000, data: false };

    #[test]
    fn reads_entry_and_segments() {
        let data = Segment { address: 0x200_0000, data: true, ..TEXT };
        let parsed = parse(&file(&image(0x100_0040, &[TEXT, data], 0x3000))).unwrap();
        assert_eq!(parsed, ElfImage { entry: 0x100_0040, segments: vec![TEXT, data] });
    }

    #[test]
    fn refuses_what_is_not_a_kernel() {
        let refused = |bytes: &[u8]| parse(&file(bytes)).unwrap_err().to_string();
        assert!(refused(b"").contains("not an ELF file"));
        assert!(refused(&[0; 4096]).contains("not an ELF file"));
        let mut bzimage = vec![0; 4096];
        bzimage[0x202..0x206].copy_from_slice(b"HdrS");
        assert!(refused(&bzimage).contains("bzImage"));
        let mut i386 = image(0, &[TEXT], 0x3000);
        i386[4] = 1;
        assert!(refused(&i386).contains("64-bit x86"));
    }

    #[test]
    fn refuses_damaged_headers() {
        let segment = |change: fn(&mut Segment)| {
            let mut s = TEXT;
            change(&mut s);
            parse(&file(&image(0x100_0000, &[s], 0x3000)))
        };
        assert!(matches!(segment(|s| s.offset = 0x2000), Err(ElfError::Segment { index: 0 })));
        assert!(matches!(segment(|s| s.offset = u64::MAX), Err(ElfError::Segment { index: 0 })));
        assert!(matches!(segment(|s| s.address = u64::MAX), Err(ElfError::Segment { index: 0 })));
        assert!(matches!(segment(|s| s.memory_size = 0x1000), Err(ElfError::Segment { index: 0 })));
        assert!(matches!(segment(|s| s.memory_size = 0), Err(ElfError::NoSegment)));
        assert!(matches!(segment(|s| s.address = 0x200_0000), Err(ElfError::Entry(0x100_0000))));

        let mut many = image(0x100_0000, &[TEXT], 0x3000);
        many[56..58].copy_from_slice(&u16::MAX.to_le_bytes());
        assert!(matches!(parse(&file(&many)), Err(ElfError::ProgramHeaders)));
        let mut outside = image(0x100_0000, &[TEXT], 0x3000);
        outside[32..40].copy_from_slice(&u64::MAX.to_le_bytes());
        assert!(matches!(parse(&file(&outside)), Err(ElfError::ProgramHeaders)));
    }

    /// Every single-byte change and every truncation gives an image or an error.
    #[test]
    fn no_damage_panics() {
        let good = image(0x100_0040, &[TEXT, TEXT], 0x3000);
        for at in 0..HEADER_SIZE + 2 * PROGRAM_HEADER_SIZE {
            for value in [0, 0x7f, 0xff] {
                let mut bad = good.clone();
                bad[at] = value;
                let _ = parse(&file(&bad));
            }
            let _ = parse(&file(&good[..at]));
        }
    }
}
