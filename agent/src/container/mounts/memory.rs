//! Memory volumes of the sandbox: each is a tmpfs, or a hugetlbfs, that its containers share, made for the first that
//! asks for it. It ends with the sandbox.

use std::{
    fs,
    io::ErrorKind,
    os::fd::{AsRawFd, OwnedFd},
    path::{Path, PathBuf},
};

use nix::{
    errno::Errno,
    fcntl::{AT_FDCWD, AtFlags},
    mount::MsFlags,
    sys::stat::{FchmodatFlags, Mode, fchmodat},
    unistd::{Gid, Uid, fchownat},
};
use rvm_protocol::agent::{self, FileOwner};

use crate::{
    container::paths::Root,
    error::{Error, Step, StepResult, check_id, check_relative},
    init::mounts::make_dir,
    sys::mount::clone_tree,
};

/// Where they are in the guest.
const DIR: &str = "/run/rvm/memory";

/// A directory of one.
#[derive(Debug)]
pub struct MemoryVolume {
    name: String,
    bytes: u64,
    huge_pages: bool,
    top: FileOwner,
    /// Below it; empty for the whole.
    path: PathBuf,
    owner: FileOwner,
}

impl MemoryVolume {
    /// Checks what is asked for; `field` names a field of the mount.
    pub fn plan(mount: &agent::Mount, field: impl Fn(&str) -> String) -> Result<Self, Error> {
        let asked = &mount.memory;
        check_id(&field("source"), &mount.source)?;
        if !asked.path.is_empty() {
            check_relative(&field("memory.path"), &asked.path)?;
        }
        Ok(Self {
            name: mount.source.clone(),
            bytes: asked.bytes,
            huge_pages: asked.huge_pages,
            top: asked.top.clone().unwrap_or_default(),
            path: PathBuf::from(&asked.path),
            owner: asked.owner.clone().unwrap_or_default(),
        })
    }

    /// A mount of it at no place yet. What is missing is made.
    pub fn open(&self) -> StepResult<OwnedFd> {
        let step = || format!("open memory volume {:?} at {:?}", self.name, self.path);
        let dir = Path::new(DIR).join(&self.name);
        make_dir(Path::new(DIR))?;
        match fs::create_dir(&dir) {
            Ok(()) => self.mount(&dir).inspect_err(|_| drop(fs::remove_dir(&dir)))?,
            Err(error) if error.kind() == ErrorKind::AlreadyExists => {}
            Err(error) => Err(error).step(step)?,
        }
        // Its containers may have put links into it.
        let root = Root::open(&dir).step(step)?;
        let found = match root.find(&self.path) {
            Err(Errno::ENOENT) => {
                let made = root.make_dir(&self.path).step(step)?;
                let FileOwner { mode, uid, gid, .. } = self.owner;
                fchownat(
                    &made,
                    "",
                    Some(Uid::from_raw(uid)),
                    Some(Gid::from_raw(gid)),
                    AtFlags::AT_EMPTY_PATH,
                )
                .step(step)?;
                let by_link = format!("/proc/self/fd/{}", made.as_raw_fd());
                fchmodat(
                    AT_FDCWD,
                    by_link.as_str(),
                    Mode::from_bits_truncate(mode),
                    FchmodatFlags::FollowSymlink,
                )
                .step(step)?;
                made
            }
            found => found.step(step)?,
        };
        clone_tree(found, Path::new(""), false).step(step)
    }

    fn mount(&self, dir: &Path) -> StepResult<()> {
        let FileOwner { mode, uid, gid, .. } = self.top;
        let owner = format!("mode={:o},uid={uid},gid={gid}", mode & 0o7777);
        let (kind, options) = match (self.huge_pages, self.bytes) {
            (false, bytes) => ("tmpfs", format!("size={bytes},{owner}")),
            (true, 0) => ("hugetlbfs", format!("pagesize=2M,{owner}")),
            (true, bytes) => ("hugetlbfs", format!("pagesize=2M,size={bytes},{owner}")),
        };
        nix::mount::mount(Some(kind), dir, Some(kind), MsFlags::empty(), Some(options.as_str()))
            .step(|| format!("mount memory volume {:?} ({options})", self.name))
    }
}
