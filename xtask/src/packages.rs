//! Debian packages the tasks need, kept next to what they are needed for.

use std::collections::BTreeSet;
use std::ffi::OsString;
use std::path::Path;
use std::process::{Command, Stdio};

use anyhow::{Context, Result, bail};

/// What a task is about to do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Purpose {
    /// Compile our binaries and small images.
    Build,
    /// Compile the guest kernel.
    GuestKernel,
    /// Compile the full one, beyond that.
    FullGuestKernel,
    /// Run containers with a private containerd: demo and end-to-end tests.
    Containers,
    /// Make an image of a whole Debian.
    DebianImage,
    /// Start the software-emulated machine.
    Devhost,
    /// Have AppArmor's profiles loaded by clients.
    AppArmor,
    /// Measure side by side with peers.
    Bench,
    /// Compile what tests file systems.
    FileSystemTests,
    /// Compile libFuzzer.
    Fuzz,
}

impl Purpose {
    /// Names of the packages, in Debian 12 and 13 alike.
    fn packages(self) -> &'static [&'static str] {
        match self {
            // The linker and C library of Rust's gnu target; the static libc is part of libc6-dev. The
            // compiler of protobuf is for the client of CRI that tests use, and unit tests make images.
            Self::Build => &["erofs-utils", "gcc", "libc6-dev", "protobuf-compiler"],
            Self::GuestKernel => guest_kernel::BUILD_PACKAGES,
            Self::FullGuestKernel => guest_kernel::FULL_BUILD_PACKAGES,
            Self::Containers => &[
                "conntrack",
                "containerd",
                "containernetworking-plugins",
                "cryptsetup-bin",
                "curl",
                "e2fsprogs",
                "erofs-utils",
                "iproute2",
                "iptables",
                "iputils-ping",
                "nftables",
                "rootlesskit",
                "runc",
                "slirp4netns",
                "uidmap",
                "util-linux",
                "xfsprogs",
            ],
            Self::DebianImage => rootfs_builder::bootstrap::PACKAGES,
            Self::Devhost => &["kmod", "qemu-system-x86", "xz-utils", "zstd"],
            Self::AppArmor => &["apparmor"],
            Self::Bench => &["iperf3", "qemu-system-x86"],
            Self::FileSystemTests => &["libacl1-dev"],
            Self::Fuzz => &["g++"],
        }
    }
}

/// Makes sure that everything needed for `purposes` is installed: says what is
/// missing and installs it with apt-get, or fails with what to do instead.
pub fn ensure(purposes: &[Purpose]) -> Result<()> {
    let wanted: BTreeSet<&str> = purposes.iter().flat_map(|p| p.packages()).copied().collect();
    let missing = missing(&wanted)?;
    if missing.is_empty() {
        return Ok(());
    }
    let names = missing.join(" ");
    eprintln!("Debian packages missing: {names}");
    let by_hand = || format!("install them by hand: apt-get install --no-install-recommends {names}");

    // A new machine's lists are empty, an old one's name versions that are gone from the mirror.
    if !known_to_apt(&missing) || install(&missing).is_err() {
        eprintln!("Updating apt's package lists");
        apt_get(&["update"]).with_context(by_hand)?;
        install(&missing).with_context(by_hand)?;
    }
    let left = self::missing(&wanted)?;
    if !left.is_empty() {
        bail!("still missing after apt-get install: {}", left.join(" "));
    }
    Ok(())
}

/// Makes apt know `package`, updating its lists when they do not name it.
pub fn ensure_known(package: &str) -> Result<()> {
    if !known_to_apt(&[package]) {
        eprintln!("Updating apt's package lists");
        apt_get(&["update"]).with_context(|| format!("apt knows no package {package}"))?;
    }
    Ok(())
}

/// `PATH` with the directories of administrators' commands, which ordinary
/// users on Debian do not have.
pub fn path_with_sbin() -> OsString {
    let mut path = std::env::var_os("PATH").unwrap_or_default();
    path.push(":/usr/local/sbin:/usr/sbin:/sbin");
    path
}

fn missing<'a>(wanted: &BTreeSet<&'a str>) -> Result<Vec<&'a str>> {
    if !Path::new("/usr/bin/dpkg-query").exists() {
        bail!("this task needs Debian (12 or 13): there is no dpkg-query here");
    }
    // dpkg-query fails when one name is unknown, and still answers for the others.
    let output = Command::new("dpkg-query")
        .args(["-W", "-f", "${Package} ${db:Status-Status}\n"])
        .args(wanted)
        .stderr(Stdio::null())
        .output()
        .context("run dpkg-query")?;
    let text = String::from_utf8_lossy(&output.stdout);
    let installed: BTreeSet<&str> = text.lines().filter_map(|l| l.strip_suffix(" installed")).collect();
    Ok(wanted.iter().copied().filter(|name| !installed.contains(name)).collect())
}

fn known_to_apt(packages: &[&str]) -> bool {
    packages.iter().all(|package| {
        Command::new("apt-cache")
            .args(["show", "--no-all-versions", package])
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .status()
            .is_ok_and(|status| status.success())
    })
}

fn install(packages: &[&str]) -> Result<()> {
    let mut arguments = vec!["install", "--yes", "--no-install-recommends"];
    arguments.extend(packages);
    apt_get(&arguments)
}

fn apt_get(arguments: &[&str]) -> Result<()> {
    let root = nix::unistd::geteuid().is_root();
    let mut command = Command::new(if root { "apt-get" } else { "sudo" });
    if !root {
        command.args(["DEBIAN_FRONTEND=noninteractive", "apt-get"]);
    }
    let status = command
        .env("DEBIAN_FRONTEND", "noninteractive")
        .args(["-q", "-o", "Dpkg::Use-Pty=0"])
        .args(arguments)
        // What a command prints for a program to read has nothing of this in it.
        .stdout(std::io::stderr())
        .status()
        .with_context(|| format!("run {}", command.get_program().display()))?;
    if !status.success() {
        bail!("{} {} failed ({status})", command.get_program().display(), arguments.join(" "));
    }
    Ok(())
}
