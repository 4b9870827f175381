//! One container of a sandbox: its processes and what is done with them.

mod control;
mod exit;

use std::{
    collections::BTreeMap,
    path::PathBuf,
    sync::{Arc, Mutex, MutexGuard, PoisonError, atomic::AtomicBool},
    time::Duration,
};

use containerd_shim_protos::{
    events::task::{TaskCreate, TaskExecAdded, TaskExecStarted, TaskIO, TaskStart},
    types::mount::Mount,
};
use rvm_protocol::agent::{Device, Hook, Namespace};
use tokio::time::timeout;

use crate::{
    agent::{AgentError, process_ref},
    config::Compat,
    error::Error,
    events::Events,
    holder::Holder,
    hooks::{HookError, Hooks},
    io::{Endpoints, ProcessIo, Stdio},
    process::{Phase, Process},
    rootfs::Layer,
    sandbox::{Attached, Sandbox, SandboxError},
    share::ShareError,
    spec::{self, Bundle, Neighbour},
    state,
    timeline::Timeline,
};

/// Above every pid a Linux host has (`PID_MAX_LIMIT`). Pids of the guest are
/// told with this added, so that none can be taken for a process of the host;
/// see docs/decisions/0602.
pub const GUEST_PIDS_FROM: u32 = 1 << 22;

/// How long a guest may take to list processes; containerd asks for them before it
/// does anything else.
const LIST_TIMEOUT: Duration = Duration::from_secs(1);
/// How long a first process may take to end that was killed, before its machine is stopped: for longer, its kernel waits for
/// something that does not come, as of a volume whose file system on the host does not answer.
const END_TIMEOUT: Duration = Duration::from_secs(30);
/// How long a guest may take to act on SIGKILL before the machine is stopped.
const KILL_TIMEOUT: Duration = Duration::from_secs(10);

/// Stops the machine of a first process that was killed where it does not end.
async fn see_to_the_end(process: Arc<Process>, sandbox: Arc<Sandbox>, label: String) {
    if timeout(END_TIMEOUT, process.wait()).await.is_err() {
        let limit = END_TIMEOUT.as_secs();
        log::warn!("{label}: has not ended {limit} s after it was killed; stopping its machine");
        sandbox.kill();
    }
}

/// A container in a running sandbox.
pub struct Container {
    /// Its id.
    pub id: String,
    /// Its bundle.
    pub bundle: PathBuf,
    sandbox: Arc<Sandbox>,
    /// Stands for it on the host.
    holder: Arc<Holder>,
    /// Taken when it leaves the machine.
    attached: Mutex<Option<Attached>>,
    /// Its namespaces, as the agent was asked for them.
    namespaces: Vec<Namespace>,
    /// The steps of its start.
    timeline: Arc<Timeline>,
    hooks: Arc<Hooks>,
    namespace: String,
    events: Events,
    init: Arc<Process>,
    /// The first process's pid in the guest.
    init_guest_pid: u32,
    /// The first process's, until it is started.
    endpoints: Mutex<Option<Endpoints>>,
    execs: Mutex<BTreeMap<String, Arc<Process>>>,
    compat: Compat,
    /// Those of its devices that are block devices of the host's.
    block_devices: Vec<Device>,
    /// Those that run in the guest as it is started.
    start_hooks: Vec<Hook>,
    /// Held while it is paused or resumed.
    changing: tokio::sync::Mutex<()>,
    paused: AtomicBool,
    /// Of how many processes killed for want of memory the client was told.
    oom_kills: Mutex<u64>,
}

/// What a container is made of.
pub struct Create {
    /// Its specification.
    pub bundle: Bundle,
    /// Its hooks.
    pub hooks: Arc<Hooks>,
    /// Its layers, as they were added to the share.
    pub layers: Vec<Layer>,
    /// Its streams as containerd named them.
    pub stdio: Stdio,
    /// Its streams, opened.
    pub endpoints: Endpoints,
    /// What its specifications may ask for in vain.
    pub compat: Compat,
    /// Where the steps of its start are noted.
    pub timeline: Arc<Timeline>,
}

