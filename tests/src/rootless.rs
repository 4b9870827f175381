//! A containerd of an ordinary user, under rootlesskit.
//!
//! The user, its sub-ids and its home are there in a mount namespace of their own, so that the machine the tests run on
//! keeps its `/etc`. Inside, root is that user and has no power over the machine.

use std::{
    os::unix::fs::PermissionsExt,
    path::{Path, PathBuf},
    process::{Child, Command},
    time::{Duration, Instant},
};

use anyhow::{Context, Result, ensure};
use nix::{sys::signal::Signal, unistd::Pid};

use crate::{
    config::ConfigFile,
    ctr::Ctr,
    host::Process,
    scale,
    stage::Stage,
    world::{ADDRESS, IMAGE, World, last_lines, shell},
};

/// The user and its group on the host.
pub const USER: u32 = 1000;
/// Its first sub-id, which is 1 inside.
pub const FIRST_SUB_ID: u32 = 100_000;
const SUB_IDS: u32 = 65_536;
/// What the service is called.
const NAME: &str = "rootless";

/// What becomes the user, its home, and rootlesskit. Arguments: the directory, the stage, the
/// directory of containerd's programs where it is not on `PATH`, then what is executed.
const SET_UP: &str = r#"
dir=$1 stage=$2 programs=$3; shift 3
mount -o loop $dir/home.ext4 $dir/home
chown $USER_ID:$USER_ID $dir/home $dir/run
# They may lie where a user may not look.
mount --bind $stage $dir/stage
[ -z "$programs" ] || mount --bind $programs $dir/programs
for file in passwd group subuid subgid; do
    mount --bind $dir/etc/$file /etc/$file
done
# What udev gives to who is in the group kvm.
mknod -m 600 $dir/kvm c 10 232
mknod -m 666 $dir/tun c 10 200
chown $USER_ID $dir/kvm
mount --bind $dir/kvm /dev/kvm
mount --bind $dir/tun /dev/net/tun
[ -z "$CGROUP" ] || echo 0 >$CGROUP/cgroup.procs
# As on a host under systemd.
mount --make-rshared /
cd /
exec setpriv --reuid $USER_ID --regid $USER_ID --clear-groups --pdeathsig KILL "$@"
"#;

/// What is different between several.
#[derive(Clone, Copy, Debug, Default)]
pub struct Options {
    /// Whether the user has a cgroup of its own, as systemd gives it one.
    pub delegated: bool,
}

/// The running containerd. [`Rootless::end`] leaves nothing.
pub struct Rootless {
    service: Child,
    dir: PathBuf,
    cgroup: Option<PathBuf>,
    enter: Vec<String>,
    stage: Stage,
}

impl Rootless {
    /// Starts it, and imports the image.
    ///
    /// # Errors
    /// When it does not come up.
    pub fn start(world: &World, options: Options) -> Result<Self> {
        let dir = world.dir().join(NAME);
        let stage = write_files(&dir, world.stage())?;
        let cgroup = options.delegated.then(|| delegate(NAME)).transpose()?;
        let command = service(&dir, world.stage(), &stage, cgroup.as_deref());
        let service = world.start_service(NAME, command)?;
        let child =
            std::fs::read_to_string(dir.join("run/rootlesskit/child_pid")).context("rootlesskit's child")?;
        let mut enter =
            ["nsenter", "--user", "--mount", "--net", "--target", child.trim()].map(str::to_owned).to_vec();
        if options.delegated {
            enter.extend(["--pid", "--cgroup"].map(str::to_owned));
        }
        let rootless = Self { service, dir, cgroup, enter, stage };
        let image = rootless.dir.join("image.tar").to_string_lossy().into_owned();
        rootless.ctr().run(&["images", "import", &image], scale::container())?.success()?;
        ensure!(rootless.ctr().list(&["images", "ls", "-q"]).contains(&IMAGE.to_owned()), "no image");
        Ok(rootless)
    }

