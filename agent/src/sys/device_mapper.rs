//! Device mapper (linux/dm-ioctl.h): block devices that the kernel makes of others.

use std::{
    fs::File,
    io,
    os::fd::AsRawFd,
    path::{Path, PathBuf},
};

use nix::errno::Errno;

const CONTROL: &str = "/dev/mapper/control";
const VERSION: [u32; 3] = [4, 0, 0];
const DEV_CREATE: libc::c_ulong = 0xc138_fd03;
const DEV_REMOVE: libc::c_ulong = 0xc138_fd04;
const DEV_SUSPEND: libc::c_ulong = 0xc138_fd06;
const TABLE_LOAD: libc::c_ulong = 0xc138_fd09;
const READONLY: u32 = 1 << 0;
const DEFERRED_REMOVE: u32 = 1 << 17;

/// Whether this kernel has it.
pub fn is_there() -> bool {
    Path::new(CONTROL).exists()
}

/// `struct dm_ioctl`.
#[repr(C)]
#[derive(Clone)]
struct Header {
    version: [u32; 3],
    data_size: u32,
    data_start: u32,
    target_count: u32,
    open_count: i32,
    flags: u32,
    event_nr: u32,
    padding: u32,
    dev: u64,
    name: [u8; 128],
    uuid: [u8; 129],
    data: [u8; 7],
}

/// `struct dm_target_spec`.
#[repr(C)]
struct Target {
    start_sector: u64,
    sectors: u64,
    status: i32,
    next: u32,
    kind: [u8; 16],
}

/// Bytes of a target's parameters, with the NUL behind them.
const MAX_PARAMETERS: usize = 2048;

/// A request with one target.
#[repr(C)]
struct Table {
    header: Header,
    target: Target,
    parameters: [u8; MAX_PARAMETERS],
}

const _: () = assert!(size_of::<Header>() == 312 && size_of::<Target>() == 40);

/// A read-only device of one target, `kind`, with its `parameters`, of so many sectors of 512 bytes; and its path. It is gone
/// when it is closed and not mounted any more. `name` is one that no other device has.
pub fn device(name: &str, kind: &str, parameters: &str, sectors: u64) -> io::Result<(File, PathBuf)> {
    let too_long = || io::Error::from(Errno::ENAMETOOLONG);
    let control = File::options().read(true).write(true).open(CONTROL)?;
    let header = Header {
        version: VERSION,
        data_size: u32::try_from(size_of::<Table>()).unwrap_or(0),
        data_start: u32::try_from(size_of::<Header>()).unwrap_or(0),
        target_count: 0,
        open_count: 0,
        flags: READONLY,
        event_nr: 0,
        padding: 0,
        dev: 0,
        name: padded(name).ok_or_else(too_long)?,
        uuid: [0; 129],
        data: [0; 7],
    };
    let target =
        Target { start_sector: 0, sectors, status: 0, next: 0, kind: padded(kind).ok_or_else(too_long)? };
    let parameters = padded(parameters).ok_or_else(too_long)?;
    let table = Header { target_count: 1, ..header.clone() };
    let mut request = Table { header: header.clone(), target, parameters };
    call(&control, DEV_CREATE, &mut request)?;
    let minor = libc::minor(request.header.dev);
    let make = || -> io::Result<_> {
        request.header = table;
        call(&control, TABLE_LOAD, &mut request)?;
        request.header = Header { flags: 0, ..header.clone() };
        call(&control, DEV_SUSPEND, &mut request)?;
        let path = PathBuf::from(format!("/dev/dm-{minor}"));
        Ok((File::open(&path)?, path))
    };
    let made = make();
    request.header = Header { flags: DEFERRED_REMOVE, ..header };
    let removed = call(&control, DEV_REMOVE, &mut request);
    let made = made?;
    removed?;
    Ok(made)
}

fn padded<const N: usize>(text: &str) -> Option<[u8; N]> {
    let mut bytes = [0; N];
    // The last one stays a NUL.
    bytes.get_mut(..N.checked_sub(1)?)?.get_mut(..text.len())?.copy_from_slice(text.as_bytes());
    Some(bytes)
}

fn call(control: &File, request: libc::c_ulong, table: &mut Table) -> io::Result<()> {
    // SAFETY: a `struct dm_ioctl` and what follows it, of as many bytes as `data_size` says, which the kernel reads and
    // writes during the call.
    let result = unsafe { libc::ioctl(control.as_raw_fd(), request as _, &raw mut *table) };
    Errno::result(result).map(drop).map_err(io::Error::from)
}
