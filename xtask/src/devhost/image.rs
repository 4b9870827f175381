//! What the machine boots into: an initramfs with busybox and modules, cached,
//! and the files of one run, appended to it.

use std::fs::{self, File};
use std::io::Write;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use rootfs_builder::cpio::CpioWriter;
use sha2::{Digest, Sha256};

use super::Cgroups;
use super::kernel::Kernel;
use crate::build;

/// PID 1.
const INIT: &[u8] = include_bytes!("init.sh");

/// The initramfs common to all runs, from `cache` if it is there.
pub fn initramfs(kernel: &Kernel, cache: &Path) -> Result<PathBuf> {
    let busybox = fs::read(build::busybox()?)?;
    let mut hash = Sha256::new();
    for part in [kernel.package.as_bytes(), Kernel::modules_key().as_bytes(), INIT, &busybox] {
        hash.update((part.len() as u64).to_le_bytes());
        hash.update(part);
    }
    let key: String = hash.finalize()[..8].iter().map(|byte| format!("{byte:02x}")).collect();
    let path = cache.join(format!("initramfs-{key}.cpio"));
    if path.exists() {
        return Ok(path);
    }
    build::write_whole(&path, &write_initramfs(kernel, &busybox)?)?;
    Ok(path)
}

fn write_initramfs(kernel: &Kernel, busybox: &[u8]) -> Result<Vec<u8>> {
    let mut cpio = CpioWriter::new(Vec::new());
    for dir in ["bin", "dev", "modules"] {
        cpio.dir(dir, 0o755)?;
    }
    cpio.char_device("dev/console", 0o600, 5, 1)?;
    cpio.file("init", 0o755, INIT)?;
    cpio.file("bin/busybox", 0o755, busybox)?;
    for (list, modules) in ["root", "more"].into_iter().zip(kernel.modules()?) {
        let mut order = String::new();
        for module in modules {
            cpio.file(&format!("modules/{}", module.name), 0o644, &module.content)?;
            order.push_str(&format!("{}\n", module.name));
        }
        cpio.file(&format!("modules/{list}"), 0o644, order.as_bytes())?;
    }
    Ok(cpio.finish()?)
}

/// What differs from run to run.
pub struct RunFiles {
    /// The command as a shell script.
    pub command: Vec<u8>,
    /// Directories to show in the guest.
    pub visible: Vec<PathBuf>,
    /// Whether the command gets a terminal.
    pub terminal: bool,
    /// How cgroups are mounted.
    pub cgroups: Cgroups,
    /// Where in the guest all modules of its kernel are.
    pub modules: PathBuf,
}

impl RunFiles {
    /// Writes `initramfs` followed by these files to `path`.
    pub fn append_to(&self, initramfs: &Path, path: &Path) -> Result<()> {
        fs::copy(initramfs, path).with_context(|| format!("write {}", path.display()))?;
        let mut cpio = CpioWriter::new(Vec::new());
        cpio.dir("run.d", 0o755)?;
        cpio.file("run.d/command", 0o755, &self.command)?;
        let mut visible = Vec::new();
        for dir in &self.visible {
            visible.extend_from_slice(dir.as_os_str().as_bytes());
            visible.push(b'\n');
        }
        cpio.file("run.d/visible", 0o644, &visible)?;
        cpio.file("run.d/cgroups", 0o644, self.cgroups.as_str().as_bytes())?;
        cpio.file("run.d/modules", 0o644, self.modules.as_os_str().as_bytes())?;
        if self.terminal {
            cpio.file("run.d/terminal", 0o644, b"")?;
        }
        File::options().append(true).open(path)?.write_all(&cpio.finish()?)?;
        Ok(())
    }
}
