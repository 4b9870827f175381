//! Specifications as clients write them, captured whole: what Docker 28 (moby)
//! handed to its runtime. Only what is the host's own is put in for the marks in
//! it: directories and ids.
//!
//! What the container sees must be what it sees under runc.

use std::{collections::BTreeSet, path::PathBuf};

use anyhow::{Result, ensure};
use rvm_tests::{
    case,
    ctr::{Ctr, unique_id},
    host::remove_runcs_parent,
    stage::RUNTIME,
    world::{World, shell},
};
use serde_json::{Value, json};

const DOCKER: &str = include_str!("specs/docker.json");
const RUNC: &str = "io.containerd.runc.v2";

/// What of the host the specifications name.
struct Files(PathBuf);

impl Files {
    fn new(world: &World) -> Result<Self> {
        let dir = world.dir().join("specification");
        std::fs::create_dir_all(dir.join("volume"))?;
        let files = Self(dir);
        for (name, text) in [
            ("hosts", "127.0.0.1 localhost\n"),
            ("hostname", "web\n"),
            ("resolv.conf", "nameserver 192.0.2.1\n"),
        ] {
            std::fs::write(files.0.join(name), text)?;
        }
        let dir = files.0.display();
        shell(&format!("chmod 777 {dir}/volume; cp -a {} {dir}/rootfs", world.rootfs()?.display()))?;
        Ok(files)
    }

    /// A specification of these files, for the container `id` that runs `script`.
    fn spec(&self, text: &str, id: &str, script: &str) -> Result<Value> {
        let text = text.replace("@DIR@", &self.0.to_string_lossy()).replace("@ID@", id);
        let mut spec: Value = serde_json::from_str(&text)?;
        spec["process"]["args"] = json!(["sh", "-c", script]);
        Ok(spec)
    }
}

impl Drop for Files {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

/// What a script prints in a container of a captured specification.
fn says(world: &World, ctr: &Ctr, files: &Files, text: &str, script: &str) -> Result<String> {
    let id = unique_id("specification");
    let config = world.write_file(&format!("{id}.json"), files.spec(text, &id, script)?.to_string())?;
    let finished = ctr.container("specification").named(&id).with(&["--config", &config]).run(&[]);
    std::fs::remove_file(config)?;
    Ok(finished?.success()?.text())
}

/// The cgroups that Docker's containers are below.
fn dockers_parents() -> Result<BTreeSet<PathBuf>> {
    let listed = shell("ls -d /sys/fs/cgroup/docker /sys/fs/cgroup/*/docker 2>/dev/null || true")?;
    Ok(listed.lines().map(PathBuf::from).collect())
}

/// Runs it under both; returns what it said.
fn same_under_both(world: &World, text: &str, script: &str) -> Result<String> {
    let files = Files::new(world)?;
    let ctr = world.ctr();
    let before = dockers_parents()?;
    let under_runc = says(world, &ctr.under(RUNC), &files, text, script)?;
    // runc makes the cgroups above a container's and leaves them, as it does under a Docker's own.
    remove_runcs_parent();
    for dir in dockers_parents()?.difference(&before) {
        std::fs::remove_dir(dir)?;
    }
    shell(&format!("rm -f {}/volume/*", files.0.display()))?;
    let under_rvm = says(world, &ctr.under(RUNTIME), &files, text, script)?;
    ensure!(under_runc == under_rvm, "under runc:\n{under_runc}\nunder rvm:\n{under_rvm}");
    Ok(under_rvm)
}

#[test]
fn of_docker() {
    case(|world| {
        let script = "id -u; id -G; pwd; echo $COLOUR $HOSTNAME; hostname; cat /etc/hosts /etc/hostname /etc/resolv.conf; \
                      echo written > /data/file && cat /data/file; echo x > /etc/no 2>/dev/null || echo not root; \
                      grep -E ' (/scratch|/dev/shm|/sys|/sys/fs/cgroup) ' /proc/mounts | cut -d' ' -f2,3 | sort; \
                      grep -E '^(Cap|NoNewPrivs|Seccomp:)' /proc/self/status; \
                      cat /proc/sys/net/ipv4/ip_unprivileged_port_start; cat /proc/sys/net/ipv4/ping_group_range; \
                      for path in /proc/keys /proc/timer_list; do head -c 1 $path | wc -c; done; \
                      ls -ld /proc/scsi | cut -c1-10; mount -t tmpfs x /tmp 2>/dev/null || echo no mounts; \
                      cat /sys/fs/cgroup/memory.max /sys/fs/cgroup/cpu.max /sys/fs/cgroup/pids.max 2>/dev/null || true";
        let said = same_under_both(world, DOCKER, script)?;
        println!("{said}");
        ensure!(said.starts_with("1000\n1000\n/tmp\nblue web\nweb\n127.0.0.1"), "{said}");
        ensure!(said.contains("\nwritten\nnot root\n") && said.contains("Seccomp:\t2\n"), "{said}");
        Ok(())
    });
}
