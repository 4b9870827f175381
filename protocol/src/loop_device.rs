//! Loop devices: a file as a block device, which goes when nobody has it any more.

use std::{
    fs::{File, OpenOptions},
    io,
    os::{fd::AsRawFd, unix::fs::OpenOptionsExt},
};

use nix::errno::Errno;

// Of linux/loop.h.
const LOOP_CTL_GET_FREE: libc::c_ulong = 0x4c82;
const LOOP_CONFIGURE: libc::c_ulong = 0x4c0a;
const LO_FLAGS_READ_ONLY: u32 = 1;
const LO_FLAGS_AUTOCLEAR: u32 = 4;

/// Others may be quicker to take a device that was free, which is tried again so often.
const TRIES: usize = 64;

/// `struct loop_config`.
#[repr(C)]
struct Config {
    fd: u32,
    block_size: u32,
    info: Info,
    reserved: [u64; 8],
}

/// `struct loop_info64`.
#[repr(C)]
struct Info {
    /// lo_device, lo_inode, lo_rdevice, lo_offset, lo_sizelimit.
    places: [u64; 5],
    number: u32,
    encrypt_type: u32,
    encrypt_key_size: u32,
    flags: u32,
    /// lo_file_name, lo_crypt_name, lo_encrypt_key.
    names: [u8; 64 + 64 + 32],
    init: [u64; 2],
}

const _: () = assert!(size_of::<Config>() == 304);

/// A read-only device of `file` (Linux 5.8), and its path. It is free again when it is closed and
/// not mounted any more.
pub fn readonly(file: &File) -> io::Result<(File, String)> {
    let control = File::open("/dev/loop-control")?;
    for _ in 0..TRIES {
        // SAFETY: the request takes nothing and returns a number.
        let number = Errno::result(unsafe { libc::ioctl(control.as_raw_fd(), LOOP_CTL_GET_FREE) })?;
        let path = format!("/dev/loop{number}");
        let device = OpenOptions::new().read(true).custom_flags(libc::O_CLOEXEC).open(&path)?;
        let config = Config {
            fd: file.as_raw_fd().unsigned_abs(),
            block_size: 0,
            info: Info {
                places: [0; 5],
                number: 0,
                encrypt_type: 0,
                encrypt_key_size: 0,
                flags: LO_FLAGS_READ_ONLY | LO_FLAGS_AUTOCLEAR,
                names: [0; 160],
                init: [0; 2],
            },
            reserved: [0; 8],
        };
        // SAFETY: a `struct loop_config`, which the kernel reads during the call.
        match Errno::result(unsafe { libc::ioctl(device.as_raw_fd(), LOOP_CONFIGURE, &raw const config) }) {
            Ok(_) => return Ok((device, path)),
            Err(Errno::EBUSY) => {}
            Err(errno) => return Err(errno.into()),
        }
    }
    Err(Errno::EBUSY.into())
}
