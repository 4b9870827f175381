//! The monitor's file server beside the field's own, `virtiofsd`, with the same kernel in QEMU's `microvm`; and beside
//! runc, which has none.
//!
//! All have the same trees: a Debian image as root file system, which nobody changes, and a directory of the host as volume.
//! Each guest does everything once, then again; times are taken inside, by the shell itself.

mod guest;

use std::{collections::BTreeMap, path::Path};

use anyhow::{Context, Result, bail, ensure};
use guest::{Machine, SERVER_THREAD, Shares};
use rvm_tests::{
    ctr::Ctr,
    job::Input,
    scale,
    stage::{RUNTIME, Stage},
    world::{World, shell},
};
use serde_json::{Map, Value, json};

use crate::{
    RUNC, clean,
    counters::{self, Histogram, UserspaceExits},
    files, median, peer, swept,
};

pub use guest::Files;

/// Memory of a guest in MiB, and its vCPUs: what the configuration's defaults say.
const MEMORY_MIB: u32 = 512;
const VCPUS: u32 = 1;
/// Where every guest has the volume: a directory that Debian has.
const VOLUME: &str = "/mnt";
/// What of the image the volume has: Python's library, small files for the most part.
const TREE: &str = "usr/lib/python3.11";

/// What a guest does with its root file system, where that is compared too, by what [`files::RUN`] has.
const ROOT_SCRIPT: &str = "image ''; image ' again'\n";
/// What it does with the volume, by programs that it knows. What the host may have changed is asked for again after a second, so each look at the tree
/// begins later.
const VOLUME_SCRIPT: &str = r#"
pause() { sleep 1.1; }
read_all() { find "$1" -type f -exec cat {} +; }
tree() {
    pause; run "find on a volume$2" find "$1"
    pause; run "stat of all files on a volume$2" find "$1" -printf '%s %m\n'
    pause; run "small files of a tree read on a volume$2" read_all "$1"
}
volume() {
    for program in cat dd find rm; do "$program" --version > /dev/null || exit 1; done
    writes "$1" ' on a volume'
    tree "$1/tree" ''; tree "$1/tree" ' again'
}
"#;

/// What is compared.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Kind {
    Runc,
    Rvm,
    /// With `cache=auto`: as with rvm, what the host may have changed is asked for again after a second.
    Virtiofsd,
    /// With `cache=always` of the volume, too: the host is taken to change nothing.
    Always,
    /// The first again, in a guest with Linux as it is.
    Unpatched,
}

impl Kind {
    const ALL: [Self; 5] = [Self::Runc, Self::Rvm, Self::Virtiofsd, Self::Always, Self::Unpatched];

    fn name(self) -> &'static str {
        match self {
            Self::Runc => "runc",
            Self::Rvm => "rvm",
            Self::Virtiofsd => "virtiofsd",
            Self::Always => "virtiofsd cache=always",
            Self::Unpatched => "virtiofsd on Linux as it is",
        }
    }
}

/// Everything measured, of the root file system only where that is wanted; `image` is the archive of the first of [`files::IMAGES`].
pub fn measure(stage: Stage, runs: usize, image: &Path, programs: &Files, with_root: bool) -> Result<Value> {
    let world = World::new(stage)?;
    counters::mount_both()?;
    swept(&world, |world| {
        let archive = image.to_string_lossy();
        world.ctr().run(&["images", "import", &archive], scale::container() * 4)?.success()?;
        let guest = world.config().set("guest", "memory_mib", &MEMORY_MIB.to_string());
        world
            .set_config(&guest.set("guest", "vcpus", &VCPUS.to_string()).set("images", "enabled", "false"))?;
        let root = world.dir().join("root");
        let volume = world.dir().join("volume");
        std::fs::create_dir(&root)?;
        std::fs::create_dir(&volume)?;
        let target = root.to_string_lossy();
        let mounted = ["images", "mount", files::IMAGES[0].1, &target];
        world.ctr().run(&mounted, scale::container())?.success()?;
        shell(&format!("cp -a {}/{TREE} {}/tree", root.display(), volume.display()))?;
        // Programs that are read for the first time are not to be in what is timed.
        for program in [&programs.server, Path::new("/usr/bin/qemu-system-x86_64"), &world.stage().monitor()]
        {
            std::fs::read(program).with_context(|| format!("reading {}", program.display()))?;
        }
        let machine = Machine::new(world.dir(), programs, world.rootfs()?.join("bin/busybox"))?;
        let sides = Sides { world, machine: &machine, shares: Shares { root: &root, volume: &volume } };
        let result = sides.compared(runs, with_root);
        world.ctr().run(&["images", "unmount", "--rm", &target], scale::container())?.success()?;
        result
    })
}

