//! The guest's initramfs: the agent as `/init` and places to mount things.

use std::io;

use crate::cpio::CpioWriter;

/// Directories the agent mounts on or writes to.
const DIRS: &[(&str, u32)] =
    &[("dev", 0o755), ("etc", 0o755), ("proc", 0o555), ("run", 0o755), ("sys", 0o555), ("tmp", 0o1777)];

/// Builds the archive, uncompressed, with the agent in whole pages: our guest kernel makes
/// them the file's, and all guests share them. The same agent gives the same bytes.
pub fn build(agent: &[u8]) -> io::Result<Vec<u8>> {
    let mut cpio = CpioWriter::new(Vec::with_capacity(agent.len() + 8192));
    cpio.file_in_pages("init", 0o755, agent)?;
    for &(path, mode) in DIRS {
        cpio.dir(path, mode)?;
    }
    // The kernel opens it as the agent's standard streams before anything is mounted.
    cpio.char_device("dev/console", 0o600, 5, 1)?;
    cpio.finish()
}

#[cfg(test)]
mod tests {
    use super::*;
    use sha2::{Digest, Sha256};

    #[test]
    fn two_builds_one_hash() {
        let agent = b"\x7fELF agent";
        let first = Sha256::digest(build(agent).unwrap());
        assert_eq!(first, Sha256::digest(build(agent).unwrap()));
        assert_ne!(first, Sha256::digest(build(b"\x7fELF other").unwrap()));
    }
}
