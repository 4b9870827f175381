//! containerd's Task API: messages in, calls to [`Tasks`], messages out.

use std::{collections::HashMap, sync::Arc};

use async_trait::async_trait;
use containerd_shim_protos::{
    api::{
        CheckpointTaskRequest, CloseIORequest, ConnectRequest, ConnectResponse, CreateTaskRequest,
        CreateTaskResponse, DeleteRequest, DeleteResponse, ExecProcessRequest, KillRequest, PauseRequest,
        PidsRequest, PidsResponse, ProcessInfo, ResizePtyRequest, ResumeRequest, ShutdownRequest,
        StartRequest, StartResponse, StateRequest, StateResponse, StatsRequest, StatsResponse, Status,
        UpdateTaskRequest, WaitRequest, WaitResponse,
    },
    sandbox_async::create_sandbox,
    shim::oci::ProcessDetails,
    shim_async::{Task, create_task},
    types::mount::Mount,
};
use protobuf::{
    Message,
    well_known_types::{any::Any, empty::Empty},
};
use ttrpc::asynchronous::{Service, TtrpcContext};

use crate::{
    error::Error,
    events::timestamp,
    io::Stdio,
    name,
    options::Options,
    process::Phase,
    rootfs::Layer,
    sandbox_service::SandboxService,
    task::{CreateTask, Tasks},
};

/// The Task API's name since containerd 2.0, which is how it is generated here.
const TASK_V3: &str = "containerd.task.v3.Task";
/// Its name in containerd 1.6 and 1.7; the messages are the same.
const TASK_V2: &str = "containerd.task.v2.Task";

/// Services a shim may have and this one does not. Clients ask for them to find
/// out, and take UNIMPLEMENTED for an answer: what a service without methods
/// says, while ttrpc's own for one it was never told of is INVALID_ARGUMENT.
const ABSENT: [&str; 6] = [
    "containerd.runtime.linux.shim.v1.Shim",
    "containerd.services.mounts.v1.Mounts",
    "containerd.services.streaming.v1.Streaming",
    "containerd.services.transfer.v1.Transfer",
    "grpc.health.v1.Health",
    "grpc.reflection.v1.ServerReflection",
];

/// The services of one shim, by their names.
pub fn services(tasks: Arc<Tasks>) -> HashMap<String, Service> {
    let sandboxes = tasks.clone();
    let service: Arc<dyn Task + Send + Sync> = Arc::new(TaskService { tasks });
    let absent = |name: &str| (name.to_owned(), Service { methods: HashMap::new(), streams: HashMap::new() });
    let mut services: HashMap<_, _> = ABSENT.into_iter().map(absent).collect();
    services.extend(create_task(service.clone()));
    services.extend(create_sandbox(Arc::new(SandboxService { tasks: sandboxes })));
    if let Some(older) = create_task(service).remove(TASK_V3) {
        services.insert(TASK_V2.to_owned(), older);
    }
    services
}

struct TaskService {
    tasks: Arc<Tasks>,
}

/// Does `work` to its end even where the request is given up meanwhile, as it
/// is when containerd restarts: half of a deletion helps nobody.
pub(crate) async fn to_its_end<T: Send + 'static>(
    work: impl Future<Output = Result<T, Error>> + Send + 'static,
) -> ttrpc::Result<T> {
    match tokio::spawn(work).await {
        Ok(result) => Ok(result?),
        Err(error) => Err(ttrpc::Error::Others(format!("the request was not finished: {error}"))),
    }
}

fn unimplemented<T>(message: &'static str) -> ttrpc::Result<T> {
    Err(Error::Unimplemented(message).into())
}

#[async_trait]
impl Task for TaskService {
    async fn state(&self, _: &TtrpcContext, request: StateRequest) -> ttrpc::Result<StateResponse> {
        let container = self.tasks.container(&request.id)?;
        let process = container.process(&request.exec_id)?;
        let stdio = process.stdio.clone();
        let mut response = StateResponse {
            id: request.id,
            bundle: container.bundle.to_string_lossy().into_owned(),
            pid: process.pid(),
            stdin: stdio.stdin,
            stdout: stdio.stdout,
            stderr: stdio.stderr,
            terminal: stdio.terminal,
            exec_id: request.exec_id,
            ..Default::default()
        };
        let status = match process.phase() {
            Phase::Created => Status::CREATED,
            // An exec stands still with its container.
            Phase::Running if container.is_paused() => Status::PAUSED,
            Phase::Running => Status::RUNNING,
            Phase::Stopped(exit) => {
                response.exit_status = exit.status;
                response.exited_at = Some(timestamp(exit.at)).into();
                Status::STOPPED
            }
        };
        response.status = status.into();
        Ok(response)
    }

