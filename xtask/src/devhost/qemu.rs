//! Which QEMU the devhost runs in.

use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail};
use rootfs_builder::debian;

use crate::progress::Step;

/// The first major version that is known to emulate the guest kernels rightly
/// (docs/decisions/0803).
const GOOD: u32 = 10;
/// Where Debian 12, which has 7.2, can get a newer one that runs with its libraries.
const RELEASE: &str = "bookworm-backports";

/// A QEMU for x86_64.
#[derive(Debug, PartialEq, Eq)]
pub struct Qemu {
    /// The program.
    pub program: PathBuf,
    /// Where its firmware is, if not where the program looks by itself.
    pub firmware: Option<PathBuf>,
    /// Such as `10.0.2`.
    pub version: String,
}

impl Qemu {
    /// The installed one; if that is older than [`GOOD`], Debian's backport of a
    /// newer one, unpacked below `cache` and not installed. Where that cannot be
    /// had, the installed one with a warning.
    pub fn find(cache: &Path) -> Result<Self> {
        let program = PathBuf::from("qemu-system-x86_64");
        let installed = Self { version: version(&program)?, program, firmware: None };
        if installed.is_good() {
            return Ok(installed);
        }
        match backport(cache) {
            Ok(qemu) => Ok(qemu),
            Err(error) => {
                eprintln!(
                    "warning: no QEMU {GOOD} from {RELEASE} ({error:#}); the devhost runs in QEMU {}, in \
                     which guests can fail for no fault of theirs (docs/decisions/0803)",
                    installed.version
                );
                Ok(installed)
            }
        }
    }

    fn is_good(&self) -> bool {
        self.version
            .split('.')
            .next()
            .and_then(|major| major.parse().ok())
            .is_some_and(|major: u32| major >= GOOD)
    }
}

fn backport(cache: &Path) -> Result<Qemu> {
    let cached = |package: &str| cache.join(RELEASE).join(package).is_dir();
    let packages = ["qemu-system-x86", "qemu-system-data"];
    let step = (!packages.into_iter().all(cached)).then(|| Step::start("Downloading the devhost's QEMU"));
    let [program, firmware] = packages.map(|package| debian::fetch_from(RELEASE, package, cache));
    let program = program?.join("usr/bin/qemu-system-x86_64");
    let firmware = Some(firmware?.join("usr/share/qemu"));
    let qemu = Qemu { version: version(&program)?, program, firmware };
    if !qemu.is_good() {
        bail!("it is version {}", qemu.version);
    }
    if let Some(step) = step {
        step.done(format!("{} from {RELEASE}", qemu.version));
    }
    Ok(qemu)
}

/// The version a QEMU tells of itself.
fn version(program: &Path) -> Result<String> {
    let output = Command::new(program)
        .arg("--version")
        .output()
        .with_context(|| format!("run {}", program.display()))?;
    let text = String::from_utf8_lossy(&output.stdout);
    parse(&text).with_context(|| {
        let error = String::from_utf8_lossy(&output.stderr);
        format!("{} --version says {:?}", program.display(), format!("{text}{error}"))
    })
}

fn parse(version: &str) -> Option<String> {
    let version = version.strip_prefix("QEMU emulator version ")?.split_whitespace().next()?;
    Some(version.to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions() {
        let of = |text| parse(text).map(|version| Qemu { program: "qemu".into(), firmware: None, version });
        let old = of("QEMU emulator version 7.2.22 (Debian 1:7.2+dfsg-7+deb12u18+b3)\nCopyright").unwrap();
        assert_eq!(old.version, "7.2.22");
        assert!(!old.is_good());
        assert!(of("QEMU emulator version 10.0.2\n").unwrap().is_good());
        assert_eq!(of("error while loading shared libraries"), None);
    }
}
