//! Which of the host's ids a sandbox's monitor acts with, and its files' owners are seen as.
//!
//! Where everything a sandbox is given can be mounted with ids mapped, its users 0 to 65,535 are others on the host than
//! anybody else's: what its monitor is the root of is owned by nobody there. Further ids are what they are on disk.

use std::{
    fs::{DirBuilder, File},
    hash::{DefaultHasher, Hash, Hasher},
    io,
    os::{
        fd::{AsFd, BorrowedFd, OwnedFd},
        unix::fs::{DirBuilderExt, OpenOptionsExt},
    },
    path::Path,
};

use nix::{
    errno::Errno,
    fcntl::{FcntlArg, fcntl},
};

use crate::{
    config::Config,
    image,
    mount::Tree,
    rootfs::{self, Layer},
    rootless::is_rootless,
    spec::{Bundle, Role, Volume},
    user_namespace::{IdMap, IdRange, user_namespace},
};

/// Ids of a sandbox's own, as many as every image may use.
const COUNT: u32 = 1 << 16;
/// The first of all sandboxes'.
const FIRST: u32 = 1 << 31;
/// How many sandboxes of a host may have their own.
const SANDBOXES: u32 = 1 << 13;
/// The file in the cache's directory of which a sandbox has the byte locked that its number says.
const LOCKS: &str = "ids";

/// Why a pod's sandbox has none of its own.
pub const OF_A_POD: &str = "containers that join may bring files whose owners cannot be mapped";

/// The ids of one sandbox's monitor.
#[derive(Debug)]
pub enum Ids {
    /// Its own.
    Own(Own),
    /// Those of the host, one for one, and why.
    Host(String),
}

/// A range of the host's ids that nobody else has as long as the value is there.
#[derive(Debug)]
pub struct Own {
    first: u32,
    users: OwnedFd,
    _lock: File,
}

impl Ids {
    /// Ids for the sandbox `id` that is made for `bundle`, on a root file system of `layers`. Waits for file systems.
    pub fn choose(config: &Config, id: &str, bundle: &Bundle, layers: &[Layer]) -> Self {
        match Own::find(config, id, bundle, layers) {
            Ok(own) => Self::Own(own),
            Err(reason) => Self::Host(reason),
        }
    }

    /// The user namespace in which users are those of the host that they are seen as.
    pub fn users(&self) -> Option<BorrowedFd<'_>> {
        match self {
            Self::Own(own) => Some(own.users.as_fd()),
            Self::Host(_) => None,
        }
    }

    /// The host's id that is the root of the machine's files.
    pub fn root(&self) -> u32 {
        match self {
            Self::Own(own) => own.first,
            Self::Host(_) => 0,
        }
    }
}

/// As `rvmctl ps` and the log tell of them.
impl std::fmt::Display for Ids {
    fn fmt(&self, f: &mut std::fmt::Formatter) -> std::fmt::Result {
        match self {
            Self::Own(own) => write!(f, "{} to {}", own.first, own.first + (COUNT - 1)),
            Self::Host(reason) => write!(f, "the host's: {reason}"),
        }
    }
}

impl Own {
    fn find(config: &Config, id: &str, bundle: &Bundle, layers: &[Layer]) -> Result<Self, String> {
        if bundle.role != Role::Alone {
            return Err(OF_A_POD.into());
        }
        if bundle.container.rootfs.on_volumes {
            return Err("its root file system is one that the client has mounted".into());
        }
        if is_rootless() {
            return Err("a containerd of a user's own has none to give away".into());
        }
        let own = Self::claim(&config.host.cache_dir, id)
            .map_err(|error| format!("none of its own are free: {error}"))?;
        match image::mounted_files(layers, &config.images) {
            // Where the guest reads layers by itself, they have the owners they have; files may come to be volumes.
            Some(files) => {
                files.iter().try_for_each(|file| rootfs::file_can_be_mapped(file, own.users.as_fd()))?
            }
            None => rootfs::can_be_mapped(layers, &bundle.root, own.users.as_fd())?,
        }
        bundle.volumes.iter().try_for_each(|volume| can_be_mapped(volume, own.users.as_fd()))?;
        Ok(own)
    }

