//! The agent's ttrpc service, over the sandbox's vsock.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use rvm_protocol::{
    agent::{
        AgentClient, ConsoleSize, ContainerRef, ContainerStats, CreateContainerRequest, CreateExecRequest,
        Empty, ExitStatus, Process, ProcessInfo, ProcessRef, ResizePtyRequest, Resources,
        SetUpSandboxRequest, SignalProcessRequest, UpdateResourcesRequest, WaitMemoryRequest, WaitOomRequest,
    },
    guest::AGENT_PORT,
};
use ttrpc::{Code, asynchronous::Client, context};

use crate::vsock::{Vsock, VsockError};

/// How long the agent may take to answer anything but a wait. Nothing it is
/// asked for takes a second; a guest that needs this long is stuck.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(60);

/// How long a guest may take to plug memory in or out. It answers by itself when
/// nothing comes or goes any more; a TiB in steps of 128 MiB comes in minutes.
const MEMORY_TIMEOUT: Duration = Duration::from_secs(300);

/// Why the agent did not do what it was asked for.
#[derive(Debug, thiserror::Error)]
pub enum AgentError {
    /// No connection.
    #[error("connecting to the agent: {0}")]
    Connect(#[from] VsockError),
    /// The agent says so.
    #[error("{message}")]
    Refused {
        /// The class of the error.
        code: Code,
        /// The agent's reason.
        message: String,
    },
    /// The connection ended, or the agent did not answer in time.
    #[error("the agent does not answer: {0}")]
    Lost(String),
}

impl AgentError {
    /// Whether the agent knows nothing of what it was asked about.
    pub fn is_not_found(&self) -> bool {
        matches!(self, Self::Refused { code: Code::NOT_FOUND, .. })
    }
}

impl From<ttrpc::Error> for AgentError {
    fn from(error: ttrpc::Error) -> Self {
        match error {
            ttrpc::Error::RpcStatus(status) => {
                let code = status.code();
                Self::Refused { code, message: printable(status.message) }
            }
            other => Self::Lost(printable(other.to_string())),
        }
    }
}

/// The guest is not trusted with the terminal or the log of who reads this.
pub(crate) fn printable(text: String) -> String {
    const MAX_LEN: usize = 2048;
    text.chars().take(MAX_LEN).map(|c| if c.is_control() { ' ' } else { c }).collect()
}

/// A connection to the agent of one guest.
#[derive(Clone)]
pub struct Agent {
    client: AgentClient,
}

/// Which process: a container's first one where `exec_id` is empty.
pub fn process_ref(container_id: &str, exec_id: &str) -> ProcessRef {
    ProcessRef { container_id: container_id.to_owned(), exec_id: exec_id.to_owned(), ..Default::default() }
}

fn container_ref(container_id: &str) -> ContainerRef {
    ContainerRef { container_id: container_id.to_owned(), ..Default::default() }
}

fn limited() -> context::Context {
    context::with_duration(ANSWER_TIMEOUT)
}

impl Agent {
    /// Connects to a guest whose agent has announced itself.
    pub async fn connect(vsock: &Vsock) -> Result<Self, AgentError> {
        let stream = vsock.connect(AGENT_PORT).await?;
        let socket = ttrpc::asynchronous::transport::Socket::new(stream);
        Ok(Self { client: AgentClient::new(Client::new(socket)) })
    }

    /// Sets the sandbox up; see the protocol.
    pub async fn set_up_sandbox(&self, mut request: SetUpSandboxRequest) -> Result<(), AgentError> {
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        request.wall_clock_ns = i64::try_from(now.as_nanos()).unwrap_or(i64::MAX);
        self.client.set_up_sandbox(limited(), &request).await?;
        Ok(())
    }

    /// Makes a container; returns its first process's pid in the guest.
    pub async fn create_container(&self, request: &CreateContainerRequest) -> Result<u32, AgentError> {
        Ok(self.client.create_container(limited(), request).await?.pid)
    }

