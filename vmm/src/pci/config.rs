//! A function's 256 bytes of configuration space (PCI Local Bus 3.0, chapter 6).

use std::ops::Range;

use serde::{Deserialize, Serialize};

/// Size of configuration space.
pub const SIZE: usize = 256;
/// Size of what [`ConfigSpace::told`] says of it.
pub const TOLD_SIZE: usize = 8 + 2 * SIZE;

const COMMAND: usize = 0x04;
const COMMAND_MEMORY: u8 = 1 << 1;
/// Memory decoding, bus mastering, INTx off.
const COMMAND_WRITABLE: u16 = 0x0406;
const STATUS: usize = 0x06;
const STATUS_CAPABILITIES: u8 = 1 << 4;
const REVISION: usize = 0x08;
const CLASS: usize = 0x09;
const CACHE_LINE: usize = 0x0c;
const BAR_0: usize = 0x10;
const SUBSYSTEM: usize = 0x2c;
const CAPABILITIES: usize = 0x34;
const INTERRUPT_LINE: usize = 0x3c;
const FIRST_CAPABILITY: usize = 0x40;

/// Who a function says it is.
#[derive(Clone, Copy, Debug, Default)]
pub struct Identity {
    /// Vendor id.
    pub vendor: u16,
    /// Device id.
    pub device: u16,
    /// Revision.
    pub revision: u8,
    /// Class, subclass, programming interface: 0xCCSSPP.
    pub class: u32,
    /// Subsystem vendor id.
    pub subsystem_vendor: u16,
    /// Subsystem id.
    pub subsystem: u16,
}

/// The registers, and which of their bits the guest can write.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ConfigSpace {
    registers: Vec<u8>,
    writable: Vec<u8>,
    bar_size: u32,
    next_capability: usize,
    last_link: usize,
}

impl ConfigSpace {
    /// Type 0 header without BARs and capabilities.
    pub fn new(identity: &Identity) -> Self {
        let mut space = Self {
            registers: vec![0; SIZE],
            writable: vec![0; SIZE],
            bar_size: 0,
            next_capability: FIRST_CAPABILITY,
            last_link: CAPABILITIES,
        };
        space.set(0, &identity.vendor.to_le_bytes());
        space.set(2, &identity.device.to_le_bytes());
        space.set(REVISION, &[identity.revision]);
        space.set(CLASS, &identity.class.to_le_bytes()[..3]);
        space.set(SUBSYSTEM, &identity.subsystem_vendor.to_le_bytes());
        space.set(SUBSYSTEM + 2, &identity.subsystem.to_le_bytes());
        space.allow(COMMAND, &COMMAND_WRITABLE.to_le_bytes());
        space.allow(CACHE_LINE, &[0xff]);
        space.allow(INTERRUPT_LINE, &[0xff]);
        space
    }

    /// Makes BAR 0 a 32-bit memory BAR of `size` bytes, a power of two of at
    /// least 16, at `address`.
    pub fn set_memory_bar(&mut self, size: u32, address: u64) {
        debug_assert!(size.is_power_of_two() && size >= 16 && address.is_multiple_of(u64::from(size)));
        self.bar_size = size;
        self.set(BAR_0, &(address as u32).to_le_bytes());
        self.allow(BAR_0, &(!(size - 1)).to_le_bytes());
    }

    /// Appends a capability; `body` follows the id and the link to the next one,
    /// and `writable` says which bits of the body's first bytes the guest can
    /// write. Returns its offset.
    pub fn add_capability(&mut self, id: u8, body: &[u8], writable: &[u8]) -> usize {
        let offset = self.next_capability;
        self.set(self.last_link, &[offset as u8]);
        self.set(offset, &[id, 0]);
        self.set(offset + 2, body);
        self.allow(offset + 2, writable);
        self.registers[STATUS] |= STATUS_CAPABILITIES;
        self.last_link = offset + 1;
        self.next_capability = (offset + 2 + body.len()).next_multiple_of(4);
        offset
    }

    /// Takes on the registers of a saved space of the same function: what the guest
    /// can write. False where it is another's.
    pub fn restore(&mut self, saved: &Self) -> bool {
        let same = |(index, mask): (usize, &u8)| {
            let of = |space: &Self| space.registers.get(index).map(|byte| byte & !mask);
            of(saved) == of(self)
        };
        let layout = |space: &Self| (space.registers.len(), space.bar_size, space.writable.clone());
        let same_function = layout(saved) == layout(self) && self.writable.iter().enumerate().all(same);
        if same_function {
            self.registers.clone_from(&saved.registers);
        }
        same_function
    }

