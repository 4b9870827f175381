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
    unpack(package, cache, |work| download(Command::new("apt-get"), package, work))
}

/// As [`fetch`], from another release of Debian (`trixie`, `sid`) on the mirror
/// this machine's apt is configured with. apt's lists for it are in the cache;
/// the machine's own sources and lists are not touched.
pub fn fetch_from(release: &str, package: &str, cache: &Path) -> Result<PathBuf> {
    let cache = cache.join(release);
    unpack(package, &cache, |work| {
        let sources = work.join("sources.list");
        let keyring = KEYRINGS
            .iter()
            .find(|path| Path::new(path).exists())
            .context("no keyring of Debian's archive on this machine; install debian-archive-keyring")?;
        fs::write(&sources, format!("deb [arch=amd64 signed-by={keyring}] {} {release} main\n", mirror()?))?;
        let apt = || {
            let mut apt = Command::new("apt-get");
            for (key, path) in [
                ("Dir::Etc::sourcelist", sources.as_path()),
                ("Dir::Etc::sourceparts", Path::new("/dev/null")),
                ("Dir::Etc::preferencesparts", Path::new("/dev/null")),
                ("Dir::State::lists", &work.join("lists")),
                ("Dir::Cache", &work.join("cache")),
            ] {
                apt.arg("-o").arg(format!("{key}={}", path.display()));
            }
            // Run by root, apt would download as a user who cannot write here.
            apt.args(["-o", "APT::Sandbox::User=root", "-o", "Acquire::Languages=none"]);
            apt.args(["-o", "Acquire::Retries=3"]);
            apt.args(["-o", "Acquire::IndexTargets::deb::DEP-11::DefaultEnabled=false"]);
            apt
        };
        for dir in ["lists/partial", "cache/archives/partial"] {
            fs::create_dir_all(work.join(dir))?;
        }
        run(apt().args(["-qq", "-o", "APT::Update::Error-Mode=any", "update"]))?;
        download(apt(), package, work)
    })
}

/// The keyring of `debian-archive-keyring`, by the names it has had.
const KEYRINGS: [&str; 2] =
    ["/usr/share/keyrings/debian-archive-keyring.gpg", "/usr/share/keyrings/debian-archive-keyring.pgp"];

/// The mirror of Debian's main archive in this machine's apt configuration.
pub fn mirror() -> Result<String> {
    let output = Command::new("apt-get")
        .args(["indextargets", "--format", "$(ORIGIN) $(LABEL) $(REPO_URI)"])
        .output()
        .context("run apt-get")?;
    String::from_utf8_lossy(&output.stdout)
        .lines()
        // Security updates and backports carry other labels.
        .find_map(|line| line.strip_prefix("Debian Debian "))
        .map(str::to_owned)
        .context("this machine's apt knows no mirror of Debian's archive (`apt-get update`?)")
}

/// Unpacks what `download` fetches into a directory of the cache, once.
fn unpack(package: &str, cache: &Path, download: impl FnOnce(&Path) -> Result<PathBuf>) -> Result<PathBuf> {
    let unpacked = cache.join(package);
    if unpacked.is_dir() {
        return Ok(unpacked);
    }
    let work = cache.join(format!(".{package}.{}", std::process::id()));
    fs::create_dir_all(&work).with_context(|| format!("create {}", work.display()))?;
    let result = download(&work).and_then(|deb| {
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

fn download(mut apt: Command, package: &str, dir: &Path) -> Result<PathBuf> {
    run(apt.args(["-qq", "download", package]).current_dir(dir))?;
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
