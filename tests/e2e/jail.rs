//! What the monitor of a running container is shut in, looked at from outside.

use std::{
    collections::BTreeSet,
    fs,
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use anyhow::{Context, Result, ensure};
use containerd_shim_protos::{ttrpc::Status, types::mount::Mount};
use rvm_tests::{
    bare::Bare,
    bundle, case,
    host::Process,
    job::{Input, run},
    sandbox::Sandbox,
    scale,
    world::{ADDRESS, World, shell},
};
use serde_json::json;

use crate::volumes::{Volume, bind};

/// What a file server may: CHOWN, DAC_OVERRIDE, FOWNER, FSETID, SETGID, SETUID, SETFCAP.
const FOR_FILES: &str = "00000000800000db";
/// What a shim may: CHOWN, DAC_OVERRIDE, FOWNER, FSETID, KILL, SETGID, SETUID, SETPCAP, NET_ADMIN, SYS_CHROOT,
/// SYS_PTRACE, SYS_ADMIN, SYS_RESOURCE, MKNOD, SETFCAP.
const SHIM: &str = "00000000892c11fb";
const NONE: &str = "0000000000000000";

#[test]
fn the_running_monitor_has_nothing_of_the_host() {
    case(|world| {
        let volume = Volume::new(world, "volume")?;
        let run = world.ctr().container("jail").detached();
        let run = run.with(&["--mount", &bind(&volume.0, "/v", "rbind:rw")]);
        run.run(&["sh", "-c", "echo x > /v/file; sleep 100000"])?.success()?;
        let sandbox = Sandbox::find(world.stage(), &run.id)?;
        let (monitor, shim) = (sandbox.monitor.pid, sandbox.shim.pid);

        for kind in ["user", "pid", "ipc", "uts", "cgroup", "net", "mnt"] {
            let of = |pid: i32| link(&format!("/proc/{pid}/ns/{kind}"));
            ensure!(of(monitor)? != of(std::process::id().cast_signed())?, "{kind} namespace of the host");
            ensure!(of(monitor)? != of(shim)?, "{kind} namespace and the shim's");
        }
        ensure!(link(&format!("/proc/{monitor}/root"))? == Path::new("/share"), "another root");
        let mounts = |pid: i32| fs::read_to_string(format!("/proc/{pid}/mountinfo"));
        let (inside, host) = (mounts(monitor)?, mounts(shim)?);
        let places: Vec<_> = inside.lines().filter_map(|line| line.split_whitespace().nth(4)).collect();
        let is_share = |place: &&str| place.starts_with("/layers") || place.starts_with("/volumes");
        ensure!(places.len() >= 3 && places.iter().all(is_share), "{inside}");
        ensure!(!host.contains(" - tmpfs rvm "), "mounts of the share among the host's: {host}");
        ensure!(fs::read(format!("/proc/{monitor}/environ"))?.is_empty(), "an environment");

        let limits = fs::read_to_string(format!("/proc/{monitor}/limits"))?;
        for (limit, most) in [
            ("Max core file size", 0),
            ("Max open files", 1 << 20),
            ("Max processes", 4096),
            ("Max locked memory", 0),
            ("Max msgqueue size", 0),
            ("Max realtime priority", 0),
        ] {
            let values = limits.lines().find_map(|line| line.strip_prefix(limit)).context(limit)?;
            let hard = values.split_whitespace().nth(1).and_then(|value| value.parse::<u64>().ok());
            ensure!(hard.is_some_and(|hard| hard <= most), "{limit}: {values}");
        }

        // No table of descriptors grows while somebody waits.
        for (process, room) in [(monitor, 4096), (shim, 512)] {
            let status = fs::read_to_string(format!("/proc/{process}/status"))?;
            let size = status.lines().find_map(|line| line.strip_prefix("FDSize:")).map(str::trim);
            let size: u32 = size.context("FDSize:")?.parse()?;
            ensure!(size == room, "{process} has room for {size} descriptors");
        }

        let mut names = BTreeSet::new();
        for task in fs::read_dir(format!("/proc/{monitor}/task"))? {
            let status = fs::read_to_string(task?.path().join("status"))?;
            let field = |name: &str| status.lines().find_map(|line| line.strip_prefix(name)).map(str::trim);
            let name = field("Name:").context("a name")?;
            ensure!(field("NoNewPrivs:") == Some("1") && field("Seccomp:") == Some("2"), "{status}");
            // The calls there are, those of any duty, those of its own.
            let filters = field("Seccomp_filters:").and_then(|count| count.parse().ok()).unwrap_or(0);
            ensure!(filters >= 3, "{name}: {status}");
            ensure!(field("NSpid:").is_some_and(|ids| ids.split_whitespace().count() == 2), "{status}");
            let capabilities = if name == "fs" { FOR_FILES } else { NONE };
            for set in ["CapEff:", "CapPrm:"] {
                ensure!(field(set) == Some(capabilities), "{name}: {status}");
            }
            ensure!(field("CapInh:") == Some(NONE) && field("CapAmb:") == Some(NONE), "{status}");
            names.insert(name.to_owned());
        }
        let all = ["blk", "fs", "net", "rvm-vmm", "vcpu0", "vsock"];
        ensure!(all.iter().all(|name| names.contains(*name) || *name == "net"), "{names:?}");

        for fd in fs::read_dir(format!("/proc/{monitor}/fd"))? {
            let Ok(target) = fs::read_link(fd?.path()) else { continue };
            ensure!(is_allowed(&target, &sandbox.dir()), "it has {} open", target.display());
        }
        world.ctr().remove(&run.id)
    });
}

/// The ids of the host's that a process's root and its user 1000 are, and who it is itself.
fn ids_of(pid: i32) -> Result<(u32, u32, u32)> {
    let map = fs::read_to_string(format!("/proc/{pid}/uid_map"))?;
    let numbers: Vec<u32> = map.split_whitespace().filter_map(|word| word.parse().ok()).collect();
    let outside = |id: u32| {
        let range = numbers.chunks(3).find(|range| range[0] <= id && id - range[0] < range[2]);
        range.map(|range| range[1] + (id - range[0])).context("an id that is not mapped")
    };
    let status = fs::read_to_string(format!("/proc/{pid}/status"))?;
    let own = status.lines().find_map(|line| line.strip_prefix("Uid:")?.split_whitespace().next());
    Ok((outside(0)?, outside(100_000)?, own.context("a user")?.parse()?))
}

/// A container's view of its layers and of a volume, and what it makes there.
const LOOK: &str = "cd /; (stat -c '%n %u:%g' seven far; touch v/made; chown 1234:100000 v/made; chmod 4750 v/made; \
                    mknod v/null c 1 3; ln -s made v/link; mv v/kept v/moved; chown 9:10 seven; cat v/moved; \
                    stat -c '%n %u:%g %a' v v/made v/moved seven; stat -c '%n %t:%T' v/null; echo x > v/null; id -u) > v/seen 2>&1; \
                    echo > v/done; exec sleep 1000";
const SEEN: &str = "seven 7:8\nfar 100000:200000\nkept\nv 0:0 777\nv/made 1234:100000 4750\nv/moved 0:42 600\n\
                    seven 9:10 644\nv/null 1:3\n0\n";

/// A monitor of a single container acts with ids of its own where it can, and files have the owners that they have.
#[test]
fn a_monitor_has_ids_of_its_own_where_it_can() {
    case(|world| {
        if !world.stage().is_rvm() {
            return Ok(());
        }
        let dir = world.dir().join("ids");
        let at = dir.display();
        // A tmpfs of this kernel's cannot be idmapped.
        shell(&format!(
            "mkdir {at}; truncate -s 64M {at}.image; /sbin/mkfs.ext4 -q -F {at}.image; mount -o loop {at}.image {at}; \
             mkdir -p {at}/1/tmp {at}/1/dev {at}/1/proc {at}/1/v {at}/2; cp -a {}/bin {at}/1; \
             cd {at}/2; echo x > seven; chown 7:8 seven; echo x > far; chown 100000:200000 far",
            world.rootfs()?.display()
        ))?;
        let roots = [("one", ""), ("two", ""), ("proc", "/proc/sys/kernel")];
        let mut held = Vec::new();
        let mut all = || {
            for (name, more) in roots {
                shell(&format!(
                    "mkdir -p {at}/{name}/fs {at}/{name}/work {at}/{name}/v; cd {at}/{name}/v; chmod 777 .; \
                     echo kept > kept; chown 0:42 kept; chmod 600 kept"
                ))?;
                layered(world, &dir, name, more, &mut held).with_context(|| name.to_owned())?;
            }
            let sandbox = |name: &str| Sandbox::find(world.stage(), name);
            let [one, two, proc] =
                ["one", "two", "proc"].map(|name| sandbox(name).and_then(|it| ids_of(it.monitor.pid)));
            let (one, two) = (one?, two?);
            for (root, far, own) in [one, two] {
                ensure!(root >= 1 << 31 && far == 100_000 && own == root, "{root} {far} {own}");
            }
            ensure!(one.0 != two.0, "{one:?} {two:?}");
            ensure!(proc? == (0, 100_000, 0), "what cannot be mapped has the host's");
            let told =
                run(world.rvmctl(&["ps", "--json"]), Input::Nothing, scale::command())?.success()?.text();
            for ids in [format!("{} to {}", one.0, one.0 + 65_535), "the host's: mounts[".to_owned()] {
                ensure!(told.contains(&format!("\"monitor_ids\": \"{ids}")), "{ids}: {told}");
            }
            let stored = shell(&format!(
                "cd {at}/one/v; stat -c '%n %u:%g %a' made moved null link; stat -c '%u:%g' ../../2/seven"
            ))?;
            ensure!(
                stored == "made 1234:100000 4750\nmoved 0:42 600\nnull 0:0 644\nlink 0:0 777\n7:8\n",
                "{stored}"
            );
            Ok(())
        };
        let result = all();
        let ended: Result<()> = held.into_iter().try_for_each(|shim| {
            shim.end_task()?;
            shim.shut_down()
        });
        let removed = shell(&format!("umount {at}; rmdir {at}; rm {at}.image"));
        result.and(ended).and(removed.map(drop))
    });
}

/// A container on layers of an ext4 file system that has said what it sees; with `more` of the host as a further mount.
fn layered(world: &World, dir: &Path, name: &str, more: &str, held: &mut Vec<Bare>) -> Result<()> {
    let own = dir.join(name);
    let mut spec = bundle::spec(&own, &["/bin/busybox", "sh", "-c", LOOK]);
    let capabilities = json!(["CAP_CHOWN", "CAP_DAC_OVERRIDE", "CAP_FOWNER", "CAP_FSETID", "CAP_MKNOD"]);
    spec["process"]["capabilities"] =
        json!({"bounding": capabilities, "effective": capabilities, "permitted": capabilities});
    spec["process"]["env"] = json!(["PATH=/bin"]);
    let mounts = spec["mounts"].as_array_mut().context("mounts")?;
    mounts.push(
        json!({"destination": "/v", "type": "bind", "source": own.join("v"), "options": ["rbind", "rw"]}),
    );
    if !more.is_empty() {
        mounts.push(
            json!({"destination": "/more", "type": "bind", "source": more, "options": ["rbind", "ro"]}),
        );
    }
    let at = dir.display();
    let options = vec![
        format!("workdir={at}/{name}/work"),
        format!("upperdir={at}/{name}/fs"),
        format!("lowerdir={at}/2:{at}/1"),
    ];
    let rootfs = Mount { type_: "overlay".into(), source: "overlay".into(), options, ..Default::default() };
    let shim = Bare::start(world, ADDRESS, name, &spec)?;
    let said = |status: Status| anyhow::anyhow!("{}", status.message);
    let started = shim.create_on(vec![rootfs], None).and_then(|_| shim.start_task()).map_err(said);
    held.push(shim);
    started?;
    let until = Instant::now() + scale::container();
    while !own.join("v/done").exists() {
        ensure!(Instant::now() < until, "it says nothing");
        std::thread::sleep(Duration::from_millis(20));
    }
    let seen = fs::read_to_string(own.join("v/seen"))?;
    ensure!(seen == SEEN, "{seen}");
    Ok(())
}

#[test]
fn shim_and_holder_keep_what_they_need() {
    case(|world| {
        let (run, sandbox) = Sandbox::sleeping(world, "kept")?;
        let is_holder =
            |process: &Process| process.parent == sandbox.shim.pid && process.name == "rvm-container";
        let holder = Process::all().into_iter().find(is_holder);
        let holder = holder.context("no process that stands for the container")?.pid;
        for (pid, usable, bounds, no_new_privs) in
            [(sandbox.shim.pid, SHIM, whole_bounds()?, "0"), (holder, NONE, NONE.to_owned(), "1")]
        {
            for task in fs::read_dir(format!("/proc/{pid}/task"))? {
                let status = fs::read_to_string(task?.path().join("status"))?;
                let field =
                    |name: &str| status.lines().find_map(|line| line.strip_prefix(name)).map(str::trim);
                let sets = [
                    ("CapPrm:", usable),
                    ("CapEff:", usable),
                    ("CapInh:", NONE),
                    ("CapAmb:", NONE),
                    ("CapBnd:", &bounds),
                    ("NoNewPrivs:", no_new_privs),
                ];
                for (set, expected) in sets {
                    ensure!(field(set) == Some(expected), "{set} is not {expected}:\n{status}");
                }
            }
        }
        // Root without capabilities may look into what has none either, unless it is not dumpable.
        let look = |pid: &str| shell(&format!("setpriv --bounding-set -all readlink /proc/{pid}/exe"));
        ensure!(look("self").is_ok() && look(&holder.to_string()).is_err(), "the holder is dumpable");
        world.end(&run.id)
    });
}

/// As those that execute programs of others have it: the test's.
fn whole_bounds() -> Result<String> {
    let status = fs::read_to_string("/proc/self/status")?;
    let bounds = status.lines().find_map(|line| line.strip_prefix("CapBnd:"));
    Ok(bounds.context("no CapBnd:")?.trim().to_owned())
}

fn link(path: &str) -> Result<PathBuf> {
    fs::read_link(path).with_context(|| path.to_owned())
}

/// What a monitor may have open: what has no name on the host, its log, the share, its scratch, and
/// two mounts that are at no place: its `/proc`, and the directory of its sockets.
fn is_allowed(target: &Path, sandbox: &Path) -> bool {
    let text = target.to_string_lossy();
    ["socket:", "pipe:", "anon_inode:", "/memfd:"].iter().any(|kind| text.starts_with(kind))
        // Guest memory on a file system of its own: a file that never had a name.
        || text.starts_with("/#") && text.ends_with(" (deleted)")
        || ["/", "/1", "/1/fd", "/1/smaps", "/dev/null", "/dev/net/tun", "/dev/vhost-net"].contains(&&*text)
        || ["console.log", "console.log.1"].iter().any(|name| target == sandbox.join(name))
        || target.starts_with("/share")
        || target.file_name().is_some_and(|name| name == "rvm-scratch.ext4")
}
