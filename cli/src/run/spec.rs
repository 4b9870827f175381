//! The container a plain root file system becomes: what containerd's default
//! specification makes of an image, without a network.

use std::path::Path;

use rvm_shim::{config::Compat, spec::Bundle};
use serde_json::json;

use super::RunError;

const PATH: &str = "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

/// A container with the root file system `dir`.
pub(super) fn of_image_dir(dir: &Path, id: &str, command: &[String]) -> Result<Bundle, RunError> {
    let refuse = |problem: &str| RunError::ImageDir { dir: dir.to_owned(), problem: problem.to_owned() };
    if !dir.is_dir() {
        return Err(refuse("is not a directory"));
    }
    if dir.join("oci-layout").exists() {
        return Err(refuse(
            "is an OCI image layout, not a root file system; unpack it first, for example with umoci, \
             or import it into containerd",
        ));
    }
    if dir.join("config.json").exists() && dir.join("rootfs").is_dir() {
        return Err(refuse("is an OCI bundle; use --bundle"));
    }
    let root = dir.to_str().ok_or_else(|| refuse("is not UTF-8"))?;
    let json = serde_json::to_vec(&spec(root, id, command))
        .map_err(|error| RunError::Io { what: "writing the specification", source: error.into() })?;
    Ok(Bundle::parse(dir, id, &json, &Compat::default())?)
}

fn spec(root: &str, id: &str, command: &[String]) -> serde_json::Value {
    // Docker's and containerd's default.
    let capabilities = [
        "CAP_AUDIT_WRITE",
        "CAP_CHOWN",
        "CAP_DAC_OVERRIDE",
        "CAP_FOWNER",
        "CAP_FSETID",
        "CAP_KILL",
        "CAP_MKNOD",
        "CAP_NET_BIND_SERVICE",
        "CAP_NET_RAW",
        "CAP_SETFCAP",
        "CAP_SETGID",
        "CAP_SETPCAP",
        "CAP_SETUID",
        "CAP_SYS_CHROOT",
    ];
    json!({
        "ociVersion": "1.1.0",
        "root": {"path": root},
        "hostname": id,
        "process": {
            "user": {"uid": 0, "gid": 0},
            "args": command,
            "env": [PATH, "HOME=/root"],
            "cwd": "/",
            "capabilities": {
                "bounding": capabilities,
                "effective": capabilities,
                "permitted": capabilities,
            },
        },
        "mounts": [
            {"destination": "/proc", "type": "proc", "source": "proc",
             "options": ["nosuid", "noexec", "nodev"]},
            {"destination": "/dev", "type": "tmpfs", "source": "tmpfs",
             "options": ["nosuid", "strictatime", "mode=755", "size=65536k"]},
            {"destination": "/dev/pts", "type": "devpts", "source": "devpts",
             "options": ["nosuid", "noexec", "newinstance", "ptmxmode=0666", "mode=0620", "gid=5"]},
            {"destination": "/dev/shm", "type": "tmpfs", "source": "shm",
             "options": ["nosuid", "noexec", "nodev", "mode=1777", "size=65536k"]},
            {"destination": "/dev/mqueue", "type": "mqueue", "source": "mqueue",
             "options": ["nosuid", "noexec", "nodev"]},
            {"destination": "/sys", "type": "sysfs", "source": "sysfs",
             "options": ["nosuid", "noexec", "nodev", "ro"]},
            {"destination": "/run", "type": "tmpfs", "source": "tmpfs",
             "options": ["nosuid", "strictatime", "mode=755", "size=65536k"]},
        ],
        "linux": {
            "namespaces": [
                {"type": "pid"}, {"type": "ipc"}, {"type": "uts"}, {"type": "mount"},
                {"type": "network"}, {"type": "cgroup"},
            ],
            "maskedPaths": [
                "/proc/acpi", "/proc/kcore", "/proc/keys", "/proc/latency_stats", "/proc/timer_list",
                "/proc/timer_stats", "/proc/sched_debug", "/proc/scsi", "/sys/firmware",
            ],
            "readonlyPaths": [
                "/proc/bus", "/proc/fs", "/proc/irq", "/proc/sys", "/proc/sysrq-trigger",
            ],
        },
    })
}

