//! The guest kernel: Debian's Linux source, our configuration fragments
//! (`config/*.config`), one uncompressed `vmlinux`.
//!
//! [`build`] returns the kernel from the cache, or makes it:
//!
//! 1. [`source`]: the package [`PACKAGE`] from Debian through a private apt
//!    configuration, checked against apt's signed index, kept in the cache.
//! 2. [`patches`]: what we change in it.
//! 3. [`config`]: the fragments on top of `allnoconfig` (or `tinyconfig` for
//!    the peer), and a check that every line of them holds in the result.
//! 4. [`compile`]: `make vmlinux`, stripped.
//! 5. [`cache`]: under a key over everything that goes in, in one rename.
//!
//! With a cached kernel nothing is asked of the network; with a cached source
//! only the compiler is needed.

#![warn(missing_docs)]

mod cache;
mod command;
mod compile;
mod config;
pub mod order;
mod patches;
mod source;

use std::path::PathBuf;
use std::time::{Duration, SystemTime};

/// The Debian binary package with the source. It pins the series: Debian keeps
/// only the newest point release of it, and [`Kernel::version`] says which one
/// was built.
pub const PACKAGE: &str = "linux-source-6.12";

/// Debian packages a build needs beyond Debian's `required` ones.
///
/// `libelf-dev` is for objtool, `bc` for the kernel's time constants,
/// `debian-archive-keyring` for the signature of apt's index.
pub const BUILD_PACKAGES: &[&str] = &[
    "bc",
    "binutils",
    "bison",
    "debian-archive-keyring",
    "flex",
    "gcc",
    "libc6-dev",
    "libelf-dev",
    "make",
    "patch",
    "xz-utils",
];

/// What [`Flavour::Full`] needs besides: the program that makes the kernel's types known to BPF programs.
pub const FULL_BUILD_PACKAGES: &[&str] = &["dwarves"];

/// Which kernel to build.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Flavour {
    /// The kernel rvm's guests run.
    Rvm,
    /// The same with what only some containers need and all would pay for, in build time, memory or boot time: tracing,
    /// IPsec, mitigations made by the compiler. See `config/full.config`.
    Full,
    /// [`Flavour::Rvm`] with what QEMU's `microvm` needs to boot it: the boot benchmark's peer. See `config/peer.config`.
    Peer,
    /// What a peer's microVM would be given: the baseline of the boot benchmark.
    /// See `config/trial.config`.
    Trial,
}

impl Flavour {
    /// Every flavour.
    pub const ALL: [Self; 4] = [Self::Rvm, Self::Full, Self::Peer, Self::Trial];

    /// The flavour's name in the cache and in messages.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Rvm => "rvm",
            Self::Full => "full",
            Self::Peer => "peer",
            Self::Trial => "trial",
        }
    }
}

/// What a build is doing. Each step is reported with a fraction from 0 to 1.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Step {
    /// Waiting for another build that uses the same cache.
    Wait,
    /// Reading Debian's signed index and downloading the source.
    Download,
    /// Unpacking the source.
    Unpack,
    /// Making the configuration.
    Configure,
    /// Compiling and linking.
    Compile,
}

impl Step {
    /// A few words for a progress bar.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Wait => "waiting for another kernel build",
            Self::Download => "downloading the kernel source",
            Self::Unpack => "unpacking the kernel source",
            Self::Configure => "configuring the kernel",
            Self::Compile => "compiling the kernel",
        }
    }
}

/// What [`build`] is to do.
pub struct BuildOptions<'a> {
    /// Directory that outlives builds, on a disk with 3 GB free.
    pub cache_dir: PathBuf,
    /// Compilers to run at once.
    pub jobs: usize,
    /// Which kernel.
    pub flavour: Flavour,
    /// Ask Debian for a newer point release than the cached one.
    pub refresh: bool,
    /// Told of every step and how far it is, from 0 to 1.
    pub progress: &'a dyn Fn(Step, f64),
}

/// How long after its release a kernel is still taken for current. Debian releases a point release with security fixes
/// every few weeks.
pub const MAX_AGE: Duration = Duration::from_secs(90 * 24 * 3600);

/// A built kernel.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Kernel {
    /// The uncompressed ELF image.
    pub vmlinux: PathBuf,
    /// What `uname -r` says in the guest.
    pub version: String,
    /// The version of the Debian package it was built from.
    pub package_version: String,
    /// When Debian released that.
    pub released: SystemTime,
    /// Its complete configuration.
    pub config: PathBuf,
}

