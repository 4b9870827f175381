//! Files of ours in directories where somebody may have put something before us: a link there leads nowhere.

use std::{
    fs::{self, File, OpenOptions},
    io::{self, Write},
    os::unix::fs::{MetadataExt, OpenOptionsExt},
    path::Path,
};

use nix::unistd::geteuid;

/// Makes a file that only its owner may open, in the place of whatever is at `path`.
pub fn create(path: &Path) -> io::Result<File> {
    match fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    // Fails where a link was put there in between.
    OpenOptions::new().write(true).create_new(true).mode(0o600).open(path)
}

/// The same with `content`.
pub fn write(path: &Path, content: impl AsRef<[u8]>) -> io::Result<()> {
    create(path)?.write_all(content.as_ref())
}

/// Opens a file for reading that is this user's and there by no other name.
pub fn open(path: &Path) -> io::Result<File> {
    let file = OpenOptions::new().read(true).custom_flags(libc::O_NOFOLLOW | libc::O_NONBLOCK).open(path)?;
    let found = file.metadata()?;
    if found.is_file() && found.nlink() == 1 && found.uid() == geteuid().as_raw() {
        return Ok(file);
    }
    Err(io::Error::new(io::ErrorKind::PermissionDenied, "is not a file of this user's alone"))
}

/// Whether there is a directory of this user's at `path`, and not a link to one.
pub fn is_own_dir(path: &Path) -> bool {
    fs::symlink_metadata(path).is_ok_and(|found| found.is_dir() && found.uid() == geteuid().as_raw())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn links_lead_nowhere() {
        let dir = tempfile::tempdir().unwrap();
        let at = |name: &str| dir.path().join(name);
        fs::write(at("victim"), "precious").unwrap();
        std::os::unix::fs::symlink(at("victim"), at("soft")).unwrap();
        fs::hard_link(at("victim"), at("hard")).unwrap();
        for name in ["soft", "hard"] {
            assert!(open(&at(name)).is_err(), "{name}");
            write(&at(name), "mine").unwrap();
            assert_eq!(fs::read_to_string(at(name)).unwrap(), "mine");
            assert!(open(&at(name)).is_ok(), "{name}");
        }
        assert_eq!(fs::read_to_string(at("victim")).unwrap(), "precious");
        std::os::unix::fs::symlink(dir.path(), at("dir")).unwrap();
        assert!(!is_own_dir(&at("dir")) && !is_own_dir(&at("victim")) && is_own_dir(dir.path()));
        assert!(create(dir.path()).is_err());
    }
}
