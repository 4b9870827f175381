//! Block devices of the host in a container.

use std::{
    fs,
    os::unix::fs::{MetadataExt, PermissionsExt},
    path::PathBuf,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, ensure};
use rvm_tests::{
    case,
    job::Input,
    sandbox::Sandbox,
    scale,
    world::{World, shell},
};

/// Runs a case with a loop device of 16 MiB on a file that begins with `start`.
fn with_loop(test: impl FnOnce(&World, &str, &str) -> Result<()>) {
    case(|world| {
        let file = world.write_file("disk", "")?;
        shell(&format!("truncate -s 16M {file}"))?;
        let device = shell(&format!("/sbin/losetup --find --show {file}"))?.trim().to_owned();
        let result = test(world, &device, &file);
        shell(&format!("/sbin/losetup --detach {device}; rm {file}"))?;
        result
    });
}

/// Under runc the number is the host's: everything else is the same.
#[test]
fn a_block_device_is_given_to_a_container() {
    with_loop(|world, device, file| {
        shell(&format!("printf host | dd of={device} conv=notrunc,fsync 2>&1"))?;
        let run = world.ctr().container("device").with(&["--device", device]);
        let script = format!(
            "test -b {device} && head -c 4 {device}; echo; \
             dd if={device} bs=1M 2>/dev/null | wc -c; printf guest | dd of={device} conv=notrunc,fsync 2>/dev/null; head -c 5 {device}"
        );
        let finished = run.shell(&script)?.success()?;
        ensure!(finished.text() == "host\n16777216\nguest", "{finished}");
        ensure!(std::fs::read(file)?.starts_with(b"guest"), "what the guest wrote is on the host's device");
        Ok(())
    });
}

#[test]
fn a_file_system_on_a_block_device_is_mounted() {
    with_loop(|world, device, _| {
        shell(&format!("/sbin/mkfs.ext4 -q {device}"))?;
        let mount = |options: &str| format!("type=ext4,src={device},dst=/data,options={options}");
        let run = world.ctr().container("disk").with(&["--mount", &mount("rw:noatime")]);
        let script = "grep ' /data ' /proc/mounts | cut -d' ' -f3,4 | cut -d, -f1,2; echo kept > /data/file";
        let finished = run.shell(script)?.success()?;
        ensure!(finished.text() == "ext4 rw,noatime\n", "{finished}");
        let run = world.ctr().container("disk").with(&["--mount", &mount("ro")]);
        let finished = run.shell("cat /data/file; echo x > /data/file")?;
        ensure!(
            finished.text() == "kept\n" && finished.errors().contains("Read-only file system"),
            "{finished}"
        );
        Ok(())
    });
}

/// By the descriptor that its monitor has, not even the host's root can write to what is mounted read-only, or change its node.
#[test]
fn a_block_device_that_is_lent_for_reading_stays_as_it_is() {
    with_loop(|world, device, _| {
        shell(&format!("/sbin/mkfs.ext4 -q {device}"))?;
        let mount = format!("type=ext4,src={device},dst=/data,options=ro");
        let run = world.ctr().container("lent").with(&["--mount", &mount]).detached();
        run.run(&["sleep", "100000"])?.success()?;
        if world.stage().is_rvm() {
            let monitor = Sandbox::find(world.stage(), &run.id)?.monitor.pid;
            let number = fs::metadata(device)?.rdev();
            let fds = fs::read_dir(format!("/proc/{monitor}/fd"))?;
            let paths: Vec<_> = fds.map(|fd| fd.map(|fd| fd.path())).collect::<Result<_, _>>()?;
            let is_it = |path: &&PathBuf| fs::metadata(path).is_ok_and(|file| file.rdev() == number);
            let lent = paths.iter().find(is_it).context("the monitor has no such device open")?;
            fs::OpenOptions::new().write(true).open(device).context("the host's own node")?;
            let opened = fs::OpenOptions::new().write(true).open(lent).map_err(|error| error.raw_os_error());
            ensure!(opened.as_ref().err() == Some(&Some(libc::EACCES)), "opened for writing: {opened:?}");
            let changed = fs::set_permissions(lent, fs::Permissions::from_mode(0o666));
            let changed = changed.map_err(|error| error.raw_os_error());
            ensure!(changed == Err(Some(libc::EROFS)), "its mode: {changed:?}");
        }
        world.ctr().remove(&run.id)
    });
}

/// What the host says when the device is plugged in names the field that asks for it.
#[test]
fn a_block_device_without_a_sector() {
    with_loop(|world, device, file| {
        shell(&format!("truncate -s 0 {file} && /sbin/losetup --set-capacity {device}"))?;
        let finished = world.ctr().container("empty").with(&["--device", device]).run(&["true"])?;
        if !world.stage().is_rvm() {
            return finished.success().map(drop);
        }
        let errors = finished.errors();
        let named = errors.contains("linux.devices[0]: ")
            && errors.contains("has 0 bytes; a disk needs at least 512");
        ensure!(finished.code() != 0 && named, "{finished}");
        Ok(())
    });
}

