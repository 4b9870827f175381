//! What operations on files cost: messages to the monitor's file servers, exits of the guest, system calls
//! of the servers' threads. These mean the same on any machine; times, beside runc's in the same run, do not.

use std::{collections::BTreeMap, path::Path};

use anyhow::{Context, Result, ensure};
use rvm_protocol::vmm::Metrics;
use rvm_tests::{
    ctr::Ctr,
    images,
    job::{Input, Job},
    sandbox::Sandbox,
    scale,
    stage::{RUNTIME, Stage},
    world::World,
};
use serde_json::{Map, Value, json};

use crate::{
    RUNC,
    counters::{self, Histogram},
    files::{self, IMAGES},
    median, monitor, swept,
};

/// Behind [`files::RUN`]. Each step says that it begins and that it has ended, and waits to be let go on; the counters are read
/// meanwhile. What the host may have changed since is asked for again after a second, so each begins later.
const STEP: &str = r#"
step() {
    local name=$1 took; shift
    sleep 1.1
    echo "> $name"; read -r
    from=${EPOCHREALTIME/./}
    "$@" > /tmp/out || { echo "failed: $name"; exit 1; }
    took=$(( ${EPOCHREALTIME/./} - from ))
    echo "< $took ${count:-$(wc -l < /tmp/out)} $name"; read -r
}
"#;

