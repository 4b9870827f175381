//! Image files: a chain of layers, merged, as one EROFS file system, so that a guest finds a
//! name in it without asking the host.
//!
//! One lies beside the top layer of its chain (`fs` and `work` of containerd's overlay
//! snapshotter), so it goes when containerd removes the snapshot. It is made in the
//! background after the first use ([`maker`]); a container that starts before shares the
//! layers. See docs/decisions/0423. Those of containerd's EROFS snapshotter are there already, one for each
//! layer ([`layers`], docs/decisions/0425).

mod check;
mod huge_pages;
mod layers;
pub mod maker;
mod verity;

use std::{
    fs::{self, File},
    io,
    os::unix::fs::FileExt,
    path::{Path, PathBuf},
    process::{Command, Stdio},
};

use sha2::{Digest, Sha256};

pub use self::verity::Verity;

use crate::{
    config::Images,
    own_file,
    rootfs::{Access, Layer, RootfsError, Step, is_no_matter, plan, unescape},
    scratch::search_path,
};

/// What image files are called, before the hash of their chain.
pub const PREFIX: &str = "rvm-image-";
/// What is behind the name of the file that says why there is no image.
const REFUSED: &str = "refused";
/// And of the one that says that an image was broken once.
const BROKEN: &str = "broken";
/// Directory of the cache that has a link to each image, by its serial.
pub const INDEX: &str = "images";

/// Changes with what [`maker`] has made, so that no file of an older version is used.
const VERSION: u8 = 1;
/// Of an EROFS superblock.
const SUPERBLOCK_AT: u64 = 1024;
const MAGIC: [u8; 4] = 0xe0f5_e1e2_u32.to_le_bytes();

/// Where the image of a chain of layers is, or would be.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Place {
    /// The top layer's snapshot.
    dir: PathBuf,
    /// `lowerdir`'s elements, topmost first, as overlayfs spells them.
    lower: Vec<String>,
    hash: String,
    /// What is configured.
    images: Images,
    cache_dir: PathBuf,
}

impl Place {
    /// That of containerd's `layers`; none where they are no chain of snapshots that nobody
    /// changes, or where owners are mapped, which an image is not. Looks at the host's files.
    fn of(layers: &[Layer], images: Images, cache_dir: &Path) -> Option<Self> {
        let [layer] = layers else { return None };
        if layer.kind != "overlay" {
            return None;
        }
        let lower =
            match plan(layers, Path::new(""), Access::ReadOnly, crate::rootfs::is_empty_dir).ok()?.pop()? {
                Step::Overlay { written: None, lower, idmap: None, options }
                    if options.iter().all(|option| is_no_matter(option)) =>
                {
                    lower
                }
                // One layer is no overlay.
                Step::Bind { source, idmap: None } => vec![crate::rootfs::escape(source.to_str()?)],
                _ => return None,
            };
        if !lower.iter().all(|dir| dir.starts_with('/')) {
            return None;
        }
        let top = PathBuf::from(unescape(lower.first()?));
        let dir = top.parent()?.to_owned();
        if top.file_name()? != "fs" || !own_file::is_own_dir(&dir) {
            return None;
        }
        let mut hash = Sha256::new_with_prefix([VERSION]);
        for dir in &lower {
            hash.update(dir);
            hash.update([0]);
        }
        let hash = short(hash);
        Some(Self { dir, lower, hash, images, cache_dir: cache_dir.to_owned() })
    }

    fn file(&self) -> PathBuf {
        self.dir.join(format!("{PREFIX}{}", self.hash))
    }
}

/// A file system that a container can have in place of its layers, or of one of them.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Image {
    /// What it is in, then the devices that it names, in its order.
    pub blobs: Vec<Blob>,
    /// How what it is in is checked as it is read, which has no devices then.
    pub verity: Option<Verity>,
    /// Whose it is.
    pub origin: Origin,
    /// Its files are in the share, as a machine has places for so many devices only.
    pub shared: bool,
}