    /// Addresses of the BAR where the guest has turned memory decoding on.
    pub fn memory(&self) -> Option<Range<u64>> {
        if self.bar_size == 0 || self.registers[COMMAND] & COMMAND_MEMORY == 0 {
            return None;
        }
        let start = u64::from(self.u32(BAR_0) & !0xf);
        Some(start..start + u64::from(self.bar_size))
    }

    /// All there is to say of it to a guest that does not ask, [`TOLD_SIZE`] bytes: a bit for
    /// each register of 32 that is no more than memory, their content, and which of their bits
    /// can be written. `acting` is the one register behind which something happens.
    pub fn told(&self, acting: usize) -> Vec<u8> {
        let plain = !(1_u64 << (acting / 4));
        [&plain.to_le_bytes()[..], &self.registers, &self.writable].concat()
    }

    /// Reads registers; those outside read as 0xff.
    pub fn read(&self, offset: usize, data: &mut [u8]) {
        match self.registers.get(offset..offset.saturating_add(data.len())) {
            Some(bytes) => data.copy_from_slice(bytes),
            None => data.fill(0xff),
        }
    }

    /// Writes the bits of registers that can be written.
    pub fn write(&mut self, offset: usize, data: &[u8]) {
        let range = offset..offset.saturating_add(data.len());
        let (Some(registers), Some(writable)) =
            (self.registers.get_mut(range.clone()), self.writable.get(range))
        else {
            return;
        };
        for ((register, mask), byte) in registers.iter_mut().zip(writable).zip(data) {
            *register = (*register & !mask) | (byte & mask);
        }
    }

    /// The 32-bit register at `offset`, which must be inside.
    pub fn u32(&self, offset: usize) -> u32 {
        let mut bytes = [0; 4];
        self.read(offset, &mut bytes);
        u32::from_le_bytes(bytes)
    }

    /// Sets registers, whether the guest can write them or not.
    pub fn set(&mut self, offset: usize, bytes: &[u8]) {
        self.registers[offset..offset + bytes.len()].copy_from_slice(bytes);
    }

    fn allow(&mut self, offset: usize, mask: &[u8]) {
        self.writable[offset..offset + mask.len()].copy_from_slice(mask);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn space() -> ConfigSpace {
        let mut space = ConfigSpace::new(&Identity { vendor: 0x1af4, device: 0x1044, ..Identity::default() });
        space.set_memory_bar(0x4000, 0xc010_0000);
        space
    }

    #[test]
    fn capabilities_form_a_list() {
        let mut space = space();
        let first = space.add_capability(0x09, &[1, 2, 3], &[]);
        let second = space.add_capability(0x11, &[0; 10], &[0, 0xc0]);
        assert_eq!((first, second), (0x40, 0x48));
        let byte = |at| space.u32(at) as u8;
        assert_eq!((byte(CAPABILITIES), byte(first), byte(first + 1)), (0x40, 0x09, 0x48));
        assert_eq!((byte(second), byte(second + 1)), (0x11, 0));
    }

    #[test]
    fn identity_cannot_be_written() {
        let mut space = space();
        space.write(0, &[0; 4]);
        space.write(254, &[0xff; 4]);
        assert_eq!(space.u32(0), 0x1044_1af4);
        let mut data = [0; 4];
        space.read(254, &mut data);
        assert_eq!(data, [0xff; 4]);
    }

    #[test]
    fn what_is_told_is_what_would_be_read_and_could_be_written() {
        let mut space = space();
        let capability = space.add_capability(0x09, &[1; 6], &[]);
        let told = space.told(capability + 4);
        assert_eq!(told.len(), TOLD_SIZE);
        let (plain, rest) = told.split_at(8);
        assert_eq!(u64::from_le_bytes(plain.try_into().unwrap()), !(1 << 17));
        let (registers, writable) = rest.split_at(SIZE);
        let mut read = [0; SIZE];
        space.read(0, &mut read);
        assert_eq!(registers, read);
        space.write(0, &[0xff; SIZE]);
        let ones = registers.iter().zip(writable).map(|(register, mask)| register | mask);
        space.read(0, &mut read);
        assert!(ones.eq(read));
        assert_eq!(writable[BAR_0..BAR_0 + 4], (!0x3fff_u32).to_le_bytes());
    }

    #[test]
    fn state_round_trip() {
        let mut space = space();
        space.write(COMMAND, &[6, 0]);
        let saved = serde_json::to_string(&space).unwrap();
        let restored: ConfigSpace = serde_json::from_str(&saved).unwrap();
        assert_eq!(restored, space);
        assert_eq!(restored.memory(), Some(0xc010_0000..0xc010_4000));
    }
}