/// A process as `Pids` tells it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Listed {
    /// As containerd knows it.
    pub pid: u32,
    /// Where it was started by an exec.
    pub exec_id: Option<String>,
}

impl Container {
    /// Makes the container in the guest; its first process waits for
    /// [`Container::start`]. Its place in the machine is taken over when there is
    /// a container.
    pub async fn create(
        sandbox: &Arc<Sandbox>,
        namespace: &str,
        create: Create,
        place: &mut Option<Attached>,
        events: Events,
    ) -> Result<Arc<Self>, Error> {
        let Create { bundle, hooks, layers, stdio, endpoints, compat, timeline } = create;
        let mut request = bundle.container;
        let id = request.container_id.clone();
        let resources = request.resources.mut_or_insert_default();
        resources.cpus = sandbox.guest_cpus(&resources.cpus);
        request.pids_max_above = sandbox.pids_max_above();
        if let Some(attached) = place {
            attached.settle(&mut request);
        }
        let process = request.process.mut_or_insert_default();
        process.terminal = endpoints.terminal;
        (process.stdin, process.stdout, process.stderr) =
            (endpoints.stdin.is_some(), endpoints.stdout.is_some(), endpoints.stderr.is_some());
        let created = sandbox.agent().create_container(&request);
        let created = match sandbox.is_first(&id) {
            // The monitor answers while the guest works.
            true => tokio::join!(created, sandbox.note_monitor_steps()).0,
            false => created.await,
        };
        if let (Err(error), Some(attached)) = (&created, place.as_ref())
            && error.is_data_loss()
            && let Some(error) = attached.refused_image(&error.to_string()).await
        {
            return Err(SandboxError::from(ShareError::from(error)).into());
        }
        let init_guest_pid = created?;
        timeline.mark("container created");
        let attached = place.take().ok_or_else(|| Error::FailedPrecondition("has no place".into()))?;
        let pid = attached.holder().id().pid;
        let created = TaskCreate {
            container_id: id.clone(),
            bundle: bundle.dir.to_string_lossy().into_owned(),
            rootfs: layers.into_iter().map(mount_message).collect(),
            io: Some(io_message(&stdio)).into(),
            pid,
            ..Default::default()
        };
        let init = Process::new("", stdio, pid);
        request.devices.retain(|device| !device.block_serial.is_empty());
        let container = Arc::new(Self {
            id,
            bundle: bundle.dir,
            sandbox: sandbox.clone(),
            holder: attached.holder().clone(),
            attached: Mutex::new(Some(attached)),
            namespaces: request.namespaces,
            timeline,
            hooks,
            namespace: namespace.to_owned(),
            events,
            init: Arc::new(init),
            init_guest_pid,
            endpoints: Mutex::new(Some(endpoints)),
            execs: Mutex::default(),
            compat,
            block_devices: request.devices,
            start_hooks: request.start_container_hooks,
            changing: tokio::sync::Mutex::default(),
            paused: AtomicBool::new(false),
            oom_kills: Mutex::default(),
        });
        container.events.publish(created);
        tokio::spawn(container.clone().follow(container.init.clone()));
        tokio::spawn(container.clone().follow_holder());
        Ok(container)
    }

    /// What others in its sandbox may refer to by its pid.
    pub fn neighbour(&self) -> Neighbour {
        Neighbour {
            pid: self.init.pid(),
            guest_pid: self.init_guest_pid,
            namespaces: self.namespaces.clone(),
        }
    }

    /// The sandbox it runs in.
    pub fn sandbox(&self) -> &Arc<Sandbox> {
        &self.sandbox
    }

    /// Its hooks on the host.
    pub fn hooks(&self) -> &Hooks {
        &self.hooks
    }

    /// One of its processes; the first where `exec_id` is empty.
    pub fn process(&self, exec_id: &str) -> Result<Arc<Process>, Error> {
        if exec_id.is_empty() {
            return Ok(self.init.clone());
        }
        let found = self.execs().get(exec_id).cloned();
        found.ok_or_else(|| Error::NotFound(format!("container {} has no exec {exec_id}", self.id)))
    }

