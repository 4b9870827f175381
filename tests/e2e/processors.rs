//! A host with more than one processor: `cargo xtask test --cpus 2`.

use std::time::Instant;

use anyhow::{Context, Result, ensure};
use k8s_cri::v1::LinuxContainerResources;
use rvm_tests::{
    case,
    cri::{Container, Pod},
    job::Input,
    scale,
};

use crate::pods::{limited, plain, same};

/// A container that may keep a whole processor busy.
fn whole() -> LinuxContainerResources {
    LinuxContainerResources { cpu_period: 100_000, cpu_quota: 100_000, ..Default::default() }
}

/// How many processors a container can run on.
fn processors(container: &Container<'_>) -> Result<u32> {
    let said = container.sh("nproc")?;
    said.trim().parse().with_context(|| said.clone())
}

#[test]
fn a_pods_machine_has_as_many_as_its_containers_ask_for() {
    same(|cri, seen| {
        let pod = Pod::run(cri, "processors", plain)?;
        let one = pod.start("one", &["sleep", "100000"], limited(whole()))?;
        if cri.is_rvm() {
            ensure!(processors(&one)? == 1, "at first: {}", processors(&one)?);
        }
        let two = pod.start("two", &["sleep", "100000"], limited(whole()))?;
        // Of what was brought up while it ran, every container can use each.
        seen.add("of the first", processors(&one)?);
        seen.add("of the second", processors(&two)?);
        seen.add("listed", two.sh("grep -c ^processor /proc/cpuinfo")?);
        let busy = "for cpu in 0 1; do taskset -c $cpu sh -c 'i=0; while [ $i -lt 1000 ]; do i=$((i+1)); done; echo $i' & done; wait";
        seen.add("each is busy", two.sh(busy)?);
        two.remove()?;
        // Given back behind the back of whoever removed it.
        let until = Instant::now() + scale::container();
        while cri.is_rvm() && processors(&one)? != 1 {
            ensure!(Instant::now() < until, "still {} processors", processors(&one)?);
        }
        let three = pod.start("three", &["sleep", "100000"], limited(whole()))?;
        seen.add("of the third", processors(&three)?);
        pod.remove()
    });
}

/// What could not be seen with one processor: shim and monitors that truly run at the same time.
#[test]
fn machines_with_two_start_and_end_side_by_side() {
    case(|world| {
        for round in 0..5 {
            let jobs = (0..2)
                .map(|number| {
                    let run = world.ctr().container(&format!("two-{round}-{number}"));
                    run.with(&["--cpus", "2"]).start(
                        &["sh", "-c", "nproc; for n in 1 2; do (dd if=/dev/zero bs=64k count=64 2>/dev/null | md5sum) & done; wait"],
                        Input::Nothing,
                    )
                })
                .collect::<Result<Vec<_>>>()?;
            for job in jobs {
                let output = job.finish(scale::container())?.success()?.text();
                let lines: Vec<_> = output.lines().collect();
                ensure!(lines.len() == 3 && lines[0] == "2" && lines[1] == lines[2], "{output}");
            }
        }
        Ok(())
    });
}
