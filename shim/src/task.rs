//! What one shim serves: its sandbox and the containers in it.

use std::{
    collections::BTreeMap,
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
    container::{Container, Create, log_not_applied, with_sandbox},
    delete,
    error::Error,
    events::{Events, timestamp},
    hooks::Hooks,
    io::{Endpoints, Stdio},
    options::Options,
    process::Exit,
    rootfs::Layer,
    sandbox::{Plan, Sandbox},
    spec::Bundle,
    timeline::Timeline,
};

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

/// The tasks of one shim.
pub struct Tasks {
    namespace: String,
    events: Events,
    slots: Mutex<Slots>,
    /// Signalled when containerd has no more use for the shim.
    done: Notify,
    /// Whether there is a container or one is being created.
    busy: watch::Sender<bool>,
}

#[derive(Default)]
struct Slots {
    containers: BTreeMap<String, Arc<Container>>,
    /// The one that is being created: its name is taken.
    creating: Option<String>,
}

impl Slots {
    fn are_used(&self) -> bool {
        !self.containers.is_empty() || self.creating.is_some()
    }
}

/// Frees the name when a creation ends, however it does.
struct Creating<'a>(&'a Tasks);

impl Drop for Creating<'_> {
    fn drop(&mut self) {
        self.0.change(|slots| slots.creating = None);
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
            busy: watch::Sender::new(false),
        }
    }

    /// Where events go.
    pub fn events(&self) -> &Events {
        &self.events
    }

    /// Creates a task with a sandbox of its own and returns its pid. Nothing is
    /// left of it on an error, nor when the future is dropped.
    pub async fn create(&self, create: CreateTask) -> Result<u32, Error> {
        let timeline = Arc::new(Timeline::begin());
        let label = format!("{}/{}", self.namespace, create.id);
        let _creating = self.reserve(&create.id)?;
        let config = create.options.config()?;
        let mut bundle = Bundle::load(&create.bundle, &create.id, &config.compat)?;
        bundle.settle_writes(config.writes, &create.layers);
        create.options.check(&bundle)?;
        bundle.check_file_systems(&config.guest.kernel)?;
        create.options.join_cgroup()?;
        check_terminal(&bundle, &create.stdio)?;
        log_not_applied(&label, &bundle.not_applied);
        timeline.mark("spec checked");
        let endpoints = Endpoints::open(&create.stdio, &self.namespace, &create.id).await?;
        let dir = config.host.state_dir.join(&self.namespace).join(&create.id);
        delete::note(&create.bundle, &dir);

        let plan = Plan::of(&self.namespace, &create.id, &bundle, &config.guest);
        let (sandbox, attached) =
            Sandbox::start_for(&config, plan, &bundle, &create.layers, timeline).await?;
        let hooks = Arc::new(Hooks::of(&bundle));
        let create = Create {
            hooks: hooks.clone(),
            bundle,
            layers: create.layers,
            attached,
            stdio: create.stdio,
            endpoints,
            compat: config.compat,
        };
        let container = async {
            with_sandbox(&sandbox, hooks.before_create(sandbox.pid())).await?;
            Container::create(sandbox.clone(), &self.namespace, create, self.events.clone()).await
        };
        let container = container.await;
        let container = match container {
            Ok(container) => container,
            Err(error) => {
                let error = better_reason(error, &sandbox).await;
                sandbox.close().await;
                hooks.after_stop().await;
                return Err(error);
            }
        };
        self.change(|slots| slots.containers.insert(container.id.clone(), container.clone()));
        log::info!("{label}: created");
        Ok(container.process("")?.pid())
    }

    /// A sandbox of this version holds one container.
    fn reserve(&self, id: &str) -> Result<Creating<'_>, Error> {
        let slots = self.slots();
        if slots.containers.contains_key(id) || slots.creating.as_deref() == Some(id) {
            return Err(Error::AlreadyExists(format!("container {id} exists already")));
        }
        if let Some(other) = slots.containers.keys().next().or(slots.creating.as_ref()) {
            return Err(Error::FailedPrecondition(format!(
                "this sandbox is container {other}'s; this version puts one container into each"
            )));
        }
        drop(slots);
        self.change(|slots| slots.creating = Some(id.to_owned()));
        Ok(Creating(self))
    }

    /// A container by its id.
    pub fn container(&self, id: &str) -> Result<Arc<Container>, Error> {
        let found = self.slots().containers.get(id).cloned();
        found.ok_or_else(|| Error::NotFound(format!("container {id} is not here")))
    }

    /// Forgets an ended process, with its container where it is the first one,
    /// and with the sandbox where that is the last.
    pub async fn delete(&self, id: &str, exec_id: &str) -> Result<(u32, Exit), Error> {
        let container = self.container(id)?;
        if !exec_id.is_empty() {
            return container.delete_exec(exec_id).await;
        }
        let (pid, exit) = container.end().await?;
        if self.change(|slots| slots.containers.remove(id)).is_none() {
            return Err(Error::NotFound(format!("container {id} was deleted meanwhile")));
        }
        container.sandbox().close().await;
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

    /// Ends the shim, unless it has something left to do.
    pub fn shut_down(&self) {
        if !self.slots().are_used() {
            self.done.notify_one();
        }
    }

    /// Waits until there has been nothing to do for `limit`.
    pub async fn idle(&self, limit: Duration) {
        let mut busy = self.busy.subscribe();
        loop {
            // The sender lives as long as `self`.
            let _ = busy.wait_for(|busy| !busy).await;
            if timeout(limit, busy.wait_for(|busy| *busy)).await.is_err() {
                return;
            }
        }
    }

    /// Waits for [`Tasks::shut_down`].
    pub async fn done(&self) {
        self.done.notified().await;
    }

    /// Ends whatever runs, as the shim itself has to go.
    pub async fn close_all(&self) {
        let containers: Vec<_> = self.slots().containers.values().cloned().collect();
        for container in containers {
            container.sandbox().kill();
            if let Ok(init) = container.process("") {
                init.wait().await;
            }
            container.sandbox().close().await;
        }
    }

    /// Every change of the slots, as it may be the end of idleness or its beginning.
    fn change<T>(&self, change: impl FnOnce(&mut Slots) -> T) -> T {
        let mut slots = self.slots();
        let result = change(&mut slots);
        self.busy.send_replace(slots.are_used());
        result
    }

    fn slots(&self) -> MutexGuard<'_, Slots> {
        self.slots.lock().unwrap_or_else(PoisonError::into_inner)
    }
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
    if !matches!(error, Error::Io(_) | Error::Agent(AgentError::Lost(_) | AgentError::Connect(_))) {
        return error;
    }
    match timeout(MOMENT, sandbox.ended()).await {
        Ok(reason) => Error::SandboxEnded(reason),
        Err(_) => error,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tasks() -> Tasks {
        Tasks::new("default", Events::to_nobody("default"))
    }

    #[tokio::test]
    async fn names_are_taken_while_they_are_created() {
        let tasks = tasks();
        let creating = tasks.reserve("a").unwrap();
        assert!(matches!(tasks.reserve("a"), Err(Error::AlreadyExists(_))));
        assert!(matches!(tasks.reserve("b"), Err(Error::FailedPrecondition(_))));
        tasks.shut_down();
        assert!(timeout(Duration::from_millis(10), tasks.done()).await.is_err());
        drop(creating);
        tasks.reserve("b").map(drop).unwrap();
        tasks.shut_down();
        tasks.done().await;
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
