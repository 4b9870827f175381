//! `cargo xtask install`, and the private installations of demo, tests and bench.

use std::{
    fs::{self, File},
    io::{self, Write},
    os::unix::fs::PermissionsExt,
    path::{Path, PathBuf},
};

use anyhow::{Context, Result, bail, ensure};
use guest_kernel::Flavour;

use crate::build::{self, Artifacts, Profile};
use crate::kernel;

/// The configuration file as documented, with paths below [`DEFAULT_PREFIX`].
const CONFIG: &str = include_str!("../../shim/src/config/config.toml");
const DEFAULT_PREFIX: &str = "/usr/local";
const CONFIG_PATH: &str = "etc/rvm/config.toml";
/// The configuration as it was installed, below the prefix: tells one that was
/// changed from one that was not.
const PRISTINE_CONFIG: &str = "share/rvm/config.toml";

/// Arguments of `cargo xtask install`.
#[derive(clap::Args)]
pub struct Args {
    /// Where binaries, kernel and initramfs go; the configuration is always in /etc/rvm.
    #[arg(long, default_value = DEFAULT_PREFIX)]
    prefix: PathBuf,
    /// Which guest kernel: `full` has in it what some containers need (tracing, IPsec, IPVS) and CPUs without
    /// enhanced or automatic IBRS do, and starts slower.
    #[arg(long, default_value = "rvm", value_parser = kernel::for_hosts)]
    kernel: Flavour,
    /// Put everything below this directory instead of /, for packages.
    #[arg(long)]
    destdir: Option<PathBuf>,
    /// Remove what install put there; a changed configuration stays.
    #[arg(long)]
    uninstall: bool,
}

/// Runs `cargo xtask install`.
pub fn run(args: Args) -> Result<()> {
    ensure!(args.prefix.is_absolute(), "--prefix {}: must be an absolute path", args.prefix.display());
    let root = args.destdir.as_deref().unwrap_or(Path::new("/"));
    let tree = Tree::new(root, &args.prefix);
    if args.uninstall {
        return tree.uninstall();
    }
    let artifacts = build::artifacts(Profile::Release, args.kernel)?;
    install_files(&tree.prefix, &artifacts)?;
    for (file, _) in INSTALLED {
        println!("{}", tree.prefix.join(file).display());
    }
    match tree.install_config(&config_for(&args.prefix)?)? {
        ConfigOutcome::Written => println!("{}", tree.config.display()),
        ConfigOutcome::Unchanged => {}
        ConfigOutcome::KeptTheUsers(new) => {
            println!("{} was changed and is kept; the new one is {}", tree.config.display(), new.display());
        }
    }
    println!("\n{}", directions(&args.prefix));
    Ok(())
}

/// Builds everything with `profile` and installs it below `dir`, its
/// configuration pointing into itself. Returns the installation's prefix.
pub fn stage(dir: &Path, profile: Profile) -> Result<PathBuf> {
    let prefix = std::path::absolute(dir)?;
    install_files(&prefix, &build::artifacts(profile, Flavour::Rvm)?)?;
    replace(&prefix.join(CONFIG_PATH), 0o644, config_for(&prefix)?.as_bytes())?;
    Ok(prefix)
}

/// What is installed below a prefix, with its permissions.
const INSTALLED: [(&str, u32); 5] = [
    ("bin/containerd-shim-rvm-v2", 0o755),
    ("bin/rvmctl", 0o755),
    ("libexec/rvm/rvm-vmm", 0o755),
    ("share/rvm/vmlinux", 0o644),
    ("share/rvm/initramfs.cpio", 0o644),
];

/// Puts [`INSTALLED`] below `prefix`, unless it is there already.
fn install_files(prefix: &Path, artifacts: &Artifacts) -> Result<()> {
    let sources =
        [&artifacts.shim, &artifacts.rvmctl, &artifacts.monitor, &artifacts.kernel, &artifacts.initramfs];
    for ((file, mode), source) in INSTALLED.into_iter().zip(sources) {
        let content = fs::read(source).with_context(|| format!("read {}", source.display()))?;
        replace(&prefix.join(file), mode, &content)?;
    }
    Ok(())
}

