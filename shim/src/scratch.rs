//! The file behind a container's writable layer where that is a block device: a
//! sparse ext4 file system the guest mounts.
//!
//! It lies beside the snapshot's own directories (`fs` and `work` of containerd's
//! overlay snapshotter), so it is there again when the same container is started
//! again and goes when containerd removes the snapshot. That of a container of
//! Kubernetes' lies in `fs`: what is there is what containerd counts as written, and
//! what kubelet evicts by. A root file system that
//! is no such snapshot keeps it in the sandbox's directory, for as long as the
//! sandbox lives.
//!
//! `mkfs.ext4` runs once per size: what it makes is kept as a template, of which
//! only the few hundred KiB that were written are copied; see
//! docs/decisions/0410.

use std::{
    ffi::OsString,
    fs::{self, DirBuilder, File},
    io,
    os::{
        fd::{AsFd, AsRawFd},
        unix::fs::{DirBuilderExt, FileExt},
    },
    path::{Path, PathBuf},
    process::{Command, Stdio},
    thread::JoinHandle,
};

use nix::{
    errno::Errno,
    unistd::{Whence, lseek},
};
use tokio::sync::oneshot;

use crate::{
    own_file,
    rootfs::{Layer, snapshot_dir, snapshot_upper, stack::Disk},
};

/// The program that makes file systems (e2fsprogs).
pub const MKFS: &str = "mkfs.ext4";
/// Its name beside the snapshot's directories, and in the sandbox's.
pub const FILE_NAME: &str = "rvm-scratch.ext4";

/// Changes with what [`make_file_system`] asks for, so that no template of an
/// older version is used.
const TEMPLATE_VERSION: u32 = 1;
/// More than `mkfs.ext4` writes even for a file of 16 TiB. A host file system
/// that cannot tell data from holes has more, and gets no copies.
const MAX_TEMPLATE_BYTES: u64 = 64 << 20;
/// Offset of ext4's magic number, in the first superblock.
const MAGIC_AT: u64 = 1024 + 0x38;
/// ext4's magic number, little-endian.
const MAGIC: [u8; 2] = [0x53, 0xef];

/// What every Linux kernel with ext4 mounts, whatever this host's
/// `/etc/mke2fs.conf` says.
const FEATURES: &str = "none,has_journal,ext_attr,dir_index,filetype,extent,64bit,flex_bg,sparse_super,\
                        large_file,huge_file,dir_nlink,extra_isize,metadata_csum";

/// What a container's writable layer is to be on.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Wanted {
    /// Memory of the guest's.
    Tmpfs {
        /// At most so much; 0 leaves the kernel's default.
        size_bytes: u64,
    },
    /// A file of ours.
    Block {
        /// Of its file system.
        size_bytes: u64,
    },
    /// A file of the client's.
    Disk(Disk),
}