/// Each is found by its number of the host, in whatever order they come.
#[test]
fn several_block_devices_are_told_apart() {
    with_loop(|world, first, _| {
        let files = [world.write_file("disk2", "2")?, world.write_file("disk3", "3")?];
        let mut devices = vec![first.to_owned()];
        for file in &files {
            shell(&format!("truncate -s 1M {file}"))?;
            devices.push(shell(&format!("/sbin/losetup --find --show {file}"))?.trim().to_owned());
        }
        let options: Vec<&str> = devices.iter().rev().flat_map(|device| ["--device", device]).collect();
        let run = world.ctr().container("three").with(&options);
        let finished =
            run.shell(&format!("head -c 1 {}; head -c 1 {}; wc -c < {first}", devices[1], devices[2]))?;
        for (device, file) in devices[1..].iter().zip(&files) {
            shell(&format!("/sbin/losetup --detach {device}; rm {file}"))?;
        }
        let finished = finished.success()?;
        ensure!(finished.text() == "2316777216\n", "{finished}");
        Ok(())
    });
}

#[test]
fn a_block_device_that_is_not_there() {
    case(|world| {
        let ctr = world.ctr();
        let spec = ctr.run(&["oci", "spec"], scale::command())?.success()?;
        let mut spec: serde_json::Value = serde_json::from_slice(&spec.stdout)?;
        spec["root"]["path"] = world.rootfs()?.to_string_lossy().into_owned().into();
        spec["process"]["args"] = serde_json::json!(["/bin/true"]);
        spec["linux"]["devices"] =
            serde_json::json!([{"path": "/dev/x", "type": "b", "major": 240, "minor": 77}]);
        let path = world.write_file("spec.json", spec.to_string())?;
        let finished = ctr.container("missing").with(&["--config", &path]).run(&[]);
        std::fs::remove_file(path)?;
        let finished = finished?;
        let wanted = "linux.devices[0]: the host has no block device 240:77";
        ensure!(finished.code() != 0 && finished.errors().contains(wanted), "{finished}");
        Ok(())
    });
}

/// Everything is allowed in its own machine; what the host has is not there.
#[test]
fn a_privileged_container() {
    case(|world| {
        let run = world.ctr().container("privileged").with(&["--privileged"]);
        let script = "mknod /kmsg c 1 11 && dd if=/kmsg bs=8k count=1 2>/dev/null | grep -c ,; \
                      mkdir /m && mount -t tmpfs none /m && echo mounted; test -e /dev/kvm || echo apart";
        let finished = run.shell(script)?.success()?;
        ensure!(finished.text() == "1\nmounted\napart\n", "{finished}");
        Ok(())
    });
}

/// A file system of the host's that keeps what is written to it, until the value is dropped.
struct Frozen(String);

impl Frozen {
    fn new(at: &str) -> Result<Self> {
        shell(&format!("/sbin/fsfreeze --freeze {at}"))?;
        Ok(Self(at.to_owned()))
    }
}

impl Drop for Frozen {
    fn drop(&mut self) {
        let _ = shell(&format!("/sbin/fsfreeze --unfreeze {}", self.0));
    }
}

/// Threads of a monitor that serve a disk and that the host keeps.
fn kept_disk_threads(monitor: libc::pid_t) -> Result<usize> {
    let stat = |task: std::io::Result<std::fs::DirEntry>| std::fs::read_to_string(task?.path().join("stat"));
    let tasks = std::fs::read_dir(format!("/proc/{monitor}/task"))?.filter_map(|task| stat(task).ok());
    Ok(tasks.filter(|stat| stat.contains("(blk) D ")).count())
}

#[test]
fn a_read_does_not_wait_for_a_flush() {
    case(|world| {
        let at = world.dir().join("frozen").display().to_string();
        shell(&format!(
            "mkdir {at}; truncate -s 64M {at}.image; /sbin/mkfs.ext4 -q -F {at}.image; \
             mount -o loop {at}.image {at}; truncate -s 16M {at}/disk"
        ))?;
        let device = shell(&format!("/sbin/losetup --find --show {at}/disk"))?.trim().to_owned();
        let run = world.ctr().container("frozen").with(&["--device", &device]).detached();
        run.run(&["sleep", "100000"])?.success()?;
        let monitor = Sandbox::find(world.stage(), &run.id)?.monitor.pid;
        let inside = |script: String| world.ctr().exec(&run.id, &[], &["sh", "-c", &script], Input::Nothing);

        // A loop device does one thing at a time itself; what is in the host's cache it is not asked for.
        shell(&format!("cat {device} >/dev/null"))?;
        let frozen = Frozen::new(&at)?;
        let flush = inside(format!("dd if=/dev/zero of={device} bs=4k count=1 conv=notrunc,fsync 2>&1"))?;
        let until = Instant::now() + scale::container();
        while kept_disk_threads(monitor)? == 0 {
            ensure!(Instant::now() < until, "nothing is kept");
            std::thread::sleep(Duration::from_millis(20));
        }
        let read = inside(format!("dd if={device} bs=4k skip=2000 count=100 2>/dev/null | wc -c"))?;
        let read = read.finish(scale::command())?.success()?;
        ensure!(read.text().trim() == "409600", "{read}");
        ensure!(!flush.has_ended(), "the flush was not kept");
        drop(frozen);
        flush.finish(scale::command())?.success()?;
        world.end(&run.id)?;
        shell(&format!("/sbin/losetup --detach {device}; umount {at}; rmdir {at}; rm {at}.image"))?;
        Ok(())
    });
}
