//! What a snapshot keeps of the device. Connections are not part of it: their
//! other ends are programs of the host, which a clone does not have; the
//! guest's driver is told by a transport reset.

use serde::{Deserialize, Serialize};

/// State of a [`Vsock`](super::Vsock).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct VsockState {
    /// The CID the guest knows itself by.
    pub guest_cid: u32,
}

#[cfg(test)]
mod tests {
    use rvm_protocol::vmm::VsockConfig;

    use crate::devices::virtio::VirtioDevice;
    use crate::devices::virtio::vsock::Vsock;

    #[test]
    fn a_state_is_taken_on_by_a_device_of_the_same_cid() {
        let dir = tempfile::tempdir().unwrap();
        let vsock = |guest_cid, name: &str| {
            Vsock::new(&VsockConfig { guest_cid, socket: dir.path().join(name) }).unwrap()
        };
        let saved = vsock(7, "a").save().unwrap();
        vsock(7, "b").restore(saved.clone()).unwrap();
        let error = vsock(8, "c").restore(saved).unwrap_err().to_string();
        assert_eq!(error, "guest_cid 8 is not that of the snapshot, 7");
        assert!(vsock(7, "d").restore(serde_json::json!({"guest_cid": 7, "more": 1})).is_err());
    }
}