    /// A `ctr` inside.
    pub fn ctr(&self) -> Ctr {
        Ctr::new(&self.stage, ADDRESS).inside(&self.enter)
    }

    /// A command inside, with the environment its user has.
    pub fn command(&self, program: &Path, args: &[&str]) -> Command {
        let mut command = Command::new(&self.enter[0]);
        command.args(&self.enter[1..]).arg(program).args(args);
        command
            .env("RVM_CONFIG", self.dir.join("config.toml"))
            .env("PATH", self.stage.path_variable())
            .env("HOME", self.home())
            .env("XDG_RUNTIME_DIR", self.dir.join("run"));
        command
    }

    /// `rvmctl` inside.
    pub fn rvmctl(&self, args: &[&str]) -> Command {
        self.command(&self.stage.rvmctl(), args)
    }

    /// The user's home, as it is called inside.
    pub fn home(&self) -> PathBuf {
        self.dir.join("home")
    }

    /// The same, as it can be reached from outside.
    pub fn home_from_outside(&self) -> PathBuf {
        PathBuf::from(format!("/proc/{}/root", self.service.id()))
            .join(self.home().strip_prefix("/").unwrap_or(Path::new("")))
    }

    /// Where sandboxes' directories are.
    pub fn state_dir(&self) -> PathBuf {
        self.dir.join("run/rvm")
    }

    /// Its cgroup, where one is delegated.
    pub fn cgroup(&self) -> Option<&Path> {
        self.cgroup.as_deref()
    }

    /// The processes of its sandboxes.
    pub fn processes(&self) -> Vec<Process> {
        let is_ours = |process: &Process| {
            ["containerd-shim", "rvm-vmm", "rvm-container"].iter().any(|name| process.name.starts_with(name))
                && std::fs::read_to_string(format!("/proc/{}/status", process.pid)).is_ok_and(|status| {
                    status.lines().any(|line| line.starts_with(&format!("Uid:\t{USER}\t")))
                })
        };
        Process::all().into_iter().filter(is_ours).collect()
    }

    /// Ends it, and removes what was made for it.
    ///
    /// # Errors
    /// When something stays.
    pub fn end(mut self, world: &World) -> Result<()> {
        let ended = self.stop();
        ended.and_then(|()| world.forget_service(NAME))?;
        if let Some(cgroup) = &self.cgroup {
            std::fs::remove_dir(cgroup.join("rootlesskit"))
                .and_then(|()| std::fs::remove_dir(cgroup))
                .with_context(|| cgroup.display().to_string())?;
        }
        std::fs::remove_dir_all(&self.dir).context("removing the user's directories")
    }

    /// The end of what it and its shims have logged.
    pub fn log_tail(&self, world: &World) -> String {
        last_lines(&world.service_log(NAME), 0, 60)
    }

    fn stop(&mut self) -> Result<()> {
        let pid = Pid::from_raw(self.service.id().cast_signed());
        nix::sys::signal::kill(pid, Signal::SIGTERM)?;
        let until = Instant::now() + scale::container();
        while self.service.try_wait()?.is_none() {
            ensure!(Instant::now() < until, "rootlesskit does not end");
            std::thread::sleep(Duration::from_millis(10));
        }
        Ok(())
    }
}

impl Drop for Rootless {
    fn drop(&mut self) {
        let _ = self.service.kill();
        let _ = self.service.wait();
    }
}

