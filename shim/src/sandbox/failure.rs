//! What a guest that never came up, or went away, has left to say.

use std::{
    fs::File,
    io::{Read, Seek, SeekFrom},
    path::Path,
};

/// How much of the console is looked at.
const TAIL_LEN: u64 = 16 << 10;
/// How many of the console's last lines an error carries.
const TAIL_LINES: usize = 3;

/// The part of the guest's console that says what went wrong: the kernel's own
/// panic line where there is one, else the last lines. `None` where the console
/// is empty.
pub(crate) fn console_summary(log: &Path) -> Option<String> {
    let text = read_tail(log).ok()?;
    let lines: Vec<String> = text.lines().map(clean).filter(|line| !line.is_empty()).collect();
    if let Some(panic) = lines.iter().find(|line| line.contains("Kernel panic")) {
        return Some(panic.clone());
    }
    let last = &lines[lines.len().saturating_sub(TAIL_LINES)..];
    if last.is_empty() { None } else { Some(last.join(" | ")) }
}

fn read_tail(log: &Path) -> std::io::Result<String> {
    let mut file = File::open(log)?;
    let len = file.metadata()?.len();
    file.seek(SeekFrom::Start(len.saturating_sub(TAIL_LEN)))?;
    let mut bytes = Vec::new();
    file.take(TAIL_LEN).read_to_end(&mut bytes)?;
    Ok(String::from_utf8_lossy(&bytes).into_owned())
}

/// The guest writes what it likes; an error message is one printable line.
fn clean(line: &str) -> String {
    const MAX_LEN: usize = 200;
    line.chars().filter(|c| !c.is_control()).take(MAX_LEN).collect::<String>().trim().to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn summary(text: &str) -> Option<String> {
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), text).unwrap();
        console_summary(file.path())
    }

    #[test]
    fn a_panic_is_what_matters() {
        let text = "[    0.1] Booting\n[    0.5] Kernel panic - not syncing: VFS: Unable to mount root fs\r\n\
                    [    0.5] CPU: 0 PID: 1\n[    0.5] Rebooting in 1 seconds..\n";
        assert_eq!(
            summary(text).unwrap(),
            "[    0.5] Kernel panic - not syncing: VFS: Unable to mount root fs"
        );
    }

    #[test]
    fn else_the_last_lines_in_one() {
        assert_eq!(summary("a\nb\x1b[31m\n\nc\nd\n").unwrap(), "b[31m | c | d");
        assert_eq!(summary(""), None);
        assert_eq!(console_summary(Path::new("/nonexistent")), None);
    }
}
