//! One bundle under one runtime: its files, its specification, its run.

use std::{
    ffi::CString,
    fs::{self, Permissions},
    os::unix::fs::{PermissionsExt, lchown},
    path::{Path, PathBuf},
};

use anyhow::{Context, Result};
use serde_json::{Value, json};

use crate::{
    ctr::{Ctr, Run},
    job::Input,
    scale,
    world::World,
};

/// Where the probe lies in a bundle's root.
pub const PROBE: &str = "/bin/rvm-probe";

/// One bundle's place on the host.
pub struct Place<'a> {
    world: &'a World,
    ctr: Ctr,
    /// Holds everything else.
    dir: PathBuf,
    /// The container's id, the same under each runtime.
    id: String,
}

impl<'a> Place<'a> {
    /// Makes the files.
    ///
    /// # Errors
    /// When the host refuses.
    pub fn new(world: &'a World, name: &str, runtime: &str, probe: &Path) -> Result<Self> {
        let place = Self {
            world,
            ctr: world.ctr().under(runtime),
            dir: world.dir().join("parity"),
            id: format!("parity-{name}"),
        };
        place.make_root(probe).context("making a root file system")?;
        for dir in ["data", "volume", "volume/below", "out"] {
            fs::create_dir(place.file(dir))?;
        }
        for file in ["data/file", "volume/file", "volume/below/file", "single"] {
            fs::write(place.file(file), format!("{file} of the host"))?;
        }
        Ok(place)
    }

    /// Removes them.
    ///
    /// # Errors
    /// When something is still mounted or open there.
    pub fn remove(self) -> Result<()> {
        fs::remove_dir_all(&self.dir).with_context(|| format!("removing {}", self.dir.display()))
    }

    /// A file beside the root.
    pub fn file(&self, name: &str) -> PathBuf {
        self.dir.join(name)
    }

    /// Its path as text.
    pub fn path(&self, name: &str) -> String {
        self.file(name).to_string_lossy().into_owned()
    }

    /// The container's id.
    pub fn id(&self) -> &str {
        &self.id
    }

    /// `ctr` with this runtime.
    pub fn ctr(&self) -> &Ctr {
        &self.ctr
    }

    /// The world it is in.
    pub fn world(&self) -> &World {
        self.world
    }

    /// Gives the whole root to a user.
    ///
    /// # Errors
    /// When the host refuses.
    pub fn give_root_to(&self, uid: u32, gid: u32) -> Result<()> {
        give(&self.file("root"), uid, gid)
    }

    /// What `ctr oci spec` gives, with this root, `args` for the probe, a cgroup
    /// namespace and `/sys/fs/cgroup`.
    ///
    /// # Errors
    /// When `ctr` fails.
    pub fn spec(&self, args: &[&str]) -> Result<Value> {
        let text = self.ctr.run(&["oci", "spec"], scale::command())?.success()?.stdout;
        let mut spec: Value = serde_json::from_slice(&text)?;
        spec["root"]["path"] = self.path("root").into();
        spec["process"]["args"] = std::iter::once(PROBE).chain(args.iter().copied()).collect();
        spec["process"]["env"] = json!(["PATH=/bin:/usr/bin"]);
        spec["hostname"] = "parity".into();
        spec["linux"]["cgroupsPath"] = format!("/default/{}", self.id).into();
        push(&mut spec["linux"]["namespaces"], json!({ "type": "cgroup" }));
        push(
            &mut spec["mounts"],
            json!({
                "destination": "/sys/fs/cgroup",
                "type": "cgroup",
                "source": "cgroup",
                "options": ["nosuid", "noexec", "nodev", "relatime", "ro"],
            }),
        );
        Ok(spec)
    }

    /// Runs a specification to its end. Returns what it printed.
    ///
    /// # Errors
    /// When it does not exit with 0.
    pub fn run(&self, spec: &Value) -> Result<String> {
        self.run_with(spec, &[], Input::Nothing)
    }

    /// As [`Place::run`], with options of `ctr run` and input.
    ///
    /// # Errors
    /// When it does not exit with 0.
    pub fn run_with(&self, spec: &Value, options: &[&str], input: Input) -> Result<String> {
        let path = self.file("config.json");
        fs::write(&path, spec.to_string())?;
        let run = self.container().with(&["--config", &path.to_string_lossy()]).with(options);
        // A probe makes some hundred attempts, each in a process of its own.
        let finished = run.start(&[], input)?.finish(scale::container() * 2)?.success()?;
        Ok(finished.text())
    }

