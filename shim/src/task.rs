//! What one shim serves: its sandbox and the containers in it.

mod pod;

use std::{
    collections::{BTreeMap, BTreeSet},
    path::PathBuf,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use containerd_shim_protos::events::task::TaskDelete;
use tokio::{
    sync::{Notify, watch},
    time::timeout,
};

use crate::{
    background::off_thread,
    config::Config,
    container::{Container, Create, log_not_applied, with_sandbox},
    delete,
    error::Error,
    events::{Events, timestamp},
    hooks::Hooks,
    io::{Endpoints, Stdio},
    options::Options,
    process::Exit,
    rootfs::Layer,
    sandbox::{Plan, Sandbox, SandboxError},
    share::ShareError,
    spec::{Bundle, Pinned, Pod, Role},
    timeline::Timeline,
};

pub use pod::{CreateSandbox, Status as SandboxStatus};

/// What containerd asks for when it creates a task.
#[derive(Debug)]
pub struct CreateTask {
    /// The container's id.
    pub id: String,
    /// Its bundle.
    pub bundle: PathBuf,
    /// Its layers.
    pub layers: Vec<Layer>,
    /// Its streams.
    pub stdio: Stdio,
    /// What its client asks for beside the specification.
    pub options: Options,
}

impl CreateTask {
    /// Reads and checks what it names, which may lie on any file system of the host's.
    fn read(self, pod: &Pod) -> Result<(Self, Config, Bundle), Error> {
        let config = self.options.config()?;
        let mut bundle = Bundle::load_in(pod, &self.bundle, &self.id, &config.compat)?;
        bundle
            .settle_writes(config.writes, &self.layers)
            .map_err(|error| SandboxError::from(ShareError::from(error)))?;
        self.options.check(&bundle)?;
        bundle.check_file_systems(&config.guest.kernel)?;
        check_terminal(&bundle, &self.stdio)?;
        Ok((self, config, bundle))
    }
}

/// The tasks of one shim.
pub struct Tasks {
    namespace: String,
    events: Events,
    slots: Mutex<Slots>,
    /// Signalled when containerd has no more use for the shim.
    done: Notify,
    work: watch::Sender<Work>,
    /// Held while a sandbox that was asked for by itself is started or stopped.
    pod_changing: tokio::sync::Mutex<()>,
}

/// Whether there is something to do.
#[derive(Clone, Copy, Debug, Default)]
struct Work {
    /// There is a container, or a sandbox that was asked for by itself.
    kept: bool,
    /// One is being created or deleted.
    changing: bool,
}

impl Work {
    fn is_any(self) -> bool {
        self.kept || self.changing
    }
}

#[derive(Default)]
struct Slots {
    containers: BTreeMap<String, Arc<Container>>,
    /// Those that are being created or deleted: their names are taken.
    changing: BTreeSet<String>,
    home: Home,
    /// The sandbox that was asked for by itself, if it was.
    pod: Option<pod::Pod>,
    /// Whether containerd wants the shim to end as soon as nothing is left.
    shut_down: bool,
    /// Whether the shim is ending, whatever is left.
    closing: bool,
}

/// The sandbox of a shim.
#[derive(Default)]
enum Home {
    /// There is none yet.
    #[default]
    None,
    /// It is made for this container, or is that one itself.
    Starting(String),
    /// It runs, as long as the container that it was made for is there.
    Running(Arc<Sandbox>),
    /// It is ending; containers that were in it are still to be deleted.
    Closed,
}

impl Slots {
    fn work(&self) -> Work {
        let kept = !self.containers.is_empty() || self.pod.is_some();
        Work { kept, changing: !self.changing.is_empty() }
    }
}

/// Frees the name when a creation or a deletion ends, however it does.
struct Changing<'a>(&'a Tasks, String);

impl Drop for Changing<'_> {
    fn drop(&mut self) {
        self.0.change(|slots| {
            slots.changing.remove(&self.1);
            let given_up = matches!(&slots.home, Home::Starting(id) if *id == self.1);
            if given_up || matches!(slots.home, Home::Closed) && !slots.work().is_any() {
                slots.home = Home::None;
            }
        });
    }
}

impl Tasks {
    /// No tasks yet.
    pub fn new(namespace: &str, events: Events) -> Self {
        Self {
            namespace: namespace.into(),
            events,
            slots: Mutex::default(),
            done: Notify::new(),
            work: watch::Sender::default(),
            pod_changing: tokio::sync::Mutex::default(),
        }
    }

    /// Where events go.
    pub fn events(&self) -> &Events {
        &self.events
    }

