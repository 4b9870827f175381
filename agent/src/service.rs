//! The ttrpc service: which method asks what of the sandbox, and which status
//! code an error becomes. No logic lives here.

use std::{os::fd::OwnedFd, sync::Arc};

use async_trait::async_trait;
use rvm_protocol::agent::{
    AdjustClockRequest, Agent, ContainerRef, ContainerStats, CreateContainerRequest, CreateContainerResponse,
    CreateExecRequest, Empty, ExitStatus, HugePages, ListProcessesResponse, OnlineCpusRequest, OnlinedCpus,
    OomKills, PluggedMemory, ProcessRef, RemoveDisksRequest, ResizePtyRequest, SetUpSandboxRequest,
    SetUpSandboxResponse, SignalProcessRequest, StartProcessResponse, SyncNetworkRequest,
    UpdateResourcesRequest, WaitMemoryRequest, WaitOomRequest, WallClock, create_agent,
};
use ttrpc::{
    Code,
    r#async::{Server, TtrpcContext, transport::Listener},
};

use crate::{error::Error, fault, init, sandbox::Sandbox, storage::BlockDevice, vsock::HostListener};

struct Service {
    sandbox: Arc<Sandbox>,
}

/// Serves requests that arrive at `listener`, for as long as what is returned lives.
pub async fn start(listener: OwnedFd, sandbox: Arc<Sandbox>) -> Result<Server, init::Error> {
    let mut server = server(sandbox).add_listener(Listener::new(HostListener::from(listener)));
    server.start().await.map_err(init::Error::Serve)?;
    Ok(server)
}

fn server(sandbox: Arc<Sandbox>) -> Server {
    Server::new().register_service(create_agent(Arc::new(Service { sandbox })))
}

/// The one place where errors become status codes.
fn status(error: Error) -> ttrpc::Error {
    let code = match error {
        Error::Invalid { .. } => Code::INVALID_ARGUMENT,
        Error::NotFound(_) => Code::NOT_FOUND,
        Error::AlreadyExists(_) => Code::ALREADY_EXISTS,
        Error::Precondition(_) => Code::FAILED_PRECONDITION,
        Error::Image(_) => Code::DATA_LOSS,
        // As containerd's own shim reports what runc could not do.
        Error::Step(_) => Code::UNKNOWN,
    };
    ttrpc::Error::RpcStatus(ttrpc::get_status(code, error.to_string()))
}

fn answer<T>(method: &str, result: Result<T, Error>) -> ttrpc::Result<T> {
    fault::answering();
    result.map_err(|error| {
        log::info!("{method}: {error}");
        status(error)
    })
}

/// Runs a request to its end even if the client does not wait for it: half a
/// container must not be left behind.
async fn to_the_end<T: Send + 'static>(
    request: impl Future<Output = Result<T, Error>> + Send + 'static,
) -> Result<T, Error> {
    match tokio::spawn(request).await {
        Ok(result) => result,
        // A panic would have ended the VM.
        Err(_) => Err(Error::Precondition("the guest is shutting down".into())),
    }
}

#[async_trait]
impl Agent for Service {
    async fn set_up_sandbox(
        &self,
        _: &TtrpcContext,
        request: SetUpSandboxRequest,
    ) -> ttrpc::Result<SetUpSandboxResponse> {
        let response = || SetUpSandboxResponse { pmem: BlockDevice::has_pmem(), ..Default::default() };
        answer("SetUpSandbox", self.sandbox.set_up(&request).map(|()| response()))
    }

    async fn create_container(
        &self,
        _: &TtrpcContext,
        request: CreateContainerRequest,
    ) -> ttrpc::Result<CreateContainerResponse> {
        let sandbox = Arc::clone(&self.sandbox);
        let created = to_the_end(async move { sandbox.create_container(request).await }).await;
        answer("CreateContainer", created.map(|pid| CreateContainerResponse { pid, ..Default::default() }))
    }

