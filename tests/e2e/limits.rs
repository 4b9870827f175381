//! Limits by what they do, not by what their files say; pause, update,
//! statistics, and what is told of memory that ran out.

use std::path::Path;

use anyhow::{Context, Result, bail, ensure};
use rvm_tests::{
    case,
    ctr::{Ctr, Run},
    job::{Finished, Input},
    sandbox::Sandbox,
    scale,
    script::CLOCK,
    task::Shim,
    world::World,
};
use serde_json::{Value, json};

const MIB: u64 = 1 << 20;
/// Where a container sees its own cgroup.
const CGROUP: &str = "/sys/fs/cgroup";

/// A container from containerd's own specification with `resources` in it, and how `ctr run` of it ended.
fn limited(
    world: &World,
    detached: bool,
    name: &str,
    script: &str,
    resources: &Value,
) -> Result<(Run, Finished)> {
    limited_with(world, detached, name, script, resources, None)
}

/// As [`limited`], with a mount beside those of every container.
fn limited_with(
    world: &World,
    detached: bool,
    name: &str,
    script: &str,
    resources: &Value,
    mount: Option<Value>,
) -> Result<(Run, Finished)> {
    let ctr = world.ctr();
    let spec = ctr.run(&["oci", "spec"], scale::command())?.success()?;
    let mut spec: Value = serde_json::from_slice(&spec.stdout)?;
    let run = ctr.container(name);
    spec["linux"]["cgroupsPath"] = format!("/default/{}", run.id).into();
    spec["root"]["path"] = world.rootfs()?.to_string_lossy().into_owned().into();
    spec["process"]["args"] = json!(["sh", "-c", script]);
    spec["process"]["env"] = json!(["PATH=/bin:/usr/bin"]);
    // The directory is every case's, and would take the writes itself.
    spec["annotations"]["io.rvm.writes"] = "guest".into();
    let mounts = spec["mounts"].as_array_mut().context("mounts of the specification")?;
    mounts.push(json!({"destination": CGROUP, "type": "cgroup", "source": "cgroup", "options": ["ro"]}));
    mounts.extend(mount);
    // `ctr run` adds it, `ctr oci spec` does not.
    let namespaces = spec["linux"]["namespaces"].as_array_mut().context("linux.namespaces")?;
    namespaces.push(json!({"type": "cgroup"}));
    let all = spec["linux"]["resources"].as_object_mut().context("linux.resources of the specification")?;
    all.extend(resources.as_object().context("resources")?.clone());
    let path = world.write_file(&format!("{}.json", run.id), spec.to_string())?;
    let run = run.with(&["--config", &path]);
    let run = if detached { run.detached() } else { run };
    let finished = run.run(&[]);
    std::fs::remove_file(path)?;
    Ok((run, finished?))
}

fn exec(ctr: &Ctr, id: &str, script: &str) -> Result<Finished> {
    ctr.exec(id, &[], &["sh", "-c", script], Input::Nothing)?.finish(scale::container())
}

fn count(world: &World, id: &str, topic: &str) -> Result<usize> {
    world.events(|events| {
        events.marker(scale::command())?;
        Ok(events.of(id)?.iter().filter(|event| event.topic == topic).count())
    })
}

/// At least `times` out of memory, and never more told of than the kernel killed: it may take a second process before
/// the first has given its memory back.
fn oom_is_told(world: &World, id: &str, times: usize) -> Result<()> {
    let kills = exec(&world.ctr(), id, "sed -n 's/^oom_kill //p' /sys/fs/cgroup/memory.events")?.success()?;
    let events = count(world, id, "/tasks/oom")?;
    let killed: usize = kills.text().trim().parse()?;
    ensure!(
        (times..=killed).contains(&events),
        "{events} events, {killed} killed, {times} times out of memory"
    );
    Ok(())
}

