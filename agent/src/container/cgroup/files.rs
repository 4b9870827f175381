//! The files of one cgroup, opened below its directory.

use std::{
    fs::File,
    io::{Read, Write},
    os::{
        fd::{AsFd, BorrowedFd, OwnedFd},
        unix::fs::FileExt,
    },
};

use nix::{
    fcntl::{OFlag, openat},
    sys::stat::Mode,
};
use tokio::io::{Interest, unix::AsyncFd};

use crate::{
    error::{Step, StepResult},
    sys::{StableFd, register},
};

/// Longest content read of a file. The longest there is, `memory.stat`, has two
/// KiB; `io.stat` has a line for each block device.
const MAX_LEN: u64 = 64 * 1024;

fn open(dir: BorrowedFd<'_>, name: &str, flags: OFlag) -> std::io::Result<File> {
    let fd = openat(dir, name, flags | OFlag::O_CLOEXEC | OFlag::O_NOFOLLOW, Mode::empty())?;
    Ok(File::from(fd))
}

/// Content of the file `name`.
pub fn read(dir: BorrowedFd<'_>, name: &str) -> std::io::Result<String> {
    let mut content = String::new();
    open(dir, name, OFlag::O_RDONLY)?.take(MAX_LEN).read_to_string(&mut content)?;
    Ok(content)
}

/// Writes `value` to the file `name`, which must exist.
pub fn write(dir: BorrowedFd<'_>, name: &str, value: &str) -> std::io::Result<()> {
    // One write: the kernel takes each for a value of its own.
    open(dir, name, OFlag::O_WRONLY)?.write_all(value.as_bytes())
}

/// A file of flat keys (`populated 0`) whose changes the kernel announces:
/// `cgroup.events`, `memory.events`.
#[derive(Debug)]
pub struct Watched {
    name: &'static str,
    file: AsyncFd<Events>,
}

#[derive(Debug)]
struct Events(File);

impl AsFd for Events {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

impl std::os::fd::AsRawFd for Events {
    fn as_raw_fd(&self) -> std::os::fd::RawFd {
        self.0.as_raw_fd()
    }
}

impl StableFd for Events {}

impl Watched {
    /// Opens `name`.
    pub fn open(dir: BorrowedFd<'_>, name: &'static str) -> StepResult<Self> {
        let step = || format!("watch {name}");
        let file = open(dir, name, OFlag::O_RDONLY).step(step)?;
        Ok(Self { name, file: register(Events(file), Interest::PRIORITY).step(step)? })
    }

    /// Returns the first value of `key` for which `wanted` holds.
    pub async fn wait_for(&self, key: &str, wanted: impl Fn(u64) -> bool) -> StepResult<u64> {
        let step = || format!("watch {}", self.name);
        loop {
            // Reading is what makes the next change an event.
            let value = self.value(key).step(step)?;
            if wanted(value) {
                return Ok(value);
            }
            self.file.ready(Interest::PRIORITY).await.step(step)?.clear_ready();
        }
    }

    fn value(&self, key: &str) -> std::io::Result<u64> {
        let mut buffer = [0; 1024];
        let length = self.file.get_ref().0.read_at(&mut buffer, 0)?;
        let content = String::from_utf8_lossy(buffer.get(..length).unwrap_or_default()).into_owned();
        Ok(value_of(&content, key).unwrap_or(0))
    }
}

/// Value of `key` in a file of flat keys.
pub fn value_of(content: &str, key: &str) -> Option<u64> {
    content.lines().find_map(|line| line.strip_prefix(key)?.strip_prefix(' ')?.trim().parse().ok())
}

/// For `CLONE_INTO_CGROUP` and everything opened below it.
pub fn open_dir(path: &std::path::Path) -> nix::Result<OwnedFd> {
    nix::fcntl::open(path, OFlag::O_DIRECTORY | OFlag::O_CLOEXEC, Mode::empty())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys_are_whole_words() {
        let content = "low 1\nhigh 2\noom 3\noom_kill 4\noom_group_kill 5\n";
        assert_eq!(value_of(content, "oom"), Some(3));
        assert_eq!(value_of(content, "oom_kill"), Some(4));
        assert_eq!(value_of(content, "max"), None);
        assert_eq!(value_of("frozen x\n", "frozen"), None);
    }

    #[test]
    fn files_are_read_and_written_where_they_are() {
        let dir = tempfile::tempdir().unwrap();
        let fd = open_dir(dir.path()).unwrap();
        let kind = |result: std::io::Result<()>| result.unwrap_err().kind();
        assert_eq!(kind(write(fd.as_fd(), "pids.max", "1")), std::io::ErrorKind::NotFound);
        std::fs::write(dir.path().join("pids.max"), "").unwrap();
        write(fd.as_fd(), "pids.max", "17").unwrap();
        assert_eq!(read(fd.as_fd(), "pids.max").unwrap(), "17");
    }
}
