//! Docker of a Debian release, unpacked and not installed.

use std::fs;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use rootfs_builder::debian;

use crate::build;

/// Names the directory to the end-to-end cases: `bin`, and `config` for `DOCKER_CONFIG`.
pub const DIR_ENV: &str = "RVM_DOCKER_DIR";
/// The release whose Docker the gate runs with: 26.1.
pub const RELEASE: &str = "trixie";
/// The release with what is newest.
pub const NEWEST: &str = "sid";

/// Packages, and what is wanted of each.
const PROGRAMS: [(&str, &[&str]); 3] = [
    ("docker.io", &["usr/sbin/dockerd", "usr/sbin/docker-proxy"]),
    ("docker-cli", &["usr/bin/docker"]),
    ("docker-compose", &[]),
];
/// Has what `docker run --init` puts into containers; beside `tini` in newer releases.
const INIT: [&str; 2] = ["tini", "tini-static"];
const INIT_PROGRAM: &str = "usr/bin/tini-static";
const COMPOSE: &str = "usr/libexec/docker/cli-plugins/docker-compose";

/// Unpacks what `release` has and puts links to it together in a directory.
pub fn stage(release: &str) -> Result<PathBuf> {
    let cache = build::debian_cache_dir()?;
    let fetch = |package: &str| debian::fetch_from(release, package, &cache);
    let dir = build::target_dir().join("rvm").join("docker").join(release);
    for (package, programs) in PROGRAMS {
        let tree = fetch(package)?;
        for program in programs {
            link(&tree.join(program), &dir.join("bin"), None)?;
        }
        if package == "docker-compose" {
            link(&tree.join(COMPOSE), &dir.join("config/cli-plugins"), None)?;
        }
    }
    for package in INIT {
        let program = fetch(package)?.join(INIT_PROGRAM);
        if program.is_file() {
            link(&program, &dir.join("bin"), Some("docker-init"))?;
            return Ok(dir);
        }
    }
    anyhow::bail!("none of Debian {release}'s {INIT:?} has {INIT_PROGRAM}")
}

/// Makes a link to `file` in `dir`, under its own name or another.
fn link(file: &Path, dir: &Path, name: Option<&str>) -> Result<()> {
    anyhow::ensure!(file.is_file(), "{} is not there", file.display());
    fs::create_dir_all(dir).with_context(|| format!("create {}", dir.display()))?;
    let link = match name {
        Some(name) => dir.join(name),
        None => dir.join(file.file_name().unwrap_or_default()),
    };
    // Another run may be doing the same: the name is never missing.
    let new = link.with_added_extension(std::process::id().to_string());
    symlink(file, &new).with_context(|| format!("link {}", new.display()))?;
    fs::rename(&new, &link).with_context(|| format!("link {}", link.display()))
}
