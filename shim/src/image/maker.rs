//! Makes image files: `containerd-shim-rvm-v2 make-image`, a process of its own at idle
//! priority, one at a time on a host.
//!
//! The layers are merged by the host's kernel, as for a container, and `mkfs.erofs` reads
//! that. It writes to a file without a name, which gets one when it is whole: whoever is
//! killed on the way leaves nothing.

use std::{
    fs::{self, File, OpenOptions},
    io,
    os::{
        fd::{AsRawFd, OwnedFd},
        unix::fs::{DirBuilderExt, OpenOptionsExt},
        unix::process::ExitStatusExt,
    },
    path::{Path, PathBuf},
    process::{Command, Stdio},
};

use nix::{
    fcntl::{AT_FDCWD, AtFlags, FcntlArg, FdFlag, Flock, FlockArg, OFlag, fcntl},
    mount::{MsFlags, mount},
    sched::{CloneFlags, unshare},
    sys::{
        resource::{Resource, setrlimit},
        stat::Mode,
        statvfs::fstatvfs,
    },
    unistd::{linkat, symlinkat},
};

use super::{INDEX, REFUSED, huge_pages};
use crate::{
    capabilities,
    mount::Identity,
    own_file,
    rootfs::{self, Access, Layer, RootfsError, unescape},
};

/// Its word on the command line.
pub const ACTION: &str = "make-image";
/// The program that makes file systems (erofs-utils).
pub const MKFS: &str = "mkfs.erofs";

/// Of what makes the file system or looks at it, in bytes: it knows every file of an image at once, and whoever made the
/// image says how many there are.
pub(super) const MEMORY_LIMIT: u64 = 2 << 30;

/// `IOPRIO_PRIO_VALUE(IOPRIO_CLASS_IDLE, 0)` of linux/ioprio.h, and the kind of id.
const IDLE_IO: libc::c_int = 3 << 13;
const IOPRIO_WHO_PROCESS: libc::c_int = 1;