/// Measures what share of a processor the container's cgroup gets, five times for two seconds: on a busy machine the
/// guest's processor is away for tenths of one, in which nothing is used or what is used is charged to who ran before.
/// `ctr` 1.6 asks for no cgroup namespace: what is at the mount point is then the root, with all that the guest does.
/// Both numbers are read by the shell itself, and each interval begins where the one before it ended: a program
/// started between the two readings waits for the quota, once for longer than the other time.
const SHARE: &str = "IFS=: read -r n c own < /proc/self/cgroup; \
     read_both() { while read -r k v; do [ $k = usage_usec ] && u=$v; done < /sys/fs/cgroup$own/cpu.stat; clock; }; \
     read_both; for n in 1 2 3 4 5; do u0=$u; t0=$t; sleep 2; read_both; echo $(( (u - u0) / ((t - t0) * 10) )); done";

/// The median of them in thousandths of a processor is the share `wanted`, within a tenth.
fn share_of(finished: &Finished, wanted: i32) -> Result<()> {
    let mut shares: Vec<i32> = finished.text().lines().filter_map(|line| line.trim().parse().ok()).collect();
    ensure!(shares.len() == 5, "{finished}");
    println!("{shares:?} thousandths of a processor, {wanted} wanted");
    shares.sort_unstable();
    ensure!((wanted * 9 / 10..=wanted * 11 / 10).contains(&shares[2]), "{finished}");
    Ok(())
}

#[test]
fn a_processor_by_quota() {
    case(|world| {
        let quota = ["--cpu-quota", "50000", "--cpu-period", "100000"];
        let mount = format!("type=cgroup,src=cgroup,dst={CGROUP},options=ro");
        let run = world.ctr().container("quota").with(&quota).with(&["--mount", &mount]);
        let finished = run.shell(&format!("while :; do :; done & {CLOCK} {SHARE}; kill $!"))?.success()?;
        share_of(&finished, 500)
    });
}

/// Processor time in hundredths of a second that a container's process has used, on the host: under rvm that is its machine's.
pub(crate) fn processor_ticks(world: &World, id: &str) -> Result<u64> {
    let tasks = world.ctr().list(&["task", "ls"]);
    let pid = tasks.iter().find_map(|task| task.strip_prefix(id)?.split_whitespace().next());
    let pid = match Sandbox::find(world.stage(), id) {
        Ok(sandbox) => sandbox.monitor.pid.to_string(),
        Err(_) => pid.context("no such task")?.to_owned(),
    };
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat"))?;
    // utime and stime, the 14th and 15th field; the second may have spaces in it.
    let after_name = stat.rsplit_once(')').context("no name in stat")?.1;
    let times: Vec<u64> =
        after_name.split_whitespace().skip(11).take(2).map(str::parse).collect::<Result<_, _>>()?;
    Ok(times.iter().sum())
}

/// Processes of the host that do nothing but use its processors, one each, until they are dropped.
struct Busy(Vec<std::process::Child>);

impl Busy {
    fn start() -> Result<Self> {
        let processors = std::thread::available_parallelism()?.get();
        let mut busy = Self(Vec::with_capacity(processors));
        for _ in 0..processors {
            busy.0.push(std::process::Command::new("sh").args(["-c", "while :; do :; done"]).spawn()?);
        }
        Ok(busy)
    }
}

impl Drop for Busy {
    fn drop(&mut self) {
        for process in &mut self.0 {
            let _ = process.kill();
            let _ = process.wait();
        }
    }
}

/// Half a processor is there on a busy host too, and the container gets it: time in which the host ran something else
/// is not charged to its quota.
#[test]
fn a_quota_on_a_busy_host() {
    case(|world| {
        let ctr = world.ctr();
        let quota = ["--cpu-quota", "50000", "--cpu-period", "100000"];
        let run = ctr.container("quota").with(&quota).detached();
        run.shell("while :; do :; done")?.success()?;
        let busy = Busy::start()?;
        let mut shares = Vec::new();
        for _ in 0..3 {
            let (ticks, started) = (processor_ticks(world, &run.id)?, std::time::Instant::now());
            std::thread::sleep(std::time::Duration::from_secs(4));
            let used = processor_ticks(world, &run.id)? - ticks;
            // A tick is a hundredth of a second.
            shares.push((used as f64 * 10.0 / started.elapsed().as_secs_f64()) as u32);
        }
        drop(busy);
        world.end(&run.id)?;
        println!("{shares:?} thousandths of a processor of a busy host, 500 wanted");
        shares.sort_unstable();
        // Charged for what the host ran, it would have half of that each time; the devhost itself is not alone on its
        // machine, and may be without it for a while.
        ensure!(shares[1] <= 550 && shares[2] >= 350, "{shares:?}");
        Ok(())
    });
}

