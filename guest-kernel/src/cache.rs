//! The cache: sources and kernels, one builder at a time, nothing half done ever in its place.
//!
//! ```text
//! linux/lock                                held during a build
//! linux/source/<package version>.tar.xz     as Debian has it, with <package version>.json beside it
//! linux/apt/                                the private apt's lists
//! linux/scratch/                            a build under way
//! linux/<flavour>-<key>/                    vmlinux, config, kernel.json
//! ```

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::Command;

use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use crate::compile::Built;
use crate::source::Source;
use crate::{Error, Flavour, Kernel, command, config, io_error, order, patches};

/// Changes when the builder makes something else of the same inputs.
const BUILDER_VERSION: u32 = 3;

/// The directory of everything to do with kernels.
pub struct Cache {
    dir: PathBuf,
}

/// `kernel.json`: what cannot be read off the image.
#[derive(Serialize, Deserialize)]
struct Manifest {
    version: String,
    package_version: String,
}

impl Cache {
    /// Opens the cache below `cache_dir`, creating it where it is not there.
    pub fn open(cache_dir: &Path) -> Result<Self, Error> {
        let dir = cache_dir.join("linux");
        fs::create_dir_all(dir.join("source")).map_err(io_error("create", &dir))?;
        let dir = dir.canonicalize().map_err(io_error("open", &dir))?;
        Ok(Self { dir })
    }

    /// The directory.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// Where sources are kept.
    pub fn source_dir(&self) -> PathBuf {
        self.dir.join("source")
    }

    /// Waits until no other process builds in this cache, calling `waiting` first where one does.
    /// The lock goes with the returned file.
    pub fn lock(&self, waiting: &dyn Fn()) -> Result<File, Error> {
        let path = self.dir.join("lock");
        let lock = File::create(&path).map_err(io_error("create", &path))?;
        if lock.try_lock().is_err() {
            waiting();
            lock.lock().map_err(io_error("lock", &path))?;
        }
        Ok(lock)
    }

    /// An empty directory to build in. Only under the lock: what a build that was killed left is removed.
    pub fn scratch(&self) -> Result<Scratch, Error> {
        let path = self.dir.join("scratch");
        match fs::remove_dir_all(&path) {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
                return Err(io_error("remove", &path)(error));
            }
            _ => {}
        }
        fs::create_dir(&path).map_err(io_error("create", &path))?;
        Ok(Scratch { path })
    }

    fn kernel_dir(&self, flavour: Flavour, key: &str) -> PathBuf {
        self.dir.join(format!("{}-{key}", flavour.as_str()))
    }

    /// The kernel with this key, if it has been built of `source`.
    pub fn find(&self, flavour: Flavour, key: &str, source: &Source) -> Option<Kernel> {
        let dir = self.kernel_dir(flavour, key);
        let manifest: Manifest = serde_json::from_slice(&fs::read(dir.join("kernel.json")).ok()?).ok()?;
        let (vmlinux, config) = (dir.join("vmlinux"), dir.join("config"));
        (vmlinux.is_file() && config.is_file()).then_some(Kernel {
            vmlinux,
            config,
            version: manifest.version,
            package_version: manifest.package_version,
            released: source.released,
        })
    }

    /// Moves what was built to its place.
    pub fn insert(
        &self,
        flavour: Flavour,
        key: &str,
        built: &Built,
        source: &Source,
    ) -> Result<Kernel, Error> {
        let staging = self.dir.join("scratch/kernel");
        fs::create_dir(&staging).map_err(io_error("create", &staging))?;
        for (from, name) in [(&built.vmlinux, "vmlinux"), (&built.config, "config")] {
            fs::rename(from, staging.join(name)).map_err(io_error("move", from))?;
        }
        let manifest = Manifest { version: built.version.clone(), package_version: source.version.clone() };
        let path = staging.join("kernel.json");
        fs::write(&path, json(&manifest)).map_err(io_error("write", &path))?;
        for name in ["vmlinux", "config", "kernel.json"] {
            let path = staging.join(name);
            File::open(&path).and_then(|file| file.sync_all()).map_err(io_error("write", &path))?;
        }
        let dir = self.kernel_dir(flavour, key);
        // Whatever is there was not a whole kernel, or find() would have returned it.
        match fs::remove_dir_all(&dir) {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
                return Err(io_error("remove", &dir)(error));
            }
            _ => {}
        }
        fs::rename(&staging, &dir).map_err(io_error("create", &dir))?;
        self.find(flavour, key, source).ok_or_else(|| {
            let vanished = std::io::Error::from(std::io::ErrorKind::NotFound);
            io_error("read back", &dir)(vanished)
        })
    }
}

/// The directory of a build under way, removed with everything in it.
pub struct Scratch {
    path: PathBuf,
}

impl Scratch {
    /// The directory.
    pub fn path(&self) -> &Path {
        &self.path
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        // The next build removes what could not be removed now.
        let _ = fs::remove_dir_all(&self.path);
    }
}

