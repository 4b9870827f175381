//! Docker: a dockerd beside the world's containerd, and its command line.

use std::{
    ffi::OsString,
    path::{Path, PathBuf},
    process::{Child, Command},
    sync::{Mutex, PoisonError},
};

use anyhow::{Context, Result};
use nix::sys::signal::Signal;
use serde_json::{Value, json};

use crate::{
    case_with,
    job::{self, Finished, Input},
    scale,
    world::{World, last_lines, shell},
};

/// Directory with Docker's programs in `bin` and its plugins in `config`; `cargo xtask test` names it.
pub const DIR_ENV: &str = "RVM_DOCKER_DIR";
/// Image every case has.
pub const IMAGE: &str = "busybox";
/// A Debian with nginx, PostgreSQL and curl: image of the cases of [`case_with_services`].
pub const SERVICES: &str = "debian-services";
/// What `--runtime` may name beside `io.rvm.v2`, by the daemon's configuration.
pub const RUNTIME_ALIAS: &str = "rvm";

/// Names the archive of [`SERVICES`]; `cargo xtask test` makes it.
const SERVICES_ENV: &str = "RVM_TEST_DEBIAN_IMAGE";
const SERVICE: &str = "dockerd";
/// dockerd dies with the world's keeper, which dies with this process.
static DAEMON: Mutex<Option<Child>> = Mutex::new(None);

/// A running Docker.
pub struct Docker<'a> {
    world: &'a World,
    dir: PathBuf,
}

/// Runs one case with Docker, alone in the world; the host is compared before and after.
///
/// # Panics
/// When the case fails, or leaves something on the host.
pub fn case(test: impl FnOnce(&Docker) -> Result<()>) {
    prepared(|docker| docker.prepare(), test);
}

/// The same with [`SERVICES`] as well.
///
/// # Panics
/// See [`case`].
pub fn case_with_services(test: impl FnOnce(&Docker) -> Result<()>) {
    prepared(
        |docker| {
            docker.prepare()?;
            docker.load_services()
        },
        test,
    );
}

fn prepared(prepare: impl FnOnce(&Docker<'_>) -> Result<()>, test: impl FnOnce(&Docker<'_>) -> Result<()>) {
    case_with(
        |world| prepare(&Docker::of(world)?),
        |world| {
            let docker = Docker::of(world)?;
            let log = std::fs::metadata(world.service_log(SERVICE)).map_or(0, |meta| meta.len() as usize);
            let result = test(&docker);
            if result.is_err() {
                println!("--- dockerd ---\n{}", last_lines(&world.service_log(SERVICE), log, 30));
                docker.sweep();
            }
            result
        },
    );
}

impl<'a> Docker<'a> {
    fn of(world: &'a World) -> Result<Self> {
        let dir = std::env::var_os(DIR_ENV).with_context(|| format!("{DIR_ENV} is not set"))?;
        Ok(Self { world, dir: dir.into() })
    }

    /// The world it is in.
    pub fn world(&self) -> &World {
        self.world
    }

    /// Starts dockerd where it does not run, and loads the image.
    fn prepare(&self) -> Result<()> {
        if daemon().is_some() {
            return Ok(());
        }
        self.configure(&json!({}))?;
        self.start()?;
        let image = self.world.stage().image.to_string_lossy().into_owned();
        self.run(&["load", "--input", &image])?.success()?;
        // What the first containers ever leave, whatever runs them.
        for runtime in ["runc", self.runtime()] {
            self.run(&["run", "--rm", "--network", "none", "--runtime", runtime, IMAGE, "true"])?
                .success()?;
        }
        Ok(())
    }

    /// Loads the image of services, which stays for the next case.
    fn load_services(&self) -> Result<()> {
        if self.run(&["image", "inspect", "--format", "there", SERVICES])?.code() == 0 {
            return Ok(());
        }
        let archive = std::env::var(SERVICES_ENV).with_context(|| format!("{SERVICES_ENV} is not set"))?;
        let mut command = Command::new("docker");
        self.environment(command.args(["load", "--quiet", "--input", &archive]));
        println!("{}", job::run(command, Input::Nothing, limit() * 3)?.success()?);
        // What its first container leaves.
        self.run(&["run", "--rm", "--network", "none", SERVICES, "true"])?.success()?;
        Ok(())
    }