/// By what their processes get done, not only by what their machines use: a machine may spend its share on itself.
#[test]
fn one_processor_is_shared_by_weight() {
    case(|world| {
        let out = world.dir().join("progress");
        std::fs::create_dir_all(&out)?;
        let weights = [("light", 512), ("heavy", 3072)];
        let runs = weights
            .iter()
            .map(|(name, shares)| {
                let cpu = json!({"cpu": {"shares": shares, "cpus": "0"}});
                let mount =
                    json!({"destination": "/out", "type": "bind", "source": out, "options": ["rbind", "rw"]});
                let script = format!(
                    "n=0; while :; do n=$((n + 1)); [ $((n % 100)) = 0 ] && echo $n > /out/{name}; done"
                );
                let (run, started) = limited_with(world, true, name, &script, &cpu, Some(mount))?;
                started.success()?;
                Ok(run)
            })
            .collect::<Result<Vec<_>>>()?;
        // The file is empty between the shell's opening it and its writing.
        let done = |name: &str| loop {
            match std::fs::read_to_string(out.join(name)).unwrap_or_default().trim().parse::<u64>() {
                Ok(count) => return count,
                Err(_) => std::thread::yield_now(),
            }
        };
        let look = || -> Result<Vec<[u64; 2]>> {
            let both = runs.iter().zip(&weights);
            both.map(|(run, (name, _))| Ok([processor_ticks(world, &run.id)?, done(name)])).collect()
        };
        // Weights of 59 and 240; of 20 and 118 on the straight line of runc before 1.3.2. What a machine spends on itself
        // is the same for both, and so more of the light one's share: by rounds twice as much is still by weight.
        let wanted = if world.stage().is_rvm() { 4.1 } else { 5.9 };
        let bounds = [("ticks", wanted * 0.8..wanted * 1.2), ("rounds", wanted * 0.8..wanted * 2.0)];
        let mut measured = Vec::new();
        // The machine that the host itself is has others beside it, and is for seconds not what it was.
        for _ in 0..3 {
            let before = look()?;
            std::thread::sleep(std::time::Duration::from_secs(8));
            let after = look()?;
            let used = |run: usize, what: usize| (after[run][what] - before[run][what]) as f64;
            let ratios = [0, 1].map(|what| used(1, what) / used(0, what).max(1.0));
            println!("heavy/light: {} ticks, {} rounds of a shell's loop", ratios[0], ratios[1]);
            measured.push(ratios);
            if bounds.iter().zip(ratios).all(|((_, bounds), ratio)| bounds.contains(&ratio)) {
                break;
            }
        }
        for run in &runs {
            world.end(&run.id)?;
        }
        std::fs::remove_dir_all(&out)?;
        for (at, (what, bounds)) in bounds.iter().enumerate() {
            let ratios = measured.iter().map(|ratios| ratios[at]).collect::<Vec<_>>();
            ensure!(
                ratios.iter().any(|ratio| bounds.contains(ratio)),
                "{ratios:?}, {wanted} wanted ({what})"
            );
        }
        Ok(())
    });
}

#[test]
fn memory_that_runs_out() {
    case(|world| {
        let limit = (32 * MIB).to_string();
        let run = world.ctr().container("oom").with(&["--memory-limit", &limit]);
        let fits = run.run(&["dd", "if=/dev/zero", "of=/dev/null", "bs=8M", "count=1"])?.success()?;
        println!("{fits}");
        ensure!(count(world, &run.id, "/tasks/oom")? == 0, "nothing was killed");

        let run = world.ctr().container("oom").with(&["--memory-limit", &limit]);
        run.run(&["dd", "if=/dev/zero", "of=/dev/null", "bs=100M", "count=1"])?.exited(137)?;
        let events = world.events(|events| {
            events.marker(scale::command())?;
            events.of(&run.id)
        })?;
        let topics: Vec<&str> = events.iter().map(|event| event.topic.as_str()).collect();
        let expected = ["/tasks/create", "/tasks/start", "/tasks/oom", "/tasks/exit", "/tasks/delete"];
        ensure!(topics == expected, "{events:#?}");
        ensure!(events[3].number("exit_status") == 137, "{events:#?}");
        Ok(())
    });
}

