//! What a rootless containerd's sandboxes lack (docs/decisions/0618).

use std::{fs, path::Path};

use nix::unistd::{AccessFlags, access};
use rvm_shim::rootless::is_rootless;

use super::Check;

/// Whether this is root of the host, or of a user namespace, and what the latter lacks.
pub(super) fn check() -> Check {
    let cgroups = Path::new("/sys/fs/cgroup");
    of_user(is_rootless(), access(cgroups, AccessFlags::W_OK).is_ok(), &mapped())
}

fn of_user(rootless: bool, cgroups: bool, ids: &str) -> Check {
    let name = "rootless";
    if !rootless {
        return Check::ok(name, "no: this is the host's first user namespace");
    }
    let mut lacks = Vec::new();
    if !cgroups {
        lacks.push("cgroups (guests alone hold containers to limits)");
    }
    lacks.extend([
        "the sandbox's loopback and Docker's name server (BPF)",
        "an oom_score_adj below containerd's",
        "ids on volumes beyond those that are mapped",
    ]);
    let detail = format!("root of a user namespace with {ids} ids; without {}", lacks.join(", "));
    let remedy = match cgroups {
        false => {
            "have systemd delegate cgroups to the user, and rootlesskit --pidns --cgroupns --evacuate-cgroup2; the rest takes root"
        }
        true => "the rest takes root",
    };
    Check::optional(name, detail, remedy)
}

/// How many ids there are.
fn mapped() -> String {
    let map = fs::read_to_string("/proc/self/uid_map").unwrap_or_default();
    let count = |line: &str| line.split_whitespace().nth(2)?.parse::<u64>().ok();
    map.lines().filter_map(count).sum::<u64>().to_string()
}

#[cfg(test)]
mod tests {
    use super::{super::Status, *};

    #[test]
    fn what_is_missing_is_told() {
        assert_eq!(of_user(false, true, "").status, Status::Ok);
        let (without, with) = (of_user(true, false, "65537"), of_user(true, true, "65537"));
        assert!(without.detail.contains("65537 ids; without cgroups") && without.remedy.contains("delegate"));
        assert!(!with.detail.contains("cgroups") && with.status == Status::Optional);
    }
}
