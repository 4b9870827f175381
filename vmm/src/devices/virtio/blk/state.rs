//! What a snapshot keeps of the disk; its content is the file's.

use serde::{Deserialize, Serialize};

/// State of a [`Blk`](super::Blk).
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct BlkState {
    /// Size the guest knows, in sectors.
    pub sectors: u64,
}

#[cfg(test)]
mod tests {
    use crate::devices::virtio::VirtioDevice;
    use crate::devices::virtio::blk::Blk;

    #[test]
    fn a_state_is_taken_on_by_a_disk_of_the_same_size() {
        let disk = |bytes| {
            let file = tempfile::tempfile().unwrap();
            file.set_len(bytes).unwrap();
            Blk::new("d", file, false).unwrap()
        };
        let saved = disk(8192).save().unwrap();
        disk(8192).restore(saved.clone()).unwrap();
        let error = disk(4096).restore(saved).unwrap_err().to_string();
        assert_eq!(error, "the disk has 8 sectors, the snapshot's had 16");
    }
}
