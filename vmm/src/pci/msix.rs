//! MSI-X (PCI Local Bus 3.0, 6.8.2): a table of messages in the BAR, one per
//! vector, each of which can be masked; a masked vector that is raised waits in
//! the pending bits.
//!
//! A vector is raised by writing its eventfd, whoever does it and whatever its
//! state. One that can be delivered has a route in KVM, which takes what raises it
//! (an irqfd), so no interrupt passes through a vCPU's thread; one that is masked
//! is taken off KVM, and the eventfd's own counter is its pending bit.

use std::io;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use serde::{Deserialize, Serialize};
use vmm_sys_util::eventfd::EventFd;

use crate::kvm::irq::{IrqError, IrqRoutes, MsiLine, MsiMessage};

/// Capability id.
pub const CAPABILITY_ID: u8 = 0x11;
/// Message control: MSI-X on.
pub const CONTROL_ENABLE: u16 = 1 << 15;
/// Message control: every vector masked.
pub const CONTROL_MASK_ALL: u16 = 1 << 14;
/// Size of a table entry.
pub const ENTRY_SIZE: u64 = 16;

/// Size of an entry's address and data.
pub const MESSAGE_SIZE: u64 = 12;

const VECTOR_MASKED: u32 = 1;

/// One vector.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct VectorState {
    /// What is sent where.
    pub message: MsiMessage,
    /// Masked by its own bit.
    pub masked: bool,
    /// Raised while it could not be delivered.
    pub pending: bool,
}

/// The table and what is on and off.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct MsixState {
    /// MSI-X is on.
    pub enabled: bool,
    /// Every vector is masked.
    pub all_masked: bool,
    /// The vectors.
    pub vectors: Vec<VectorState>,
}

impl MsixState {
    fn delivers(&self, vector: usize) -> bool {
        self.enabled && !self.all_masked && self.vectors.get(vector).is_some_and(|v| !v.masked)
    }
}

/// A function's MSI-X vectors.
pub struct Msix {
    routes: Arc<IrqRoutes>,
    /// Of each vector; those that can be delivered are connected.
    lines: Vec<MsiLine>,
    /// No pending bits, which the lines know.
    state: Mutex<MsixState>,
}

impl Msix {
    /// `count` vectors, masked as after reset.
    pub fn new(routes: Arc<IrqRoutes>, count: u16) -> Result<Self, IrqError> {
        let lines = (0..count).map(|_| routes.allocate_msi()).collect::<Result<Vec<_>, _>>()?;
        let vector = VectorState { message: MsiMessage::default(), masked: true, pending: false };
        let state =
            MsixState { enabled: false, all_masked: false, vectors: vec![vector; usize::from(count)] };
        Ok(Self { routes, lines, state: Mutex::new(state) })
    }

    /// Number of vectors.
    pub fn count(&self) -> u16 {
        self.lines.len() as u16
    }

    /// The capability's body: message control, table and pending bits at their
    /// offsets in BAR 0.
    pub fn capability(&self, table_offset: u32, pending_offset: u32) -> Vec<u8> {
        let mut body = (self.count() - 1).to_le_bytes().to_vec();
        body.extend(table_offset.to_le_bytes());
        body.extend(pending_offset.to_le_bytes());
        body
    }

    /// Table, pending bits and switches.
    pub fn save(&self) -> MsixState {
        let mut saved = self.lock().clone();
        for (vector, line) in saved.vectors.iter_mut().zip(&self.lines) {
            vector.pending = line.is_pending();
        }
        saved
    }

    /// Continues from a saved state of as many vectors: routes what can be
    /// delivered and raises what was pending.
    pub fn restore(&self, saved: MsixState) -> Result<(), IrqError> {
        if saved.vectors.len() != self.lines.len() {
            return Err(IrqError::Exhausted);
        }
        let mut state = self.lock();
        *state = saved;
        for (vector, line) in state.vectors.iter_mut().zip(&self.lines) {
            if std::mem::take(&mut vector.pending) {
                line.event().write(1).map_err(IrqError::EventFd)?;
            }
        }
        self.settle(&state)
    }