    async fn create_exec(&self, _: &TtrpcContext, request: CreateExecRequest) -> ttrpc::Result<Empty> {
        answer("CreateExec", self.sandbox.create_exec(request).map(|()| Empty::new()))
    }

    async fn start_process(
        &self,
        _: &TtrpcContext,
        process: ProcessRef,
    ) -> ttrpc::Result<StartProcessResponse> {
        let sandbox = Arc::clone(&self.sandbox);
        let started = to_the_end(async move { sandbox.start_process(&process).await }).await;
        answer("StartProcess", started.map(|pid| StartProcessResponse { pid, ..Default::default() }))
    }

    async fn wait_process(&self, _: &TtrpcContext, process: ProcessRef) -> ttrpc::Result<ExitStatus> {
        let exit = self.sandbox.wait_process(&process).await;
        answer(
            "WaitProcess",
            exit.map(|exit| ExitStatus {
                exit_code: exit.code,
                oom_kills: self.sandbox.oom_kills(&process.container_id),
                ..Default::default()
            }),
        )
    }

    async fn signal_process(&self, _: &TtrpcContext, request: SignalProcessRequest) -> ttrpc::Result<Empty> {
        answer("SignalProcess", self.sandbox.signal_process(&request).map(|()| Empty::new()))
    }

    async fn resize_pty(&self, _: &TtrpcContext, request: ResizePtyRequest) -> ttrpc::Result<Empty> {
        answer("ResizePty", self.sandbox.resize_pty(&request).map(|()| Empty::new()))
    }

    async fn close_stdin(&self, _: &TtrpcContext, process: ProcessRef) -> ttrpc::Result<Empty> {
        answer("CloseStdin", self.sandbox.close_stdin(&process).map(|()| Empty::new()))
    }

    async fn list_processes(
        &self,
        _: &TtrpcContext,
        container: ContainerRef,
    ) -> ttrpc::Result<ListProcessesResponse> {
        let processes = self.sandbox.list_processes(&container);
        answer(
            "ListProcesses",
            processes.map(|processes| ListProcessesResponse { processes, ..Default::default() }),
        )
    }

    async fn delete_process(&self, _: &TtrpcContext, process: ProcessRef) -> ttrpc::Result<Empty> {
        let sandbox = Arc::clone(&self.sandbox);
        let deleted = to_the_end(async move { sandbox.delete_process(&process).await }).await;
        answer("DeleteProcess", deleted.map(|()| Empty::new()))
    }

    async fn pause_container(&self, _: &TtrpcContext, container: ContainerRef) -> ttrpc::Result<Empty> {
        let sandbox = Arc::clone(&self.sandbox);
        let paused = to_the_end(async move { sandbox.pause(&container).await }).await;
        answer("PauseContainer", paused.map(|()| Empty::new()))
    }

    async fn resume_container(&self, _: &TtrpcContext, container: ContainerRef) -> ttrpc::Result<Empty> {
        answer("ResumeContainer", self.sandbox.resume(&container).map(|()| Empty::new()))
    }

    async fn update_resources(
        &self,
        _: &TtrpcContext,
        request: UpdateResourcesRequest,
    ) -> ttrpc::Result<Empty> {
        answer("UpdateResources", self.sandbox.update_resources(&request).map(|()| Empty::new()))
    }

    async fn wait_memory(
        &self,
        _: &TtrpcContext,
        request: WaitMemoryRequest,
    ) -> ttrpc::Result<PluggedMemory> {
        let plugged = self.sandbox.wait_memory(&request).await;
        answer("WaitMemory", plugged.map(|bytes| PluggedMemory { bytes, ..Default::default() }))
    }

    async fn set_huge_pages(&self, _: &TtrpcContext, wanted: HugePages) -> ttrpc::Result<HugePages> {
        let sandbox = Arc::clone(&self.sandbox);
        let set = to_the_end(async move { sandbox.set_huge_pages(wanted.count).await }).await;
        answer("SetHugePages", set.map(|count| HugePages { count, ..Default::default() }))
    }