    /// Registers an exec.
    pub async fn create_exec(
        &self,
        container_id: &str,
        exec_id: &str,
        process: Process,
    ) -> Result<(), AgentError> {
        let request = CreateExecRequest {
            container_id: container_id.to_owned(),
            exec_id: exec_id.to_owned(),
            process: Some(process).into(),
            ..Default::default()
        };
        self.client.create_exec(limited(), &request).await?;
        Ok(())
    }

    /// Starts a created process; returns its pid in the container.
    pub async fn start(&self, process: &ProcessRef) -> Result<u32, AgentError> {
        Ok(self.client.start_process(limited(), process).await?.pid)
    }

    /// Waits for a process's end, however long that takes.
    pub async fn wait(&self, process: &ProcessRef) -> Result<ExitStatus, AgentError> {
        Ok(self.client.wait_process(context::with_timeout(0), process).await?)
    }

    /// Sends a signal to a process, or to all of its container's.
    pub async fn signal(&self, process: ProcessRef, signal: u32, all: bool) -> Result<(), AgentError> {
        let request =
            SignalProcessRequest { process: Some(process).into(), signal, all, ..Default::default() };
        self.client.signal_process(limited(), &request).await?;
        Ok(())
    }

    /// Tells a terminal its size.
    pub async fn resize(&self, process: ProcessRef, width: u32, height: u32) -> Result<(), AgentError> {
        let size = ConsoleSize { width, height, ..Default::default() };
        let request =
            ResizePtyRequest { process: Some(process).into(), size: Some(size).into(), ..Default::default() };
        self.client.resize_pty(limited(), &request).await?;
        Ok(())
    }

    /// The container's processes.
    pub async fn processes(&self, container_id: &str) -> Result<Vec<ProcessInfo>, AgentError> {
        Ok(self.client.list_processes(limited(), &container_ref(container_id)).await?.processes)
    }

    /// Stops the container's processes where they are.
    pub async fn pause(&self, container_id: &str) -> Result<(), AgentError> {
        self.client.pause_container(limited(), &container_ref(container_id)).await?;
        Ok(())
    }

    /// Lets them go on.
    pub async fn resume(&self, container_id: &str) -> Result<(), AgentError> {
        self.client.resume_container(limited(), &container_ref(container_id)).await?;
        Ok(())
    }

    /// Changes the limits that are set.
    pub async fn update(&self, container_id: &str, resources: Resources) -> Result<(), AgentError> {
        let request = UpdateResourcesRequest {
            container_id: container_id.to_owned(),
            resources: Some(resources).into(),
            ..Default::default()
        };
        self.client.update_resources(limited(), &request).await?;
        Ok(())
    }

    /// Waits until `bytes` of memory are plugged in, or no more can be; returns how
    /// many are.
    pub async fn wait_memory(&self, bytes: u64) -> Result<u64, AgentError> {
        let request = WaitMemoryRequest { plugged_bytes: bytes, ..Default::default() };
        Ok(self.client.wait_memory(context::with_duration(MEMORY_TIMEOUT), &request).await?.bytes)
    }

    /// The container's cgroup files and network interfaces.
    pub async fn stats(&self, container_id: &str) -> Result<ContainerStats, AgentError> {
        Ok(self.client.get_stats(limited(), &container_ref(container_id)).await?)
    }

    /// Waits until the kernel has killed more processes of the container for
    /// want of memory than `known`, however long that takes; returns how many.
    pub async fn wait_oom(&self, container_id: &str, known: u64) -> Result<u64, AgentError> {
        let request = WaitOomRequest { container_id: container_id.to_owned(), known, ..Default::default() };
        Ok(self.client.wait_oom(context::with_timeout(0), &request).await?.count)
    }

    /// Forgets an ended process.
    pub async fn delete(&self, process: &ProcessRef) -> Result<(), AgentError> {
        self.client.delete_process(limited(), process).await?;
        Ok(())
    }

    /// Flushes file systems and powers the guest off. The connection may end
    /// before the answer arrives.
    pub async fn shut_down(&self) -> Result<(), AgentError> {
        self.client.shutdown(limited(), &Empty::default()).await?;
        Ok(())
    }
}