/// An installation in the file system.
struct Tree {
    /// The prefix, below the destination directory.
    prefix: PathBuf,
    /// The configuration, below the destination directory.
    config: PathBuf,
}

#[derive(Debug, PartialEq, Eq)]
enum ConfigOutcome {
    Written,
    Unchanged,
    KeptTheUsers(PathBuf),
}

impl Tree {
    fn new(root: &Path, prefix: &Path) -> Self {
        let below_root = prefix.strip_prefix("/").unwrap_or(prefix);
        Self { prefix: root.join(below_root), config: root.join(CONFIG_PATH) }
    }

    /// Installs the configuration unless the one in place was changed by hand.
    fn install_config(&self, text: &str) -> Result<ConfigOutcome> {
        let pristine = self.prefix.join(PRISTINE_CONFIG);
        let present = read_if_there(&self.config)?;
        let outcome = match &present {
            Some(present) if present == text => ConfigOutcome::Unchanged,
            Some(present) if read_if_there(&pristine)?.as_ref() != Some(present) => {
                let new = self.config.with_added_extension("new");
                replace(&new, 0o644, text.as_bytes())?;
                ConfigOutcome::KeptTheUsers(new)
            }
            _ => {
                replace(&self.config, 0o644, text.as_bytes())?;
                ConfigOutcome::Written
            }
        };
        replace(&pristine, 0o644, text.as_bytes())?;
        Ok(outcome)
    }

    fn uninstall(&self) -> Result<()> {
        let pristine = self.prefix.join(PRISTINE_CONFIG);
        let unchanged = read_if_there(&pristine)? == read_if_there(&self.config)?;
        let mut gone: Vec<PathBuf> = INSTALLED.iter().map(|(file, _)| self.prefix.join(file)).collect();
        gone.push(pristine);
        gone.push(self.config.with_added_extension("new"));
        if unchanged {
            gone.push(self.config.clone());
        } else if self.config.exists() {
            println!("{} was changed and is kept", self.config.display());
        }
        for file in gone {
            match fs::remove_file(&file) {
                Ok(()) => println!("removed {}", file.display()),
                Err(error) if error.kind() == io::ErrorKind::NotFound => {}
                Err(error) => return Err(error).with_context(|| format!("remove {}", file.display())),
            }
        }
        let etc = self.config.parent().map(Path::to_owned);
        let ours = [Some(self.prefix.join("libexec/rvm")), Some(self.prefix.join("share/rvm")), etc];
        for dir in ours.into_iter().flatten() {
            // Fails where something else is in it, which then is not ours to remove.
            let _ = fs::remove_dir(dir);
        }
        Ok(())
    }
}

fn read_if_there(path: &Path) -> Result<Option<String>> {
    match fs::read_to_string(path) {
        Ok(text) => Ok(Some(text)),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(error).with_context(|| format!("read {}", path.display())),
    }
}

/// Puts a file in place in one step: whoever opens or runs it meanwhile gets
/// the old one or the new one, whole. One that is right already is left alone.
fn replace(target: &Path, mode: u32, content: &[u8]) -> Result<()> {
    let what = || format!("install {}", target.display());
    let right = |metadata: &fs::Metadata| {
        metadata.is_file()
            && metadata.len() == content.len() as u64
            && metadata.permissions().mode() & 0o7777 == mode
    };
    if fs::symlink_metadata(target).is_ok_and(|metadata| right(&metadata))
        && fs::read(target).is_ok_and(|present| present == content)
    {
        return Ok(());
    }
    let (Some(dir), Some(name)) = (target.parent(), target.file_name()) else {
        bail!("{} is not a file's path", target.display());
    };
    fs::create_dir_all(dir).with_context(what)?;
    let temporary = dir.join(format!(".{}.new", name.display()));
    let written = (|| {
        // A left-over of an interrupted run may be in use.
        let _ = fs::remove_file(&temporary);
        let mut file = File::create_new(&temporary)?;
        file.write_all(content)?;
        file.set_permissions(fs::Permissions::from_mode(mode))?;
        file.sync_all()?;
        fs::rename(&temporary, target)
    })();
    if written.is_err() {
        let _ = fs::remove_file(&temporary);
    }
    written.with_context(what)
}

