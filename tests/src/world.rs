//! A mount namespace with its own `/run`, and a containerd in it.
//!
//! containerd and its shims use `/run/containerd/{s,fifo}` and rvm `/run/rvm`
//! whatever root and state say, so a private containerd needs a private `/run`.
//! It is a tmpfs, which also takes containerd's root: an overlay file system,
//! the devhost's root, cannot be the upper layer of another.
//!
//! One thread, the keeper, lives in that namespace as long as the process does.
//! It starts containerd with a parent death signal, so that containerd ends
//! with the tests however these end. Test threads enter the namespace by
//! [`World::enter`].

use std::{
    collections::BTreeMap,
    ffi::OsString,
    fs::File,
    os::unix::{fs::PermissionsExt, net::UnixDatagram, process::CommandExt},
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    sync::{
        Mutex, PoisonError,
        mpsc::{Sender, channel},
    },
};

use anyhow::{Context, Result, anyhow, bail, ensure};
use nix::{
    mount::{MsFlags, mount},
    sched::{CloneFlags, setns, unshare},
    sys::signal::Signal,
};

use crate::{
    config::ConfigFile,
    ctr::Ctr,
    events::Events,
    host::HostSnapshot,
    job::{self, Input},
    scale,
    stage::Stage,
};

/// Everything containerd and the tests write, inside the namespace.
const DIR: &str = "/run/rvm-tests";
/// Where containerd listens: where plain `ctr` looks for it.
pub const ADDRESS: &str = "/run/containerd/containerd.sock";
/// CRI is used by few cases and takes a second of every start in the devhost.
const NO_CRI: &str = "disabled_plugins = [\"io.containerd.grpc.v1.cri\"]\n";
/// Name of the imported image.
pub const IMAGE: &str = "docker.io/library/busybox:latest";

/// A private containerd and what runs beside it.
pub struct World {
    stage: Stage,
    namespace: File,
    keeper: Mutex<Sender<Order>>,
    containerd: Mutex<Option<Child>>,
    configuration: Mutex<Configuration>,
    events: Mutex<Option<Events>>,
    /// Processes of services, by name: tests restart them.
    services: Mutex<BTreeMap<String, libc::pid_t>>,
}

/// What is in containerd's configuration beside what all cases have.
struct Configuration {
    running: String,
    wanted: String,
}

/// What the keeper does: starts a command in the namespace.
type Order = (Command, Sender<std::io::Result<Child>>);

impl World {
    /// Makes the namespace, starts containerd, imports the image.
    ///
    /// # Errors
    /// Without root, or when containerd does not come up.
    pub fn new(stage: Stage) -> Result<Self> {
        ensure!(nix::unistd::geteuid().is_root(), "needs root: mount namespaces, containerd");
        let (keeper, namespace) = start_keeper()?;
        let world = Self {
            stage,
            namespace,
            keeper: Mutex::new(keeper),
            containerd: Mutex::new(None),
            configuration: Mutex::new(Configuration {
                running: NO_CRI.to_owned(),
                wanted: NO_CRI.to_owned(),
            }),
            events: Mutex::new(None),
            services: Mutex::default(),
        };
        world.enter()?;
        std::fs::create_dir_all(world.wrapper_dir())?;
        if let Some(kind) = &world.stage.file_system {
            shell(&format!(
                "mkdir {DIR}/containerd; truncate -s 8G {DIR}/containerd.disk; \
                 /sbin/mkfs.{kind} -q {DIR}/containerd.disk; mount -o loop {DIR}/containerd.disk {DIR}/containerd"
            ))?;
        }
        world.write_containerd_config(NO_CRI)?;
        world.set_config(&world.config())?;
        world.start_containerd()?;
        let image = world.stage.image.to_string_lossy().into_owned();
        world.ctr().run(&["images", "import", &image], scale::container())?.success()?;
        Ok(world)
    }

    /// Moves the calling thread, and what it starts from now on, into the namespace.
    ///
    /// # Errors
    /// When the kernel refuses.
    pub fn enter(&self) -> Result<()> {
        unshare(CloneFlags::CLONE_FS).context("unsharing the working directory")?;
        setns(&self.namespace, CloneFlags::CLONE_NEWNS).context("entering the mount namespace")?;
        Ok(())
    }

