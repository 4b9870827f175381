//! Where a sandbox's interfaces are plugged in.

use std::{fs, path::PathBuf};

use rvm_protocol::guest::NET_SLOTS;

use super::interfaces::Link;
use crate::{
    error::{Step, StepResult},
    sys::pci,
};

/// The places the host plugs interfaces into.
pub trait Slots: std::fmt::Debug + Send + Sync {
    /// The one of `links` that is in a slot.
    fn find<'a>(&self, slot: u32, links: &'a [Link]) -> StepResult<Option<&'a Link>>;

    /// Looks for what was plugged in.
    fn scan(&self) -> StepResult<()>;

    /// Lets go of what is in the other slots.
    fn keep_only(&self, slots: &[u32]) -> StepResult<()>;
}

/// PCI device numbers, of [`NET_SLOTS`].
#[derive(Debug)]
pub struct PciSlots;

impl PciSlots {
    fn function(slot: u32) -> PathBuf {
        format!("/sys/bus/pci/devices/0000:00:{slot:02x}.0").into()
    }
}

impl Slots for PciSlots {
    /// By the virtio device below the function: what `/sys` shows of interfaces
    /// depends on the network namespace it was mounted in.
    fn find<'a>(&self, slot: u32, links: &'a [Link]) -> StepResult<Option<&'a Link>> {
        let function = Self::function(slot);
        let entries = match fs::read_dir(&function) {
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(None),
            entries => entries.step(|| format!("list {function:?}"))?,
        };
        let devices: Vec<_> =
            entries.flatten().filter_map(|entry| entry.file_name().into_string().ok()).collect();
        Ok(links.iter().find(|link| !link.parent.is_empty() && devices.contains(&link.parent)))
    }

    fn scan(&self) -> StepResult<()> {
        pci::rescan()
    }

    fn keep_only(&self, slots: &[u32]) -> StepResult<()> {
        for slot in NET_SLOTS.map(u32::from).filter(|slot| !slots.contains(slot)) {
            let remove = Self::function(slot).join("remove");
            match fs::write(&remove, "1") {
                Err(error) if error.kind() == std::io::ErrorKind::NotFound => {}
                written => written.step(|| format!("let go of the network interface in PCI slot {slot}"))?,
            }
        }
        Ok(())
    }
}
