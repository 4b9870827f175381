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
    host,
    job::Input,
    sandbox::Sandbox,
    scale,
    task::Shim,
    world::{World, shell},
};
use serde_json::json;

use crate::{
    clock, images,
    network::{TIDY, chain},
    pods::{limited, memory, plain},
};

/// A page here and there is no leak; this much for each of hundreds is.
const LEAK_KIB: u64 = 64;

fn available_kib() -> Result<u64> {
    host::kib("meminfo", "MemAvailable")
}

/// Resident memory of a process.
fn resident_kib(pid: libc::pid_t) -> Result<u64> {
    host::kib(&format!("{pid}/status"), "VmRSS")
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

/// What of a process or of the host stays as it is, however many have come and gone.
#[derive(Debug)]
struct Standing {
    /// Resident memory in KiB of containerd, a shim and its monitor.
    resident: [u64; 3],
    /// Their descriptors and threads.
    held: [usize; 3],
    mounts: usize,
    cgroups: usize,
}

impl Standing {
    fn of(world: &World, sandbox: &Sandbox) -> Result<Self> {
        let containerd = world.containerd_pid().context("no containerd")?.cast_signed();
        let all = [containerd, sandbox.shim.pid, sandbox.monitor.pid];
        let count = |dir: String| Ok::<_, anyhow::Error>(std::fs::read_dir(&dir).context(dir)?.count());
        let held = |pid| -> Result<usize> {
            Ok(count(format!("/proc/{pid}/fd"))? + count(format!("/proc/{pid}/task"))?)
        };
        let [a, b, c] = all.map(resident_kib);
        let [d, e, f] = all.map(held);
        Ok(Self {
            resident: [a?, b?, c?],
            held: [d?, e?, f?],
            mounts: std::fs::read_to_string("/proc/self/mountinfo")?.lines().count(),
            cgroups: shell("find /sys/fs/cgroup -type d | wc -l")?.trim().parse()?,
        })
    }

    /// Whether what is of this project has stayed as it was; containerd keeps something of each container itself.
    fn is_still(&self, before: &Self) -> Result<()> {
        let same = self.held[1..] == before.held[1..]
            && (self.mounts, self.cgroups) == (before.mounts, before.cgroups);
        let grown = |which: usize| self.resident[which].saturating_sub(before.resident[which]);
        ensure!(same && grown(1) < 1024 && grown(2) < 4096, "{before:?} before, {self:?} after");
        Ok(())
    }
}

/// Sandboxes one after the other and four at a time, for an hour or until there were a thousand, beside one that does
/// nothing for that hour and still knows what time it is.
#[test]
fn a_thousand_sandboxes_or_an_hour_of_them() {
    const HOUR: Duration = Duration::from_secs(3600);
    const AT_ONCE: usize = 4;
    const MOST: usize = 1000;
    case(|world| {
        let (idle, mut clock) = clock::started(world)?;
        let sandbox = Sandbox::find(world.stage(), &idle)?;
        clock::settled(&mut clock, "at first")?;
        let one = || world.ctr().container("soak").run(&["/bin/echo", "said"])?.success();
        let turn = |at_once: usize| -> Result<()> {
            thread::scope(|scope| {
                let all: Vec<_> =
                    (0..at_once).map(|_| scope.spawn(|| world.enter().and_then(|()| one()))).collect();
                for finished in all {
                    let finished = finished.join().map_err(|_| anyhow!("a panic"))??;
                    ensure!(finished.text() == "said\n", "{finished}");
                }
                Ok(())
            })
        };
        turn(AT_ONCE)?;
        let (before, available) = (Standing::of(world, &sandbox)?, available_kib()?);
        let (started, mut count) = (Instant::now(), 0);
        while started.elapsed() < HOUR && count < MOST {
            // As many by themselves as with others.
            let at_once = if count % (2 * AT_ONCE) < AT_ONCE { 1 } else { AT_ONCE };
            turn(at_once)?;
            count += at_once;
        }
        let took = started.elapsed();
        thread::sleep(HOUR.saturating_sub(took));
        let after = Standing::of(world, &sandbox)?;
        let lost = available.saturating_sub(available_kib()?);
        println!(
            "{count} sandboxes in {} s, {lost} KiB less available; {before:?}, {after:?}",
            took.as_secs()
        );
        after.is_still(&before)?;
        ensure!(lost < 64 * 1024 + count as u64 * LEAK_KIB, "{lost} KiB less after {count} sandboxes");
        let apart = clock::apart(&mut clock)?;
        println!("idle for {} s: {:.1} ms apart", started.elapsed().as_secs(), apart * 1e3);
        ensure!(apart.abs() < 0.05, "{apart} s apart after an idle hour");
        clock::ended(world, &idle, clock)
    });
}

/// A pod to which five hundred containers come, and go.
#[test]
fn five_hundred_come_and_go() {
    const TURNS: usize = 500;
    case_with(Cri::prepare, |world| {
        Cri::with_all(world, |all| {
            let cri = all.iter().find(|cri| cri.is_rvm()).context("rvm is not among the runtimes")?;
            let pod = Pod::run(cri, "visited", plain)?;
            let stays = pod.start("stays", &["sleep", "100000"], |_| {})?;
            let sandbox = Sandbox::find(world.stage(), &pod.id)?;
            let mut number = 0;
            let mut turns = |count: usize| -> Result<()> {
                for _ in 0..count {
                    number += 1;
                    let one =
                        pod.start(&format!("visitor-{number}"), &["sh", "-c", "echo here; exit 3"], |_| {})?;
                    ensure!(one.ended()?.exit_code == 3, "{:?}", one.status());
                    one.remove()?;
                }
                Ok(())
            };
            let inside = || -> Result<(u64, String)> {
                let counts = "grep -c . /proc/mounts; ls /sys/bus/pci/devices | wc -l; ip -o link | wc -l";
                let memory = stays.sh("grep MemAvailable /proc/meminfo | tr -dc 0-9")?;
                Ok((memory.trim().parse()?, stays.sh(counts)?))
            };
            turns(50)?;
            let (before, within) = (Standing::of(world, &sandbox)?, inside()?);
            turns(TURNS)?;
            let (after, now) = (Standing::of(world, &sandbox)?, inside()?);
            println!("{TURNS} joins: {before:?}, {after:?}; inside {within:?}, {now:?}");
            after.is_still(&before)?;
            ensure!(now.1 == within.1, "{within:?} inside before, {now:?} after");
            ensure!(now.0 + 16 * 1024 > within.0, "{within:?} inside before, {now:?} after");
            pod.remove()
        })
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

/// What they read of it is in the host's memory once, and each takes what it has for itself.
#[test]
fn twenty_sandboxes_of_one_image() {
    images::memory::share_one(20);
    images::memory::each_of(20);
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
