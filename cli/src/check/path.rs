//! Whether containerd finds the shim: by name, on the `PATH` of its process.

use std::{
    env,
    ffi::{OsStr, OsString},
    fs,
    os::unix::{ffi::OsStrExt, fs::PermissionsExt},
    path::PathBuf,
};

use rvm_shim::{
    config::{Images, Scratch},
    image::maker,
    scratch,
};

use super::Check;

const SHIM: &str = "containerd-shim-rvm-v2";
/// What systemd gives a service (systemd.exec(5)).
const SERVICE_PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin";

/// Looks where the running containerds look, or where one started by systemd would.
pub(super) fn shim_on_containerds_path() -> Check {
    let name = "containerd-path";
    let running = containerds();
    let mut blind = None;
    for (pid, path) in &running {
        match path.as_deref().map(|path| look_up(path, SHIM)) {
            Some(Some(found)) => {
                return Check::ok(name, format!("containerd (pid {pid}) finds {}", found.display()));
            }
            Some(None) => blind = blind.or(path.as_ref().map(|path| (pid, path))),
            None => {}
        }
    }
    let remedy = || match look_up(&env::var_os("PATH").unwrap_or_default(), SHIM) {
        Some(elsewhere) => format!("link {} into a directory of that PATH", elsewhere.display()),
        None => "cargo xtask install puts it into /usr/local/bin".to_owned(),
    };
    if let Some((pid, path)) = blind {
        let detail = format!("containerd (pid {pid}) finds no {SHIM} on PATH={}", path.to_string_lossy());
        return Check::missing(name, detail, remedy());
    }
    if let Some((pid, _)) = running.first() {
        let detail = format!("the environment of containerd (pid {pid}) cannot be read");
        return Check::optional(name, detail, "run this as root");
    }
    match look_up(OsStr::new(SERVICE_PATH), SHIM) {
        Some(found) => {
            Check::ok(name, format!("no containerd runs; a service would find {}", found.display()))
        }
        None => {
            let detail = format!("no containerd runs; a service would find no {SHIM} on PATH={SERVICE_PATH}");
            Check::optional(name, detail, remedy())
        }
    }
}

/// Whether file systems for writable layers can be made, where they are wanted.
pub(super) fn file_system_maker(scratch: &Scratch) -> Check {
    let name = "scratch";
    match (scratch, look_up(&scratch::search_path(), scratch::MKFS)) {
        (Scratch::Tmpfs { .. }, _) => Check::ok(name, "in the guest's memory (tmpfs)"),
        (Scratch::Block { .. }, Some(found)) => {
            Check::ok(name, format!("on block devices made by {}", found.display()))
        }
        (Scratch::Block { .. }, None) => Check::missing(
            name,
            format!("no {} for scratch.backing = \"block\"", scratch::MKFS),
            "install e2fsprogs, or set scratch.backing to \"tmpfs\"",
        ),
    }
}

/// Whether image files can be made, where they are wanted.
pub(super) fn image_maker(images: &Images) -> Check {
    let name = "images";
    match (images.make, look_up(&scratch::search_path(), maker::MKFS)) {
        (false, _) => Check::ok(name, "none are made"),
        (true, Some(found)) => Check::ok(name, format!("made by {}", found.display())),
        (true, None) => Check::optional(
            name,
            format!("no {} for images.make: every name in a layer is a question to the host", maker::MKFS),
            "install erofs-utils, or set images.make to false",
        ),
    }
}

/// Running containerds and their `PATH`; `None` where that cannot be read.
fn containerds() -> Vec<(u32, Option<OsString>)> {
    let entries = fs::read_dir("/proc").into_iter().flatten().flatten();
    entries
        .filter_map(|entry| {
            let pid: u32 = entry.file_name().to_str()?.parse().ok()?;
            let comm = fs::read(entry.path().join("comm")).ok()?;
            (comm == b"containerd\n").then_some((pid, path_of(pid)))
        })
        .collect()
}

fn path_of(pid: u32) -> Option<OsString> {
    let environment = fs::read(format!("/proc/{pid}/environ")).ok()?;
    Some(variable(&environment, b"PATH=").unwrap_or_else(|| OsString::from(SERVICE_PATH)))
}

fn variable(environment: &[u8], prefix: &[u8]) -> Option<OsString> {
    environment
        .split(|byte| *byte == 0)
        .find_map(|entry| entry.strip_prefix(prefix))
        .map(|value| OsStr::from_bytes(value).to_owned())
}

fn look_up(path: &OsStr, program: &str) -> Option<PathBuf> {
    env::split_paths(path).map(|dir| dir.join(program)).find(|file| {
        fs::metadata(file)
            .is_ok_and(|metadata| metadata.is_file() && metadata.permissions().mode() & 0o111 != 0)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn programs_are_found_as_execvp_would() {
        let dir = tempfile::tempdir().unwrap();
        let path = OsString::from(format!("/nonexistent:{}", dir.path().display()));
        let file = dir.path().join(SHIM);
        assert_eq!(look_up(&path, SHIM), None);
        fs::write(&file, "").unwrap();
        assert_eq!(look_up(&path, SHIM), None, "not executable");
        fs::set_permissions(&file, fs::Permissions::from_mode(0o755)).unwrap();
        assert_eq!(look_up(&path, SHIM), Some(file));
    }

    #[test]
    fn a_variable_is_read_from_an_environment_block() {
        assert_eq!(variable(b"XPATH=/x\0PATH=/a:/b\0", b"PATH="), Some("/a:/b".into()));
        assert_eq!(variable(b"HOME=/\0", b"PATH="), None);
    }
}
