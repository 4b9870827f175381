//! `rvmctl check`: can this host run rvm, and what is missing.
//!
//! Every check tries the thing itself where that leaves no trace, instead of
//! concluding it from a version or a flag.

mod clients;
mod files;
mod host;
mod idmap;
mod kvm;
mod neighbours;
mod path;
mod rootless;

use std::{
    fmt,
    path::{Path, PathBuf},
};

use rvm_shim::config::Config;
use serde::Serialize;

/// What a check found.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Status {
    /// There, and works.
    Ok,
    /// rvm cannot run without it.
    Missing,
    /// Not there; something less than everything works.
    Optional,
}

/// One line of the report.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Check {
    /// Stable name.
    pub name: &'static str,
    /// What was found.
    pub status: Status,
    /// What was found, in words.
    pub detail: String,
    /// What to do about it; empty where there is nothing to do.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub remedy: String,
}

impl Check {
    fn ok(name: &'static str, detail: impl Into<String>) -> Self {
        Self { name, status: Status::Ok, detail: detail.into(), remedy: String::new() }
    }

    fn missing(name: &'static str, detail: impl Into<String>, remedy: impl Into<String>) -> Self {
        Self { name, status: Status::Missing, detail: detail.into(), remedy: remedy.into() }
    }

    fn optional(name: &'static str, detail: impl Into<String>, remedy: impl Into<String>) -> Self {
        Self { name, status: Status::Optional, detail: detail.into(), remedy: remedy.into() }
    }
}

/// Everything `rvmctl check` found.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Report {
    /// Whether this host can run rvm.
    pub ok: bool,
    /// In the order in which a start needs them.
    pub checks: Vec<Check>,
}

impl Report {
    fn new(checks: Vec<Check>) -> Self {
        Self { ok: checks.iter().all(|check| check.status != Status::Missing), checks }
    }

    /// Checks this host against the configuration in effect.
    pub fn of_this_host(config_file: Option<&Path>) -> Self {
        let mut checks = vec![host::linux(), rootless::check()];
        checks.extend(kvm::checks());
        checks.extend([
            host::overlayfs(),
            host::cgroup_v2(),
            host::tun(),
            host::vhost_net(),
            host::tc(),
            host::loopback(),
            host::user_namespaces(),
            host::landlock(),
            neighbours::smt(),
            neighbours::ksm(),
            neighbours::swap(),
        ]);
        checks.push(idmap::check(Path::new("/var/lib")));
        match Config::load(config_file) {
            Ok(config) => {
                checks.push(Check::ok("configuration", source_of(config_file)));
                checks.extend([
                    files::monitor(&config.host.monitor),
                    files::kernel(&config.guest.kernel),
                    files::initramfs(&config.guest.initramfs),
                    path::file_system_maker(&config.scratch),
                    path::image_maker(&config.images),
                ]);
            }
            Err(error) => {
                checks.push(Check::missing("configuration", error.to_string(), "correct or remove the file"));
            }
        }
        checks.extend([path::shim_on_containerds_path(), clients::docker(), clients::apparmor()]);
        Self::new(checks)
    }
}

fn source_of(config_file: Option<&Path>) -> String {
    Config::locate(config_file)
        .map_or_else(|| "no file, defaults".to_owned(), |path: PathBuf| path.display().to_string())
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for check in &self.checks {
            let status = match check.status {
                Status::Ok => "ok",
                Status::Missing => "MISSING",
                Status::Optional => "optional",
            };
            writeln!(f, "{status:<9} {:<17} {}", check.name, check.detail)?;
            if !check.remedy.is_empty() {
                writeln!(f, "{:<27} -> {}", "", check.remedy)?;
            }
        }
        let missing = self.checks.iter().filter(|check| check.status == Status::Missing).count();
        match missing {
            0 => writeln!(f, "\nThis host can run rvm."),
            1 => writeln!(f, "\nThis host cannot run rvm: 1 thing is missing."),
            n => writeln!(f, "\nThis host cannot run rvm: {n} things are missing."),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn report() -> Report {
        Report::new(vec![
            Check::ok("kvm", "/dev/kvm, API version 12"),
            Check::optional("vhost-net", "no /dev/vhost-net", "modprobe vhost_net"),
            Check::missing("kernel", "/x: No such file", "cargo xtask install"),
        ])
    }

    #[test]
    fn json_has_every_line_and_the_verdict() {
        let json: serde_json::Value =
            serde_json::from_str(&serde_json::to_string(&report()).unwrap()).unwrap();
        assert_eq!(
            json,
            serde_json::json!({
                "ok": false,
                "checks": [
                    {"name": "kvm", "status": "ok", "detail": "/dev/kvm, API version 12"},
                    {"name": "vhost-net", "status": "optional", "detail": "no /dev/vhost-net",
                     "remedy": "modprobe vhost_net"},
                    {"name": "kernel", "status": "missing", "detail": "/x: No such file",
                     "remedy": "cargo xtask install"},
                ],
            })
        );
    }

    #[test]
    fn only_what_is_missing_spoils_the_verdict() {
        let mut checks = report().checks;
        assert!(report().to_string().ends_with("This host cannot run rvm: 1 thing is missing.\n"));
        checks.pop();
        let report = Report::new(checks);
        assert!(report.ok);
        assert!(report.to_string().ends_with("This host can run rvm.\n"));
    }

    #[test]
    fn fits_a_screen_and_names_each_thing_once() {
        let report = Report::of_this_host(None);
        assert!(report.to_string().lines().count() <= 40, "{report}");
        let mut names: Vec<_> = report.checks.iter().map(|check| check.name).collect();
        names.sort_unstable();
        let count = names.len();
        names.dedup();
        assert_eq!(names.len(), count);
        // Whoever is not told what to do cannot do anything about it.
        assert!(report.checks.iter().all(|check| (check.status == Status::Ok) == check.remedy.is_empty()));
    }
}