    /// Creates a task, with a sandbox of its own or in the one that its annotations
    /// name, and returns its pid. Nothing is left of it on an error, nor when the
    /// future is dropped.
    pub async fn create(&self, create: CreateTask) -> Result<u32, Error> {
        let timeline = Arc::new(Timeline::begin());
        let label = format!("{}/{}", self.namespace, create.id);
        let _creating = self.reserve(&create.id)?;
        let pod = self.pod();
        let (create, config, bundle) = off_thread(move || create.read(&pod)).await?;
        let home = self.home_of(&bundle)?;
        if home.is_none() {
            create.options.join_cgroup()?;
        }
        log_not_applied(&label, &bundle.not_applied);
        timeline.mark("spec checked");
        let endpoints = Endpoints::open(&create.stdio, &self.namespace, &create.id).await?;
        let first = home.as_ref().map_or(create.id.as_str(), |home| home.first());
        let dir = config.host.state_dir.join(&self.namespace).join(first);
        delete::note(&create.bundle, &dir);

        let (sandbox, attached) = match home {
            Some(sandbox) => {
                let preparing = sandbox.prepare(&config, &bundle, &create.layers, &timeline)?;
                let attached = sandbox.attach(preparing).await?;
                sandbox.add_member(&create.id, &bundle.dir, attached.holder().id());
                (sandbox, attached)
            }
            None => {
                let plan = Plan::of(&self.namespace, &create.id, &bundle, &config.guest);
                let timeline = timeline.clone();
                Sandbox::start_for(&config, plan, &bundle, &create.layers, timeline).await?
            }
        };
        let (id, pid) = (create.id.clone(), attached.holder().id().pid);
        let hooks = Arc::new(Hooks::of(&bundle));
        let create = Create {
            hooks: hooks.clone(),
            bundle,
            layers: create.layers,
            stdio: create.stdio,
            endpoints,
            compat: config.compat,
            timeline,
        };
        let mut attached = Some(attached);
        let container = async {
            with_sandbox(&sandbox, hooks.before_create(pid)).await?;
            // Hooks may have put something into its namespace.
            sandbox.sync_network().await?;
            Container::create(&sandbox, &self.namespace, create, &mut attached, self.events.clone()).await
        };
        let container = match container.await {
            Ok(container) => container,
            Err(error) => {
                let error = better_reason(error, &sandbox).await;
                match attached {
                    // It may be in the guest, or come there: it is ended first.
                    Some(attached) if !sandbox.is_first(&id) && error.is_unanswered() => drop(attached),
                    Some(attached) if !sandbox.is_first(&id) => sandbox.detach(attached).await,
                    _ => sandbox.close().await,
                }
                hooks.after_stop().await;
                return Err(error);
            }
        };
        self.change(|slots| {
            if sandbox.is_first(&id) {
                slots.home = Home::Running(sandbox);
            }
            slots.containers.insert(id, container.clone());
        });
        log::info!("{label}: created");
        Ok(pid)
    }

