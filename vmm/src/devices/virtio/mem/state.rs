//! What a snapshot keeps of the device.

use serde::{Deserialize, Serialize};

use super::Mem;
use super::blocks::Blocks;
use super::registers::Registers;
use crate::memory::{GuestRam, Room};

/// State of a [`Mem`].
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct MemState {
    /// Guest address of the region.
    pub start: u64,
    /// Bytes of the region.
    pub size: u64,
    /// Bytes from its start in which blocks can be plugged.
    pub usable: u64,
    /// Bytes the guest should have plugged.
    pub requested: u64,
    /// Which blocks are plugged.
    pub plugged: Blocks,
}

impl Mem {
    /// The device's state. Its thread must not be at work.
    pub fn save(&self) -> MemState {
        let Registers { start, size, .. } = self.shared.registers;
        let (usable, requested) = (self.shared.registers.usable(), self.shared.registers.requested());
        MemState { start, size, usable, requested, plugged: self.shared.blocks().clone() }
    }

    /// A device in that state, not active, for a region in the same place; `None`
    /// where it is another.
    pub fn restore(memory: &GuestRam, room: Room, state: MemState) -> Option<Self> {
        let mem = Self::new(memory, room);
        let registers = &mem.shared.registers;
        let plugged = state.plugged.count(0..u64::MAX);
        let fits = (state.start, state.size) == (registers.start, registers.size)
            && state.requested <= state.usable
            && state.usable <= state.size
            && state.plugged.len() == mem.shared.blocks().len()
            && plugged == state.plugged.count(registers.all(state.usable));
        if !fits {
            return None;
        }
        registers.request(state.usable, state.requested);
        registers.set_plugged(plugged);
        *mem.shared.blocks() = state.plugged;
        Some(mem)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::memory::{self, Shape};

    #[test]
    fn state_survives_a_round_trip_on_the_same_region() {
        let memory =
            memory::create_shaped(Shape { boot: 64 << 20, more: 1 << 30, ..Shape::default() }).unwrap();
        let mem = Mem::new(&memory, Room::Memory);
        mem.control().request(256 << 20, 128 << 20).unwrap();
        mem.shared.blocks().set(3..9, true);
        let saved = serde_json::to_string(&mem.save()).unwrap();
        let state: MemState = serde_json::from_str(&saved).unwrap();
        let restored = Mem::restore(&memory, Room::Memory, state.clone()).unwrap();
        assert_eq!((restored.save(), restored.control().plugged_bytes()), (state.clone(), 12 << 20));

        let other =
            memory::create_shaped(Shape { boot: 64 << 20, more: 2 << 30, ..Shape::default() }).unwrap();
        assert!(Mem::restore(&other, Room::Memory, state.clone()).is_none());
        assert!(
            Mem::restore(&memory, Room::Memory, MemState { usable: 8 << 20, requested: 0, ..state.clone() })
                .is_none()
        );
        assert!(Mem::restore(&memory, Room::Memory, MemState { requested: 512 << 20, ..state }).is_none());
    }
}
