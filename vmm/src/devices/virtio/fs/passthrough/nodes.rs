//! Device nodes the guest makes.
//!
//! A real one on the host would give users of the host what the guest's root
//! wants them to have. So it is a character device 0/0 there, which nobody can
//! open, with what it is to guests in an attribute that takes a capability over
//! its owner: that of executables, which says nothing of a device.
//! Without the attribute 0/0 is what it always was: overlayfs's whiteout.

use std::ffi::CStr;
use std::io;
use std::os::fd::{AsFd, BorrowedFd};

use super::sys;

/// The attribute, a `struct vfs_cap_data` (linux/capability.h): of the two sets that it
/// always has, the first says the device's number, the other one its kind.
pub(super) const ATTRIBUTE: &CStr = c"security.capability";
/// `VFS_CAP_REVISION_2`.
const REVISION: u32 = 0x0200_0000;
const CHARACTER: u32 = u32::from_be_bytes(*b"rvmc");
const BLOCK: u32 = u32::from_be_bytes(*b"rvmb");
/// Of the attribute (`XATTR_CAPS_SZ_2`).
const VALUE_BYTES: usize = 20;

/// Whether `mode` and the number `rdev` ask for a device node, not for a whiteout.
pub(super) fn is_device(mode: u32, rdev: u32) -> bool {
    match mode & libc::S_IFMT {
        libc::S_IFBLK => true,
        libc::S_IFCHR => rdev != 0,
        _ => false,
    }
}

/// Makes what stands for the device `rdev`, of the type and with the
/// permissions of `mode`.
pub(super) fn make(dir: BorrowedFd<'_>, name: &CStr, mode: u32, rdev: u32) -> io::Result<()> {
    sys::mknod(dir, name, libc::S_IFCHR | mode & !libc::S_IFMT, 0)?;
    let value = value(mode & libc::S_IFMT, rdev);
    let mark = |node: BorrowedFd<'_>| sys::set_xattr(node, ATTRIBUTE, &value, libc::XATTR_CREATE);
    let marked = sys::open_at(dir, name, libc::O_PATH, 0).and_then(|node| mark(node.as_fd()));
    marked.or_else(|_| {
        // The host's file system has no such attributes: then no such nodes.
        sys::unlink(dir, name, 0)?;
        Err(io::Error::from_raw_os_error(libc::EPERM))
    })
}

/// Makes `attr`, that of `node`, say what it is to guests.
pub(super) fn restore(node: BorrowedFd<'_>, attr: &mut libc::stat64) {
    if attr.st_mode & libc::S_IFMT != libc::S_IFCHR || attr.st_rdev != 0 {
        return;
    }
    // None: a whiteout.
    if let Some((kind, rdev)) = read(node).and_then(|value| parse(&value)) {
        attr.st_mode = kind | attr.st_mode & !libc::S_IFMT;
        attr.st_rdev = rdev.into();
    }
}

/// Gives a device node to another owner. The kernel takes the attribute away with the old
/// one; it stays the device it is.
pub(super) fn chown(node: BorrowedFd<'_>, uid: Option<u32>, gid: Option<u32>) -> io::Result<()> {
    let value = read(node);
    sys::chown(node, uid, gid)?;
    match value {
        Some(value) => sys::set_xattr(node, ATTRIBUTE, &value, 0),
        None => Ok(()),
    }
}

fn read(node: BorrowedFd<'_>) -> Option<[u8; VALUE_BYTES]> {
    let mut value = [0; VALUE_BYTES];
    let len = sys::get_xattr(node, ATTRIBUTE, &mut value).ok()?;
    (len == VALUE_BYTES).then_some(value)
}

/// The type, `S_IFMT` bits of a mode, that `name` in `dir` has to guests.
pub(super) fn kind(dir: BorrowedFd<'_>, name: &CStr) -> io::Result<u32> {
    let node = sys::open_at(dir, name, libc::O_PATH, 0)?;
    let mut attr = sys::stat(node.as_fd(), c"")?.attr;
    restore(node.as_fd(), &mut attr);
    Ok(attr.st_mode & libc::S_IFMT)
}

fn value(kind: u32, rdev: u32) -> [u8; VALUE_BYTES] {
    let kind = if kind == libc::S_IFBLK { BLOCK } else { CHARACTER };
    let mut value = [0; VALUE_BYTES];
    for (place, word) in value.chunks_exact_mut(4).zip([REVISION, rdev, kind]) {
        place.copy_from_slice(&word.to_le_bytes());
    }
    value
}

fn parse(value: &[u8; VALUE_BYTES]) -> Option<(u32, u32)> {
    let (words, _) = value.as_chunks::<4>();
    match words {
        [revision, rdev, kind, ..] if u32::from_le_bytes(*revision) == REVISION => {
            let kind = match u32::from_le_bytes(*kind) {
                BLOCK => libc::S_IFBLK,
                CHARACTER => libc::S_IFCHR,
                _ => return None,
            };
            Some((kind, u32::from_le_bytes(*rdev)))
        }
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn values_are_what_was_written_or_nothing() {
        for (kind, rdev) in [(libc::S_IFCHR, 0x103), (libc::S_IFBLK, u32::MAX), (libc::S_IFBLK, 0)] {
            assert_eq!(parse(&value(kind, rdev)), Some((kind, rdev)));
        }
        let real = [1, 0, 0, 2, 0, 4, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0];
        assert_eq!(parse(&real), None, "cap_net_raw+ep");
        assert_eq!(parse(&[0; VALUE_BYTES]), None);
    }
}
