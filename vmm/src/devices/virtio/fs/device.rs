//! The file system device as the transport sees it.

use std::fs::{File, OpenOptions};
use std::iter;
use std::os::unix::fs::OpenOptionsExt;
use std::sync::{Arc, Mutex};

use rvm_protocol::vmm::{CachePolicy, ShareConfig};
use virtio_bindings::virtio_ring::{VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC};

use super::meter::FsMeter;
use super::passthrough::Policy;
use super::worker::{FsWorker, Share};
use super::{DEVICE_TYPE, FsError, HIPRIO_QUEUE_SIZE, MAX_REQUEST_QUEUES, QUEUE_SIZE, TAG_BYTES};
use crate::devices::virtio::ring::Ring;
use crate::devices::virtio::{ActivateError, Activation, VirtioDevice, read_config_bytes};
use crate::jail::Duty;

/// Threads beyond one for each queue, for a share of volumes: so many requests the host may keep
/// for as long as it likes without those to other volumes waiting for them.
const SPARE_THREADS: usize = 2;

/// A share.
#[derive(Debug)]
pub struct Fs {
    tag: [u8; TAG_BYTES],
    root: File,
    /// The high-priority queue and the request queues.
    queue_sizes: Vec<u16>,
    policy: Policy,
    meter: FsMeter,
}

impl Fs {
    /// Opens the directory; the device has one request queue and is not active.
    pub fn new(config: &ShareConfig) -> Result<Self, FsError> {
        let mut tag = [0; TAG_BYTES];
        let name = config.tag.as_bytes();
        match tag.get_mut(..name.len()) {
            Some(place) if !name.is_empty() && !name.contains(&0) => place.copy_from_slice(name),
            _ => return Err(FsError::Tag(config.tag.clone())),
        }
        let root = OpenOptions::new()
            .read(true)
            .custom_flags(libc::O_PATH | libc::O_DIRECTORY)
            .open(&config.dir)
            .map_err(|source| FsError::Open { path: config.dir.clone(), source })?;
        let policy = Policy::new(config.readonly, config.cache == CachePolicy::Always)
            .map_err(|source| FsError::Serve { path: config.dir.clone(), source })?;
        let meter = FsMeter::new(&config.tag);
        Ok(Self { tag, root, queue_sizes: queue_sizes(1), policy, meter })
    }

    /// The same, and what is asked of it is written to `file` ([`super::trace`]).
    #[cfg(any(test, feature = "record"))]
    pub fn recorded(self, file: File) -> std::io::Result<Self> {
        self.meter.set_recorder(super::record::Recorder::new(file, self.policy)?);
        Ok(self)
    }

    pub(super) fn tag(&self) -> &str {
        let len = self.tag.iter().position(|byte| *byte == 0).unwrap_or(TAG_BYTES);
        self.tag.get(..len).and_then(|tag| std::str::from_utf8(tag).ok()).unwrap_or("")
    }

    /// What it has done, for those who look.
    pub fn meter(&self) -> FsMeter {
        self.meter.clone()
    }

    pub(super) fn request_queues(&self) -> u16 {
        self.queue_sizes.len() as u16 - 1
    }

    /// The same with `count` request queues (1 to [`MAX_REQUEST_QUEUES`]), and a
    /// thread for each: one per vCPU lets them wait for the host's disk
    /// independently.
    pub fn with_request_queues(mut self, count: u16) -> Self {
        self.queue_sizes = queue_sizes(count.clamp(1, MAX_REQUEST_QUEUES));
        self
    }
}

/// Of the high-priority queue and so many for requests.
fn queue_sizes(requests: u16) -> Vec<u16> {
    iter::once(HIPRIO_QUEUE_SIZE).chain(iter::repeat_n(QUEUE_SIZE, usize::from(requests))).collect()
}

impl VirtioDevice for Fs {
    fn device_type(&self) -> u32 {
        DEVICE_TYPE
    }

    fn name(&self) -> &str {
        "fs"
    }

    fn queue_sizes(&self) -> &[u16] {
        &self.queue_sizes
    }

    fn features(&self) -> u64 {
        1 << VIRTIO_RING_F_EVENT_IDX | 1 << VIRTIO_RING_F_INDIRECT_DESC
    }

    /// `struct virtio_fs_config`: the tag and the number of request queues.
    fn read_config(&self, offset: u64, data: &mut [u8]) {
        let mut config = self.tag.to_vec();
        config.extend((self.queue_sizes.len() as u32 - 1).to_le_bytes());
        read_config_bytes(&config, offset, data);
    }

    fn threads(&self) -> usize {
        let spare = if self.policy.readonly && self.policy.constant { 0 } else { SPARE_THREADS };
        self.queue_sizes.len() + spare
    }

    fn duty(&self) -> Duty {
        Duty::Files
    }

    fn activate(&mut self, activation: Activation) -> Result<(), ActivateError> {
        let Activation { memory, queues, features, threads, .. } = activation;
        let mut rings = Vec::with_capacity(queues.len());
        for (index, queue) in queues.into_iter().enumerate() {
            match queue {
                Some(queue) => rings.push(Arc::new(Mutex::new(Ring::new(queue, features)))),
                // A driver needs the high-priority queue and one for requests.
                None if index < 2 => return Err(ActivateError::MissingQueue(index)),
                None => {}
            }
        }
        let root = self.root.try_clone().map_err(ActivateError::Worker)?;
        let share = Arc::new(Share::new(root.into(), self.policy, self.meter.clone()));
        let start = |rings: &[Arc<Mutex<Ring>>], hiprio: Option<&Arc<Mutex<Ring>>>| {
            let (memory, rings, hiprio) = (memory.clone(), rings.to_vec(), hiprio.cloned());
            let worker = FsWorker { memory, rings, hiprio, share: Arc::clone(&share) };
            threads.start(worker).map_err(ActivateError::Worker)
        };
        let (hiprio, requests) = rings.split_at(1);
        start(hiprio, None)?;
        for _ in 1..self.threads() {
            start(requests, hiprio.first())?;
        }
        Ok(())
    }
}
