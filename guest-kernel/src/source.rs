//! The kernel's source: Debian's package, fetched and verified by apt, kept as the archive it carries.
//!
//! apt runs on directories of ours below the cache with the machine's own
//! mirrors and, where the release itself does not carry the series, that
//! mirror's backports. The machine's sources, lists and packages are not touched.

mod apt;

use std::fs::{self, File};
use std::io::{self, Read, Write};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, SystemTime};

use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use crate::cache::{self, Cache};
use crate::{BuildOptions, Error, PACKAGE, Step, command, io_error};

/// A source in the cache.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Source {
    /// Version of the Debian package.
    pub version: String,
    /// Hash of the archive.
    pub sha256: String,
    /// The archive.
    pub tarball: PathBuf,
    /// When Debian released it.
    pub released: SystemTime,
}

/// `<version>.json`, written after the archive: where it is, the archive is whole.
#[derive(Serialize, Deserialize)]
struct Manifest {
    version: String,
    sha256: String,
    downloaded: u64,
}

/// The source in the cache.
pub fn cached(cache: &Cache) -> Result<Option<Source>, Error> {
    let Some((Manifest { version, sha256, .. }, tarball)) = newest(&cache.source_dir())? else {
        return Ok(None);
    };
    Ok(Some(Source { version, sha256, released: released(&tarball)?, tarball }))
}

/// The cached source, or a new one where there is none or a refresh is asked for.
///
/// A refresh that fails leaves the cached one in use: a build must work offline.
pub fn get(cache: &Cache, options: &BuildOptions<'_>) -> Result<Source, Error> {
    let cached = cached(cache)?;
    match cached {
        Some(source) if !options.refresh => Ok(source),
        cached => match (fetch(cache, options.progress), cached) {
            (Ok(source), _) | (Err(_), Some(source)) => Ok(source),
            (Err(source), None) => {
                Err(Error::NoSource { cache: cache.dir().to_owned(), source: Box::new(source) })
            }
        },
    }
}

/// The source downloaded last, and its archive.
fn newest(dir: &Path) -> Result<Option<(Manifest, PathBuf)>, Error> {
    let mut newest: Option<(Manifest, PathBuf)> = None;
    for entry in fs::read_dir(dir).map_err(io_error("read", dir))? {
        let path = entry.map_err(io_error("read", dir))?.path();
        if path.extension().is_none_or(|extension| extension != "json") {
            continue;
        }
        let text = fs::read(&path).map_err(io_error("read", &path))?;
        let Ok(manifest) = serde_json::from_slice::<Manifest>(&text) else { continue };
        let tarball = tarball_path(dir, &manifest.version);
        let later = newest.as_ref().is_none_or(|(newest, _)| newest.downloaded < manifest.downloaded);
        if later && tarball.is_file() {
            newest = Some((manifest, tarball));
        }
    }
    Ok(newest)
}

fn tarball_path(dir: &Path, version: &str) -> PathBuf {
    dir.join(format!("{version}.tar.xz"))
}

/// Downloads Debian's newest package of the series and keeps its archive.
fn fetch(cache: &Cache, progress: &dyn Fn(Step, f64)) -> Result<Source, Error> {
    progress(Step::Download, 0.0);
    let apt_dir = cache.dir().join("apt");
    let package = apt::download(&apt_dir, PACKAGE, &|fraction| progress(Step::Download, fraction))?;
    let version = command::output(Command::new("dpkg-deb").arg("--field").arg(&package).arg("Version"))?;
    let version = version.trim().to_owned();
    if version.is_empty() || version.contains('/') {
        return Err(Error::BadPackage { package, problem: format!("has the version {version:?}") });
    }

    let dir = cache.source_dir();
    let tarball = tarball_path(&dir, &version);
    let partial = tarball.with_extension("part");
    let sha256 = extract(&package, &partial)?;
    fs::rename(&partial, &tarball).map_err(io_error("create", &tarball))?;
    let downloaded = SystemTime::now()
        .duration_since(SystemTime::UNIX_EPOCH)
        .map_or(0, |since_epoch| since_epoch.as_secs());
    let manifest = Manifest { version: version.clone(), sha256: sha256.clone(), downloaded };
    let path = dir.join(format!("{version}.json"));
    fs::write(&path, cache::json(&manifest)).map_err(io_error("write", &path))?;
    fs::remove_file(&package).map_err(io_error("remove", &package))?;
    progress(Step::Download, 1.0);
    Ok(Source { version, sha256, released: released(&tarball)?, tarball })
}

