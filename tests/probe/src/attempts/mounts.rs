//! Mounts, roots, attributes of files.

use libc::{
    MNT_DETACH, MS_BIND, MS_REMOUNT, SYS_chdir, SYS_chown, SYS_chroot, SYS_fsopen, SYS_mount,
    SYS_mount_setattr, SYS_name_to_handle_at, SYS_open_by_handle_at, SYS_open_tree, SYS_pivot_root,
    SYS_quotactl, SYS_setxattr, SYS_umount2,
};

use super::Attempt;
use crate::calls::{Outcome, address, address_mut, call, signed, text};

/// Made in a mount namespace of their own, where one may be made: what comes
/// after them is to see the container as it was.
pub const CHANGING: &[Attempt] = &[
    ("mount_tmpfs", || call(SYS_mount, [text(c"tmpfs"), text(c"/tmp"), text(c"tmpfs"), 0, 0])),
    ("mount_proc", || call(SYS_mount, [text(c"proc"), text(c"/tmp"), text(c"proc"), 0, 0])),
    ("mount_sysfs", || call(SYS_mount, [text(c"sysfs"), text(c"/tmp"), text(c"sysfs"), 0, 0])),
    ("mount_cgroup2", || call(SYS_mount, [text(c"cgroup2"), text(c"/tmp"), text(c"cgroup2"), 0, 0])),
    ("mount_bind", || call(SYS_mount, [text(c"/etc"), text(c"/tmp"), 0, MS_BIND as usize, 0])),
    ("remount_proc_sys_writable", || {
        call(SYS_mount, [0, text(c"/proc/sys"), 0, (MS_REMOUNT | MS_BIND) as usize, 0])
    }),
    ("remount_root", || call(SYS_mount, [0, text(c"/"), 0, (MS_REMOUNT | MS_BIND) as usize, 0])),
    ("unmount_proc_sys", || call(SYS_umount2, [text(c"/proc/sys"), MNT_DETACH as usize])),
    ("unmount_masked_kcore", || call(SYS_umount2, [text(c"/proc/kcore"), MNT_DETACH as usize])),
    ("unmount_dev", || call(SYS_umount2, [text(c"/dev"), MNT_DETACH as usize])),
    ("fsopen", || call(SYS_fsopen, [text(c"tmpfs"), 0])),
    ("open_tree_clone", || {
        call(SYS_open_tree, [signed(libc::AT_FDCWD.into()), text(c"/etc"), libc::OPEN_TREE_CLONE as usize])
    }),
    ("mount_setattr", || {
        // struct mount_attr: set, clear, propagation, user namespace.
        let attributes = [libc::MOUNT_ATTR_NOSUID, 0, 0, 0];
        call(SYS_mount_setattr, [signed(libc::AT_FDCWD.into()), text(c"/"), 0, address(&attributes), 32])
    }),
    ("pivot_root", || call(SYS_pivot_root, [text(c"/tmp"), text(c"/tmp")])),
];

