//! Files from Debian's packages without installing them.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail};

/// Downloads the candidate version of `package` with apt (which verifies it
/// against the archive's signed index) and unpacks it below `cache`. Returns
/// the directory it was unpacked to; a package fetched before is used as it is,
/// so that nothing needs the network twice. Remove the directory to fetch anew.
pub fn fetch(package: &str, cache: &Path) -> Result<PathBuf> {
    let unpacked = cache.join(package);
    if unpacked.is_dir() {
        return Ok(unpacked);
    }
    let work = cache.join(format!(".{package}.{}", std::process::id()));
    fs::create_dir_all(&work).with_context(|| format!("create {}", work.display()))?;
    let result = download(package, &work).and_then(|deb| {
        let tree = work.join("tree");
        run(Command::new("dpkg-deb").arg("-x").arg(&deb).arg(&tree))?;
        match fs::rename(&tree, &unpacked) {
            // Somebody else was quicker; theirs is the same.
            Err(_) if unpacked.is_dir() => Ok(()),
            other => other.with_context(|| format!("move {} into place", unpacked.display())),
        }
    });
    let _ = fs::remove_dir_all(&work);
    result?;
    Ok(unpacked)
}

/// The package a meta package such as `linux-image-amd64` currently stands
/// for: its first dependency whose name starts with `prefix`.
pub fn resolve_meta(meta: &str, prefix: &str) -> Result<String> {
    let output = Command::new("apt-cache").args(["depends", meta]).output().context("run apt-cache")?;
    String::from_utf8_lossy(&output.stdout)
        .lines()
        .filter_map(|line| line.trim().strip_prefix("Depends: "))
        .find(|name| name.starts_with(prefix))
        .map(str::to_owned)
        .with_context(|| format!("apt knows no package {meta} (are its lists empty? `apt-get update`)"))
}

fn download(package: &str, dir: &Path) -> Result<PathBuf> {
    run(Command::new("apt-get").args(["-qq", "download", package]).current_dir(dir))?;
    for entry in fs::read_dir(dir)? {
        let path = entry?.path();
        if path.extension().is_some_and(|e| e == "deb") {
            return Ok(path);
        }
    }
    bail!("apt-get download {package} left no package file")
}

fn run(command: &mut Command) -> Result<()> {
    let output = command.output().with_context(|| format!("run {}", command.get_program().display()))?;
    if !output.status.success() {
        bail!(
            "{command:?} failed ({}):\n{}",
            output.status,
            String::from_utf8_lossy(&output.stderr).trim_end()
        );
    }
    Ok(())
}
