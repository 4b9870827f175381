//! The file behind the serial console.
//!
//! A guest may print for ever: the log is at most two files of [`LIMIT`] bytes,
//! the older one named `<log>.1`.

use std::fs::{File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

/// Largest size of each of the two files.
pub const LIMIT: u64 = 1 << 20;

/// A log of bounded size. Writes collect until the end of a line.
pub struct ConsoleLog {
    path: PathBuf,
    file: File,
    older: File,
    size: u64,
    limit: u64,
    line: Vec<u8>,
}

/// Longest line written as one.
const LINE_MAX: usize = 1024;
/// Bytes copied at once.
const PIECE: usize = 64 << 10;

impl ConsoleLog {
    /// Appends to the log at `path`, creating it and the older one.
    pub fn open(path: &Path) -> io::Result<Self> {
        Self::with_limit(path, LIMIT)
    }

    fn with_limit(path: &Path, limit: u64) -> io::Result<Self> {
        let mut older = path.as_os_str().to_owned();
        older.push(".1");
        let (file, older) = (append_to(path)?, append_to(Path::new(&older))?);
        let size = file.metadata()?.len();
        Ok(Self { path: path.to_owned(), file, older, size, limit, line: Vec::with_capacity(LINE_MAX) })
    }

    /// Adds a byte of output.
    pub fn put(&mut self, byte: u8) -> io::Result<()> {
        self.line.push(byte);
        if byte == b'\n' || self.line.len() >= LINE_MAX { self.flush() } else { Ok(()) }
    }

    /// Writes out an unfinished line.
    pub fn flush(&mut self) -> io::Result<()> {
        if self.line.is_empty() {
            return Ok(());
        }
        let line = std::mem::replace(&mut self.line, Vec::with_capacity(LINE_MAX));
        if self.size + line.len() as u64 > self.limit {
            self.turn_over()?;
        }
        self.size += line.len() as u64;
        self.file.write_all(&line)
    }

    /// Makes the log the older one and begins anew, in the same two files: no name is
    /// given to anything once the monitor is shut in.
    fn turn_over(&mut self) -> io::Result<()> {
        self.older.set_len(0)?;
        let mut piece = vec![0; PIECE];
        let mut copied = 0;
        while copied < self.size {
            let count = self.file.read_at(&mut piece, copied)?;
            let Some(read) = piece.get(..count).filter(|read| !read.is_empty()) else { break };
            self.older.write_all(read)?;
            copied += count as u64;
        }
        self.file.set_len(0)?;
        self.size = 0;
        Ok(())
    }
}

fn append_to(path: &Path) -> io::Result<File> {
    OpenOptions::new().read(true).append(true).create(true).custom_flags(libc::O_NOFOLLOW).open(path)
}

impl Drop for ConsoleLog {
    fn drop(&mut self) {
        if let Err(e) = self.flush() {
            log::warn!("console log {}: {e}", self.path.display());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn endless_output_keeps_its_end_in_bounded_files() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("console.log");
        let mut log = ConsoleLog::with_limit(&path, 1000).unwrap();
        for number in 0..10_000 {
            for byte in format!("line {number}\n").bytes() {
                log.put(byte).unwrap();
            }
        }
        "no newline".bytes().for_each(|b| log.put(b).unwrap());
        drop(log);
        let now = std::fs::read_to_string(&path).unwrap();
        let old = std::fs::read_to_string(dir.path().join("console.log.1")).unwrap();
        assert!(now.len() <= 1000 && old.len() <= 1000);
        let all = old + &now;
        assert!(all.ends_with("line 9998\nline 9999\nno newline"));
        assert!(all.len() > 1000, "the older file holds what came before");
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 2);
    }

    #[test]
    fn log_is_appended_to() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("console.log");
        std::fs::write(&path, "before\n").unwrap();
        let mut log = ConsoleLog::open(&path).unwrap();
        b"after\n".iter().for_each(|b| log.put(*b).unwrap());
        assert_eq!(std::fs::read_to_string(&path).unwrap(), "before\nafter\n");
    }
}
