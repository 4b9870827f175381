//! What the monitor of a running container is shut in, looked at from outside.

use std::{
    collections::BTreeSet,
    fs,
    path::{Path, PathBuf},
};

use anyhow::{Context, Result, ensure};
use rvm_tests::{case, sandbox::Sandbox};

use crate::volumes::{Volume, bind};

/// What a file server may: CHOWN, DAC_OVERRIDE, FOWNER, FSETID, SETGID, SETUID, SETFCAP.
const FOR_FILES: &str = "00000000800000db";
const NONE: &str = "0000000000000000";

#[test]
fn the_running_monitor_has_nothing_of_the_host() {
    case(|world| {
        let volume = Volume::new(world, "volume")?;
        let run = world.ctr().container("jail").detached();
        let run = run.with(&["--mount", &bind(&volume.0, "/v", "rbind:rw")]);
        run.run(&["sh", "-c", "echo x > /v/file; sleep 100000"])?.success()?;
        let sandbox = Sandbox::find(world.stage(), &run.id)?;
        let (monitor, shim) = (sandbox.monitor.pid, sandbox.shim.pid);

        for kind in ["user", "pid", "ipc", "uts", "cgroup", "net", "mnt"] {
            let of = |pid: i32| link(&format!("/proc/{pid}/ns/{kind}"));
            ensure!(of(monitor)? != of(std::process::id().cast_signed())?, "{kind} namespace of the host");
            // The share's mounts come and go there.
            ensure!((of(monitor)? == of(shim)?) == (kind == "mnt"), "{kind} namespace and the shim's");
        }
        let root = link(&format!("/proc/{monitor}/root"))?;
        ensure!(root == sandbox.dir().join("share"), "{}", root.display());
        ensure!(fs::read(format!("/proc/{monitor}/environ"))?.is_empty(), "an environment");

        let mut names = BTreeSet::new();
        for task in fs::read_dir(format!("/proc/{monitor}/task"))? {
            let status = fs::read_to_string(task?.path().join("status"))?;
            let field = |name: &str| status.lines().find_map(|line| line.strip_prefix(name)).map(str::trim);
            let name = field("Name:").context("a name")?;
            ensure!(field("NoNewPrivs:") == Some("1") && field("Seccomp:") == Some("2"), "{status}");
            // The calls there are, those of any duty, those of its own.
            let filters = field("Seccomp_filters:").and_then(|count| count.parse().ok()).unwrap_or(0);
            ensure!(filters >= 3, "{name}: {status}");
            ensure!(field("NSpid:").is_some_and(|ids| ids.split_whitespace().count() == 2), "{status}");
            let capabilities = if name == "fs" { FOR_FILES } else { NONE };
            for set in ["CapEff:", "CapPrm:"] {
                ensure!(field(set) == Some(capabilities), "{name}: {status}");
            }
            ensure!(field("CapInh:") == Some(NONE) && field("CapAmb:") == Some(NONE), "{status}");
            names.insert(name.to_owned());
        }
        let all = ["blk", "fs", "net", "rvm-vmm", "vcpu0", "vsock"];
        ensure!(all.iter().all(|name| names.contains(*name) || *name == "net"), "{names:?}");

        for fd in fs::read_dir(format!("/proc/{monitor}/fd"))? {
            let Ok(target) = fs::read_link(fd?.path()) else { continue };
            ensure!(is_allowed(&target, &sandbox.dir()), "it has {} open", target.display());
        }
        world.ctr().remove(&run.id)
    });
}

fn link(path: &str) -> Result<PathBuf> {
    fs::read_link(path).with_context(|| path.to_owned())
}

/// What a monitor may have open: what has no name on the host, its log, the share, its scratch, and
/// two mounts that are at no place: its `/proc`, and the directory of its sockets.
fn is_allowed(target: &Path, sandbox: &Path) -> bool {
    let text = target.to_string_lossy();
    ["socket:", "pipe:", "anon_inode:", "/memfd:"].iter().any(|kind| text.starts_with(kind))
        // Guest memory on a file system of its own: a file that never had a name.
        || text.starts_with("/#") && text.ends_with(" (deleted)")
        || ["/", "/1", "/1/fd", "/1/smaps", "/dev/null", "/dev/net/tun", "/dev/vhost-net"].contains(&&*text)
        || ["console.log", "console.log.1"].iter().any(|name| target == sandbox.join(name))
        || target.starts_with(sandbox.join("share"))
        || target.file_name().is_some_and(|name| name == "rvm-scratch.ext4")
}
