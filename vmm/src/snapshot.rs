//! A paused machine in a file, and from there again.
//!
//! ```text
//! 0      magic, version, bytes of the state, checksum of the state
//! 32     the state, JSON
//! page   guest memory, region by region; pages of zeroes are holes
//! ```
//!
//! A file is not trusted: what it says is checked against the machine that the
//! configuration describes, which alone decides what the machine is. Its memory is
//! mapped copy-on-write, so clones of one file share its pages.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

use serde::{Deserialize, Serialize};
use thiserror::Error;
use vm_memory::{Bytes, GuestMemoryError, GuestMemoryRegion, MemoryRegionAddress};

use crate::arch::layout::PAGE_SIZE;
use crate::devices::legacy::serial::SerialState;
use crate::kvm::state::VmState;
use crate::memory::{self, GuestRam, MemoryError};
use crate::pci::BusState;
use crate::vcpu::state::VcpuState;

const MAGIC: &[u8; 8] = b"RVM-SNAP";
const VERSION: u32 = 1;
const HEADER: usize = 32;
/// Longest state; a machine of 255 vCPUs has some 10 MiB.
const MAX_STATE: u64 = 64 << 20;
/// Memory is looked at for zeroes, and written, in pieces of so many bytes.
const PIECE: usize = 64 << 10;

/// Why a snapshot was not written or cannot be used.
#[derive(Debug, Error)]
pub enum SnapshotError {
    /// The file.
    #[error("the snapshot's file")]
    File(#[from] io::Error),
    /// It is none, of another version, or damaged.
    #[error("it is not a snapshot of this version, or it is damaged: {0}")]
    Damaged(String),
    /// It is of another machine than the configuration describes.
    #[error("it is another machine's: {0}")]
    OtherMachine(String),
    /// The machine is in a state that cannot be saved.
    #[error("this machine cannot be saved: {0}")]
    Unsaved(String),
    /// Guest memory could not be read.
    #[error("guest memory could not be read")]
    Read(#[from] GuestMemoryError),
    /// Guest memory could not be filled.
    #[error(transparent)]
    Memory(#[from] MemoryError),
}

impl SnapshotError {
    /// What kept a machine from being saved.
    pub fn unsaved(cause: impl std::error::Error) -> Self {
        Self::Unsaved(cause.to_string())
    }

    /// What makes the file's machine another one.
    pub fn other(cause: impl std::error::Error) -> Self {
        Self::OtherMachine(cause.to_string())
    }
}

/// Everything a machine is, apart from its memory.
#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct MachineState {
    /// Bytes of each region of memory.
    pub memory: Vec<u64>,
    /// vCPUs there can be.
    pub max_vcpus: u8,
    /// Interrupt controllers and clock.
    pub vm: VmState,
    /// The vCPUs.
    pub vcpus: Vec<VcpuState>,
    /// The PCI bus and its devices.
    pub pci: BusState,
    /// The serial console.
    pub serial: SerialState,
}

/// Writes a machine's state and memory to `file`, which is empty.
pub fn write(file: &File, state: &MachineState, memory: &GuestRam) -> Result<(), SnapshotError> {
    let text = serde_json::to_vec(state).map_err(io::Error::from)?;
    let mut header = [0; HEADER];
    header[..8].copy_from_slice(MAGIC);
    header[8..12].copy_from_slice(&VERSION.to_le_bytes());
    header[16..24].copy_from_slice(&(text.len() as u64).to_le_bytes());
    header[24..].copy_from_slice(&checksum(&text).to_le_bytes());
    file.write_all_at(&header, 0)?;
    file.write_all_at(&text, HEADER as u64)?;
    let mut offset = memory_offset(text.len() as u64);
    let mut piece = vec![0; PIECE];
    for region in memory.boot_regions() {
        for start in (0..region.len()).step_by(PIECE) {
            let part = &mut piece[..PIECE.min((region.len() - start) as usize)];
            region.read_slice(part, MemoryRegionAddress(start))?;
            if part.iter().any(|byte| *byte != 0) {
                file.write_all_at(part, offset + start)?;
            }
        }
        offset += region.len();
    }
    // The end may be a hole.
    file.set_len(offset)?;
    Ok(())
}

/// A snapshot's state, and where its memory begins.
pub struct Opened {
    file: File,
    /// The state.
    pub state: MachineState,
    memory_offset: u64,
}

/// Reads and checks a snapshot. The file must not change as long as a machine that
/// was made from it runs.
pub fn open(file: File) -> Result<Opened, SnapshotError> {
    let damaged = |what: &str| SnapshotError::Damaged(what.to_owned());
    let len = file.metadata()?.len();
    let mut header = [0; HEADER];
    file.read_exact_at(&mut header, 0).map_err(|_| damaged("it is too short"))?;
    let u64_at = |at: usize| header[at..at + 8].iter().rev().fold(0, |sum, byte| sum << 8 | u64::from(*byte));
    if &header[..8] != MAGIC || u64_at(8) != u64::from(VERSION) {
        return Err(damaged("its header"));
    }
    let text_len = u64_at(16);
    if text_len > MAX_STATE.min(len) {
        return Err(damaged("its length"));
    }
    let mut text = vec![0; text_len as usize];
    file.read_exact_at(&mut text, HEADER as u64).map_err(|_| damaged("it is too short"))?;
    if checksum(&text) != u64_at(24) {
        return Err(damaged("its checksum"));
    }
    let state: MachineState =
        serde_json::from_slice(&text).map_err(|error| SnapshotError::Damaged(error.to_string()))?;
    let memory_offset = memory_offset(text_len);
    let end = state.memory.iter().try_fold(memory_offset, |end, len| end.checked_add(*len));
    if end != Some(len) {
        return Err(damaged("its memory is not all there"));
    }
    Ok(Opened { file, state, memory_offset })
}

impl Opened {
    /// Maps the snapshot's memory over `memory`, which has the same regions.
    pub fn map_memory(&self, memory: &GuestRam) -> Result<(), SnapshotError> {
        let regions: Vec<u64> = memory.boot_regions().iter().map(GuestMemoryRegion::len).collect();
        if regions != self.state.memory {
            let problem = format!("memory of {:?} bytes instead of {regions:?}", self.state.memory);
            return Err(SnapshotError::OtherMachine(problem));
        }
        let mut offset = self.memory_offset;
        for region in memory.boot_regions() {
            memory::map_file(memory, region.start_addr().0, &self.file, offset, region.len())?;
            offset += region.len();
        }
        Ok(())
    }
}

fn memory_offset(text_len: u64) -> u64 {
    (HEADER as u64 + text_len).next_multiple_of(PAGE_SIZE)
}

/// FNV-1a: tells damage, not malice.
fn checksum(bytes: &[u8]) -> u64 {
    bytes
        .iter()
        .fold(0xcbf2_9ce4_8422_2325, |sum, byte| (sum ^ u64::from(*byte)).wrapping_mul(0x100_0000_01b3))
}