impl Kernel {
    /// How long ago it was released, where that is longer than [`MAX_AGE`].
    pub fn outdated(&self, now: SystemTime) -> Option<Duration> {
        now.duration_since(self.released).ok().filter(|age| *age > MAX_AGE)
    }
}

/// Why there is no kernel.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A file or directory of the cache cannot be used.
    #[error("{what} {}", path.display())]
    Io {
        /// What was tried.
        what: &'static str,
        /// On which path.
        path: PathBuf,
        /// Why not.
        #[source]
        source: std::io::Error,
    },
    /// A program is missing.
    #[error("cannot run {program}: install the Debian packages {}", BUILD_PACKAGES.join(" "))]
    Spawn {
        /// The program.
        program: String,
        /// Why not.
        #[source]
        source: std::io::Error,
    },
    /// A program failed.
    #[error("{program} failed ({status}):\n{output}")]
    Failed {
        /// The program and what it was to do.
        program: String,
        /// How it ended.
        status: std::process::ExitStatus,
        /// The end of what it printed.
        output: String,
    },
    /// apt on this machine names no Debian mirror.
    #[error(
        "no Debian mirror found: apt's sources name no suite of {codename} with the component main \
         (looked for one that can have {PACKAGE})"
    )]
    NoMirror {
        /// Code name of the Debian release.
        codename: String,
    },
    /// The source cannot be had and none is cached.
    #[error("cannot download {PACKAGE} and none is cached in {}", cache.display())]
    NoSource {
        /// The cache.
        cache: PathBuf,
        /// What apt said.
        #[source]
        source: Box<Error>,
    },
    /// The Debian package is not as expected.
    #[error("{}: {problem}", package.display())]
    BadPackage {
        /// The package.
        package: PathBuf,
        /// What is wrong with it.
        problem: String,
    },
    /// The kernel's configuration does not take a fragment's line.
    #[error(
        "these lines of the configuration fragments do not hold in this kernel \
         (an option that it depends on is missing, or its name has changed): {}",
        lines.join(", ")
    )]
    Config {
        /// The lines.
        lines: Vec<String>,
    },
    /// The kernel knows mitigations that nobody has decided on.
    #[error(
        "this kernel has mitigations of CPU faults that no configuration fragment names, neither \"=y\" nor \"is not set\": \
         {} (decide in guest-kernel/config/hardening.config)",
        options.join(", ")
    )]
    Mitigations {
        /// The options.
        options: Vec<String>,
    },
    /// The mitigations are not where they were.
    #[error("{kconfig} of this kernel describes no mitigation of CPU faults: where are they now?")]
    NoMitigations {
        /// Where they were.
        kconfig: &'static str,
    },
}

/// Turns an I/O error into [`Error::Io`].
fn io_error(what: &'static str, path: impl Into<PathBuf>) -> impl FnOnce(std::io::Error) -> Error {
    let path = path.into();
    move |source| Error::Io { what, path, source }
}

/// Returns the kernel from the cache, building it where it is not there.
pub fn build(options: &BuildOptions<'_>) -> Result<Kernel, Error> {
    let cache = cache::Cache::open(&options.cache_dir)?;
    // What is in the cache is whole: a build of another flavour is nothing to wait for.
    if let Some(source) = source::cached(&cache)?.filter(|_| !options.refresh) {
        let key = cache::key(&source, options.flavour)?;
        if let Some(kernel) = cache.find(options.flavour, &key, &source) {
            return Ok(kernel);
        }
    }
    let _lock = cache.lock(&|| (options.progress)(Step::Wait, 0.0))?;
    let source = source::get(&cache, options)?;
    let key = cache::key(&source, options.flavour)?;
    if let Some(kernel) = cache.find(options.flavour, &key, &source) {
        return Ok(kernel);
    }
    let scratch = cache.scratch()?;
    let tree = source::unpack(&source, scratch.path(), options.progress)?;
    patches::apply(patches::of(options.flavour), &tree)?;
    let build_dir = scratch.path().join("build");
    (options.progress)(Step::Configure, 0.0);
    config::configure(&tree, &build_dir, options)?;
    let built = compile::compile(&tree, &build_dir, options)?;
    cache.insert(options.flavour, &key, &built, &source)
}