    /// Raises a vector, or marks it pending. One that does not exist is nobody's.
    pub fn trigger(&self, vector: u16) -> io::Result<()> {
        self.lines.get(usize::from(vector)).map_or(Ok(()), |line| line.event().write(1))
    }

    /// What raises a vector, for others; none where it does not exist.
    pub fn event(&self, vector: u16) -> io::Result<Option<EventFd>> {
        self.lines.get(usize::from(vector)).map(|line| line.event().try_clone()).transpose()
    }

    /// The guest wrote message control.
    pub fn set_control(&self, control: u16) {
        let mut state = self.lock();
        let before = (state.enabled, state.all_masked);
        state.enabled = control & CONTROL_ENABLE != 0;
        state.all_masked = control & CONTROL_MASK_ALL != 0;
        if before != (state.enabled, state.all_masked) {
            self.settle_or_log(&state);
        }
    }

    /// Reads the table; what is not a whole part of an entry reads as 0.
    pub fn read_table(&self, offset: u64, data: &mut [u8]) {
        data.fill(0);
        let state = self.lock();
        let Some(vector) = state.vectors.get((offset / ENTRY_SIZE) as usize) else { return };
        let control = if vector.masked { VECTOR_MASKED } else { 0 };
        let words = [vector.message.address_low, vector.message.address_high, vector.message.data, control];
        let mut entry = [0; ENTRY_SIZE as usize];
        for (bytes, word) in entry.chunks_exact_mut(4).zip(words) {
            bytes.copy_from_slice(&word.to_le_bytes());
        }
        let start = (offset % ENTRY_SIZE) as usize;
        if let Some(part) = entry.get(start..start + data.len()) {
            data.copy_from_slice(part);
        }
    }

    /// Writes the table, 4 or 8 bytes at a time (6.8.2: "all accesses must be
    /// aligned DWORDs or QWORDs").
    pub fn write_table(&self, offset: u64, data: &[u8]) {
        if !matches!(data.len(), 4 | 8) || !offset.is_multiple_of(data.len() as u64) {
            return;
        }
        let mut state = self.lock();
        let index = (offset / ENTRY_SIZE) as usize;
        let Some(vector) = state.vectors.get_mut(index) else { return };
        for (word, bytes) in (offset % ENTRY_SIZE / 4..).zip(data.chunks_exact(4)) {
            let mut value = [0; 4];
            value.copy_from_slice(bytes);
            let value = u32::from_le_bytes(value);
            match word {
                0 => vector.message.address_low = value,
                1 => vector.message.address_high = value,
                2 => vector.message.data = value,
                _ => vector.masked = value & VECTOR_MASKED != 0,
            }
        }
        self.settle_or_log(&state);
    }

    /// Reads the pending bits.
    pub fn read_pending(&self, offset: u64, data: &mut [u8]) {
        let _state = self.lock();
        for (index, byte) in data.iter_mut().enumerate() {
            let first = offset.saturating_add(index as u64).saturating_mul(8);
            *byte = (0..8).fold(0, |bits, bit| {
                let line = usize::try_from(first.saturating_add(bit)).ok().and_then(|i| self.lines.get(i));
                bits | (u8::from(line.is_some_and(MsiLine::is_pending)) << bit)
            });
        }
    }

    /// Takes every vector off KVM for good: the function is gone, and nobody is left to
    /// turn MSI-X on again. Others may still hold the vectors and raise them, which
    /// reaches nobody; whoever lets go of them last asks nothing of KVM.
    pub fn disconnect_all(&self) {
        let mut state = self.lock();
        state.enabled = false;
        for line in &self.lines {
            // What one refuses keeps none of the others connected.
            if let Err(e) = line.disconnect() {
                log::error!("interrupt route: {e}");
            }
        }
    }

    /// Gives every vector that can be delivered its route and connects it, which
    /// also delivers what waited, and takes the others off.
    fn settle(&self, state: &MsixState) -> Result<(), IrqError> {
        let delivered = || (0..).zip(&self.lines).filter(|(index, _)| state.delivers(*index));
        for (_, line) in (0..).zip(&self.lines).filter(|(index, _)| !state.delivers(*index)) {
            line.disconnect()?;
        }
        self.routes.set_messages(delivered().map(|(index, line)| (line, state.vectors[index].message)))?;
        delivered().try_for_each(|(_, line)| line.connect())
    }

