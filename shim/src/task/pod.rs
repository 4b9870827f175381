//! A sandbox that is asked for by itself, before any container (containerd's Sandbox API): it has no pause container, and
//! lives until it is stopped.

use std::{
    fs, io,
    path::{Path, PathBuf},
    sync::Arc,
    time::{Duration, SystemTime},
};

use protobuf::well_known_types::any::Any;
use rvm_protocol::agent::ContainerStats;
use tokio::{sync::watch, time::timeout};

use super::{Home, Slots, Tasks};
use crate::{
    background::off_thread,
    config::Config,
    delete,
    error::Error,
    process::Exit,
    sandbox::{Plan, Sandbox},
    spec::{HOST_FILES, HostNetwork, PodConfig},
    timeline::Timeline,
};

/// How long a machine may take to say that it is there.
const PING_LIMIT: Duration = Duration::from_secs(5);

/// What containerd asks for when it creates a sandbox.
#[derive(Debug)]
pub struct CreateSandbox {
    /// Its id.
    pub id: String,
    /// Its bundle, in which there is no specification.
    pub bundle: PathBuf,
    /// The network namespace of the host that it is to have; empty for a new one.
    pub network: PathBuf,
    /// `runtime.v1.PodSandboxConfig`.
    pub options: Option<Any>,
}

/// How one is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Status {
    /// The monitor's; 0 before there is one.
    pub pid: u32,
    /// Whether it runs.
    pub ready: bool,
    /// When it was created.
    pub created_at: SystemTime,
    /// How it ended, if it has.
    pub exit: Option<Exit>,
}

/// One, from its creation until it is forgotten.
pub(super) struct Pod {
    id: String,
    stage: Stage,
    shared_pid: bool,
    pid: u32,
    created_at: SystemTime,
    exit: watch::Sender<Option<Exit>>,
}

enum Stage {
    /// It has been checked what is wanted.
    Created(Box<Wanted>),
    /// Its machine boots.
    Starting,
    /// It runs.
    Ready,
    /// It has ended, or never ran.
    Ended,
}

struct Wanted {
    bundle: PathBuf,
    config: Config,
    pod: PodConfig,
    network: Option<HostNetwork>,
}

impl Pod {
    /// Whether its containers may share a pid namespace.
    pub(super) fn shares_pids(&self) -> bool {
        self.shared_pid
    }

    fn end(&mut self, exit: Exit) {
        self.stage = Stage::Ended;
        self.exit.send_if_modified(|ended| {
            let first = ended.is_none();
            ended.get_or_insert(exit);
            first
        });
    }
}

impl Slots {
    fn pod(&mut self, id: &str) -> Result<&mut Pod, Error> {
        let found = self.pod.as_mut().filter(|pod| pod.id == id);
        found.ok_or_else(|| Error::NotFound(format!("sandbox {id} is not here")))
    }
}

impl Tasks {
    /// Checks what a sandbox is to be and takes its name. It costs nothing until it is started.
    pub async fn create_sandbox(&self, create: CreateSandbox) -> Result<(), Error> {
        let CreateSandbox { id, bundle, network, options } = create;
        let wanted = {
            let id = id.clone();
            off_thread(move || {
                let config = Config::load(None)?;
                let pod = PodConfig::parse(&id, options.as_ref())?;
                let network = (!network.as_os_str().is_empty())
                    .then(|| HostNetwork { field: "netns_path".into(), path: network });
                Ok::<_, Error>(Wanted { bundle, config, pod, network })
            })
            .await?
        };
        self.change(|slots| {
            if let Some(other) = &slots.pod {
                return Err(Error::AlreadyExists(format!("sandbox {} exists already", other.id)));
            }
            if slots.closing || !matches!(slots.home, Home::None) {
                return Err(Error::FailedPrecondition(format!(
                    "sandbox {id}: this shim serves something else already"
                )));
            }
            slots.shut_down = false;
            slots.pod = Some(Pod {
                id,
                shared_pid: wanted.pod.shared_pid,
                stage: Stage::Created(Box::new(wanted)),
                pid: 0,
                created_at: SystemTime::now(),
                exit: watch::Sender::new(None),
            });
            Ok(())
        })
    }

    /// Starts one that was created: boots its machine. Returns the monitor's pid and when it was created.
    pub async fn start_sandbox(self: &Arc<Self>, id: &str) -> Result<(u32, SystemTime), Error> {
        let _changing = self.pod_changing.lock().await;
        let wanted = self.change(|slots| {
            if slots.pod.is_none() {
                return Err(Error::FailedPrecondition(format!("sandbox {id} has not been created")));
            }
            let pod = slots.pod(id)?;
            match std::mem::replace(&mut pod.stage, Stage::Starting) {
                Stage::Created(wanted) => {
                    slots.home = Home::Starting(id.to_owned());
                    Ok(wanted)
                }
                other => {
                    pod.stage = other;
                    Err(Error::FailedPrecondition(format!("sandbox {id} has been started already")))
                }
            }
        })?;
        // A shim that is told to end waits for this, and closes what runs then.
        let (_reserved, started) = match self.reserve(id) {
            Ok(reserved) => (Some(reserved), self.boot(id, *wanted).await),
            Err(error) => (None, Err(error)),
        };
        self.change(|slots| {
            let pod = slots.pod(id)?;
            match started {
                Ok(sandbox) => {
                    pod.stage = Stage::Ready;
                    pod.pid = sandbox.monitor_pid();
                    let answer = (pod.pid, pod.created_at);
                    slots.home = Home::Running(sandbox.clone());
                    tokio::spawn(self.clone().follow_sandbox(id.to_owned(), sandbox));
                    Ok(answer)
                }
                Err(error) => {
                    pod.end(Exit::now(Exit::KILLED));
                    slots.home = Home::Closed;
                    Err(error)
                }
            }
        })
    }

