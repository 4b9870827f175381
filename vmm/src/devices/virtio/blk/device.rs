//! The disk as the transport sees it.

use std::fs::File;
use std::sync::{Arc, Mutex};

use rvm_protocol::vmm::DiskConfig;
use serde_json::Value;
use virtio_bindings::virtio_blk::{
    VIRTIO_BLK_F_BLK_SIZE, VIRTIO_BLK_F_DISCARD, VIRTIO_BLK_F_FLUSH, VIRTIO_BLK_F_MQ, VIRTIO_BLK_F_RO,
    VIRTIO_BLK_F_SEG_MAX, VIRTIO_BLK_F_SIZE_MAX, VIRTIO_BLK_F_WRITE_ZEROES,
};
use virtio_bindings::virtio_ring::{VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC};

use super::disk::Disk;
use super::worker::BlkWorker;
use super::{
    BlkError, BlkState, DEVICE_TYPE, MAX_DISCARD_SECTORS, MAX_QUEUES, MAX_RANGES, MAX_WRITE_ZEROES_SECTORS,
    QUEUE_SIZE, SECTOR_BYTES, SEG_MAX, SERIAL_BYTES, SIZE_MAX, THREADS,
};
use crate::devices::virtio::ring::Ring;
use crate::devices::virtio::{ActivateError, Activation, StateError, VirtioDevice, read_config_bytes};
use crate::jail::Duty;

/// Bytes of `struct virtio_blk_config` up to `write_zeroes_may_unmap`.
const CONFIG_BYTES: usize = 57;

/// A disk.
#[derive(Debug)]
pub struct Blk {
    disk: Arc<Disk>,
    serial: [u8; SERIAL_BYTES],
    queue_sizes: Vec<u16>,
}

impl Blk {
    /// Opens the configured file; the device is not active.
    pub fn open(config: &DiskConfig) -> Result<Self, BlkError> {
        Self::with_serial(&config.serial, || Disk::open(&config.path, config.readonly))
    }

    /// A device on an open file, not active.
    pub fn new(serial: &str, file: File, readonly: bool) -> Result<Self, BlkError> {
        Self::with_serial(serial, || Disk::new(file, readonly))
    }

    fn with_serial(name: &str, disk: impl FnOnce() -> Result<Disk, BlkError>) -> Result<Self, BlkError> {
        let mut serial = [0; SERIAL_BYTES];
        let bytes = name.as_bytes();
        match serial.get_mut(..bytes.len()) {
            Some(place) if !bytes.is_empty() && bytes.iter().all(u8::is_ascii_graphic) => {
                place.copy_from_slice(bytes);
            }
            _ => return Err(BlkError::Serial(name.to_owned())),
        }
        Ok(Self { disk: Arc::new(disk()?), serial, queue_sizes: vec![QUEUE_SIZE] })
    }

    /// The same with `count` queues, 1 to [`MAX_QUEUES`].
    pub fn with_queues(mut self, count: u16) -> Self {
        self.queue_sizes = vec![QUEUE_SIZE; count.clamp(1, MAX_QUEUES).into()];
        self
    }
}

/// `struct virtio_blk_config` (section 5.2.4).
fn config_space(disk: &Disk, queues: u16) -> [u8; CONFIG_BYTES] {
    let mut config = [0; CONFIG_BYTES];
    let mut put = |offset: usize, value: u32| {
        if let Some(place) = config.get_mut(offset..offset + 4) {
            place.copy_from_slice(&value.to_le_bytes());
        }
    };
    put(0, disk.sectors() as u32);
    put(4, (disk.sectors() >> 32) as u32);
    put(8, SIZE_MAX);
    put(12, SEG_MAX);
    put(20, SECTOR_BYTES as u32);
    put(32, u32::from(queues) << 16); // num_queues, behind writeback
    put(36, MAX_DISCARD_SECTORS);
    put(40, MAX_RANGES);
    put(44, 1); // discard_sector_alignment
    put(48, MAX_WRITE_ZEROES_SECTORS);
    put(52, 1); // max_write_zeroes_seg: see MAX_WRITE_ZEROES_SECTORS
    config[56] = 1; // write_zeroes_may_unmap
    config
}

impl VirtioDevice for Blk {
    fn device_type(&self) -> u32 {
        DEVICE_TYPE
    }

