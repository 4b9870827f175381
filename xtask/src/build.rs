//! Builds what the other tasks need: binaries, guest kernel, initramfs, images.

use std::collections::HashSet;
use std::fs::{self, File};
use std::io::{BufRead, BufReader, Read};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::SystemTime;

use anyhow::{Context, Result, bail};
use guest_kernel::{BuildOptions, Flavour};
use rootfs_builder::bootstrap::Bootstrap;
use rootfs_builder::image::Image;
use rootfs_builder::{debian, initramfs, layer, split};

use crate::packages::{self, Purpose};
use crate::progress::Step;

/// The host's programs, by cargo package.
const HOST_PACKAGES: &[&str] = &["rvm-shim", "rvm-vmm", "rvmctl"];
/// The guest's program.
const AGENT_PACKAGE: &str = "rvm-agent";
/// All that the root of a container of the parity suite holds.
const PROBE_PACKAGE: &str = "rvm-probe";
/// A guest of the tests' own.
const HOSTILE_PACKAGE: &str = "rvm-hostile";
/// All of them are linked statically: guest and probe have no libraries, and on
/// the host shim and monitor are started for every container, where a dynamic
/// linker is a good part of the time until they do something of use.
const STATIC_TARGET: &str = "x86_64-unknown-linux-gnu";

/// What [`busybox_image`] is called once imported.
pub const BUSYBOX_NAME: &str = "docker.io/library/busybox:latest";

/// What [`debian_image`] is called once imported.
pub const DEBIAN_NAME: &str = "docker.io/library/debian-services:latest";

/// What [`workloads_image`] is called once imported.
const WORKLOADS_NAME: &str = "docker.io/library/debian-workloads:latest";
/// Tag of [`debian_image_of_layers`].
const LAYERED_TAG: &str = "five";

/// How the programs are compiled.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Profile {
    /// What the demo and tests run.
    Fast,
    /// What is installed and measured.
    Release,
}

impl Profile {
    /// cargo's name of it, which is that of the directory below the target directory as well.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Fast => "fast",
            Self::Release => "release",
        }
    }
}

/// Everything rvm consists of, built.
#[derive(Clone, Debug)]
pub struct Artifacts {
    /// `containerd-shim-rvm-v2`.
    pub shim: PathBuf,
    /// `rvmctl`.
    pub rvmctl: PathBuf,
    /// `rvm-vmm`.
    pub monitor: PathBuf,
    /// The guest kernel, `vmlinux`.
    pub kernel: PathBuf,
    /// The guest's initramfs.
    pub initramfs: PathBuf,
}

/// Builds everything in `profile`, with this guest kernel; quick when nothing changed.
pub fn artifacts(profile: Profile, flavour: Flavour) -> Result<Artifacts> {
    packages::ensure(&[Purpose::Build, Purpose::GuestKernel])?;
    // Tests choose where something dies.
    let [host, guest]: [&[&str]; 2] = match profile {
        Profile::Fast => [&["rvm-shim/faults"], &["rvm-agent/faults"]],
        Profile::Release => [&[], &[]],
    };
    let binaries = static_build("Compiling the host's programs", profile, HOST_PACKAGES, host)?;
    // By itself, so that it gets no features of libraries that only the others use.
    let agent = static_build("Compiling the agent", profile, &[AGENT_PACKAGE], guest)?.join(AGENT_PACKAGE);
    let initramfs = target_dir().join("rvm").join(profile.as_str()).join("initramfs.cpio");
    let content = initramfs::build(&fs::read(&agent).with_context(|| format!("read {}", agent.display()))?)?;
    write_if_changed(&initramfs, &content)?;
    Ok(Artifacts {
        shim: binaries.join("containerd-shim-rvm-v2"),
        rvmctl: binaries.join("rvmctl"),
        monitor: binaries.join("rvm-vmm"),
        kernel: kernel(flavour)?.vmlinux,
        initramfs,
    })
}

/// The guest kernel of a flavour, from the cache or compiled.
pub fn kernel(flavour: Flavour) -> Result<guest_kernel::Kernel> {
    kernel_of(flavour, false)
}

