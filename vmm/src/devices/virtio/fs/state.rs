//! What a snapshot keeps of the share: what the guest's driver knows of it.
//! What a mounted file system knows of its files is not part of it; a share is
//! attached to a clone anew, or mounted after it.

use rvm_protocol::vmm::ShareConfig;
use serde::{Deserialize, Serialize};

use super::{Fs, FsError};

/// State of a [`Fs`].
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct FsState {
    /// The mount tag.
    pub tag: String,
    /// Request queues.
    pub request_queues: u16,
}

impl Fs {
    /// The device's state.
    pub fn save(&self) -> FsState {
        FsState { tag: self.tag().to_owned(), request_queues: self.request_queues() }
    }

    /// A device in that state, not active.
    pub fn restore(config: &ShareConfig, state: &FsState) -> Result<Self, FsError> {
        if config.tag != state.tag {
            return Err(FsError::OtherTag(config.tag.clone(), state.tag.clone()));
        }
        Ok(Self::new(config)?.with_request_queues(state.request_queues))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn state_survives_a_round_trip() {
        let dir = tempfile::tempdir().unwrap();
        let mut config = ShareConfig {
            tag: "rvm".to_owned(),
            dir: dir.path().to_owned(),
            readonly: true,
            cache: Default::default(),
        };
        let saved = serde_json::to_string(&Fs::new(&config).unwrap().with_request_queues(3).save()).unwrap();
        let state: FsState = serde_json::from_str(&saved).unwrap();
        assert_eq!(Fs::restore(&config, &state).unwrap().save(), state);
        config.tag = "other".to_owned();
        assert!(matches!(Fs::restore(&config, &state), Err(FsError::OtherTag(..))));
    }
}
