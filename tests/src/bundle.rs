//! Specifications and bundles of the tests' own, for what no option of `ctr run` says.

use std::{
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::Result;
use serde_json::{Value, json};

use crate::{
    job::{self, Finished, Input},
    scale,
    world::{World, shell},
};

/// Where runc keeps the state of what [`Bundle::run`] starts under it.
const RUNC_ROOT: &str = "/run/rvm-tests/runc";

/// A container that runs `args` on the root file system in a directory, with
/// the namespaces every container has and nothing else.
pub fn spec(rootfs: &Path, args: &[&str]) -> Value {
    json!({
        "ociVersion": "1.0.2",
        "process": {
            "user": {"uid": 0, "gid": 0},
            "args": args,
            "env": ["PATH=/bin"],
            "cwd": "/",
            "capabilities": {"bounding": ["CAP_KILL"], "effective": ["CAP_KILL"], "permitted": ["CAP_KILL"]},
            "rlimits": [{"type": "RLIMIT_NOFILE", "hard": 1024, "soft": 512}],
            "noNewPrivileges": true
        },
        "root": {"path": rootfs},
        "hostname": "web",
        "mounts": [
            {"destination": "/proc", "type": "proc", "source": "proc", "options": ["nosuid"]},
            {"destination": "/dev", "type": "tmpfs", "source": "tmpfs", "options": ["nosuid", "mode=755"]}
        ],
        "linux": {
            "namespaces": [
                {"type": "pid"}, {"type": "ipc"}, {"type": "uts"}, {"type": "mount"}, {"type": "network"}
            ],
            "resources": {"devices": [{"allow": false, "access": "rwm"}]}
        }
    })
}

/// A bundle with a copy of the image's root file system, removed with the value.
pub struct Bundle {
    dir: PathBuf,
    rootfs: PathBuf,
}

impl Bundle {
    /// Copies the root file system.
    ///
    /// # Errors
    /// When the host refuses.
    pub fn new(world: &World) -> Result<Self> {
        let dir = world.dir().join("bundle");
        let bundle = Self { rootfs: dir.join("rootfs"), dir };
        std::fs::create_dir_all(&bundle.dir)?;
        shell(&format!("cp -a {} {}", world.rootfs()?.display(), bundle.rootfs.display()))?;
        Ok(bundle)
    }

    /// The bundle with every file of it owned by a user and its group.
    ///
    /// # Errors
    /// When the host refuses.
    pub fn owned_by(self, owner: u32) -> Result<Self> {
        shell(&format!("chown -hR {owner}:{owner} {}", self.rootfs.display()))?;
        Ok(self)
    }

    /// Its directory.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// Its root file system.
    pub fn rootfs(&self) -> &Path {
        &self.rootfs
    }

    /// Runs the bundle with this `config.json`, without containerd: by `rvmctl`, or by `runc`
    /// itself where the tests run under it.
    ///
    /// # Errors
    /// When the program cannot be started or does not end.
    pub fn run(&self, world: &World, config: &[u8]) -> Result<Finished> {
        std::fs::write(self.dir.join("config.json"), config)?;
        let dir = self.dir.to_string_lossy();
        let command = if world.stage().is_rvm() {
            world.rvmctl(&["run", "--bundle", &dir])
        } else {
            let mut runc = Command::new("runc");
            runc.args(["--root", RUNC_ROOT, "run", "--bundle", &dir, "bundle"]);
            runc
        };
        job::run(command, Input::Nothing, scale::container())
    }
}

impl Drop for Bundle {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.dir);
        let _ = std::fs::remove_dir_all(RUNC_ROOT);
    }
}
