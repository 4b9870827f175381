//! The host bridge in slot 0: Linux looks for one before it believes the
//! configuration ports.

use super::PciFunction;
use super::config::{ConfigSpace, Identity};

/// Red Hat's id for QEMU's plain PCIe host bridge: no quirk of a real chipset
/// belongs to it.
const IDENTITY: Identity = Identity {
    vendor: 0x1b36,
    device: 0x0008,
    revision: 0,
    class: 0x06_0000,
    subsystem_vendor: 0x1af4,
    subsystem: 0x1100,
};

/// The host bridge.
pub struct HostBridge(ConfigSpace);

impl HostBridge {
    /// A host bridge.
    pub fn new() -> Self {
        Self(ConfigSpace::new(&IDENTITY))
    }
}

impl Default for HostBridge {
    fn default() -> Self {
        Self::new()
    }
}

impl PciFunction for HostBridge {
    fn read_config(&mut self, offset: usize, data: &mut [u8]) {
        self.0.read(offset, data);
    }

    fn write_config(&mut self, offset: usize, data: &[u8]) {
        self.0.write(offset, data);
    }
}