/// The configuration of an installation below `prefix`.
fn config_for(prefix: &Path) -> Result<String> {
    let mut text = CONFIG.to_owned();
    for (key, file) in [
        ("guest.kernel", "share/rvm/vmlinux"),
        ("guest.initramfs", "share/rvm/initramfs.cpio"),
        ("host.monitor", "libexec/rvm/rvm-vmm"),
    ] {
        let path = prefix.join(file);
        let path = path.to_str().with_context(|| format!("{} is not UTF-8", prefix.display()))?;
        text = with_setting(&text, key, &toml_string(path))?;
    }
    Ok(text)
}

/// A TOML basic string; JSON's escapes are a subset of TOML's.
fn toml_string(text: &str) -> String {
    serde_json::Value::from(text).to_string()
}

/// `text` with one key set; comments stay.
fn with_setting(text: &str, key: &str, value: &str) -> Result<String> {
    let (section, name) = key.split_once('.').with_context(|| format!("{key} names no section"))?;
    let header = format!("[{section}]");
    let (mut inside, mut found) = (false, false);
    let mut result = String::with_capacity(text.len());
    for line in text.lines() {
        if line.starts_with('[') {
            inside = line == header;
        }
        if inside && line.split_once(" = ").is_some_and(|(key, _)| key == name) {
            found = true;
            result.push_str(&format!("{name} = {value}\n"));
        } else {
            result.push_str(line);
            result.push('\n');
        }
    }
    ensure!(found, "{key} is not in the configuration");
    Ok(result)
}