    async fn boot(&self, id: &str, wanted: Wanted) -> Result<Arc<Sandbox>, Error> {
        let Wanted { bundle, config, pod, network } = wanted;
        let timeline = Arc::new(Timeline::begin());
        delete::note(&bundle, &config.host.state_dir.join(&self.namespace).join(id));
        let plan = Plan::of_pod(&self.namespace, id, &bundle, &pod, network, &config.guest);
        let sandbox = Sandbox::start(&config, plan, timeline).await?;
        let made = async {
            let files = sandbox.files();
            off_thread(move || write_files(&files, &pod)).await?;
            Ok::<_, Error>(sandbox.follow_network().await?)
        };
        match made.await {
            Ok(()) => Ok(sandbox),
            Err(error) => {
                sandbox.close().await;
                Err(error)
            }
        }
    }

    /// Notes the end of a machine that nobody has asked for.
    async fn follow_sandbox(self: Arc<Self>, id: String, sandbox: Arc<Sandbox>) {
        let reason = sandbox.ended().await;
        let known = self.change(|slots| {
            let Ok(pod) = slots.pod(&id) else { return false };
            let unasked = matches!(pod.stage, Stage::Ready);
            if unasked {
                pod.end(Exit::now(Exit::KILLED));
                slots.home = Home::Closed;
            }
            unasked
        });
        if known {
            log::error!("{}/{id}: {reason}", self.namespace);
            sandbox.close().await;
        }
    }

    /// Ends one with all its containers; of one that has ended already nothing is left to do.
    pub async fn stop_sandbox(&self, id: &str) -> Result<(), Error> {
        let _changing = self.pod_changing.lock().await;
        let running = self.change(|slots| {
            let pod = slots.pod(id)?;
            let was = std::mem::replace(&mut pod.stage, Stage::Ended);
            if matches!(was, Stage::Ready) {
                return Ok(match std::mem::replace(&mut slots.home, Home::Closed) {
                    Home::Running(sandbox) => Some(sandbox),
                    _ => None,
                });
            }
            Ok::<_, Error>(None)
        })?;
        if let Some(sandbox) = running {
            sandbox.close().await;
        }
        self.change(|slots| slots.pod(id).map(|pod| pod.end(Exit::now(0))))
    }

    /// How one is.
    pub fn sandbox_status(&self, id: &str) -> Result<Status, Error> {
        let mut slots = self.slots();
        let pod = slots.pod(id)?;
        Ok(Status {
            pid: pod.pid,
            ready: matches!(pod.stage, Stage::Ready),
            created_at: pod.created_at,
            exit: *pod.exit.borrow(),
        })
    }

    /// Waits for the end of one.
    pub async fn wait_sandbox(&self, id: &str) -> Result<Exit, Error> {
        let mut exit = self.slots().pod(id)?.exit.subscribe();
        let ended = exit.wait_for(Option::is_some).await.ok().and_then(|exit| *exit);
        ended.ok_or_else(|| Error::NotFound(format!("sandbox {id} is gone")))
    }

    /// Asks one whether it is there.
    pub async fn ping_sandbox(&self, id: &str) -> Result<(), Error> {
        let sandbox = self.running_sandbox(id)?;
        let silent = || Error::SandboxEnded(format!("it does not answer within {} s", PING_LIMIT.as_secs()));
        // What it is asked about it need not have.
        match timeout(PING_LIMIT, sandbox.agent().processes(id)).await.map_err(|_| silent())? {
            Err(error) if error.is_unanswered() => Err(error.into()),
            _ => Ok(()),
        }
    }

    /// What the machine of one uses of the host.
    pub async fn sandbox_stats(&self, id: &str) -> Result<ContainerStats, Error> {
        let sandbox = self.running_sandbox(id)?;
        Ok(off_thread(move || sandbox.host_stats()).await)
    }

    /// Lets the shim end with one that was stopped, whatever is left in it.
    pub fn shut_down_sandbox(&self, id: &str) -> Result<(), Error> {
        self.slots().pod(id)?;
        self.change(|slots| {
            slots.pod = None;
            slots.shut_down = true;
            // Their machine is gone; nobody asks for them any more.
            slots.containers.clear();
        });
        Ok(())
    }

    fn running_sandbox(&self, id: &str) -> Result<Arc<Sandbox>, Error> {
        let mut slots = self.slots();
        slots.pod(id)?;
        match &slots.home {
            Home::Running(sandbox) => Ok(sandbox.clone()),
            _ => Err(Error::FailedPrecondition(format!("sandbox {id} does not run"))),
        }
    }
}

fn write_files(dir: &Path, pod: &PodConfig) -> Result<(), Error> {
    let host = |name: &str| fs::read(Path::new("/etc").join(name)).unwrap_or_default();
    let content = |name: &str| match name {
        "hostname" if !pod.hostname.is_empty() => format!("{}\n", pod.hostname).into_bytes(),
        "resolv.conf" => pod.resolv_conf.clone().map_or_else(|| host(name), String::into_bytes),
        name => host(name),
    };
    let write = || -> io::Result<()> {
        fs::create_dir(dir)?;
        HOST_FILES.iter().try_for_each(|name| fs::write(dir.join(name), content(name)))
    };
    write().map_err(|error| Error::FailedPrecondition(format!("{}: {error}", dir.display())))
}