/// A hash over everything that decides what the image is: source, fragments, patches, order of functions, builder, compiler and linker.
pub fn key(source: &Source, flavour: Flavour) -> Result<String, Error> {
    let mut hash = Sha256::new();
    let mut part = |bytes: &[u8]| {
        hash.update((bytes.len() as u64).to_le_bytes());
        hash.update(bytes);
    };
    part(&BUILDER_VERSION.to_le_bytes());
    part(source.sha256.as_bytes());
    for fragment in config::fragments(flavour) {
        part(fragment.as_bytes());
    }
    for (_, patch) in patches::of(flavour) {
        part(patch.as_bytes());
    }
    if let Some(functions) = order::of(flavour) {
        part(functions.as_bytes());
    }
    let programs: &[&str] = if flavour == Flavour::Full { &["gcc", "ld", "pahole"] } else { &["gcc", "ld"] };
    for program in programs {
        part(command::output(Command::new(program).arg("--version"))?.as_bytes());
    }
    Ok(hex(&hash.finalize()[..8]))
}

/// `value` as JSON text with a newline at its end.
pub fn json<T: Serialize>(value: &T) -> Vec<u8> {
    // Structs of strings always serialize.
    let mut text = serde_json::to_vec_pretty(value).unwrap_or_default();
    text.push(b'\n');
    text
}

/// Lower-case hexadecimal.
pub fn hex(bytes: &[u8]) -> String {
    use std::fmt::Write;
    bytes.iter().fold(String::with_capacity(2 * bytes.len()), |mut text, byte| {
        let _ = write!(text, "{byte:02x}");
        text
    })
}

#[cfg(test)]
mod tests {
    use std::time::{Duration, SystemTime};

    use super::*;
    use crate::MAX_AGE;

    fn source(sha256: &str) -> Source {
        Source {
            version: "6.12.1-1".into(),
            sha256: sha256.into(),
            tarball: "unused".into(),
            released: SystemTime::UNIX_EPOCH + Duration::from_secs(1_800_000_000),
        }
    }

    #[test]
    fn the_key_depends_on_source_and_flavour_alone() {
        let first = key(&source("a"), Flavour::Rvm).unwrap();
        assert_eq!(first, key(&source("a"), Flavour::Rvm).unwrap());
        assert_ne!(first, key(&source("b"), Flavour::Rvm).unwrap());
        for other in [Flavour::Peer, Flavour::Trial] {
            assert_ne!(first, key(&source("a"), other).unwrap());
        }
    }

    #[test]
    fn a_kernel_is_found_once_it_is_inserted_and_replaces_a_broken_one() {
        let dir = tempfile::tempdir().unwrap();
        let cache = Cache::open(dir.path()).unwrap();
        let source = source("a");
        assert_eq!(cache.find(Flavour::Rvm, "k", &source), None);
        let broken = cache.dir().join("rvm-k");
        fs::create_dir(&broken).unwrap();
        fs::write(broken.join("kernel.json"), "{}").unwrap();
        assert_eq!(cache.find(Flavour::Rvm, "k", &source), None);

        let scratch = cache.scratch().unwrap();
        let built = Built {
            vmlinux: scratch.path().join("vmlinux.stripped"),
            config: scratch.path().join(".config"),
            version: "6.12.1".into(),
        };
        fs::write(&built.vmlinux, "elf").unwrap();
        fs::write(&built.config, "CONFIG_A=y").unwrap();
        let kernel = cache.insert(Flavour::Rvm, "k", &built, &source).unwrap();
        drop(scratch);
        assert!(!cache.dir().join("scratch").exists());
        assert_eq!(fs::read_to_string(&kernel.vmlinux).unwrap(), "elf");
        assert_eq!((kernel.version.as_str(), kernel.package_version.as_str()), ("6.12.1", "6.12.1-1"));
        assert_eq!(kernel.outdated(source.released + MAX_AGE), None);
        let later = source.released + MAX_AGE + Duration::from_secs(1);
        assert_eq!(kernel.outdated(later), Some(MAX_AGE + Duration::from_secs(1)));
        assert_eq!(cache.find(Flavour::Rvm, "k", &source), Some(kernel));
        assert_eq!(cache.find(Flavour::Trial, "k", &source), None);
    }

    #[test]
    fn scratch_removes_what_a_killed_build_left() {
        let dir = tempfile::tempdir().unwrap();
        let cache = Cache::open(dir.path()).unwrap();
        let left = cache.dir().join("scratch/deep/file");
        fs::create_dir_all(&left).unwrap();
        let scratch = cache.scratch().unwrap();
        assert_eq!(fs::read_dir(scratch.path()).unwrap().count(), 0);
    }

    #[test]
    fn a_second_builder_is_told_to_wait() {
        let dir = tempfile::tempdir().unwrap();
        let cache = Cache::open(dir.path()).unwrap();
        let first = cache.lock(&|| panic!("nobody else builds")).unwrap();
        let (sender, told) = std::sync::mpsc::channel();
        std::thread::scope(|scope| {
            let second =
                scope.spawn(|| Cache::open(dir.path()).unwrap().lock(&|| sender.send(()).unwrap()).is_ok());
            told.recv().unwrap();
            drop(first);
            assert!(second.join().unwrap());
        });
    }
}
