//! The volumes of a sandbox. What several containers bind of the host alike is one tree in the share, and one file system
//! in the guest: sockets, locks, shared mappings and what was just written are there for all of them, as they would be
//! under one kernel with everybody.

use std::{
    collections::BTreeSet,
    fs, io,
    os::{
        fd::{AsFd, BorrowedFd},
        unix::fs::FileTypeExt,
    },
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use nix::sys::{
    statfs::{HUGETLBFS_MAGIC, statfs},
    statvfs::{FsFlags, statvfs},
};
use rvm_protocol::agent::Submount;

use super::{ShareError, Skeleton};
use crate::{
    mount::{self, Identity},
    spec::Volume,
    user_namespace::{IdMap, user_namespace},
};

/// The trees of volumes, in a skeleton of theirs.
#[derive(Debug)]
pub(super) struct Volumes {
    skeleton: Skeleton,
    trees: Mutex<Trees>,
}

#[derive(Debug, Default)]
struct Trees {
    /// How many there have ever been: no name is used twice.
    made: u64,
    all: Vec<Tree>,
}

#[derive(Debug)]
struct Tree {
    /// No container can be called that ([`crate::name`]).
    name: String,
    what: Option<What>,
    state: Arc<Mutex<State>>,
    users: BTreeSet<String>,
}

/// What makes two volumes the same.
#[derive(Debug, PartialEq)]
struct What {
    source: Identity,
    submounts: Vec<Submount>,
    recursive: bool,
    follows_host: bool,
    idmap: Option<(IdMap, bool)>,
}

impl What {
    /// None where nobody else could have the same: what is read-only below its
    /// own mount could not become writable again for another.
    fn of(volume: &Volume) -> io::Result<Option<Self>> {
        if volume.readonly_below {
            return Ok(None);
        }
        Ok(Some(Self {
            source: Identity::of(&volume.source)?,
            submounts: volume.submounts.clone(),
            recursive: volume.recursive,
            follows_host: volume.follows_host,
            idmap: volume.idmap.clone(),
        }))
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    Missing,
    Readonly,
    Writable,
}

impl Volumes {
    pub(super) fn new(skeleton: Skeleton) -> Self {
        Self { skeleton, trees: Mutex::default() }
    }

    /// The mount points.
    pub(super) fn skeleton(&self) -> &Skeleton {
        &self.skeleton
    }

    /// Makes a volume of a container, and returns its path: that of one that is
    /// there already where it is the same. Owners are mapped as in the user namespace `users`. It can be written to as soon as one of
    /// its containers may do so.
    pub(super) fn add(
        &self,
        container: &str,
        volume: &Volume,
        users: Option<BorrowedFd>,
    ) -> Result<String, ShareError> {
        let failed =
            |source| ShareError::Volume { field: volume.field.clone(), path: volume.source.clone(), source };
        let kind = fs::metadata(&volume.source).map_err(failed)?.file_type();
        let huge = || statfs(&volume.source).is_ok_and(|found| found.filesystem_type() == HUGETLBFS_MAGIC);
        if let Some(problem) = useless(kind).or_else(|| huge().then_some(HUGE_PAGES)) {
            return Err(ShareError::Useless {
                field: volume.field.clone(),
                path: volume.source.clone(),
                problem,
            });
        }
        let (name, state) = self.tree(container, What::of(volume).map_err(failed)?);
        // In a directory that is a mount, a file too has a device number of its own in the guest.
        let path = if kind.is_dir() { name.clone() } else { format!("{name}/file") };
        // A mount may take as long as the host's file system does, for all that want this one.
        let mut state = state.lock().unwrap_or_else(PoisonError::into_inner);
        match *state {
            State::Missing => {
                let made = self.make(&name, &path, kind.is_dir(), (volume, users));
                made.inspect_err(|_| self.skeleton.remove(&name))?;
                *state = if volume.readonly { State::Readonly } else { State::Writable };
            }
            State::Readonly if !volume.readonly => {
                let flags = statvfs(&volume.source).map_err(|errno| failed(errno.into()))?.flags();
                // What is read-only on the host stays so.
                if !flags.contains(FsFlags::ST_RDONLY) {
                    self.skeleton.make_writable(&path).map_err(failed)?;
                }
                *state = State::Writable;
            }
            State::Readonly | State::Writable => {}
        }
        Ok(path)
    }

    /// Name and state of the tree for `what`, of which the container is a user from now on.
    fn tree(&self, container: &str, what: Option<What>) -> (String, Arc<Mutex<State>>) {
        let mut trees = self.trees();
        let same = |tree: &&mut Tree| what.is_some() && tree.what == what;
        if let Some(tree) = trees.all.iter_mut().find(same) {
            tree.users.insert(container.to_owned());
            return (tree.name.clone(), tree.state.clone());
        }
        let name = format!("_{}", trees.made);
        trees.made += 1;
        let state = Arc::new(Mutex::new(State::Missing));
        let users = BTreeSet::from([container.to_owned()]);
        trees.all.push(Tree { name: name.clone(), what, state: state.clone(), users });
        (name, state)
    }

    fn make(
        &self,
        name: &str,
        path: &str,
        is_dir: bool,
        (volume, users): (&Volume, Option<BorrowedFd>),
    ) -> Result<(), ShareError> {
        let target = if is_dir {
            self.skeleton.make_dir(name)?
        } else {
            self.skeleton.make_mount(name)?;
            self.skeleton.make_file(path)?
        };
        let mounted = || {
            let tree = mount::Tree::of(&volume.source, volume.recursive)?;
            match (&volume.idmap, users) {
                (Some((map, all)), _) => tree.map_ids(user_namespace(map)?.as_fd(), *all)?,
                (None, Some(users)) => tree.map_ids(users, volume.recursive)?,
                (None, None) => {}
            }
            if !volume.follows_host {
                tree.seal(volume.recursive)?;
            }
            if volume.readonly {
                tree.make_readonly(volume.recursive && volume.readonly_below)?;
            }
            Ok(tree)
        };
        let tree = mounted().map_err(|source| ShareError::Volume {
            field: volume.field.clone(),
            path: volume.source.clone(),
            source,
        })?;
        self.skeleton.attach(&[tree], &target)
    }

    /// Takes off what no other container than this one uses, and its root.
    pub(super) fn remove(&self, container: &str) {
        let mut unused = Vec::new();
        self.trees().all.retain_mut(|tree| {
            if tree.users.remove(container) && tree.users.is_empty() {
                unused.push(std::mem::take(&mut tree.name));
            }
            !tree.users.is_empty()
        });
        for name in &unused {
            self.skeleton.remove(name);
        }
        self.skeleton.remove(container);
    }

    fn trees(&self) -> MutexGuard<'_, Trees> {
        self.trees.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Why no guest could use a hugetlbfs that is not in the place of one of its own (`spec::memory_volume`).
const HUGE_PAGES: &str = "is a hugetlbfs of the host, whose pages no guest can map; in the place of a pod's volume of \
                          pages of 2 MiB, into which the host has put nothing, the guest has its own (Kubernetes: \
                          emptyDir with medium HugePages-2Mi)";

/// Why no guest could use a file of this kind.
fn useless(kind: fs::FileType) -> Option<&'static str> {
    if kind.is_socket() {
        Some("is a socket of the host; only a process of the host could answer on it")
    } else if kind.is_fifo() {
        Some("is a named pipe of the host; no process of the host could be at its other end")
    } else if kind.is_block_device() {
        Some("is a block device of the host; linux.devices gives one to a container")
    } else {
        None
    }
}