/// The same; asks Debian for a newer point release first where `refresh` is set.
pub fn kernel_of(flavour: Flavour, refresh: bool) -> Result<guest_kernel::Kernel> {
    packages::ensure(match flavour {
        Flavour::Full => &[Purpose::GuestKernel, Purpose::FullGuestKernel],
        _ => &[Purpose::GuestKernel],
    })?;
    let step = Step::start(format!("Guest kernel ({})", flavour.as_str()));
    let kernel = guest_kernel::build(&BuildOptions {
        cache_dir: cache_dir()?,
        jobs: std::thread::available_parallelism().map_or(1, usize::from),
        flavour,
        refresh,
        progress: &|doing, fraction| step.at(fraction, doing.as_str()),
    })?;
    step.done(&kernel.version);
    if let Some(outdated) = outdated(&kernel) {
        eprintln!("warning: {outdated}");
    }
    Ok(kernel)
}

/// What to say of a kernel that has been released too long ago to have all security fixes.
pub fn outdated(kernel: &guest_kernel::Kernel) -> Option<String> {
    let days = kernel.outdated(SystemTime::now())?.as_secs() / 86400;
    Some(format!(
        "the guest kernel {} was released {days} days ago; `cargo xtask kernel --refresh` asks Debian for a newer one",
        kernel.package_version
    ))
}

/// A busybox image as an OCI archive for `ctr images import`; its reference is [`BUSYBOX_NAME`].
pub fn busybox_image() -> Result<PathBuf> {
    let path = target_dir().join("rvm").join("busybox.oci.tar");
    let archive = Image::new(BUSYBOX_NAME, vec![layer::busybox(&busybox()?)?])?.archive()?;
    write_if_changed(&path, &archive)?;
    Ok(path)
}

/// A Debian with programs people run, as an OCI archive for `ctr images import`; its reference is
/// [`DEBIAN_NAME`]. Made once, which takes minutes and the network.
pub fn debian_image() -> Result<PathBuf> {
    let text = |items: &[&str]| items.iter().map(|&item| item.to_owned()).collect();
    let bootstrap = Bootstrap {
        release: "bookworm".into(),
        packages: text(&[
            "nginx-light",
            "postgresql",
            "postgresql-contrib",
            "python3",
            "curl",
            // Networks and packet filters of a container's own, and file systems in files.
            "iproute2",
            "iptables",
            "ipset",
            "nftables",
            "e2fsprogs",
            "erofs-utils",
            "mount",
            "squashfs-tools",
        ]),
        // Documentation, and a compiler that PostgreSQL loads for large queries only: the
        // archive has to fit into the devhost's memory twice.
        excluded: text(&[
            "/usr/share/doc/*",
            "/usr/share/man/*",
            "/usr/share/locale/*",
            "/usr/share/info/*",
            "/usr/share/i18n/*",
            "/usr/lib/x86_64-linux-gnu/libz3*",
            "/usr/lib/x86_64-linux-gnu/libLLVM*",
            "/usr/lib/llvm-*",
            "/usr/lib/postgresql/*/lib/bitcode/*",
        ]),
    };
    bootstrapped("Debian image", DEBIAN_NAME, &bootstrap)
}

/// A Debian for `cargo xtask bench workloads`, as an OCI archive. Made once, which takes minutes and the network.
pub fn workloads_image() -> Result<PathBuf> {
    let text = |items: &[&str]| items.iter().map(|&item| item.to_owned()).collect();
    let bootstrap = Bootstrap {
        release: "bookworm".into(),
        packages: text(&["apt", "git", "npm", "cargo", "python3-pip", "postgresql", "postgresql-contrib"]),
        excluded: text(&["/usr/share/doc/*", "/usr/share/man/*", "/usr/share/locale/*", "/usr/share/info/*"]),
    };
    bootstrapped("Debian image for workloads", WORKLOADS_NAME, &bootstrap)
}

fn bootstrapped(what: &str, name: &str, bootstrap: &Bootstrap) -> Result<PathBuf> {
    packages::ensure(&[Purpose::DebianImage])?;
    let step = Step::start(what);
    let image = bootstrap.image(name, &cache_dir()?.join("images"))?;
    step.done("");
    Ok(image)
}

