//! Writer of `newc` cpio archives, the format of an initramfs
//! (Linux `Documentation/driver-api/early-userspace/buffer-format.rst`).
//!
//! Everything that could differ between two builds is fixed: owner root,
//! modification time 0, inode numbers in order of entry.

use std::io::{self, Write};

const S_IFDIR: u32 = 0o040_000;
const S_IFREG: u32 = 0o100_000;
const S_IFLNK: u32 = 0o120_000;
const S_IFCHR: u32 = 0o020_000;

/// What the guest's memory is shared by.
const PAGE: u64 = 4096;
/// Longest name with its NULs that Linux takes (`PATH_MAX`).
const MAX_NAME: u64 = 4096;
const HEADER_SIZE: u64 = 110;

/// A cpio archive being written. Paths are relative to the root and are not
/// created implicitly: a directory comes before what it contains.
pub struct CpioWriter<W: Write> {
    out: W,
    written: u64,
    inode: u32,
}

impl<W: Write> CpioWriter<W> {
    /// Starts an archive at the beginning of `out`.
    pub fn new(out: W) -> Self {
        Self { out, written: 0, inode: 0 }
    }

    /// A directory.
    pub fn dir(&mut self, path: &str, mode: u32) -> io::Result<()> {
        self.entry(path, S_IFDIR | mode, 2, (0, 0), &[])
    }

    /// A regular file.
    pub fn file(&mut self, path: &str, mode: u32, content: &[u8]) -> io::Result<()> {
        self.entry(path, S_IFREG | mode, 1, (0, 0), content)
    }

    /// A regular file whose content begins at a page's beginning: NULs behind its name make
    /// up for what is missing, for which there is always room behind the start of a page.
    pub fn file_in_pages(&mut self, path: &str, mode: u32, content: &[u8]) -> io::Result<()> {
        let name = self.written + HEADER_SIZE;
        let shortest = name + path.len() as u64 + 1;
        let nuls = shortest.next_multiple_of(PAGE) - shortest;
        if shortest + nuls - name > MAX_NAME {
            return Err(io::Error::new(
                io::ErrorKind::InvalidInput,
                format!("{path}: no room for its padding"),
            ));
        }
        let name = [path, &"\0".repeat(nuls as usize)].concat();
        self.file(&name, mode, content)
    }

    /// A symbolic link.
    pub fn symlink(&mut self, path: &str, target: &str) -> io::Result<()> {
        self.entry(path, S_IFLNK | 0o777, 1, (0, 0), target.as_bytes())
    }

    /// A character device node.
    pub fn char_device(&mut self, path: &str, mode: u32, major: u32, minor: u32) -> io::Result<()> {
        self.entry(path, S_IFCHR | mode, 1, (major, minor), &[])
    }

    /// Writes the trailer. Returns the underlying writer.
    pub fn finish(mut self) -> io::Result<W> {
        self.inode = 0;
        self.header("TRAILER!!!", 0, 1, (0, 0), 0, 0)?;
        // The kernel looks for the next archive of a concatenation at 4-byte
        // boundaries; boot loaders like whole blocks.
        self.pad(512)?;
        self.out.flush()?;
        Ok(self.out)
    }

    fn entry(&mut self, path: &str, mode: u32, nlink: u32, rdev: (u32, u32), data: &[u8]) -> io::Result<()> {
        let size = u32::try_from(data.len()).map_err(|_| {
            io::Error::new(io::ErrorKind::FileTooLarge, format!("{path}: cpio holds up to 4 GiB"))
        })?;
        self.inode += 1;
        self.header(path, mode, nlink, rdev, size, self.inode)?;
        self.write(data)?;
        self.pad(4)
    }

    fn header(
        &mut self,
        path: &str,
        mode: u32,
        nlink: u32,
        rdev: (u32, u32),
        size: u32,
        inode: u32,
    ) -> io::Result<()> {
        // ino mode uid gid nlink mtime size devmajor devminor rdevmajor rdevminor namesize check
        let name_size = path.len() as u32 + 1;
        let fields = [inode, mode, 0, 0, nlink, 0, size, 0, 0, rdev.0, rdev.1, name_size, 0];
        let mut header = String::from("070701");
        for field in fields {
            header.push_str(&format!("{field:08x}"));
        }
        self.write(header.as_bytes())?;
        self.write(path.as_bytes())?;
        self.write(&[0])?;
        self.pad(4)
    }

    fn write(&mut self, data: &[u8]) -> io::Result<()> {
        self.out.write_all(data)?;
        self.written += data.len() as u64;
        Ok(())
    }

    fn pad(&mut self, boundary: u64) -> io::Result<()> {
        let missing = self.written.next_multiple_of(boundary) - self.written;
        self.write(&vec![0; missing as usize])
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_can_begin_with_a_page() {
        for before in 0..3 {
            let mut cpio = CpioWriter::new(Vec::new());
            for at in 0..before {
                cpio.dir(&format!("{at}"), 0o755).unwrap();
            }
            cpio.file_in_pages("init", 0o755, b"hello").unwrap();
            let bytes = cpio.finish().unwrap();
            assert_eq!(&bytes[4096..4101], b"hello");
            let header = before * 112;
            let size = format!("{:08x}", 4096 - header - 110);
            assert_eq!(&bytes[header + 94..header + 102], size.as_bytes());
            assert_eq!(&bytes[header + 110..header + 115], b"init\0");
        }
        let mut cpio = CpioWriter::new(Vec::new());
        cpio.file("f", 0o644, &[1; 3872]).unwrap();
        assert!(cpio.file_in_pages("init", 0o755, b"hello").is_err(), "a page more would be too much");
    }

    #[test]
    fn layout_is_the_documented_one() {
        let mut cpio = CpioWriter::new(Vec::new());
        cpio.dir("d", 0o755).unwrap();
        cpio.file("d/f", 0o644, b"hello").unwrap();
        cpio.char_device("c", 0o600, 5, 1).unwrap();
        let bytes = cpio.finish().unwrap();

        // The directory: 110 bytes of header, "d\0" pads to 112.
        assert_eq!(&bytes[..6], b"070701");
        assert_eq!(&bytes[14..22], b"000041ed");
        assert_eq!(&bytes[110..112], b"d\0");
        // The file: header at 112, name "d/f\0" to 226 pads to 228, data to 233 pads to 236.
        assert_eq!(&bytes[112 + 54..112 + 62], b"00000005");
        assert_eq!(&bytes[228..233], b"hello");
        // The node's rdev.
        assert_eq!(&bytes[236..242], b"070701");
        assert_eq!(&bytes[236 + 78..236 + 94], b"0000000500000001");
        assert_eq!(bytes.len() % 512, 0);
        assert!(bytes.windows(11).any(|w| w == b"TRAILER!!!\0"));
    }
}
