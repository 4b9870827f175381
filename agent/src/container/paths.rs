//! Paths inside a root file system that may hold any symbolic link.
//!
//! Links are followed as if the root file system were the whole world: `..` at
//! its root stays there, an absolute target starts there. Every lookup is made
//! by the kernel with no link followed (openat2(2)), so a link put in the way
//! meanwhile makes the lookup fail, not escape.

use std::{
    collections::VecDeque,
    ffi::{OsStr, OsString},
    os::{
        fd::{AsFd, BorrowedFd, OwnedFd},
        unix::ffi::OsStrExt,
    },
    path::{Path, PathBuf},
};

use nix::{
    errno::Errno,
    fcntl::{OFlag, OpenHow, ResolveFlag, open, openat, openat2, readlinkat},
    sys::stat::{Mode, SFlag, fstat, mkdirat},
};

/// Links followed in one lookup, as many as the kernel follows.
const MAX_LINKS: usize = 40;

/// A root file system.
#[derive(Debug)]
pub struct Root(OwnedFd);

/// What to make where a path does not lead anywhere.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Missing {
    /// Nothing: that is an error.
    Fail,
    /// A directory.
    MakeDir,
    /// An empty file; directories above it.
    MakeFile,
    /// Nothing; the rest of the path is taken as it is.
    Keep,
}

/// A place in a root file system.
#[derive(Debug)]
pub struct Place {
    /// What is there.
    pub fd: OwnedFd,
    /// How the container names it: absolute, no component a symbolic link.
    pub path: PathBuf,
}

impl Root {
    /// The tree below `path`.
    pub fn open(path: &Path) -> nix::Result<Self> {
        let flags = OFlag::O_PATH | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC;
        open(path, flags, Mode::empty()).map(Self)
    }

    /// What `path` leads to.
    pub fn find(&self, path: &Path) -> nix::Result<OwnedFd> {
        let here = self.walk(path, Missing::Fail)?;
        self.open_without_links(&here, OFlag::O_PATH)
    }

    /// Where `path` leads, whether anything is there or not.
    pub fn resolve(&self, path: &Path) -> nix::Result<PathBuf> {
        Ok(Path::new("/").join(self.walk(path, Missing::Keep)?))
    }

    /// The directory `path` leads to, made with mode 0755 where it does not
    /// exist, like those above it.
    pub fn make_dir(&self, path: &Path) -> nix::Result<OwnedFd> {
        self.make_dir_place(path).map(|place| place.fd)
    }

    /// As [`Root::make_dir`], with where that is.
    pub fn make_dir_place(&self, path: &Path) -> nix::Result<Place> {
        let place = self.place(path, Missing::MakeDir)?;
        if kind(&place.fd)? == SFlag::S_IFDIR { Ok(place) } else { Err(Errno::ENOTDIR) }
    }

    /// The file `path` leads to, made empty where it does not exist.
    pub fn make_file(&self, path: &Path) -> nix::Result<OwnedFd> {
        self.make_file_place(path).map(|place| place.fd)
    }

    /// As [`Root::make_file`], with where that is.
    pub fn make_file_place(&self, path: &Path) -> nix::Result<Place> {
        let place = self.place(path, Missing::MakeFile)?;
        if kind(&place.fd)? == SFlag::S_IFDIR { Err(Errno::EISDIR) } else { Ok(place) }
    }

    fn place(&self, path: &Path, missing: Missing) -> nix::Result<Place> {
        let here = self.walk(path, missing)?;
        let fd = self.open_without_links(&here, OFlag::O_PATH)?;
        Ok(Place { fd, path: Path::new("/").join(here) })
    }

    /// The directory that holds the last component of `path`, and that component.
    pub fn make_parent(&self, path: &Path) -> nix::Result<(OwnedFd, OsString)> {
        let name = path.file_name().ok_or(Errno::EINVAL)?;
        let parent = self.make_dir(path.parent().unwrap_or(Path::new("/")))?;
        Ok((parent, name.to_owned()))
    }

    /// The path below the root, without links, that `path` leads to.
    fn walk(&self, path: &Path, missing: Missing) -> nix::Result<PathBuf> {
        let mut ahead: VecDeque<OsString> = parts(path);
        // Where we are: no component of it is a link.
        let mut here = PathBuf::new();
        let mut links = 0;
        while let Some(name) = ahead.pop_front() {
            if name == ".." {
                here.pop();
                continue;
            }
            let next = here.join(&name);
            let found = match self.open_without_links(&next, OFlag::O_PATH | OFlag::O_NOFOLLOW) {
                Err(Errno::ENOENT | Errno::ENOTDIR) if missing == Missing::Keep => {
                    here = next;
                    continue;
                }
                Err(Errno::ENOENT) if missing != Missing::Fail => {
                    let file = missing == Missing::MakeFile && ahead.is_empty();
                    self.make(&here, &name, file)?;
                    here = next;
                    continue;
                }
                found => found?,
            };
            if kind(&found)? != SFlag::S_IFLNK {
                here = next;
                continue;
            }
            links += 1;
            if links > MAX_LINKS {
                return Err(Errno::ELOOP);
            }
            let target = PathBuf::from(readlinkat(&found, "")?);
            if target.is_absolute() {
                here = PathBuf::new();
            }
            for part in parts(&target).into_iter().rev() {
                ahead.push_front(part);
            }
        }
        Ok(here)
    }