/// The [`debian_image`] at `image` with its content in several layers, as an OCI archive; its reference
/// is that of `image` with [`LAYERED_TAG`].
pub fn debian_image_of_layers(image: &Path, count: usize) -> Result<PathBuf> {
    let key = image.file_stem().unwrap_or_default().to_string_lossy();
    let path = cache_dir()?.join("images").join(format!("{key}-{count}-layers.oci.tar"));
    if !path.is_file() {
        let step = Step::start(format!("Debian image of {count} layers"));
        let name = DEBIAN_NAME.replace("latest", LAYERED_TAG);
        let one = fs::read(image).with_context(|| format!("read {}", image.display()))?;
        write_whole(&path, &split::archive_of_layers(&one, &name, count)?)?;
        step.done("");
    }
    Ok(path)
}

/// Debian's statically linked busybox, not installed.
pub fn busybox() -> Result<PathBuf> {
    let cache = debian_cache_dir()?;
    if !cache.join("busybox-static").exists() {
        packages::ensure_known("busybox-static")?;
    }
    let tree = debian::fetch("busybox-static", &cache)?;
    for path in ["bin/busybox", "usr/bin/busybox"] {
        if tree.join(path).is_file() {
            return Ok(tree.join(path));
        }
    }
    bail!("package busybox-static has no busybox (unpacked in {})", tree.display())
}

/// The checkout this xtask was built from.
pub fn workspace_dir() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).parent().map(PathBuf::from).unwrap_or_default()
}

/// cargo's target directory.
pub fn target_dir() -> PathBuf {
    match std::env::var_os("CARGO_TARGET_DIR") {
        Some(dir) => std::path::absolute(&dir).unwrap_or_else(|_| dir.into()),
        None => workspace_dir().join("target"),
    }
}

/// Where heavy artefacts are kept, keyed by what they were built from:
/// `~/.cache/rvm`.
pub fn cache_dir() -> Result<PathBuf> {
    let base = match std::env::var_os("XDG_CACHE_HOME").filter(|dir| !dir.is_empty()) {
        Some(dir) => PathBuf::from(dir),
        None => PathBuf::from(std::env::var_os("HOME").context("HOME is not set")?).join(".cache"),
    };
    Ok(base.join("rvm"))
}

/// Where Debian packages are unpacked that are not to be installed.
pub fn debian_cache_dir() -> Result<PathBuf> {
    Ok(cache_dir()?.join("debian"))
}

/// Compiles cargo packages' programs, with a bar. `configure` may add to the command.
pub fn cargo_build(
    name: &str,
    profile: Profile,
    packages: &[&str],
    configure: impl FnOnce(&mut Command),
) -> Result<()> {
    let step = Step::start(name);
    let total = crates(packages)?;
    let mut command = cargo("build");
    command.args(["--quiet", "--profile", profile.as_str(), "--bins"]);
    command.args(["--message-format", "json-render-diagnostics"]);
    for package in packages {
        command.args(["--package", package]);
    }
    configure(&mut command);
    let mut child =
        command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().context("start cargo build")?;
    let mut stderr = child.stderr.take().context("cargo's stderr")?;
    let diagnostics = std::thread::spawn(move || {
        let mut text = Vec::new();
        let _ = stderr.read_to_end(&mut text);
        String::from_utf8_lossy(&text).into_owned()
    });

    #[derive(serde::Deserialize)]
    struct Message {
        reason: String,
        package_id: Option<String>,
    }
    let mut built = HashSet::new();
    let stdout = child.stdout.take().context("cargo's stdout")?;
    for line in BufReader::new(stdout).lines() {
        let line = line?;
        let Ok(Message { reason, package_id: Some(id) }) = serde_json::from_str(&line) else { continue };
        if reason == "compiler-artifact" {
            let crate_name = id.rsplit(['/', '#']).next().unwrap_or_default().to_owned();
            built.insert(id);
            step.at(built.len() as f64 / total.max(built.len()) as f64, crate_name);
        }
    }
    let status = child.wait()?;
    let diagnostics = diagnostics.join().unwrap_or_default();
    if !status.success() {
        bail!("cargo build failed ({status}):\n{diagnostics}");
    }
    step.done("");
    Ok(())
}