    /// Takes a name.
    fn reserve(&self, id: &str) -> Result<Changing<'_>, Error> {
        let taken = |slots: &Slots| slots.containers.contains_key(id) || slots.changing.contains(id);
        if taken(&self.slots()) {
            return Err(Error::AlreadyExists(format!("container {id} exists already")));
        }
        if self.slots().closing {
            return Err(Error::FailedPrecondition("the shim was told to end".into()));
        }
        self.change(|slots| {
            slots.changing.insert(id.to_owned());
            slots.shut_down = false;
        });
        Ok(Changing(self, id.to_owned()))
    }

    /// The sandbox a container comes to; none where one is to be made for it, which
    /// is then taken note of.
    fn home_of(&self, bundle: &Bundle) -> Result<Option<Arc<Sandbox>>, Error> {
        let mut slots = self.slots();
        let id = &bundle.container.container_id;
        match (&bundle.role, &slots.home) {
            (Role::Member { sandbox }, Home::Running(running)) if running.is_first(sandbox) => {
                Ok(Some(running.clone()))
            }
            (Role::Member { sandbox }, _) => Err(Error::FailedPrecondition(format!(
                "sandbox {sandbox}, which the annotations of container {id} name, does not run here"
            ))),
            (_, Home::None) => {
                slots.home = Home::Starting(id.clone());
                Ok(None)
            }
            (_, Home::Starting(other)) => Err(other_home(id, other)),
            (_, Home::Running(sandbox)) => Err(other_home(id, sandbox.first())),
            (_, Home::Closed) => Err(Error::FailedPrecondition("the sandbox has ended".into())),
        }
    }

    /// What a specification may refer to.
    fn pod(&self) -> Pod {
        let slots = self.slots();
        let Home::Running(sandbox) = &slots.home else { return Pod::default() };
        let own = slots.pod.as_ref();
        Pod {
            shared_pid: own.is_some_and(pod::Pod::shares_pids),
            files: own.map(|_| sandbox.files()),
            monitor: Some(sandbox.monitor_pid()),
            neighbours: slots.containers.values().map(|container| container.neighbour()).collect(),
            shm: sandbox.shm().cloned(),
            network: sandbox.network_identity(),
            users: sandbox.users().cloned(),
            pinned: Pinned::Those(sandbox.pinned().to_vec()),
        }
    }

    /// A container by its id.
    pub fn container(&self, id: &str) -> Result<Arc<Container>, Error> {
        let found = self.slots().containers.get(id).cloned();
        found.ok_or_else(|| Error::NotFound(format!("container {id} is not here")))
    }

    /// Forgets an ended process, with its container where it is the first one,
    /// and with the sandbox where that was made for the container.
    pub async fn delete(&self, id: &str, exec_id: &str) -> Result<(u32, Exit), Error> {
        let container = self.container(id)?;
        if !exec_id.is_empty() {
            return container.delete_exec(exec_id).await;
        }
        let (pid, exit) = container.end().await?;
        let sandbox = container.sandbox();
        let _deleting = self.forget(&container)?;
        match sandbox.is_first(id) {
            true => sandbox.close().await,
            false => container.leave().await,
        }
        container.hooks().after_stop().await;
        self.events.publish(TaskDelete {
            container_id: id.to_owned(),
            pid,
            exit_status: exit.status,
            exited_at: Some(timestamp(exit.at)).into(),
            ..Default::default()
        });
        log::info!("{}/{id}: deleted, exit status {}", self.namespace, exit.status);
        Ok((pid, exit))
    }

    /// Strikes a container off, whose name stays taken while it is being deleted.
    fn forget(&self, container: &Container) -> Result<Changing<'_>, Error> {
        let id = &container.id;
        let known = self.change(|slots| {
            let known = slots.containers.remove(id).is_some();
            if known {
                slots.changing.insert(id.clone());
                if container.sandbox().is_first(id) {
                    slots.home = Home::Closed;
                }
            }
            known
        });
        match known {
            true => Ok(Changing(self, id.clone())),
            false => Err(Error::NotFound(format!("container {id} was deleted meanwhile"))),
        }
    }

    /// Ends the shim as soon as it has nothing left to do.
    pub fn shut_down(&self) {
        self.change(|slots| slots.shut_down = true);
    }

    /// Waits until there has been nothing to do for `limit`.
    pub async fn idle(&self, limit: Duration) {
        let mut work = self.work.subscribe();
        loop {
            // The sender lives as long as `self`.
            let _ = work.wait_for(|work| !work.is_any()).await;
            if timeout(limit, work.wait_for(|work| work.is_any())).await.is_err() {
                return;
            }
        }
    }

    /// Waits for [`Tasks::shut_down`].
    pub async fn done(&self) {
        self.done.notified().await;
    }

    /// Ends whatever runs, as the shim itself has to go: what belongs on the host is
    /// written first. What is being deleted, or created, is so to its end, its hooks
    /// among it, as long as that takes no longer than `limit`.
    pub async fn close_all(&self, limit: Duration) {
        self.change(|slots| slots.closing = true);
        self.close_home().await;
        let mut work = self.work.subscribe();
        if timeout(limit, work.wait_for(|work| !work.changing)).await.is_err() {
            log::warn!("ending: what is being created or deleted takes longer than {} s", limit.as_secs());
        }
        // Its creation may have come to its end meanwhile.
        self.close_home().await;
        let containers: Vec<_> = self.slots().containers.values().cloned().collect();
        for container in containers {
            if let Ok(init) = container.process("") {
                init.wait().await;
            }
        }
    }

    async fn close_home(&self) {
        let home = self.change(|slots| match &slots.home {
            Home::Running(_) => std::mem::replace(&mut slots.home, Home::Closed),
            Home::None | Home::Starting(_) | Home::Closed => Home::None,
        });
        if let Home::Running(sandbox) = home {
            sandbox.close().await;
        }
    }

    /// Every change of the slots, as it may be the end of idleness or its beginning.
    fn change<T>(&self, change: impl FnOnce(&mut Slots) -> T) -> T {
        let mut slots = self.slots();
        let result = change(&mut slots);
        self.work.send_replace(slots.work());
        if slots.shut_down && !slots.work().is_any() {
            self.done.notify_one();
        }
        result
    }

    fn slots(&self) -> MutexGuard<'_, Slots> {
        self.slots.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn other_home(id: &str, other: &str) -> Error {
    Error::FailedPrecondition(format!(
        "this shim's sandbox is container {other}'s, and no annotation of container {id} says that it joins it"
    ))
}