/// Who has made an image.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Origin {
    /// This one, of all layers, for whoever has the same.
    Maker,
    /// A client: the mount of this number in its list, or its only one.
    Mount(usize),
}

/// A file that a guest reads.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Blob {
    /// The file.
    pub path: PathBuf,
    /// Its name in a guest: at most the 20 bytes of a virtio-blk serial, and of no disk of others.
    pub serial: String,
    /// How long it is.
    pub bytes: u64,
    /// Whether guests that can have it as memory (virtio-pmem); it is a disk of theirs else.
    pub as_memory: bool,
}

impl Blob {
    fn new(path: PathBuf, serial: String, bytes: u64, images: &Images) -> Self {
        Self { path, serial, bytes, as_memory: bytes <= images.memory_limit_bytes }
    }
}

impl Image {
    /// One that [`maker`] has made.
    fn made(blob: Blob) -> Self {
        Self { blobs: vec![blob], verity: None, origin: Origin::Maker, shared: false }
    }

    /// Its name in a guest.
    pub fn name(&self) -> &str {
        self.blobs.first().map_or("", |blob| &blob.serial)
    }

    /// How long its files are.
    pub fn bytes(&self) -> u64 {
        self.blobs.iter().map(|blob| blob.bytes).fold(0, u64::saturating_add)
    }
}

/// What there is for a container's layers.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum Found {
    /// Images, topmost first: one of all layers, or one of each. None is an empty root.
    Ready(Vec<Image>),
    /// None yet; it can be made once the container has started.
    Missing(Place),
    /// There is none to be.
    #[default]
    Never,
}

/// Looks for the images of containerd's `layers`. What is there and is not an image, as after
/// a crash of the host, is removed where it was made here, and told where it is the client's. May take as long as a
/// file system of the host does.
pub fn find(layers: &[Layer], images: Images, cache_dir: &Path) -> Result<Found, RootfsError> {
    if let Some(files) = layers::of_stack(layers, &images)? {
        return Ok(Found::Ready(files));
    }
    if !images.enabled {
        return Ok(Found::Never);
    }
    Ok(match layers::mounted(layers, &images) {
        Some(files) => Found::Ready(files),
        None => made(layers, images, cache_dir),
    })
}

/// The files that a client has mounted itself at `layers`, which are not shared then.
pub fn mounted_files(layers: &[Layer], images: &Images) -> Option<Vec<PathBuf>> {
    let images = layers::mounted(layers, images).filter(|_| images.enabled)?;
    Some(images.into_iter().flat_map(|image| image.blobs).map(|blob| blob.path).collect())
}

/// Looks for the one that [`maker`] makes.
fn made(layers: &[Layer], images: Images, cache_dir: &Path) -> Found {
    let Some(place) = Place::of(layers, images, cache_dir) else { return Found::Never };
    let path = place.file();
    match own_file::open(&path).and_then(|file| whole(&file)) {
        Ok(Some(bytes)) => {
            let blob = Blob::new(path, serial(&place.hash), bytes, &images);
            return Found::Ready(vec![Image::made(blob)]);
        }
        Ok(None) => discard(&path, "it is no whole file system"),
        Err(error) if error.kind() == io::ErrorKind::NotFound => {}
        Err(error) => {
            log::warn!("{}: {error}", path.display());
            return Found::Never;
        }
    }
    match images.make && !path.with_added_extension(REFUSED).exists() {
        true => Found::Missing(place),
        false => Found::Never,
    }
}

/// The images this host has, by the links to them in the cache.
pub fn list(images: &Images, cache_dir: &Path) -> Vec<Blob> {
    let entries = fs::read_dir(cache_dir.join(INDEX)).into_iter().flatten().flatten();
    let image = |entry: fs::DirEntry| {
        let path = fs::read_link(entry.path()).ok()?;
        let serial = entry.file_name().into_string().ok()?;
        let bytes = fs::metadata(&path).ok()?.len();
        Some(Blob::new(path, serial, bytes, images))
    };
    let mut list: Vec<Blob> = entries.filter_map(image).collect();
    list.sort_by(|a, b| a.serial.cmp(&b.serial));
    list
}