#[test]
fn a_fork_bomb() {
    case(|world| {
        let script = "n=0; while [ $n -lt 60 ]; do sleep 100 & n=$((n + 1)); echo $n; done; echo never";
        let (_, finished) = limited(world, false, "bomb", script, &json!({"pids": {"limit": 20}}))?;
        // The shell is the twentieth.
        ensure!(finished.text().lines().last() == Some("19"), "{finished}");
        ensure!(finished.code() != 0 && finished.errors().contains("can't fork"), "{finished}");
        Ok(())
    });
}

/// The host's device is not the guest's: its limit is that of the scratch, which takes the container's writes.
#[test]
fn a_disk_by_rate() {
    case(|world| {
        world.set_config(
            &world.config().text("scratch", "backing", "block").set("scratch", "size_mib", "64"),
        )?;
        let script = format!(
            "{CLOCK} clock; s=$t; dd if=/dev/zero of=/big bs=1M count=12 conv=fsync 2>/dev/null; clock; echo $((t - s))"
        );
        let device = json!([{"major": 8, "minor": 0, "rate": 3 * MIB}]);
        let limits = json!({"blockIO": {"throttleWriteBpsDevice": device}});
        // Centiseconds for 12 MiB.
        let took = |finished: Finished| -> Result<u64> { Ok(finished.success()?.text().trim().parse()?) };
        // A busy machine is slow for a while; what it can do is its best.
        let mut free = u64::MAX;
        for _ in 0..3 {
            free = free.min(took(world.ctr().container("free").shell(&script)?)?);
            if free < 300 {
                break;
            }
        }
        let throttled = took(limited(world, false, "rate", &script, &limits)?.1)?;
        println!("12 MiB in {free} cs without a limit, in {throttled} cs with 3 MiB/s");
        ensure!(free < 300, "too slow a machine to see a limit: {free}");
        // 400 by the rate alone, and what the machine itself takes on top.
        ensure!((360..600 + 2 * free).contains(&throttled), "{throttled}");
        world.set_config(
            &world.config().text("scratch", "backing", "tmpfs").set("scratch", "size_mib", "0"),
        )?;
        let (_, refused) = limited(world, false, "rate", &script, &limits)?;
        ensure!(refused.code() != 0 && refused.errors().contains("scratch is in memory"), "{refused}");
        Ok(())
    });
}

#[test]
fn pause_and_resume() {
    case(|world| {
        let ctr = world.ctr();
        let run = ctr.container("pause");
        let mut job = run.start(&["sh", "-c", "while :; do echo tick; sleep 0.05; done"], Input::Nothing)?;
        job.wait_for("tick", scale::container())?;
        for _ in 0..2 {
            ctr.run(&["task", "pause", &run.id], scale::command())?.success()?;
            ensure!(ctr.task_state(&run.id).as_deref() == Some("PAUSED"), "{:?}", ctr.task_state(&run.id));
            // What was written before is on its way.
            let moment = scale::seconds(0.05);
            std::thread::sleep(moment);
            let seen = job.stdout().len();
            ensure!(job.wait_for_more(seen, moment) == seen, "it goes on");

            let refused = exec(&ctr, &run.id, "true")?;
            ensure!(refused.code() != 0 && refused.errors().contains("pause"), "{refused}");
            let twice = ctr.run(&["task", "pause", &run.id], scale::command())?;
            ensure!(
                twice.code() != 0 && twice.errors().contains("cannot pause a paused container"),
                "{twice}"
            );

            ctr.run(&["task", "resume", &run.id], scale::command())?.success()?;
            ensure!(job.wait_for_more(seen, scale::container()) > seen, "it does not go on");
            ensure!(ctr.task_state(&run.id).as_deref() == Some("RUNNING"));
        }
        let error = Shim::of(&run.id)?.delete().err().map(|error| error.to_string()).unwrap_or_default();
        ensure!(!error.is_empty(), "a running task was deleted");
        ctr.run(&["task", "pause", &run.id], scale::command())?.success()?;
        let error = Shim::of(&run.id)?.delete().err().map(|error| error.to_string()).unwrap_or_default();
        ensure!(!error.is_empty(), "a paused task was deleted");
        ctr.run(&["task", "kill", "-s", "SIGKILL", &run.id], scale::command())?.success()?;
        job.close_input();
        job.finish(scale::container())?.exited(137)?;
        for (topic, expected) in [("/tasks/paused", 3), ("/tasks/resumed", 2), ("/tasks/exit", 1)] {
            let published = count(world, &run.id, topic)?;
            ensure!(published == expected, "{published} {topic}");
        }
        Ok(())
    });
}

