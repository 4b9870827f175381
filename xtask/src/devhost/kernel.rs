//! The devhost's own kernel: Debian's generic one with its modules.

use std::collections::{HashMap, HashSet};
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail};
use rootfs_builder::debian;

/// Modules inserted at boot, dependencies resolved, with their options. First
/// what the root needs, then what rvm and its peers need.
const MODULES: &[(&str, &str)] = &[
    // Root and the way to the outside.
    ("virtio_pci", ""),
    ("9pnet_virtio", ""),
    ("9p", ""),
    ("overlay", ""),
    ("virtio_blk", ""),
    ("crc32c_generic", ""),
    ("ext4", ""),
    ("virtio_console", ""),
    ("virtio_rng", ""),
    // KVM and what monitors attach to it.
    ("kvm_amd", "nested=0"),
    ("tun", ""),
    ("vhost_net", ""),
    ("vhost_vsock", ""),
    // Container networks, file systems and images.
    ("veth", ""),
    ("bridge", ""),
    ("loop", ""),
    ("fuse", ""),
    ("erofs", ""),
    ("squashfs", ""),
];

/// An unpacked kernel package.
pub struct Kernel {
    /// The kernel image QEMU loads.
    pub image: PathBuf,
    /// `lib/modules/VERSION` of the package.
    modules: PathBuf,
    /// Name of the package, version included.
    pub package: String,
}

/// One module in the order of insertion.
pub struct Module {
    /// File name below the initramfs's `modules/`.
    pub name: String,
    /// Module options, words as `insmod` takes them.
    pub options: &'static str,
    /// The module, uncompressed.
    pub content: Vec<u8>,
}

impl Kernel {
    /// The kernel fetched last, or the one `linux-image-amd64` stands for now.
    pub fn fetch(cache: &Path) -> Result<Self> {
        let package = match cached_package(cache)? {
            Some(package) => package,
            None => debian::resolve_meta("linux-image-amd64", "linux-image-")?,
        };
        let tree = debian::fetch(&package, cache)?;
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
                .env("PATH", crate::packages::path_with_sbin())
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

    /// The modules to insert, in an order in which each finds its dependencies.
    pub fn modules(&self) -> Result<Vec<Module>> {
        let text = fs::read_to_string(self.modules.join("modules.dep"))?;
        let index = DependencyIndex::parse(&text);
        let builtin = fs::read_to_string(self.modules.join("modules.builtin"))?;
        let builtin: HashSet<String> = builtin.lines().map(module_name).collect();

        let mut seen = HashSet::new();
        let mut modules = Vec::new();
        for &(name, options) in MODULES {
            if builtin.contains(name) {
                continue;
            }
            let path =
                index.paths.get(name).with_context(|| format!("{} has no module {name}", self.package))?;
            let before = index.dependencies.get(path.as_str()).map(Vec::as_slice).unwrap_or_default();
            // modules.dep lists the nearest dependency first.
            for path in before.iter().rev().chain([path]) {
                if seen.insert(path.clone()) {
                    modules.push(Module {
                        name: format!("{}.ko", module_name(path)),
                        options: if module_name(path) == name { options } else { "" },
                        content: read_module(&self.modules.join(path))?,
                    });
                }
            }
        }
        Ok(modules)
    }

    /// What the initramfs depends on beside the package itself.
    pub fn modules_key() -> String {
        format!("{MODULES:?}")
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
    fn dependencies_are_found_by_name() {
        let index = DependencyIndex::parse("k/9p.ko: k/9pnet.ko k/netfs.ko\nk/9pnet.ko:\n");
        assert_eq!(index.paths["9p"], "k/9p.ko");
        assert_eq!(index.dependencies["k/9p.ko"], ["k/9pnet.ko", "k/netfs.ko"]);
        assert!(index.dependencies["k/9pnet.ko"].is_empty());
    }
}
