//! What a snapshot keeps of the device. Connections are not part of it: their
//! other ends are programs of the host, which a clone does not have; the
//! guest's driver is told by a transport reset.

use rvm_protocol::vmm::VsockConfig;
use serde::{Deserialize, Serialize};

use super::{Vsock, VsockError};

/// State of a [`Vsock`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct VsockState {
    /// The CID the guest knows itself by.
    pub guest_cid: u32,
}

impl Vsock {
    /// The device's state.
    pub fn save(&self) -> VsockState {
        VsockState { guest_cid: self.guest_cid() }
    }

    /// A device in that state, not active, on a socket of its own.
    pub fn restore(config: &VsockConfig, state: &VsockState) -> Result<Self, VsockError> {
        if config.guest_cid != state.guest_cid {
            return Err(VsockError::OtherCid(config.guest_cid, state.guest_cid));
        }
        Self::new(config)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn state_survives_a_round_trip() {
        let dir = tempfile::tempdir().unwrap();
        let mut config = VsockConfig { guest_cid: 7, socket: dir.path().join("v.sock") };
        let saved = serde_json::to_string(&Vsock::new(&config).unwrap().save()).unwrap();
        let state: VsockState = serde_json::from_str(&saved).unwrap();
        assert_eq!(Vsock::restore(&config, &state).unwrap().save(), state);
        config.guest_cid = 8;
        assert!(matches!(Vsock::restore(&config, &state), Err(VsockError::OtherCid(8, 7))));
    }
}