    /// Starts a specification that runs until it is killed.
    ///
    /// # Errors
    /// When `ctr` fails.
    pub fn start(&self, spec: &Value) -> Result<()> {
        let path = self.file("config.json");
        fs::write(&path, spec.to_string())?;
        let run = self.container().detached().with(&["--config", &path.to_string_lossy()]);
        run.run(&[])?.success()?;
        Ok(())
    }

    /// Ends what [`Place::start`] started.
    ///
    /// # Errors
    /// When `ctr` fails or the container does not end.
    pub fn stop(&self) -> Result<()> {
        self.ctr.run(&["task", "kill", "-s", "SIGKILL", &self.id], scale::command())?.success()?;
        // Events of the other runtime's container of this name are there as well.
        let until = std::time::Instant::now() + scale::container();
        while self.ctr.task_state(&self.id).as_deref() == Some("RUNNING") {
            anyhow::ensure!(std::time::Instant::now() < until, "{} runs on after SIGKILL", self.id);
        }
        self.ctr.remove(&self.id)
    }

    /// A container of this id.
    pub fn container(&self) -> Run {
        self.ctr.container("parity").named(&self.id)
    }

    fn make_root(&self, probe: &Path) -> Result<()> {
        let root = self.file("root");
        let at = |path: &str| root.join(path);
        const DIRS: [&str; 15] = [
            "bin", "data", "dev", "etc", "nested", "noexec", "nosuid", "out", "proc", "root", "run", "sys",
            "tmp", "var", "volume",
        ];
        for dir in DIRS {
            fs::create_dir_all(at(dir))?;
        }
        let mode = |path: &str, mode| fs::set_permissions(at(path), Permissions::from_mode(mode));
        mode("tmp", 0o1777)?;
        mode("root", 0o700)?;
        for (name, text) in [
            ("etc/passwd", "root:x:0:0:root:/root:/bin/sh\nuser:x:1000:1000:user:/tmp:/bin/sh\n"),
            ("etc/group", "root:x:0:\nuser:x:1000:\nextra:x:2000:user\n"),
            ("etc/hosts", "127.0.0.1 localhost\n"),
            ("etc/shadow", "root:*:1:0:1:7:::\n"),
        ] {
            fs::write(at(name), text)?;
        }
        mode("etc/shadow", 0o600)?;
        for name in ["bin/rvm-probe", "bin/probe-suid", "bin/probe-caps"] {
            fs::copy(probe, at(name))?;
            mode(name, 0o755)?;
        }
        mode("bin/probe-suid", 0o4755)?;
        file_capability(&at("bin/probe-caps"))
    }
}

/// Appends to an array.
pub fn push(array: &mut Value, value: Value) {
    if let Value::Array(values) = array {
        values.push(value);
    }
}

fn give(path: &Path, uid: u32, gid: u32) -> Result<()> {
    let meta = fs::symlink_metadata(path)?;
    lchown(path, Some(uid), Some(gid))?;
    if meta.is_dir() {
        for entry in fs::read_dir(path)? {
            give(&entry?.path(), uid, gid)?;
        }
    } else if meta.is_file() {
        // A change of owner takes set-user-id away.
        fs::set_permissions(path, meta.permissions())?;
    }
    Ok(())
}

/// Gives a program CAP_NET_RAW, permitted and effective (capabilities(7)).
fn file_capability(path: &Path) -> Result<()> {
    // VFS_CAP_REVISION_2 with VFS_CAP_FLAGS_EFFECTIVE; permitted, inheritable, then their upper halves.
    const VALUE: [u8; 20] = [1, 0, 0, 2, 0, 0x20, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0];
    let path = CString::new(path.as_os_str().as_encoded_bytes())?;
    let name = c"security.capability";
    // SAFETY: both strings end with NUL, and the value has the length given.
    let result =
        unsafe { libc::setxattr(path.as_ptr(), name.as_ptr(), VALUE.as_ptr().cast(), VALUE.len(), 0) };
    nix::errno::Errno::result(result).context("setting a file capability")?;
    Ok(())
}