    /// The programs under test.
    pub fn stage(&self) -> &Stage {
        &self.stage
    }

    /// A scratch directory inside the namespace.
    pub fn dir(&self) -> &'static Path {
        Path::new(DIR)
    }

    /// Where a test may put shims of its own: on containerd's `PATH`.
    pub fn wrapper_dir(&self) -> PathBuf {
        self.dir().join("bin")
    }

    /// A `ctr` that talks to this containerd.
    pub fn ctr(&self) -> Ctr {
        Ctr::new(&self.stage, ADDRESS)
    }

    /// `rvmctl` with the configuration containerd's shims read.
    pub fn rvmctl(&self, args: &[&str]) -> Command {
        let mut command = Command::new(self.stage.rvmctl());
        command.args(args).env("RVM_CONFIG", self.config_path()).env("PATH", self.stage.path_variable());
        command
    }

    /// containerd's process id.
    pub fn containerd_pid(&self) -> Option<u32> {
        self.containerd.lock().unwrap_or_else(PoisonError::into_inner).as_ref().map(Child::id)
    }

    /// Runs `look` on what containerd has published so far.
    ///
    /// # Errors
    /// Whatever `look` returns, and when containerd is not running.
    pub fn events<T>(&self, look: impl FnOnce(&mut Events) -> Result<T>) -> Result<T> {
        let mut events = self.events.lock().unwrap_or_else(PoisonError::into_inner);
        look(events.as_mut().context("containerd is not running")?)
    }

    /// Ends a detached container: its process is killed, its exit is published, its task deleted.
    ///
    /// # Errors
    /// When one of them does not happen.
    pub fn end(&self, id: &str) -> Result<()> {
        let ctr = self.ctr();
        ctr.run(&["task", "kill", "-s", "SIGKILL", id], scale::command())?.success()?;
        self.events(|events| events.wait_for("/tasks/exit", id, scale::container()))?;
        ctr.remove(id)
    }

    /// Path of the configuration containerd's shims read.
    pub fn config_path(&self) -> PathBuf {
        self.dir().join("config.toml")
    }

    /// Where shims of the tests' build look for what is to happen to them (`rvm_shim::fault`).
    pub fn fault_path(&self) -> PathBuf {
        self.dir().join("fault")
    }

    /// Writes that configuration.
    ///
    /// # Errors
    /// When it cannot be written.
    pub fn set_config(&self, config: &ConfigFile) -> Result<()> {
        std::fs::write(self.config_path(), config.to_string()).context("writing the configuration")
    }

    /// Writes a file of the test's own, for example for `ctr run --runtime-config-path`.
    ///
    /// # Errors
    /// When it cannot be written.
    pub fn write_file(&self, name: &str, content: impl AsRef<[u8]>) -> Result<String> {
        let path = self.dir().join(name);
        std::fs::write(&path, content).with_context(|| format!("writing {}", path.display()))?;
        Ok(path.to_string_lossy().into_owned())
    }

    /// The files of these names beside the directories of containerd's snapshots.
    ///
    /// # Errors
    /// When containerd's root cannot be read.
    pub fn in_snapshots(&self, is_wanted: impl Fn(&str) -> bool) -> Result<Vec<PathBuf>> {
        let root = self.dir().join("containerd/io.containerd.snapshotter.v1.overlayfs/snapshots");
        let mut found = Vec::new();
        for snapshot in entries(&root)? {
            found.extend(
                entries(&snapshot)?
                    .into_iter()
                    .filter(|file| file.file_name().is_some_and(|name| is_wanted(&name.to_string_lossy()))),
            );
        }
        Ok(found)
    }

    /// A configuration that uses what is installed under the stage.
    pub fn config(&self) -> ConfigFile {
        ConfigFile::of(&self.stage)
    }

    /// The image's root file system as a plain directory, made once.
    ///
    /// # Errors
    /// When containerd does not mount the image.
    pub fn rootfs(&self) -> Result<PathBuf> {
        let rootfs = self.dir().join("rootfs");
        if !rootfs.exists() {
            let view = self.dir().join("view").to_string_lossy().into_owned();
            std::fs::create_dir_all(&view)?;
            self.ctr().run(&["images", "mount", IMAGE, &view], scale::container())?.success()?;
            shell(&format!("cp -a {view} {}", rootfs.display()))?;
            self.ctr().run(&["images", "unmount", "--rm", &view], scale::command())?.success()?;
            std::fs::remove_dir(&view)?;
        }
        Ok(rootfs)
    }

    /// Lists the host, without the services themselves and our subscription to containerd's events.
    pub fn host(&self) -> HostSnapshot {
        let services = self.services.lock().unwrap_or_else(PoisonError::into_inner).clone();
        let events = self.events(|events| Ok(events.pid())).ok();
        HostSnapshot::take(&self.stage, &services.into_values().chain(events).collect::<Vec<_>>())
    }

    /// Length of containerd's log so far.
    pub fn log_length(&self) -> usize {
        std::fs::metadata(self.log_path()).map_or(0, |meta| meta.len() as usize)
    }

    /// At most `lines` last lines of containerd's log, its shims' included, from a length on.
    pub fn log_tail(&self, from: usize, lines: usize) -> String {
        last_lines(&self.log_path(), from, lines)
    }

    /// Kills containerd (its shims live on) and starts it again on the same state.
    ///
    /// # Errors
    /// When it does not come up.
    pub fn restart_containerd(&self, signal: Signal) -> Result<()> {
        self.stop_containerd(signal)?;
        self.start_containerd()
    }

    /// Kills containerd, runs `act` while there is none, and starts it again.
    ///
    /// # Errors
    /// What `act` returns, and when containerd does not come up.
    pub fn without_containerd(&self, signal: Signal, act: impl FnOnce() -> Result<()>) -> Result<()> {
        self.stop_containerd(signal)?;
        let result = act();
        self.start_containerd()?;
        result
    }

    fn stop_containerd(&self, signal: Signal) -> Result<()> {
        *self.events.lock().unwrap_or_else(PoisonError::into_inner) = None;
        let mut slot = self.containerd.lock().unwrap_or_else(PoisonError::into_inner);
        let mut child = slot.take().context("containerd is not running")?;
        nix::sys::signal::kill(nix::unistd::Pid::from_raw(child.id().cast_signed()), signal)?;
        child.wait().context("waiting for containerd")?;
        Ok(())
    }

    /// Starts containerd and waits until it is ready.
    fn start_containerd(&self) -> Result<()> {
        let mut command = Command::new(self.stage.containerd_program("containerd"));
        command.args(["--config", &self.containerd_config_path().to_string_lossy()]);
        command.env("PATH", self.services_path());
        let child = self.start_service("containerd", command)?;
        *self.containerd.lock().unwrap_or_else(PoisonError::into_inner) = Some(child);
        let events = Events::subscribe(&self.ctr())?;
        *self.events.lock().unwrap_or_else(PoisonError::into_inner) = Some(events);
        Ok(())
    }

    /// Starts a service in the namespace and waits until it says it is ready (sd_notify(3)). It
    /// logs to [`World::service_log`].
    ///
    /// # Errors
    /// When it is not ready in time, with the end of its log.
    pub fn start_service(&self, name: &str, mut command: Command) -> Result<Child> {
        let notify_path = self.dir().join(format!("{name}.notify"));
        if notify_path.exists() {
            std::fs::remove_file(&notify_path)?;
        }
        let notify = UnixDatagram::bind(&notify_path).context("binding the notification socket")?;
        // It may be another user.
        std::fs::set_permissions(&notify_path, std::fs::Permissions::from_mode(0o666))?;
        notify.set_read_timeout(Some(scale::seconds(30.0)))?;

        let log = File::options().create(true).append(true).open(self.service_log(name))?;
        if !command.get_envs().any(|(name, _)| name == "RVM_CONFIG") {
            command.env("RVM_CONFIG", self.config_path());
        }
        command
            .env("NOTIFY_SOCKET", &notify_path)
            .env("RVM_FAULT", self.fault_path())
            .stdin(Stdio::null())
            .stdout(log.try_clone()?)
            .stderr(log);
        let mut child = self.spawn(command).with_context(|| format!("starting {name}"))?;
        let mut services = self.services.lock().unwrap_or_else(PoisonError::into_inner);
        services.insert(name.to_owned(), child.id().cast_signed());
        drop(services);
        let mut buffer = [0; 256];
        loop {
            let count = notify.recv(&mut buffer).map_err(|e| {
                let _ = child.kill().and_then(|()| child.wait());
                let log = last_lines(&self.service_log(name), 0, 30);
                anyhow!("{name} is not ready: {e}; its log:\n{log}")
            })?;
            if buffer[..count].starts_with(b"READY=1") {
                return Ok(child);
            }
        }
    }

    /// `PATH` of containerd and of what runs beside it: what a test put into
    /// [`World::wrapper_dir`] is found before what is staged.
    pub fn services_path(&self) -> OsString {
        let mut path = self.wrapper_dir().into_os_string();
        path.push(":");
        path.push(self.stage.path_variable());
        path
    }

    /// Where a service logs.
    pub fn service_log(&self, name: &str) -> PathBuf {
        self.dir().join(format!("{name}.log"))
    }

    /// Takes away what [`World::start_service`] left for one that has ended.
    ///
    /// # Errors
    /// When it cannot be removed.
    pub fn forget_service(&self, name: &str) -> Result<()> {
        self.services.lock().unwrap_or_else(PoisonError::into_inner).remove(name);
        std::fs::remove_file(self.service_log(name))?;
        Ok(std::fs::remove_file(self.dir().join(format!("{name}.notify")))?)
    }

    fn spawn(&self, command: Command) -> Result<Child> {
        let (sender, receiver) = channel();
        let keeper = self.keeper.lock().unwrap_or_else(PoisonError::into_inner);
        keeper.send((command, sender)).context("the keeper is gone")?;
        Ok(receiver.recv().context("the keeper is gone")??)
    }

    fn log_path(&self) -> PathBuf {
        self.service_log("containerd")
    }

    fn containerd_config_path(&self) -> PathBuf {
        self.dir().join("containerd.toml")
    }

    /// Says what containerd's configuration is to have from [`Self::settle`] on: `more` instead of what disables the CRI
    /// plugin, or the latter.
    pub fn want_containerd_config(&self, more: Option<&str>) {
        let mut configuration = self.configuration.lock().unwrap_or_else(PoisonError::into_inner);
        configuration.wanted = more.unwrap_or(NO_CRI).to_owned();
    }

    /// Restarts containerd where it does not run with the configuration that is wanted. Cases that want the same, one
    /// after another, have one containerd: in the devhost each start takes seconds.
    ///
    /// # Errors
    /// When containerd does not come up.
    pub fn settle(&self) -> Result<()> {
        let mut configuration = self.configuration.lock().unwrap_or_else(PoisonError::into_inner);
        if configuration.running != configuration.wanted {
            configuration.running = configuration.wanted.clone();
            self.write_containerd_config(&configuration.running)?;
            self.restart_containerd(Signal::SIGTERM)?;
        }
        Ok(())
    }

    fn write_containerd_config(&self, more: &str) -> Result<()> {
        // By default it waits fifty times as long as the last collection took before the next,
        // and cases wait until nothing is left.
        let text = format!(
            "version = 2\nroot = \"{DIR}/containerd\"\nstate = \"/run/containerd\"\n{more}\
             [grpc]\naddress = \"{ADDRESS}\"\n\
             [plugins.\"io.containerd.gc.v1.scheduler\"]\npause_threshold = 0.5\n"
        );
        std::fs::write(self.containerd_config_path(), text).context("writing containerd's configuration")
    }

    /// Kills every process that a failed case left in this world, so that the
    /// next case starts clean. Returns what was killed.
    pub fn sweep(&self) -> Vec<String> {
        // First the processes: a shim that hangs would hold up every command below.
        let mut killed = Vec::new();
        for process in crate::host::sandbox_processes(&self.stage) {
            let pid = nix::unistd::Pid::from_raw(process.pid);
            if nix::sys::signal::kill(pid, Signal::SIGKILL).is_ok() {
                killed.push(process.to_string());
            }
        }
        let ctr = self.ctr();
        for id in ctr.list(&["containers", "ls", "-q"]) {
            let _ = ctr.run(&["task", "kill", "-s", "SIGKILL", &id], scale::command());
            let _ = ctr.run(&["task", "rm", "-f", &id], scale::command());
            let _ = ctr.run(&["containers", "rm", &id], scale::command());
        }
        for key in ctr.list(&["snapshots", "ls"]).iter().skip(1) {
            if let Some((key, rest)) = key.split_once(' ')
                && rest.contains("Active")
            {
                let _ = ctr.run(&["snapshots", "rm", key], scale::command());
            }
        }
        // Of clients that were killed; nobody is left to use them.
        let _ = shell("rm -rf /run/containerd/fifo/*");
        killed
    }
}

