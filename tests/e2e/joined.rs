//! Several containers in one sandbox, joined as Kubernetes joins them: by the
//! annotations of their specifications.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    path::Path,
    time::Instant,
};

use anyhow::{Context, Result, ensure};
use nix::{
    errno::Errno,
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use rvm_tests::{
    case,
    config::ConfigFile,
    ctr::{Ctr, Run, remove_clients_fifos},
    host::Process,
    images,
    job::{Finished, Input},
    sandbox::Sandbox,
    scale,
    task::Shim,
    world::{World, shell},
};

const MIB: u64 = 1 << 20;

/// A sandbox, held by a container that does nothing.
struct Pod {
    id: String,
    ctr: Ctr,
    sandbox: Sandbox,
}

fn annotated(run: Run, kind: &str, pod: &str) -> Run {
    let kind = format!("io.kubernetes.cri.container-type={kind}");
    let pod = format!("io.kubernetes.cri.sandbox-id={pod}");
    run.with(&["--annotation", &kind, "--annotation", &pod])
}

impl Pod {
    fn start(world: &World, options: &[&str]) -> Result<Self> {
        let run = world.ctr().container("pod").detached().with(options);
        let run = annotated(run.clone(), "sandbox", &run.id);
        run.run(&["sleep", "100000"])?.success()?;
        let sandbox = Sandbox::find(world.stage(), &run.id)?;
        Ok(Self { id: run.id, ctr: world.ctr(), sandbox })
    }

    /// A container in it, not yet started.
    fn container(&self, prefix: &str) -> Run {
        annotated(self.ctr.container(prefix), "container", &self.id)
    }

    /// One that runs until it is told to end.
    fn member(&self, prefix: &str, options: &[&str]) -> Result<Run> {
        let run = self.container(prefix).with(options).detached();
        run.run(&["sleep", "100000"])?.success()?;
        Ok(run)
    }

    fn end(self, world: &World) -> Result<()> {
        world.end(&self.id)?;
        self.sandbox.wait_until_gone(scale::container())
    }
}

fn exec(ctr: &Ctr, id: &str, script: &str) -> Result<Finished> {
    ctr.exec(id, &[], &["sh", "-c", script], Input::Nothing)?.finish(scale::container())?.success()
}

fn says(refused: &Finished, text: &str) -> Result<()> {
    ensure!(refused.code() != 0 && refused.errors().contains(text), "not {text:?}: {refused}");
    Ok(())
}

/// Waits until the exit of a container's first process was told.
fn exited(world: &World, id: &str) -> Result<()> {
    world.events(|events| events.wait_for("/tasks/exit", id, scale::container()))
}

/// The pid a client knows a task by.
fn pid_of(ctr: &Ctr, id: &str) -> Result<i32> {
    let tasks = ctr.list(&["task", "ls"]);
    let pid = tasks.iter().find_map(|line| {
        let mut words = line.split_whitespace();
        (words.next() == Some(id)).then(|| words.next()?.parse().ok()).flatten()
    });
    pid.with_context(|| format!("no task {id} in {tasks:?}"))
}

fn network_of(pid: i32) -> Result<String> {
    let link = fs::read_link(format!("/proc/{pid}/ns/net"))?;
    Ok(link.to_string_lossy().into_owned())
}

/// What a sandbox has, on the host and, as one of its containers sees it, inside.
fn holdings(pod: &Pod, witness: &str) -> Result<BTreeMap<String, u64>> {
    let mut all = BTreeMap::new();
    let (shim, monitor) = (&pod.sandbox.shim, &pod.sandbox.monitor);
    for process in [shim, monitor] {
        let descriptors = fs::read_dir(format!("/proc/{}/fd", process.pid))?.count() as u64;
        all.insert(format!("descriptors of {}", process.name), descriptors);
    }
    let mounts = fs::read_to_string(format!("/proc/{}/mountinfo", shim.pid))?;
    all.insert("mounts".into(), mounts.lines().count() as u64);
    let children = |process: &&Process| process.parent == shim.pid;
    all.insert("children of the shim".into(), Process::all().iter().filter(children).count() as u64);
    let found = shell(&format!("find {} -type f | wc -l", pod.sandbox.dir().display()))?;
    all.insert("files".into(), found.trim().parse()?);
    let script = "ls /sys/block | wc -l; ls /sys/bus/pci/devices | wc -l; \
                  awk '$1 == \"memory\" {print $3}' /proc/cgroups; \
                  awk '$1 == \"MemTotal:\" {print $2}' /proc/meminfo; nproc";
    let inside = exec(&pod.ctr, witness, script)?.text();
    let names = ["disks", "PCI functions", "cgroups in the guest", "KiB of memory", "CPUs"];
    let numbers: Vec<&str> = inside.split_whitespace().collect();
    ensure!(numbers.len() == names.len(), "{inside:?}");
    for (name, number) in names.into_iter().zip(numbers) {
        all.insert(name.into(), number.parse().with_context(|| format!("{name}: {number:?}"))?);
    }
    Ok(all)
}

/// Containers of one image have one disk of it, whoever comes first and goes last.
#[test]
fn an_image_file_is_one_disk_for_all() {
    case(|world| {
        if !world.stage().is_rvm() {
            return Ok(());
        }
        world.set_config(&world.config().with_images())?;
        world.ctr().container("first").run(&["true"])?.success()?;
        let files = images::wait_for(world, 1)?;
        let result = in_one_pod(world);
        for file in files {
            fs::remove_file(file)?;
        }
        result
    });
}

fn in_one_pod(world: &World) -> Result<()> {
    const LOOK: &str = "ls /sys/block | wc -l; grep -c ' erofs ' /proc/mounts; sha256sum < /bin/busybox; \
                        grep -c lowerdir=/run/rvm/images/ /proc/mounts";
    let pod = Pod::start(world, &[])?;
    let alone = exec(&pod.ctr, &pod.id, LOOK)?.text();
    let disks = |text: &str| -> Result<u32> { Ok(text.lines().next().context("lines")?.parse()?) };
    let first = pod.member("one", &[])?;
    let second = pod.member("two", &[])?;
    let both = exec(&pod.ctr, &second.id, LOOK)?.text();
    // Each has a scratch of its own.
    ensure!(disks(&both)? == disks(&alone)? + 2, "{alone} then {both}");
    ensure!(both.lines().skip(1).eq(alone.lines().skip(1)), "{alone} then {both}");
    ensure!(both.ends_with("\n1\n"), "no image: {both}");
    pod.ctr.remove(&first.id)?;
    pod.ctr.remove(&second.id)?;
    let after = exec(&pod.ctr, &pod.id, LOOK)?.text();
    ensure!(after == alone, "{alone} then {after}");
    pod.end(world)
}

/// Three containers come, and go in each of the orders there are; each is what its
/// pid says while it is there, and the others do not notice.
#[test]
fn three_come_and_go_in_every_order() {
    case(|world| {
        let pod = Pod::start(world, &[])?;
        let (ctr, sandbox) = (&pod.ctr, &pod.sandbox);
        let before = holdings(&pod, &pod.id)?;
        let network = network_of(sandbox.monitor.pid)?;
        for order in [[0, 1, 2], [0, 2, 1], [1, 0, 2], [1, 2, 0], [2, 0, 1], [2, 1, 0]] {
            let members =
                ["a", "b", "c"].into_iter().map(|name| pod.member(name, &[])).collect::<Result<Vec<_>>>()?;
            let mut pids = BTreeSet::from([sandbox.monitor.pid, sandbox.shim.pid, pid_of(ctr, &pod.id)?]);
            for run in &members {
                let pid = pid_of(ctr, &run.id)?;
                ensure!(pids.insert(pid), "{pid} is told twice: {:?}", ctr.list(&["task", "ls"]));
                ensure!(network_of(pid)? == network, "{pid} is in another network namespace");
                let name = exec(ctr, &run.id, &format!("echo {0} > /mine; cat /mine", run.id))?;
                ensure!(name.text() == format!("{}\n", run.id), "{name}");
            }
            for n in order {
                let (run, pid) = (&members[n], pid_of(ctr, &members[n].id)?);
                ctr.run(&["task", "kill", "-s", "SIGKILL", &run.id], scale::command())?.success()?;
                exited(world, &run.id)?;
                let gone = kill(Pid::from_raw(pid), None);
                ensure!(gone == Err(Errno::ESRCH), "{pid} is there after its exit was told: {gone:?}");
                ctr.remove(&run.id)?;
                ensure!(world.events(|events| events.exit_once(&run.id))? == 137, "exit code");
                let left = order.iter().skip_while(|other| **other != n).skip(1);
                for other in left.map(|other| &members[*other]) {
                    let mine = exec(ctr, &other.id, "cat /mine")?;
                    ensure!(mine.text() == format!("{}\n", other.id), "{mine}");
                }
            }
        }
        let after = holdings(&pod, &pod.id)?;
        ensure!(before == after, "something stayed: {before:#?} {after:#?}");
        pod.end(world)
    });
}

/// A container that fails again and again leaves nothing, neither on the host nor
/// in the guest.
#[test]
fn a_crash_loop_leaves_nothing() {
    case(|world| {
        world.set_config(&block_scratch(world))?;
        let pod = Pod::start(world, &[])?;
        let neighbour = pod.member("neighbour", &[])?;
        let crash = |n: u32| -> Result<()> {
            let run = pod.container("crash").with(&["--memory-limit", "67108864"]);
            let script = format!("echo {n} > /mine; sync; exit {n}");
            run.shell(&script)?.exited(n.cast_signed())?;
            ensure!(world.events(|events| events.exit_once(&run.id))? == u64::from(n), "exit code");
            Ok(())
        };
        // What is made once and kept is there by then.
        crash(100)?;
        let before = holdings(&pod, &neighbour.id)?;
        let available = |witness: &str| -> Result<u64> {
            let text =
                exec(&pod.ctr, witness, "awk '$1 == \"MemAvailable:\" {print $2}' /proc/meminfo")?.text();
            Ok(text.trim().parse::<u64>()? << 10)
        };
        let free = available(&neighbour.id)?;
        for n in 1..=30 {
            crash(n)?;
        }
        let after = holdings(&pod, &neighbour.id)?;
        ensure!(before == after, "something stayed: {before:#?} {after:#?}");
        let lost = free.saturating_sub(available(&neighbour.id)?);
        ensure!(lost < 8 * MIB, "{} KiB of memory less in the guest", lost >> 10);
        world.end(&neighbour.id)?;
        pod.end(world)
    });
}

fn block_scratch(world: &World) -> ConfigFile {
    world.config().text("scratch", "backing", "block").set("scratch", "size_mib", "64")
}

/// Each is held to its own limits, and what happens to one is told of that one.
#[test]
fn limits_and_ends_are_each_container_s_own() {
    case(|world| {
        let pod = Pod::start(world, &[])?;
        let ctr = &pod.ctr;
        let size = |witness: &str| -> Result<u64> {
            let text = exec(ctr, witness, "awk '$1 == \"MemTotal:\" {print $2}' /proc/meminfo")?.text();
            Ok(text.trim().parse::<u64>()? >> 10)
        };
        let boot = size(&pod.id)?;
        let large = pod.member("large", &["--memory-limit", &(600 * MIB).to_string(), "--cpus", "1.5"])?;
        let small = pod.member("small", &["--memory-limit", &(24 * MIB).to_string()])?;
        let grown = size(&pod.id)?;
        ensure!(grown >= boot + 128, "{boot} MiB, with two limits {grown} MiB");
        let fill = |mib: u64| {
            format!("dd if=/dev/zero of=/dev/shm/x bs=1M count={mib} 2>/dev/null && rm /dev/shm/x")
        };
        exec(ctr, &large.id, &fill(48))?;
        let killed = ctr.exec(&small.id, &[], &["sh", "-c", &fill(48)], Input::Nothing)?;
        let killed = killed.finish(scale::container())?;
        ensure!(killed.code() == 137, "48 MiB within 24: {killed}");
        world.events(|events| events.wait_for("/tasks/oom", &small.id, scale::container()))?;
        for id in [&pod.id, &large.id] {
            let events = world.events(|events| events.of(id))?;
            ensure!(events.iter().all(|event| event.topic != "/tasks/oom"), "{id}: {events:?}");
        }
        // A container's own first process, killed for its memory.
        let run = pod.container("oom").with(&["--memory-limit", &(24 * MIB).to_string()]);
        run.shell("exec dd if=/dev/zero of=/dev/null bs=64M")?.exited(137)?;
        ensure!(world.events(|events| events.exit_once(&run.id))? == 137, "exit code");
        world.events(|events| events.wait_for("/tasks/oom", &run.id, scale::container()))?;
        // The limits change together with the machine.
        Shim::of(&small.id)?.update(&serde_json::json!({"memory": {"limit": 400 * MIB}}))?;
        let larger = size(&pod.id)?;
        ensure!(larger >= grown + 128, "{grown} MiB, and with 376 MiB more {larger} MiB");
        exec(ctr, &small.id, &fill(48))?;
        world.end(&small.id)?;
        world.end(&large.id)?;
        let until = Instant::now() + scale::container();
        while size(&pod.id)? > boot {
            ensure!(Instant::now() < until, "{boot} MiB, and {} MiB stay", size(&pod.id)?);
        }
        pod.end(world)
    });
}

/// Namespaces of others are named by the pids they are known by on the host.
#[test]
fn namespaces_are_shared_by_pid() {
    case(|world| {
        let pod = Pod::start(world, &[])?;
        let ctr = &pod.ctr;
        let path = |kind: &str, link: &str, pid: i32| format!("{kind}:/proc/{pid}/ns/{link}");
        let holder = pid_of(ctr, &pod.id)?;
        let all = [("pid", "pid"), ("ipc", "ipc"), ("uts", "uts"), ("network", "net")];
        let shared: Vec<String> = all.map(|(kind, link)| path(kind, link, holder)).to_vec();
        let options: Vec<&str> = shared.iter().flat_map(|path| ["--with-ns", path]).collect();
        let a = pod.member("a", &options)?;
        let b = pod.member("b", &options)?;
        let own = pod.member("own", &[])?;
        let links = |id: &str| -> Result<Vec<String>> {
            let script = "for n in pid ipc uts net mnt; do readlink /proc/self/ns/$n; done";
            Ok(exec(ctr, id, script)?.text().lines().map(str::to_owned).collect())
        };
        let (a_links, b_links) = (links(&a.id)?, links(&b.id)?);
        ensure!(a_links[..4] == b_links[..4] && a_links[4] != b_links[4], "{a_links:?} {b_links:?}");
        ensure!(a_links[..4] == links(&pod.id)?[..4], "{a_links:?} {:?}", links(&pod.id)?);
        let own_links = links(&own.id)?;
        ensure!(own_links.iter().zip(&a_links).all(|(a, b)| a != b), "{own_links:?} {a_links:?}");
        // Each sees the others' processes, and pid 1 is the sandbox's.
        let seen = exec(ctr, &a.id, "cat /proc/1/cmdline | tr '\\0' ' '; ls -d /proc/[0-9]* | wc -l")?.text();
        ensure!(seen.starts_with("sleep 100000"), "{seen}");
        // One container's alone, as `kubectl debug --target` asks for.
        let target = path("pid", "pid", pid_of(ctr, &own.id)?);
        let debug = pod.member("debug", &["--with-ns", &target])?;
        ensure!(links(&debug.id)?[0] == own_links[0], "not the target's");
        // What leads elsewhere is refused by its name.
        let elsewhere = path("ipc", "ipc", 1);
        let run = pod.container("elsewhere").with(&["--with-ns", &elsewhere]);
        let refused = run.run(&["true"])?;
        remove_clients_fifos(&run.id)?;
        says(&refused, "/proc/1/ns/ipc is a namespace of the host's kernel")?;
        for run in [&debug, &own, &a, &b] {
            world.end(&run.id)?;
        }
        pod.end(world)
    });
}

/// A pod's `/dev/shm` is one for who is given it, and nobody else's.
#[test]
fn shm_is_shared_where_it_is_the_pod_s() {
    case(|world| {
        let dir = world.dir().join("pod-shm");
        fs::create_dir(&dir)?;
        nix::mount::mount(Some("shm"), &dir, Some("tmpfs"), nix::mount::MsFlags::empty(), Some("size=16m"))?;
        let mount = format!("type=bind,src={},dst=/dev/shm,options=rbind:rw", dir.display());
        let pod = Pod::start(world, &["--mount", &mount])?;
        let a = pod.member("a", &["--mount", &mount])?;
        let b = pod.member("b", &["--mount", &mount])?;
        let own = pod.member("own", &[])?;
        exec(&pod.ctr, &a.id, "echo hello > /dev/shm/x")?;
        for id in [&pod.id, &b.id] {
            let read = exec(&pod.ctr, id, "cat /dev/shm/x; df -m /dev/shm | awk 'END {print $2}'")?;
            ensure!(read.text() == "hello\n16\n", "{id}: {read}");
        }
        exec(&pod.ctr, &own.id, "test ! -e /dev/shm/x")?;
        ensure!(fs::read_dir(&dir)?.next().is_none(), "it is the guest's");
        for run in [&a, &b, &own] {
            world.end(&run.id)?;
        }
        pod.end(world)?;
        nix::mount::umount(&dir)?;
        Ok(fs::remove_dir(&dir)?)
    });
}

/// containerd finds all of them again, and each is still told from the others.
#[test]
fn containerd_is_restarted_in_between() {
    case(|world| {
        let pod = Pod::start(world, &[])?;
        let ctr = &pod.ctr;
        let a = pod.member("a", &[])?;
        let pid = pid_of(ctr, &a.id)?;
        world.restart_containerd(Signal::SIGKILL)?;
        for id in [&pod.id, &a.id] {
            ensure!(ctr.task_state(id).as_deref() == Some("RUNNING"), "{:?}", ctr.list(&["task", "ls"]));
        }
        ensure!(pid_of(ctr, &a.id)? == pid, "another pid");
        let b = pod.member("b", &[])?;
        exec(ctr, &a.id, "true")?;
        // As Docker ends what it cannot ask: by its pid.
        kill(Pid::from_raw(pid), Signal::SIGKILL)?;
        exited(world, &a.id)?;
        ctr.remove(&a.id)?;
        exec(ctr, &b.id, "true")?;
        world.end(&b.id)?;
        remove_clients_fifos(&a.id)?;
        pod.end(world)
    });
}

fn all_end_with(world: &World, end: impl FnOnce(&Sandbox) -> Result<()>) -> Result<()> {
    let pod = Pod::start(world, &[])?;
    let members = [pod.member("a", &[])?, pod.member("b", &[])?];
    end(&pod.sandbox)?;
    let ids = [&pod.id, &members[0].id, &members[1].id];
    for id in ids {
        exited(world, id)?;
    }
    for id in ids {
        let _ = pod.ctr.run(&["task", "rm", "-f", id], scale::container())?;
        pod.ctr.run(&["containers", "rm", id], scale::command())?.success()?;
        ensure!(world.events(|events| events.exit_once(id))? == 137, "exit code of {id}");
        remove_clients_fifos(id)?;
    }
    pod.sandbox.wait_until_gone(scale::container())
}

#[test]
fn monitor_killed_under_three() {
    case(|world| all_end_with(world, Sandbox::kill_monitor));
}

#[test]
fn shim_killed_under_three() {
    case(|world| all_end_with(world, Sandbox::kill_shim));
}

/// The container that holds the sandbox goes first: the others go with it.
#[test]
fn the_sandbox_s_container_goes_first() {
    case(|world| {
        let pod = Pod::start(world, &[])?;
        let a = pod.member("a", &[])?;
        world.end(&pod.id)?;
        exited(world, &a.id)?;
        pod.ctr.remove(&a.id)?;
        ensure!(world.events(|events| events.exit_once(&a.id))? == 137, "exit code");
        pod.sandbox.wait_until_gone(scale::container())
    });
}

/// Who joins what is not there learns it before anything is made.
#[test]
fn nothing_to_join() {
    case(|world| {
        let run = annotated(world.ctr().container("lost"), "container", "no-such-pod");
        let refused = run.run(&["true"])?;
        says(&refused, "sandbox no-such-pod, which the container's annotations name, does not run")?;
        ensure!(!Path::new("/run/rvm/default").exists(), "something was made");
        remove_clients_fifos(&run.id)
    });
}
