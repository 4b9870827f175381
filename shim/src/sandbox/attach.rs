//! How a container comes into a machine, and leaves it.
//!
//! What it needs on the host (its root file system and volumes in the share, its
//! scratch) is prepared on other threads, while the guest boots or goes on; then
//! the machine gets large enough and the disks are plugged in. All of it is taken
//! back when the container goes.

use std::{
    collections::BTreeMap,
    path::Path,
    sync::{Arc, Weak, atomic::Ordering},
    time::Duration,
};

use rvm_protocol::agent::{self, CreateContainerRequest, Scratch, blob::Place, scratch::Backing};
use tokio::{
    sync::oneshot,
    task::{JoinHandle, spawn_blocking},
    time::timeout,
};

use super::{Claim, Sandbox, SandboxError, host_side::HostSide, machine::Boot};
use crate::{
    agent::process_ref,
    config::Config,
    holder::{Holder, Starting},
    image::{self, Blob, Found, Image, Origin, Verity},
    rootfs::{self, Layer, RootfsError},
    scratch::{Preparation, Wanted},
    share::{Added, ShareError},
    spec::{Bundle, HostDisk},
    timeline::Timeline,
    vmm::MonitorError,
};

/// How long the end of a container that was given up may take.
const WITHDRAW_LIMIT: Duration = Duration::from_secs(10);

/// What an error of a scratch's disk is about.
const SCRATCH_FIELD: &str = "scratch";
/// What one of an image's is about.
const IMAGE_FIELD: &str = "image";

/// The serial of a sandbox's scratch. No other disk has it: at most the 20 bytes of a
/// virtio-blk serial.
fn scratch_serial(number: u32) -> String {
    format!("scratch-{number}")
}

/// A container's part of the host, being made. Dropping it takes it back.
pub struct Preparing {
    part: Part,
    holder: Starting,
    mounts: Option<JoinHandle<Result<Added, ShareError>>>,
    added: Added,
    /// What there is in place of the layers; told before the mounts are made.
    looking: Option<oneshot::Receiver<Found>>,
    image: Found,
    /// What its files are to the machine that boots, once they are plugged in, by their serials.
    plugged_in: BTreeMap<String, PluggedIn>,
    scratch: Option<ScratchDisk>,
    tmpfs_bytes: u64,
    disks: Vec<HostDisk>,
    claim: Claim,
    writes: bool,
}

/// A scratch that is a disk.
enum ScratchDisk {
    /// On its way.
    Preparing(Preparation),
    /// The first one, plugged in while the guest booted.
    PluggedIn,
}

/// A container's directory in the share.
struct Part {
    host: Arc<HostSide>,
    container: String,
}

impl Part {
    /// Takes its mounts off, after what is being mounted there.
    fn remove(&mut self) -> JoinHandle<()> {
        let (host, container) = (self.host.clone(), std::mem::take(&mut self.container));
        spawn_blocking(move || host.remove(&container))
    }
}

impl Drop for Part {
    fn drop(&mut self) {
        if !self.container.is_empty() {
            self.remove();
        }
    }
}

impl Preparing {
    /// Has to be called on the process's main thread.
    pub(super) fn begin(
        host: &Arc<HostSide>,
        config: &Config,
        bundle: &Bundle,
        layers: &[Layer],
        timeline: &Arc<Timeline>,
    ) -> Result<Self, SandboxError> {
        let holder = host.hold().map_err(SandboxError::Holder)?;
        let part = Part { host: host.clone(), container: bundle.container.container_id.clone() };
        let (scratch, tmpfs_bytes) = match bundle.scratch(config.scratch, rootfs::disk(layers)) {
            // The agent makes none where all is written to the host.
            None => (None, 0),
            Some(Wanted::Tmpfs { size_bytes }) => (None, size_bytes),
            Some(Wanted::Disk(disk)) => {
                let noted = timeline.clone();
                let done = move || noted.mark("scratch ready");
                let preparation = Preparation::of_disk(disk, &config.host.cache_dir, done)?;
                (Some(ScratchDisk::Preparing(preparation)), 0)
            }
            Some(Wanted::Block { size_bytes }) => {
                let noted = timeline.clone();
                let done = move || noted.mark("scratch ready");
                let cache_dir = &config.host.cache_dir;
                let preparation = Preparation::start(
                    size_bytes,
                    cache_dir,
                    (layers, bundle.is_kubernetes()),
                    &host.dir,
                    done,
                )?;
                (Some(ScratchDisk::Preparing(preparation)), 0)
            }
        };
        let (tell, looking) = oneshot::channel();
        // From now on: who gives up meanwhile takes out what is put in.
        let moving = host.moving(&part.container);
        let mounts = spawn_blocking({
            let (host, bundle, layers) = (host.clone(), bundle.clone(), layers.to_vec());
            let timeline = timeline.clone();
            let (images, cache_dir) = (config.images, config.host.cache_dir.clone());
            move || {
                let found = host.image(&moving, (images, &cache_dir), &bundle, &layers)?;
                let images = match &found {
                    Found::Ready(images) => Some(images.clone()),
                    Found::Missing(_) | Found::Never => None,
                };
                // Nobody waits for it any more.
                let _ = tell.send(found);
                let added = host.add(&moving, &bundle, &layers, images.as_deref())?;
                timeline.mark("rootfs mounted");
                Ok(added)
            }
        });
        Ok(Self {
            part,
            holder,
            mounts: Some(mounts),
            added: Added::default(),
            looking: Some(looking),
            image: Found::Never,
            plugged_in: BTreeMap::new(),
            tmpfs_bytes,
            disks: bundle.disks.clone(),
            claim: Claim::of(bundle),
            writes: scratch.is_some() || bundle.writes_to_host(),
            scratch,
        })
    }