/// At most `lines` last lines of a log, from a length on, without what containerd says when it starts.
pub fn last_lines(path: &Path, from: usize, lines: usize) -> String {
    let text = std::fs::read(path).unwrap_or_default();
    let text = String::from_utf8_lossy(text.get(from..).unwrap_or_default());
    let starts = [
        "loading plugin",
        "skip loading plugin",
        "failed to load plugin",
        "serving...",
        "starting cri plugin",
    ];
    let says = |line: &&str| !starts.iter().any(|start| line.contains(start));
    let all: Vec<&str> = text.lines().filter(says).collect();
    all[all.len().saturating_sub(lines)..].join("\n")
}

/// Starts the keeper; returns how to order and its mount namespace.
fn start_keeper() -> Result<(Sender<Order>, File)> {
    let (orders, inbox) = channel::<Order>();
    let (ready, started) = channel();
    std::thread::Builder::new().name("keeper".into()).spawn(move || {
        if ready.send(private_run()).is_err() {
            return;
        }
        for (mut command, answer) in inbox {
            let die_with_us = || {
                nix::sys::prctl::set_pdeathsig(Signal::SIGKILL)?;
                Ok(())
            };
            // SAFETY: prctl alone runs between fork and exec.
            unsafe { command.pre_exec(die_with_us) };
            if answer.send(command.spawn()).is_err() {
                return;
            }
        }
    })?;
    let namespace = started.recv().context("the keeper is gone")??;
    Ok((orders, namespace))
}

