//! What the host's Docker and AppArmor mean for containers in rvm.

use std::{fs, io, path::Path};

use rvm_shim::spec::DEFAULT_PROFILES;
use serde_json::Value;

use super::Check;

/// The runtime's name, which containerd turns into the shim's.
const RUNTIME: &str = "io.rvm.v2";
/// The shim, which people take for an OCI runtime.
const SHIM: &str = "containerd-shim-rvm-v2";
/// Where dockerd reads its configuration.
const DAEMON: &str = "/etc/docker/daemon.json";

/// Rules of the host's kernel do not hold in the guest.
pub(super) fn apparmor() -> Check {
    let enabled = fs::read_to_string("/sys/module/apparmor/parameters/enabled");
    of_apparmor(enabled.is_ok_and(|text| text.trim() == "Y"))
}

fn of_apparmor(enabled: bool) -> Check {
    let name = "apparmor";
    if !enabled {
        return Check::ok(name, "this kernel applies none, so no container asks for a profile");
    }
    let detail = format!(
        "containers run on the guest's kernel, without profiles: {} have no effect, others are refused by name",
        DEFAULT_PROFILES.join(", ")
    );
    Check::ok(name, detail)
}

/// What Docker's configuration says of rvm.
pub(super) fn docker() -> Check {
    of_docker(Path::new(DAEMON))
}

fn of_docker(path: &Path) -> Check {
    let name = "docker";
    let text = match fs::read_to_string(path) {
        Ok(text) => text,
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            return Check::ok(
                name,
                format!("no {}; docker run --runtime {RUNTIME} needs none", path.display()),
            );
        }
        Err(error) => {
            return Check::optional(name, format!("{}: {error}", path.display()), "run this as root");
        }
    };
    let config: Value = match serde_json::from_str(&text) {
        Ok(config) => config,
        Err(error) => {
            let detail = format!("{}: {error}", path.display());
            return Check::optional(name, detail, "correct the file: dockerd does not start with it");
        }
    };
    let runtimes: Vec<_> = config["runtimes"].as_object().into_iter().flatten().collect();
    let is_shim = |value: &Value| value.as_str().is_some_and(|path| path.rsplit('/').next() == Some(SHIM));
    if let Some((runtime, _)) = runtimes.iter().find(|(_, value)| is_shim(&value["path"])) {
        let detail = format!("{}: runtimes.{runtime}.path is a shim, not an OCI runtime", path.display());
        let remedy = format!("write \"runtimeType\": \"{RUNTIME}\" in place of \"path\"");
        return Check::optional(name, detail, remedy);
    }
    let ours: Vec<&str> = runtimes
        .iter()
        .filter(|(_, value)| value["runtimeType"] == RUNTIME || is_shim(&value["runtimeType"]))
        .map(|(runtime, _)| runtime.as_str())
        .collect();
    let default = config["default-runtime"].as_str().unwrap_or("runc");
    let kind =
        if default == RUNTIME || ours.contains(&default) { "every container" } else { "not the default" };
    let names: Vec<&str> = std::iter::once(RUNTIME).chain(ours).collect();
    Check::ok(
        name,
        format!("docker run --runtime {}; {kind} (default-runtime: {default})", names.join(" or ")),
    )
}

#[cfg(test)]
mod tests {
    use super::{super::Status, *};

    fn docker_with(json: &str) -> Check {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("daemon.json");
        fs::write(&path, json).unwrap();
        of_docker(&path)
    }

    #[test]
    fn names_of_the_runtime_are_listed() {
        let check =
            docker_with(r#"{"runtimes": {"vm": {"runtimeType": "io.rvm.v2"}, "crun": {"path": "crun"}}}"#);
        assert_eq!(check.status, Status::Ok);
        assert_eq!(
            check.detail,
            "docker run --runtime io.rvm.v2 or vm; not the default (default-runtime: runc)"
        );
        let check = docker_with(
            r#"{"default-runtime": "vm",
                "runtimes": {"vm": {"runtimeType": "/opt/bin/containerd-shim-rvm-v2"}}}"#,
        );
        assert!(check.detail.ends_with("every container (default-runtime: vm)"), "{check:?}");
        assert_eq!(docker_with("{}").status, Status::Ok);
        assert_eq!(of_docker(Path::new("/nonexistent")).status, Status::Ok);
    }

    #[test]
    fn mistakes_are_told() {
        let check = docker_with(r#"{"runtimes": {"vm": {"path": "/usr/local/bin/containerd-shim-rvm-v2"}}}"#);
        assert_eq!(check.status, Status::Optional);
        assert!(
            check.detail.contains("runtimes.vm.path") && check.remedy.contains("runtimeType"),
            "{check:?}"
        );
        assert_eq!(docker_with("{").status, Status::Optional);
    }

    #[test]
    fn a_host_with_apparmor_is_told_which_profiles_pass() {
        let check = of_apparmor(true);
        assert!(DEFAULT_PROFILES.iter().all(|profile| check.detail.contains(profile)), "{check:?}");
    }
}