    fn settle_or_log(&self, state: &MsixState) {
        if let Err(e) = self.settle(state) {
            log::error!("interrupt route: {e}");
        }
    }

    fn lock(&self) -> MutexGuard<'_, MsixState> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kvm::{Host, Vm};

    fn msix(count: u16) -> (Vm, Msix) {
        let vm = Host::open().unwrap().create_vm(1).unwrap();
        let msix = Msix::new(Arc::clone(&vm.routes), count).unwrap();
        (vm, msix)
    }

    fn write(msix: &Msix, vector: u64, word: u64, value: u32) {
        msix.write_table(vector * ENTRY_SIZE + word * 4, &value.to_le_bytes());
    }

    fn pending(msix: &Msix) -> u8 {
        let mut byte = [0];
        msix.read_pending(0, &mut byte);
        byte[0]
    }

    #[test]
    fn masked_vectors_wait_in_the_pending_bits() {
        let (_vm, msix) = msix(3);
        for vector in 0..3 {
            write(&msix, vector, 0, 0xfee0_0000);
            write(&msix, vector, 2, 0x30 + vector as u32);
        }
        msix.trigger(1).unwrap();
        assert_eq!(pending(&msix), 0b010);
        msix.set_control(CONTROL_ENABLE | CONTROL_MASK_ALL);
        write(&msix, 0, 3, 0);
        write(&msix, 1, 3, 0);
        msix.trigger(0).unwrap();
        assert_eq!(pending(&msix), 0b011, "masked all the same");
        msix.set_control(CONTROL_ENABLE);
        assert_eq!(pending(&msix), 0);
        msix.trigger(0).unwrap();
        assert_eq!(pending(&msix), 0);
        msix.trigger(2).unwrap();
        assert_eq!(pending(&msix), 0b100);
        msix.trigger(99).unwrap();
    }

    #[test]
    fn what_is_disconnected_for_good_is_delivered_no_more() {
        let (_vm, msix) = msix(2);
        for vector in 0..2 {
            write(&msix, vector, 0, 0xfee0_0000);
            write(&msix, vector, 3, 0);
        }
        msix.set_control(CONTROL_ENABLE);
        msix.trigger(0).unwrap();
        assert_eq!(pending(&msix), 0, "KVM took it");
        msix.disconnect_all();
        msix.trigger(0).unwrap();
        msix.trigger(1).unwrap();
        assert_eq!(pending(&msix), 0b11);
    }

    #[test]
    fn table_reads_back_and_odd_accesses_are_harmless() {
        let (_vm, msix) = msix(2);
        msix.write_table(16, &0x1234_5678_9abc_def0u64.to_le_bytes());
        let mut data = [0; 8];
        msix.read_table(16, &mut data);
        assert_eq!(u64::from_le_bytes(data), 0x1234_5678_9abc_def0);
        for (offset, len) in [(0, 1), (2, 4), (12, 8), (28, 4), (32, 4), (u64::MAX - 3, 4), (4, 8)] {
            msix.write_table(offset, &vec![0xff; len]);
            msix.read_table(offset, &mut vec![0; len]);
            msix.read_pending(offset, &mut vec![0; len]);
        }
        msix.read_table(16, &mut data);
        assert_eq!(u64::from_le_bytes(data), 0x1234_5678_9abc_def0);
    }

    #[test]
    fn state_round_trip() {
        let (_vm, first) = msix(2);
        write(&first, 1, 0, 0xfee0_1000);
        write(&first, 1, 3, 0);
        first.trigger(0).unwrap();
        first.set_control(CONTROL_ENABLE);
        let saved = serde_json::to_string(&first.save()).unwrap();
        let (_vm, second) = msix(2);
        second.restore(serde_json::from_str(&saved).unwrap()).unwrap();
        assert_eq!(second.save(), first.save());
        let (_vm, third) = msix(3);
        assert!(third.restore(first.save()).is_err());
    }
}