    /// Starts a created process and returns its pid.
    pub async fn start(self: &Arc<Self>, exec_id: &str) -> Result<u32, Error> {
        let process = self.process(exec_id)?;
        let starting = process.starting.lock().await;
        process.check_can_start()?;
        if !exec_id.is_empty() {
            return self.start_exec(&process).await;
        }
        let started = self.start_init(&process).await;
        drop(starting);
        if started.is_err() {
            // What is left of it is no task any more when the client learns of
            // this: it may then be deleted.
            let killed = async {
                let _ = self.kill("", libc::SIGKILL as u32, true).await;
                process.wait().await;
            };
            // Those that share a machine do not pay for one that stays in its kernel.
            if timeout(KILL_TIMEOUT, killed).await.is_err() && self.sandbox.is_first(&self.id) {
                self.sandbox.kill();
            }
        }
        started
    }

    async fn start_init(self: &Arc<Self>, init: &Process) -> Result<u32, Error> {
        let endpoints = self.endpoints.lock().unwrap_or_else(PoisonError::into_inner).take();
        let endpoints = endpoints.unwrap_or_default();
        init.set_io(ProcessIo::attach(self.sandbox.vsock(), &self.id, "", endpoints).await?);
        self.timeline.mark("streams attached");
        // Docker configures a network between creation and start.
        self.sandbox.follow_network().await?;
        self.timeline.mark("network there");
        self.sandbox.hold_to_quota().await?;
        self.sandbox.agent().start(&process_ref(&self.id, ""), &self.start_hooks).await?;
        self.timeline.mark("started");
        with_sandbox(&self.sandbox, self.hooks.after_start(init.pid())).await?;
        let pid = init.pid();
        init.set_running(pid);
        self.events.publish(TaskStart { container_id: self.id.clone(), pid, ..Default::default() });
        self.sandbox.set_phase(&self.id, state::Phase::Running);
        if let Some(attached) = self.attached.lock().unwrap_or_else(PoisonError::into_inner).as_mut() {
            attached.was_used();
        }
        tokio::spawn(self.clone().watch_oom_kills());
        let steps = self.timeline.steps();
        let steps: Vec<_> = steps.iter().map(|step| format!("{} {:.1}", step.name, step.ms)).collect();
        let label = format!("{}/{}", self.namespace, self.id);
        log::info!("{label}: started; ms since the request: {}", steps.join(", "));
        Ok(pid)
    }

    async fn start_exec(self: &Arc<Self>, process: &Arc<Process>) -> Result<u32, Error> {
        let exec_id = &process.exec_id;
        self.check_not_paused()?;
        let endpoints = Endpoints::open(&process.stdio, &self.namespace, &self.id).await?;
        let io = ProcessIo::attach(self.sandbox.vsock(), &self.id, exec_id, endpoints).await?;
        process.set_io(io);
        let guest_pid = match self.sandbox.agent().start(&process_ref(&self.id, exec_id), &[]).await {
            Ok(guest_pid) => guest_pid,
            Err(error) => {
                if error.is_unanswered() {
                    // It may run all the same: it is ended, and its end is told.
                    process.set_running(0);
                    tokio::spawn(self.clone().give_up(process.clone()));
                } else {
                    process.drop_io();
                }
                return Err(error.into());
            }
        };
        let pid = host_view(guest_pid);
        process.set_running(pid);
        self.events.publish(TaskExecStarted {
            container_id: self.id.clone(),
            exec_id: exec_id.clone(),
            pid,
            ..Default::default()
        });
        tokio::spawn(self.clone().follow(process.clone()));
        Ok(pid)
    }

