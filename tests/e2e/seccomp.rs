//! Seccomp: what the guest's kernel does with the filters made of profiles. The
//! same cases hold under runc.

use anyhow::ensure;
use rvm_tests::{case, job::Input, scale};
use serde_json::json;

/// containerd's own profile: making a user namespace takes no capability, so
/// that only the filter can forbid it.
#[test]
fn default_profile() {
    case(|world| {
        let ctr = world.ctr();
        let script = "grep Seccomp: /proc/self/status; unshare -U true; echo unshare $?";
        let without = ctr.container("free").shell(script)?.success()?;
        ensure!(without.text() == "Seccomp:\t0\nunshare 0\n", "{without}");

        let run = ctr.container("filtered").with(&["--seccomp"]).detached();
        run.run(&["sh", "-c", "trap exit TERM; while :; do sleep 1; done"])?.success()?;
        let exec = ctr.exec(&run.id, &[], &["sh", "-c", script], Input::Nothing)?;
        let exec = exec.finish(scale::container())?.success()?;
        ctr.remove(&run.id)?;
        ensure!(exec.text() == "Seccomp:\t2\nunshare 1\n", "an exec: {exec}");
        ensure!(exec.errors().contains("Operation not permitted"), "an exec: {exec}");

        let with = ctr.container("filtered").with(&["--seccomp"]).shell(script)?.success()?;
        ensure!(with.text() == exec.text(), "the first process: {with}");
        Ok(())
    });
}

#[test]
fn profile_of_ones_own() {
    case(|world| {
        let profile = json!({
            "defaultAction": "SCMP_ACT_ALLOW",
            "architectures": ["SCMP_ARCH_X86_64", "SCMP_ARCH_X86"],
            "syscalls": [
                {"names": ["mkdir", "mkdirat"], "action": "SCMP_ACT_ERRNO", "errnoRet": 99},
                {"names": ["symlink", "symlinkat"], "action": "SCMP_ACT_KILL_PROCESS"},
                {"names": ["kill"], "action": "SCMP_ACT_ERRNO",
                    "args": [{"index": 1, "value": 10, "op": "SCMP_CMP_EQ"}]},
                {"names": ["fchmod", "fchmodat", "fchmodat2", "chmod"], "action": "SCMP_ACT_ERRNO", "errnoRet": 28,
                    "args": [{"index": 1, "value": 4095, "valueTwo": 511, "op": "SCMP_CMP_MASKED_EQ"}]},
                {"names": ["no_such_call"], "action": "SCMP_ACT_KILL_PROCESS"}
            ]
        });
        let path = world.write_file("profile.json", profile.to_string())?;
        let run = world.ctr().container("own").with(&["--seccomp", "--seccomp-profile", &path]);
        let finished = run.shell(
            "cd /tmp; mkdir x; ln -s a b; echo link $?; trap 'echo usr1' USR1; kill -10 $$; echo kill $?; \
             kill -0 $$; echo ask $?; touch f; chmod 777 f; echo chmod $?; chmod 755 f; echo chmod $?",
        );
        std::fs::remove_file(path)?;
        let finished = finished?.success()?;
        let wanted = "link 159\nkill 1\nask 0\nchmod 1\nchmod 0\n";
        ensure!(finished.text() == wanted, "{finished}");
        ensure!(finished.errors().contains("assign requested address"), "no errno 99: {finished}");
        ensure!(finished.errors().contains("No space left"), "no errno 28: {finished}");
        Ok(())
    });
}
