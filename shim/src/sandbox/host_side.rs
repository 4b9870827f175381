//! What the containers of a sandbox have in common on the host.

use std::{
    cmp::Reverse,
    collections::{BTreeMap, BTreeSet},
    ffi::CString,
    io,
    os::fd::AsFd,
    path::{Path, PathBuf},
    sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError, Weak},
    time::Duration,
};

use super::network::Network;
use crate::{
    config::Images,
    holder::{Holder, Starting},
    image::{self, Found, Image, Origin},
    rootfs::{Layer, RootfsError},
    share::{Added, Share, ShareError},
    spec::Bundle,
};

/// How long a sandbox that is being closed waits for mounts that are being made.
const MOUNT_LIMIT: Duration = Duration::from_secs(5);
/// Files of images that are devices of a machine at a time.
const MAX_IMAGES: usize = 8;

/// What the containers of a sandbox share on the host.
pub(super) struct HostSide {
    /// The sandbox's directory.
    pub(super) dir: PathBuf,
    share: Mutex<Sharing>,
    /// Signalled when a container has been added to the share or taken out, or could not be.
    done: Condvar,
    /// Of its cgroup.
    procs: Vec<CString>,
    network: Arc<Network>,
    holders: Mutex<Vec<Weak<Holder>>>,
}

/// The share, and who is just being added to it or taken out: a mount may take as long as a
/// file system of the host does, and holds up its own container alone.
#[derive(Default)]
struct Sharing {
    /// Gone once the sandbox is closed.
    share: Option<Arc<Share>>,
    moving: BTreeSet<String>,
    /// The devices each container has of images, by their serials.
    images: BTreeMap<String, BTreeSet<String>>,
}

impl HostSide {
    pub(super) fn new(
        dir: &Path,
        share: Arc<Share>,
        procs: Vec<CString>,
        network: Arc<Network>,
    ) -> Arc<Self> {
        Arc::new(Self {
            dir: dir.to_owned(),
            share: Mutex::new(Sharing { share: Some(share), ..Sharing::default() }),
            done: Condvar::new(),
            procs,
            network,
            holders: Mutex::default(),
        })
    }

    /// The sandbox's network.
    pub(super) fn network(&self) -> &Arc<Network> {
        &self.network
    }

    /// Ends the containers' processes on the host, gives the interfaces back and takes
    /// all mounts off. One that is still being made where the host's file system does not
    /// answer goes by itself later.
    pub(super) fn close(&self) {
        self.network.close();
        for holder in self.holders().drain(..).filter_map(|holder| holder.upgrade()) {
            holder.end();
        }
        let is_moving = |sharing: &mut Sharing| !sharing.moving.is_empty();
        let waited = self.done.wait_timeout_while(self.sharing(), MOUNT_LIMIT, is_moving);
        let (mut sharing, waited) = waited.unwrap_or_else(PoisonError::into_inner);
        let share = sharing.share.take();
        drop(sharing);
        if waited.timed_out() {
            log::error!("a mount of the host's is not made or taken off within {} s", MOUNT_LIMIT.as_secs());
        }
        drop(share);
    }

    fn sharing(&self) -> MutexGuard<'_, Sharing> {
        self.share.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Known from its first moment: the cgroup it is in cannot be removed before it has ended.
    pub(super) fn hold(&self) -> io::Result<Starting> {
        let starting = Holder::start(self.network.namespace().as_fd(), &self.procs)?;
        let mut holders = self.holders();
        holders.retain(|holder| holder.strong_count() > 0);
        holders.push(Arc::downgrade(starting.holder()));
        Ok(starting)
    }

    fn holders(&self) -> MutexGuard<'_, Vec<Weak<Holder>>> {
        self.holders.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Says that a container's image is being looked for and its mounts are being made: who takes it out waits for that.
    pub(super) fn moving(self: &Arc<Self>, container: &str) -> Moving {
        self.moving_in(self.sharing(), container)
    }

    fn moving_in(self: &Arc<Self>, mut sharing: MutexGuard<'_, Sharing>, container: &str) -> Moving {
        sharing.moving.insert(container.to_owned());
        Moving { host: self.clone(), container: container.to_owned() }
    }

    /// Makes a container's mounts.
    pub(super) fn add(
        &self,
        _: &Moving,
        bundle: &Bundle,
        layers: &[Layer],
        images: Option<&[Image]>,
    ) -> Result<Added, ShareError> {
        // Without it nobody waits for them any more.
        let share = self.sharing().share.clone();
        share.map_or_else(|| Ok(Added::default()), |share| share.add(bundle, layers, images))
    }

    /// Looks for images in place of `layers`. A machine has slots for some twenty disks, and
    /// containers need theirs for their scratches: beyond a few images the others' layers are shared, and of
    /// layers that are files the smaller ones.
    pub(super) fn image(
        &self,
        _: &Moving,
        (configured, cache_dir): (Images, &Path),
        bundle: &Bundle,
        layers: &[Layer],
    ) -> Result<Found, RootfsError> {
        if bundle.container.rootfs.on_volumes {
            return Ok(Found::Never);
        }
        let mut found = image::find(layers, configured, cache_dir)?;
        if let Found::Ready(images) = &mut found {
            let mut sharing = self.sharing();
            let mut taken: BTreeSet<String> = sharing.images.values().flatten().cloned().collect();
            let mut own = BTreeSet::new();
            let mut largest_first: Vec<&mut Image> = images.iter_mut().collect();
            largest_first.sort_by_key(|image| Reverse(image.bytes()));
            for image in largest_first {
                let serials: BTreeSet<String> = image.blobs.iter().map(|blob| blob.serial.clone()).collect();
                if taken.union(&serials).count() <= MAX_IMAGES {
                    taken.extend(serials.iter().cloned());
                    own.extend(serials);
                } else if image.origin == Origin::Maker {
                    return Ok(Found::Never);
                } else {
                    image.shared = true;
                }
            }
            sharing.images.insert(bundle.container.container_id.clone(), own);
        }
        Ok(found)
    }

    /// Takes a container out of the share, after what is being mounted for it.
    pub(super) fn remove(self: &Arc<Self>, container: &str) {
        let is_moving = |sharing: &mut Sharing| sharing.moving.contains(container);
        let sharing = self.done.wait_while(self.sharing(), is_moving);
        let mut sharing = sharing.unwrap_or_else(PoisonError::into_inner);
        sharing.images.remove(container);
        let Some(share) = sharing.share.clone() else { return };
        let _moving = self.moving_in(sharing, container);
        // Its mounts and directory go with the last who has it, before [`HostSide::close`] goes on.
        share.remove(container);
        drop(share);
    }
}

/// A container that is being added to the share or taken out, until this is dropped.
pub(super) struct Moving {
    host: Arc<HostSide>,
    container: String,
}

impl Drop for Moving {
    fn drop(&mut self) {
        self.host.sharing().moving.remove(&self.container);
        self.host.done.notify_all();
    }
}
