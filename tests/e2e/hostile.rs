//! A guest that does with its devices what no guest of ours would.

use std::{
    os::unix::fs::MetadataExt,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, ensure};
use rvm_tests::{
    case,
    machine::hostile::{self, HOSTILE_ENV, Machine},
    scale,
    world::{World, shell},
};

use crate::volumes::{Volume, bind};

/// Everything a kernel can do to a tree it was given, from a second mount of it.
/// (Of one with mounts in it, Linux may give the newest of these instead.) What
/// was done is printed.
const ATTACK: &str = r#"
did() { "$@" 2>/dev/null && echo "did: $*"; }
for tag in rvm layers volumes; do
    mkdir -p /m/$tag
    mount -t virtiofs $tag /m/$tag 2>/dev/null || continue
    mount -o remount,rw /m/$tag
    cd /m/$tag && echo "tag $tag" || continue
    for dir in . $(ls | head -n 2); do
        test -e $dir/rw-marker && continue
        did mkdir $dir/x
        did mkdir -p $dir/x/y
        did ln -s HOST $dir/mounts
        did mkdir $dir/sub && did ln -s HOST $dir/sub/mounts
        did touch $dir/file
        did dd if=/dev/zero of=$dir/big bs=1M count=20
        did mknod $dir/node c 1 3
        did chmod 777 $dir
        did chown 1:1 $dir
        did touch -d 2001-01-01 $dir
        for entry in $(ls $dir | head -n 2); do
            did rmdir $dir/$entry
            did rm -f $dir/$entry
            did mv $dir/$entry $dir/moved
        done
    done
    cd /
done
mount -o remount,rw /r
for volume in /r /w; do
    did touch $volume/new; did mkdir $volume/dir
done
"#;

/// Nothing but read-write volumes is a guest's to change, and the shim follows
/// nothing that a guest could have made.
#[test]
fn the_trees_of_mount_points_stay() {
    case(|world| {
        let (writable, readonly) = (Volume::new(world, "writable")?, Volume::new(world, "readonly")?);
        let kept = Volume::new(world, "kept")?;
        std::fs::write(writable.path("rw-marker"), "")?;
        std::fs::write(readonly.path("ro-marker"), "")?;
        std::fs::write(kept.path("empty-file"), "")?;
        std::fs::create_dir(kept.path("empty-dir"))?;
        let free = || shell("df -k --output=used /run | tail -1");
        let before: i64 = free()?.trim().parse()?;
        let script = ATTACK.replace("HOST", &kept.0.display().to_string());
        for _ in 0..2 {
            // The same id again: nothing of it was left.
            let run = attacker(world, &writable, &readonly);
            let finished = run.named("hostile-skeleton").shell(&script)?.success()?;
            let expected = "tag layers\ntag volumes\ndid: touch /w/new\ndid: mkdir /w/dir\n";
            ensure!(finished.text() == expected, "{finished}");
            std::fs::remove_dir(writable.path("dir"))?;
        }
        ensure!(writable.path("new").exists(), "a volume can be written to");
        ensure!(kept.path("empty-file").exists() && kept.path("empty-dir").exists(), "the host's files");
        let names = shell(&format!("ls {}", readonly.0.display()))?;
        ensure!(names == "ro-marker\n", "{names}");
        let grown = free()?.trim().parse::<i64>()? - before;
        ensure!(grown < 4096, "{grown} KiB more in the host's /run");
        Ok(())
    });
}

fn attacker(world: &World, writable: &Volume, readonly: &Volume) -> rvm_tests::ctr::Run {
    world.ctr().container("hostile").with(&[
        "--privileged",
        "--mount",
        &bind(&writable.0, "/w", "rbind:rw"),
        "--mount",
        &bind(&readonly.0, "/r", "rbind:ro"),
    ])
}

/// What one case asks of a monitor while its guest is at it.
struct Seen {
    slowest: Duration,
    answers: u32,
}

impl Seen {
    /// Asks until `done`; the guest's attack has begun.
    fn until(machine: &mut Machine, limit: Duration, mut done: impl FnMut(&Machine) -> bool) -> Result<Self> {
        let until = Instant::now() + limit;
        let mut seen = Self { slowest: Duration::ZERO, answers: 0 };
        while !done(machine) {
            seen.slowest = seen.slowest.max(machine.answers()?);
            seen.answers += 1;
            machine.within_bounds()?;
            ensure!(Instant::now() < until, "not within {limit:?}:\n{}", machine.console());
            std::thread::sleep(scale::seconds(0.01));
        }
        Ok(seen)
    }
}

/// An attack that comes to an end by itself.
fn to_its_end(world: &World, attack: &str) -> Result<()> {
    let mut machine = Machine::hostile(world, attack)?;
    machine.wait_for("attacking", scale::container())?;
    let ended =
        |machine: &Machine| ["finished", "failed: "].iter().any(|end| machine.console().contains(end));
    let seen = Seen::until(&mut machine, scale::seconds(10.0), ended)?;
    machine.wait_for("finished", Duration::ZERO)?;
    leaves_nothing(machine, &seen)
}

