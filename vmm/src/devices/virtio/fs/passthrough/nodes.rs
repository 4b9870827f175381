//! Device nodes the guest makes.
//!
//! A real one on the host would give users of the host what the guest's root
//! wants them to have. So it is a character device 0/0 there, which nobody can
//! open, with what it is to guests in an attribute only the host's root can set.
//! Without the attribute 0/0 is what it always was: overlayfs's whiteout.

use std::ffi::CStr;
use std::io;
use std::os::fd::{AsFd, BorrowedFd};

use super::sys;

/// The attribute: `b` or `c`, and the numbers as `MAJOR:MINOR`.
const ATTRIBUTE: &CStr = c"trusted.rvm.device";
/// All our attributes; a guest does not see them under these names.
pub(super) const PREFIX: &[u8] = b"trusted.rvm.";
/// Longest value: a letter, a space, 12 and 20 bits in decimal, a colon.
const MAX_VALUE_BYTES: usize = 2 + 4 + 1 + 7;

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
    let kind = if mode & libc::S_IFMT == libc::S_IFBLK { 'b' } else { 'c' };
    let value = format!("{kind} {}:{}", libc::major(rdev.into()), libc::minor(rdev.into()));
    let mark = |node: BorrowedFd<'_>| sys::set_xattr(node, ATTRIBUTE, value.as_bytes(), libc::XATTR_CREATE);
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
    let mut value = [0; MAX_VALUE_BYTES];
    // None: a whiteout.
    let Ok(len) = sys::get_xattr(node, ATTRIBUTE, &mut value) else { return };
    if let Some((kind, rdev)) = value.get(..len).and_then(parse) {
        attr.st_mode = kind | attr.st_mode & !libc::S_IFMT;
        attr.st_rdev = rdev;
    }
}

/// The type, `S_IFMT` bits of a mode, that `name` in `dir` has to guests.
pub(super) fn kind(dir: BorrowedFd<'_>, name: &CStr) -> io::Result<u32> {
    let node = sys::open_at(dir, name, libc::O_PATH, 0)?;
    let mut attr = sys::stat(node.as_fd(), c"")?.attr;
    restore(node.as_fd(), &mut attr);
    Ok(attr.st_mode & libc::S_IFMT)
}

fn parse(value: &[u8]) -> Option<(u32, u64)> {
    let (kind, number) = str::from_utf8(value).ok()?.split_once(' ')?;
    let kind = match kind {
        "b" => libc::S_IFBLK,
        "c" => libc::S_IFCHR,
        _ => return None,
    };
    let (major, minor) = number.split_once(':')?;
    Some((kind, libc::makedev(major.parse().ok()?, minor.parse().ok()?)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn values_are_what_was_written_or_nothing() {
        assert_eq!(parse(b"c 1:3"), Some((libc::S_IFCHR, 0x103)));
        assert_eq!(parse(b"b 4095:1048575"), Some((libc::S_IFBLK, 0xffff_ffff)));
        assert!("b 4095:1048575".len() <= MAX_VALUE_BYTES);
        for wrong in [&b"c 1"[..], b"d 1:3", b"c -1:3", b"c 1:3 ", b"\xff", b""] {
            assert_eq!(parse(wrong), None, "{wrong:?}");
        }
    }
}