/// Copies the archive out of the package and returns its hash.
fn extract(package: &Path, to: &Path) -> Result<String, Error> {
    let member = format!("./usr/src/{PACKAGE}.tar.xz");
    let mut dpkg = Command::new("dpkg-deb");
    dpkg.arg("--fsys-tarfile").arg(package).stdin(Stdio::null()).stdout(Stdio::piped());
    let mut unpacker = dpkg.spawn().map_err(|source| command::spawn_error(&dpkg, source))?;
    let mut tar = Command::new("tar");
    tar.args(["-xO", &member]).stdout(Stdio::piped());
    if let Some(stdout) = unpacker.stdout.take() {
        tar.stdin(stdout);
    }
    let mut extractor = tar.spawn().map_err(|source| command::spawn_error(&tar, source))?;

    let mut out = File::create(to).map_err(io_error("create", to))?;
    let mut hash = Sha256::new();
    if let Some(mut stdout) = extractor.stdout.take() {
        copy(&mut stdout, &mut out, |bytes| hash.update(bytes)).map_err(io_error("write", to))?;
    }
    out.sync_all().map_err(io_error("write", to))?;
    let extracted = extractor.wait().map_err(|source| command::spawn_error(&tar, source))?;
    // tar stops reading behind the member it wants, so how dpkg-deb ends says nothing.
    unpacker.wait().map_err(|source| command::spawn_error(&dpkg, source))?;
    if !extracted.success() {
        let problem = format!("has no {member}");
        return Err(Error::BadPackage { package: package.to_owned(), problem });
    }
    Ok(cache::hex(&hash.finalize()))
}

/// Unpacks the source into `dir` and returns its top directory.
pub fn unpack(source: &Source, dir: &Path, progress: &dyn Fn(Step, f64)) -> Result<PathBuf, Error> {
    progress(Step::Unpack, 0.0);
    let total = uncompressed_size(&source.tarball)?;
    let mut xz = Command::new("xz");
    xz.args(["-dc", "-T0"]).arg(&source.tarball).stdin(Stdio::null()).stdout(Stdio::piped());
    let mut decompressor = xz.spawn().map_err(|source| command::spawn_error(&xz, source))?;
    let mut tar = Command::new("tar");
    // A third of the archive is register names of one family of graphics cards.
    tar.args(["-x", "--exclude=*/drivers/gpu/drm/amd/*.h", "-C"]).arg(dir).stdin(Stdio::piped());
    let mut extractor = tar.spawn().map_err(|source| command::spawn_error(&tar, source))?;
    if let (Some(mut from), Some(mut to)) = (decompressor.stdout.take(), extractor.stdin.take()) {
        let mut done = 0_u64;
        let copied = copy(&mut from, &mut to, |bytes| {
            done += bytes.len() as u64;
            progress(Step::Unpack, done as f64 / total.max(1) as f64);
        });
        // A broken pipe means that tar has ended early; its status says so below.
        if let Err(error) =
            copied.or_else(|e| if e.kind() == io::ErrorKind::BrokenPipe { Ok(()) } else { Err(e) })
        {
            return Err(io_error("unpack", &source.tarball)(error));
        }
    }
    for (child, command) in [(&mut decompressor, &xz), (&mut extractor, &tar)] {
        let status = child.wait().map_err(|source| command::spawn_error(command, source))?;
        if !status.success() {
            let program = command.get_program().to_string_lossy().into_owned();
            let output = format!("while unpacking {}", source.tarball.display());
            return Err(Error::Failed { program, status, output });
        }
    }
    Ok(dir.join(PACKAGE))
}

/// When Debian released the source: the time of the archive's first member, its top directory.
fn released(tarball: &Path) -> Result<SystemTime, Error> {
    let mut xz = Command::new("xz");
    xz.arg("-dc").arg(tarball).stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::null());
    let mut decompressor = xz.spawn().map_err(|source| command::spawn_error(&xz, source))?;
    let mut header = [0; 512];
    let read = decompressor.stdout.take().map_or(Ok(()), |mut stdout| stdout.read_exact(&mut header));
    // It ends by itself now that its output is closed, and how it ends says nothing.
    decompressor.wait().map_err(|source| command::spawn_error(&xz, source))?;
    read.ok().and_then(|()| modified(&header)).ok_or_else(|| Error::BadPackage {
        package: tarball.to_owned(),
        problem: "does not begin with a member of a tar archive".into(),
    })
}