/// On a volume, and of layers that are shared.
const SHARED: &str = r#"
written() { for n in {1..500}; do echo "the content of file $n" > "$d/$n" || return; done; }
appended() { for n in {1..500}; do echo more >> "$d/$n" || return; done; }
tested() { for n in {1..500}; do [[ -s $d/$n ]] || return; done; }
d=/volume/small
mkdir $d
count=500
step 'volume: create, write, close' written
step 'volume: open, append, close' appended
step 'volume: stat' tested
step 'volume: open, read, close' cat $d/*
count=
step 'volume: list and stat' find $d -printf '%s %p\n'
count=500
step 'volume: unlink' rm -r $d
count=16
step 'volume: write 1 MiB' dd if=/dev/zero of=/volume/large bs=1M count=16 status=none
step 'volume: read 1 MiB' dd if=/volume/large of=/dev/null bs=1M status=none
count=500
step 'volume: read and write in turn' dd if=/volume/large of=/volume/large bs=4096 count=500 seek=1000 conv=notrunc status=none
count=
step 'layers: list and stat' find /usr/lib/python3 /usr/lib/python3.11 -printf '%s %p\n'
count=200
step 'layers: open, read, close' bash -c 'cat $(ls /usr/lib/python3.11/*.py | head -200)'
"#;

/// What a new guest does first with its image file, and does again.
const IMAGE: &str = r#"
archived() { archive > /dev/null; }
count=1
step '100 x true' trues
step 'python3 imports' imports
step 'python3 imports again' imports
step 'find' find / -xdev
step 'find again' find / -xdev
step 'tar of /usr/lib' archived
step 'tar of /usr/lib again' archived
"#;

/// What is run in a container of its own each, and `images.enabled`.
const SCRIPTS: [(&str, &str); 2] = [(SHARED, "false"), (IMAGE, "true")];

/// One step: microseconds, operations, and what was counted meanwhile.
struct Step {
    name: String,
    microseconds: f64,
    operations: f64,
    counted: BTreeMap<String, u64>,
}

/// Everything measured; `image` is the archive of the first of [`IMAGES`].
pub fn measure(stage: Stage, runs: usize, image: &Path) -> Result<Value> {
    counters::mount_both()?;
    let world = World::new(stage)?;
    swept(&world, |world| {
        let archive = image.to_string_lossy();
        world.ctr().run(&["images", "import", &archive], scale::container() * 10)?.success()?;
        world.set_config(&world.config().with_images())?;
        images::make_of(world, IMAGES[0].1, 1)?;
        compared(world, runs)
    })
}

fn compared(world: &World, runs: usize) -> Result<Value> {
    let mut times: BTreeMap<String, [Vec<f64>; 2]> = BTreeMap::new();
    let mut per_operation = Map::new();
    for round in 1..=runs {
        let sides = [RUNTIME, RUNC].into_iter().enumerate();
        for ((which, runtime), (script, images)) in
            sides.flat_map(|side| SCRIPTS.map(|script| (side, script)))
        {
            let what = if images == "true" { "image file" } else { "shared" };
            eprintln!("round {round}: {runtime}, {what}");
            world.set_config(&world.config().set("images", "enabled", images))?;
            for step in container(world, &world.ctr().under(runtime), script, which == 0)? {
                let each = step.microseconds / step.operations;
                eprintln!("   {each:>9.1} us {}", step.name);
                times.entry(step.name.clone()).or_default()[which].push(each);
                if which == 0 {
                    let counted = step.counted.into_iter();
                    let each = counted.map(|(what, count)| (what, json!(count as f64 / step.operations)));
                    per_operation.insert(step.name, each.collect::<Map<_, _>>().into());
                }
            }
        }
    }
    let medians = times.iter().map(|(name, sides)| (name, sides.each_ref().map(|side| median(side))));
    let (mut ratios, mut microseconds) = (Map::new(), Map::new());
    for (name, [rvm, runc]) in medians {
        ratios.insert(format!("rvm/runc, {name}"), json!(rvm / runc));
        microseconds.insert(name.clone(), json!({ "rvm": rvm, "runc": runc }));
    }
    Ok(json!({
        "ratios": ratios,
        "microseconds for each": microseconds,
        "counted for each": per_operation,
        "conditions": {
            "runs": runs,
            "image": "Debian 12 with nginx, PostgreSQL and Python, one layer; shared by the monitor's file server where volume \
                      or layers are named, else as an image file",
            "volume": "a directory on a tmpfs of the host, bound read-write",
            "counted": "in the last run",
            "file system of containerd": world.stage().file_system_name(),
            "host_kernel": std::fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default().trim(),
        },
    }))
}

/// Runs a script in a container of its own.
fn container(world: &World, ctr: &Ctr, script: &str, count: bool) -> Result<Vec<Step>> {
    let dir = world.dir().join("volume");
    std::fs::create_dir_all(&dir)?;
    let mount = format!("type=bind,src={},dst=/volume,options=rbind:rw", dir.display());
    let run = ctr.container("requests").with_image(IMAGES[0].1).with(&["--mount", &mount]);
    let mut job = run.start(&["bash", "-c", &format!("{}{STEP}{script}", files::RUN)], Input::Open)?;
    let result = steps(world, &run.id, &mut job, script, count);
    let finished = job.finish(scale::container() * 4)?;
    std::fs::remove_dir_all(&dir)?;
    let steps = result.with_context(|| finished.to_string())?;
    ensure!(finished.code() == 0 && !steps.is_empty(), "{finished}");
    Ok(steps)
}

fn steps(world: &World, id: &str, job: &mut Job, script: &str, count: bool) -> Result<Vec<Step>> {
    let mut steps = Vec::new();
    let mut counting = None;
    let names: Vec<&str> =
        script.lines().filter_map(|line| line.strip_prefix("step '")?.split('\'').next()).collect();
    for name in names {
        job.wait_for(&format!("> {name}\n"), scale::container())?;
        if count && counting.is_none() {
            counting = Some(Counting::begin(&Sandbox::find(world.stage(), id)?)?);
        }
        let before = counting.as_ref().map(Counting::read).transpose()?.unwrap_or_default();
        job.write(b"\n")?;
        let line = end(job, name)?;
        let mut counted = counting.as_ref().map(Counting::read).transpose()?.unwrap_or_default();
        job.write(b"\n")?;
        for (what, count) in &mut counted {
            *count -= before.get(what).copied().unwrap_or(0).min(*count);
        }
        counted.retain(|_, count| *count > 0);
        let mut words = line.splitn(3, ' ');
        let mut number =
            || words.next().and_then(|word| word.parse::<f64>().ok()).with_context(|| line.clone());
        let (microseconds, operations) = (number()?, number()?);
        steps.push(Step { name: name.to_owned(), microseconds, operations, counted });
    }
    Ok(steps)
}

/// Waits for the line that ends a step; it without its mark.
fn end(job: &Job, name: &str) -> Result<String> {
    let of = |text: &str| -> Option<String> {
        let lines = text.lines().filter_map(|line| line.strip_prefix("< "));
        lines.into_iter().find(|line| line.ends_with(&format!(" {name}"))).map(str::to_owned)
    };
    let mut seen = 0;
    loop {
        let text = job.stdout();
        if let Some(line) = of(&text) {
            return Ok(line);
        }
        let longer = job.wait_for_more(seen, scale::container());
        ensure!(longer > seen, "{name} does not end");
        seen = longer;
    }
}

/// Counts what a sandbox does.
struct Counting {
    monitor: libc::pid_t,
    socket: std::path::PathBuf,
    calls: Histogram,
    exits: Histogram,
}

impl Counting {
    fn begin(sandbox: &Sandbox) -> Result<Self> {
        Ok(Self {
            monitor: sandbox.monitor.pid,
            socket: sandbox.dir().join("vmm.sock"),
            calls: Histogram::count("raw_syscalls/sys_enter", "id", Some("comm == \"fs\""))?,
            exits: Histogram::count("kvm/kvm_exit", "exit_reason", None)?,
        })
    }

    fn read(&self) -> Result<BTreeMap<String, u64>> {
        let mut all = BTreeMap::new();
        let Metrics { shares, .. } = monitor::metrics(&self.socket)?;
        for share in &shares {
            *all.entry("wakeups of the server".into()).or_default() += share.wakeups;
            *all.entry("interrupts by the server".into()).or_default() += share.interrupts;
            for (opcode, count) in &share.messages {
                *all.entry("messages".into()).or_default() += count;
                *all.entry(format!("message {}", opcode_name(*opcode))).or_default() += count;
            }
        }
        for (number, count) in self.calls.counts()? {
            *all.entry("calls of the server".into()).or_default() += count;
            *all.entry(format!("call {number}")).or_default() += count;
        }
        for (reason, count) in self.exits.counts()? {
            all.insert(format!("exit {reason:#x}"), count);
        }
        for (name, count) in counters::of_vm(self.monitor) {
            if ["exits", "halt_exits", "irq_injections"].contains(&name.as_str()) {
                all.insert(name, count);
            }
        }
        Ok(all)
    }
}

/// The name of an opcode (`enum fuse_opcode` of linux/fuse.h).
fn opcode_name(opcode: u32) -> String {
    const NAMES: [(u32, &str); 26] = [
        (1, "LOOKUP"),
        (2, "FORGET"),
        (3, "GETATTR"),
        (4, "SETATTR"),
        (5, "READLINK"),
        (9, "MKDIR"),
        (10, "UNLINK"),
        (11, "RMDIR"),
        (12, "RENAME"),
        (14, "OPEN"),
        (15, "READ"),
        (16, "WRITE"),
        (17, "STATFS"),
        (18, "RELEASE"),
        (20, "FSYNC"),
        (21, "SETXATTR"),
        (22, "GETXATTR"),
        (23, "LISTXATTR"),
        (25, "FLUSH"),
        (27, "OPENDIR"),
        (28, "READDIR"),
        (29, "RELEASEDIR"),
        (35, "CREATE"),
        (36, "INTERRUPT"),
        (42, "BATCH_FORGET"),
        (44, "READDIRPLUS"),
    ];
    let name = NAMES.iter().find(|(known, _)| *known == opcode);
    name.map_or_else(|| opcode.to_string(), |(_, name)| (*name).to_owned())
}