    /// Registers a further process, `json` being its specification.
    pub async fn exec(&self, exec_id: &str, json: &[u8], stdio: Stdio) -> Result<(), Error> {
        if exec_id.is_empty() {
            return Err(Error::InvalidArgument("exec_id: is empty".into()));
        }
        if self.init.phase() != Phase::Running {
            return Err(Error::FailedPrecondition(format!("container {} is not running", self.id)));
        }
        self.check_not_paused()?;
        let exists = || Error::AlreadyExists(format!("container {} has an exec {exec_id} already", self.id));
        if self.execs().contains_key(exec_id) {
            return Err(exists());
        }
        let (mut message, not_applied) = spec::exec_process(json, &self.compat)?;
        log_not_applied(&format!("{}/{} exec {exec_id}", self.namespace, self.id), &not_applied);
        message.terminal = stdio.terminal;
        (message.stdin, message.stdout, message.stderr) =
            (!stdio.stdin.is_empty(), !stdio.stdout.is_empty(), !stdio.stderr.is_empty() && !stdio.terminal);
        if let Err(error) = self.sandbox.agent().create_exec(&self.id, exec_id, message).await {
            let taken = matches!(&error, AgentError::Refused { code: ttrpc::Code::ALREADY_EXISTS, .. });
            return Err(if taken { exists() } else { error.into() });
        }
        self.execs().insert(exec_id.to_owned(), Arc::new(Process::new(exec_id, stdio, 0)));
        self.events.publish(TaskExecAdded {
            container_id: self.id.clone(),
            exec_id: exec_id.to_owned(),
            ..Default::default()
        });
        Ok(())
    }

    fn check_not_paused(&self) -> Result<(), Error> {
        if self.is_paused() {
            return Err(Error::FailedPrecondition("cannot exec in a paused container".into()));
        }
        Ok(())
    }

    /// Sends a signal to a process, or to every one of the container.
    pub async fn kill(&self, exec_id: &str, signal: u32, all: bool) -> Result<(), Error> {
        let process = self.process(exec_id)?;
        let finished = || Error::NotFound("the process has finished already".into());
        if !exec_id.is_empty() && matches!(process.phase(), Phase::Created) {
            // It may just be starting: then it is this signal's.
            drop(process.starting.lock().await);
        }
        match process.phase() {
            Phase::Stopped(_) => return Err(finished()),
            Phase::Created if !exec_id.is_empty() => {
                return Err(Error::FailedPrecondition(format!("exec {exec_id} is not started")));
            }
            Phase::Created | Phase::Running => {}
        }
        if signal > 64 {
            return Err(Error::InvalidArgument(format!("signal: must be 0 to 64, is {signal}")));
        }
        if signal == 0 {
            return Ok(());
        }
        // Of one process there are no others.
        let all = all && exec_id.is_empty();
        let sent = self.sandbox.agent().signal(process_ref(&self.id, exec_id), signal, all);
        let lethal = signal == libc::SIGKILL as u32 && exec_id.is_empty();
        let answer = tokio::select! {
            answer = sent => answer,
            () = tokio::time::sleep(KILL_TIMEOUT), if lethal => {
                log::warn!("{}/{}: the guest ignores SIGKILL; stopping it", self.namespace, self.id);
                self.sandbox.kill();
                return Ok(());
            }
            _ = process.wait() => return Ok(()),
        };
        match answer {
            Err(error) if error.is_not_found() => Err(finished()),
            // There is nobody left to ask, and no process either.
            Err(error) if error.is_unanswered() && lethal => {
                log::warn!("{}/{}: {error}; stopping the machine", self.namespace, self.id);
                self.sandbox.kill();
                Ok(())
            }
            answer => {
                answer?;
                if lethal && self.sandbox.is_first(&self.id) {
                    let label = format!("{}/{}", self.namespace, self.id);
                    tokio::spawn(see_to_the_end(process, self.sandbox.clone(), label));
                }
                Ok(())
            }
        }
    }