/// Lays `given` over `environment`; a terminal gets a TERM.
pub(super) fn set_environment(environment: &mut Vec<String>, given: &[String], terminal: bool) {
    let has = |environment: &[String], name: &str| {
        environment.iter().any(|entry| entry.split('=').next() == Some(name))
    };
    for entry in given {
        let (name, value) = match entry.split_once('=') {
            Some((name, value)) => (name, Some(value.to_owned())),
            None => (entry.as_str(), std::env::var(entry).ok()),
        };
        environment.retain(|present| present.split('=').next() != Some(name));
        environment.extend(value.map(|value| format!("{name}={value}")));
    }
    if terminal && !has(environment, "TERM") {
        let term = std::env::var("TERM").unwrap_or_else(|_| "xterm".to_owned());
        environment.push(format!("TERM={term}"));
    }
}

/// `UID` or `UID:GID`; the group is 0 where none is given, as with containerd and Docker.
pub(super) fn parse_user(text: &str) -> Result<(u32, u32), String> {
    let (uid, gid) = text.split_once(':').unwrap_or((text, "0"));
    match (uid.parse(), gid.parse()) {
        (Ok(uid), Ok(gid)) => Ok((uid, gid)),
        _ => Err("must be UID or UID:GID, as numbers".to_owned()),
    }
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    fn strings(values: &[&str]) -> Vec<String> {
        values.iter().map(|value| (*value).to_owned()).collect()
    }

    #[test]
    fn a_directory_becomes_a_container_the_shim_accepts() {
        let dir = tempfile::tempdir().unwrap();
        let bundle = of_image_dir(dir.path(), "run-1", &strings(&["/bin/true", "x"])).unwrap();
        assert_eq!(bundle.root, dir.path());
        assert_eq!(bundle.container.process.args, ["/bin/true", "x"]);
        assert_eq!(bundle.container.rootfs.share_path, "run-1");
        assert!(bundle.volumes.is_empty(), "{:?}", bundle.volumes);
        assert!(bundle.not_applied.is_empty(), "{:?}", bundle.not_applied);
    }

    #[test]
    fn what_is_no_root_file_system_is_refused_with_a_hint() {
        let dir = tempfile::tempdir().unwrap();
        let error = || of_image_dir(dir.path(), "run-1", &strings(&["x"])).unwrap_err().to_string();
        fs::create_dir(dir.path().join("rootfs")).unwrap();
        fs::write(dir.path().join("config.json"), "{}").unwrap();
        assert!(error().ends_with("is an OCI bundle; use --bundle"), "{}", error());
        fs::write(dir.path().join("oci-layout"), "{}").unwrap();
        assert!(error().contains("is an OCI image layout"), "{}", error());
    }

    #[test]
    fn environment_is_laid_over() {
        let mut environment = strings(&["PATH=/bin", "A=1", "AB=2"]);
        set_environment(&mut environment, &strings(&["A=3=4", "E="]), false);
        assert_eq!(environment, ["PATH=/bin", "AB=2", "A=3=4", "E="]);
        set_environment(&mut environment, &strings(&["A", "NO_SUCH_VARIABLE_HERE"]), true);
        assert!(!environment.iter().any(|entry| entry.starts_with("A=")));
        assert!(environment.iter().any(|entry| entry.starts_with("TERM=")));
        let mut environment = strings(&["TERM=dumb"]);
        set_environment(&mut environment, &[], true);
        assert_eq!(environment, ["TERM=dumb"]);
    }

    #[test]
    fn users_are_numbers() {
        assert_eq!(parse_user("1000"), Ok((1000, 0)));
        assert_eq!(parse_user("1000:100"), Ok((1000, 100)));
        for wrong in ["", "root", "1:", ":1", "-1", "1:2:3"] {
            assert!(parse_user(wrong).is_err(), "{wrong}");
        }
    }
}
