//! One request: parsed, carried out, answered (section 5.2.6).

use std::io;

use virtio_bindings::virtio_blk::{
    VIRTIO_BLK_S_IOERR, VIRTIO_BLK_S_OK, VIRTIO_BLK_S_UNSUPP, VIRTIO_BLK_T_DISCARD, VIRTIO_BLK_T_FLUSH,
    VIRTIO_BLK_T_GET_ID, VIRTIO_BLK_T_IN, VIRTIO_BLK_T_OUT, VIRTIO_BLK_T_WRITE_ZEROES,
    VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP,
};

use super::disk::Disk;
use super::{
    MAX_DISCARD_SECTORS, MAX_RANGES, MAX_REQUEST_BYTES, MAX_WRITE_ZEROES_SECTORS, SECTOR_BYTES, SERIAL_BYTES,
};
use crate::devices::virtio::buffers::GuestBuffers;

/// Bytes of the header: type, reserved, sector.
const HEADER_BYTES: usize = 16;
/// Bytes of one range in a discard or write-zeroes request.
const RANGE_BYTES: usize = 16;

/// How a request ended, apart from the bytes it carries back.
enum Refusal {
    /// The request makes no sense for this disk, or the host failed.
    Failed,
    /// The device does not know this request.
    Unsupported,
}

impl From<io::Error> for Refusal {
    fn from(error: io::Error) -> Self {
        match error.raw_os_error() {
            Some(libc::EOPNOTSUPP) => Self::Unsupported,
            _ => {
                log::debug!("disk: {error}");
                Self::Failed
            }
        }
    }
}

/// Carries out one request; returns the bytes written into `writable`, or 0
/// where there is not even room for a status. What takes long asks `go_on` in
/// between, and fails where nobody waits for the answer any more.
pub(super) fn execute(
    disk: &Disk,
    serial: &[u8; SERIAL_BYTES],
    mut readable: GuestBuffers<'_>,
    mut writable: GuestBuffers<'_>,
    go_on: &dyn Fn() -> bool,
) -> u32 {
    let Some(data_len) = writable.len().checked_sub(1) else { return 0 };
    let data = writable.take(data_len);
    let (status, written) = match dispatch(disk, serial, &mut readable, data, go_on) {
        Ok(written) => (VIRTIO_BLK_S_OK, written),
        // Data may have been moved in part: the status says not to use it.
        Err(Refusal::Failed) => (VIRTIO_BLK_S_IOERR, 0),
        Err(Refusal::Unsupported) => (VIRTIO_BLK_S_UNSUPP, 0),
    };
    writable.write(&[status as u8]);
    written + 1
}

fn dispatch(
    disk: &Disk,
    serial: &[u8; SERIAL_BYTES],
    readable: &mut GuestBuffers<'_>,
    mut data: GuestBuffers<'_>,
    go_on: &dyn Fn() -> bool,
) -> Result<u32, Refusal> {
    let header: [u8; HEADER_BYTES] = readable.read().ok_or(Refusal::Failed)?;
    let [t0, t1, t2, t3, _, _, _, _, sector @ ..] = header;
    let sector = u64::from_le_bytes(sector);
    match u32::from_le_bytes([t0, t1, t2, t3]) {
        VIRTIO_BLK_T_IN => {
            let offset = transfer(disk, sector, data.len())?;
            let written = data.len() as u32;
            disk.read(data, offset)?;
            Ok(written)
        }
        VIRTIO_BLK_T_OUT => {
            writable(disk)?;
            let offset = transfer(disk, sector, readable.len())?;
            disk.write(std::mem::take(readable), offset, go_on)?;
            Ok(0)
        }
        VIRTIO_BLK_T_FLUSH => {
            disk.flush()?;
            Ok(0)
        }
        VIRTIO_BLK_T_GET_ID => Ok(data.write(serial) as u32),
        VIRTIO_BLK_T_DISCARD => {
            for (offset, bytes, flags) in ranges(disk, readable, MAX_RANGES, MAX_DISCARD_SECTORS)? {
                // The unmap flag is for write-zeroes only (section 5.2.6.2).
                if flags != 0 {
                    return Err(Refusal::Unsupported);
                }
                if !go_on() {
                    return Err(Refusal::Failed);
                }
                disk.discard(offset, bytes)?;
            }
            Ok(0)
        }
        VIRTIO_BLK_T_WRITE_ZEROES => {
            for (offset, bytes, flags) in ranges(disk, readable, 1, MAX_WRITE_ZEROES_SECTORS)? {
                if flags & !VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP != 0 {
                    return Err(Refusal::Unsupported);
                }
                disk.write_zeroes(offset, bytes, flags != 0, go_on)?;
            }
            Ok(0)
        }
        _ => Err(Refusal::Unsupported),
    }
}

/// The byte at which a transfer starts: whole sectors, not too many, on the disk.
fn transfer(disk: &Disk, sector: u64, bytes: usize) -> Result<u64, Refusal> {
    let sectors = bytes as u64 / SECTOR_BYTES;
    if !(bytes as u64).is_multiple_of(SECTOR_BYTES) || bytes > MAX_REQUEST_BYTES {
        return Err(Refusal::Failed);
    }
    disk.range(sector, sectors).ok_or(Refusal::Failed)
}

fn writable(disk: &Disk) -> Result<(), Refusal> {
    if disk.readonly() { Err(Refusal::Failed) } else { Ok(()) }
}

/// The ranges of a discard or write-zeroes request as byte offset, bytes and
/// flags, all of them checked before the first is acted on.
fn ranges(
    disk: &Disk,
    readable: &mut GuestBuffers<'_>,
    max_ranges: u32,
    max_sectors: u32,
) -> Result<Vec<(u64, u64, u32)>, Refusal> {
    writable(disk)?;
    let len = readable.len();
    if len == 0 || !len.is_multiple_of(RANGE_BYTES) || len > RANGE_BYTES * max_ranges as usize {
        return Err(Refusal::Failed);
    }
    let mut ranges = Vec::with_capacity(len / RANGE_BYTES);
    while let Some(range) = readable.read::<RANGE_BYTES>() {
        let [s0, s1, s2, s3, s4, s5, s6, s7, n0, n1, n2, n3, flags @ ..] = range;
        let sector = u64::from_le_bytes([s0, s1, s2, s3, s4, s5, s6, s7]);
        let sectors = u32::from_le_bytes([n0, n1, n2, n3]);
        if sectors > max_sectors {
            return Err(Refusal::Failed);
        }
        let offset = disk.range(sector, sectors.into()).ok_or(Refusal::Failed)?;
        ranges.push((offset, u64::from(sectors) * SECTOR_BYTES, u32::from_le_bytes(flags)));
    }
    Ok(ranges)
}
