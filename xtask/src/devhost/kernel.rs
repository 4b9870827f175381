//! The devhost's own kernel: Debian's generic one with its modules.

use std::collections::{HashMap, HashSet};
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail};
use rootfs_builder::debian;

use super::vmlinux;
use crate::progress::Step;
use crate::{build, packages};

/// The package that depends on Debian's current generic kernel. The `cloud` flavour has no 9p.
const META_PACKAGE: &str = "linux-image-amd64";

/// Modules the root and the way to the outside need.
const ROOT_MODULES: &[&str] = &["virtio_pci", "9pnet_virtio", "9p", "overlay", "virtio_console"];

/// Modules that rvm, its peers and containers need and that nothing asks for by
/// name; inserted while the root is put together. What the kernel itself asks for
/// (kinds of links, qdiscs, tables of netfilter) it finds by modprobe.
const MODULES: &[&str] = &[
    "kvm_amd",
    "tun",
    "vhost_net",
    "vhost_vsock",
    "veth",
    "bridge",
    "br_netfilter",
    "loop",
    "crc32c_generic",
    "ext4",
    "fuse",
    "erofs",
    "squashfs",
    "virtio_rng",
];

/// An unpacked kernel package.
pub struct Kernel {
    /// The kernel as Debian has it, compressed.
    image: PathBuf,
    /// `lib/modules/VERSION` of the package.
    pub modules: PathBuf,
    /// Name of the package, version included.
    pub package: String,
}

/// One module in the order of insertion.
pub struct Module {
    /// File name.
    pub name: String,
    /// The module, uncompressed.
    pub content: Vec<u8>,
}

impl Kernel {
    /// The kernel fetched last, or the one [`META_PACKAGE`] stands for now.
    pub fn fetch(cache: &Path) -> Result<Self> {
        let (package, tree) = match cached_package(cache)? {
            Some(package) => {
                let tree = debian::fetch(&package, cache)?;
                (package, tree)
            }
            None => {
                packages::ensure_known(META_PACKAGE)?;
                let package = debian::resolve_meta(META_PACKAGE, "linux-image-")?;
                let step = Step::start("Downloading the devhost's kernel");
                let tree = debian::fetch(&package, cache)?;
                step.done(&package);
                (package, tree)
            }
        };
        let version = package.trim_start_matches("linux-image-").to_owned();
        let image = tree.join("boot").join(format!("vmlinuz-{version}"));
        // Debian 13 has its modules below /usr; depmod looks below /lib.
        if !tree.join("lib").exists() {
            std::os::unix::fs::symlink("usr/lib", tree.join("lib"))?;
        }
        let modules = tree.join("lib/modules").join(&version);
        if !image.exists() || !modules.is_dir() {
            bail!("package {package} has no kernel {version} with modules (unpacked in {})", tree.display());
        }
        if !modules.join("modules.dep").exists() {
            let status = Command::new("depmod")
                .env("PATH", packages::path_with_sbin())
                .args(["-b"])
                .arg(&tree)
                .arg(&version)
                .status()
                .context("run depmod")?;
            if !status.success() {
                bail!("depmod failed for {}", modules.display());
            }
        }
        Ok(Self { image, modules, package })
    }

    /// The uncompressed kernel, for QEMU's `-kernel`; from `cache` if it is there.
    pub fn vmlinux(&self, cache: &Path) -> Result<PathBuf> {
        let path = cache.join(format!("vmlinux-{}", self.package));
        if !path.exists() {
            let image = fs::read(&self.image).with_context(|| format!("read {}", self.image.display()))?;
            let vmlinux =
                vmlinux::extract(&image).with_context(|| format!("unpack {}", self.image.display()))?;
            build::write_whole(&path, &vmlinux)?;
        }
        Ok(path)
    }