/// What is in the user's directory; returns where the programs are for it.
fn write_files(dir: &Path, programs: &Stage) -> Result<Stage> {
    for sub in ["home", "run", "stage", "programs", "etc"] {
        std::fs::create_dir_all(dir.join(sub))?;
    }
    // Layers need user.* attributes, which a tmpfs has since Linux 6.6.
    shell(&format!("truncate -s 4G {0}/home.ext4; /sbin/mkfs.ext4 -q -F {0}/home.ext4", dir.display()))?;
    write_accounts(dir)?;
    std::fs::copy(&programs.image, dir.join("image.tar"))?;
    let stage = Stage {
        prefix: dir.join("stage"),
        containerd_dir: programs.containerd_dir.as_ref().map(|_| dir.join("programs")),
        ..programs.clone()
    };
    std::fs::write(dir.join("config.toml"), ConfigFile::of(&stage).to_string())?;
    let containerd = format!(
        "version = 2\nroot = \"{}/home/containerd\"\nstate = \"/run/containerd\"\n\
         disabled_plugins = [\"io.containerd.grpc.v1.cri\"]\n[grpc]\naddress = \"{ADDRESS}\"\n",
        dir.display()
    );
    std::fs::write(dir.join("containerd.toml"), containerd)?;
    Ok(stage)
}

/// rootlesskit with containerd in it.
fn service(dir: &Path, programs: &Stage, stage: &Stage, cgroup: Option<&Path>) -> Command {
    let mut command = Command::new("unshare");
    command.args(["--mount", "--propagation", "slave", "sh", "-euc", SET_UP, "sh"]);
    command.arg(dir).arg(&programs.prefix).arg(programs.containerd_dir.as_deref().unwrap_or(Path::new("")));
    command.arg("rootlesskit").arg("--state-dir").arg(dir.join("run/rootlesskit"));
    command.args(["--net=slirp4netns", "--disable-host-loopback", "--copy-up=/etc", "--copy-up=/run"]);
    command.arg("--propagation=rslave");
    if cgroup.is_some() {
        command.args(["--pidns", "--cgroupns", "--evacuate-cgroup2=rootlesskit"]);
    }
    // What is copied up of it is a link to what root of the host has there.
    command.args(["sh", "-euc", "rm -f /run/containerd; exec \"$@\"", "sh"]);
    command.arg(stage.containerd_program("containerd")).arg("--config").arg(dir.join("containerd.toml"));
    let mut path = stage.path_variable();
    path.push(":/usr/local/sbin:/usr/sbin:/sbin");
    command
        .env("PATH", path)
        .env("RVM_CONFIG", dir.join("config.toml"))
        .env("USER_ID", USER.to_string())
        .env("CGROUP", cgroup.unwrap_or(Path::new("")))
        .env("HOME", dir.join("home"))
        .env("XDG_RUNTIME_DIR", dir.join("run"));
    command
}

/// The machine's accounts, with the user's.
fn write_accounts(dir: &Path) -> Result<()> {
    let home = dir.join("home");
    let ids = format!("tester:{FIRST_SUB_ID}:{SUB_IDS}");
    for (file, line) in [
        ("passwd", format!("tester:x:{USER}:{USER}::{}:/bin/sh", home.display())),
        ("group", format!("tester:x:{USER}:")),
        ("subuid", ids.clone()),
        ("subgid", ids),
    ] {
        let text = std::fs::read_to_string(Path::new("/etc").join(file)).unwrap_or_default();
        let is_other = |other: &&str| !other.contains(&format!(":{USER}:")) && !other.starts_with("tester:");
        let others: String = text.lines().filter(is_other).map(|other| format!("{other}\n")).collect();
        let path = dir.join("etc").join(file);
        std::fs::write(&path, format!("{others}{line}\n"))?;
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o644))?;
    }
    Ok(())
}

/// A cgroup that is the user's, as systemd delegates one (Documentation/admin-guide/cgroup-v2.rst).
fn delegate(name: &str) -> Result<PathBuf> {
    let dir = Path::new("/sys/fs/cgroup").join(format!("rvm-{name}"));
    std::fs::create_dir(&dir).with_context(|| dir.display().to_string())?;
    for file in ["", "cgroup.procs", "cgroup.subtree_control", "cgroup.threads"] {
        std::os::unix::fs::chown(dir.join(file), Some(USER), Some(USER))?;
    }
    Ok(dir)
}
