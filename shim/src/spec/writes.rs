//! Where what a container writes goes.

use std::collections::HashMap;

use super::{Bundle, SpecError, pod};
use crate::{
    config::{Scratch, Writes},
    rootfs::Layer,
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
    /// the host where its root is a directory there, else as configured.
    pub fn settle_writes(&mut self, configured: Writes, layers: &[Layer]) {
        let unsaid = if layers.is_empty() { Writes::Host } else { configured };
        let writes = *self.writes.get_or_insert(unsaid);
        if writes == Writes::Host {
            let id = &self.container.container_id;
            let share_path = format!("{id}/rootfs");
            let rootfs = self.container.rootfs.mut_or_insert_default();
            rootfs.on_volumes = true;
            rootfs.share_path = share_path;
        }
    }

    /// The scratch it needs, once that is settled; none where it writes to the host.
    pub fn scratch(&self, configured: Scratch) -> Option<Scratch> {
        match (self.writes, configured) {
            (Some(Writes::Host), _) => None,
            (Some(Writes::Memory), Scratch::Block { .. }) => Some(Scratch::Tmpfs { size_bytes: 0 }),
            _ => Some(configured),
        }
    }

    /// Whether the host is changed by what the guest may not have written out yet.
    pub fn writes_to_host(&self) -> bool {
        self.writes == Some(Writes::Host)
            || self.volumes.iter().any(|volume| !volume.readonly)
            || self.disks.iter().any(|disk| !disk.readonly)
    }
}
