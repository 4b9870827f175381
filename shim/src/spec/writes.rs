//! Where what a container writes goes.

use std::collections::HashMap;

use super::{Bundle, SpecError, pod};
use crate::{
    config::{Scratch, Writes},
    rootfs::{
        Layer, RootfsError,
        stack::{self, Disk, Mounts, Upper},
    },
    scratch::Wanted,
};

/// The annotation that says so for one container.
const ANNOTATION: &str = "io.rvm.writes";

/// What a specification's annotations say of it.
pub(super) fn of(annotations: &HashMap<String, String>) -> Result<Option<Writes>, SpecError> {
    let Some(name) = annotations.get(ANNOTATION) else { return Ok(None) };
    let found = Writes::named(name).ok_or_else(|| {
        let problem = format!("{name:?}: must be one of {}", Writes::NAMES.join(", "));
        SpecError::field(format!("annotations[{ANNOTATION:?}]"), problem)
    });
    found.map(Some)
}

impl Bundle {
    /// Whether kubelet asked for it: then nobody commits what it writes, and somebody counts it.
    pub fn is_kubernetes(&self) -> bool {
        self.annotations.contains_key(pod::KEYS[0].0)
    }

    /// Settles where the container's writes go: as its annotation says, else to
    /// the host where its root is a directory there, else as configured. A disk that the client has for it is the host's
    /// already. Checks `layers`, as a root without a writable one is read-only.
    pub fn settle_writes(&mut self, configured: Writes, layers: &[Layer]) -> Result<(), RootfsError> {
        let rootfs = self.container.rootfs.mut_or_insert_default();
        let mut has_disk = false;
        if let Mounts::Stack(stack) = stack::read(layers)? {
            rootfs.readonly |= stack.readonly;
            has_disk = matches!(stack.upper, Upper::Disk(_));
        }
        let unsaid = if layers.is_empty() { Writes::Host } else { configured };
        match self.writes.get_or_insert(unsaid) {
            writes @ Writes::Host if has_disk => *writes = Writes::Guest,
            Writes::Host => {
                rootfs.on_volumes = true;
                rootfs.share_path = format!("{}/rootfs", self.container.container_id);
            }
            Writes::Guest | Writes::Memory => {}
        }
        Ok(())
    }

    /// The scratch it needs, once that is settled; none where it writes to the host. A `disk` that the client has for
    /// it is that, unless what is written shall not stay.
    pub fn scratch(&self, configured: Scratch, disk: Option<Disk>) -> Option<Wanted> {
        match (self.writes, configured, disk) {
            (Some(Writes::Host), _, _) => None,
            (Some(Writes::Memory), Scratch::Block { .. }, _) => Some(Wanted::Tmpfs { size_bytes: 0 }),
            (Some(Writes::Memory), Scratch::Tmpfs { size_bytes }, _) => Some(Wanted::Tmpfs { size_bytes }),
            (_, _, Some(disk)) => Some(Wanted::Disk(disk)),
            (_, Scratch::Tmpfs { size_bytes }, None) => Some(Wanted::Tmpfs { size_bytes }),
            (_, Scratch::Block { size_bytes }, None) => Some(Wanted::Block { size_bytes }),
        }
    }

    /// Whether the host is changed by what the guest may not have written out yet.
    pub fn writes_to_host(&self) -> bool {
        self.writes == Some(Writes::Host)
            || self.volumes.iter().any(|volume| !volume.readonly)
            || self.disks.iter().any(|disk| !disk.readonly)
    }
}