    /// Waits until the mounts are there, and images and scratch are in the machine that boots.
    pub(super) async fn made(&mut self, boot: &Boot) -> Result<(), SandboxError> {
        self.look().await;
        for blob in plugged(&self.image) {
            // Several of its file systems may name one device.
            if self.plugged_in.contains_key(&blob.serial) {
                continue;
            }
            // A machine without room among its addresses has it as a disk.
            let memory = match blob.as_memory {
                true => boot.add_pmem(&blob.path).await.ok(),
                false => None,
            };
            let plugged_in = match memory {
                Some(slot) => PluggedIn::Memory(slot),
                None => {
                    let added = boot.add_disk(&blob.serial, &blob.path, true).await;
                    added.map_err(|source| SandboxError::Disk { field: IMAGE_FIELD.to_owned(), source })?;
                    PluggedIn::Disk
                }
            };
            self.plugged_in.insert(blob.serial.clone(), plugged_in);
        }
        if let Some(ScratchDisk::Preparing(preparation)) = &mut self.scratch {
            let path = preparation.finished().await?;
            let added = boot.add_disk(&scratch_serial(0), &path, false).await;
            added.map_err(|source| SandboxError::Disk { field: SCRATCH_FIELD.to_owned(), source })?;
            self.scratch = Some(ScratchDisk::PluggedIn);
        }
        self.mounted().await
    }

    /// Waits until it is known whether there is an image.
    async fn look(&mut self) {
        let Some(looking) = &mut self.looking else { return };
        let found = looking.await;
        self.looking = None;
        self.image = found.unwrap_or_default();
    }

    /// Waits until the mounts are there. It may be given up and called again.
    pub async fn mounted(&mut self) -> Result<(), SandboxError> {
        self.look().await;
        let Some(mounts) = &mut self.mounts else { return Ok(()) };
        let result = mounts.await;
        self.mounts = None;
        // A panic on that thread is a fault of ours.
        self.added = result.unwrap_or_else(|error| std::panic::resume_unwind(error.into_panic()))?;
        Ok(())
    }
}

/// The files that are devices of a machine.
fn plugged(found: &Found) -> impl Iterator<Item = &Blob> {
    let images = match found {
        Found::Ready(images) => images.as_slice(),
        Found::Missing(_) | Found::Never => &[],
    };
    images.iter().filter(|image| !image.shared).flat_map(|image| &image.blobs)
}

/// The disks in a machine, by serial; held while one comes or goes.
pub(super) type Disks = tokio::sync::Mutex<BTreeMap<String, Disk>>;

/// A disk in a machine.
#[derive(Debug)]
pub(super) struct Disk {
    readonly: bool,
    /// The containers that use it.
    users: usize,
    plugged_in: PluggedIn,
}

/// What a file is to a machine.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum PluggedIn {
    /// A disk (virtio-blk).
    Disk,
    /// Memory it can read (virtio-pmem), in this slot.
    Memory(u8),
}

impl PluggedIn {
    fn slot(self) -> Option<u32> {
        match self {
            Self::Disk => None,
            Self::Memory(slot) => Some(slot.into()),
        }
    }
}

/// A container's place in the machine, until [`Sandbox::detach`]. Dropping it, as
/// a creation that is given up does, ends the container and takes it out.
pub struct Attached {
    sandbox: Weak<Sandbox>,
    part: Part,
    holder: Arc<Holder>,
    serials: Vec<String>,
    scratch: Scratch,
    added: Added,
    image: Found,
    /// What its files are to the guest, by their serials.
    plugged_in: BTreeMap<String, PluggedIn>,
    left: bool,
}

