//! `rvmctl run`: one container without containerd.
//!
//! The sandbox, the specification and the agent are the shim's own modules;
//! only where the streams and signals come from differs.

mod spec;
mod stdio;

use std::{
    future::poll_fn,
    io,
    num::NonZeroU8,
    path::{Path, PathBuf},
    process::{self, ExitCode},
    sync::Arc,
    task::Poll,
};

use clap::{ArgAction, builder::RangedU64ValueParser};
use nix::sys::signal::Signal;
use rvm_protocol::agent::ConsoleSize;
use rvm_shim::{
    agent::{AgentError, process_ref},
    config::{Compat, Config},
    hooks::{HookError, Hooks},
    sandbox::{self, Attached, Plan, Sandbox, SandboxError},
    spec::{Bundle, SpecError},
    state::{self, Phase},
    timeline::Timeline,
    vsock::VsockError,
};
use tokio::signal::unix::{SignalKind, signal};

use stdio::{RawMode, Streams};

/// The namespace of sandboxes that are nobody else's.
const NAMESPACE: &str = "rvmctl";
/// Exit code where rvm itself failed, and not the command in the container.
pub const FAILED: u8 = 125;
/// How often SIGINT or SIGTERM come before the guest is not asked any more.
const PATIENCE: u32 = 3;

/// Arguments of `rvmctl run`.
#[derive(clap::Args)]
pub struct Args {
    /// Root file system: a plain directory. It is not written to.
    #[arg(long, value_name = "DIR", required_unless_present = "bundle", conflicts_with = "bundle")]
    image_dir: Option<PathBuf>,
    /// OCI bundle: a directory with config.json. Its root file system is not written to.
    #[arg(long, value_name = "DIR")]
    bundle: Option<PathBuf>,
    /// Connect standard input; without, the command reads an empty one.
    #[arg(short, long)]
    interactive: bool,
    /// Give the command a terminal.
    #[arg(short, long)]
    tty: bool,
    /// Set an environment variable; without a value, to the one it has here.
    #[arg(short, long, value_name = "NAME[=VALUE]")]
    env: Vec<String>,
    /// Working directory in the container.
    #[arg(short, long, value_name = "DIR")]
    workdir: Option<String>,
    /// User to run as, by number.
    #[arg(short, long, value_name = "UID[:GID]", value_parser = spec::parse_user)]
    user: Option<(u32, u32)>,
    /// Virtual CPUs [default: guest.vcpus of the configuration].
    #[arg(long, value_name = "N")]
    vcpus: Option<NonZeroU8>,
    /// Memory in MiB [default: guest.memory_mib of the configuration].
    #[arg(long, value_name = "MIB", value_parser = RangedU64ValueParser::<u64>::new().range(64..=16 << 20))]
    memory: Option<u64>,
    /// The sandbox's id [default: run-PID].
    #[arg(long)]
    name: Option<String>,
    /// Say on standard error what the monitor says, and when each step of the start was done.
    #[arg(short, long, action = ArgAction::SetTrue)]
    pub verbose: bool,
    /// The command and its arguments; a bundle has one of its own.
    #[arg(last = true, value_name = "CMD", required_unless_present = "bundle")]
    command: Vec<String>,
}