    /// Writes the daemon's configuration: its own, and `changes`.
    ///
    /// # Errors
    /// When it cannot be written.
    pub fn configure(&self, changes: &Value) -> Result<()> {
        let mut config = json!({
            "live-restore": true,
            // What is not there a reload leaves as it was.
            "default-runtime": "runc",
            "runtimes": {RUNTIME_ALIAS: {"runtimeType": "io.rvm.v2"}},
        });
        for (key, value) in changes.as_object().into_iter().flatten() {
            config[key] = value.clone();
        }
        std::fs::write(self.config_file(), config.to_string()).context("writing dockerd's configuration")
    }

    /// Makes the daemon read its configuration again, and waits until `docker info` says `wanted`
    /// to the template `format`.
    ///
    /// # Errors
    /// When it does not in time.
    pub fn reload(&self, changes: &Value, format: &str, wanted: &str) -> Result<()> {
        self.configure(changes)?;
        let pid = daemon().as_ref().context("dockerd does not run")?.id();
        nix::sys::signal::kill(nix::unistd::Pid::from_raw(pid.cast_signed()), Signal::SIGHUP)?;
        let said = "until [ \"$(docker info --format \"$FORMAT\")\" = \"$WANTED\" ]; do sleep 0.2; done";
        self.script(self.world.dir(), &[("FORMAT", format), ("WANTED", wanted)], said)?.success()?;
        Ok(())
    }

    /// Starts the daemon and waits until it answers.
    fn start(&self) -> Result<()> {
        let mut command = Command::new(self.dir.join("bin/dockerd"));
        command.args(["--containerd", "/run/containerd/containerd.sock"]);
        command.arg("--config-file").arg(self.config_file());
        command.arg("--data-root").arg(self.world.dir().join("docker"));
        command.arg("--exec-root").arg("/run/docker");
        command.env("PATH", self.path());
        *daemon() = Some(self.world.start_service(SERVICE, command)?);
        Ok(())
    }

    /// Ends the daemon by a signal, runs `act` while there is none, and starts it again.
    ///
    /// # Errors
    /// What `act` returns, and when it does not come up.
    pub fn without_daemon(&self, signal: Signal, act: impl FnOnce() -> Result<()>) -> Result<()> {
        let mut child = daemon().take().context("dockerd does not run")?;
        nix::sys::signal::kill(nix::unistd::Pid::from_raw(child.id().cast_signed()), signal)?;
        child.wait().context("waiting for dockerd")?;
        let result = act();
        self.start()?;
        result
    }

    fn config_file(&self) -> PathBuf {
        self.world.dir().join("daemon.json")
    }

    fn path(&self) -> OsString {
        let mut path = self.dir.join("bin").into_os_string();
        path.push(":");
        path.push(self.world.services_path());
        path
    }

    /// The runtime under test.
    pub fn runtime(&self) -> &str {
        &self.world.stage().runtime
    }

    /// A `docker` command to its end.
    ///
    /// # Errors
    /// When it does not end in time.
    pub fn run(&self, args: &[&str]) -> Result<Finished> {
        let mut command = Command::new("docker");
        self.environment(command.args(args));
        job::run(command, Input::Nothing, limit())
    }

    /// A shell command with `docker` on its `PATH`, to its end.
    ///
    /// # Errors
    /// When it does not end in time.
    pub fn script(&self, dir: &Path, variables: &[(&str, &str)], script: &str) -> Result<Finished> {
        let mut command = Command::new("sh");
        command.args(["-c", script]).current_dir(dir).envs(variables.iter().copied());
        self.environment(&mut command);
        // Of many commands.
        job::run(command, Input::Nothing, limit() * 2)
    }

    fn environment(&self, command: &mut Command) {
        command.env("PATH", self.path()).env("DOCKER_CONFIG", self.dir.join("config"));
    }

    /// Removes what a failed case left, so that the next one starts clean.
    fn sweep(&self) {
        let everything = "docker ps -aq | xargs -r docker rm -fv; docker volume prune -af; docker network prune -f
             docker images --format '{{.Repository}}:{{.Tag}}' | grep -Ev '^(busybox|debian-services):' | xargs -r docker rmi -f";
        if let Ok(swept) = self.script(self.world.dir(), &[], everything) {
            println!("{swept}");
        }
        let _ = shell("rm -rf /run/rvm-tests/session");
    }
}

fn daemon() -> std::sync::MutexGuard<'static, Option<Child>> {
    DAEMON.lock().unwrap_or_else(PoisonError::into_inner)
}

/// For one command, or a few.
fn limit() -> std::time::Duration {
    scale::container() * 4
}
