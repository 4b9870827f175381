//! A machine whose guest is `tests/hostile`.

use std::{
    fs::read_to_string,
    io::{BufRead, BufReader, Write},
    os::{fd::AsRawFd, unix::net::UnixStream},
    path::{Path, PathBuf},
    process::Command,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail, ensure};
use rvm_protocol::{
    guest::{DEFAULT_CMDLINE, GUEST_CID},
    vmm::{Metrics, Request, Response},
};
use serde_json::json;

use super::{Control, inherits};
use crate::{
    host,
    job::{Finished, Input, Job},
    scale,
    world::World,
};

/// The initramfs whose `/init` is `tests/hostile`.
pub const HOSTILE_INITRAMFS_ENV: &str = "RVM_TEST_HOSTILE_INITRAMFS";
/// `tests/hostile`, linked statically.
pub const HOSTILE_ENV: &str = "RVM_TEST_HOSTILE";

/// Memory of its guest, in MiB.
const MEMORY_MIB: u64 = 192;
/// What the monitor's own memory and everything the kernel holds for it may come to, in MiB: the
/// bound that is put around it. A guest that makes it take more gets its machine killed, and the
/// case fails.
const BESIDE_MIB: u64 = 96;
/// What the monitor's own memory may come to, in KiB.
const OWN_KIB: u64 = 32 << 10;

/// Where the cgroups of machines are made.
const CGROUPS: &str = "/sys/fs/cgroup";

/// A running machine in a directory and a cgroup of its own, with two shares, a disk and vsock.
pub struct Machine {
    job: Job,
    control: Control,
    // Removed when the monitor is gone.
    place: Place,
}

/// What is left of a machine when its monitor is gone.
struct Place {
    dir: PathBuf,
    cgroup: PathBuf,
}

impl Machine {
    /// Starts one whose guest is `tests/hostile` with this attack.
    ///
    /// # Errors
    /// When the monitor cannot be started.
    pub fn hostile(world: &World, attack: &str) -> Result<Self> {
        let initramfs = std::env::var_os(HOSTILE_INITRAMFS_ENV)
            .with_context(|| format!("{HOSTILE_INITRAMFS_ENV} is not set; `cargo xtask test` sets it"))?;
        let place = Place::new(world.dir(), attack)?;
        let config = json!({
            "id": attack,
            "vcpus": 1,
            "memory_mib": MEMORY_MIB,
            "free_page_reporting": true,
            "kernel": world.stage().kernel(),
            "cmdline": format!("{DEFAULT_CMDLINE} attack={attack}"),
            "initramfs": PathBuf::from(initramfs),
            "console_log": "console.log",
            "control_socket": "vmm.sock",
            "vsock": { "guest_cid": GUEST_CID, "socket": "vsock.sock" },
            "shares": [
                { "tag": "volumes", "dir": "volumes", "readonly": false, "cache": "auto" },
                { "tag": "layers", "dir": "layers", "readonly": true, "cache": "always" },
            ],
            "disks": [{ "serial": "disk", "path": "disk", "readonly": false }],
        });
        std::fs::write(place.dir.join("vm.json"), config.to_string())?;
        let (control, monitors) = Control::pair()?;
        let fd = monitors.as_raw_fd();
        let mut command = Command::new("sh");
        let enter = format!("echo $$ > {}/cgroup.procs; exec \"$0\" \"$@\"", place.cgroup.display());
        command.args(["-c", &enter]).arg(world.stage().monitor());
        command.args(["--config", "vm.json", "--control-fd", &fd.to_string()]).current_dir(&place.dir);
        inherits(&mut command, vec![fd]);
        let job = Job::start(command, Input::Nothing)?;
        Ok(Self { job, control, place })
    }

    /// What its guest has printed.
    pub fn console(&self) -> String {
        let text = std::fs::read(self.place.dir.join("console.log")).unwrap_or_default();
        String::from_utf8_lossy(&text).into_owned()
    }

