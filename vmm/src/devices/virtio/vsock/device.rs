//! The socket device as the transport sees it.

use std::os::fd::OwnedFd;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use rvm_protocol::vmm::VsockConfig;
use serde_json::Value;
use virtio_bindings::virtio_ring::{VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC};

use super::muxer::Muxer;
use super::worker::{FIRST_CONNECTION, VsockWorker};
use super::{DEVICE_TYPE, PORT_SUFFIX_BYTES, QUEUE_SIZES, SUN_PATH_BYTES, VsockError, VsockState};
use crate::devices::virtio::ring::Ring;
use crate::devices::virtio::{ActivateError, Activation, StateError, VirtioDevice, read_config_bytes};
use crate::jail::Duty;
use crate::{mounts, process};

/// The socket device.
#[derive(Debug)]
pub struct Vsock {
    guest_cid: u32,
    socket: PathBuf,
    /// Where it is, and those of the host's ports.
    dir: Arc<OwnedFd>,
    listener: Arc<UnixListener>,
    /// The driver that is active next knows connections that are gone.
    restored: bool,
}

impl Vsock {
    /// Creates the Unix socket; the device is not active.
    pub fn new(config: &VsockConfig) -> Result<Self, VsockError> {
        if config.guest_cid < 3 || config.guest_cid == u32::MAX {
            return Err(VsockError::Cid(config.guest_cid));
        }
        let path = &config.socket;
        if path.as_os_str().as_bytes().len() > SUN_PATH_BYTES - PORT_SUFFIX_BYTES {
            return Err(VsockError::PathTooLong { path: path.clone() });
        }
        let refused = |source| VsockError::Bind { path: path.clone(), source };
        let dir = path.parent().filter(|dir| !dir.as_os_str().is_empty()).unwrap_or(Path::new("."));
        let dir = Arc::new(mounts::view(dir).map_err(refused)?);
        let listener = UnixListener::bind(path).map_err(refused)?;
        listener.set_nonblocking(true).map_err(refused)?;
        let listener = Arc::new(listener);
        Ok(Self { guest_cid: config.guest_cid, socket: path.clone(), dir, listener, restored: false })
    }
}

impl Drop for Vsock {
    fn drop(&mut self) {
        process::remove_socket(&self.socket);
    }
}

impl VirtioDevice for Vsock {
    fn device_type(&self) -> u32 {
        DEVICE_TYPE
    }

    fn name(&self) -> &str {
        "vsock"
    }

    fn queue_sizes(&self) -> &[u16] {
        &QUEUE_SIZES
    }

    fn features(&self) -> u64 {
        1 << VIRTIO_RING_F_EVENT_IDX | 1 << VIRTIO_RING_F_INDIRECT_DESC
    }

    fn save(&self) -> Result<Value, StateError> {
        Ok(serde_json::to_value(VsockState { guest_cid: self.guest_cid })?)
    }

    fn restore(&mut self, state: Value) -> Result<(), StateError> {
        let VsockState { guest_cid } = serde_json::from_value(state)?;
        if guest_cid == self.guest_cid {
            self.restored = true;
            return Ok(());
        }
        Err(StateError::Other(format!(
            "guest_cid {} is not that of the snapshot, {guest_cid}",
            self.guest_cid
        )))
    }

    /// `struct virtio_vsock_config`: the guest's CID.
    fn read_config(&self, offset: u64, data: &mut [u8]) {
        read_config_bytes(&u64::from(self.guest_cid).to_le_bytes(), offset, data);
    }

    fn duty(&self) -> Duty {
        Duty::Vsock
    }

    fn activate(&mut self, activation: Activation) -> Result<(), ActivateError> {
        let Activation { memory, queues, features, threads, .. } = activation;
        let mut rings = queues.into_iter().map(|queue| queue.map(|queue| Ring::new(queue, features)));
        let rx = rings.next().flatten().ok_or(ActivateError::MissingQueue(0))?;
        let tx = rings.next().flatten().ok_or(ActivateError::MissingQueue(1))?;
        let untold = rings.next().flatten().filter(|_| self.restored);
        let name = self.socket.file_name().unwrap_or_default();
        let worker = VsockWorker {
            memory,
            rx,
            tx,
            listener: Arc::clone(&self.listener),
            callers: true,
            dir: Arc::clone(&self.dir),
            muxer: Muxer::new(self.guest_cid, name.to_owned(), FIRST_CONNECTION),
            untold,
        };
        threads.start(worker).map_err(ActivateError::Worker)
    }

    /// A driver that comes anew knows no connection.
    fn reset(&mut self) {
        self.restored = false;
    }
}