    async fn create(
        &self,
        _: &TtrpcContext,
        request: CreateTaskRequest,
    ) -> ttrpc::Result<CreateTaskResponse> {
        if !request.checkpoint.is_empty() {
            // containerd takes UNIMPLEMENTED for an older shim, and creates once more.
            let reason = "checkpoint: a microVM cannot be restored from a checkpoint of a process";
            return Err(Error::InvalidArgument(reason.into()).into());
        }
        name::check("id", &request.id).map_err(Error::from)?;
        let create = CreateTask {
            id: request.id,
            bundle: request.bundle.into(),
            layers: request.rootfs.into_iter().map(layer).collect(),
            stdio: Stdio {
                stdin: request.stdin,
                stdout: request.stdout,
                stderr: request.stderr,
                terminal: request.terminal,
            },
            options: Options::parse(request.options.as_ref())?,
        };
        let pid = self.tasks.create(create).await.inspect_err(|error| log::warn!("create: {error}"))?;
        Ok(CreateTaskResponse { pid, ..Default::default() })
    }

    async fn start(&self, _: &TtrpcContext, request: StartRequest) -> ttrpc::Result<StartResponse> {
        let container = self.tasks.container(&request.id)?;
        let pid = to_its_end(async move { container.start(&request.exec_id).await }).await?;
        Ok(StartResponse { pid, ..Default::default() })
    }

    async fn delete(&self, _: &TtrpcContext, request: DeleteRequest) -> ttrpc::Result<DeleteResponse> {
        let tasks = self.tasks.clone();
        let (pid, exit) =
            to_its_end(async move { tasks.delete(&request.id, &request.exec_id).await }).await?;
        Ok(DeleteResponse {
            pid,
            exit_status: exit.status,
            exited_at: Some(timestamp(exit.at)).into(),
            ..Default::default()
        })
    }

    async fn exec(&self, _: &TtrpcContext, request: ExecProcessRequest) -> ttrpc::Result<Empty> {
        name::check("exec_id", &request.exec_id).map_err(Error::from)?;
        let container = self.tasks.container(&request.id)?;
        let stdio = Stdio {
            stdin: request.stdin,
            stdout: request.stdout,
            stderr: request.stderr,
            terminal: request.terminal,
        };
        let spec = request.spec.unwrap_or_default();
        to_its_end(async move { container.exec(&request.exec_id, &spec.value, stdio).await }).await?;
        Ok(Empty::new())
    }

    async fn kill(&self, _: &TtrpcContext, request: KillRequest) -> ttrpc::Result<Empty> {
        let container = self.tasks.container(&request.id)?;
        to_its_end(async move { container.kill(&request.exec_id, request.signal, request.all).await })
            .await?;
        Ok(Empty::new())
    }

    async fn wait(&self, _: &TtrpcContext, request: WaitRequest) -> ttrpc::Result<WaitResponse> {
        let process = self.tasks.container(&request.id)?.process(&request.exec_id)?;
        let Some(exit) = process.wait().await else {
            return Err(Error::NotFound("the process is gone".into()).into());
        };
        Ok(WaitResponse {
            exit_status: exit.status,
            exited_at: Some(timestamp(exit.at)).into(),
            ..Default::default()
        })
    }

    async fn pids(&self, _: &TtrpcContext, request: PidsRequest) -> ttrpc::Result<PidsResponse> {
        let listed = self.tasks.container(&request.id)?.processes().await;
        let mut response = PidsResponse::new();
        for process in listed {
            let mut info = ProcessInfo { pid: process.pid, ..Default::default() };
            if let Some(exec_id) = process.exec_id {
                let details = ProcessDetails { exec_id, ..Default::default() };
                info.info = Some(Any {
                    type_url: "containerd.runc.v1.ProcessDetails".into(),
                    value: details.write_to_bytes().unwrap_or_default(),
                    ..Default::default()
                })
                .into();
            }
            response.processes.push(info);
        }
        Ok(response)
    }

    async fn resize_pty(&self, _: &TtrpcContext, request: ResizePtyRequest) -> ttrpc::Result<Empty> {
        let container = self.tasks.container(&request.id)?;
        container.resize(&request.exec_id, request.width, request.height).await?;
        Ok(Empty::new())
    }

    async fn close_io(&self, _: &TtrpcContext, request: CloseIORequest) -> ttrpc::Result<Empty> {
        if request.stdin {
            self.tasks.container(&request.id)?.close_stdin(&request.exec_id)?;
        }
        Ok(Empty::new())
    }

