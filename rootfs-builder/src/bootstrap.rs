//! A whole Debian as an image: what mmdebstrap installs, cached by what was asked for.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail};
use sha2::{Digest, Sha256};

use crate::{debian, image::Image};

/// What is installed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Bootstrap {
    /// Release, such as `bookworm`.
    pub release: String,
    /// Packages beside those of Debian's smallest variant.
    pub packages: Vec<String>,
    /// Paths that packages bring and the image does without, as dpkg's `path-exclude`.
    pub excluded: Vec<String>,
}

/// Changes when the same [`Bootstrap`] would give another image.
const VERSION: &str = "2";

/// Debian packages that building one needs.
pub const PACKAGES: &[&str] = &["mmdebstrap", "util-linux"];

impl Bootstrap {
    /// The image as an OCI archive below `cache`, made when it is not there yet:
    /// that takes the network and a few minutes. Remove the file to have newer packages.
    pub fn image(&self, name: &str, cache: &Path) -> Result<PathBuf> {
        let archive = cache.join(format!("{}-{}.oci.tar", self.release, self.key(name)));
        if archive.is_file() {
            return Ok(archive);
        }
        fs::create_dir_all(cache).with_context(|| format!("create {}", cache.display()))?;
        let work = cache.join(format!(".bootstrap.{}", std::process::id()));
        fs::create_dir_all(&work)?;
        let result = self.install(&work.join("root.tar")).and_then(|()| {
            let tar = fs::read(work.join("root.tar"))?;
            let partial = work.join("oci.tar");
            fs::write(&partial, Image::of_tars(name, vec![tar]).archive()?)?;
            fs::rename(&partial, &archive).context("move the archive into place")
        });
        fs::remove_dir_all(&work).with_context(|| format!("remove {}", work.display()))?;
        result.map(|()| archive)
    }

    /// Everything that decides what the image is.
    fn key(&self, name: &str) -> String {
        let text = format!("{VERSION}\n{name}\n{self:?}");
        Sha256::digest(text).iter().take(6).map(|byte| format!("{byte:02x}")).collect()
    }

    fn install(&self, tar: &Path) -> Result<()> {
        let mut arguments = vec!["--variant=minbase".to_owned(), "--format=tar".to_owned()];
        arguments.push(format!("--include={}", self.packages.join(",")));
        arguments.extend(self.excluded.iter().map(|path| format!("--dpkgopt=path-exclude={path}")));
        let root = is_root();
        let mut command = if root {
            // What it mounts for the packages' scripts stays in a namespace of its own.
            let mut command = Command::new("unshare");
            command.args(["--mount", "--propagation", "private", "mmdebstrap", "--mode=root"]);
            command
        } else {
            let mut command = Command::new("mmdebstrap");
            command.arg("--mode=unshare");
            command
        };
        command.args(arguments).arg(&self.release).arg(tar).arg(debian::mirror()?);
        // Times of files, so that two builds from the same packages are the same.
        command.env("SOURCE_DATE_EPOCH", "0").env("DEBIAN_FRONTEND", "noninteractive");
        let output = command.output().with_context(|| format!("run {:?}", command.get_program()))?;
        if !output.status.success() {
            let text = String::from_utf8_lossy(&output.stderr);
            let lines: Vec<&str> = text.lines().collect();
            bail!(
                "{command:?} failed ({}):\n{}",
                output.status,
                lines[lines.len().saturating_sub(20)..].join("\n")
            );
        }
        Ok(())
    }
}

fn is_root() -> bool {
    use std::os::unix::fs::MetadataExt;
    fs::metadata("/proc/self").is_ok_and(|meta| meta.uid() == 0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn another_package_another_key() {
        let one = Bootstrap { release: "bookworm".into(), packages: vec!["a".into()], excluded: Vec::new() };
        let other = Bootstrap { packages: vec!["a".into(), "b".into()], ..one.clone() };
        assert_eq!(one.key("x"), one.clone().key("x"));
        assert_ne!(one.key("x"), other.key("x"));
        assert_ne!(one.key("x"), one.key("y"));
    }

    #[test]
    fn what_is_cached_is_not_made_again() -> Result<()> {
        let cache = std::env::temp_dir().join(format!("rvm-bootstrap-{}", std::process::id()));
        let one = Bootstrap { release: "none".into(), packages: Vec::new(), excluded: Vec::new() };
        fs::create_dir_all(&cache)?;
        let archive = cache.join(format!("none-{}.oci.tar", one.key("x")));
        fs::write(&archive, "cached")?;
        let found = one.image("x", &cache);
        fs::remove_dir_all(&cache)?;
        assert_eq!(found?, archive);
        Ok(())
    }
}
