//! `rvmctl`: the host's check, a container without containerd, and a look into sandboxes.

use anyhow::{Context, Result, ensure};
use rvm_tests::{
    case,
    job::{self, Finished, Input},
    scale,
    world::World,
};
use serde_json::Value;

fn rvmctl(world: &World, args: &[&str]) -> Result<Finished> {
    job::run(world.rvmctl(args), Input::Nothing, scale::container())
}

#[test]
fn check_of_a_host_that_can() {
    case(|world| {
        let check = rvmctl(world, &["check"])?.success()?;
        println!("{}", check.text());
        ensure!(check.text().contains("This host can run rvm."), "{check}");
        let report: Value = serde_json::from_slice(&rvmctl(world, &["check", "--json"])?.success()?.stdout)?;
        ensure!(report["ok"] == true, "{report}");

        world.set_config(&world.config().text("guest", "kernel", "/no/such/vmlinux"))?;
        let missing = rvmctl(world, &["check"])?.exited(1)?;
        ensure!(missing.text().contains("/no/such/vmlinux"), "{missing}");
        world.set_config(&world.config().set("guest", "colour", "1"))?;
        let wrong = rvmctl(world, &["check"])?.exited(1)?;
        ensure!(wrong.text().contains("guest.colour"), "{wrong}");
        Ok(())
    });
}

#[test]
fn run_without_containerd() {
    case(|world| {
        let rootfs = world.rootfs()?.to_string_lossy().into_owned();
        let image = ["run", "--image-dir", &rootfs];
        let args = [&image[..], &["-e", "COLOUR=red", "-w", "/etc", "-u", "12:34", "--"]].concat();
        let script = "uname -r; pwd; echo $COLOUR; id -u; id -g; exit 42";
        let finished = rvmctl(world, &[&args[..], &["sh", "-c", script]].concat())?.exited(42)?;
        println!("{finished}");
        let host = std::fs::read_to_string("/proc/sys/kernel/osrelease")?;
        let text = finished.text();
        let lines: Vec<&str> = text.lines().collect();
        ensure!(lines.len() == 5 && lines[0] != host.trim(), "{finished}");
        ensure!(lines[1..] == ["/etc", "red", "12", "34"], "{finished}");

        let args = [&image[..], &["--interactive", "--", "cat"]].concat();
        let piped = job::run(world.rvmctl(&args), Input::Bytes(b"through".to_vec()), scale::container())?
            .success()?;
        ensure!(piped.text() == "through", "{piped}");

        let missing = rvmctl(world, &[&image[..], &["--", "/no/such/program"]].concat())?;
        println!("{missing}");
        ensure!(missing.code() != 0 && missing.errors().contains("/no/such/program"), "{missing}");
        Ok(())
    });
}

#[test]
fn run_with_a_terminal() {
    case(|world| {
        let rootfs = world.rootfs()?.to_string_lossy().into_owned();
        let command = world.rvmctl(&["run", "--image-dir", &rootfs, "-it", "--", "sh"]);
        let mut job = job::Job::start(command, Input::Terminal(70, 20))?;
        job.write(b"until stty size 2>/dev/null | grep -q '^20 70$'; do :; done; echo size=$(stty size) on $(tty)\n")?;
        job.wait_for("size=20 70 on /dev/", scale::container())?;
        job.write(b"exit 6\n")?;
        job.finish(scale::container())?.exited(6)?;
        Ok(())
    });
}

#[test]
fn a_bundle_and_bundles_that_are_wrong() {
    case(|world| {
        let spec = world.ctr().run(&["oci", "spec"], scale::command())?.success()?;
        let mut spec: Value = serde_json::from_slice(&spec.stdout)?;
        spec["root"]["path"] = world.rootfs()?.to_string_lossy().into_owned().into();
        spec["process"]["env"] = serde_json::json!(["PATH=/bin"]);
        spec["process"]["args"] = serde_json::json!(["sh", "-c", "echo from the bundle; exit 3"]);
        let bundle = world.dir().join("bundle");
        let run = |text: &str| -> Result<Finished> {
            std::fs::create_dir_all(&bundle)?;
            std::fs::write(bundle.join("config.json"), text)?;
            rvmctl(world, &["run", "--bundle", &bundle.to_string_lossy()])
        };
        let finished = run(&spec.to_string())?.exited(3)?;
        ensure!(finished.text() == "from the bundle\n", "{finished}");

        let refused = |text: &str, word: &str| -> Result<()> {
            let finished = run(text)?.exited(125)?;
            println!("{finished}");
            ensure!(finished.errors().trim_end().lines().count() == 1, "one error: {finished}");
            ensure!(finished.errors().contains(word), "the error does not say {word:?}: {finished}");
            Ok(())
        };
        refused("not json", "config.json")?;
        let mut wrong = spec.clone();
        wrong["process"]["args"] = serde_json::json!([]);
        refused(&wrong.to_string(), "args")?;
        let mut wrong = spec.clone();
        wrong["process"]["cwd"] = "relative".into();
        refused(&wrong.to_string(), "cwd")?;
        let mut wrong = spec.clone();
        wrong["process"]["cwd"] = "/bin/busybox/dir".into();
        refused(&wrong.to_string(), "/bin/busybox/dir")?;
        let mut wrong = spec;
        wrong["root"]["path"] = "/no/such/rootfs".into();
        refused(&wrong.to_string(), "/no/such/rootfs")?;
        std::fs::remove_dir_all(&bundle)?;
        Ok(())
    });
}

#[test]
fn ps_logs_and_metrics() {
    case(|world| {
        let ctr = world.ctr();
        let run = ctr.container("seen").detached();
        run.run(&["sleep", "100000"])?.success()?;

        let table = rvmctl(world, &["ps"])?.success()?;
        println!("{}", table.text());
        ensure!(
            table.text().lines().any(|line| line.contains(&run.id) && line.contains("running")),
            "{table}"
        );
        let rows: Value = serde_json::from_slice(&rvmctl(world, &["ps", "--json"])?.success()?.stdout)?;
        let row = rows.as_array().and_then(|rows| rows.iter().find(|row| row["id"] == run.id.as_str()));
        let row = row.with_context(|| format!("{} is not listed: {rows}", run.id))?;
        ensure!(row["status"] == "running" && row["namespace"] == "default", "{row}");
        ensure!(row["guest_resident_bytes"].as_u64().is_some_and(|bytes| bytes > 1 << 20), "{row}");

        let logs = rvmctl(world, &["logs", &run.id])?.success()?;
        println!("{}", logs.text());
        let metrics: Value =
            serde_json::from_slice(&rvmctl(world, &["metrics", &run.id])?.success()?.stdout)?;
        println!("{metrics}");
        ensure!(metrics["memory_bytes"].as_u64().is_some_and(|bytes| bytes > 0), "{metrics}");
        let unknown = rvmctl(world, &["logs", "no-such-sandbox"])?.exited(1)?;
        ensure!(unknown.errors().contains("no-such-sandbox"), "{unknown}");

        world.end(&run.id)?;
        let after = rvmctl(world, &["ps"])?.success()?;
        ensure!(!after.text().contains(&run.id), "{after}");
        Ok(())
    });
}