    /// Tells a process's terminal its size.
    pub async fn resize(&self, exec_id: &str, width: u32, height: u32) -> Result<(), Error> {
        let process = self.process(exec_id)?;
        if !process.stdio.terminal {
            return Err(Error::FailedPrecondition("the process has no terminal".into()));
        }
        if process.exited().is_some() {
            return Err(Error::NotFound("the process has finished already".into()));
        }
        // 0 by 0 is what a client says that does not know its terminal's size.
        if (width > 0 || height > 0) && (exec_id.is_empty() || process.phase() == Phase::Running) {
            self.sandbox.agent().resize(process_ref(&self.id, exec_id), width, height).await?;
        }
        Ok(())
    }

    /// Lets a process's standard input end.
    pub fn close_stdin(&self, exec_id: &str) -> Result<(), Error> {
        let process = self.process(exec_id)?;
        process.close_stdin();
        Ok(())
    }

    /// The processes in the container. Of one that has ended, and where the guest
    /// does not answer at once, that is the first one alone: containerd takes a shim
    /// that lists none for one that has been left behind, and removes it.
    pub async fn processes(&self) -> Vec<Listed> {
        let first = || vec![Listed { pid: self.init.pid(), exec_id: None }];
        if self.init.exited().is_some() {
            return first();
        }
        let listed = match timeout(LIST_TIMEOUT, self.sandbox.agent().processes(&self.id)).await {
            Ok(Ok(listed)) => listed,
            Ok(Err(error)) => {
                log::warn!("{}/{}: listing its processes: {error}", self.namespace, self.id);
                return first();
            }
            Err(_) => {
                log::warn!("{}/{}: the guest does not list its processes", self.namespace, self.id);
                return first();
            }
        };
        let mut all = Vec::new();
        for process in listed {
            let exec_id = Some(process.exec_id).filter(|exec_id| !exec_id.is_empty());
            let exec = exec_id.as_ref().and_then(|exec_id| self.execs().get(exec_id).cloned());
            // What has a pid already keeps it.
            let pid = match exec {
                Some(exec) => exec.pid(),
                None if process.pid == self.init_guest_pid => self.init.pid(),
                None => host_view(process.pid),
            };
            all.push(Listed { pid, exec_id });
        }
        if all.is_empty() { first() } else { all }
    }

    /// Takes the ended container out of its sandbox, which goes on.
    pub async fn leave(&self) {
        // Where it cannot be asked, the guest has nothing to lose: what it still
        // has of the container, it has no use for.
        if let Err(error) = self.sandbox.agent().delete(&process_ref(&self.id, "")).await
            && !error.is_not_found()
        {
            log::warn!("{}/{}: its deletion in the guest: {error}", self.namespace, self.id);
        }
        let attached = self.attached.lock().unwrap_or_else(PoisonError::into_inner).take();
        if let Some(attached) = attached {
            self.sandbox.detach(attached).await;
        }
    }

    fn execs(&self) -> MutexGuard<'_, BTreeMap<String, Arc<Process>>> {
        self.execs.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn mount_message(layer: Layer) -> Mount {
    Mount {
        type_: layer.kind,
        source: layer.source,
        target: layer.target,
        options: layer.options,
        ..Default::default()
    }
}

fn io_message(stdio: &Stdio) -> TaskIO {
    TaskIO {
        stdin: stdio.stdin.clone(),
        stdout: stdio.stdout.clone(),
        stderr: stdio.stderr.clone(),
        terminal: stdio.terminal,
        ..Default::default()
    }
}

/// Hooks run as long as the sandbox does that they are about.
pub(crate) async fn with_sandbox(
    sandbox: &Sandbox,
    hooks: impl Future<Output = Result<(), HookError>>,
) -> Result<(), Error> {
    tokio::select! {
        biased;
        result = hooks => Ok(result?),
        reason = sandbox.ended() => Err(Error::SandboxEnded(reason)),
    }
}

/// A pid of the guest as it is told to the host.
fn host_view(guest_pid: u32) -> u32 {
    GUEST_PIDS_FROM.saturating_add(guest_pid)
}

/// Says which fields of a specification have no effect.
pub(crate) fn log_not_applied(label: &str, fields: &[String]) {
    if !fields.is_empty() {
        log::warn!("{label}: without effect in a microVM: {}", fields.join(", "));
    }
}