/// Why there is no image.
#[derive(Debug, thiserror::Error)]
pub enum MakeError {
    /// Not as [`super::Place`] calls it.
    #[error("{ACTION}: wants SIZE-LIMIT FREE CACHE-DIR FILE LOWERDIR, in bytes the first two")]
    Usage,
    /// A file or directory of the host.
    #[error("{}: {source}", path.display())]
    File {
        /// Its path.
        path: PathBuf,
        /// Why not.
        #[source]
        source: io::Error,
    },
    /// The layers cannot be merged.
    #[error(transparent)]
    Layers(#[from] RootfsError),
    /// There is nothing to make a file system with.
    #[error("{MKFS} (package erofs-utils): {0}")]
    NoMkfs(#[source] io::Error),
    /// It would take too much of the disk.
    #[error("{}: {have} bytes are free, images.free_mib leaves {floor}", path.display())]
    Full {
        /// The directory.
        path: PathBuf,
        /// What there is.
        have: u64,
        /// What has to stay.
        floor: u64,
    },
    /// A layer is a file system by itself, whose files may have to be fetched first.
    #[error("{}: is a mount; images are made of layers that are plain directories", path.display())]
    Mounted {
        /// The layer.
        path: PathBuf,
    },
    /// The program ends with an error.
    #[error("{MKFS}: {0}")]
    Mkfs(String),
}

fn failed(path: &Path) -> impl Fn(io::Error) -> MakeError {
    |source| MakeError::File { path: path.to_owned(), source }
}

/// An image to be made.
#[derive(Debug)]
pub struct Job {
    size_limit: u64,
    free: u64,
    cache_dir: PathBuf,
    file: PathBuf,
    lower: String,
}

impl Job {
    /// From what follows [`ACTION`] on the command line.
    pub fn parse(args: &[String]) -> Result<Self, MakeError> {
        let [size_limit, free, cache_dir, file, lower] = args else { return Err(MakeError::Usage) };
        let number = |text: &String| text.parse().map_err(|_| MakeError::Usage);
        Ok(Self {
            size_limit: number(size_limit)?,
            free: number(free)?,
            cache_dir: cache_dir.into(),
            file: file.into(),
            lower: lower.clone(),
        })
    }

    /// Makes it, unless it is there, or another one is being made.
    pub fn run(&self) -> Result<(), MakeError> {
        step_back();
        let index = self.cache_dir.join(INDEX);
        fs::DirBuilder::new().recursive(true).mode(0o700).create(&index).map_err(failed(&index))?;
        let lock = index.join("lock");
        let held = OpenOptions::new()
            .write(true)
            .create(true)
            .truncate(false)
            .mode(0o600)
            .custom_flags(libc::O_NOFOLLOW)
            .open(&lock)
            .map_err(failed(&lock))?;
        let Ok(_held) = Flock::lock(held, FlockArg::LockExclusiveNonblock) else { return Ok(()) };
        prune(&index);
        if self.file.exists() {
            return Ok(());
        }
        let dir = self.file.parent().unwrap_or(Path::new("/"));
        let name = self.file.file_name().ok_or(MakeError::Usage)?;
        self.look_at_layers()?;
        // Before the tree is over it.
        let index = open(&index, OFlag::O_DIRECTORY | OFlag::O_NOFOLLOW).map_err(failed(&index))?;
        // First: a file and the directory it is to be in have to be of one mount namespace.
        let tree = self.merge()?;
        let dir_fd = open(dir, OFlag::O_DIRECTORY | OFlag::O_NOFOLLOW).map_err(failed(dir))?;
        let limit = self.limit(dir, &dir_fd)?;
        let made = self.make(dir, &tree, limit)?;
        // Guests find it as well where it cannot be done.
        let _ = huge_pages::gather(&made);
        match linkat(AT_FDCWD, nameless(&made).as_str(), &dir_fd, name, AtFlags::AT_SYMLINK_FOLLOW) {
            Ok(()) | Err(nix::errno::Errno::EEXIST) => {}
            Err(errno) => return Err(failed(&self.file)(errno.into())),
        }
        // For whoever lists them; nothing depends on it.
        let hash = name.to_string_lossy().trim_start_matches(super::PREFIX).to_owned();
        let _ = symlinkat(&self.file, &index, super::serial(&hash).as_str());
        Ok(())
    }

    /// Snapshotters that fetch files when they are read (stargz, SOCI) mount each layer: to read all of it would fetch all
    /// of it. Nothing is asked of those mounts.
    fn look_at_layers(&self) -> Result<(), MakeError> {
        for dir in rootfs::split_lower(&self.lower) {
            let path = PathBuf::from(unescape(&dir));
            let of = |path: &Path| Identity::of(path).map_err(failed(path));
            if !of(&path)?.is_on_the_mount_of(&of(path.parent().unwrap_or(&path))?) {
                let mounted = MakeError::Mounted { path };
                self.refuse(&mounted.to_string());
                return Err(mounted);
            }
        }
        Ok(())
    }

    /// Says for good why there is no image.
    fn refuse(&self, reason: &str) {
        let _ = own_file::write(&self.file.with_added_extension(REFUSED), reason);
    }

    /// How large it may get.
    fn limit(&self, dir: &Path, in_dir: &OwnedFd) -> Result<Limit, MakeError> {
        let found = fstatvfs(in_dir).map_err(|errno| failed(dir)(errno.into()))?;
        let have = found.blocks_available().saturating_mul(found.fragment_size());
        match have.checked_sub(self.free) {
            None | Some(0) => Err(MakeError::Full { path: dir.to_owned(), have, floor: self.free }),
            Some(left) if left < self.size_limit => Ok(Limit { bytes: left, by_space: true }),
            Some(_) => Ok(Limit { bytes: self.size_limit, by_space: false }),
        }
    }

    /// The whole image, in a file of `dir` that has no name and is open for reading.
    fn make(&self, dir: &Path, tree: &Path, limit: Limit) -> Result<File, MakeError> {
        let file = open(dir, OFlag::O_TMPFILE).map_err(failed(dir))?;
        let output = mkfs(&file, tree, limit.bytes)?;
        if !output.status.success() {
            let said = match output.status.signal() {
                Some(libc::SIGXFSZ) => format!("the image would be larger than {} bytes", limit.bytes),
                _ => said(&output),
            };
            // What would be the same the next time is not tried again. The disk may have filled up on the way.
            let by_space = || limit.by_space || !self.limit(dir, &file).is_ok_and(|limit| !limit.by_space);
            if output.status.signal().is_none_or(|signal| signal == libc::SIGXFSZ) && !by_space() {
                self.refuse(&said);
            }
            return Err(MakeError::Mkfs(said));
        }
        let file = File::from(file);
        file.sync_all().map_err(failed(dir))?;
        File::open(nameless(&file)).map_err(failed(dir))
    }

    /// The layers as a container sees them, in a mount namespace of this process's own.
    fn merge(&self) -> Result<PathBuf, MakeError> {
        let private = || -> io::Result<()> {
            unshare(CloneFlags::CLONE_NEWNS)?;
            // What the host unmounts meanwhile goes here as well: else its file system would stay in use until the image is made.
            mount(None::<&str>, "/", None::<&str>, MsFlags::MS_REC | MsFlags::MS_SLAVE, None::<&str>)?;
            mount(Some("rvm"), &self.cache_dir, Some("tmpfs"), MsFlags::empty(), Some("mode=0700"))?;
            Ok(())
        };
        private().map_err(failed(&self.cache_dir))?;
        let tree = self.cache_dir.join("tree");
        fs::create_dir(&tree).map_err(failed(&tree))?;
        let layer = Layer {
            kind: "overlay".into(),
            source: "overlay".into(),
            options: vec![format!("lowerdir={}", self.lower)],
            ..Layer::default()
        };
        let mounts = rootfs::mounts(&[layer], Path::new("/"), Access::ReadOnly, &tree, None)?;
        mounts.iter().try_for_each(|mount| mount.attach(&tree)).map_err(failed(&tree))?;
        Ok(tree)
    }
}

#[derive(Clone, Copy)]
struct Limit {
    bytes: u64,
    /// There is no room for more.
    by_space: bool,
}

/// Lets everybody else go first, and the host's kernel take this process before any other where memory is short.
fn step_back() {
    // Any of it may be refused, which costs nobody more than time.
    let _ = fs::write("/proc/self/oom_score_adj", "1000");
    let parameters = libc::sched_param { sched_priority: 0 };
    // SAFETY: the structure is complete, and lives until the call is done.
    unsafe { libc::sched_setscheduler(0, libc::SCHED_IDLE, &raw const parameters) };
    // SAFETY: the call takes numbers only.
    unsafe { libc::syscall(libc::SYS_ioprio_set, IOPRIO_WHO_PROCESS, 0, IDLE_IO) };
}

/// Removes links to images that went with their snapshots.
fn prune(index: &Path) {
    for entry in fs::read_dir(index).into_iter().flatten().flatten() {
        let path = entry.path();
        if entry.file_type().is_ok_and(|kind| kind.is_symlink()) && !path.exists() {
            let _ = fs::remove_file(path);
        }
    }
}

fn open(dir: &Path, kind: OFlag) -> io::Result<OwnedFd> {
    let access = if kind.contains(OFlag::O_TMPFILE) { OFlag::O_RDWR } else { OFlag::O_RDONLY };
    Ok(nix::fcntl::open(dir, kind | access | OFlag::O_CLOEXEC, Mode::S_IRUSR | Mode::S_IWUSR)?)
}

/// Where this process, or one that has the descriptor, finds a file without a name.
fn nameless(file: &impl AsRawFd) -> String {
    format!("/proc/self/fd/{}", file.as_raw_fd())
}

/// Without compression, as what is read is mapped or copied as it is, and with all of what a
/// file's attributes say but its times of access and change.
fn mkfs(file: &OwnedFd, tree: &Path, limit: u64) -> Result<std::process::Output, MakeError> {
    use std::os::unix::process::CommandExt;

    let descriptor = file.as_raw_fd();
    let inherit = move || {
        // SAFETY: it is open until the program has ended.
        let file = unsafe { std::os::fd::BorrowedFd::borrow_raw(descriptor) };
        fcntl(file, FcntlArg::F_SETFD(FdFlag::empty()))?;
        // Whoever made the image says what is read.
        capabilities::IMAGE_READER.keep_for_good()?;
        setrlimit(Resource::RLIMIT_FSIZE, limit, limit)?;
        Ok(setrlimit(Resource::RLIMIT_AS, MEMORY_LIMIT, MEMORY_LIMIT)?)
    };
    let mut command = Command::new(MKFS);
    command
        .args(["--quiet", "--preserve-mtime", "-Enoinline_data"])
        .arg(nameless(file))
        .arg(tree)
        .stdin(Stdio::null());
    // SAFETY: system calls only.
    unsafe { command.pre_exec(inherit) };
    command.output().map_err(MakeError::NoMkfs)
}

fn said(output: &std::process::Output) -> String {
    let text = String::from_utf8_lossy(&output.stderr);
    let lines: Vec<&str> = text.lines().map(str::trim).filter(|line| !line.is_empty()).collect();
    format!("{}: {}", output.status, lines.join("; "))
}