    async fn remove_disks(&self, _: &TtrpcContext, request: RemoveDisksRequest) -> ttrpc::Result<Empty> {
        let sandbox = Arc::clone(&self.sandbox);
        let removed = to_the_end(async move { sandbox.remove_disks(&request).await }).await;
        answer("RemoveDisks", removed.map(|()| Empty::new()))
    }

    async fn sync_network(&self, _: &TtrpcContext, request: SyncNetworkRequest) -> ttrpc::Result<Empty> {
        let sandbox = Arc::clone(&self.sandbox);
        let synced = to_the_end(async move { sandbox.sync_network(&request).await }).await;
        answer("SyncNetwork", synced.map(|()| Empty::new()))
    }

    async fn online_cpus(&self, _: &TtrpcContext, request: OnlineCpusRequest) -> ttrpc::Result<OnlinedCpus> {
        let sandbox = Arc::clone(&self.sandbox);
        let online = to_the_end(async move { sandbox.online_cpus(&request).await }).await;
        answer("OnlineCpus", online.map(|count| OnlinedCpus { count, ..Default::default() }))
    }

    async fn adjust_clock(&self, _: &TtrpcContext, request: AdjustClockRequest) -> ttrpc::Result<WallClock> {
        let adjusted = self.sandbox.adjust_clock(&request);
        answer("AdjustClock", adjusted.map(|ns| WallClock { ns, ..Default::default() }))
    }

    async fn get_stats(&self, _: &TtrpcContext, container: ContainerRef) -> ttrpc::Result<ContainerStats> {
        answer("GetStats", self.sandbox.stats(&container))
    }

    async fn wait_oom(&self, _: &TtrpcContext, request: WaitOomRequest) -> ttrpc::Result<OomKills> {
        let kills = self.sandbox.wait_oom(&request).await;
        answer("WaitOom", kills.map(|count| OomKills { count, ..Default::default() }))
    }

    async fn shutdown(&self, _: &TtrpcContext, _: Empty) -> ttrpc::Result<Empty> {
        self.sandbox.request_shutdown();
        Ok(Empty::new())
    }
}

#[cfg(test)]
mod tests {
    use rvm_protocol::agent::AgentClient;
    use ttrpc::{
        r#async::{Client, transport::Socket},
        context,
    };

    use super::*;

    #[test]
    fn errors_reach_the_client_with_their_code_and_text() {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        runtime.block_on(async {
            let dir = tempfile::tempdir().unwrap();
            let path = dir.path().join("agent.sock");
            let listener = tokio::net::UnixListener::bind(&path).unwrap();
            let mut server = server(Arc::new(Sandbox::new())).add_listener(listener.into());
            server.start().await.unwrap();
            let stream = tokio::net::UnixStream::connect(&path).await.unwrap();
            let client = AgentClient::new(Client::new(Socket::from(stream)));
            let status = |result: ttrpc::Result<()>| match result {
                Err(ttrpc::Error::RpcStatus(status)) => (status.code(), status.message),
                other => panic!("{other:?}"),
            };

            let request =
                SetUpSandboxRequest { layers_tag: "../x".into(), wall_clock_ns: 1, ..Default::default() };
            let (code, message) =
                status(client.set_up_sandbox(context::with_timeout(0), &request).await.map(drop));
            assert_eq!(code, Code::INVALID_ARGUMENT);
            assert!(message.starts_with("layers_tag: \"../x\" must"), "{message}");

            let process = ProcessRef { container_id: "c1".into(), ..Default::default() };
            let (code, message) =
                status(client.delete_process(context::with_timeout(0), &process).await.map(drop));
            assert_eq!((code, message.as_str()), (Code::NOT_FOUND, "no such container: \"c1\""));
        });
    }
}