pub const ATTEMPTS: &[Attempt] = &[
    ("chroot", || call(SYS_chroot, [text(c"/tmp")])),
    ("chroot_escape", || {
        call(SYS_chroot, [text(c"/tmp")])?;
        for _ in 0..16 {
            call(SYS_chdir, [text(c"..")])?;
        }
        call(SYS_chroot, [text(c".")])?;
        call(libc::SYS_access, [text(c"/bin/rvm-probe"), 0])
    }),
    ("file_handle", handle),
    ("open_by_handle", || {
        let mut handle = [0u32; 34];
        handle[0] = 8;
        handle[1] = 1;
        call(SYS_open_by_handle_at, [signed(libc::AT_FDCWD.into()), address(&handle), 0])
    }),
    ("quotactl", || call(SYS_quotactl, [0x80_0007 << 8, text(c"/dev/null"), 0, 0])),
    ("chown_file", || call(SYS_chown, [own_file()?, 1234, 1234])),
    ("chmod_set_user_id", || {
        let file = own_file()?;
        call(libc::SYS_chmod, [file, 0o6755])
    }),
    ("xattr_user", || set_xattr(c"user.probe", b"x")),
    ("xattr_trusted", || set_xattr(c"trusted.probe", b"x")),
    ("xattr_security", || set_xattr(c"security.probe", b"x")),
    // VFS_CAP_REVISION_2 with CAP_NET_RAW permitted and effective (capabilities(7)).
    ("xattr_capability", || {
        set_xattr(c"security.capability", b"\x01\0\0\x02\0\x20\0\0\0\0\0\0\0\0\0\0\0\0\0\0")
    }),
    ("fanotify", || call(libc::SYS_fanotify_init, [0, 0])),
    ("inotify", || call(libc::SYS_inotify_init1, [0])),
    ("write_root", || open_new(c"/probe-new")),
    ("write_etc", || open_new(c"/etc/probe-new")),
    ("read_shadow", || call(libc::SYS_open, [text(c"/etc/shadow"), 0])),
    ("mknod_fifo", || call(libc::SYS_mknod, [text(c"/tmp/probe-fifo"), libc::S_IFIFO as usize | 0o600, 0])),
    ("mknod_socket", || {
        call(libc::SYS_mknod, [text(c"/tmp/probe-sock"), libc::S_IFSOCK as usize | 0o600, 0])
    }),
    ("memfd", || call(libc::SYS_memfd_create, [text(c"probe"), 0])),
    ("unnamed_file", || {
        call(libc::SYS_open, [text(c"/tmp"), (libc::O_TMPFILE | libc::O_RDWR) as usize, 0o600])
    }),
    ("flock", || {
        let file = call(libc::SYS_open, [own_file()?, libc::O_RDWR as usize])?;
        call(libc::SYS_flock, [file as usize, libc::LOCK_EX as usize])
    }),
    ("open_file_description_lock", || {
        let file = call(libc::SYS_open, [own_file()?, libc::O_RDWR as usize])?;
        let mut lock = [0u64; 4];
        // struct flock: l_type (F_WRLCK) and l_whence (SEEK_SET) are shorts.
        lock[0] = libc::F_WRLCK as u64;
        call(libc::SYS_fcntl, [file as usize, libc::F_OFD_SETLK as usize, address_mut(&mut lock)])
    }),
    ("fallocate", || {
        let file = call(libc::SYS_open, [own_file()?, libc::O_RDWR as usize])?;
        call(libc::SYS_fallocate, [file as usize, 0, 0, 8192])
    }),
];

/// Makes a file and returns its path's address.
fn own_file() -> Result<usize, nix::errno::Errno> {
    const PATH: &std::ffi::CStr = c"/tmp/probe-own";
    let flags = libc::O_CREAT | libc::O_RDWR;
    let file = call(libc::SYS_open, [text(PATH), flags as usize, 0o600])?;
    call(libc::SYS_close, [file as usize])?;
    Ok(text(PATH))
}

fn open_new(path: &std::ffi::CStr) -> Outcome {
    call(libc::SYS_open, [text(path), (libc::O_CREAT | libc::O_EXCL | libc::O_RDWR) as usize, 0o600])?;
    call(libc::SYS_unlink, [text(path)])
}

fn set_xattr(name: &std::ffi::CStr, value: &'static [u8]) -> Outcome {
    call(SYS_setxattr, [own_file()?, text(name), value.as_ptr() as usize, value.len(), 0])
}

fn handle() -> Outcome {
    let mut handle = [0u32; 34];
    handle[0] = 128;
    let mut mount = 0i32;
    call(
        SYS_name_to_handle_at,
        [signed(libc::AT_FDCWD.into()), text(c"/tmp"), address_mut(&mut handle), address_mut(&mut mount), 0],
    )
}