/// An attack without an end, as long as it takes for so many rounds.
fn for_rounds(world: &World, attack: &str, rounds: u64) -> Result<()> {
    let mut machine = Machine::hostile(world, attack)?;
    machine.wait_for("attacking", scale::container())?;
    let seen = Seen::until(&mut machine, scale::seconds(10.0), |machine| machine.rounds() >= rounds)?;
    ensure!(seen.answers > 0, "nothing was asked");
    leaves_nothing(machine, &seen)
}

/// The monitor ends when it is told to, in the middle of the attack, and its shares are as they were.
fn leaves_nothing(machine: Machine, seen: &Seen) -> Result<()> {
    for tag in ["volumes", "layers"] {
        let share = machine.share(tag);
        let names: Vec<_> =
            std::fs::read_dir(&share)?.map(|entry| Ok(entry?.file_name())).collect::<Result<_>>()?;
        ensure!(names == ["file"], "in {tag}: {names:?}");
        let file = share.join("file").metadata()?;
        ensure!((file.len(), file.blocks()) == (64 << 20, 0), "{tag}: the file has {file:?}");
    }
    println!("{}", machine.console().trim_end());
    let (rounds, peak) = (machine.rounds(), machine.peak_mib()?);
    let finished = machine.end()?.exited(0)?;
    println!(
        "round {rounds}; {} times four answers, the slowest after {} ms of {}; at most {peak} MiB with its guest's; \
         ended after {} ms\n{}",
        seen.answers,
        seen.slowest.as_millis(),
        hostile::limit().as_millis(),
        finished.took.as_millis(),
        finished.errors()
    );
    Ok(())
}

/// What the server of a share reserves for a message is bounded, whatever its buffers come to.
#[test]
fn messages_of_four_gibibytes() {
    case(|world| to_its_end(world, "lengths"));
}

/// Every malformed chain and ring and every wrong start, on each queue of each device; then all of them serve.
#[test]
fn malformed_chains_and_wrong_starts() {
    case(|world| to_its_end(world, "chains"));
}

/// Nobody waits for a device that is reset in the middle of a queue full of requests that take long.
#[test]
fn resets_amid_long_requests() {
    case(|world| for_rounds(world, "resets", 10));
}

/// A ring without an end of buffers nobody can use keeps nobody.
#[test]
fn a_ring_that_is_never_empty() {
    case(|world| for_rounds(world, "refills", 10));
}

#[test]
fn registers_at_random_and_a_storm_of_notifications() {
    case(|world| for_rounds(world, "registers", 10));
}

/// A container that may do anything in its machine takes its shares away from the kernel and asks their
/// servers itself: only read-write volumes are its to change, and the shim, which tears down what is
/// around them, follows nothing that it made there.
#[test]
fn a_container_that_drives_its_shares_itself() {
    case(|world| {
        let program = std::env::var(HOSTILE_ENV)
            .with_context(|| format!("{HOSTILE_ENV} is not set; `cargo xtask test` sets it"))?;
        let (writable, readonly) = (Volume::new(world, "writable")?, Volume::new(world, "readonly")?);
        let (kept, programs) = (Volume::new(world, "kept")?, Volume::new(world, "programs")?);
        std::fs::write(writable.path("rw-marker"), "")?;
        std::fs::write(readonly.path("ro-marker"), "")?;
        std::fs::write(kept.path("empty-file"), "")?;
        std::fs::create_dir(kept.path("empty-dir"))?;
        std::fs::copy(&program, programs.path("rvm-hostile"))?;
        let host = kept.0.display().to_string();
        for _ in 0..2 {
            // The same id again: nothing of it was left.
            let programs = ["--mount".to_owned(), bind(&programs.0, "/programs", "rbind:ro")];
            let run = attacker(world, &writable, &readonly).with(&programs.each_ref().map(String::as_str));
            let run = run.named("hostile-driver");
            let finished = run.run(&["/programs/rvm-hostile", "skeleton", &host])?.success()?;
            let text = finished.text();
            let mut lines: Vec<&str> = text.lines().collect();
            lines.sort_unstable();
            lines.dedup();
            println!("{}", lines.join("\n"));
            let ours = |line: &&str| line.starts_with("tag ") || line.ends_with(" in a volume");
            ensure!(lines.iter().all(ours), "{finished}");
            for line in ["tag layers", "tag volumes", "did MKDIR in a volume", "did SYMLINK in a volume"] {
                ensure!(lines.contains(&line), "not {line:?}: {finished}");
            }
            ensure!(!lines.iter().any(|line| line.starts_with("found ")), "{finished}");
            shell(&format!("cd {} && rm -rf x mounts node file linked moved", writable.0.display()))?;
        }
        ensure!(kept.path("empty-file").exists() && kept.path("empty-dir").exists(), "the host's files");
        let names = shell(&format!("ls {}", readonly.0.display()))?;
        ensure!(names == "ro-marker\n", "{names}");
        Ok(())
    });
}