impl Drop for Attached {
    fn drop(&mut self) {
        let Some(sandbox) = self.sandbox.upgrade().filter(|_| !self.left) else { return };
        // The machine goes with the first one.
        if sandbox.is_closed() || sandbox.is_first(&self.part.container) {
            return;
        }
        let container = std::mem::take(&mut self.part.container);
        let attached = Self {
            sandbox: self.sandbox.clone(),
            part: Part { host: self.part.host.clone(), container },
            holder: self.holder.clone(),
            serials: std::mem::take(&mut self.serials),
            scratch: Scratch::default(),
            added: Added::default(),
            image: Found::Never,
            plugged_in: BTreeMap::new(),
            left: true,
        };
        tokio::spawn(async move { sandbox.withdraw(attached).await });
    }
}

impl Attached {
    /// Says in `request` where the container's writes go, and where its image and its volumes are.
    pub fn settle(&self, request: &mut CreateContainerRequest) {
        if let Found::Ready(images) = &self.image {
            let rootfs = request.rootfs.mut_or_insert_default();
            rootfs.images = images.iter().map(|image| self.message(image)).collect();
        }
        request.scratch = Some(self.scratch.clone()).into();
        for (mount, source) in &self.added.sources {
            if let Some(mount) = request.mounts.get_mut(*mount) {
                mount.source.clone_from(source);
            }
        }
    }

    /// Where the guest finds an image.
    fn message(&self, image: &Image) -> agent::Image {
        let place = |blob: &Blob| match self.plugged_in.get(&blob.serial) {
            _ if image.shared => {
                Place::Volume(self.added.files.get(&blob.serial).cloned().unwrap_or_default())
            }
            Some(PluggedIn::Memory(slot)) => Place::PmemSlot((*slot).into()),
            Some(PluggedIn::Disk) | None => Place::DiskSerial(blob.serial.clone()),
        };
        let blob = |blob: &Blob| agent::Blob { place: Some(place(blob)), ..Default::default() };
        agent::Image {
            name: image.name().to_owned(),
            blobs: image.blobs.iter().map(blob).collect(),
            verity: image.verity.as_ref().map(Verity::message).into(),
            ..Default::default()
        }
    }

    /// Has an image made for those that come after it, where there is none.
    pub fn was_used(&mut self) {
        if let Found::Missing(place) = std::mem::take(&mut self.image) {
            place.make_in_background();
        }
    }

    /// The guest cannot mount an image. Nobody is to have one that was made here any more, if it is broken; of one that is a
    /// client's, returns which it was.
    pub async fn refused_image(&self, reason: &str) -> Option<RootfsError> {
        let Found::Ready(images) = &self.image else { return None };
        for image in images {
            match (&image.origin, image.blobs.first()) {
                (Origin::Maker, Some(blob)) => {
                    let (path, reason) = (blob.path.clone(), reason.to_owned());
                    // A panic on that thread is a fault of ours, and has been told.
                    let _ = spawn_blocking(move || image::refuse(&path, &reason)).await;
                }
                (Origin::Mount(index), Some(blob)) if reason.contains(image.name()) => {
                    let problem = format!("{}: {reason}", blob.path.display());
                    return Some(RootfsError::Layer { index: *index, field: "source", problem });
                }
                _ => {}
            }
        }
        None
    }

    /// The process on the host that stands for the container.
    pub fn holder(&self) -> &Arc<Holder> {
        &self.holder
    }
}

