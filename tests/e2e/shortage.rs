//! What the host has none of, or none of any more: one clear error within the time of a start, nothing left, and nothing
//! that keeps the next container from starting.

use std::{
    fs,
    os::unix::fs::PermissionsExt,
    path::{Path, PathBuf},
};

use anyhow::{Result, ensure};
use rvm_tests::{
    case,
    job::{Finished, Input},
    sandbox::Sandbox,
    scale,
    world::{World, shell},
};

use crate::failures::{refused, refused_config};

/// A file system in memory with no room, unmounted with the value.
struct Full(PathBuf);

impl Full {
    fn new(world: &World) -> Result<Self> {
        let dir = world.dir().join("full");
        shell(&format!(
            "mkdir {0}; mount -t tmpfs -o size=64k,mode=755 full {0}; dd if=/dev/zero of={0}/fill bs=4k 2>/dev/null || true",
            dir.display()
        ))?;
        Ok(Self(dir))
    }

    fn path(&self) -> &Path {
        &self.0
    }
}

impl Drop for Full {
    fn drop(&mut self) {
        if let Err(error) = shell(&format!("umount {0}; rmdir {0}", self.0.display())) {
            println!("{error:#}");
        }
    }
}

/// What works when nothing is short.
fn works(world: &World) -> Result<()> {
    let finished = world.ctr().container("works").run(&["echo", "works"])?.success()?;
    ensure!(finished.text() == "works\n", "{finished}");
    Ok(())
}

#[test]
fn no_room_for_what_is_kept_of_a_sandbox() {
    case(|world| {
        let full = Full::new(world)?;
        let dir = full.path().to_string_lossy().into_owned();
        refused_config(
            world,
            &world.config().text("host", "state_dir", &dir),
            &[&dir, "No space left on device"],
        )?;
        works(world)
    });
}

#[test]
fn no_room_for_a_scratch() {
    case(|world| {
        let full = Full::new(world)?;
        let dir = full.path().to_string_lossy().into_owned();
        let config = world
            .config()
            .text("scratch", "backing", "block")
            .set("scratch", "size_mib", "64")
            .text("host", "cache_dir", &dir);
        refused_config(world, &config, &[&dir, "No space left on device"])?;
        works(world)
    });
}

#[test]
fn kvm_that_is_not_there_or_none() {
    case(|world| {
        shell("mount --bind /dev/null /dev/kvm")?;
        let none = world.ctr().container("kvm").run(&["true"]);
        shell("umount /dev/kvm")?;
        refused(&none?, &["/dev/kvm"])?;
        // One that runs does not notice that it goes.
        let run = world.ctr().container("kvm").detached();
        run.run(&["sleep", "100000"])?.success()?;
        shell("mount --bind /dev/null /dev/kvm")?;
        let exec = world.ctr().exec(&run.id, &[], &["echo", "here"], rvm_tests::job::Input::Nothing)?;
        let exec = exec.finish(rvm_tests::scale::container());
        shell("umount /dev/kvm")?;
        ensure!(exec?.success()?.text() == "here\n");
        world.end(&run.id)?;
        works(world)
    });
}

/// A shim that may open few files: it says so, or gets along.
#[test]
fn no_descriptors_left_for_a_start() {
    case(|world| {
        let wrapper = world.wrapper_dir().join("containerd-shim-rvmshort-v2");
        let (mut refusals, mut works_from) = (0, None);
        for limit in [12, 16, 20, 24, 28, 32, 40, 48, 64, 96] {
            let shim = world.stage().shim();
            fs::write(&wrapper, format!("#!/bin/sh\nulimit -n {limit}\nexec {} \"$@\"\n", shim.display()))?;
            fs::set_permissions(&wrapper, fs::Permissions::from_mode(0o755))?;
            let run = world.ctr().container("short").with(&["--runtime", "io.rvmshort.v2"]);
            let finished = run.run(&["echo", "works"])?;
            if finished.code() == 0 {
                ensure!(finished.text() == "works\n", "{limit}: {finished}");
                works_from.get_or_insert(limit);
            } else {
                refused(&finished, &["Too many open files"])?;
                refusals += 1;
            }
        }
        fs::remove_file(wrapper)?;
        println!("refused {refusals} times, works from {works_from:?} descriptors");
        ensure!(refusals > 0 && works_from.is_some(), "{refusals}, {works_from:?}");
        works(world)
    });
}

/// A shim that has opened all it may: what takes another is refused, the container goes on, and goes.
#[test]
fn no_descriptors_left_for_what_comes_later() {
    case(|world| {
        let (run, sandbox) = Sandbox::sleeping(world, "short")?;
        let (ctr, shim) = (world.ctr(), sandbox.shim.pid);
        let exec = || -> Result<Finished> {
            ctr.exec(&run.id, &[], &["echo", "works"], Input::Nothing)?.finish(scale::container())
        };
        let limit = |most: &str| shell(&format!("prlimit --pid {shim} --nofile={most}"));
        let before = shell(&format!("prlimit --pid {shim} --nofile --noheadings --raw -o SOFT,HARD"))?;
        exec()?.success()?;
        // Numbers below are taken: not even a descriptor that was closed is to be had again.
        limit("3:")?;
        let finished = exec()?;
        ensure!(finished.code() != 0 && finished.stdout.is_empty(), "{finished}");
        ensure!(ctr.task_state(&run.id).as_deref() != Some("STOPPED"), "it has ended");
        limit(&format!("{}:", before.split_whitespace().next().unwrap_or("1024")))?;
        let finished = exec()?.success()?;
        ensure!(finished.text() == "works\n", "{finished}");
        limit("3:")?;
        // Also where it can open nothing any more.
        world.end(&run.id)?;
        works(world)
    });
}

/// The host's cgroup that a container is put below, with a limit of its own.
fn below(world: &World, limits: &str, words: &[&str]) -> Result<()> {
    shell(&format!(
        "echo '+pids +memory' > /sys/fs/cgroup/cgroup.subtree_control; mkdir /sys/fs/cgroup/short; \
         cd /sys/fs/cgroup/short; {limits}"
    ))?;
    let run = world.ctr().container("short").with(&["--cgroup", "/short/container"]);
    let result = run.run(&["true"]);
    let removed = shell("rmdir /sys/fs/cgroup/short");
    refused(&result?, words)?;
    removed?;
    works(world)
}

#[test]
fn no_processes_left_in_the_cgroup() {
    case(|world| below(world, "echo 3 > pids.max", &["Resource temporarily unavailable"]));
}

#[test]
fn no_memory_left_in_the_cgroup() {
    case(|world| below(world, "echo 8M > memory.max; echo 0 > memory.swap.max", &["memory"]));
}