    async fn connect(&self, _: &TtrpcContext, request: ConnectRequest) -> ttrpc::Result<ConnectResponse> {
        // What containerd does first with a shim it has found again.
        self.tasks.events().containerd_is_back();
        let task_pid = match self.tasks.container(&request.id) {
            Ok(container) => container.process("")?.pid(),
            Err(_) => 0,
        };
        Ok(ConnectResponse {
            shim_pid: std::process::id(),
            task_pid,
            version: env!("CARGO_PKG_VERSION").into(),
            ..Default::default()
        })
    }

    async fn shutdown(&self, _: &TtrpcContext, _: ShutdownRequest) -> ttrpc::Result<Empty> {
        self.tasks.shut_down();
        Ok(Empty::new())
    }

    async fn pause(&self, _: &TtrpcContext, request: PauseRequest) -> ttrpc::Result<Empty> {
        let container = self.tasks.container(&request.id)?;
        to_its_end(async move { container.pause().await }).await?;
        Ok(Empty::new())
    }

    async fn resume(&self, _: &TtrpcContext, request: ResumeRequest) -> ttrpc::Result<Empty> {
        let container = self.tasks.container(&request.id)?;
        to_its_end(async move { container.resume().await }).await?;
        Ok(Empty::new())
    }

    async fn update(&self, _: &TtrpcContext, request: UpdateTaskRequest) -> ttrpc::Result<Empty> {
        let container = self.tasks.container(&request.id)?;
        let resources = request.resources.unwrap_or_default();
        to_its_end(async move { container.update(&resources.value).await }).await?;
        Ok(Empty::new())
    }

    async fn stats(&self, _: &TtrpcContext, request: StatsRequest) -> ttrpc::Result<StatsResponse> {
        let stats = self.tasks.container(&request.id)?.stats().await?;
        Ok(StatsResponse { stats: Some(stats).into(), ..Default::default() })
    }

    async fn checkpoint(&self, _: &TtrpcContext, _: CheckpointTaskRequest) -> ttrpc::Result<Empty> {
        unimplemented("checkpoint: processes of a microVM cannot be checkpointed")
    }
}

fn layer(mount: Mount) -> Layer {
    Layer { kind: mount.type_, source: mount.source, target: mount.target, options: mount.options }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::events::Events;
    use ttrpc::asynchronous::{Client, Server};

    #[tokio::test]
    async fn both_names_of_the_api_are_served() {
        let services = services(Arc::new(Tasks::new("default", Events::to_nobody("default"))));
        let mut names: Vec<_> = services.keys().map(String::as_str).collect();
        names.retain(|name| !ABSENT.contains(name));
        names.sort_unstable();
        assert_eq!(names, ["containerd.runtime.sandbox.v1.Sandbox", TASK_V2, TASK_V3]);
        assert_eq!(services[TASK_V2].methods.len(), services[TASK_V3].methods.len());
    }

    /// What a shim without tasks answers.
    async fn refusal(service: &str, method: &str, request: &impl Message) -> ttrpc::Status {
        let dir = tempfile::tempdir().unwrap();
        let address = format!("unix://{}", dir.path().join("s").display());
        let tasks = Arc::new(Tasks::new("default", Events::to_nobody("default")));
        let mut server = Server::new().bind(&address).unwrap().register_service(services(tasks));
        server.start().await.unwrap();
        let request = ttrpc::Request {
            service: service.into(),
            method: method.into(),
            timeout_nano: 10_000_000_000,
            payload: request.write_to_bytes().unwrap(),
            ..Default::default()
        };
        match Client::connect(&address).await.unwrap().request(request).await {
            Err(ttrpc::Error::RpcStatus(status)) => status,
            other => panic!("{service}: {other:?}"),
        }
    }

    #[tokio::test]
    async fn names_are_checked_where_they_come_in() {
        let create = CreateTaskRequest { id: "/etc".into(), ..Default::default() };
        let exec = ExecProcessRequest { id: "web".into(), exec_id: "a\tb".into(), ..Default::default() };
        for status in [refusal(TASK_V2, "Create", &create).await, refusal(TASK_V3, "Exec", &exec).await] {
            assert_eq!(status.code(), ttrpc::Code::INVALID_ARGUMENT, "{status:?}");
            assert!(status.message.contains("letters, digits"), "{status:?}");
        }
    }

    #[tokio::test]
    async fn a_service_that_is_not_there_is_not_implemented() {
        for (service, method) in [
            ("containerd.runtime.sandbox.v1.Sandbox", "UpdateSandbox"),
            ("containerd.services.transfer.v1.Transfer", "Transfer"),
            (TASK_V3, "Hibernate"),
        ] {
            let status = refusal(service, method, &Empty::new()).await;
            assert_eq!(status.code(), ttrpc::Code::UNIMPLEMENTED, "{service}: {status:?}");
        }
    }
}
