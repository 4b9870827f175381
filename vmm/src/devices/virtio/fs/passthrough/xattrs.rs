//! Extended attributes: which of them a guest sees and may change, and under
//! which names the host keeps them.
//!
//! `trusted.*` means something to the host, to its overlays above all, and nobody
//! but the host's root sets it, which the monitor is not. So those a guest sets on
//! a volume are kept as `user.rvm.guest.*`, and those the host has there are not
//! the guest's to see: an OverlayFS of the guest may have its upper directory on a
//! volume, and none of the host's is deceived. Only files and directories can have
//! them.

use std::borrow::Cow;
use std::ffi::{CStr, CString};
use std::io;
use std::os::fd::AsFd;

use super::inodes::Inode;
use super::nodes;
use super::sys::{self, Fd};

/// Bytes of one extended attribute, and of the list of their names (`XATTR_SIZE_MAX`).
const MAX_BYTES: u32 = 64 << 10;
/// Longest name (`XATTR_NAME_MAX`).
const MAX_NAME_BYTES: usize = 255;
/// Names only the host's root can set.
const TRUSTED: &[u8] = b"trusted.";
/// What the host keeps a guest's `trusted.` as.
const OF_GUEST: &[u8] = b"user.rvm.guest.";
/// All our names, which a guest neither sees nor sets.
const OURS: &[u8] = b"user.rvm.";
/// From where OverlayFS has copied up a file: it gives it the same inode number again.
const ORIGIN: &CStr = c"trusted.overlay.origin";
/// What programs can do beyond their user's rights; asked for at every execve.
const CAPABILITY: &CStr = c"security.capability";

/// What a request for attributes is answered with.
pub(super) enum Found {
    /// Only the length was asked for; it may be larger than what will come.
    Len(u32),
    Bytes(Vec<u8>),
}

fn errno<T>(number: i32) -> io::Result<T> {
    Err(io::Error::from_raw_os_error(number))
}

/// The attributes a guest may change: its users' and its root's, capabilities of
/// executables, ACLs. The rest (labels of the host's security modules) means
/// something to the host.
fn changeable(name: &CStr) -> io::Result<Cow<'_, CStr>> {
    const WHOLE: [&CStr; 3] = [CAPABILITY, c"system.posix_acl_access", c"system.posix_acl_default"];
    let bytes = name.to_bytes();
    if bytes.starts_with(TRUSTED) {
        of_guest(name)
    } else if bytes.starts_with(b"user.") && !bytes.starts_with(OURS) || WHOLE.contains(&name) {
        Ok(Cow::Borrowed(name))
    } else {
        errno(libc::EPERM)
    }
}

/// The name the host keeps one of a guest's `trusted.*` under.
fn of_guest(name: &CStr) -> io::Result<Cow<'_, CStr>> {
    let rest = name.to_bytes().get(TRUSTED.len()..).unwrap_or_default();
    let kept = [OF_GUEST, rest].concat();
    if kept.len() > MAX_NAME_BYTES {
        return errno(libc::ERANGE);
    }
    Ok(Cow::Owned(CString::new(kept)?))
}

/// A list of names, each ended by a NUL, as the guest sees it. Nobody changes
/// what is immutable, so its `trusted.*` are the image's own.
fn seen(names: &[u8], immutable: bool, device: bool) -> Vec<u8> {
    let mut list = Vec::with_capacity(names.len());
    for name in names.split_inclusive(|byte| *byte == 0) {
        match name.strip_prefix(OF_GUEST) {
            _ if device && name == nodes::ATTRIBUTE.to_bytes_with_nul() => {}
            Some(rest) if !immutable => list.extend([TRUSTED, rest].concat()),
            _ if name.starts_with(OURS) => {}
            _ if name.starts_with(TRUSTED) && !immutable => {}
            _ => list.extend(name),
        }
    }
    list
}

