//! What a guest's kernel asks of the monitor's file servers while programs run: each in a container of its own, from the
//! start of its machine on, by a monitor that writes it down (`rvm-vmm` with the feature `record`).

use std::{
    fs::File,
    io::Read,
    path::{Path, PathBuf},
};

use anyhow::{Context, Result, ensure};
use rvm_protocol::guest::{LAYERS_TAG, VOLUMES_TAG};
use rvm_tests::{
    ctr::Run,
    job::Input,
    sandbox::Sandbox,
    scale,
    stage::{RUNTIME, Stage},
    world::World,
};
use serde_json::{Map, Value, json};

use crate::{
    RUNC, swept,
    workloads::{GUEST_MIB, IMAGE, SCRIPT},
};

/// Requests of a trace at most: what follows is left out.
const MOST_REQUESTS: usize = 4000;

/// What runc's container makes on the volume.
const PREPARE: &str = r#"
prepare
cd /volume || exit 1
git clone -q file:///var/from/repository clone || exit 1
mkdir npm pg && cp /var/from/npm/package.json /var/from/npm/package-lock.json npm && chown postgres pg || exit 1
as_postgres "initdb -D /volume/pg -A trust" > /dev/null || exit 1
start_postgres
as_postgres "pgbench -h /tmp -i -s 1 -q postgres 2>/dev/null" || exit 1
stop_postgres
"#;

/// Beside those of [`SCRIPT`].
const FUNCTIONS: &str = r#"
start_postgres() { as_postgres "pg_ctl -D /volume/pg -w -t 600 -l /tmp/pg.log -o \"-k /tmp -c listen_addresses=''\" start" > /dev/null || { cat /tmp/pg.log; exit 1; }; }
stop_postgres() { as_postgres "pg_ctl -D /volume/pg -w -t 600 -m fast stop" > /dev/null || exit 1; }
export HOME=/root
"#;

/// What is recorded: the trace's name, which share, and the commands.
const WORKLOADS: [(&str, &str, &str); 4] = [
    ("git-status", VOLUMES_TAG, "git -C /volume/clone status --porcelain"),
    ("npm-ci", VOLUMES_TAG, "cd /volume/npm && npm ci --offline --no-audit --no-fund"),
    (
        "pgbench",
        VOLUMES_TAG,
        "start_postgres; as_postgres 'pgbench -h /tmp -c 4 -t 25 postgres' || exit 1; stop_postgres",
    ),
    (
        "python-start",
        LAYERS_TAG,
        "python3 -c 'import json, ssl, http.client, urllib.request, sqlite3, email.message'",
    ),
];

/// All traces, by name; `image` is the archive of [`IMAGE`], `monitor` the program that records.
pub fn record(stage: Stage, image: &Path, monitor: &Path) -> Result<Value> {
    let world = World::new(stage)?;
    swept(&world, |world| {
        let archive = image.to_string_lossy();
        world.ctr().run(&["images", "import", &archive], scale::container() * 10)?.success()?;
        let config = world.config().set("guest", "memory_mib", GUEST_MIB);
        world.set_config(&config.text("host", "monitor", &monitor.to_string_lossy()))?;
        let volume = Volume::new(world)?;
        eprintln!("what is worked on is made");
        let prepare = volume.run(world, RUNC);
        let script = format!("{SCRIPT}{FUNCTIONS}{PREPARE}");
        let limit = scale::container() * 10;
        let made = prepare.start(&["bash", "-c", &script], Input::Nothing)?.finish(limit)?;
        ensure!(made.code() == 0, "{made}");
        let mut traces = Map::new();
        for (name, share, commands) in WORKLOADS {
            eprintln!("{name}");
            let trace = of(world, &volume, share, commands).with_context(|| name.to_owned())?;
            let requests = trace.lines().filter(|line| is_request(line)).count();
            eprintln!("   {requests} requests, {} bytes", trace.len());
            let head = format!(
                "# `{commands}` in a container: all that is asked of its machine's share of {share}.\n"
            );
            traces.insert(name.to_owned(), json!(head + &cut(&trace, requests)));
        }
        Ok(json!({ "traces": traces, "conditions": {} }))
    })
}

