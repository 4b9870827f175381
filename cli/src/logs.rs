//! `rvmctl logs`: what a guest's kernel and agent said.

use std::{
    fs::File,
    io::{self, IsTerminal, Read, Write},
    os::unix::fs::MetadataExt,
    path::Path,
};

use nix::sys::inotify::{AddWatchFlags, InitFlags, Inotify};

/// Copies the console log at `path` to standard output; with `follow` until
/// the sandbox is gone.
pub fn show(path: &Path, follow: bool) -> io::Result<()> {
    let mut log = File::open(path)?;
    // Before the first read, so that nothing written after it is missed.
    let inotify = Inotify::init(InitFlags::IN_CLOEXEC)?;
    if follow {
        // IN_ATTRIB: the last name of the file is gone.
        inotify.add_watch(path, AddWatchFlags::IN_MODIFY | AddWatchFlags::IN_ATTRIB)?;
    }
    let stdout = io::stdout();
    let escape = stdout.is_terminal();
    let mut out = stdout.lock();
    loop {
        let removed = log.metadata()?.nlink() == 0;
        copy(&mut log, &mut out, escape)?;
        if !follow || removed {
            return Ok(());
        }
        inotify.read_events()?;
    }
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
