//! Where the programs under test are.
//!
//! `cargo xtask` installs them below one directory, as `cargo xtask install`
//! would below `/`, and names it in [`STAGE_ENV`].

use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};

/// Prefix of the installation under test (`bin/`, `libexec/rvm/`, `share/rvm/`).
pub const STAGE_ENV: &str = "RVM_STAGE";
/// OCI archive of the busybox image.
pub const IMAGE_ENV: &str = "RVM_TEST_IMAGE";
/// Directory with `containerd` and `ctr`; unset: the ones on `PATH`.
pub const CONTAINERD_ENV: &str = "RVM_CONTAINERD_DIR";
/// What containerd keeps its files on: `ext4` or `xfs`.
pub const FILE_SYSTEM_ENV: &str = "RVM_CONTAINERD_FILE_SYSTEM";
/// Runtime the containers run under; unset: [`RUNTIME`]. runc's name here shows
/// which expectations are containerd's and which are ours.
pub const RUNTIME_ENV: &str = "RVM_TEST_RUNTIME";

/// rvm's runtime name.
pub const RUNTIME: &str = "io.rvm.v2";

/// The programs and files under test.
#[derive(Clone, Debug)]
pub struct Stage {
    /// Installation prefix.
    pub prefix: PathBuf,
    /// OCI archive of the busybox image.
    pub image: PathBuf,
    /// Where containerd's programs are, if not on `PATH`.
    pub containerd_dir: Option<PathBuf>,
    /// What containerd keeps its files on, where that is to be a file system of its own.
    pub file_system: Option<String>,
    /// Runtime name given to `ctr`.
    pub runtime: String,
}

impl Stage {
    /// Reads the environment.
    ///
    /// # Errors
    /// Names the variable that is missing or the file that is not there.
    pub fn from_env() -> Result<Self> {
        let path = |name: &str| {
            std::env::var_os(name)
                .map(PathBuf::from)
                .with_context(|| format!("{name} is not set; `cargo xtask test` sets it"))
        };
        let containerd_dir = std::env::var_os(CONTAINERD_ENV).map(PathBuf::from);
        // Newer ones idmap layers for pods with a user namespace, which takes a file system that can be.
        let newer = || containerd_dir.is_some().then(|| "ext4".to_owned());
        let stage = Self {
            prefix: path(STAGE_ENV)?,
            image: path(IMAGE_ENV)?,
            file_system: std::env::var(FILE_SYSTEM_ENV).ok().or_else(newer),
            containerd_dir,
            runtime: std::env::var(RUNTIME_ENV).unwrap_or_else(|_| RUNTIME.to_owned()),
        };
        ensure!(stage.image.is_file(), "{IMAGE_ENV}: {} is not a file", stage.image.display());
        if stage.is_rvm() {
            for file in [stage.shim(), stage.monitor(), stage.kernel(), stage.initramfs()] {
                ensure!(file.is_file(), "{STAGE_ENV}: {} is not a file", file.display());
            }
        }
        Ok(stage)
    }

    /// What containerd keeps its files on, as a report says it.
    pub fn file_system_name(&self) -> &str {
        self.file_system.as_deref().unwrap_or("the machine's own")
    }

    /// Whether the runtime under test is rvm, and not another one for comparison.
    pub fn is_rvm(&self) -> bool {
        self.runtime == RUNTIME
    }

    /// Directory of the shim and rvmctl.
    pub fn bin(&self) -> PathBuf {
        self.prefix.join("bin")
    }

    /// The shim.
    pub fn shim(&self) -> PathBuf {
        self.bin().join("containerd-shim-rvm-v2")
    }

    /// The command line tool.
    pub fn rvmctl(&self) -> PathBuf {
        self.bin().join("rvmctl")
    }

    /// The monitor.
    pub fn monitor(&self) -> PathBuf {
        self.prefix.join("libexec/rvm/rvm-vmm")
    }

    /// The guest kernel.
    pub fn kernel(&self) -> PathBuf {
        self.prefix.join("share/rvm/vmlinux")
    }

    /// The initial RAM file system with the agent.
    pub fn initramfs(&self) -> PathBuf {
        self.prefix.join("share/rvm/initramfs.cpio")
    }

    /// A program of containerd's.
    pub fn containerd_program(&self, name: &str) -> PathBuf {
        self.containerd_dir.as_deref().map_or_else(|| Path::new(name).to_owned(), |dir| dir.join(name))
    }

    /// `PATH` for containerd, which finds shims there.
    pub fn path_variable(&self) -> std::ffi::OsString {
        let mut path = self.bin().into_os_string();
        if let Some(dir) = &self.containerd_dir {
            path.push(":");
            path.push(dir);
        }
        path.push(":");
        path.push(std::env::var_os("PATH").unwrap_or_else(|| "/usr/sbin:/usr/bin:/sbin:/bin".into()));
        path
    }
}
