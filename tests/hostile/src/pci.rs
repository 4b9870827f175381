//! A PCI function from user space: taken from its driver, its first BAR mapped.

use std::fs::{File, OpenOptions};
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::ptr::{self, NonNull};

use crate::Result;

const DEVICES: &str = "/sys/bus/pci/devices";
const VIRTIO_VENDOR: u16 = 0x1af4;
/// Device numbers of virtio devices, less their type.
const FIRST_VIRTIO_DEVICE: u16 = 0x1040;

/// A virtio device's function.
pub struct Function {
    /// Its configuration space.
    pub config: File,
    bar: NonNull<u8>,
    /// Bytes of the BAR.
    pub bar_len: usize,
}

/// A function that has not been taken.
pub struct Found {
    dir: PathBuf,
    /// Type of virtio device.
    pub kind: u16,
}

/// Every virtio device of the machine, in the order of their slots.
pub fn all() -> Result<Vec<Found>> {
    let mut found = Vec::new();
    for entry in std::fs::read_dir(DEVICES)? {
        let dir = entry?.path();
        if number(&dir, "vendor")? == VIRTIO_VENDOR {
            let kind = number(&dir, "device")?.wrapping_sub(FIRST_VIRTIO_DEVICE);
            found.push(Found { dir, kind });
        }
    }
    found.sort_by(|a, b| a.dir.cmp(&b.dir));
    Ok(found)
}

fn number(dir: &Path, file: &str) -> Result<u16> {
    let text = std::fs::read_to_string(dir.join(file))?;
    Ok(u16::from_str_radix(text.trim().trim_start_matches("0x"), 16)?)
}

impl Found {
    /// Takes it from its driver, if it has one, and maps it.
    pub fn take(&self) -> Result<Function> {
        let driver = self.dir.join("driver");
        if driver.exists() {
            let name = self.dir.file_name().ok_or("a device has a name")?.to_string_lossy().into_owned();
            std::fs::write(driver.join("unbind"), name)?;
        }
        let config = OpenOptions::new().read(true).write(true).open(self.dir.join("config"))?;
        // Memory decoding and bus mastering, which a driver turns off when it goes.
        config.write_all_at(&6u16.to_le_bytes(), 4)?;
        let resource = OpenOptions::new().read(true).write(true).open(self.dir.join("resource0"))?;
        let bar_len = usize::try_from(resource.metadata()?.len())?;
        let access = libc::PROT_READ | libc::PROT_WRITE;
        // SAFETY: a new mapping of the BAR, which nobody has yet.
        let bar = unsafe {
            libc::mmap(ptr::null_mut(), bar_len, access, libc::MAP_SHARED, resource.as_raw_fd(), 0)
        };
        if bar == libc::MAP_FAILED {
            return Err(std::io::Error::last_os_error().into());
        }
        let bar = NonNull::new(bar.cast()).ok_or("mapped at 0")?;
        Ok(Function { config, bar, bar_len })
    }
}

impl Function {
    /// Reads a register of the BAR.
    pub fn get<T: Copy>(&self, offset: usize) -> T {
        // SAFETY: `place` has checked that the register lies in the BAR; only integers are read.
        unsafe { ptr::read_volatile(self.place::<T>(offset)) }
    }

    /// Writes a register of the BAR.
    pub fn put<T: Copy>(&self, offset: usize, value: T) {
        // SAFETY: `place` has checked that the register lies in the BAR.
        unsafe { ptr::write_volatile(self.place::<T>(offset), value) }
    }

    fn place<T>(&self, offset: usize) -> *mut T {
        assert!(offset.checked_add(size_of::<T>()).is_some_and(|end| end <= self.bar_len));
        // SAFETY: within the mapping, as was just checked.
        let place: *mut T = unsafe { self.bar.add(offset) }.as_ptr().cast();
        assert!(place.is_aligned());
        place
    }

    /// Where the BAR has a structure of the virtio transport, and the 4 bytes behind
    /// the capability that says so (virtio 1.2, 4.1.4).
    pub fn structure(&self, kind: u8) -> Result<(usize, u32)> {
        const VENDOR: u8 = 9;
        let byte = |at: u8| -> Result<u8> {
            let mut byte = [0];
            self.config.read_exact_at(&mut byte, u64::from(at))?;
            Ok(byte[0])
        };
        let word = |at: u8| -> Result<u32> {
            let mut word = [0; 4];
            self.config.read_exact_at(&mut word, u64::from(at))?;
            Ok(u32::from_le_bytes(word))
        };
        let mut at = byte(0x34)?;
        while at != 0 {
            if byte(at)? == VENDOR && byte(at + 3)? == kind {
                return Ok((word(at + 8)? as usize, word(at + 16)?));
            }
            at = byte(at + 1)?;
        }
        Err(format!("no structure {kind}").into())
    }
}