/// Why the container did not run.
#[derive(Debug, thiserror::Error)]
pub enum RunError {
    /// The image directory.
    #[error("--image-dir {}: {problem}", dir.display())]
    ImageDir {
        /// As given.
        dir: PathBuf,
        /// What is wrong.
        problem: String,
    },
    /// A terminal is asked for where there is none.
    #[error("--tty with --interactive: standard input is not a terminal")]
    NoTerminal,
    /// What the container is.
    #[error(transparent)]
    Spec(#[from] SpecError),
    /// The sandbox.
    #[error(transparent)]
    Sandbox(#[from] SandboxError),
    /// A hook of the specification.
    #[error(transparent)]
    Hook(#[from] HookError),
    /// The agent.
    #[error(transparent)]
    Agent(#[from] AgentError),
    /// A stream's connection.
    #[error(transparent)]
    Vsock(#[from] VsockError),
    /// The sandbox is gone while the container ran.
    #[error("the sandbox ended under the container: {0}")]
    Ended(String),
    /// Signals, standard streams.
    #[error("{what}: {source}")]
    Io {
        /// What was tried.
        what: &'static str,
        /// Why it failed.
        #[source]
        source: io::Error,
    },
}

/// Runs the container; the exit code is the command's.
pub fn run(args: Args, mut config: Config) -> Result<ExitCode, RunError> {
    let id = args.name.clone().unwrap_or_else(|| format!("run-{}", process::id()));
    let bundle = bundle(&args, &id, &config.compat)?;
    bundle.check_file_systems(&config.guest.kernel)?;
    if let Some(vcpus) = args.vcpus {
        config.guest.vcpus = vcpus.get();
    }
    if let Some(memory) = args.memory {
        config.guest.memory_mib = memory;
    }
    remove_leftovers(&config.host.state_dir);
    // One thread: the monitor dies with the one that starts it.
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .map_err(|source| RunError::Io { what: "starting", source })?;
    let run = Run { config, bundle, id, interactive: args.interactive, verbose: args.verbose };
    runtime.block_on(run.run()).map(ExitCode::from)
}

/// The container as the arguments describe it.
fn bundle(args: &Args, id: &str, compat: &Compat) -> Result<Bundle, RunError> {
    let mut bundle = match (&args.bundle, &args.image_dir) {
        (Some(dir), _) => Bundle::load(&absolute(dir)?, id, compat)?,
        (None, Some(dir)) => spec::of_image_dir(&absolute(dir)?, id, &args.command)?,
        // clap requires one of the two.
        (None, None) => return Err(RunError::ImageDir { dir: PathBuf::new(), problem: "is missing".into() }),
    };
    let process = bundle.container.process.mut_or_insert_default();
    if !args.command.is_empty() {
        process.args.clone_from(&args.command);
    }
    if let Some(dir) = &args.workdir {
        process.cwd.clone_from(dir);
    }
    if let Some((uid, gid)) = args.user {
        let user = process.user.mut_or_insert_default();
        (user.uid, user.gid) = (uid, gid);
    }
    process.terminal |= args.tty;
    if process.terminal && args.interactive && !stdio::stdin_is_terminal() {
        return Err(RunError::NoTerminal);
    }
    spec::set_environment(&mut process.env, &args.env, process.terminal);
    process.stdin = args.interactive;
    (process.stdout, process.stderr) = (true, !process.terminal);
    if process.terminal {
        process.console_size = stdio::terminal_size().map(console_size).into();
    }
    Ok(bundle)
}

fn absolute(dir: &Path) -> Result<PathBuf, RunError> {
    dir.canonicalize().map_err(|error| RunError::ImageDir { dir: dir.to_owned(), problem: error.to_string() })
}

fn console_size((width, height): (u16, u16)) -> ConsoleSize {
    ConsoleSize { width: width.into(), height: height.into(), ..Default::default() }
}

/// What a killed `rvmctl run` could not remove: containerd cleans up after a
/// shim, nobody else after us.
fn remove_leftovers(state_dir: &Path) {
    for found in state::list(state_dir).unwrap_or_default() {
        let ours = found.dir.parent().is_some_and(|namespace| namespace.ends_with(NAMESPACE));
        // One without a state is just being made.
        if ours && found.state.is_ok_and(|state| !state.is_alive()) {
            sandbox::clean_up(&found.dir);
        }
    }
}

struct Run {
    config: Config,
    bundle: Bundle,
    id: String,
    interactive: bool,
    verbose: bool,
}

impl Run {
    async fn run(self) -> Result<u8, RunError> {
        let mut signals = Signals::listen()?;
        let timeline = Arc::new(Timeline::begin());
        let plan = Plan::of(NAMESPACE, &self.id, &self.bundle, &self.config.guest);
        let start = Sandbox::start_for(&self.config, plan, &self.bundle, &[], timeline.clone());
        let (sandbox, attached) = tokio::select! {
            started = start => started?,
            signal = signals.ending() => return Ok(exit_code_of(signal)),
        };
        let hooks = Hooks::of(&self.bundle);
        let result = self.in_sandbox(&sandbox, &attached, &hooks, &mut signals).await;
        sandbox.close().await;
        hooks.after_stop().await;
        if self.verbose {
            for step in timeline.steps() {
                eprintln!("{:>10.3} ms  {}", step.ms, step.name);
            }
        }
        result
    }

    async fn in_sandbox(
        &self,
        sandbox: &Sandbox,
        attached: &Attached,
        hooks: &Hooks,
        signals: &mut Signals,
    ) -> Result<u8, RunError> {
        tokio::select! {
            // The sandbox's end explains a lost connection, not the other way round.
            biased;
            reason = sandbox.ended() => Err(RunError::Ended(reason)),
            result = self.container(sandbox, attached, hooks, signals) => match result {
                Err(RunError::Agent(AgentError::Lost { .. }) | RunError::Vsock(_)) => {
                    // Nothing can be done with a guest that does not answer.
                    sandbox.kill();
                    Err(RunError::Ended(sandbox.ended().await))
                }
                result => result,
            },
        }
    }

    async fn container(
        &self,
        sandbox: &Sandbox,
        attached: &Attached,
        hooks: &Hooks,
        signals: &mut Signals,
    ) -> Result<u8, RunError> {
        let agent = sandbox.agent();
        tokio::select! {
            result = hooks.before_create(attached.holder().id().pid) => result?,
            signal = signals.ending() => return Ok(exit_code_of(signal)),
        }
        let terminal = self.bundle.container.process.terminal;
        let mut container = self.bundle.container.clone();
        attached.settle(&mut container);
        agent.create_container(&container).await?;
        sandbox.timeline().mark("container created");
        let streams = Streams::connect(sandbox.vsock(), &self.id, terminal, self.interactive).await?;
        let init = process_ref(&self.id, "");
        agent.start(&init, &container.start_container_hooks).await?;
        sandbox.timeline().mark("command started");
        hooks.after_start(attached.holder().id().pid).await?;
        sandbox.set_phase(&self.id, Phase::Running);

        let raw_mode = (terminal && self.interactive).then(RawMode::enter).transpose();
        let _raw_mode = raw_mode.map_err(|source| RunError::Io { what: "the terminal", source })?;
        let wait = agent.wait(&init);
        tokio::pin!(wait);
        let mut asked = 0;
        let status = loop {
            tokio::select! {
                status = &mut wait => break status?,
                signal = signals.next() => {
                    if signal == Signal::SIGWINCH {
                        if let (true, Some((width, height))) = (terminal, stdio::terminal_size()) {
                            agent.resize(init.clone(), width.into(), height.into()).await?;
                        }
                        continue;
                    }
                    asked += u32::from(matches!(signal, Signal::SIGINT | Signal::SIGTERM));
                    if asked >= PATIENCE {
                        return Ok(exit_code_of(Signal::SIGKILL));
                    }
                    match agent.signal(init.clone(), signal as u32, false).await {
                        // It has just ended; its status is on its way.
                        Err(AgentError::Refused { .. }) | Ok(()) => {}
                        Err(error) => return Err(error.into()),
                    }
                }
            }
        };
        streams.drained().await;
        // 128 + n after signal n, and never above.
        Ok(u8::try_from(status.exit_code).unwrap_or(u8::MAX))
    }
}

fn exit_code_of(signal: Signal) -> u8 {
    128 + signal as u8
}

/// The signals that are the container's.
struct Signals(Vec<(Signal, tokio::signal::unix::Signal)>);

impl Signals {
    fn listen() -> Result<Self, RunError> {
        let kinds = [
            Signal::SIGHUP,
            Signal::SIGINT,
            Signal::SIGQUIT,
            Signal::SIGTERM,
            Signal::SIGUSR1,
            Signal::SIGUSR2,
            Signal::SIGWINCH,
        ];
        kinds
            .into_iter()
            .map(|kind| Ok((kind, signal(SignalKind::from_raw(kind as i32))?)))
            .collect::<io::Result<_>>()
            .map(Self)
            .map_err(|source| RunError::Io { what: "listening for signals", source })
    }

    async fn next(&mut self) -> Signal {
        poll_fn(|context| {
            let ready = self
                .0
                .iter_mut()
                .find_map(|(kind, stream)| stream.poll_recv(context).is_ready().then_some(*kind));
            ready.map_or(Poll::Pending, Poll::Ready)
        })
        .await
    }

    /// The next one that ends a process which has not asked for it.
    async fn ending(&mut self) -> Signal {
        loop {
            match self.next().await {
                Signal::SIGWINCH => {}
                other => return other,
            }
        }
    }
}
