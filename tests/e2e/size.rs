//! The machine around a container: its size and its cgroup on the host.

use std::{
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use anyhow::{Context, Result, ensure};
use rvm_tests::{
    case,
    ctr::Run,
    host::{self, Process},
    job::Input,
    sandbox::Sandbox,
    scale,
};

use crate::{
    limits::processor_ticks,
    volumes::{Volume, bind},
};

/// Where the host's hierarchies are that sandboxes get a cgroup in: the first
/// field of `/proc/PID/cgroup` is 0 for v2.
fn cgroups_of(pid: libc::pid_t) -> Result<Vec<(String, String)>> {
    let text = std::fs::read_to_string(format!("/proc/{pid}/cgroup"))?;
    let line = |line: &str| {
        let mut fields = line.splitn(3, ':');
        let (_, controllers, path) = (fields.next()?, fields.next()?, fields.next()?);
        Some((controllers.to_owned(), path.to_owned()))
    };
    Ok(text.lines().filter_map(line).collect())
}

/// The directory of a cgroup that has `file`, on whichever version.
fn dir_with(file: &str, path: &str) -> Option<PathBuf> {
    let root = Path::new("/sys/fs/cgroup");
    let hierarchies = ["", "unified", "cpu,cpuacct", "memory", "cpuset"];
    hierarchies
        .iter()
        .map(|name| root.join(name).join(path.trim_start_matches('/')))
        .find(|dir| dir.join(file).exists())
}

fn first_of(files: &[&str], path: &str) -> Result<String> {
    for file in files {
        if let Some(dir) = dir_with(file, path) {
            return Ok(std::fs::read_to_string(dir.join(file))?.trim().to_owned());
        }
    }
    anyhow::bail!("none of {files:?} in cgroup {path}")
}

#[test]
fn limits_make_the_machine_and_its_cgroup() {
    case(|world| {
        let mib = 1_u64 << 20;
        let limit = (1024 * mib).to_string();
        let options = ["--memory-limit", &limit, "--cpu-quota", "50000", "--cpu-period", "100000"];
        let run = world.ctr().container("size").with(&options).detached();
        run.run(&["sleep", "1000"])?.success()?;
        let monitor =
            Process::all().into_iter().find(|process| process.name == "rvm-vmm").context("no monitor")?;
        let wanted = format!("/default/{}", run.id);
        let cgroups = cgroups_of(monitor.pid)?;
        println!("{cgroups:?}");
        // These limit nothing, and nothing is done with them.
        let idle = ["freezer", "devices"];
        for (controllers, path) in &cgroups {
            ensure!(
                *path == wanted || idle.contains(&controllers.as_str()),
                "{controllers:?}: the monitor is in {path}"
            );
        }
        // 1024 for the container, 48 + 32 for the guest, an eighth for files, 64 for the monitor.
        let memory = first_of(&["memory.max", "memory.limit_in_bytes"], &wanted)?;
        ensure!(memory == ((1104 + 1104 / 8 + 64) * mib).to_string(), "memory {memory}");
        let cpu = first_of(&["cpu.max", "cpu.cfs_quota_us"], &wanted)?;
        ensure!(["62500 100000", "62500"].contains(&cpu.as_str()), "cpu {cpu}");
        let charged: u64 = first_of(&["memory.current", "memory.usage_in_bytes"], &wanted)?.parse()?;
        ensure!(charged > 16 * mib, "the guest's memory is charged elsewhere: {charged} bytes");

        let inside = world.ctr().exec(&run.id, &[], &["cat", "/proc/meminfo"], Input::Nothing)?;
        let inside = inside.finish(scale::container())?.success()?;
        let total = inside.text();
        let total = total.lines().find_map(|line| line.strip_prefix("MemTotal:")).context("no MemTotal")?;
        let total: u64 = total.trim().trim_end_matches(" kB").parse()?;
        println!("MemTotal {} MiB, charged on the host {} MiB", total >> 10, charged / mib);
        ensure!((1024..1104).contains(&(total >> 10)), "the guest has {total} kB");
        world.ctr().remove(&run.id)
    });
}

/// With a twentieth of a processor a guest would boot for a minute where it takes seconds: the host sets the quota when the
/// container starts.
#[test]
fn a_quota_holds_the_container_and_not_the_boot() {
    case(|world| {
        let quota = ["--cpu-quota", "5000", "--cpu-period", "100000"];
        let run = world.ctr().container("quota").with(&quota).detached();
        run.run(&["sleep", "1000"])?.success()?;
        // The kernel counts periods from when there is a quota.
        let path = format!("/default/{}", run.id);
        let stat = first_of(&["cpu.stat"], &path)?;
        let periods = stat.lines().find_map(|line| line.strip_prefix("nr_periods ")).context("nr_periods")?;
        let periods: u64 = periods.parse()?;
        let used_ms = processor_ticks(world, &run.id)? * 10;
        let cpu = first_of(&["cpu.max", "cpu.cfs_quota_us"], &path)?;
        println!("{used_ms} ms of a processor in {periods} periods, {cpu}");
        ensure!(["6250 100000", "6250"].contains(&cpu.as_str()), "cpu {cpu}");
        // 6.25 ms of each.
        let allowed_ms = (periods + 1) * 25 / 4;
        ensure!(used_ms > 2 * allowed_ms, "{used_ms} ms, of {allowed_ms} that the quota allows");
        world.ctr().remove(&run.id)
    });
}

/// KiB in huge pages of a monitor's mappings that have no name on the host.
fn huge_kib(monitor: libc::pid_t) -> Result<u64> {
    let smaps = std::fs::read_to_string(format!("/proc/{monitor}/smaps"))?;
    let sizes = smaps.lines().filter_map(|line| line.strip_prefix("ShmemPmdMapped:"));
    sizes.map(|size| Ok(size.trim().trim_end_matches(" kB").parse::<u64>()?)).sum()
}

#[test]
fn guest_memory_is_in_huge_pages_unless_the_configuration_says_no() {
    case(|world| {
        // KiB of the 512 MiB of a guest that does nothing: what it scatters over more pages than it
        // could fill is lost.
        for (huge, expected) in [("true", 2048..28 << 10), ("false", 0..1)] {
            world.set_config(&world.config().set("guest", "huge_pages", huge))?;
            let (run, sandbox) = Sandbox::sleeping(world, "huge")?;
            let monitor = sandbox.monitor.pid;
            let kib = huge_kib(monitor)?;
            println!("guest.huge_pages = {huge}: {kib} KiB");
            ensure!(expected.contains(&kib), "guest.huge_pages = {huge}: {kib} KiB");
            // What a guest only reads of its kernel and its agent it shares with all others.
            for (file, most) in [(world.stage().kernel(), 3 << 10), (world.stage().initramfs(), 256)] {
                let (resident, own) = file_kib(monitor, &file)?;
                println!("of {}: {resident} KiB, its own {own}", file.display());
                ensure!(
                    resident >= 1 << 10 && own <= most,
                    "{}: {resident} KiB, {own} its own",
                    file.display()
                );
            }
            world.ctr().remove(&run.id)?;
        }
        Ok(())
    });
}

/// KiB of its guest's memory that a monitor has from the host.
fn guest_kib(monitor: libc::pid_t) -> Result<u64> {
    host::kib(&format!("{monitor}/status"), "RssShmem")
}

#[test]
fn what_a_guest_has_freed_is_the_hosts_again() {
    const MIB: u64 = 160;
    case(|world| {
        let volume = Volume::new(world, "much")?;
        std::fs::File::create(volume.path("file"))?.set_len(MIB << 20)?;
        let mount = bind(&volume.0, "/much", "rbind:ro");
        let run = || world.ctr().container("freed").with(&["--privileged", "--mount", &mount]).detached();
        let started = |run: &Run| -> Result<Sandbox> {
            run.run(&["sleep", "100000"])?.success()?;
            Sandbox::find(world.stage(), &run.id)
        };
        let inside = |run: &Run, script: &str| -> Result<String> {
            let job = world.ctr().exec(&run.id, &[], &["sh", "-c", script], Input::Nothing)?;
            Ok(job.finish(scale::container())?.success()?.text())
        };
        let one = run();
        let monitor = started(&one)?.monitor.pid;
        inside(&one, "mkdir /kept; mount -t tmpfs -o size=80% kept /kept")?;
        // What was read, and what was made there.
        for (what, taken, use_it, drop_it) in [
            ("read", MIB << 10, "cat /much/file >/dev/null", "echo 3 >/proc/sys/vm/drop_caches"),
            (
                "written",
                MIB << 10,
                "cat /much/file >/kept/file",
                "rm /kept/file; echo 3 >/proc/sys/vm/drop_caches",
            ),
        ] {
            let before = guest_kib(monitor)?;
            inside(&one, use_it)?;
            let used = guest_kib(monitor)?;
            ensure!(used > before + taken / 10 * 9, "{what}: {before} KiB before, {used} after");
            inside(&one, drop_it)?;
            let (dropped, limit) = (Instant::now(), scale::seconds(5.0));
            let missing = || Ok::<_, anyhow::Error>(guest_kib(monitor)?.saturating_sub(before));
            while missing()? > (used - before) / 20 && dropped.elapsed() < limit {
                std::thread::sleep(Duration::from_millis(50));
            }
            let (after, took) = (guest_kib(monitor)?, dropped.elapsed());
            println!("{what}: {before} KiB, {used} KiB, {after} KiB after {} ms", took.as_millis());
            ensure!(
                missing()? <= (used - before) / 20,
                "{what}: {before} KiB before, {used}, {after} at last"
            );
        }
        // What was the host's for a while is the guest's as ever.
        let sum = inside(
            &one,
            "cd /kept; dd if=/dev/urandom of=file bs=1M count=64 2>/dev/null; md5sum file; md5sum file",
        )?;
        let sums: Vec<&str> = sum.lines().collect();
        ensure!(sums.len() == 2 && sums[0] == sums[1], "{sum}");
        world.ctr().remove(&one.id)?;

        world.set_config(&world.config().set("guest", "free_page_reporting", "false"))?;
        let other = run();
        started(&other)?;
        let devices = inside(&other, "cat /sys/bus/virtio/devices/*/device")?;
        ensure!(!devices.contains("0x0005"), "there is a balloon: {devices}");
        world.ctr().remove(&other.id)
    });
}

#[test]
fn the_seed_of_the_guests_generator_is_read_and_gone() {
    case(|world| {
        let (run, sandbox) = Sandbox::sleeping(world, "seed")?;
        let monitor = sandbox.monitor.pid;
        // A struct setup_data behind the boot parameters: Linux overwrites the seed and its length.
        let mut left = [0; 80];
        memory_at(monitor, 0x8000, &mut left)?;
        let mut expected = [0; 80];
        expected[8] = 9;
        ensure!(left == expected, "{left:?}");
        world.ctr().remove(&run.id)
    });
}

/// Reads the memory of a monitor's guest at `address`, below where the kernel is.
fn memory_at(monitor: libc::pid_t, address: u64, bytes: &mut [u8]) -> Result<()> {
    let maps = std::fs::read_to_string(format!("/proc/{monitor}/maps"))?;
    let first = maps.lines().find(|line| line.contains(" rw-s 00000000 ") && line.ends_with("(deleted)"));
    let start = first.and_then(|line| line.split('-').next()).context("no guest memory")?;
    let start = u64::from_str_radix(start, 16)?;
    let memory = std::fs::File::open(format!("/proc/{monitor}/mem"))?;
    Ok(std::os::unix::fs::FileExt::read_exact_at(&memory, bytes, start + address)?)
}

/// KiB of a file that a process has mapped and touched, and of those what is a copy of its own.
fn file_kib(pid: libc::pid_t, file: &Path) -> Result<(u64, u64)> {
    let smaps = std::fs::read_to_string(format!("/proc/{pid}/smaps"))?;
    let (mut inside, mut resident, mut own) = (false, 0, 0);
    for line in smaps.lines() {
        let mut words = line.split_whitespace();
        let (first, second) = (words.next().unwrap_or_default(), words.next().unwrap_or_default());
        match first {
            "Rss:" if inside => resident += second.parse::<u64>()?,
            "Anonymous:" if inside => own += second.parse::<u64>()?,
            _ if !first.ends_with(':') => inside = line.ends_with(&*file.to_string_lossy()),
            _ => {}
        }
    }
    Ok((resident, own))
}

#[test]
fn a_monitor_inherits_nothing_and_its_guest_leaves_no_line_in_the_hosts_log() {
    case(|world| {
        let (run, sandbox) = Sandbox::sleeping(world, "inherits")?;
        let monitor = sandbox.monitor.pid;
        let read = |file: &str| std::fs::read_to_string(format!("/proc/{monitor}/{file}"));
        ensure!(read("environ")?.is_empty(), "its environment is {:?}", read("environ")?);
        ensure!(read("oom_score_adj")?.trim() == "0", "oom_score_adj {}", read("oom_score_adj")?);
        let limits = read("limits")?;
        let core =
            limits.lines().find_map(|line| line.strip_prefix("Max core file size")).unwrap_or_default();
        let core: Vec<&str> = core.split_whitespace().take(2).collect();
        ensure!(core == ["0", "0"], "core files of {core:?} bytes");
        let log = std::process::Command::new("dmesg").output()?;
        let log = String::from_utf8_lossy(&log.stdout);
        let lines: Vec<&str> = log.lines().filter(|line| line.contains("Unhandled WRMSR")).collect();
        ensure!(lines.is_empty(), "the host's log has {lines:?}");
        world.ctr().remove(&run.id)
    });
}
