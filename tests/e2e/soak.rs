//! The same many times over: what grows a little each time shows. `cargo xtask test --all` runs
//! these, or `--filter soak`.

use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use rvm_tests::{
    case,
    cni::{Namespace, Network},
    job::Input,
    sandbox::Sandbox,
    scale,
    task::Shim,
    world::{World, shell},
};
use serde_json::json;

use crate::network::{TIDY, chain};

/// A page here and there is no leak; this much for each of hundreds is.
const LEAK_KIB: u64 = 64;

fn available_kib() -> Result<u64> {
    let text = std::fs::read_to_string("/proc/meminfo")?;
    let line = text.lines().find_map(|line| line.strip_prefix("MemAvailable:")).context("no MemAvailable")?;
    Ok(line.trim().trim_end_matches(" kB").parse()?)
}

/// Resident memory of a process.
fn resident_kib(pid: libc::pid_t) -> Result<u64> {
    let text = std::fs::read_to_string(format!("/proc/{pid}/status"))?;
    let line = text.lines().find_map(|line| line.strip_prefix("VmRSS:")).context("no VmRSS")?;
    Ok(line.trim().trim_end_matches(" kB").parse()?)
}

/// That the host has everything back is seen by every case; here its memory too.
#[test]
fn containers_one_after_another() {
    const TURNS: u64 = 150;
    case(|world| {
        let turn = |world: &World| world.ctr().container("soak").run(&["/bin/true"])?.success().map(drop);
        for _ in 0..5 {
            turn(world)?;
        }
        let before = available_kib()?;
        for _ in 0..TURNS {
            turn(world)?;
        }
        // Given back a moment after the last one's end.
        let until = Instant::now() + scale::command();
        let lost = || -> Result<u64> { Ok(before.saturating_sub(available_kib()?)) };
        while lost()? > TURNS * LEAK_KIB && Instant::now() < until {
            std::thread::sleep(Duration::from_millis(100));
        }
        println!("{TURNS} containers, {} KiB less available", lost()?);
        ensure!(lost()? <= TURNS * LEAK_KIB, "{} KiB less after {TURNS} containers", lost()?);
        Ok(())
    });
}

/// What a host has of networks, without what counts and what is numbered.
const NETWORKS: &str = "ip -o link | sed 's/^[0-9]*: //'; ip -o address | sed 's/^[0-9]*: //; s/valid_lft.*//'
ip rule; ip route; ip -6 route; ip netns; for link in /sys/class/net/*; do tc filter show dev ${link##*/} ingress; done
iptables-save | grep -v '^#' | sed 's/\\[.*\\]//'; ip6tables-save | grep -v '^#' | sed 's/\\[.*\\]//'
ls -R /run/rvm-tests/cni | grep -v last_reserved";

#[test]
fn networks_one_after_another() {
    const TURNS: usize = 200;
    case(|world| {
        let network = Network::new("rvm-soak", chain());
        let mapped = json!({"portMappings": [{"hostPort": 8080, "containerPort": 80, "protocol": "tcp"}]});
        let turn = || -> Result<()> {
            let namespace = Namespace::new("rvm-soak")?;
            let added = network.add("soak", &namespace, "eth0", &mapped)?;
            let run = world.ctr().container("soak").with(&["--with-ns", &namespace.option()]);
            run.run(&["ping", "-c", "1", "-W", "20", "10.88.7.1"])?.success()?;
            ensure!(namespace.left()?.is_empty(), "left: {}", namespace.left()?);
            network.delete("soak", &namespace, "eth0", (&mapped, &added))
        };
        // What plugins keep for the next container.
        turn()?;
        let before = shell(NETWORKS)?;
        for _ in 0..TURNS {
            turn()?;
        }
        let after = shell(NETWORKS)?;
        ensure!(before == after, "before:\n{before}\nafter {TURNS} networks:\n{after}");
        shell(&format!("ip link delete rvmbr0; {TIDY}"))?;
        Ok(())
    });
}

#[test]
fn added_processes_one_after_another() {
    const TURNS: u32 = 1500;
    case(|world| {
        let (run, sandbox) = Sandbox::sleeping(world, "soak")?;
        let process = json!({
            "args": ["/bin/echo", "said"], "cwd": "/", "env": ["PATH=/bin"], "user": { "uid": 0, "gid": 0 },
        });
        let shim = Shim::of(&run.id)?;
        let mut number = 0;
        let mut turns = |count: u32| -> Result<()> {
            for _ in 0..count {
                number += 1;
                let ended = shim.exec(&format!("soak-{number}"), &process, world.dir())?;
                ensure!(ended.code == 0 && ended.output == "said\n", "{ended:?}");
            }
            Ok(())
        };
        let inside = || -> Result<u64> {
            let script = "grep -c . /proc/mounts; ls /proc | grep -c '^[0-9]'; ls /dev/pts | wc -l";
            let job = world.ctr().exec(&run.id, &[], &["sh", "-c", script], Input::Nothing)?;
            let text = job.finish(scale::container())?.success()?.text();
            Ok(text.lines().filter_map(|line| line.parse::<u64>().ok()).sum())
        };
        turns(100)?;
        let before = (resident_kib(sandbox.shim.pid)?, resident_kib(sandbox.monitor.pid)?, inside()?);
        turns(TURNS)?;
        let after = (resident_kib(sandbox.shim.pid)?, resident_kib(sandbox.monitor.pid)?, inside()?);
        println!("shim, monitor (KiB) and inside: {before:?}, after {TURNS} added processes {after:?}");
        // Heaps settle at a level; a hundred bytes kept of each would be 150 KiB.
        ensure!(after.0 < before.0 + 1024, "the shim has grown: {before:?}, {after:?}");
        ensure!(after.2 == before.2, "something is left inside: {before:?}, {after:?}");
        world.end(&run.id)
    });
}
