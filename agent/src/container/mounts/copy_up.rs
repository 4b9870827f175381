//! `tmpcopyup`: a new tmpfs that begins with what it covers.

use std::{
    ffi::CStr,
    fs::File,
    os::fd::{AsFd, BorrowedFd},
};

use nix::{
    dir::Dir,
    errno::Errno,
    fcntl::{AtFlags, OFlag, openat, readlinkat},
    sys::{
        stat::{
            FchmodatFlags, FileStat, Mode, SFlag, UtimensatFlags, fchmodat, fstatat, mkdirat, mknodat,
            utimensat,
        },
        time::TimeSpec,
    },
    unistd::{Gid, Uid, fchownat, symlinkat},
};

/// Copies what is in the directory `from` to the empty directory `to`, with
/// owners, modes and times. No link is followed. The file creation mask must be 0.
pub(super) fn copy(from: impl AsFd, to: impl AsFd) -> std::io::Result<()> {
    copy_dir(from.as_fd(), to.as_fd())
}

fn copy_dir(from: BorrowedFd<'_>, to: BorrowedFd<'_>) -> std::io::Result<()> {
    let flags = OFlag::O_RDONLY | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC;
    let mut dir = Dir::openat(from, ".", flags, Mode::empty())?;
    let entries: Vec<_> = dir.iter().collect::<Result<_, _>>()?;
    for entry in entries {
        let name = entry.file_name();
        if name != c"." && name != c".." {
            copy_entry(dir.as_fd(), to, name)?;
        }
    }
    Ok(())
}

fn copy_entry(from: BorrowedFd<'_>, to: BorrowedFd<'_>, name: &CStr) -> std::io::Result<()> {
    let stat = fstatat(from, name, AtFlags::AT_SYMLINK_NOFOLLOW)?;
    let kind = SFlag::from_bits_truncate(stat.st_mode & SFlag::S_IFMT.bits());
    let open = |dir, flags| {
        openat(dir, name, flags | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC, Mode::from_bits_truncate(0o600))
    };
    match kind {
        SFlag::S_IFDIR => {
            mkdirat(to, name, Mode::S_IRWXU)?;
            let flags = OFlag::O_RDONLY | OFlag::O_DIRECTORY;
            copy_dir(open(from, flags)?.as_fd(), open(to, flags)?.as_fd())?;
        }
        SFlag::S_IFREG => {
            let mut source = File::from(open(from, OFlag::O_RDONLY)?);
            let mut target = File::from(open(to, OFlag::O_WRONLY | OFlag::O_CREAT | OFlag::O_EXCL)?);
            std::io::copy(&mut source, &mut target)?;
        }
        SFlag::S_IFLNK => symlinkat(readlinkat(from, name)?.as_os_str(), to, name)?,
        _ => mknodat(to, name, kind, Mode::S_IRUSR | Mode::S_IWUSR, stat.st_rdev)?,
    }
    Ok(copy_attributes(to, name, &stat, kind)?)
}

fn copy_attributes(dir: BorrowedFd<'_>, name: &CStr, stat: &FileStat, kind: SFlag) -> Result<(), Errno> {
    let (owner, group) = (Uid::from_raw(stat.st_uid), Gid::from_raw(stat.st_gid));
    fchownat(dir, name, Some(owner), Some(group), AtFlags::AT_SYMLINK_NOFOLLOW)?;
    // After the owner, whose change takes set-user-id away.
    if kind != SFlag::S_IFLNK {
        let mode = Mode::from_bits_truncate(stat.st_mode & 0o7777);
        fchmodat(dir, name, mode, FchmodatFlags::FollowSymlink)?;
    }
    let atime = TimeSpec::new(stat.st_atime, stat.st_atime_nsec);
    let mtime = TimeSpec::new(stat.st_mtime, stat.st_mtime_nsec);
    utimensat(dir, name, &atime, &mtime, UtimensatFlags::NoFollowSymlink)
}

#[cfg(test)]
mod tests {
    use std::{
        fs,
        os::unix::fs::{MetadataExt, PermissionsExt, symlink},
    };

    use super::*;

    #[test]
    fn a_tree_is_copied_with_its_attributes() {
        let dir = tempfile::tempdir().unwrap();
        let (from, to) = (dir.path().join("from"), dir.path().join("to"));
        fs::create_dir_all(from.join("sub/deep")).unwrap();
        fs::create_dir(&to).unwrap();
        fs::write(from.join("sub/file"), "content").unwrap();
        fs::set_permissions(from.join("sub/file"), PermissionsExt::from_mode(0o4750)).unwrap();
        fs::set_permissions(from.join("sub"), PermissionsExt::from_mode(0o1555)).unwrap();
        symlink("/nowhere", from.join("link")).unwrap();
        nix::unistd::mkfifo(&from.join("fifo"), Mode::S_IRUSR).unwrap();
        copy(File::open(&from).unwrap(), File::open(&to).unwrap()).unwrap();
        assert_eq!(fs::read_to_string(to.join("sub/file")).unwrap(), "content");
        assert_eq!(fs::read_link(to.join("link")).unwrap().to_str(), Some("/nowhere"));
        for name in ["sub", "sub/file", "sub/deep", "fifo", "link"] {
            let [a, b] = [&from, &to].map(|root| fs::symlink_metadata(root.join(name)).unwrap());
            assert_eq!(
                (a.mode(), a.uid(), a.mtime(), a.mtime_nsec()),
                (b.mode(), b.uid(), b.mtime(), b.mtime_nsec()),
                "{name}"
            );
        }
    }
}