/// What runs scripts, one kind or another.
struct Sides<'a> {
    world: &'a World,
    machine: &'a Machine<'a>,
    shares: Shares<'a>,
}

impl Sides<'_> {
    /// Runs a script in a new guest or container; what it said.
    fn run(&self, kind: Kind, script: &str) -> Result<String> {
        clean::free_memory()?;
        let script = format!("{}{VOLUME_SCRIPT}{script}", files::RUN);
        match kind {
            Kind::Runc => container(&self.world.ctr().under(RUNC), self.shares.volume, &script),
            Kind::Rvm => container(&self.world.ctr().under(RUNTIME), self.shares.volume, &script),
            Kind::Virtiofsd => self.machine.run(&self.shares, "auto", false, &script),
            Kind::Always => self.machine.run(&self.shares, "always", false, &script),
            Kind::Unpatched => self.machine.run(&self.shares, "auto", true, &script),
        }
    }

    /// What a guest that works on the volume has the host do, which times in the devhost do not say.
    fn counted(&self, kind: Kind, server: &str) -> Result<Value> {
        eprintln!("counted: {}", kind.name());
        let calls = Histogram::count("raw_syscalls/sys_enter", "id", Some(&format!("comm == \"{server}\"")))?;
        let exits = Histogram::count("kvm/kvm_exit", "exit_reason", None)?;
        let returns = UserspaceExits::count()?;
        self.run(kind, &format!("volume {VOLUME}"))?;
        Ok(json!({
            "exits": exits.counts()?.values().sum::<u64>(),
            "returns to user space": returns.by_reason()?.values().sum::<u64>(),
            "calls of the server": calls.counts()?.values().sum::<u64>(),
        }))
    }

    fn compared(&self, runs: usize, with_root: bool) -> Result<Value> {
        let has = |kind: &Kind| *kind != Kind::Unpatched || self.machine.has_unpatched();
        let kinds: Vec<Kind> = Kind::ALL.into_iter().filter(has).collect();
        let script = format!("{}volume {VOLUME}", if with_root { ROOT_SCRIPT } else { "" });
        let mut all: BTreeMap<Kind, BTreeMap<String, Vec<f64>>> = BTreeMap::new();
        let mut order = Vec::new();
        for round in 1..=runs {
            for &kind in &kinds {
                eprintln!("round {round}: {}", kind.name());
                let said = self.run(kind, &script)?;
                let times = files::times(&said).with_context(|| said.clone())?;
                ensure!(!times.is_empty(), "{} says nothing: {said}", kind.name());
                for (name, microseconds) in times {
                    // A run takes long; what it has found so far is worth something by itself.
                    eprintln!("   {:>9.1} ms {name}", microseconds / 1e3);
                    if !order.contains(&name) {
                        order.push(name.clone());
                    }
                    all.entry(kind).or_default().entry(name).or_default().push(microseconds / 1e3);
                }
            }
        }
        let mut result = report(&kinds, &order, &all);
        result["counted on a volume, a start included"] = json!({
            Kind::Rvm.name(): self.counted(Kind::Rvm, "fs")?,
            Kind::Virtiofsd.name(): self.counted(Kind::Virtiofsd, SERVER_THREAD)?,
        });
        let conditions = &mut result["conditions"];
        conditions["runs"] = json!(runs);
        conditions["virtiofsd"] = json!(self.machine.server_version()?);
        conditions["qemu"] = json!(peer::version()?);
        Ok(result)
    }
}

