//! Programs of this machine for guests that have no libraries.

use std::{fs, os::unix::fs::PermissionsExt, path::Path, process::Command};

use anyhow::{Context, Result};

use crate::{
    job::{self, Input},
    scale,
};

/// How the `/init` of a guest that has busybox and its mount points begins: with its programs, the
/// kernel's file systems, a `/tmp`, and `lo`.
pub const BUSYBOX_INIT: &str = "#!/bin/busybox sh
/bin/busybox --install -s /bin
export PATH=/bin
mount -t proc proc /proc
mount -t sysfs sysfs /sys
mount -t devtmpfs dev /dev
mount -t tmpfs tmpfs /tmp
ip link set lo up
";

/// Copies a program and all that it loads below `dir`, as `NAME` and `lib/…`, for a guest that has
/// `dir` at `at`, and a shell.
///
/// # Errors
/// When it is not there or is linked statically.
pub fn copy(program: &Path, dir: &Path, at: &str) -> Result<()> {
    let lib = dir.join("lib");
    fs::create_dir_all(&lib)?;
    let mut command = Command::new("ldd");
    command.arg(program);
    let loaded = job::run(command, Input::Nothing, scale::command())?.success()?.text();
    let mut loader = None;
    for line in loaded.lines() {
        let path = line.split_whitespace().find(|word| word.starts_with('/'));
        let Some(path) = path.map(Path::new) else { continue };
        let name = path.file_name().context("a library without a name")?;
        if name.to_string_lossy().starts_with("ld-linux") {
            loader = Some(name.to_string_lossy().into_owned());
        }
        fs::copy(path, lib.join(name))?;
    }
    let loader = loader.with_context(|| format!("{} has no loader: {loaded}", program.display()))?;
    let name = program.file_name().context("a program without a name")?;
    fs::copy(program, lib.join(name))?;
    let name = name.to_string_lossy();
    let start = dir.join(&*name);
    let text = format!("#!/bin/sh\nexec {at}/lib/{loader} --library-path {at}/lib {at}/lib/{name} \"$@\"\n");
    fs::write(&start, text)?;
    fs::set_permissions(&start, fs::Permissions::from_mode(0o755))?;
    Ok(())
}
