//! Devices: those that are there, and those a process with CAP_MKNOD may make.

use std::fs::{File, remove_file};

use crate::{
    calls::{Shown, call, in_child, shown, text},
    out::Out,
};

/// Opens each in `/dev`, and makes and opens each of the numbers.
pub fn print(out: &mut Out) {
    const PRESENT: [&str; 12] = [
        "/dev/null",
        "/dev/zero",
        "/dev/full",
        "/dev/random",
        "/dev/urandom",
        "/dev/ptmx",
        "/dev/console",
        "/dev/fuse",
        "/dev/net/tun",
        "/dev/kvm",
        "/dev/mem",
        "/dev/kmsg",
    ];
    out.section("open");
    for path in PRESENT {
        // Without waiting, and without making a terminal our own.
        use std::os::unix::fs::OpenOptionsExt;
        let flags = libc::O_NONBLOCK | libc::O_NOCTTY;
        out.put(path, shown(File::options().read(true).custom_flags(flags).open(path)));
    }
    out.section("make");
    const NUMBERS: [(&str, &std::ffi::CStr, u32, u64, u64); 12] = [
        ("mem", c"/tmp/made-mem", libc::S_IFCHR, 1, 1),
        ("null", c"/tmp/made-null", libc::S_IFCHR, 1, 3),
        ("port", c"/tmp/made-port", libc::S_IFCHR, 1, 4),
        ("zero", c"/tmp/made-zero", libc::S_IFCHR, 1, 5),
        ("kmsg", c"/tmp/made-kmsg", libc::S_IFCHR, 1, 11),
        ("serial", c"/tmp/made-serial", libc::S_IFCHR, 4, 64),
        ("console", c"/tmp/made-console", libc::S_IFCHR, 5, 1),
        ("tun", c"/tmp/made-tun", libc::S_IFCHR, 10, 200),
        ("fuse", c"/tmp/made-fuse", libc::S_IFCHR, 10, 229),
        ("kvm", c"/tmp/made-kvm", libc::S_IFCHR, 10, 232),
        ("disk", c"/tmp/made-disk", libc::S_IFBLK, 8, 0),
        ("virtio_disk", c"/tmp/made-vda", libc::S_IFBLK, 254, 0),
    ];
    for (name, path, kind, major, minor) in NUMBERS {
        let device = nix::sys::stat::makedev(major, minor) as usize;
        let made = call(libc::SYS_mknod, [text(path), kind as usize | 0o600, device]);
        out.put(name, Shown(made));
        if made.is_ok() {
            let opened = in_child(|| {
                let flags = libc::O_RDWR | libc::O_NONBLOCK | libc::O_NOCTTY;
                Shown(call(libc::SYS_open, [text(path), flags as usize])).to_string()
            });
            out.put(format_args!("{name}.open"), opened);
            let _ = remove_file(std::ffi::OsStr::new(path.to_str().unwrap_or_default()));
        }
    }
    out.section("");
}