    /// Waits until its guest has printed `text`.
    ///
    /// # Errors
    /// When the monitor ends first or the limit passes, with what was printed.
    pub fn wait_for(&self, text: &str, limit: Duration) -> Result<()> {
        let until = Instant::now() + limit;
        loop {
            let console = self.console();
            if console.contains(text) {
                return Ok(());
            }
            ensure!(
                !console.contains("failed: "),
                "the attack failed:\n{console}\nthe monitor says: {}",
                self.job.stderr()
            );
            ensure!(!self.job.has_ended(), "the monitor ended: {}\n{console}", self.job.stderr());
            ensure!(Instant::now() < until, "no {text:?} within {limit:?}:\n{console}");
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    /// How many rounds of an attack without an end its guest has told of.
    pub fn rounds(&self) -> u64 {
        let console = self.console();
        let last = console.lines().rev().find_map(|line| line.split_once("round ")?.1.trim().parse().ok());
        last.unwrap_or(0)
    }

    /// Asks everything an owner and an onlooker ask of a monitor; how long the slowest answer took.
    /// That it cannot pause in the middle of a request is an answer.
    ///
    /// # Errors
    /// When something is not answered in time.
    pub fn answers(&mut self) -> Result<Duration> {
        let mut slowest = Duration::ZERO;
        let mut timed = |started: Instant| slowest = slowest.max(started.elapsed());
        let started = Instant::now();
        self.counters()?;
        timed(started);
        for request in [Request::Metrics, Request::Pause, Request::Resume] {
            let started = Instant::now();
            self.ask(request)?;
            timed(started);
        }
        ensure!(slowest < limit(), "an answer took {slowest:?}");
        Ok(slowest)
    }

    fn ask(&mut self, request: Request) -> Result<Response> {
        self.control.ask(request, &[], limit())
    }

    /// Its counters, by the socket that anybody may read them from.
    ///
    /// # Errors
    /// When they are not told in time.
    pub fn counters(&self) -> Result<Metrics> {
        let mut stream = UnixStream::connect(self.place.dir.join("vmm.sock"))?;
        stream.set_read_timeout(Some(limit()))?;
        stream.write_all(b"{\"request\":\"metrics\"}\n")?;
        let mut answer = String::new();
        BufReader::new(stream).read_line(&mut answer).context("no counters")?;
        match serde_json::from_str(&answer)? {
            Response::Metrics(metrics) => Ok(metrics),
            other => bail!("the monitor answered {other:?}"),
        }
    }

    /// Checks that its memory is within its bounds, and was so far.
    ///
    /// # Errors
    /// With what it takes.
    pub fn within_bounds(&self) -> Result<()> {
        let events = read_to_string(self.place.cgroup.join("memory.events"))?;
        let killed =
            events.lines().any(|line| line.strip_prefix("oom").is_some_and(|rest| !rest.ends_with(" 0")));
        ensure!(!killed, "its memory came to its limit:\n{events}");
        let own = host::kib(&format!("{}/status", self.job.pid()), "RssAnon")?;
        ensure!(own <= OWN_KIB, "{own} KiB of memory of its own");
        Ok(())
    }

    /// The largest amount of memory that was charged to it so far, what its guest has touched included, in MiB.
    ///
    /// # Errors
    /// When the kernel does not tell.
    pub fn peak_mib(&self) -> Result<u64> {
        let peak: u64 = read_to_string(self.place.cgroup.join("memory.peak"))?.trim().parse()?;
        Ok(peak >> 20)
    }

    /// A directory of the host that it was given as a share.
    pub fn share(&self, tag: &str) -> PathBuf {
        self.place.dir.join(tag)
    }

    /// Ends it as its owner; how it ended.
    ///
    /// # Errors
    /// When it does not end in time.
    pub fn end(mut self) -> Result<Finished> {
        let started = Instant::now();
        let answer = self.ask(Request::Stop)?;
        ensure!(answer == Response::Ok, "Stop: {answer:?}");
        let Self { job, place, .. } = self;
        let mut finished = job.finish(limit()).context("Stop")?;
        finished.took = started.elapsed();
        drop(place);
        Ok(finished)
    }
}

/// In which time a monitor answers, whatever its guest does.
pub fn limit() -> Duration {
    scale::seconds(1.0)
}

impl Place {
    fn new(parent: &Path, name: &str) -> Result<Self> {
        let place = Self {
            dir: parent.join(format!("machine-{name}")),
            cgroup: Path::new(CGROUPS).join("rvm-machine"),
        };
        for share in ["volumes", "layers"] {
            std::fs::create_dir_all(place.dir.join(share))?;
            // Nothing but holes, and so no memory of the host's.
            std::fs::File::create(place.dir.join(share).join("file"))?.set_len(64 << 20)?;
        }
        std::fs::File::create(place.dir.join("disk"))?.set_len(32 << 20)?;
        // Where no container has been run yet.
        std::fs::write(Path::new(CGROUPS).join("cgroup.subtree_control"), "+memory")?;
        std::fs::create_dir(&place.cgroup).context("making a cgroup")?;
        let limit = ((MEMORY_MIB + BESIDE_MIB) << 20).to_string();
        std::fs::write(place.cgroup.join("memory.max"), limit).context("limiting its memory")?;
        Ok(place)
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        // The processes in it have been waited for.
        let _ = std::fs::remove_dir(&self.cgroup);
        let _ = std::fs::remove_dir_all(&self.dir);
    }
}