/// Directories of the host that every container has.
struct Volume {
    mounts: Vec<String>,
}

impl Volume {
    fn new(world: &World) -> Result<Self> {
        let mount = |(name, at): (&str, &str)| {
            let dir: PathBuf = world.dir().join(name);
            std::fs::create_dir_all(&dir)?;
            Ok(format!("type=bind,src={},dst={at},options=rbind:rw", dir.display()))
        };
        let mounts = [("volume", "/volume"), ("from", "/var/from")].into_iter().map(mount);
        Ok(Self { mounts: mounts.collect::<Result<_>>()? })
    }

    fn run(&self, world: &World, runtime: &str) -> Run {
        let run = world.ctr().under(runtime).container("record").with_image(IMAGE);
        self.mounts.iter().fold(run, |run, mount| run.with(&["--mount", mount]))
    }
}

/// The trace of one share while the commands are run.
fn of(world: &World, volume: &Volume, share: &str, commands: &str) -> Result<String> {
    let run = volume.run(world, RUNTIME);
    let script = format!("{SCRIPT}{FUNCTIONS}echo ready; read -r; {commands}");
    let mut job = run.start(&["bash", "-c", &script], Input::Open)?;
    let opened = || -> Result<File> {
        job.wait_for("ready\n", scale::container())?;
        // The directory goes with the machine.
        let path = Sandbox::dir_of(&run.id).join(format!("{share}.trace"));
        File::open(&path).with_context(|| format!("open {}", path.display()))
    };
    let opened = opened();
    job.write(b"\n")?;
    // A container's deletion waits for its machine's end.
    let finished = job.finish(scale::container() * 10)?;
    let mut file = opened.with_context(|| format!("{} {}", finished.text(), finished.errors()))?;
    ensure!(finished.code() == 0, "{} {}", finished.text(), finished.errors());
    let mut text = String::new();
    file.read_to_string(&mut text)?;
    Ok(text)
}

/// Whether a line of a trace is a request.
fn is_request(line: &str) -> bool {
    !["#", "share", "was ", "as "].iter().any(|other| line.starts_with(other))
}

/// The first [`MOST_REQUESTS`] of a trace that has so many.
fn cut(trace: &str, requests: usize) -> String {
    let mut left = MOST_REQUESTS;
    let mut kept: String = trace
        .split_inclusive('\n')
        .take_while(|line| {
            let is_kept = left > 0;
            left -= usize::from(is_kept && is_request(line));
            is_kept
        })
        .collect();
    if requests > MOST_REQUESTS {
        kept += &format!("# The first {MOST_REQUESTS} of {requests} requests.\n");
    }
    kept
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_shell_can_read_it() -> Result<()> {
        let commands: String = WORKLOADS.iter().map(|(_, _, commands)| format!("{commands}\n")).collect();
        let script = format!("{SCRIPT}{FUNCTIONS}{PREPARE}{commands}");
        let output = std::process::Command::new("bash").args(["-n", "-c", &script]).output()?;
        ensure!(output.status.success() && output.stderr.is_empty(), "{output:?}");
        Ok(())
    }

    #[test]
    fn a_long_trace_is_cut() {
        let head = "share\nas 1 2\nwas 100644 0 0 1 a\n";
        let short = format!("{head}LOOKUP 1 :a/ =2\n");
        assert_eq!(cut(&short, 1), short);
        let requests = MOST_REQUESTS + 2;
        let long = format!("{head}{}", "STATFS 1\n".repeat(requests));
        let cut = cut(&long, requests);
        assert_eq!(cut.lines().filter(|line| is_request(line)).count(), MOST_REQUESTS);
        assert!(cut.starts_with(head) && cut.ends_with("\n# The first 4000 of 4002 requests.\n"), "{cut}");
    }
}
