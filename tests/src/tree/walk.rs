//! Everything a tree of files holds. Programs in containers have this file too.

use std::{
    collections::{BTreeMap, HashMap},
    ffi::{CString, OsString},
    fs::{self, File},
    hash::{DefaultHasher, Hasher},
    io::Read,
    os::unix::{ffi::OsStrExt, ffi::OsStringExt, fs::FileTypeExt, fs::MetadataExt},
    path::Path,
};

use anyhow::{Context, Result, bail};

/// What there is to know of a file, but for inode numbers, blocks, and the times of access and change.
#[derive(Debug, PartialEq, Eq)]
pub struct Entry {
    mode: u32,
    owner: (u32, u32),
    /// Number of a device.
    device: u64,
    /// Of a directory it is the file system's own matter.
    size: u64,
    modified: (i64, i64),
    /// Where a link leads.
    target: OsString,
    /// The first path of the same file, where there are several.
    same_as: Option<OsString>,
    attributes: BTreeMap<Vec<u8>, Vec<u8>>,
    /// A digest of it.
    content: u64,
}

/// All files below `root` that are of its file system, by their paths from there; the root's is empty.
///
/// # Errors
/// When something cannot be read.
pub fn walk(root: &Path) -> Result<BTreeMap<OsString, Entry>> {
    let mut found = BTreeMap::new();
    let mut seen = HashMap::new();
    let mut todo = vec![OsString::new()];
    let device = fs::metadata(root).with_context(|| format!("{}", root.display()))?.dev();
    while let Some(path) = todo.pop() {
        let at = root.join(&path);
        let metadata = fs::symlink_metadata(&at).with_context(|| format!("{}", at.display()))?;
        let kind = metadata.file_type();
        if kind.is_dir() && metadata.dev() != device {
            continue;
        }
        if kind.is_dir() {
            let mut names =
                fs::read_dir(&at)?.map(|entry| Ok(entry?.file_name())).collect::<Result<Vec<_>>>()?;
            // The first path of a file is the same one in every tree.
            names.sort_by(|a, b| b.cmp(a));
            todo.extend(names.iter().map(|name| Path::new(&path).join(name).into_os_string()));
        }
        let same_as = match metadata.nlink() {
            2.. if !kind.is_dir() => {
                Some(seen.entry((metadata.dev(), metadata.ino())).or_insert_with(|| path.clone()).clone())
            }
            _ => None,
        };
        let is_device = kind.is_char_device() || kind.is_block_device();
        let entry = Entry {
            mode: metadata.mode(),
            owner: (metadata.uid(), metadata.gid()),
            device: if is_device { metadata.rdev() } else { 0 },
            size: if kind.is_dir() { 0 } else { metadata.size() },
            modified: (metadata.mtime(), metadata.mtime_nsec()),
            target: if kind.is_symlink() { fs::read_link(&at)?.into_os_string() } else { OsString::new() },
            same_as,
            attributes: attributes(&at)?,
            content: if kind.is_file() { digest(&at)? } else { 0 },
        };
        found.insert(path, entry);
    }
    Ok(found)
}

fn digest(path: &Path) -> Result<u64> {
    let (mut file, mut hasher) = (File::open(path)?, DefaultHasher::new());
    let mut block = vec![0; 256 << 10];
    loop {
        match file.read(&mut block)? {
            0 => return Ok(hasher.finish()),
            read => hasher.write(&block[..read]),
        }
    }
}

fn attributes(path: &Path) -> Result<BTreeMap<Vec<u8>, Vec<u8>>> {
    let c_path = CString::new(path.as_os_str().as_bytes())?;
    let mut names = vec![0_u8; 64 << 10];
    // SAFETY: the path ends with a NUL, and the buffer is as long as is said.
    let length = unsafe { libc::llistxattr(c_path.as_ptr(), names.as_mut_ptr().cast(), names.len()) };
    let Ok(length) = usize::try_from(length) else {
        let error = std::io::Error::last_os_error();
        if error.raw_os_error() == Some(libc::ENOTSUP) {
            return Ok(BTreeMap::new());
        }
        bail!("attributes of {}: {error}", path.display());
    };
    names.truncate(length);
    let mut found = BTreeMap::new();
    for name in names.split(|byte| *byte == 0).filter(|name| !name.is_empty()) {
        let c_name = CString::new(name)?;
        let mut value = vec![0_u8; 64 << 10];
        // SAFETY: as above.
        let length = unsafe {
            libc::lgetxattr(c_path.as_ptr(), c_name.as_ptr(), value.as_mut_ptr().cast(), value.len())
        };
        let length = usize::try_from(length).with_context(|| {
            format!("{} of {}", OsString::from_vec(name.to_vec()).display(), path.display())
        })?;
        value.truncate(length);
        found.insert(name.to_vec(), value);
    }
    Ok(found)
}