/// Specification and request both say whether there is a terminal.
fn check_terminal(bundle: &Bundle, stdio: &Stdio) -> Result<(), Error> {
    let wanted = bundle.container.process.terminal;
    if wanted == stdio.terminal {
        return Ok(());
    }
    Err(Error::InvalidArgument(format!(
        "process.terminal: is {wanted}, but the task is created {} a terminal",
        if stdio.terminal { "with" } else { "without" }
    )))
}

/// What fails because the machine has gone is told as that.
async fn better_reason(error: Error, sandbox: &Sandbox) -> Error {
    use crate::agent::AgentError;
    const MOMENT: Duration = Duration::from_millis(500);
    if !matches!(error, Error::Io(_) | Error::Agent(AgentError::Lost { .. } | AgentError::Connect(_))) {
        return error;
    }
    match timeout(MOMENT, sandbox.ended()).await {
        Ok(reason) => Error::SandboxEnded(reason),
        Err(_) => error,
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;

    fn tasks() -> Tasks {
        Tasks::new("default", Events::to_nobody("default"))
    }

    #[tokio::test]
    async fn names_are_taken_while_they_are_created() {
        let tasks = tasks();
        let creating = tasks.reserve("a").unwrap();
        assert!(matches!(tasks.reserve("a"), Err(Error::AlreadyExists(_))));
        // Who asks for the end while there is work gets it when there is none.
        tasks.shut_down();
        assert!(timeout(Duration::from_millis(10), tasks.done()).await.is_err());
        drop(creating);
        tasks.done().await;
        tasks.reserve("a").map(drop).unwrap();
    }

    /// A shim that is told to end lets a deletion come to its end, and begins nothing.
    #[tokio::test]
    async fn an_end_waits_for_what_is_being_changed() {
        let tasks = Arc::new(tasks());
        let deleting = tasks.reserve("a").unwrap();
        let closing = tokio::spawn({
            let tasks = tasks.clone();
            async move { tasks.close_all(Duration::from_secs(60)).await }
        });
        tokio::time::sleep(Duration::from_millis(10)).await;
        assert!(!closing.is_finished());
        assert!(matches!(tasks.reserve("b"), Err(Error::FailedPrecondition(_))));
        drop(deleting);
        closing.await.unwrap();
        let tasks = Arc::new(self::tasks());
        let _hanging = tasks.reserve("a").unwrap();
        timeout(Duration::from_secs(10), tasks.close_all(Duration::from_millis(10))).await.unwrap();
    }

    #[tokio::test]
    async fn one_sandbox_is_made_and_others_join_only_that() {
        let tasks = tasks();
        let bundle = |id: &str, annotations: serde_json::Value| {
            let spec = serde_json::json!({
                "ociVersion": "1.0.2",
                "process": {"cwd": "/", "args": ["true"], "user": {"uid": 0, "gid": 0}},
                "root": {"path": "rootfs"},
                "linux": {"namespaces": [{"type": "mount"}, {"type": "network"}]},
                "annotations": annotations,
            });
            Bundle::parse(Path::new("/b"), id, spec.to_string().as_bytes(), &Default::default()).unwrap()
        };
        let member = bundle(
            "b",
            serde_json::json!({"io.kubernetes.cri.container-type": "container",
                               "io.kubernetes.cri.sandbox-id": "a"}),
        );
        let refused = |bundle: &Bundle| tasks.home_of(bundle).err().unwrap().to_string();
        assert_eq!(
            refused(&member),
            "sandbox a, which the annotations of container b name, does not run here"
        );
        let creating = tasks.reserve("a").unwrap();
        assert!(tasks.home_of(&bundle("a", serde_json::json!({}))).unwrap().is_none());
        assert!(refused(&member).contains("does not run here"), "it does not yet");
        let other = refused(&bundle("c", serde_json::json!({})));
        assert!(other.starts_with("this shim's sandbox is container a's"), "{other}");
        drop(creating);
        assert!(tasks.home_of(&bundle("c", serde_json::json!({}))).unwrap().is_none());
    }

    #[tokio::test]
    async fn a_shim_without_work_is_idle_and_one_with_work_is_not() {
        const SOON: Duration = Duration::from_millis(30);
        let tasks = tasks();
        let creating = tasks.reserve("a").unwrap();
        assert!(timeout(SOON * 3, tasks.idle(SOON)).await.is_err());
        drop(creating);
        timeout(SOON * 100, tasks.idle(SOON)).await.unwrap();
    }
}
