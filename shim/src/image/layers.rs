//! Layers that are EROFS files of containerd's EROFS snapshotter.

use std::{
    fs::{File, OpenOptions},
    io,
    os::unix::fs::{MetadataExt, OpenOptionsExt},
    path::{Path, PathBuf},
};

use nix::sys::statfs::{FsType, statfs};
use sha2::{Digest, Sha256};

use super::{Blob, Image, Origin, verity::Verity, whole};
use crate::{
    config::Images,
    own_file,
    rootfs::{
        Access, Layer, RootfsError, Step, is_empty_dir, is_no_matter, plan,
        stack::{ErofsFile, Mounts, read},
        unescape,
    },
};

/// What the snapshotter calls a layer's file, beside the directory where it mounts it.
const FILE_NAME: &str = "layer.erofs";
const MOUNTED_AT: &str = "fs";
/// `EROFS_SUPER_MAGIC_V1` of linux/magic.h.
const EROFS_MAGIC: FsType = FsType(0xe0f5_e1e2);

/// What a file is to an image. One that is a device of an image, or is checked as it is read, cannot be mounted beside
/// it as what it is itself, so it has another name.
#[derive(Clone, Copy)]
enum Part<'a> {
    Itself,
    Device,
    /// By its root hash.
    Checked(&'a str),
}

/// The files that containerd 2.2 and later names; none where it names none, or where the host's kernel has to put
/// them together.
pub(super) fn of_stack(layers: &[Layer], images: &Images) -> Result<Option<Vec<Image>>, RootfsError> {
    let Mounts::Stack(stack) = read(layers)? else { return Ok(None) };
    if let [Step::Stack { written: true, .. }] =
        plan(layers, Path::new(""), Access::ReadOnly, is_empty_dir)?.as_slice()
    {
        return Ok(None);
    }
    stack.lower.iter().map(|file| image(file, images)).collect::<Result<_, _>>().map(Some)
}

fn image(file: &ErofsFile, images: &Images) -> Result<Image, RootfsError> {
    let index = file.index;
    let wrong = |field: &'static str, path: &Path, problem: String| RootfsError::Layer {
        index,
        field,
        problem: format!("{}: {problem}", path.display()),
    };
    let mut blobs = Vec::new();
    let source = open(&file.source).map_err(|error| wrong("source", &file.source, error.to_string()))?;
    match whole(&source) {
        Ok(Some(_)) => {}
        Ok(None) => return Err(wrong("source", &file.source, "is no whole EROFS file system".into())),
        Err(error) => return Err(wrong("source", &file.source, error.to_string())),
    }
    let verity = match &file.verity {
        Some(metadata) => {
            let read = Verity::read(metadata, &source);
            Some(read.map_err(|problem| wrong("options", metadata, format!("dm-verity: {problem}")))?)
        }
        None => None,
    };
    let part = verity.as_ref().map_or(Part::Itself, |verity| Part::Checked(&verity.root_hash));
    let made = blob(&file.source, &source, part, images);
    blobs.push(made.map_err(|error| wrong("source", &file.source, error.to_string()))?);
    for path in &file.devices {
        let made = open(path).and_then(|opened| blob(path, &opened, Part::Device, images));
        blobs.push(made.map_err(|error| wrong("options", path, format!("device=: {error}")))?);
    }
    Ok(Image { blobs, verity, origin: Origin::Mount(index), shared: false })
}

/// Opens a file of the client's. It may be a link: the snapshotter has some to layers that others keep.
fn open(path: &Path) -> io::Result<File> {
    let file = OpenOptions::new().read(true).custom_flags(libc::O_NONBLOCK).open(path)?;
    match file.metadata()? {
        found if !found.is_file() => Err(io::Error::other("must be a regular file")),
        found if found.len() == 0 => Err(io::Error::other("is empty")),
        _ => Ok(file),
    }
}

fn blob(path: &Path, file: &File, part: Part<'_>, images: &Images) -> io::Result<Blob> {
    let found = file.metadata()?;
    // Nothing that the maker's hashes begin with.
    let kind = match part {
        Part::Itself => b'l',
        Part::Device => b'd',
        Part::Checked(_) => b'v',
    };
    let mut hash = Sha256::new_with_prefix([kind]);
    if let Part::Checked(root_hash) = part {
        hash.update(root_hash);
    }
    hash.update(found.dev().to_le_bytes());
    hash.update(found.ino().to_le_bytes());
    hash.update(path.as_os_str().as_encoded_bytes());
    Ok(Blob::new(path.to_owned(), super::serial(&super::short(hash)), found.len(), images))
}

/// The files behind layers that containerd 2.1 has mounted itself, at `fs` beside each; none where not all are such.
pub(super) fn mounted(layers: &[Layer], images: &Images) -> Option<Vec<Image>> {
    let [layer] = layers else { return None };
    if layer.kind != "overlay" {
        return None;
    }
    let dirs = match plan(layers, Path::new(""), Access::ReadOnly, is_empty_dir).ok()?.pop()? {
        Step::Overlay { written: None, lower, idmap: None, options }
            if options.iter().all(|option| is_no_matter(option)) =>
        {
            lower
        }
        // One layer is no overlay.
        Step::Bind { source, idmap: None } => vec![crate::rootfs::escape(source.to_str()?)],
        _ => return None,
    };
    let image_at = |dir: &String| {
        let at = PathBuf::from(unescape(dir));
        let snapshot = at.parent()?;
        if !at.is_absolute() || at.file_name()? != MOUNTED_AT || !own_file::is_own_dir(snapshot) {
            return None;
        }
        let source = snapshot.join(FILE_NAME);
        let is_mounted = || statfs(&at).is_ok_and(|found| found.filesystem_type() == EROFS_MAGIC);
        if !source.exists() || !is_mounted() {
            return None;
        }
        let file = ErofsFile { index: 0, source, devices: Vec::new(), verity: None };
        image(&file, images).inspect_err(|error| log::warn!("{error}")).ok()
    };
    dirs.iter().map(image_at).collect()
}
