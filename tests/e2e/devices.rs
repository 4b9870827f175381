//! Block devices of the host in a container.

use anyhow::{Result, ensure};
use rvm_tests::{
    case, scale,
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

#[test]
fn one_container_at_a_time_writes_to_a_block_device() {
    with_loop(|world, device, _| {
        let holder = world.ctr().container("holder").with(&["--device", device]).detached();
        holder.run(&["sleep", "100000"])?.success()?;
        let second = world.ctr().container("second").with(&["--device", device]).run(&["true"])?;
        if world.stage().is_rvm() {
            // Two kernels with caches of their own would destroy what is on it.
            let errors = second.errors();
            let named =
                errors.contains("linux.devices[0]: ") && errors.contains("in use by another virtual machine");
            ensure!(second.code() != 0 && named, "{second}");
        } else {
            second.success()?;
        }
        world.end(&holder.id)
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