#[test]
fn limits_change_both_ways() {
    case(|world| {
        let ctr = world.ctr();
        let (run, started) = limited(
            world,
            true,
            "update",
            "while :; do :; done",
            &json!({
                "cpu": {"quota": 50_000, "period": 100_000},
                "memory": {"limit": 24 * MIB},
                "pids": {"limit": 12},
            }),
        )?;
        started.success()?;
        let id = &run.id;
        share_of(&exec(&ctr, id, &format!("{CLOCK} {SHARE}"))?.success()?, 500)?;
        let forks = "n=0; while [ $n -lt 20 ]; do sleep 1 & n=$((n + 1)); done; echo $n; wait";
        let bomb = exec(&ctr, id, forks)?;
        ensure!(bomb.text().is_empty() && bomb.errors().contains("can't fork"), "{bomb}");
        let takes = |mib: u64| format!("dd if=/dev/zero of=/dev/null bs={mib}M count=1 2>&1; echo $?");
        let killed = exec(&ctr, id, &takes(40))?;
        ensure!(killed.text().contains("137") || killed.code() == 137, "{killed}");
        oom_is_told(world, id, 1)?;

        Shim::of(id)?.update(&json!({"pids": {"limit": 100}, "memory": {"limit": 64 * MIB}}))?;
        ensure!(exec(&ctr, id, forks)?.success()?.text() == "20\n");
        ensure!(exec(&ctr, id, &takes(40))?.success()?.text().ends_with("\n0\n"));
        // What was not named is as it was; then it is changed alone.
        Shim::of(id)?.update(&json!({"cpu": {"quota": 75_000}}))?;
        share_of(&exec(&ctr, id, &format!("{CLOCK} {SHARE}"))?.success()?, 750)?;

        Shim::of(id)?.update(&json!({"pids": {"limit": 12}, "memory": {"limit": 24 * MIB}}))?;
        ensure!(exec(&ctr, id, forks)?.errors().contains("can't fork"));
        // The kernel may take the shell for the larger one.
        let killed = exec(&ctr, id, &takes(40))?;
        ensure!(killed.text().contains("137") || killed.code() == 137, "{killed}");
        oom_is_told(world, id, 2)?;

        let wrong = json!({"pids": {"limit": 50}, "unified": {"memory.nonsense": "1"}});
        let wrong = Shim::of(id)?.update(&wrong).err().context("it was accepted")?;
        ensure!(wrong.to_string().contains("unified[\"memory.nonsense\"]"), "{wrong}");
        ensure!(exec(&ctr, id, "cat /sys/fs/cgroup/pids.max")?.text() == "12\n", "half of an update is left");
        ensure!(ctr.task_state(id).as_deref() == Some("RUNNING"));
        world.end(id)
    });
}

