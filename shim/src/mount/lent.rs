//! Files of the host that somebody may read and nothing else.

use std::{fs::File, io, os::fd::AsRawFd, path::Path};

use super::{Tree, attributes};

/// Opens what `path` leads to for reading, for somebody who may be an enemy. In his `/proc` a descriptor is a name by which he opens the file
/// again as he likes, empties it, or changes its mode, owner and attributes, as far as its owner and mode let him. Not this one: it is of a
/// mount of its own, at no place, that is read-only and knows no devices.
pub fn lend(path: &Path) -> io::Result<File> {
    let tree = Tree::of(path, false)?;
    let file = File::open(format!("/proc/self/fd/{}", tree.as_raw_fd()))?;
    // A device is not written to by way of its mount; it cannot be opened a second time here.
    let all = libc::MOUNT_ATTR_RDONLY | libc::MOUNT_ATTR_NODEV | libc::MOUNT_ATTR_NOEXEC;
    tree.set(&attributes((all, 0), libc::MS_PRIVATE), false)?;
    Ok(file)
}

#[cfg(test)]
mod tests {
    use std::{
        ffi::CString,
        fs::{self, OpenOptions, Permissions},
        os::unix::{
            ffi::OsStrExt,
            fs::{OpenOptionsExt, PermissionsExt, chown},
        },
    };

    use super::*;

    type Attempt = (&'static str, fn(&Path) -> io::Result<()>);

    /// What a name of a file is good for.
    const ATTEMPTS: [Attempt; 7] = [
        ("it is read", |path| fs::read(path).map(drop)),
        ("it is opened for writing", |path| OpenOptions::new().write(true).open(path).map(drop)),
        // For Landlock it is no writing.
        ("it is emptied as it is opened for reading", |path| {
            OpenOptions::new().read(true).custom_flags(libc::O_TRUNC).open(path).map(drop)
        }),
        ("its mode is changed", |path| fs::set_permissions(path, Permissions::from_mode(0o666))),
        ("its owner is changed", |path| chown(path, Some(7), Some(7))),
        ("its times are changed", |path| {
            let path = CString::new(path.as_os_str().as_bytes())?;
            // SAFETY: a C string, and no times: now.
            let set = unsafe { libc::utimensat(libc::AT_FDCWD, path.as_ptr(), std::ptr::null(), 0) };
            if set == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
        }),
        ("it is given an attribute", |path| {
            let path = CString::new(path.as_os_str().as_bytes())?;
            let (name, value) = (c"security.x", c"x".as_ptr().cast());
            // SAFETY: C strings, and a value of the length given.
            let set = unsafe { libc::setxattr(path.as_ptr(), name.as_ptr(), value, 1, 0) };
            if set == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
        }),
    ];

    #[test]
    fn what_is_lent_is_read_and_nothing_else() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("file");
        let done = |file: &File| {
            let name = format!("/proc/self/fd/{}", file.as_raw_fd());
            ATTEMPTS.map(|(what, attempt)| {
                (what, attempt(Path::new(&name)).map_err(|error| error.raw_os_error()))
            })
        };
        fs::write(&path, "content").unwrap();
        let (lent, link) = (lend(&path).unwrap(), dir.path().join("link"));
        std::os::unix::fs::symlink("file", &link).unwrap();
        for file in [&lent, &lend(&link).unwrap()] {
            let [read, others @ ..] = done(file);
            assert_eq!(read.1, Ok(()));
            assert!(others.iter().all(|(_, done)| *done == Err(Some(libc::EROFS))), "{others:?}");
            assert_eq!(io::read_to_string(file).unwrap(), "content");
        }
        assert_eq!(fs::metadata(&path).unwrap().len(), 7);
        // Without it all of them can be done, and whoever has lent it can go on.
        let all = done(&File::open(&path).unwrap());
        assert!(all.iter().all(|(_, done)| done.is_ok()), "{all:?}");
        fs::write(&path, "more").unwrap();
    }

    #[test]
    fn what_is_not_there_is_not_lent() {
        let error = lend(Path::new("/nowhere/at/all")).unwrap_err();
        assert_eq!(error.raw_os_error(), Some(libc::ENOENT));
    }
}