impl Sandbox {
    /// Begins with what a container needs on the host, for [`Sandbox::attach`].
    /// Has to be called on the process's main thread.
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
    pub async fn attach(self: &Arc<Self>, mut preparing: Preparing) -> Result<Attached, SandboxError> {
        preparing.mounted().await?;
        let Preparing {
            part,
            holder,
            added,
            scratch,
            tmpfs_bytes,
            disks,
            claim,
            writes,
            image,
            plugged_in: already,
            ..
        } = preparing;
        let holder = holder.ready().await.map_err(SandboxError::Holder)?;
        if writes {
            self.must_flush.store(true, Ordering::Relaxed);
        }
        let mut attached = Attached {
            sandbox: Arc::downgrade(self),
            part,
            holder,
            serials: Vec::new(),
            scratch: Scratch::default(),
            added,
            image: image.clone(),
            plugged_in: BTreeMap::new(),
            left: false,
        };
        let admitted = async {
            self.admit(&attached.part.container, claim).await?;
            for blob in plugged(&image) {
                let plugged_in = self.plug_image(blob, already.get(&blob.serial).copied()).await?;
                attached.plugged_in.insert(blob.serial.clone(), plugged_in);
                attached.serials.push(blob.serial.clone());
            }
            attached.scratch.backing = Some(match scratch {
                None => Backing::TmpfsBytes(tmpfs_bytes),
                Some(scratch) => {
                    let serial = scratch_serial(self.scratches.fetch_add(1, Ordering::Relaxed));
                    match scratch {
                        ScratchDisk::Preparing(mut preparation) => {
                            let path = preparation.finished().await?;
                            self.plug(SCRATCH_FIELD, &serial, &path, false).await?;
                        }
                        ScratchDisk::PluggedIn => {
                            let disk = Disk { readonly: false, users: 1, plugged_in: PluggedIn::Disk };
                            self.disks.lock().await.insert(serial.clone(), disk);
                        }
                    }
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

    /// Plugs a file of an image in that may have been in the machine since it booted (`already`), as
    /// memory where it is to be that and the guest can have it.
    async fn plug_image(&self, image: &Blob, already: Option<PluggedIn>) -> Result<PluggedIn, SandboxError> {
        let mut disks = self.disks.lock().await;
        if let Some(disk) = disks.get_mut(&image.serial) {
            disk.users += 1;
            return Ok(disk.plugged_in);
        }
        let failed = |source| SandboxError::Disk { field: IMAGE_FIELD.to_owned(), source };
        let already = match already {
            Some(PluggedIn::Memory(slot)) if !self.machine.has_pmem() => {
                self.machine.remove_pmem(slot).await.map_err(failed)?;
                None
            }
            already => already,
        };
        let plugged_in = match already {
            Some(plugged_in) => plugged_in,
            None => self.plug_file(image).await.map_err(failed)?,
        };
        disks.insert(image.serial.clone(), Disk { readonly: true, users: 1, plugged_in });
        Ok(plugged_in)
    }

    async fn plug_file(&self, image: &Blob) -> Result<PluggedIn, MonitorError> {
        if image.as_memory && self.machine.has_pmem()
            // A machine without room among its addresses has it as a disk.
            && let Ok(slot) = self.machine.add_pmem(&image.path).await
        {
            return Ok(PluggedIn::Memory(slot));
        }
        self.machine.add_disk(&image.serial, &image.path, true).await?;
        Ok(PluggedIn::Disk)
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
        disks.insert(serial.to_owned(), Disk { readonly, users: 1, plugged_in: PluggedIn::Disk });
        Ok(())
    }

    /// Takes a container that is gone from the guest out of the machine, while
    /// the others run.
    pub async fn detach(self: &Arc<Self>, mut attached: Attached) {
        attached.left = true;
        attached.holder.end();
        if self.is_closed() {
            return;
        }
        self.unplug(&attached.serials).await;
        self.release(&attached.part.container);
        if let Some(owned) = self.owned().as_mut() {
            owned.record.remove_member(&attached.part.container);
        }
        // It logs for itself what it cannot take off.
        let _ = attached.part.remove().await;
    }

    /// Ends a container that may or may not be in the guest, and takes it out.
    async fn withdraw(self: Arc<Self>, attached: Attached) {
        let init = process_ref(&attached.part.container, "");
        if self.agent().signal(init.clone(), libc::SIGKILL as u32, true).await.is_ok() {
            let _ = timeout(WITHDRAW_LIMIT, self.agent().wait(&init)).await;
        }
        if let Err(error) = self.agent().delete(&init).await
            && !error.is_not_found()
        {
            log::warn!("{}: its deletion in the guest: {error}", attached.part.container);
        }
        self.detach(attached).await;
    }

    /// Takes out the disks nobody uses any more.
    async fn unplug(&self, serials: &[String]) {
        let mut disks = self.disks.lock().await;
        let mut unused = BTreeMap::new();
        for serial in serials {
            let Some(disk) = disks.get_mut(serial) else { continue };
            disk.users -= 1;
            if disk.users == 0
                && let Some(disk) = disks.remove(serial)
            {
                unused.insert(serial.clone(), disk.plugged_in);
            }
        }
        if unused.is_empty() {
            return;
        }
        let slots = unused.values().filter_map(|plugged_in| plugged_in.slot()).collect();
        let is_disk = |(serial, plugged_in): (&String, &PluggedIn)| {
            (*plugged_in == PluggedIn::Disk).then(|| serial.clone())
        };
        let removed = self.agent().remove_disks(unused.iter().filter_map(is_disk).collect(), slots);
        if let Err(error) = removed.await {
            let serials: Vec<_> = unused.keys().map(String::as_str).collect();
            log::warn!("the guest does not let go of {}: {error}", serials.join(", "));
        }
        for (serial, plugged_in) in unused {
            let removed = match plugged_in {
                PluggedIn::Disk => self.machine.remove_disk(&serial).await,
                PluggedIn::Memory(slot) => self.machine.remove_pmem(slot).await,
            };
            if let Err(error) = removed {
                log::warn!("{serial} stays plugged in: {error}");
            }
        }
    }
}