    /// The modules to insert before and after the root can be mounted, in an
    /// order in which each finds its dependencies.
    pub fn modules(&self) -> Result<[Vec<Module>; 2]> {
        let text = fs::read_to_string(self.modules.join("modules.dep"))?;
        let index = DependencyIndex::parse(&text);
        let builtin = fs::read_to_string(self.modules.join("modules.builtin"))?;
        // What is built in counts as inserted.
        let mut seen: HashSet<String> = builtin.lines().map(module_name).collect();
        let mut insert = |names: &[&str]| -> Result<Vec<Module>> {
            let mut modules = Vec::new();
            for path in index.order(names, &mut seen).with_context(|| self.package.clone())? {
                modules.push(Module {
                    name: format!("{}.ko", module_name(path)),
                    content: read_module(&self.modules.join(path))?,
                });
            }
            Ok(modules)
        };
        Ok([insert(ROOT_MODULES)?, insert(MODULES)?])
    }

    /// What the initramfs depends on beside the package itself.
    pub fn modules_key() -> String {
        format!("{ROOT_MODULES:?}{MODULES:?}")
    }
}

struct DependencyIndex {
    /// Module name to path.
    paths: HashMap<String, String>,
    /// Path to the paths it depends on, all levels.
    dependencies: HashMap<String, Vec<String>>,
}

impl DependencyIndex {
    fn parse(text: &str) -> Self {
        let mut index = Self { paths: HashMap::new(), dependencies: HashMap::new() };
        for (path, dependencies) in text.lines().filter_map(|line| line.split_once(':')) {
            index.paths.insert(module_name(path), path.to_owned());
            index
                .dependencies
                .insert(path.to_owned(), dependencies.split_whitespace().map(str::to_owned).collect());
        }
        index
    }

    /// Paths of the modules named and of what they depend on, dependencies
    /// first, without those in `seen`; adds them to it.
    fn order<'a>(&'a self, names: &[&str], seen: &mut HashSet<String>) -> Result<Vec<&'a str>> {
        let mut order = Vec::new();
        for name in names {
            if seen.contains(*name) {
                continue;
            }
            let path = self.paths.get(*name).with_context(|| format!("there is no module {name}"))?;
            // modules.dep lists the nearest dependency first.
            for path in self.dependencies[path].iter().rev().chain([path]) {
                if seen.insert(module_name(path)) {
                    order.push(path.as_str());
                }
            }
        }
        Ok(order)
    }
}

/// `kernel/arch/x86/kvm/kvm-amd.ko.xz` is `kvm_amd`.
fn module_name(path: &str) -> String {
    let file = path.rsplit('/').next().unwrap_or(path);
    file.split('.').next().unwrap_or(file).replace('-', "_")
}

fn read_module(path: &Path) -> Result<Vec<u8>> {
    match path.extension().and_then(|e| e.to_str()) {
        Some("xz") => {
            let output = Command::new("xz").arg("-dc").arg(path).output().context("run xz")?;
            if !output.status.success() {
                bail!("xz cannot unpack {}", path.display());
            }
            Ok(output.stdout)
        }
        _ => fs::read(path).with_context(|| format!("read {}", path.display())),
    }
}

/// The newest kernel package unpacked in `cache`.
fn cached_package(cache: &Path) -> Result<Option<String>> {
    let Ok(entries) = fs::read_dir(cache) else { return Ok(None) };
    let mut newest = None;
    for entry in entries {
        let entry = entry?;
        let name = entry.file_name().to_string_lossy().into_owned();
        if name.starts_with("linux-image-") {
            newest = newest.max(Some((entry.metadata()?.modified()?, name)));
        }
    }
    Ok(newest.map(|(_, name)| name))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn module_names() {
        assert_eq!(module_name("kernel/arch/x86/kvm/kvm-amd.ko.xz"), "kvm_amd");
        assert_eq!(module_name("kernel/fs/9p/9p.ko"), "9p");
    }

    #[test]
    fn dependencies_come_first_and_once() {
        let index = DependencyIndex::parse(
            "k/9p.ko: k/9pnet.ko k/netfs.ko\nk/9pnet.ko:\nk/netfs.ko:\nk/x-y.ko.xz: k/netfs.ko\n",
        );
        let mut seen = HashSet::from(["9pnet".to_owned()]);
        assert_eq!(
            index.order(&["9p", "x_y", "9p", "9pnet"], &mut seen).unwrap(),
            ["k/netfs.ko", "k/9p.ko", "k/x-y.ko.xz"]
        );
        assert!(index.order(&["z"], &mut seen).is_err());
    }
}