/// What to tell container engines.
fn directions(prefix: &Path) -> String {
    let shim = prefix.join("bin/containerd-shim-rvm-v2");
    let shim = shim.display();
    let on_path = ["/usr/local", "/usr"].iter().any(|dir| prefix == Path::new(dir));
    let path = if on_path {
        "containerd finds the shim by its name; nothing to configure for:".to_owned()
    } else {
        format!(
            "containerd looks for the shim on its PATH: link {shim}\ninto /usr/local/bin, or name it by its path. Then:"
        )
    };
    format!(
        r#"Check this host:

    {rvmctl} check

{path}

    ctr run --rm --runtime io.rvm.v2 IMAGE ID COMMAND

Kubernetes through containerd 1.x (version = 2 in /etc/containerd/config.toml):

    [plugins."io.containerd.grpc.v1.cri".containerd.runtimes.rvm]
      runtime_type = "io.rvm.v2"
      privileged_without_host_devices = true
      pod_annotations = ["io.rvm.*"]

through containerd 2.x (version = 3):

    [plugins."io.containerd.cri.v1.runtime".containerd.runtimes.rvm]
      runtime_type = "io.rvm.v2"
      privileged_without_host_devices = true
      pod_annotations = ["io.rvm.*"]

and once in the cluster, for pods with `runtimeClassName: rvm`:

    apiVersion: node.k8s.io/v1
    kind: RuntimeClass
    metadata:
      name: rvm
    handler: rvm
    overhead:
      podFixed:
        memory: 80Mi   # for limits up to 1 GiB; more in docs/kubernetes.md
        cpu: 10m

Docker (/etc/docker/daemon.json), for `docker run --runtime rvm`:

    {{"runtimes": {{"rvm": {{"runtimeType": "io.rvm.v2"}}}}}}
"#,
        rvmctl = prefix.join("bin/rvmctl").display(),
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    fn scratch(name: &str) -> PathBuf {
        let dir = std::env::temp_dir().join(format!("rvm-install-{name}-{}", std::process::id()));
        let _ = fs::remove_dir_all(&dir);
        fs::create_dir_all(&dir).unwrap();
        dir
    }

    #[test]
    fn the_installed_configuration_points_below_the_prefix() {
        assert_eq!(config_for(Path::new(DEFAULT_PREFIX)).unwrap(), CONFIG);
        let text = config_for(Path::new("/opt/a \"b\"")).unwrap();
        assert!(text.contains("\nkernel = \"/opt/a \\\"b\\\"/share/rvm/vmlinux\"\n"), "{text}");
        assert!(text.contains("\nmonitor = \"/opt/a \\\"b\\\"/libexec/rvm/rvm-vmm\"\n"));
        assert!(!text.contains("/usr/local"), "{text}");
        assert_eq!(text.lines().count(), CONFIG.lines().count());
    }

    #[test]
    fn a_setting_must_exist() {
        assert!(with_setting(CONFIG, "guest.vcpus", "4").unwrap().contains("\nvcpus = 4\n"));
        assert!(with_setting(CONFIG, "log.vcpus", "4").is_err());
        assert!(with_setting(CONFIG, "vcpus", "4").is_err());
    }

    #[test]
    fn a_changed_configuration_is_never_overwritten() {
        let dir = scratch("config");
        let tree = Tree::new(&dir, Path::new("/usr"));
        let read = || fs::read_to_string(&tree.config).unwrap();
        assert_eq!(tree.install_config("one\n").unwrap(), ConfigOutcome::Written);
        assert_eq!(tree.install_config("one\n").unwrap(), ConfigOutcome::Unchanged);
        // Untouched since: follows the new version.
        assert_eq!(tree.install_config("two\n").unwrap(), ConfigOutcome::Written);
        assert_eq!(read(), "two\n");

        fs::write(&tree.config, "mine\n").unwrap();
        let new = tree.config.with_added_extension("new");
        assert_eq!(tree.install_config("three\n").unwrap(), ConfigOutcome::KeptTheUsers(new.clone()));
        assert_eq!((read(), fs::read_to_string(&new).unwrap()), ("mine\n".into(), "three\n".into()));

        tree.uninstall().unwrap();
        assert_eq!(read(), "mine\n");
        assert!(!new.exists());
        assert!(!tree.prefix.join("share/rvm").exists());
        fs::remove_dir_all(dir).unwrap();
    }

    #[test]
    fn uninstall_leaves_nothing_of_ours() {
        let dir = scratch("uninstall");
        let tree = Tree::new(&dir, Path::new("/opt/rvm"));
        for (file, mode) in INSTALLED {
            replace(&tree.prefix.join(file), mode, b"x").unwrap();
        }
        tree.install_config("one\n").unwrap();
        tree.uninstall().unwrap();
        for dir in [tree.prefix.join("libexec/rvm"), tree.prefix.join("share/rvm"), dir.join("etc/rvm")] {
            assert!(!dir.exists(), "{}", dir.display());
        }
        assert_eq!(fs::read_dir(tree.prefix.join("bin")).unwrap().count(), 0);
        fs::remove_dir_all(dir).unwrap();
    }

    #[test]
    fn replacing_leaves_no_temporary_file() {
        let dir = scratch("replace");
        let target = dir.join("a/b");
        replace(&target, 0o600, b"old").unwrap();
        replace(&target, 0o755, b"new").unwrap();
        assert_eq!(fs::read_to_string(&target).unwrap(), "new");
        assert_eq!(fs::metadata(&target).unwrap().permissions().mode() & 0o777, 0o755);
        // What did not change keeps its times.
        let modified = || fs::metadata(&target).unwrap().modified().unwrap();
        let before = modified();
        replace(&target, 0o755, b"new").unwrap();
        assert_eq!(modified(), before);
        assert!(replace(Path::new("/dev/null/x"), 0o755, b"new").is_err());
        assert_eq!(fs::read_dir(dir.join("a")).unwrap().count(), 1);
        fs::remove_dir_all(dir).unwrap();
    }

    #[test]
    fn directions_name_what_is_off_the_path() {
        assert!(directions(Path::new("/usr/local")).contains("nothing to configure"));
        assert!(directions(Path::new("/opt/rvm")).contains("link /opt/rvm/bin/containerd-shim-rvm-v2"));
    }
}