/// Why there is no scratch.
#[derive(Debug, thiserror::Error)]
pub enum ScratchError {
    /// A file or directory of the host.
    #[error("scratch: {}: {source}", path.display())]
    File {
        /// Its path.
        path: PathBuf,
        /// Why not.
        #[source]
        source: io::Error,
    },
    /// There is nothing to make a file system with.
    #[error("scratch.backing: \"block\" needs mkfs.ext4 (package e2fsprogs), \"tmpfs\" does not: {0}")]
    NoMkfs(#[source] io::Error),
    /// No file system can be made.
    #[error("scratch: making a file system in {}: {said}", path.display())]
    MakeFileSystem {
        /// Where.
        path: PathBuf,
        /// What mkfs.ext4 says of it.
        said: String,
    },
    /// The client's file is none to write to.
    #[error("rootfs[{index}].source: {}: {problem}", path.display())]
    Disk {
        /// Which of the client's mounts it is.
        index: usize,
        /// The file.
        path: PathBuf,
        /// Why not.
        problem: String,
    },
    /// The thread that prepares it.
    #[error("scratch: its thread: {0}")]
    Thread(#[source] io::Error),
}

fn failed(path: &Path) -> impl Fn(io::Error) -> ScratchError {
    |source| ScratchError::File { path: path.to_owned(), source }
}

/// A scratch file that is being prepared on a thread of its own, while the guest
/// boots. Dropping it waits for the thread, so that nothing is written where
/// everything has been removed.
#[derive(Debug)]
pub struct Preparation {
    thread: Option<JoinHandle<()>>,
    file: oneshot::Receiver<Result<PathBuf, ScratchError>>,
}

impl Preparation {
    /// Begins with the scratch file for a container with these `layers`: the one
    /// from before, or a new one of `size_bytes`. Templates are kept in
    /// `cache_dir`; `done` is called at the end. Where the file `is_counted`, containerd
    /// tells its size as that of what the container has written.
    pub fn start(
        size_bytes: u64,
        cache_dir: &Path,
        (layers, is_counted): (&[Layer], bool),
        sandbox_dir: &Path,
        done: impl FnOnce() + Send + 'static,
    ) -> Result<Self, ScratchError> {
        let (cache_dir, sandbox_dir) = (cache_dir.to_owned(), sandbox_dir.to_owned());
        let snapshot = if is_counted { snapshot_upper(layers) } else { snapshot_dir(layers) };
        Self::begin(move || {
            let dir = snapshot.unwrap_or(sandbox_dir);
            let prepared = prepare(size_bytes, &cache_dir, &dir);
            done();
            prepared
        })
    }

    /// Begins with a client's file: the one from before, or a new one.
    pub fn of_disk(
        disk: Disk,
        cache_dir: &Path,
        done: impl FnOnce() + Send + 'static,
    ) -> Result<Self, ScratchError> {
        let cache_dir = cache_dir.to_owned();
        Self::begin(move || {
            let prepared = prepare_disk(disk, &cache_dir);
            done();
            prepared
        })
    }

    fn begin(
        prepare: impl FnOnce() -> Result<PathBuf, ScratchError> + Send + 'static,
    ) -> Result<Self, ScratchError> {
        let (sender, file) = oneshot::channel();
        let prepare = move || {
            let prepared = prepare();
            // Nobody waits for it any more.
            let _ = sender.send(prepared);
        };
        let thread = std::thread::Builder::new().name("scratch".into()).spawn(prepare);
        Ok(Self { thread: Some(thread.map_err(ScratchError::Thread)?), file })
    }

    /// The file, when it is ready; to be called once.
    pub async fn finished(&mut self) -> Result<PathBuf, ScratchError> {
        let ended = || Err(ScratchError::Thread(io::Error::other("it ended before its time")));
        (&mut self.file).await.unwrap_or_else(|_| ended())
    }
}

impl Drop for Preparation {
    fn drop(&mut self) {
        if let Some(thread) = self.thread.take() {
            // What it panicked with is on standard error.
            let _ = thread.join();
        }
    }
}

/// The scratch file in `dir`.
fn prepare(size_bytes: u64, cache_dir: &Path, dir: &Path) -> Result<PathBuf, ScratchError> {
    let path = dir.join(FILE_NAME);
    match own_file::open(&path).and_then(|file| has_magic(&file)) {
        Ok(true) => return Ok(path),
        Ok(false) => {}
        // Nothing, or a link that somebody has put there.
        Err(error)
            if error.kind() == io::ErrorKind::NotFound || error.raw_os_error() == Some(libc::ELOOP) => {}
        // What a container has written is not thrown away because it cannot be read today.
        Err(error) => return Err(failed(&path)(error)),
    }
    let new = path.with_added_extension("new");
    let made =
        create(&new, size_bytes, cache_dir).and_then(|()| fs::rename(&new, &path).map_err(failed(&path)));
    if made.is_err() {
        let _ = fs::remove_file(&new);
    }
    made.map(|()| path)
}

/// A client's file with a file system, which is as it was made, or made as the client says.
fn prepare_disk(disk: Disk, cache_dir: &Path) -> Result<PathBuf, ScratchError> {
    let Disk { index, path, size_bytes, uuid } = disk;
    let refused = |path: &Path, problem: String| ScratchError::Disk { index, path: path.to_owned(), problem };
    match own_file::open(&path) {
        Ok(file) => match has_magic(&file) {
            Ok(true) => return Ok(path),
            Ok(false) => return Err(refused(&path, "is no ext4 file system".into())),
            Err(error) => return Err(refused(&path, error.to_string())),
        },
        Err(error) if error.kind() == io::ErrorKind::NotFound => {}
        Err(error) => return Err(refused(&path, error.to_string())),
    }
    let Some(size_bytes) = size_bytes else {
        return Err(refused(
            &path,
            "is not there, and the mount's type does not begin with \"mkfs/\"".into(),
        ));
    };
    let new = path.with_added_extension("new");
    let made = match uuid {
        // A template is for whole MiB, and has a UUID of its own.
        None if size_bytes.is_multiple_of(1 << 20) => create(&new, size_bytes, cache_dir),
        uuid => make_file_system(&new, size_bytes, uuid.as_deref()),
    };
    let made = made.and_then(|()| fs::rename(&new, &path).map_err(failed(&path)));
    if let Err(error) = made {
        let _ = fs::remove_file(&new);
        return Err(refused(&path, error.to_string()));
    }
    Ok(path)
}

/// Whether a file system has been made there. One whose beginning never reached
/// the disk before the host crashed has nothing in it that did.
fn has_magic(file: &File) -> io::Result<bool> {
    let mut magic = [0; 2];
    match file.read_exact_at(&mut magic, MAGIC_AT) {
        Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => Ok(false),
        read => read.map(|()| magic == MAGIC),
    }
}

/// The same of what is made anew where it cannot be used.
fn is_file_system(path: &Path) -> bool {
    own_file::open(path).and_then(|file| has_magic(&file)).unwrap_or(false)
}

fn create(path: &Path, size_bytes: u64, cache_dir: &Path) -> Result<(), ScratchError> {
    let template = cache_dir.join(format!("scratch-{}m-v{TEMPLATE_VERSION}.ext4", size_bytes >> 20));
    if !is_file_system(&template) {
        make_template(&template, size_bytes)?;
    }
    match copy_sparse(&template, path) {
        Err(error) if error.kind() == io::ErrorKind::Unsupported => make_file_system(path, size_bytes, None),
        copied => copied.map_err(failed(path)),
    }
}

/// Another shim may be making the same one: each makes its own, the last stays.
fn make_template(path: &Path, size_bytes: u64) -> Result<(), ScratchError> {
    if let Some(dir) = path.parent() {
        DirBuilder::new().recursive(true).mode(0o700).create(dir).map_err(failed(dir))?;
    }
    let new = path.with_added_extension(std::process::id().to_string());
    let made = make_file_system(&new, size_bytes, None).and_then(|()| {
        // A template that a crash of the host spoils would spoil all copies.
        let synced = File::open(&new).and_then(|file| file.sync_all());
        synced.and_then(|()| fs::rename(&new, path)).map_err(failed(path))
    });
    if made.is_err() {
        let _ = fs::remove_file(&new);
    }
    made
}

fn make_file_system(path: &Path, size_bytes: u64, uuid: Option<&str>) -> Result<(), ScratchError> {
    own_file::create(path).and_then(|file| file.set_len(size_bytes)).map_err(failed(path))?;
    let mut command = Command::new(MKFS);
    command
        .args(["-q", "-F", "-b", "4096", "-I", "256", "-i", "16384", "-m", "0", "-O", FEATURES])
        // The file is all zeroes: nothing has to be written to make it so.
        .args(["-E", "lazy_itable_init=1,lazy_journal_init=1,nodiscard,root_owner=0:0"])
        .args(uuid.into_iter().flat_map(|uuid| ["-U", uuid]))
        .arg(path)
        .env("PATH", search_path())
        .env("MKE2FS_CONFIG", "/dev/null")
        .stdin(Stdio::null());
    let output = command.output().map_err(ScratchError::NoMkfs)?;
    if output.status.success() {
        return Ok(());
    }
    let text = String::from_utf8_lossy(&output.stderr);
    let said: Vec<&str> = text.lines().map(str::trim).filter(|line| !line.is_empty()).collect();
    let said = format!("{}: {}", output.status, said.join("; "));
    Err(ScratchError::MakeFileSystem { path: path.to_owned(), said })
}

/// Where [`MKFS`] is looked for: containerd's `PATH` may lack the administrator's
/// directories.
pub fn search_path() -> OsString {
    let mut path = std::env::var_os("PATH").unwrap_or_default();
    path.push(":/usr/local/sbin:/usr/sbin:/sbin");
    path
}

/// Copies a file without its holes, or lets both share their blocks where the
/// host's file system can. `Unsupported` where holes cannot be told from data.
fn copy_sparse(from: &Path, to: &Path) -> io::Result<()> {
    let (source, target) = (own_file::open(from)?, own_file::create(to)?);
    // SAFETY: FICLONE takes a descriptor and touches no memory.
    if unsafe { libc::ioctl(target.as_raw_fd(), libc::FICLONE, source.as_raw_fd()) } == 0 {
        return Ok(());
    }
    let length = source.metadata()?.len();
    target.set_len(length)?;
    let mut copied = 0;
    let mut at = 0;
    while let Some(data) = seek(&source, at, Whence::SeekData)? {
        let end = seek(&source, data, Whence::SeekHole)?.unwrap_or(length);
        copied += end - data;
        if copied > MAX_TEMPLATE_BYTES {
            return Err(io::ErrorKind::Unsupported.into());
        }
        copy_range(&source, &target, data, end)?;
        at = end;
    }
    Ok(())
}

/// `None`: there is no more.
fn seek(file: &File, from: u64, whence: Whence) -> io::Result<Option<u64>> {
    match lseek(file.as_fd(), from.cast_signed(), whence) {
        Ok(at) => Ok(Some(at.cast_unsigned())),
        Err(Errno::ENXIO) => Ok(None),
        Err(Errno::EINVAL) => Err(io::ErrorKind::Unsupported.into()),
        Err(errno) => Err(errno.into()),
    }
}

fn copy_range(from: &File, to: &File, start: u64, end: u64) -> io::Result<()> {
    const CHUNK: usize = 256 << 10;
    let mut buffer = vec![0; CHUNK.min(usize::try_from(end - start).unwrap_or(CHUNK))];
    let mut at = start;
    while at < end {
        let wanted = buffer.len().min(usize::try_from(end - at).unwrap_or(CHUNK));
        let piece = buffer.get_mut(..wanted).unwrap_or_default();
        from.read_exact_at(piece, at)?;
        to.write_all_at(piece, at)?;
        at += wanted as u64;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::MetadataExt;

    use super::*;

    fn overlay(snapshot: &Path) -> Layer {
        Layer {
            kind: "overlay".into(),
            source: "overlay".into(),
            options: vec![
                format!("workdir={}/work", snapshot.display()),
                format!("upperdir={}/fs", snapshot.display()),
                "lowerdir=/l".into(),
            ],
            ..Layer::default()
        }
    }

    fn prepare_for(size: u64, cache: &Path, layers: &[Layer], dir: &Path) -> Result<PathBuf, ScratchError> {
        let mut preparation = Preparation::start(size, cache, (layers, false), dir, || ())?;
        let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
        runtime.block_on(preparation.finished())
    }

    #[test]
    fn lives_beside_the_snapshot_and_is_kept() {
        let root = tempfile::tempdir().unwrap();
        let (cache, snapshot) = (root.path().join("cache/rvm"), root.path().join("42"));
        fs::create_dir(&snapshot).unwrap();
        let layers = [overlay(&snapshot)];
        let path = prepare_for(64 << 20, &cache, &layers, root.path()).unwrap();
        assert_eq!(path, snapshot.join(FILE_NAME));
        let found = fs::metadata(&path).unwrap();
        assert_eq!((found.len(), found.mode() & 0o777), (64 << 20, 0o600));
        assert!(found.blocks() * 512 < 8 << 20, "sparse: {} blocks", found.blocks());
        assert_eq!(fs::read_dir(&snapshot).unwrap().count(), 1);
        assert_eq!(fs::read_dir(&cache).unwrap().count(), 1);

        // The next start finds what the last one left, whatever size is configured now.
        File::options().write(true).open(&path).unwrap().write_all_at(b"kept", 1 << 20).unwrap();
        assert_eq!(prepare_for(128 << 20, &cache, &layers, root.path()).unwrap(), path);
        let mut kept = [0; 4];
        File::open(&path).unwrap().read_exact_at(&mut kept, 1 << 20).unwrap();
        assert_eq!(&kept, b"kept");
    }

    #[test]
    fn a_file_that_never_reached_the_disk_is_replaced() {
        let root = tempfile::tempdir().unwrap();
        fs::write(root.path().join(FILE_NAME), [0; 4096]).unwrap();
        let path = prepare(64 << 20, &root.path().join("cache"), root.path()).unwrap();
        assert!(is_file_system(&path) && fs::metadata(path).unwrap().len() == 64 << 20);
    }

    #[test]
    fn what_cannot_be_read_is_not_thrown_away() {
        let root = tempfile::tempdir().unwrap();
        let (cache, path) = (root.path().join("cache"), root.path().join(FILE_NAME));
        prepare(64 << 20, &cache, root.path()).unwrap();
        // As a backup of hard links leaves it.
        fs::hard_link(&path, root.path().join("backup")).unwrap();
        let error = prepare(64 << 20, &cache, root.path()).unwrap_err().to_string();
        assert!(error.contains(&*path.to_string_lossy()), "{error}");
        assert_eq!(
            fs::metadata(&path).unwrap().ino(),
            fs::metadata(root.path().join("backup")).unwrap().ino()
        );
        // A link that somebody has put there leads nowhere.
        fs::remove_file(&path).unwrap();
        std::os::unix::fs::symlink(root.path().join("backup"), &path).unwrap();
        prepare(64 << 20, &cache, root.path()).unwrap();
        assert!(fs::symlink_metadata(&path).unwrap().is_file());
    }

    #[test]
    fn the_copy_is_a_sound_file_system() {
        let root = tempfile::tempdir().unwrap();
        let path = prepare(10 << 30, &root.path().join("cache"), root.path()).unwrap();
        let checked = Command::new("/usr/sbin/e2fsck").args(["-f", "-n"]).arg(&path).output().unwrap();
        assert!(checked.status.success(), "{}", String::from_utf8_lossy(&checked.stdout));
    }

    #[test]
    fn a_clients_disk_is_made_once_and_not_taken_for_one() {
        let root = tempfile::tempdir().unwrap();
        let cache = root.path().join("cache");
        let disk = |name: &str, size_bytes, uuid: Option<&str>| {
            let (path, uuid) = (root.path().join(name), uuid.map(str::to_owned));
            prepare_disk(Disk { index: 2, path, size_bytes, uuid }, &cache)
        };
        let path = disk("one", Some(64 << 20), None).unwrap();
        assert_eq!(fs::metadata(&path).unwrap().len(), 64 << 20);
        File::options().write(true).open(&path).unwrap().write_all_at(b"kept", 1 << 20).unwrap();
        assert_eq!(disk("one", None, None).unwrap(), path);
        let mut kept = [0; 4];
        File::open(&path).unwrap().read_exact_at(&mut kept, 1 << 20).unwrap();
        assert_eq!(&kept, b"kept");

        // No whole MiB, and a name of its own: that of no template.
        let uuid = "550e8400-e29b-41d4-a716-446655440000";
        let path = disk("two", Some((64 << 20) + 4096), Some(uuid)).unwrap();
        let mut found = [0; 16];
        File::open(&path).unwrap().read_exact_at(&mut found, 1024 + 0x68).unwrap();
        let found: String = found.iter().map(|byte| format!("{byte:02x}")).collect();
        assert_eq!(found, uuid.replace('-', ""));

        fs::write(root.path().join("other"), [1; 4096]).unwrap();
        std::os::unix::fs::symlink(&path, root.path().join("link")).unwrap();
        for (name, size, expected) in [
            ("other", Some(64 << 20), "is no ext4 file system"),
            ("link", Some(64 << 20), "Too many levels of symbolic links"),
            ("gone", None, "is not there, and the mount's type does not begin with \"mkfs/\""),
            ("gone/disk", Some(64 << 20), "scratch: "),
        ] {
            let said = disk(name, size, None).unwrap_err().to_string();
            let path = root.path().join(name);
            assert!(said.starts_with(&format!("rootfs[2].source: {}: {expected}", path.display())), "{said}");
        }
        assert_eq!(fs::read(root.path().join("other")).unwrap(), [1; 4096]);
        let mut names: Vec<_> =
            fs::read_dir(root.path()).unwrap().map(|entry| entry.unwrap().file_name()).collect();
        names.sort();
        assert_eq!(names, ["cache", "link", "one", "other", "two"]);
    }

    #[test]
    fn errors_name_the_file() {
        let root = tempfile::tempdir().unwrap();
        let missing = root.path().join("missing");
        let error = prepare_for(64 << 20, &root.path().join("cache"), &[], &missing).unwrap_err().to_string();
        assert!(error.starts_with("scratch: ") && error.contains("No such file"), "{error}");
    }
}