    fn name(&self) -> &str {
        "blk"
    }

    fn queue_sizes(&self) -> &[u16] {
        &self.queue_sizes
    }

    fn features(&self) -> u64 {
        let always = 1 << VIRTIO_RING_F_EVENT_IDX
            | 1 << VIRTIO_RING_F_INDIRECT_DESC
            | 1 << VIRTIO_BLK_F_SIZE_MAX
            | 1 << VIRTIO_BLK_F_SEG_MAX
            | 1 << VIRTIO_BLK_F_BLK_SIZE
            | 1 << VIRTIO_BLK_F_FLUSH
            | if self.queue_sizes.len() > 1 { 1 << VIRTIO_BLK_F_MQ } else { 0 };
        if self.disk.readonly() {
            always | 1 << VIRTIO_BLK_F_RO
        } else {
            always | 1 << VIRTIO_BLK_F_DISCARD | 1 << VIRTIO_BLK_F_WRITE_ZEROES
        }
    }

    fn save(&self) -> Result<Value, StateError> {
        Ok(serde_json::to_value(BlkState { sectors: self.disk.sectors() })?)
    }

    fn restore(&mut self, state: Value) -> Result<(), StateError> {
        let BlkState { sectors } = serde_json::from_value(state)?;
        if sectors == self.disk.sectors() {
            return Ok(());
        }
        let now = self.disk.sectors();
        Err(StateError::Other(format!("the disk has {now} sectors, the snapshot's had {sectors}")))
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        let config = config_space(&self.disk, self.queue_sizes.len() as u16);
        read_config_bytes(&config, offset, data);
    }

    fn threads(&self) -> usize {
        THREADS
    }

    fn duty(&self) -> Duty {
        Duty::Disk
    }