/// Medians and their ratios.
fn report(kinds: &[Kind], order: &[String], all: &BTreeMap<Kind, BTreeMap<String, Vec<f64>>>) -> Value {
    let middle = |kind: Kind, name: &str| {
        all.get(&kind).and_then(|times| times.get(name)).map_or(f64::NAN, |values| median(values))
    };
    let mut ratios = Map::new();
    for kind in kinds.iter().filter(|kind| **kind != Kind::Rvm) {
        for name in order {
            let ratio = middle(Kind::Rvm, name) / middle(*kind, name);
            ratios.insert(format!("rvm/{}, {name}", kind.name()), json!(ratio));
        }
    }
    let medians: Vec<Value> = order
        .iter()
        .map(|name| json!([name, kinds.iter().map(|kind| middle(*kind, name)).collect::<Vec<_>>()]))
        .collect();
    let by_kind: Map<_, _> = all.iter().map(|(kind, times)| (kind.name().to_owned(), json!(times))).collect();
    json!({
        "ratios": ratios,
        "kinds": kinds.iter().map(|kind| kind.name()).collect::<Vec<_>>(),
        "medians": medians,
        "runs": by_kind,
        "conditions": {
            "units": "ms",
            "guests": format!("{VCPUS} vCPU, {MEMORY_MIB} MiB in huge pages of a tmpfs, rvm's kernel where nothing is said"),
            "root": "Debian 12 with nginx, PostgreSQL and Python, one layer, shared by rvm's monitor or by virtiofsd",
            "volume": "a directory on a tmpfs of the host",
            "tree": format!("/{TREE} of the image, on the volume"),
            "again": "the same in the same guest a second time, on the volume after more than a second",
            "virtiofsd's options": "its defaults: one thread, sandbox=namespace, seccomp=kill, cache=auto for the volume where nothing is said; cache=always for the root",
            "qemu_machine": format!("{}, vhost-user-fs on MMIO with queues of 1024", peer::MACHINE),
            "host_kernel": std::fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default().trim(),
            "devhost": std::env::var(rvm_tests::host::DEVHOST_ENV).ok(),
        },
    })
}

/// Runs the script in a container of its own; what it said.
fn container(ctr: &Ctr, volume: &Path, script: &str) -> Result<String> {
    let mount = format!("type=bind,src={},dst={VOLUME},options=rbind:rw", volume.display());
    let run = ctr.container("virtiofsd").with_image(files::IMAGES[0].1).with(&["--mount", &mount]);
    let finished = run.start(&["bash", "-c", script], Input::Nothing)?.finish(scale::container() * 10)?;
    if finished.code() != 0 {
        bail!("{finished}");
    }
    Ok(finished.text())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_script_times_what_it_does_with_a_volume() -> Result<()> {
        let dir = tempfile::tempdir()?;
        std::fs::create_dir(dir.path().join("tree"))?;
        std::fs::write(dir.path().join("tree/file"), "content")?;
        // Nobody else changes it.
        let script =
            format!("{}{VOLUME_SCRIPT} pause() {{ :; }}; volume {}", files::RUN, dir.path().display());
        let output = std::process::Command::new("bash").args(["-c", &script]).output()?;
        let times = files::times(&String::from_utf8_lossy(&output.stdout))?;
        ensure!(output.status.success() && times.len() == 12, "{output:?}");
        ensure!(times[11].0 == "small files of a tree read on a volume again", "{times:?}");
        let left: Vec<_> = std::fs::read_dir(dir.path())?.collect();
        ensure!(left.len() == 1, "the next guest finds {left:?}");
        Ok(())
    }
}
