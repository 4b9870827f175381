//! What a snapshot keeps of the disk; its content is the file's.

use rvm_protocol::vmm::DiskConfig;
use serde::{Deserialize, Serialize};

use super::{Blk, BlkError};

/// State of a [`Blk`].
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct BlkState {
    /// Size the guest knows, in sectors.
    pub sectors: u64,
}

impl Blk {
    /// The device's state.
    pub fn save(&self) -> BlkState {
        BlkState { sectors: self.disk().sectors() }
    }

    /// A device in that state, not active, on a disk of the same size.
    pub fn restore(config: &DiskConfig, state: &BlkState) -> Result<Self, BlkError> {
        let blk = Self::open(config)?;
        match blk.disk().sectors() {
            sectors if sectors == state.sectors => Ok(blk),
            sectors => Err(BlkError::Resized { sectors, expected: state.sectors }),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn state_survives_a_round_trip_on_a_disk_of_the_same_size() {
        let file = tempfile::NamedTempFile::new().unwrap();
        file.as_file().set_len(8192).unwrap();
        let config = DiskConfig { serial: "d".to_owned(), path: file.path().to_owned(), readonly: false };
        let saved = serde_json::to_string(&Blk::open(&config).unwrap().save()).unwrap();
        let state: BlkState = serde_json::from_str(&saved).unwrap();
        assert_eq!(Blk::restore(&config, &state).unwrap().save(), state);

        file.as_file().set_len(4096).unwrap();
        assert!(matches!(Blk::restore(&config, &state), Err(BlkError::Resized { sectors: 8, expected: 16 })));
    }
}
