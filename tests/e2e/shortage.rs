//! What the host has none of, or none of any more: one clear error within the time of a start, nothing left, and nothing
//! that keeps the next container from starting.

use std::path::{Path, PathBuf};

use anyhow::{Result, ensure};
use rvm_tests::{
    case,
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