    fn activate(&mut self, activation: Activation) -> Result<(), ActivateError> {
        let Activation { memory, queues, features, threads, .. } = activation;
        // A driver may do with fewer than it is offered.
        let ring = |queue| Arc::new(Mutex::new(Ring::new(queue, features)));
        let rings: Vec<_> = queues.into_iter().flatten().map(ring).collect();
        if rings.is_empty() {
            return Err(ActivateError::MissingQueue(0));
        }
        for _ in 0..THREADS {
            let (memory, rings, disk) = (memory.clone(), rings.clone(), Arc::clone(&self.disk));
            let worker = BlkWorker { memory, rings, disk, serial: self.serial };
            threads.start(worker).map_err(ActivateError::Worker)?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::fs::OpenOptions;
    use std::os::unix::fs::{FileExt, OpenOptionsExt};

    use tempfile::NamedTempFile;
    use virtio_bindings::virtio_blk::*;

    use super::*;
    use crate::devices::virtio::blk::MAX_REQUEST_BYTES;
    use crate::devices::virtio::test_queue::{DATA, TestQueue, WRITE};

    const SECTORS: u64 = 64;
    const HEADER: u64 = DATA;
    const STATUS: u64 = DATA + 0x100;
    const BUFFER: u64 = DATA + 0x1000;
    const OK: u8 = VIRTIO_BLK_S_OK as u8;
    const IOERR: u8 = VIRTIO_BLK_S_IOERR as u8;
    const UNSUPP: u8 = VIRTIO_BLK_S_UNSUPP as u8;

    struct Rig {
        queue: TestQueue,
        file: NamedTempFile,
        blk: Blk,
    }

    impl Rig {
        fn new(readonly: bool) -> Self {
            let file = NamedTempFile::new().unwrap();
            let content: Vec<u8> = (0..SECTORS * SECTOR_BYTES).map(|byte| (byte / 512) as u8).collect();
            file.as_file().write_all_at(&content, 0).unwrap();
            let config = DiskConfig { serial: "scratch".to_owned(), path: file.path().to_owned(), readonly };
            let mut blk = Blk::open(&config).unwrap();
            let mut queue = TestQueue::new();
            let features = blk.features();
            blk.activate(queue.activation(1, features)).unwrap();
            Self { queue, file, blk }
        }

        /// Sends header, `data` and a status byte; returns status and length.
        fn request(&mut self, kind: u32, sector: u64, data: &[(u64, u32, u16)]) -> (u8, u32) {
            let mut header = kind.to_le_bytes().to_vec();
            header.extend([0; 4]);
            header.extend(sector.to_le_bytes());
            self.queue.write(HEADER, &header);
            self.queue.write(STATUS, &[0xee]);
            let mut chain = vec![(HEADER, 16, 0)];
            chain.extend_from_slice(data);
            chain.push((STATUS, 1, WRITE));
            self.queue.send(0, &chain);
            let len = self.queue.wait_used(0);
            (self.queue.read(STATUS, 1)[0], len)
        }

        fn ranges(&mut self, kind: u32, ranges: &[(u64, u32, u32)]) -> u8 {
            let mut bytes = Vec::new();
            for (sector, sectors, flags) in ranges {
                bytes.extend(sector.to_le_bytes());
                bytes.extend(sectors.to_le_bytes());
                bytes.extend(flags.to_le_bytes());
            }
            self.queue.write(BUFFER, &bytes);
            self.request(kind, 0, &[(BUFFER, bytes.len() as u32, 0)]).0
        }

        fn file_byte(&self, sector: u64) -> u8 {
            let mut byte = [0];
            self.file.as_file().read_exact_at(&mut byte, sector * SECTOR_BYTES).unwrap();
            byte[0]
        }
    }

    #[test]
    fn reads_and_writes_go_to_the_file_through_several_buffers() {
        let mut rig = Rig::new(false);
        let (status, len) =
            rig.request(VIRTIO_BLK_T_IN, 3, &[(BUFFER, 512, WRITE), (BUFFER + 0x2000, 1024, WRITE)]);
        assert_eq!((status, len), (OK, 1537));
        assert_eq!(rig.queue.read(BUFFER, 512), [3; 512]);
        assert_eq!(rig.queue.read(BUFFER + 0x2000, 1024), [[4; 512], [5; 512]].concat());

        // The same through a table of descriptors elsewhere in memory.
        rig.queue.send_indirect(
            0,
            DATA + 0x800,
            &[(HEADER, 16, 0), (BUFFER, 512, WRITE), (STATUS, 1, WRITE)],
        );
        assert_eq!(rig.queue.wait_used(0), 513);

        // A data buffer cut in the middle of a sector is one sector all the same.
        rig.queue.write(BUFFER, &[0xab; 512]);
        let (status, len) = rig.request(VIRTIO_BLK_T_OUT, 7, &[(BUFFER, 100, 0), (BUFFER + 100, 412, 0)]);
        assert_eq!((status, len), (OK, 1));
        assert_eq!((rig.file_byte(6), rig.file_byte(7), rig.file_byte(8)), (6, 0xab, 8));
        assert_eq!(rig.request(VIRTIO_BLK_T_FLUSH, 0, &[]), (OK, 1));
    }

    #[test]
    fn requests_beyond_the_disk_or_not_in_sectors_are_refused() {
        let mut rig = Rig::new(false);
        for sector in [SECTORS, SECTORS - 1, u64::MAX, u64::MAX / 512] {
            for kind in [VIRTIO_BLK_T_IN, VIRTIO_BLK_T_OUT] {
                let flags = if kind == VIRTIO_BLK_T_IN { WRITE } else { 0 };
                assert_eq!(rig.request(kind, sector, &[(BUFFER, 1024, flags)]).0, IOERR, "{sector}");
            }
        }
        assert_eq!(rig.request(VIRTIO_BLK_T_IN, 0, &[(BUFFER, 511, WRITE)]).0, IOERR);
        assert_eq!(rig.request(VIRTIO_BLK_T_OUT, 0, &[(BUFFER, 513, 0)]).0, IOERR);
        let huge = MAX_REQUEST_BYTES as u32 + 512;
        assert_eq!(rig.request(VIRTIO_BLK_T_IN, 0, &[(BUFFER, huge, WRITE)]).0, IOERR);
        assert_eq!(rig.request(0x7777, 0, &[]).0, UNSUPP);
    }

    #[test]
    fn each_vcpu_has_a_queue_and_each_queue_is_served() {
        let mut rig = Rig::new(false);
        let queues = |blk: &Blk| {
            let mut bytes = [0; 2];
            blk.read_config(34, &mut bytes);
            (blk.queue_sizes().len(), u16::from_le_bytes(bytes), blk.features() & 1 << VIRTIO_BLK_F_MQ != 0)
        };
        assert_eq!(queues(&rig.blk), (1, 1, false));
        rig.queue.stop();
        rig.blk = rig.blk.with_queues(u16::MAX);
        assert_eq!(queues(&rig.blk), (4, 4, true));
        rig.queue.reset();
        let features = rig.blk.features();
        rig.blk.activate(rig.queue.activation(4, features)).unwrap();
        for (queue, sector) in [(3, 5), (0, 6), (2, 7), (1, 8), (3, 9)] {
            rig.queue.write(HEADER, &[0; 16]);
            rig.queue.write(HEADER + 8, &[sector]);
            rig.queue.send(queue, &[(HEADER, 16, 0), (BUFFER, 512, WRITE), (STATUS, 1, WRITE)]);
            assert_eq!(rig.queue.wait_used(queue), 513);
            assert_eq!(rig.queue.read(BUFFER, 512), [sector; 512]);
        }
        let none = Activation { queues: vec![None, None], ..rig.queue.activation(1, features) };
        assert!(matches!(rig.blk.activate(none), Err(ActivateError::MissingQueue(0))));
    }

    #[test]
    fn discard_and_write_zeroes_clear_exactly_their_ranges() {
        let mut rig = Rig::new(false);
        assert_eq!(rig.ranges(VIRTIO_BLK_T_WRITE_ZEROES, &[(8, 8, 0)]), OK);
        assert_eq!(rig.ranges(VIRTIO_BLK_T_WRITE_ZEROES, &[(24, 8, 1)]), OK);
        assert_eq!(rig.ranges(VIRTIO_BLK_T_WRITE_ZEROES, &[(0, 1, 0), (2, 1, 0)]), IOERR, "one at a time");
        assert_eq!([7, 8, 15, 16, 23, 24, 31, 32].map(|s| rig.file_byte(s)), [7, 0, 0, 16, 23, 0, 0, 32]);
        assert_eq!(rig.ranges(VIRTIO_BLK_T_DISCARD, &[(40, 8, 0)]), OK);
        assert_eq!([39, 40, 47, 48].map(|s| rig.file_byte(s)), [39, 0, 0, 48]);

        // The second range is wrong: the first is not carried out either.
        assert_eq!(rig.ranges(VIRTIO_BLK_T_DISCARD, &[(16, 1, 0), (u64::MAX, 2, 0)]), IOERR);
        assert_eq!(rig.ranges(VIRTIO_BLK_T_WRITE_ZEROES, &[(u64::MAX, 2, 0)]), IOERR);
        assert_eq!(rig.file_byte(16), 16);
        assert_eq!(rig.ranges(VIRTIO_BLK_T_DISCARD, &[(0, u32::MAX, 0)]), IOERR);
        assert_eq!(rig.ranges(VIRTIO_BLK_T_DISCARD, &[(0, 1, 1)]), UNSUPP);
        assert_eq!(rig.ranges(VIRTIO_BLK_T_WRITE_ZEROES, &[(0, 1, 4)]), UNSUPP);
        assert_eq!(rig.request(VIRTIO_BLK_T_DISCARD, 0, &[(BUFFER, 15, 0)]).0, IOERR);
        assert_eq!(rig.request(VIRTIO_BLK_T_DISCARD, 0, &[]).0, IOERR);
    }

    #[test]
    fn a_read_only_disk_refuses_every_change() {
        let mut rig = Rig::new(true);
        assert_ne!(rig.blk.features() & 1 << VIRTIO_BLK_F_RO, 0);
        assert_eq!(rig.request(VIRTIO_BLK_T_OUT, 0, &[(BUFFER, 512, 0)]).0, IOERR);
        assert_eq!(rig.ranges(VIRTIO_BLK_T_DISCARD, &[(8, 1, 0)]), IOERR);
        assert_eq!(rig.ranges(VIRTIO_BLK_T_WRITE_ZEROES, &[(8, 1, 0)]), IOERR);
        assert_eq!(rig.file_byte(8), 8);
        assert_eq!(rig.request(VIRTIO_BLK_T_IN, 8, &[(BUFFER, 512, WRITE)]).0, OK);
    }

    #[test]
    fn malformed_chains_are_answered_and_the_next_request_is_served() {
        let mut rig = Rig::new(false);
        // No status byte at all; only a status byte; a header that is too short.
        rig.queue.send(0, &[(HEADER, 16, 0)]);
        assert_eq!(rig.queue.wait_used(0), 0);
        rig.queue.send(0, &[(STATUS, 1, WRITE)]);
        assert_eq!(rig.queue.wait_used(0), 1);
        assert_eq!(rig.queue.read(STATUS, 1), [IOERR]);
        rig.queue.send(0, &[(HEADER, 15, 0), (STATUS, 1, WRITE)]);
        assert_eq!(rig.queue.wait_used(0), 1);
        rig.queue.send(0, &[(HEADER, 16, 0), (u64::MAX, 512, WRITE), (STATUS, 1, WRITE)]);
        assert_eq!(rig.queue.wait_used(0), 0);
        rig.queue.send_loop(0, HEADER, 0);
        assert_eq!(rig.queue.wait_used(0), 0);
        assert_eq!(rig.request(VIRTIO_BLK_T_IN, 1, &[(BUFFER, 512, WRITE)]).0, OK);
    }

    #[test]
    fn a_broken_ring_stops_the_device_until_reset() {
        let mut rig = Rig::new(false);
        rig.queue.break_ring(0);
        rig.queue.reset();
        let features = rig.blk.features();
        rig.blk.activate(rig.queue.activation(1, features)).unwrap();
        assert_eq!(rig.request(VIRTIO_BLK_T_IN, 1, &[(BUFFER, 512, WRITE)]).0, OK);
    }

    #[test]
    fn the_guest_reads_serial_and_geometry() {
        let mut rig = Rig::new(false);
        assert_eq!(rig.request(VIRTIO_BLK_T_GET_ID, 0, &[(BUFFER, 20, WRITE)]), (OK, 21));
        assert_eq!(&rig.queue.read(BUFFER, 8), b"scratch\0");
        let mut capacity = [0; 8];
        rig.blk.read_config(0, &mut capacity);
        assert_eq!(u64::from_le_bytes(capacity), SECTORS);
        let mut beyond = [0xff; 8];
        rig.blk.read_config(u64::MAX - 2, &mut beyond);
        assert_eq!(beyond, [0; 8]);
    }

    #[test]
    fn configuration_errors_name_the_field() {
        let file = NamedTempFile::new().unwrap();
        let path = file.path().to_owned();
        let config = |serial: &str, path: &std::path::Path| DiskConfig {
            serial: serial.to_owned(),
            path: path.to_owned(),
            readonly: false,
        };
        let error = |config| Blk::open(&config).unwrap_err().to_string();
        assert!(error(config("", &path)).contains("serial"));
        assert!(error(config(&"x".repeat(21), &path)).contains("serial"));
        assert!(error(config("s", &path)).contains("at least 512"));
        assert!(error(config("s", "/dev/null".as_ref())).contains("regular file or a block device"));
        assert!(error(config("s", "/nonexistent/disk".as_ref())).contains("/nonexistent/disk"));
    }

    #[test]
    fn a_descriptor_allows_what_it_was_opened_for() {
        let file = NamedTempFile::new().unwrap();
        file.as_file().set_len(8192).unwrap();
        let opened = |options: &mut OpenOptions, readonly| {
            Blk::new("d", options.open(file.path()).unwrap(), readonly).map(|_| ()).map_err(|e| e.to_string())
        };
        let mut read = OpenOptions::new();
        read.read(true);
        assert_eq!(opened(&mut read, true), Ok(()));
        assert!(opened(&mut read, false).unwrap_err().contains("writing"));
        assert_eq!(opened(read.write(true), false), Ok(()));
        assert!(opened(OpenOptions::new().write(true), true).unwrap_err().contains("reading"));
        let mut path_only = OpenOptions::new();
        path_only.read(true).custom_flags(libc::O_PATH);
        assert!(opened(&mut path_only, true).unwrap_err().contains("reading"));
    }

    #[test]
    fn two_monitors_do_not_write_to_one_file() {
        let file = NamedTempFile::new().unwrap();
        file.as_file().set_len(8192).unwrap();
        let config = |readonly| DiskConfig { serial: "s".to_owned(), path: file.path().to_owned(), readonly };
        let first = Blk::open(&config(false)).unwrap();
        assert!(matches!(Blk::open(&config(false)), Err(BlkError::InUse)));
        assert!(Blk::open(&config(true)).is_ok());
        drop(first);
        assert!(Blk::open(&config(false)).is_ok());
    }
}