/// The time of a tar archive's member by its header: octal digits at a fixed place (POSIX, ustar).
fn modified(header: &[u8; 512]) -> Option<SystemTime> {
    let digits = std::str::from_utf8(&header[136..148]).ok()?;
    let seconds = u64::from_str_radix(digits.trim_matches(['\0', ' ']), 8).ok()?;
    SystemTime::UNIX_EPOCH.checked_add(Duration::from_secs(seconds))
}

/// The size the archive unpacks to, for the progress.
fn uncompressed_size(tarball: &Path) -> Result<u64, Error> {
    let list = command::output(Command::new("xz").args(["--robot", "--list"]).arg(tarball))?;
    // "totals", streams, blocks, compressed, uncompressed, ...
    let totals = list.lines().find_map(|line| line.strip_prefix("totals\t"));
    Ok(totals.and_then(|line| line.split('\t').nth(3)?.parse().ok()).unwrap_or(0))
}

/// Copies `from` to `to`, showing every piece to `see`.
fn copy(from: &mut impl Read, to: &mut impl Write, mut see: impl FnMut(&[u8])) -> io::Result<()> {
    let mut buffer = vec![0; 1 << 20];
    loop {
        match from.read(&mut buffer) {
            Ok(0) => return Ok(()),
            Ok(n) => {
                to.write_all(&buffer[..n])?;
                see(&buffer[..n]);
            }
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn cached(dir: &Path, version: &str, downloaded: u64) {
        let manifest = Manifest { version: version.into(), sha256: version.into(), downloaded };
        fs::write(dir.join(format!("{version}.json")), cache::json(&manifest)).unwrap();
        fs::write(tarball_path(dir, version), "").unwrap();
    }

    #[test]
    fn the_source_downloaded_last_is_taken_and_a_broken_one_is_not() {
        let dir = tempfile::tempdir().unwrap();
        assert!(newest(dir.path()).unwrap().is_none());
        cached(dir.path(), "6.12.9-1", 1);
        cached(dir.path(), "6.12.10-1", 2);
        fs::write(dir.path().join("6.12.11-1.json"), "{").unwrap();
        cached(dir.path(), "6.12.12-1", 3);
        fs::remove_file(tarball_path(dir.path(), "6.12.12-1")).unwrap();
        assert_eq!(newest(dir.path()).unwrap().unwrap().0.version, "6.12.10-1");
    }

    #[test]
    fn a_source_is_unpacked_with_progress_and_a_broken_one_refused() {
        let dir = tempfile::tempdir().unwrap();
        let tree = dir.path().join(PACKAGE);
        fs::create_dir(&tree).unwrap();
        fs::write(tree.join("Makefile"), "all:\n").unwrap();
        let tarball = dir.path().join("s.tar.xz");
        let mut tar = Command::new("tar");
        tar.arg("-C").arg(dir.path()).arg("-cJf").arg(&tarball).arg(PACKAGE);
        command::output(&mut tar).unwrap();
        let made = fs::metadata(&tree).unwrap().modified().unwrap();
        let made = made.duration_since(SystemTime::UNIX_EPOCH).unwrap().as_secs();
        let released = released(&tarball).unwrap();
        assert_eq!(released, SystemTime::UNIX_EPOCH + Duration::from_secs(made));
        let source = Source { version: "1".into(), sha256: "x".into(), tarball: tarball.clone(), released };

        let to = dir.path().join("to");
        fs::create_dir(&to).unwrap();
        let last = std::cell::Cell::new(0.0);
        let top = unpack(&source, &to, &|_, fraction| last.set(fraction)).unwrap();
        assert_eq!(fs::read_to_string(top.join("Makefile")).unwrap(), "all:\n");
        assert_eq!(last.get(), 1.0);

        let whole = fs::read(&tarball).unwrap();
        fs::write(&tarball, &whole[..whole.len() / 2]).unwrap();
        assert!(unpack(&source, &to, &|_, _| ()).is_err());
        fs::write(&tarball, "no archive").unwrap();
        assert!(super::released(&tarball).is_err());
    }
}
