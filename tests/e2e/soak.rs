//! The same many times over: what grows a little each time shows. `cargo xtask test --all` runs
//! these, or `--filter soak`.

use std::{
    cell::Cell,
    sync::mpsc,
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, anyhow, ensure};
use nix::sys::signal::Signal;
use rvm_tests::{
    case, case_with,
    cni::{Namespace, Network},
    cri::{Container, Cri, Pod},
    job::Input,
    sandbox::Sandbox,
    scale,
    task::Shim,
    world::{World, shell},
};
use serde_json::json;

use crate::{
    network::{TIDY, chain},
    pods::{limited, memory, plain},
};

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

/// Every pod of a node at once, as after a drain; removed in no order.
#[test]
fn twenty_pods_at_once() {
    const PODS: usize = 20;
    case_with(Cri::prepare, |world| {
        Cri::compare(world, |cri| {
            let started = Instant::now();
            thread::scope(|scope| {
                let (ready, all_ready) = mpsc::channel();
                let pods: Vec<_> = (0..PODS)
                    .map(|number| {
                        let (ready, (turn, my_turn)) = (ready.clone(), mpsc::channel());
                        let run = move || -> Result<()> {
                            world.enter()?;
                            let cri = cri.again(world)?;
                            let pod = Pod::run(&cri, &format!("many-{number}"), plain)?;
                            let one =
                                pod.start("one", &["sh", "-c", "echo up; exec sleep 100000"], |_| {})?;
                            one.printed("up")?;
                            let _ = ready.send(number);
                            // Where another has failed nobody says when.
                            let _: Result<(), _> = my_turn.recv();
                            pod.remove()
                        };
                        (turn, scope.spawn(run))
                    })
                    .collect();
                drop(ready);
                let up = all_ready.iter().take(PODS).count();
                println!("{}: {up} pods up after {} ms", cri.handler(), started.elapsed().as_millis());
                // 7 and 20 have no divisor in common: each has its turn once.
                for turn in 0..PODS {
                    let _ = pods[(turn * 7 + 3) % PODS].0.send(());
                }
                let ends: Vec<_> = pods.into_iter().map(|(_, pod)| pod.join()).collect();
                for end in ends {
                    end.map_err(|_| anyhow!("a panic"))??;
                }
                ensure!(up == PODS, "{up} of {PODS} pods came up");
                Ok(())
            })
        })
        .map(drop)
    });
}

/// A pod of five: one that prepares, a server, its client, a sidecar, and one that ends every time.
#[test]
fn a_pod_of_five_through_a_bad_day() {
    case_with(Cri::prepare, |world| {
        let under_runc = Cell::new(0);
        Cri::compare(world, |cri| {
            let pod = Pod::run(cri, "five", plain)?;
            let init = pod.start("init", &["sh", "-c", "echo prepared"], |_| {})?;
            ensure!(init.ended()?.exit_code == 0, "{:?}", init.log());
            let server = ["sh", "-c", "mkdir /www; echo page > /www/index.html; exec httpd -f -p 80 -h /www"];
            let server = pod.start("server", &server, limited(memory(64)))?;
            let client = pod.start("client", &["sleep", "100000"], limited(memory(64)))?;
            let sidecar = pod.start("sidecar", &["sleep", "100000"], |_| {})?;
            let answers = |what: &str| -> Result<()> {
                let until = Instant::now() + scale::container();
                loop {
                    // The first call to a containerd that was restarted tells that the old one is gone.
                    let said = client.exec(&["wget", "-q", "-O", "-", "127.0.0.1"]);
                    if said.as_ref().is_ok_and(|said| said.stdout == "page\n") {
                        return Ok(());
                    }
                    ensure!(Instant::now() < until, "{what}: the server does not answer: {said:?}");
                }
            };
            // What kubelet does about one that ends: it starts it again, as another container.
            let mut attempt = 0;
            let mut crash = |times: usize| -> Result<()> {
                for _ in 0..times {
                    attempt += 1;
                    let name = format!("crashing-{attempt}");
                    let ended = pod.start(&name, &["sh", "-c", "exit 9"], limited(memory(16)))?;
                    ensure!(ended.ended()?.exit_code == 9, "{:?}", ended.status());
                    ended.remove()?;
                }
                Ok(())
            };
            answers("at first")?;
            crash(3)?;
            for signal in [Signal::SIGTERM, Signal::SIGKILL] {
                world.restart_containerd(signal)?;
                answers("after containerd has come again")?;
                crash(1)?;
            }
            if cri.is_rvm() {
                let sandbox = Sandbox::find(world.stage(), &pod.id)?;
                shell(&format!("kill -STOP {}", sandbox.shim.pid))?;
                thread::sleep(scale::seconds(0.5));
                shell(&format!("kill -CONT {}", sandbox.shim.pid))?;
                answers("after its shim has stood still")?;
            }
            let eats =
                pod.start("eats", &["sh", "-c", "x=x; while :; do x=$x$x; done"], limited(memory(24)))?;
            let ended = eats.ended()?;
            ensure!((ended.exit_code, ended.reason.as_str()) == (137, "OOMKilled"), "{ended:?}");
            // Raised and lowered under load.
            client.sh("(while :; do wget -q -O /dev/null 127.0.0.1; done) > /dev/null 2>&1 &")?;
            for mib in [256, 64, 320, 64] {
                server.update(memory(mib))?;
                let is = server.sh("cat /sys/fs/cgroup/memory.max")?;
                ensure!(is.trim() == (mib << 20).to_string(), "{mib} MiB: {is}");
            }
            let probe = |container: &Container<'_>| -> Result<()> {
                ensure!(container.exec(&["true"])?.code == 0, "a probe fails");
                Ok(())
            };
            (0..50).try_for_each(|_| probe(&server).and_then(|()| probe(&sidecar)))?;
            crash(5)?;
            let before = available_kib()?;
            crash(30)?;
            let lost = before.saturating_sub(available_kib()?);
            println!("{}: {lost} KiB less after 30 crashes", cri.handler());
            // containerd itself keeps something of each container: the first to run is runc.
            let keeps = under_runc.get();
            ensure!(lost < keeps + (16 << 10), "{lost} KiB less after 30 crashes, {keeps} under runc");
            under_runc.set(if keeps == 0 { lost } else { keeps });
            answers("at last")?;
            pod.remove()
        })
        .map(drop)
    });
}
