//! For a machine whose `/dev/kvm` only interprets ring 0, or has none: no
//! sandbox can start, and that is what the user is told.

use anyhow::ensure;
use rvm_tests::{
    case,
    job::{self, Input},
    scale,
};

#[test]
fn ctr_is_told_that_kvm_cannot_run_a_kernel() {
    case(|world| {
        let finished = world.ctr().container("ring0").run(&["true"])?;
        println!("{finished}");
        ensure!(finished.code() != 0, "{finished}");
        ensure!(finished.errors().trim_end().lines().count() == 1, "one error: {finished}");
        ensure!(finished.errors().contains("/dev/kvm"), "{finished}");
        ensure!(finished.took < scale::seconds(5.0), "{finished}");
        Ok(())
    });
}

#[test]
fn rvmctl_check_says_so() {
    case(|world| {
        let check = job::run(world.rvmctl(&["check"]), Input::Nothing, scale::command())?.exited(1)?;
        println!("{}", check.text());
        ensure!(
            check.text().lines().any(|line| line.starts_with("MISSING") && line.contains("kvm")),
            "{check}"
        );
        let json =
            job::run(world.rvmctl(&["check", "--json"]), Input::Nothing, scale::command())?.exited(1)?;
        let report: serde_json::Value = serde_json::from_slice(&json.stdout)?;
        ensure!(report["ok"] == false, "{json}");
        Ok(())
    });
}

#[test]
fn rvmctl_run_says_so() {
    case(|world| {
        let rootfs = world.rootfs()?;
        let command = world.rvmctl(&["run", "--image-dir", &rootfs.to_string_lossy(), "--", "true"]);
        let finished = job::run(command, Input::Nothing, scale::container())?.exited(125)?;
        println!("{finished}");
        ensure!(finished.errors().trim_end().lines().count() == 1, "one error: {finished}");
        ensure!(finished.errors().contains("/dev/kvm"), "{finished}");
        Ok(())
    });
}
