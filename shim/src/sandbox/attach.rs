//! How a container comes into a machine, and leaves it.
//!
//! What it needs on the host (its root file system and volumes in the share, its
//! scratch) is prepared on other threads, while the guest boots or goes on; then
//! the machine gets large enough and the disks are plugged in. All of it is taken
//! back when the container goes.

use std::{
    collections::BTreeMap,
    path::{Path, PathBuf},
    sync::{Arc, Mutex, PoisonError, atomic::Ordering},
};

use rvm_protocol::{
    agent::{Scratch, scratch::Backing},
    guest::SCRATCH_SERIAL,
};
use tokio::task::{JoinHandle, spawn_blocking};

use super::{Claim, Sandbox, SandboxError};
use crate::{
    config::{self, Config},
    rootfs::Layer,
    scratch::Preparation,
    share::{Share, ShareError},
    spec::{Bundle, HostDisk},
    timeline::Timeline,
};

/// What the containers of a sandbox share on the host.
pub(super) struct HostSide {
    /// The sandbox's directory.
    pub(super) dir: PathBuf,
    /// Gone once the sandbox is closed.
    share: Mutex<Option<Share>>,
}

impl HostSide {
    pub(super) fn new(dir: &Path, share: Share) -> Arc<Self> {
        Arc::new(Self { dir: dir.to_owned(), share: Mutex::new(Some(share)) })
    }

    /// Takes all mounts off. May take as long as a file system of the host does.
    pub(super) fn close(&self) {
        drop(self.share.lock().unwrap_or_else(PoisonError::into_inner).take());
    }

    fn add(&self, bundle: &Bundle, layers: &[Layer]) -> Result<(), ShareError> {
        match self.share.lock().unwrap_or_else(PoisonError::into_inner).as_mut() {
            Some(share) => share.add(bundle, layers),
            // Nobody waits for it any more.
            None => Ok(()),
        }
    }

    fn remove(&self, container: &str) {
        if let Some(share) = self.share.lock().unwrap_or_else(PoisonError::into_inner).as_mut() {
            share.remove(container);
        }
    }
}

/// A container's part of the host, being made. Dropping it takes it back.
pub struct Preparing {
    part: Part,
    mounts: Option<JoinHandle<Result<(), ShareError>>>,
    scratch: Option<Preparation>,
    tmpfs_bytes: u64,
    disks: Vec<HostDisk>,
    claim: Claim,
    writes: bool,
}

/// A container's directory in the share.
struct Part {
    host: Arc<HostSide>,
    container: String,
}

impl Drop for Part {
    fn drop(&mut self) {
        let (host, container) = (self.host.clone(), std::mem::take(&mut self.container));
        // Waits for what is being mounted there.
        spawn_blocking(move || host.remove(&container));
    }
}

impl Preparing {
    pub(super) fn begin(
        host: &Arc<HostSide>,
        config: &Config,
        bundle: &Bundle,
        layers: &[Layer],
        timeline: &Arc<Timeline>,
    ) -> Result<Self, SandboxError> {
        let container = bundle.container.container_id.clone();
        let (scratch, tmpfs_bytes) = match bundle.scratch(config.scratch) {
            // The agent makes none where all is written to the host.
            None => (None, 0),
            Some(config::Scratch::Tmpfs { size_bytes }) => (None, size_bytes),
            Some(config::Scratch::Block { size_bytes }) => {
                let noted = timeline.clone();
                let done = move || noted.mark("scratch ready");
                let scratch =
                    Preparation::start(size_bytes, &config.host.cache_dir, layers, &host.dir, done)?;
                (Some(scratch), 0)
            }
        };
        let mounts = spawn_blocking({
            let (host, bundle, layers) = (host.clone(), bundle.clone(), layers.to_vec());
            let timeline = timeline.clone();
            move || {
                host.add(&bundle, &layers)?;
                timeline.mark("rootfs mounted");
                Ok(())
            }
        });
        Ok(Self {
            part: Part { host: host.clone(), container },
            mounts: Some(mounts),
            tmpfs_bytes,
            disks: bundle.disks.clone(),
            claim: Claim::of(bundle),
            writes: scratch.is_some() || bundle.writes_to_host(),
            scratch,
        })
    }

