//! Mount namespaces: one that holds a sandbox's share and nothing else, and those that are there for a moment.

use std::{
    fs::File,
    io,
    os::fd::{AsFd, BorrowedFd},
    path::{Path, PathBuf},
};

use nix::{
    mount::{MntFlags, MsFlags, mount, umount2},
    sched::{CloneFlags, setns, unshare},
    unistd::{chdir, pivot_root},
};

use super::{Tree, make_readonly, mount_fs};

/// A mount namespace of which nothing is mounted in any other one, and in which nothing of any other one is mounted but
/// what is [attached](Tree::attach) [within](Namespace::within) it. It goes, with all its mounts, when nobody has it open and no process is in it.
#[derive(Debug)]
pub struct Namespace {
    namespace: File,
    top: File,
}

impl Namespace {
    /// A new one. In it there is a small file system in memory that holds the directory `top` with the empty directories
    /// `names` in it, and is read-only from now on. `stage` is some directory, which stays as it is.
    pub fn create(stage: &Path, top: &Path, names: &[&str]) -> io::Result<Self> {
        apart(|| {
            let namespace = leave(MsFlags::MS_PRIVATE)?;
            // Directories take inodes only.
            mount_fs("tmpfs", "rvm", stage, MsFlags::empty(), Some("mode=755,size=64k"))?;
            chdir(stage)?;
            for name in names {
                std::fs::create_dir_all(
                    Path::new(".").join(top.strip_prefix("/").unwrap_or(top)).join(name),
                )?;
            }
            // pivot_root(2): the old root is on top of the new one, and goes.
            pivot_root(".", ".").map_err(|errno| {
                let why = "the root directory must be a mount that can be left, which no initramfs is";
                io::Error::new(io::Error::from(errno).kind(), format!("pivot_root: {errno}; {why}"))
            })?;
            umount2(".", MntFlags::MNT_DETACH)?;
            chdir("/")?;
            make_readonly(Path::new("/"))?;
            Ok(Self { namespace, top: File::open(top)? })
        })
    }

    /// The one directory in its root directory.
    pub fn top(&self) -> BorrowedFd<'_> {
        self.top.as_fd()
    }

    /// Does `work` on a thread in it, for which paths begin at its root directory.
    pub fn within<T: Send>(&self, work: impl FnOnce() -> io::Result<T> + Send) -> io::Result<T> {
        apart(|| {
            // Of this thread alone.
            unshare(CloneFlags::CLONE_FS)?;
            setns(&self.namespace, CloneFlags::CLONE_NEWNS)?;
            work()
        })
    }
}

impl AsFd for Namespace {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.namespace.as_fd()
    }
}

/// What `make` mounts on the directory it is given, which is `stage`: in a mount namespace of that moment, in which the
/// host's mounts are and from which none leaves.
pub fn staged(stage: &Path, make: impl FnOnce(&Path) -> io::Result<()> + Send) -> io::Result<Tree> {
    staged_at(stage, |stage| make(stage).map(|()| stage.to_owned()))
}

/// The same with what is mounted at the path that `make` returns.
pub fn staged_at(stage: &Path, make: impl FnOnce(&Path) -> io::Result<PathBuf> + Send) -> io::Result<Tree> {
    apart(|| {
        leave(MsFlags::MS_SLAVE)?;
        let made = make(stage)?;
        Tree::of(&made, false)
    })
}

/// Takes the calling thread to a copy of its mount namespace, whose mounts have this propagation; returns it.
fn leave(propagation: MsFlags) -> io::Result<File> {
    unshare(CloneFlags::CLONE_NEWNS)?;
    let namespace = File::open("/proc/thread-self/ns/mnt")?;
    mount(None::<&str>, "/", None::<&str>, MsFlags::MS_REC | propagation, None::<&str>)?;
    Ok(namespace)
}

/// Does `work` on a thread of its own, which may change what threads share.
pub(super) fn apart<T: Send>(work: impl FnOnce() -> io::Result<T> + Send) -> io::Result<T> {
    let done = std::thread::scope(|scope| scope.spawn(work).join());
    // A panic there is a fault of ours.
    done.unwrap_or_else(|panic| std::panic::resume_unwind(panic))
}