/// The value of one; `fd` gives a descriptor that stands for the file, where one is needed.
pub(super) fn get<'a>(
    inode: &Inode,
    fd: impl FnOnce() -> io::Result<Fd<'a>>,
    name: &CStr,
    size: u32,
) -> io::Result<Found> {
    let bytes = name.to_bytes();
    if inode.is_device() && name == nodes::ATTRIBUTE {
        return errno(libc::ENODATA);
    }
    let asked = if !inode.is_immutable() && bytes.starts_with(TRUSTED) {
        of_guest(name)?
    } else if bytes.starts_with(b"trusted.overlay.") || bytes.starts_with(OURS) {
        // Marks of the host's overlays are not for the guest's, which asks for
        // one with every file it looks up.
        return errno(libc::ENODATA);
    } else {
        Cow::Borrowed(name)
    };
    let of_execve = inode.is_immutable() && name == CAPABILITY;
    if of_execve && inode.lacks_capability() {
        return errno(libc::ENODATA);
    }
    let mut value = vec![0; size.min(MAX_BYTES) as usize];
    match sys::get_xattr(fd()?.as_fd(), &asked, &mut value) {
        Ok(len) if size == 0 => Ok(Found::Len(len as u32)),
        Ok(len) => {
            value.truncate(len);
            Ok(Found::Bytes(value))
        }
        Err(error) => {
            if of_execve && error.raw_os_error() == Some(libc::ENODATA) {
                inode.note_no_capability();
            }
            Err(error)
        }
    }
}

pub(super) fn list<'a>(
    inode: &Inode,
    fd: impl FnOnce() -> io::Result<Fd<'a>>,
    size: u32,
) -> io::Result<Found> {
    let mut names = vec![0; size.min(MAX_BYTES) as usize];
    let len = sys::list_xattr(fd()?.as_fd(), &mut names)?;
    if size == 0 {
        return Ok(Found::Len(len as u32));
    }
    names.truncate(len);
    Ok(Found::Bytes(seen(&names, inode.is_immutable(), inode.is_device())))
}

pub(super) fn set<'a>(
    inode: &Inode,
    fd: impl FnOnce() -> io::Result<Fd<'a>>,
    name: &CStr,
    value: &[u8],
    flags: u32,
) -> io::Result<()> {
    if inode.is_device() && name == nodes::ATTRIBUTE {
        return errno(libc::EPERM);
    }
    if !inode.is_file_or_dir() && name == ORIGIN {
        // Where it cannot be kept it is done without: what is copied up is a file of its own.
        return Ok(());
    }
    let name = changeable(name)?;
    sys::set_xattr(fd()?.as_fd(), &name, value, flags.cast_signed())
}

pub(super) fn remove<'a>(
    inode: &Inode,
    fd: impl FnOnce() -> io::Result<Fd<'a>>,
    name: &CStr,
) -> io::Result<()> {
    if inode.is_device() && name == nodes::ATTRIBUTE {
        return errno(libc::ENODATA);
    }
    let name = changeable(name)?;
    sys::remove_xattr(fd()?.as_fd(), &name)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_trusted_is_kept_apart() {
        assert_eq!(&*changeable(c"trusted.overlay.opaque").unwrap(), c"user.rvm.guest.overlay.opaque");
        assert_eq!(&*changeable(c"trusted.a").unwrap(), c"user.rvm.guest.a");
        assert_eq!(&*changeable(c"user.a").unwrap(), c"user.a");
        for refused in [c"security.selinux", c"system.nfs4_acl", c"trusted", c"user.rvm.guest.a"] {
            assert_eq!(changeable(refused).unwrap_err().raw_os_error(), Some(libc::EPERM), "{refused:?}");
        }
        let long = CString::new([b"trusted.".as_slice(), &[b'x'; 250]].concat()).unwrap();
        assert_eq!(changeable(&long).unwrap_err().raw_os_error(), Some(libc::ERANGE));
    }

    #[test]
    fn a_guest_sees_its_own_names() {
        let names =
            b"user.a\0user.rvm.x\0trusted.overlay.opaque\0user.rvm.guest.overlay.opaque\0security.capability\0";
        let own = b"user.a\0trusted.overlay.opaque\0";
        assert_eq!(seen(names, false, false), [own.as_slice(), b"security.capability\0"].concat());
        assert_eq!(seen(names, false, true), own);
        assert_eq!(seen(b"user.a\0user.rvm.x\0trusted.x\0", true, false), b"user.a\0trusted.x\0");
        assert_eq!(seen(b"", false, false), b"");
    }
}