    /// Waits until the mounts are there. It may be given up and called again.
    pub async fn mounted(&mut self) -> Result<(), SandboxError> {
        let Some(mounts) = &mut self.mounts else { return Ok(()) };
        let result = mounts.await;
        self.mounts = None;
        // A panic on that thread is a fault of ours; there is nothing mounted then.
        Ok(result.unwrap_or_else(|error| std::panic::resume_unwind(error.into_panic()))?)
    }
}

/// The disks in a machine, by serial; held while one comes or goes.
pub(super) type Disks = tokio::sync::Mutex<BTreeMap<String, Disk>>;

/// A disk in a machine.
#[derive(Debug)]
pub(super) struct Disk {
    readonly: bool,
    /// The containers that use it.
    users: usize,
}

/// A container's place in the machine, until [`Sandbox::detach`].
pub struct Attached {
    part: Part,
    serials: Vec<String>,
    scratch: Scratch,
}

impl Attached {
    /// Where the container's writes go, as the agent is told of it.
    pub fn scratch(&self) -> Scratch {
        self.scratch.clone()
    }
}

impl Sandbox {
    /// Begins with what a container needs on the host, for [`Sandbox::attach`].
    pub fn prepare(
        &self,
        config: &Config,
        bundle: &Bundle,
        layers: &[Layer],
        timeline: &Arc<Timeline>,
    ) -> Result<Preparing, SandboxError> {
        Preparing::begin(&self.host, config, bundle, layers, timeline)
    }

    /// Brings a container into the running machine. On an error nothing of it
    /// is left.
    pub async fn attach(&self, mut preparing: Preparing) -> Result<Attached, SandboxError> {
        preparing.mounted().await?;
        let Preparing { part, scratch, tmpfs_bytes, disks, claim, writes, .. } = preparing;
        if writes {
            self.must_flush.store(true, Ordering::Relaxed);
        }
        let mut attached = Attached { part, serials: Vec::new(), scratch: Scratch::default() };
        let admitted = async {
            self.admit(&attached.part.container, claim).await?;
            attached.scratch.backing = Some(match scratch {
                None => Backing::TmpfsBytes(tmpfs_bytes),
                Some(mut scratch) => {
                    let serial = SCRATCH_SERIAL.to_owned();
                    let path = scratch.finished().await?;
                    self.plug("scratch", &serial, &path, false).await?;
                    attached.serials.push(serial.clone());
                    Backing::BlockSerial(serial)
                }
            });
            for disk in disks {
                self.plug(&disk.field, &disk.serial(), &disk.path, disk.readonly).await?;
                attached.serials.push(disk.serial());
            }
            Ok(())
        };
        match admitted.await {
            Ok(()) => Ok(attached),
            Err(error) => {
                self.detach(attached).await;
                Err(error)
            }
        }
    }

    async fn plug(&self, field: &str, serial: &str, path: &Path, readonly: bool) -> Result<(), SandboxError> {
        let mut disks = self.disks.lock().await;
        if let Some(disk) = disks.get_mut(serial) {
            if disk.readonly && !readonly {
                return Err(SandboxError::ReadonlyDisk { field: field.to_owned() });
            }
            disk.users += 1;
            return Ok(());
        }
        let plugged = self.machine.add_disk(serial, path, readonly).await;
        plugged.map_err(|source| SandboxError::Disk { field: field.to_owned(), source })?;
        disks.insert(serial.to_owned(), Disk { readonly, users: 1 });
        Ok(())
    }

    /// Takes a container that is gone from the guest out of the machine, while
    /// the others run.
    pub async fn detach(&self, attached: Attached) {
        drop(attached);
    }
}