/// Compiles the program that looks at a container from inside. Returns its path.
pub fn probe() -> Result<PathBuf> {
    Ok(static_build("Compiling the probe", Profile::Fast, &[PROBE_PACKAGE], &[])?.join(PROBE_PACKAGE))
}

/// Compiles the guest that attacks its monitor. Returns its program, and an initramfs with that as `/init`.
pub fn hostile() -> Result<(PathBuf, PathBuf)> {
    let program = static_build("Compiling the hostile guest", Profile::Fast, &[HOSTILE_PACKAGE], &[])?
        .join(HOSTILE_PACKAGE);
    let content = fs::read(&program).with_context(|| format!("read {}", program.display()))?;
    let archive = target_dir().join("rvm").join("hostile.cpio");
    write_if_changed(&archive, &initramfs::build(&content)?)?;
    Ok((program, archive))
}

/// Compiles the monitor that writes down what its guest asks of its shares. Returns its program, which is where no
/// installation is made from.
pub fn recording_monitor() -> Result<PathBuf> {
    let (name, package) = ("Compiling a monitor that records", "rvm-vmm");
    Ok(static_build_in("record", name, Profile::Fast, &[package], &["rvm-vmm/record"])?.join(package))
}

/// Compiles packages' programs with these features, linked statically. Returns the directory they are in.
fn static_build(name: &str, profile: Profile, packages: &[&str], features: &[&str]) -> Result<PathBuf> {
    static_build_in("static", name, profile, packages, features)
}

/// The same in a directory of the target directory's.
fn static_build_in(
    dir: &str,
    name: &str,
    profile: Profile,
    packages: &[&str],
    features: &[&str],
) -> Result<PathBuf> {
    // Naming the target keeps the flags away from build scripts and procedural macros.
    let mut flags = std::env::var("RUSTFLAGS").unwrap_or_default();
    flags.push_str(" -C target-feature=+crt-static");
    let target_dir = target_dir().join(dir);
    cargo_build(name, profile, packages, |command| {
        command.env("RUSTFLAGS", flags.trim()).args(["--target", STATIC_TARGET]);
        command.arg("--target-dir").arg(&target_dir);
        for feature in features {
            command.args(["--features", feature]);
        }
    })?;
    Ok(target_dir.join(STATIC_TARGET).join(profile.as_str()))
}

/// How many crates go into `packages`.
fn crates(packages: &[&str]) -> Result<usize> {
    let mut command = cargo("tree");
    command.args(["--prefix", "none", "--format", "{p}", "--no-dedupe", "--edges", "normal,build"]);
    for package in packages {
        command.args(["--package", package]);
    }
    let output = command.output().context("run cargo tree")?;
    if !output.status.success() {
        bail!("cargo tree failed:\n{}", String::from_utf8_lossy(&output.stderr));
    }
    let text = String::from_utf8_lossy(&output.stdout);
    Ok(text.lines().filter(|line| !line.is_empty()).collect::<HashSet<_>>().len())
}

fn cargo(subcommand: &str) -> Command {
    let mut command = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    command.arg(subcommand).current_dir(workspace_dir());
    command
}

/// Replaces a file as a whole, and only when it differs: what is made from it
/// in turn sees by its times whether it must be made anew.
fn write_if_changed(path: &Path, content: &[u8]) -> Result<()> {
    if File::open(path).is_ok_and(|file| same(file, content)) {
        return Ok(());
    }
    write_whole(path, content)
}

/// Writes a file that is never seen half written.
pub fn write_whole(path: &Path, content: &[u8]) -> Result<()> {
    let dir = path.parent().context("a path with a parent")?;
    fs::create_dir_all(dir).with_context(|| format!("create {}", dir.display()))?;
    let partial = dir.join(format!(".partial.{}", std::process::id()));
    fs::write(&partial, content).with_context(|| format!("write {}", partial.display()))?;
    fs::rename(&partial, path).with_context(|| format!("move {} into place", path.display()))
}

fn same(mut file: File, content: &[u8]) -> bool {
    let mut present = Vec::with_capacity(content.len());
    file.read_to_end(&mut present).is_ok() && present == content
}