/// As much of a hash as fits a device's serial.
fn short(hash: Sha256) -> String {
    hash.finalize().iter().take(8).map(|byte| format!("{byte:02x}")).collect()
}

/// What the image of this hash is called.
fn serial(hash: &str) -> String {
    format!("img-{hash}")
}

/// Removes an image that a guest's kernel finds broken, so that the next start does without. It is made once more;
/// if that one is broken as well, the fault is in the making, and there is none any more. One with which nothing is wrong
/// stays: others have it too, and whoever has taken over a guest says what he likes. May take a minute.
pub fn refuse(path: &Path, reason: &str) {
    if check::is_intact(path) {
        log::warn!("{}: a guest says {reason:?}, and there is nothing wrong with it: kept", path.display());
        return;
    }
    let once = path.with_added_extension(BROKEN);
    let mark = if once.exists() { path.with_added_extension(REFUSED) } else { once };
    if let Err(error) = own_file::write(&mark, reason) {
        log::warn!("{}: {error}", mark.display());
    }
    discard(path, reason);
}

/// Removes what cannot be used.
fn discard(path: &Path, reason: &str) {
    match fs::remove_file(path) {
        Ok(()) => log::warn!("{}: {reason}; removed", path.display()),
        Err(error) => log::warn!("{}: {reason}, and removing it: {error}", path.display()),
    }
}

/// How long it is, where it begins as EROFS does and is as long as that says. What is wrong inside, the
/// guest's kernel finds.
fn whole(file: &File) -> io::Result<Option<u64>> {
    let mut superblock = [0; 40];
    match file.read_exact_at(&mut superblock, SUPERBLOCK_AT) {
        Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => return Ok(None),
        read => read?,
    }
    // `blkszbits` and `blocks` of the superblock.
    let (bits, blocks) = (u32::from(superblock[12]), &superblock[36..40]);
    let blocks = u64::from(u32::from_le_bytes(blocks.try_into().unwrap_or_default()));
    let bytes = blocks.checked_shl(bits).filter(|_| (9..=16).contains(&bits));
    let length = file.metadata()?.len();
    let is_whole = superblock.starts_with(&MAGIC) && bytes.is_some_and(|bytes| bytes > 0 && bytes <= length);
    Ok(is_whole.then_some(length))
}

impl Place {
    /// Has the image made by a process of its own, which goes on when this one ends.
    pub fn make_in_background(self) {
        let run = move || match self.command().output() {
            Ok(output) if output.status.success() => {}
            Ok(output) => {
                let said = String::from_utf8_lossy(&output.stderr);
                log::warn!("no image of {}: {}", self.dir.display(), said.trim());
            }
            Err(error) => log::warn!("no image of {}: starting its maker: {error}", self.dir.display()),
        };
        // Only waits, and is no reason for the process to stay.
        if let Err(error) = std::thread::Builder::new().name("image".into()).stack_size(64 << 10).spawn(run) {
            log::warn!("no image: {error}");
        }
    }

    fn command(&self) -> Command {
        use std::os::unix::process::CommandExt;

        let program = std::env::current_exe().unwrap_or_else(|_| "/proc/self/exe".into());
        let mut command = Command::new(program);
        command
            .arg(maker::ACTION)
            .args([self.images.size_limit_bytes, self.images.free_bytes].map(|bytes| bytes.to_string()))
            .args([&self.cache_dir, &self.file()])
            .arg(self.lower.join(":"))
            .env_clear()
            .env("PATH", search_path())
            .current_dir("/")
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::piped())
            .process_group(0);
        command
    }
}

#[cfg(test)]
mod tests;