/// Gives the calling thread a mount namespace with an empty `/run`, whose mounts
/// are shared as on a host under systemd: a mount that escapes from a sandbox's
/// own namespace shows.
fn private_run() -> Result<File> {
    unshare(CloneFlags::CLONE_NEWNS).context("making a mount namespace")?;
    let propagation = |flag| mount(None::<&str>, "/", None::<&str>, MsFlags::MS_REC | flag, None::<&str>);
    propagation(MsFlags::MS_SLAVE).context("making mounts slaves")?;
    mount(Some("tmpfs"), "/run", Some("tmpfs"), MsFlags::empty(), Some("mode=755"))
        .context("mounting a tmpfs on /run")?;
    propagation(MsFlags::MS_SHARED).context("making mounts shared")?;
    File::open("/proc/thread-self/ns/mnt").context("opening the mount namespace")
}

/// Runs a shell command in the calling thread's namespace, for set-up and looking.
///
/// # Errors
/// When it does not exit with 0.
pub fn shell(script: &str) -> Result<String> {
    let mut command = Command::new("sh");
    command.args(["-ec", script]);
    let finished = job::run(command, Input::Nothing, scale::command())?;
    if finished.code() != 0 {
        bail!("{finished}");
    }
    Ok(finished.text())
}

/// What is in a directory, which containerd may be removing: nothing, once it is gone.
fn entries(dir: &Path) -> Result<Vec<PathBuf>> {
    let gone = |error: &std::io::Error| {
        matches!(error.kind(), std::io::ErrorKind::NotFound | std::io::ErrorKind::NotADirectory)
    };
    match std::fs::read_dir(dir) {
        Ok(entries) => Ok(entries
            .filter(|entry| !entry.as_ref().is_err_and(gone))
            .map(|entry| entry.map(|entry| entry.path()))
            .collect::<std::io::Result<_>>()?),
        Err(error) if gone(&error) => Ok(Vec::new()),
        Err(error) => Err(error.into()),
    }
}