    /// Takes a range that nobody has.
    fn claim(cache_dir: &Path, id: &str) -> io::Result<Self> {
        DirBuilder::new().recursive(true).mode(0o700).create(cache_dir)?;
        let lock = File::options()
            .create(true)
            .truncate(false)
            .write(true)
            .mode(0o600)
            .custom_flags(libc::O_NOFOLLOW)
            .open(cache_dir.join(LOCKS))?;
        let mut hasher = DefaultHasher::new();
        id.hash(&mut hasher);
        let begin = (hasher.finish() % u64::from(SANDBOXES)) as u32;
        for number in (begin..SANDBOXES).chain(0..begin) {
            let range = libc::flock {
                l_type: libc::F_WRLCK as libc::c_short,
                l_whence: libc::SEEK_SET as libc::c_short,
                l_start: number.into(),
                l_len: 1,
                l_pid: 0,
            };
            match fcntl(&lock, FcntlArg::F_OFD_SETLK(&range)) {
                Ok(_) => {
                    let first = FIRST + number * COUNT;
                    return Ok(Self { first, users: user_namespace(&map(first))?, _lock: lock });
                }
                Err(Errno::EAGAIN | Errno::EACCES) => {}
                Err(errno) => return Err(errno.into()),
            }
        }
        Err(io::Error::other(format!("{SANDBOXES} sandboxes have theirs")))
    }
}

/// The users 0 to 65,535 are those from `first` on, and others what they are, but for what belongs to sandboxes.
fn map(first: u32) -> IdMap {
    const AFTER: u32 = FIRST + COUNT * SANDBOXES;
    let same = |from: u32, to: u32| IdRange { inside: from, outside: from, count: to - from };
    let all =
        vec![IdRange { inside: 0, outside: first, count: COUNT }, same(COUNT, FIRST), same(AFTER, u32::MAX)];
    IdMap { uids: all.clone(), gids: all }
}

fn can_be_mapped(volume: &Volume, users: BorrowedFd) -> Result<(), String> {
    let no = |why: &str| Err(format!("{}: {}: {why}", volume.field, volume.source.display()));
    if volume.idmap.is_some() {
        return no("its owners are mapped already");
    }
    if volume.follows_host {
        return no("what the host mounts there later cannot be mapped");
    }
    let tried =
        Tree::of(&volume.source, volume.recursive).and_then(|tree| tree.map_ids(users, volume.recursive));
    tried.or_else(|error| no(&format!("its owners cannot be mapped: {error}")))
}

/// What `rvmctl check` tells: whether files in `dir` can have their owners mapped.
pub fn try_out(dir: &Path) -> io::Result<()> {
    Tree::of(dir, false)?.map_ids(user_namespace(&map(FIRST))?.as_fd(), false)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nobody_has_anothers_ids() {
        let dir = tempfile::tempdir().unwrap();
        let claim = || Own::claim(dir.path(), "web").unwrap();
        let (one, two) = (claim(), claim());
        assert!(one.first.abs_diff(two.first) >= COUNT);
        let freed = one.first;
        drop(one);
        assert_eq!(claim().first, freed);
        let range = FIRST..FIRST + COUNT * SANDBOXES;
        assert!(range.contains(&two.first) && range.contains(&(two.first + (COUNT - 1))));
    }

    #[test]
    fn an_id_is_its_own_or_what_it_is_on_disk() {
        let map = map(FIRST + COUNT);
        for (inside, outside) in [
            (0, Some(FIRST + COUNT)),
            (65_535, Some(FIRST + COUNT + 65_535)),
            (65_536, Some(65_536)),
            (1_000_650_000, Some(1_000_650_000)),
            (FIRST, None),
            (u32::MAX - 1, Some(u32::MAX - 1)),
        ] {
            assert_eq!(map.outside(inside, inside), outside.map(|id| (id, id)), "{inside}");
        }
    }
}
