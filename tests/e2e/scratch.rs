//! The writable layer on a block device: its limit, its life, its end.

use std::{
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use anyhow::{Result, ensure};
use rvm_tests::{
    case,
    ctr::{Run, remove_clients_fifos},
    job::Finished,
    sandbox::Sandbox,
    scale,
    world::{World, shell},
};

/// Runs a case with writable layers on block devices of 64 MiB, the smallest.
fn with_block(test: impl FnOnce(&World) -> Result<()>) {
    case(|world| {
        world.set_config(
            &world.config().text("scratch", "backing", "block").set("scratch", "size_mib", "64"),
        )?;
        test(world)?;
        // containerd collects its garbage some time after a container's removal.
        let until = Instant::now() + scale::container();
        while let left = scratch_files(world)?
            && !left.is_empty()
        {
            ensure!(Instant::now() < until, "scratch files outlive their snapshots: {left:?}");
            std::thread::sleep(Duration::from_millis(20));
        }
        Ok(())
    });
}

/// Every scratch file, finished or not, in containerd's snapshots.
fn scratch_files(world: &World) -> Result<Vec<PathBuf>> {
    world.in_snapshots(|name| name.starts_with("rvm-scratch"))
}

/// Whether a scratch that nobody holds is a whole file system: as it is, or once its journal is
/// replayed, which happens to a copy.
fn is_whole(world: &World, file: &Path, replay: bool) -> Result<()> {
    let copy = world.dir().join("scratch-copy");
    std::fs::copy(file, &copy)?;
    let replayed = match replay {
        true => shell(&format!("e2fsck -E journal_only -p {}", copy.display())).map(drop),
        false => Ok(()),
    };
    let checked = replayed.and_then(|()| shell(&format!("e2fsck -fn {}", copy.display())));
    std::fs::remove_file(&copy)?;
    println!("{}", checked?);
    Ok(())
}

/// Starts a stopped container's task again and waits for its end.
fn start_again(world: &World, run: &Run) -> Result<Finished> {
    world.ctr().run(&["task", "start", &run.id], scale::container())
}

#[test]
fn a_full_scratch_says_so_and_goes_on() {
    with_block(|world| {
        let script = "dd if=/dev/zero of=/big bs=1M; echo code=$?; stat -c %s /big; \
                      echo x > /more; echo code=$?; rm /big /more; \
                      sync; echo works > /again && cat /again; \
                      df -m / | tail -1 | tr -s ' ' | cut -d' ' -f2";
        let finished = world.ctr().container("full").shell(script)?.success()?;
        println!("{finished}");
        let text = finished.text();
        let lines: Vec<&str> = text.lines().collect();
        ensure!(finished.errors().matches("No space left on device").count() >= 2, "{finished}");
        ensure!(lines[0] == "code=1" && lines[2] == "code=1" && lines[3] == "works", "{finished}");
        let written: u64 = lines[1].parse()?;
        ensure!((40 << 20..64 << 20).contains(&written), "not the size configured: {finished}");
        ensure!(lines[4].parse::<u64>()? < 64, "not the size configured: {finished}");
        Ok(())
    });
}

#[test]
fn what_was_written_is_there_at_the_next_start() {
    with_block(|world| {
        // Written last, by nobody synced: a clean stop loses nothing.
        let script = "if test -e /kept; then cat /kept; test ! -e /etc/hosts && stat -c '%a %u' /dir; sha256sum < /data; \
                      else mkdir -m 1751 /dir; chown 7 /dir; rm /etc/hosts; head -c 9000000 /dev/urandom > /data; \
                      sha256sum < /data; echo kept > /kept; fi";
        let run = world.ctr().container("again").kept();
        let first = run.shell(script)?.success()?;
        let files = scratch_files(world)?;
        ensure!(files.len() == 1 && files[0].ends_with("rvm-scratch.ext4"), "{files:?}");
        for _ in 0..2 {
            let again = start_again(world, &run)?.success()?;
            ensure!(again.text() == format!("kept\n1751 7\n{}", first.text()), "first {first}, then {again}");
            is_whole(world, &files[0], false)?;
        }
        // The container goes, and with it its snapshot and the scratch in that.
        world.ctr().run(&["containers", "rm", &run.id], scale::command())?.success()?;
        Ok(())
    });
}

#[test]
fn a_killed_sandbox_leaves_a_file_system_that_mounts_again() {
    with_block(|world| {
        let script = "test -e /synced && { cat /synced; exit 9; }; echo synced > /synced; sync; echo ready; \
                      while :; do echo x >> /log; cp /log /copy; rm -f /copy; done";
        let ctr = world.ctr();
        let run = ctr.container("killed").kept();
        let job = run.start(&["sh", "-c", script], rvm_tests::job::Input::Nothing)?;
        job.wait_for("ready", scale::container())?;
        let sandbox = Sandbox::find(world.stage(), &run.id)?;
        sandbox.kill_shim()?;
        sandbox.wait_until_gone(scale::container())?;
        job.finish(scale::container())?;
        for file in scratch_files(world)? {
            is_whole(world, &file, true)?;
        }
        let _ = ctr.run(&["task", "rm", "-f", &run.id], scale::container())?;
        let again = start_again(world, &run)?.exited(9)?;
        ensure!(again.text() == "synced\n", "{again}");
        ctr.run(&["containers", "rm", &run.id], scale::command())?.success()?;
        remove_clients_fifos(&run.id)
    });
}

/// Asked for by its specification, a directory is left as it is: with no snapshot
/// there is no place beside it, and the scratch lives and dies with the sandbox.
#[test]
fn a_plain_directory_that_is_not_written_to() {
    with_block(|world| {
        let spec = world.ctr().run(&["oci", "spec"], scale::command())?.success()?;
        let mut spec: serde_json::Value = serde_json::from_slice(&spec.stdout)?;
        spec["root"]["path"] = world.rootfs()?.to_string_lossy().into_owned().into();
        let script = "PATH=/bin; grep -c ' / overlay ' /proc/mounts; echo x > /new && cat /new";
        spec["process"]["args"] = serde_json::json!(["/bin/sh", "-c", script]);
        spec["annotations"] = serde_json::json!({"io.rvm.writes": "guest"});
        let path = world.write_file("spec.json", spec.to_string())?;
        let finished = world.ctr().container("plain").with(&["--config", &path]).run(&[]);
        std::fs::remove_file(path)?;
        let finished = finished?.success()?;
        if world.stage().is_rvm() {
            ensure!(finished.text() == "1\nx\n", "{finished}");
            ensure!(!world.rootfs()?.join("new").exists(), "written to the directory itself");
        }
        Ok(())
    });
}

/// As under runc: it is the container's, with what is mounted below it.
#[test]
fn a_directory_of_the_host_as_root() {
    case(|world| {
        let dir = world.dir().join("root");
        let result = (|| {
            shell(&format!(
                "cp -a {} {1} && mkdir {1}/below && mount -t tmpfs tmpfs {1}/below && echo deep > {1}/below/file",
                world.rootfs()?.display(),
                dir.display()
            ))?;
            let run = world.ctr().container("plain").with(&["--rootfs", &dir.to_string_lossy()]);
            // No image, no PATH.
            let script = "PATH=/bin; echo x > /new && cat /new /below/file; rm /etc/hosts; echo y > /below/new; \
                          stat -c %d / /below | sort -u | wc -l; mknod /node c 1 3 && echo z > /node && echo opened";
            let finished = run.run(&["/bin/sh", "-c", script])?.success()?;
            ensure!(finished.text() == "x\ndeep\n2\nopened\n", "{finished}");
            let read = |name: &str| std::fs::read_to_string(dir.join(name));
            ensure!(read("new")? == "x\n" && read("below/new")? == "y\n" && read("etc/hosts").is_err());
            Ok(())
        })();
        shell(&format!("umount {0}/below; rm -rf {0}", dir.display()))?;
        result
    });
}

/// Written to its snapshot, what a container writes is there for everybody who
/// asks containerd.
#[test]
fn what_is_written_to_the_host_is_in_the_snapshot() {
    case(|world| {
        world.set_config(&world.config().text("scratch", "writes", "host"))?;
        let script = "if test -e /kept; then cat /kept /dir/file; test ! -e /etc/hosts && stat -c '%a %u' /dir; \
                      else mkdir -m 1751 /dir; chown 7 /dir; rm /etc/hosts; echo inside > /dir/file; \
                      echo kept > /kept; chmod 4755 /bin/busybox; fi";
        let run = world.ctr().container("host").kept();
        run.shell(script)?.success()?;
        let diff = world.ctr().run(&["snapshots", "diff", &run.id], scale::container())?.success()?;
        let archive = world.write_file("diff.tar", &diff.stdout)?;
        let listed = shell(&format!("tar tvf {archive}"));
        std::fs::remove_file(archive)?;
        let listed = listed?;
        for name in [" kept", " dir/", " dir/file", " etc/.wh.hosts"] {
            ensure!(listed.lines().any(|line| line.ends_with(name)), "{name:?} is missing: {listed}");
        }
        ensure!(scratch_files(world)?.is_empty(), "nothing else takes it");
        let again = start_again(world, &run)?.success()?;
        ensure!(again.text() == "kept\ninside\n1751 7\n", "{again}");
        world.ctr().run(&["containers", "rm", &run.id], scale::command())?.success()?;
        Ok(())
    });
}

/// Kept in memory by choice: no disk is made for it, it goes with the container, and neither
/// has anything to do with what others are configured to have.
#[test]
fn what_is_written_to_memory_goes_with_the_container() {
    with_block(|world| {
        let script = "test -e /kept && exit 9; rm /etc/hosts && echo kept > /kept && cat /kept; \
                      head -c 70000000 /dev/zero > /big && stat -c %s /big; ls /sys/block | grep -c ^vd";
        let memory = ["--annotation", "io.rvm.writes=memory"];
        let run = world.ctr().container("memory").with(&memory).kept();
        // More than the 64 MiB of a disk; and grep counts none.
        let first = run.shell(script)?.exited(1)?;
        let again = start_again(world, &run)?.exited(1)?;
        for finished in [first, again] {
            ensure!(finished.text() == "kept\n70000000\n0\n", "{finished}");
        }
        ensure!(scratch_files(world)?.is_empty(), "{:?}", scratch_files(world)?);
        world.ctr().run(&["containers", "rm", &run.id], scale::command())?.success().map(drop)
    });
}

/// Several requests of one disk are with the host at once, and each has its own bytes.
#[test]
fn what_many_write_at_once_is_what_they_read() {
    const SCRIPT: &str = "cd /root
one() {
    for round in 1 2 3 4; do
        dd if=/dev/urandom of=$1 bs=4k count=$((20 + $1 * 7)) 2>/dev/null
        md5sum $1 > $1.sum
        [ $((round % 2)) = 0 ] || dd if=/dev/zero of=$1 bs=1 count=0 conv=notrunc,fsync 2>/dev/null
        [ $1 != 3 ] || echo 3 > /proc/sys/vm/drop_caches
        md5sum -c $1.sum > /dev/null || echo \"$1 is not what was written\"
    done
}
for n in 1 2 3 4 5 6 7 8; do one $n & done
wait; sync; echo 3 > /proc/sys/vm/drop_caches; cat *.sum | md5sum -c > /dev/null && echo the same";
    with_block(|world| {
        let run = world.ctr().container("many").with(&["--privileged"]);
        let finished = run.shell(SCRIPT)?.success()?;
        ensure!(finished.text() == "the same\n", "{finished}");
        Ok(())
    });
}