    fn make(&self, parent: &Path, name: &OsStr, file: bool) -> nix::Result<()> {
        let parent = self.open_without_links(parent, OFlag::O_PATH | OFlag::O_DIRECTORY)?;
        if file {
            let flags = OFlag::O_CREAT | OFlag::O_EXCL | OFlag::O_WRONLY | OFlag::O_CLOEXEC;
            openat(&parent, name, flags, Mode::from_bits_truncate(0o644)).map(drop)
        } else {
            mkdirat(&parent, name, Mode::from_bits_truncate(0o755))
        }
    }

    fn open_without_links(&self, path: &Path, flags: OFlag) -> nix::Result<OwnedFd> {
        let path = if path.as_os_str().is_empty() { Path::new(".") } else { path };
        let resolve = ResolveFlag::RESOLVE_IN_ROOT | ResolveFlag::RESOLVE_NO_SYMLINKS;
        openat2(&self.0, path, OpenHow::new().flags(flags | OFlag::O_CLOEXEC).resolve(resolve))
    }
}

impl AsFd for Root {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

/// The components of a path without `/`, empty ones and `.`.
fn parts(path: &Path) -> VecDeque<OsString> {
    path.as_os_str()
        .as_bytes()
        .split(|byte| *byte == b'/')
        .filter(|part| !part.is_empty() && *part != b".")
        .map(|part| OsStr::from_bytes(part).to_owned())
        .collect()
}

/// A path as the container sees it, without `..`, `.`, and double slashes.
/// Purely textual: good for comparing what a spec says, not for looking it up.
pub fn clean(path: &str) -> PathBuf {
    let mut clean = PathBuf::from("/");
    for part in parts(Path::new(path)) {
        if part == ".." {
            clean.pop();
        } else {
            clean.push(part);
        }
    }
    clean
}

/// The file type of what a descriptor refers to.
pub fn kind(fd: impl AsFd) -> nix::Result<SFlag> {
    Ok(SFlag::from_bits_truncate(fstat(fd)?.st_mode & SFlag::S_IFMT.bits()))
}

#[cfg(test)]
mod tests {
    use std::{fs, os::unix::fs::symlink};

    use super::*;

    fn root() -> (tempfile::TempDir, PathBuf, Root) {
        let outside = tempfile::tempdir().unwrap();
        let inside = outside.path().join("rootfs");
        fs::create_dir_all(inside.join("etc")).unwrap();
        fs::write(outside.path().join("secret"), "outside").unwrap();
        let root = Root::open(&inside).unwrap();
        (outside, inside, root)
    }

    #[test]
    fn links_cannot_lead_out() {
        let (outside, inside, root) = root();
        symlink(outside.path(), inside.join("absolute")).unwrap();
        symlink("../../../../..", inside.join("etc/up")).unwrap();
        symlink("/proc/self/root", inside.join("magic")).unwrap();

        // Each is made inside the root instead of found outside.
        root.make_dir(Path::new("/absolute/made")).unwrap();
        assert!(!outside.path().join("made").exists());
        let below = outside.path().strip_prefix("/").unwrap();
        assert!(inside.join(below).join("made").is_dir());

        root.make_file(Path::new("/etc/up/file")).unwrap();
        assert!(inside.join("file").is_file());

        assert_eq!(root.resolve(Path::new("/magic/../up/tmp")).unwrap(), Path::new("/proc/self/up/tmp"));
        root.make_dir(Path::new("/magic/tmp")).unwrap();
        assert!(inside.join("proc/self/root/tmp").is_dir());

        assert_eq!(root.find(Path::new("../secret")).unwrap_err(), Errno::ENOENT);
        assert_eq!(root.find(Path::new("/absolute/secret")).unwrap_err(), Errno::ENOENT);
    }

    #[test]
    fn links_within_are_followed_even_dangling_ones() {
        let (_outside, inside, root) = root();
        fs::create_dir(inside.join("run")).unwrap();
        fs::create_dir(inside.join("var")).unwrap();
        symlink("../run", inside.join("var/run")).unwrap();
        symlink("/data/store", inside.join("var/lib")).unwrap();
        root.make_dir(Path::new("/var/run/app")).unwrap();
        assert!(inside.join("run/app").is_dir());
        root.make_file(Path::new("/var/lib/db")).unwrap();
        assert!(inside.join("data/store/db").is_file());
    }

    #[test]
    fn loops_and_wrong_kinds_are_errors() {
        let (_outside, inside, root) = root();
        symlink("b", inside.join("a")).unwrap();
        symlink("a", inside.join("b")).unwrap();
        fs::write(inside.join("file"), "").unwrap();
        assert_eq!(root.make_dir(Path::new("/a/x")).unwrap_err(), Errno::ELOOP);
        assert_eq!(root.make_dir(Path::new("/file")).unwrap_err(), Errno::ENOTDIR);
        assert_eq!(root.make_dir(Path::new("/file/below")).unwrap_err(), Errno::ENOTDIR);
        assert_eq!(root.make_file(Path::new("/etc")).unwrap_err(), Errno::EISDIR);
    }

    #[test]
    fn cleaned_paths_compare() {
        for (path, expected) in
            [("/dev/", "/dev"), ("//dev/./x/..", "/dev"), ("../../etc", "/etc"), ("", "/"), ("a//b", "/a/b")]
        {
            assert_eq!(clean(path), Path::new(expected), "{path}");
        }
    }
}
