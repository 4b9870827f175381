//! `rvmctl logs`: what a guest's kernel and agent said.

use std::{
    fs::File,
    io::{self, IsTerminal, Read, Write},
    os::{fd::AsRawFd, unix::fs::MetadataExt},
    path::{Path, PathBuf},
};

use nix::sys::inotify::{AddWatchFlags, InitFlags, Inotify};

/// Copies the console log at `path`, and before it the older part the monitor
/// has set aside, to standard output; with `follow` until the sandbox is gone.
pub fn show(path: &Path, follow: bool) -> io::Result<()> {
    let stdout = io::stdout();
    let escape = stdout.is_terminal();
    let mut out = stdout.lock();
    let mut log = File::open(path)?;
    // Opened second: what was set aside in between is the file that is open.
    if let Ok(mut old) = File::open(set_aside(path))
        && old.metadata()?.ino() != log.metadata()?.ino()
    {
        copy(&mut old, &mut out, escape)?;
    }
    loop {
        // Before the first read, so that nothing written after it is missed.
        let inotify = Inotify::init(InitFlags::IN_CLOEXEC)?;
        if follow {
            // IN_ATTRIB: the last name of the file is gone. IN_MOVE_SELF: it is set aside.
            let events = AddWatchFlags::IN_MODIFY | AddWatchFlags::IN_ATTRIB | AddWatchFlags::IN_MOVE_SELF;
            inotify.add_watch(format!("/proc/self/fd/{}", log.as_raw_fd()).as_str(), events)?;
        }
        loop {
            let (removed, newest) = (log.metadata()?.nlink() == 0, is_newest(&log, path)?);
            copy(&mut log, &mut out, escape)?;
            if !follow || removed {
                return Ok(());
            }
            match File::open(path) {
                _ if newest => drop(inotify.read_events()?),
                Ok(newer) => {
                    log = newer;
                    break;
                }
                // Set aside a moment ago; the new one is about to be made, or everything removed.
                Err(error) if error.kind() == io::ErrorKind::NotFound => std::thread::yield_now(),
                Err(error) => return Err(error),
            }
        }
    }
}

fn is_newest(log: &File, path: &Path) -> io::Result<bool> {
    let own = log.metadata()?.ino();
    match path.metadata() {
        Ok(newest) => Ok(newest.ino() == own),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(false),
        Err(error) => Err(error),
    }
}

/// Where the monitor puts a log that has become too long.
fn set_aside(path: &Path) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push(".1");
    name.into()
}

fn copy(log: &mut impl Read, out: &mut impl Write, escape: bool) -> io::Result<()> {
    let mut buffer = vec![0; 64 << 10];
    loop {
        let count = log.read(&mut buffer)?;
        let bytes = buffer.get(..count).unwrap_or_default();
        if bytes.is_empty() {
            return out.flush();
        }
        if escape { out.write_all(&visible(bytes))? } else { out.write_all(bytes)? }
    }
}

/// The guest's bytes without what would command a terminal.
fn visible(bytes: &[u8]) -> Vec<u8> {
    let mut text = Vec::with_capacity(bytes.len());
    for byte in bytes {
        match byte {
            b'\r' => {}
            b'\n' | b'\t' | b' '..=b'~' => text.push(*byte),
            0..=0x1f => text.extend([b'^', byte + b'@']),
            0x7f => text.extend(b"^?"),
            _ => text.extend(format!("\\x{byte:02x}").into_bytes()),
        }
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_guest_cannot_command_the_terminal() {
        assert_eq!(visible(b"a\r\n\x1b]0;x\x07\t\x7f\xc3\x9b"), b"a\n^[]0;x^G\t^?\\xc3\\x9b");
        let mut out = Vec::new();
        copy(&mut &b"\x1b[31m"[..], &mut out, false).unwrap();
        assert_eq!(out, b"\x1b[31m");
    }

    #[test]
    fn a_log_that_is_set_aside_is_followed_into_the_new_one() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("console.log");
        std::fs::write(&path, "old").unwrap();
        let old = File::open(&path).unwrap();
        assert!(is_newest(&old, &path).unwrap());
        std::fs::rename(&path, set_aside(&path)).unwrap();
        assert!(!is_newest(&old, &path).unwrap());
        let follower = {
            let path = path.clone();
            std::thread::spawn(move || {
                std::fs::write(&path, "new").unwrap();
                show(&path, true)
            })
        };
        while !path.exists() {
            std::thread::yield_now();
        }
        std::fs::remove_file(&path).unwrap();
        std::fs::remove_file(set_aside(&path)).unwrap();
        let _ = follower.join().unwrap();
    }

    #[test]
    fn following_ends_with_the_file() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("console.log");
        std::fs::write(&path, "").unwrap();
        let follower = {
            let path = path.clone();
            std::thread::spawn(move || show(&path, true))
        };
        std::fs::write(&path, "x").unwrap();
        std::fs::remove_file(&path).unwrap();
        // Opened before or after the removal: both end.
        let _ = follower.join().unwrap();
    }
}