/// Beyond what the machine started with memory is plugged in, and taken out again.
#[test]
fn a_limit_beyond_the_machine() {
    case(|world| {
        let ctr = world.ctr();
        let limit = |mib: u64| json!({"memory": {"limit": mib * MIB}});
        let (run, started) = limited(world, true, "grow", "sleep 100000", &limit(64))?;
        started.success()?;
        let id = &run.id;
        let total = "sed -n 's/MemTotal: *\\([0-9]*\\) kB/\\1/p' /proc/meminfo";
        let total =
            || -> Result<u64> { Ok(exec(&ctr, id, total)?.success()?.text().trim().parse::<u64>()? >> 10) };
        let takes = |mib: u64| format!("dd if=/dev/zero of=/dev/null bs={mib}M count=1 2>&1; echo $?");
        let killed = |finished: &Finished| finished.text().contains("137") || finished.code() == 137;
        let before = total()?;
        ensure!(before < 512, "a machine of {before} MiB");

        // 24 + 48 for the guest, in blocks of 128.
        Shim::of(id)?.update(&limit(768))?;
        let grown = total()?;
        println!("{before} MiB, then {grown} MiB");
        ensure!(grown == before + 384, "{before} MiB, then {grown} MiB");
        let finished = exec(&ctr, id, &takes(600))?.success()?;
        ensure!(finished.text().ends_with("\n0\n"), "{finished}");
        ensure!(host_memory_max(id)? == ceiling(512 + 384), "{}", host_memory_max(id)?);
        ensure!(known_memory(id)? == 512 + 384, "{}", known_memory(id)?);
        // It lies in the new memory first, and devices read it there.
        let sums = "md5sum /dev/shm/x /y | cut -d' ' -f1";
        let written =
            exec(&ctr, id, &format!("head -c 20000000 /dev/urandom | tee /dev/shm/x > /y; sync; {sums}"))?;
        let written = written.success()?.text();

        let wrong = json!({"memory": {"limit": 1024 * MIB}, "unified": {"memory.nonsense": "1"}});
        let wrong = Shim::of(id)?.update(&wrong).err().context("it was accepted")?;
        ensure!(wrong.to_string().contains("unified[\"memory.nonsense\"]"), "{wrong}");
        ensure!(exec(&ctr, id, "cat /sys/fs/cgroup/memory.max")?.text().trim() == (768 * MIB).to_string());
        ensure!(host_memory_max(id)? == ceiling(512 + 384), "{}", host_memory_max(id)?);
        let wrong = Shim::of(id)?.update(&limit(1 << 30)).err().context("it was accepted")?.to_string();
        ensure!(
            wrong.starts_with("linux.resources.memory.limit: ") && wrong.contains("on this host"),
            "{wrong}"
        );

        Shim::of(id)?.update(&limit(64))?;
        let shrunk = total()?;
        println!("and {shrunk} MiB in the end");
        // Kernel data that came to lie in it may keep a part.
        ensure!(shrunk < grown - 256, "{before} MiB, {grown} MiB, {shrunk} MiB");
        ensure!(host_memory_max(id)? == ceiling(512 + shrunk - before), "{}", host_memory_max(id)?);
        ensure!(known_memory(id)? == 512 + shrunk - before, "{}", known_memory(id)?);
        let found = exec(&ctr, id, sums)?.success()?.text();
        ensure!(found == written && found.lines().count() == 2, "{written} became {found}");
        let finished = exec(&ctr, id, &takes(100))?;
        ensure!(killed(&finished), "{finished}");
        ensure!(ctr.task_state(id).as_deref() == Some("RUNNING"));

        // So much that the kernel takes some of it for itself.
        Shim::of(id)?.update(&limit(2048))?;
        let grown = total()?;
        ensure!(grown == before + 1664, "{before} MiB, then {grown} MiB");
        let again = exec(&ctr, id, &takes(400))?.success()?;
        ensure!(again.text().ends_with("\n0\n"), "{again}");
        Shim::of(id)?.update(&limit(500))?;
        let shrunk = total()?;
        println!("{grown} MiB, then {shrunk} MiB");
        ensure!((before + 128..grown - 1024).contains(&shrunk), "{grown} MiB, then {shrunk} MiB");
        ensure!(host_memory_max(id)? == ceiling(512 + shrunk - before), "{}", host_memory_max(id)?);
        world.end(id)
    });
}

/// A guest that does not take the memory leaves everything as it was.
#[test]
fn a_machine_that_does_not_grow() {
    case(|world| {
        let broken = "initcall_blacklist=virtio_mem_driver_init";
        world.set_config(&world.config().text("guest", "kernel_params", broken))?;
        let ctr = world.ctr();
        let (run, started) =
            limited(world, true, "stuck", "sleep 100000", &json!({"memory": {"limit": 64 * MIB}}))?;
        started.success()?;
        let id = &run.id;
        let wrong = Shim::of(id)?.update(&json!({"memory": {"limit": 768 * MIB}}));
        let wrong = wrong.err().context("it was accepted")?.to_string();
        let says = ["linux.resources.memory.limit: ", "has taken 0 MiB of 384 MiB"];
        ensure!(says.iter().all(|part| wrong.contains(part)), "{wrong}");
        ensure!(exec(&ctr, id, "cat /sys/fs/cgroup/memory.max")?.text().trim() == (64 * MIB).to_string());
        ensure!(host_memory_max(id)? == ceiling(512), "{}", host_memory_max(id)?);
        ensure!(known_memory(id)? == 512, "{}", known_memory(id)?);
        world.end(id)
    });
}

/// What the sandbox's state says of its machine, in MiB.
fn known_memory(id: &str) -> Result<u64> {
    let state = std::fs::read(Path::new("/run/rvm/default").join(id).join("sandbox.json"))?;
    let state: Value = serde_json::from_slice(&state)?;
    state["memory_mib"].as_u64().context("memory_mib")
}

/// The ceiling the host holds a container's machine to.
/// Bytes that the host lets a machine of so many MiB have, its monitor and the files that it reads
/// and writes among it.
fn ceiling(mib: u64) -> u64 {
    (mib + 64) * MIB + mib * MIB / 8
}

fn host_memory_max(id: &str) -> Result<u64> {
    for file in ["memory.max", "memory/memory.limit_in_bytes"] {
        let (hierarchy, name) = file.rsplit_once('/').unwrap_or(("", file));
        let path = Path::new(CGROUP).join(hierarchy).join("default").join(id).join(name);
        if path.exists() {
            return Ok(std::fs::read_to_string(path)?.trim().parse()?);
        }
    }
    bail!("the host has no cgroup of {id}")
}

#[test]
fn statistics() {
    case(|world| {
        let ctr = world.ctr();
        let script = "sleep 1000 & sleep 1000 & head -c 3000000 /dev/zero > /dev/shm/x; wait";
        let resources = json!({"memory": {"limit": 48 * MIB}, "pids": {"limit": 33}});
        let (run, started) = limited(world, true, "stats", script, &resources)?;
        started.success()?;
        let id = &run.id;
        let files = "until [ $(stat -c %s /dev/shm/x) = 3000000 ]; do :; done; \
                     cd /sys/fs/cgroup; sed -n 's/usage_usec //p' cpu.stat; cat memory.current memory.max pids.max; \
                     sed -n 's/^shmem //p' memory.stat";
        let numbers = |finished: Finished| -> Result<Vec<u64>> {
            finished.text().lines().map(|line| Ok(line.trim().parse()?)).collect()
        };
        let before = numbers(exec(&ctr, id, files)?.success()?)?;
        let metrics = ctr.run(&["task", "metrics", "--format", "json", id], scale::command())?.success()?;
        let after = numbers(exec(&ctr, id, files)?.success()?)?;
        println!("{}\nbefore {before:?}, after {after:?}", metrics.text());
        let metrics: Value = serde_json::from_slice(&metrics.stdout)?;
        let number = |path: &str| metrics.pointer(path).and_then(Value::as_u64).unwrap_or_default();
        let cpu = number("/cpu/usage_usec");
        ensure!(before.len() == 5 && (before[0]..=after[0]).contains(&cpu), "{cpu}");
        ensure!(number("/cpu/user_usec") + number("/cpu/system_usec") <= cpu + 1);
        // The exec itself used some.
        ensure!(number("/memory/usage").abs_diff(before[1]) < 2 * MIB, "{metrics}");
        ensure!(number("/memory/usage_limit") == before[2] && before[2] == 48 * MIB, "{metrics}");
        ensure!(number("/pids/limit") == before[3] && before[3] == 33, "{metrics}");
        ensure!(number("/pids/current") == 3, "{metrics}");
        ensure!(number("/memory/shmem") == before[4] && before[4] >= 3_000_000, "{metrics}");
        let table = ctr.run(&["task", "metrics", id], scale::command())?.success()?;
        ensure!(table.text().contains("memory.usage"), "{table}");
        let processes = ctr.run(&["task", "ps", id], scale::command())?.success()?;
        ensure!(processes.text().lines().count() == 4, "{processes}");
        world.end(id)
    });
}
