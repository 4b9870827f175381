//! The agent's ttrpc service, over the sandbox's vsock.
//!
//! Every request but a wait has a deadline, which its error names. A connection
//! that was lost is made anew by the next request.

use std::{sync::Arc, time::Duration};

use rvm_protocol::{
    agent::{
        AdjustClockRequest, AgentClient, ConsoleSize, ContainerRef, ContainerStats, CreateContainerRequest,
        CreateExecRequest, Empty, ExitStatus, Hook, HugePages, OnlineCpusRequest, Process, ProcessInfo,
        ProcessRef, RemoveDisksRequest, ResizePtyRequest, Resources, SetUpSandboxRequest,
        SetUpSandboxResponse, SignalProcessRequest, SyncNetworkRequest, UpdateResourcesRequest,
        WaitMemoryRequest, WaitOomRequest,
    },
    guest::AGENT_PORT,
};
use tokio::{sync::Mutex, time::timeout};
use ttrpc::{
    Code,
    asynchronous::{Client, transport::Socket},
    context,
};

use crate::{
    clock, fault,
    vsock::{Vsock, VsockError},
};

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
    /// The connection ended.
    #[error("the agent does not answer {request}: {problem}")]
    Lost {
        /// What was asked.
        request: &'static str,
        /// What happened.
        problem: String,
    },
    /// It did not answer in time.
    #[error("the agent does not answer {request} within {} s", limit.as_secs())]
    TimedOut {
        /// What was asked.
        request: &'static str,
        /// How long it was waited for.
        limit: Duration,
    },
}

impl AgentError {
    /// Whether there was no answer, whatever the agent did.
    pub fn is_unanswered(&self) -> bool {
        !matches!(self, Self::Refused { .. })
    }

    /// Whether the agent knows nothing of what it was asked about.
    pub fn is_not_found(&self) -> bool {
        matches!(self, Self::Refused { code: Code::NOT_FOUND, .. })
    }

    /// Whether the guest's kernel finds no file system in the image of a container's layers.
    pub fn is_data_loss(&self) -> bool {
        matches!(self, Self::Refused { code: Code::DATA_LOSS, .. })
    }

    /// Whether what was asked for does not go with what is there now.
    pub fn is_failed_precondition(&self) -> bool {
        matches!(self, Self::Refused { code: Code::FAILED_PRECONDITION, .. })
    }
}

/// The guest is not trusted with the terminal or the log of who reads this.
pub(crate) fn printable(text: String) -> String {
    const MAX_LEN: usize = 2048;
    text.chars().take(MAX_LEN).map(|c| if c.is_control() { ' ' } else { c }).collect()
}

/// The agent of one guest; clones share one connection.
#[derive(Clone)]
pub struct Agent {
    vsock: Vsock,
    connection: Arc<Mutex<Connection>>,
}

/// The connection there is.
#[derive(Default)]
struct Connection {
    /// How many there were; tells which one a request has failed on.
    number: u64,
    /// None from when a request has found it lost.
    client: Option<AgentClient>,
}

/// Which process: a container's first one where `exec_id` is empty.
pub fn process_ref(container_id: &str, exec_id: &str) -> ProcessRef {
    ProcessRef { container_id: container_id.to_owned(), exec_id: exec_id.to_owned(), ..Default::default() }
}

fn container_ref(container_id: &str) -> ContainerRef {
    ContainerRef { container_id: container_id.to_owned(), ..Default::default() }
}

pub(crate) fn nanoseconds(time: Duration) -> i64 {
    i64::try_from(time.as_nanos()).unwrap_or(i64::MAX)
}

/// Asks the agent; `$limit` is how long it may take.
macro_rules! ask {
    ($agent:expr, $limit:expr, $method:ident, $request:expr) => {{
        let agent: &Agent = $agent;
        let request = stringify!($method);
        let limit: Option<Duration> = $limit;
        let asked = async {
            let (number, client) = agent.connected().await?;
            // The deadline is kept here; the agent is told of none.
            fault::point(concat!("to ask the agent: ", stringify!($method)));
            let answered = client.$method(context::with_timeout(0), $request).await;
            fault::point(concat!("the agent has answered: ", stringify!($method)));
            match answered {
                Ok(answer) => Ok(answer),
                Err(error) => Err(agent.failed(number, request, error).await),
            }
        };
        match limit {
            None => asked.await,
            Some(limit) => {
                timeout(limit, asked).await.unwrap_or(Err(AgentError::TimedOut { request, limit }))
            }
        }
    }};
}

/// The same where hooks run first: each has its own limit, or none, as under runc.
fn answer_limit(hooks: &[Hook]) -> Option<Duration> {
    hooks.iter().try_fold(ANSWER_TIMEOUT, |limit, hook| {
        let timeout = (hook.timeout_s > 0).then(|| Duration::from_secs(hook.timeout_s.into()));
        Some(limit.saturating_add(timeout?))
    })
}

impl Agent {
    /// Connects to a guest whose agent has announced itself.
    pub async fn connect(vsock: &Vsock) -> Result<Self, AgentError> {
        let agent = Self { vsock: vsock.clone(), connection: Arc::default() };
        agent.connected().await?;
        Ok(agent)
    }

    /// The connection, made anew where it was lost.
    async fn connected(&self) -> Result<(u64, AgentClient), AgentError> {
        let mut connection = self.connection.lock().await;
        if let Some(client) = &connection.client {
            return Ok((connection.number, client.clone()));
        }
        let stream = self.vsock.connect(AGENT_PORT).await?;
        let client = AgentClient::new(Client::new(Socket::new(stream)));
        connection.number += 1;
        connection.client = Some(client.clone());
        Ok((connection.number, client))
    }

    async fn failed(&self, number: u64, request: &'static str, error: ttrpc::Error) -> AgentError {
        match error {
            ttrpc::Error::RpcStatus(status) => {
                let code = status.code();
                AgentError::Refused { code, message: printable(status.message) }
            }
            other => {
                let mut connection = self.connection.lock().await;
                if connection.number == number {
                    connection.client = None;
                }
                AgentError::Lost { request, problem: printable(other.to_string()) }
            }
        }
    }

    /// Sets the sandbox up, and says what the guest can do; see the protocol.
    pub async fn set_up_sandbox(
        &self,
        mut request: SetUpSandboxRequest,
    ) -> Result<SetUpSandboxResponse, AgentError> {
        request.wall_clock_ns = nanoseconds(clock::wall_clock());
        ask!(self, Some(ANSWER_TIMEOUT), set_up_sandbox, &request)
    }

    /// Moves the guest's wall clock forward by so many nanoseconds, or back; returns what it says it is then, in
    /// nanoseconds since the epoch.
    pub async fn adjust_clock(&self, ahead_ns: i64) -> Result<i64, AgentError> {
        let request = AdjustClockRequest { ahead_ns, ..Default::default() };
        Ok(ask!(self, Some(ANSWER_TIMEOUT), adjust_clock, &request)?.ns)
    }

    /// Makes a container; returns its first process's pid in the guest.
    pub async fn create_container(&self, request: &CreateContainerRequest) -> Result<u32, AgentError> {
        let limit = answer_limit(&request.create_container_hooks);
        Ok(ask!(self, limit, create_container, request)?.pid)
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
        ask!(self, Some(ANSWER_TIMEOUT), create_exec, &request)?;
        Ok(())
    }

    /// Starts a created process, before which these hooks run; returns its pid in the container.
    pub async fn start(&self, process: &ProcessRef, hooks: &[Hook]) -> Result<u32, AgentError> {
        Ok(ask!(self, answer_limit(hooks), start_process, process)?.pid)
    }

    /// Waits for a process's end, however long that takes.
    pub async fn wait(&self, process: &ProcessRef) -> Result<ExitStatus, AgentError> {
        Ok(ask!(self, None, wait_process, process)?)
    }

    /// Sends a signal to a process, or to all of its container's.
    pub async fn signal(&self, process: ProcessRef, signal: u32, all: bool) -> Result<(), AgentError> {
        let request =
            SignalProcessRequest { process: Some(process).into(), signal, all, ..Default::default() };
        ask!(self, Some(ANSWER_TIMEOUT), signal_process, &request)?;
        Ok(())
    }

    /// Tells a terminal its size.
    pub async fn resize(&self, process: ProcessRef, width: u32, height: u32) -> Result<(), AgentError> {
        let size = ConsoleSize { width, height, ..Default::default() };
        let request =
            ResizePtyRequest { process: Some(process).into(), size: Some(size).into(), ..Default::default() };
        ask!(self, Some(ANSWER_TIMEOUT), resize_pty, &request)?;
        Ok(())
    }

    /// The container's processes.
    pub async fn processes(&self, container_id: &str) -> Result<Vec<ProcessInfo>, AgentError> {
        Ok(ask!(self, Some(ANSWER_TIMEOUT), list_processes, &container_ref(container_id))?.processes)
    }

    /// Stops the container's processes where they are.
    pub async fn pause(&self, container_id: &str) -> Result<(), AgentError> {
        ask!(self, Some(ANSWER_TIMEOUT), pause_container, &container_ref(container_id))?;
        Ok(())
    }

    /// Lets them go on.
    pub async fn resume(&self, container_id: &str) -> Result<(), AgentError> {
        ask!(self, Some(ANSWER_TIMEOUT), resume_container, &container_ref(container_id))?;
        Ok(())
    }

    /// Changes the limits that are set.
    pub async fn update(&self, container_id: &str, resources: Resources) -> Result<(), AgentError> {
        let request = UpdateResourcesRequest {
            container_id: container_id.to_owned(),
            resources: Some(resources).into(),
            ..Default::default()
        };
        ask!(self, Some(ANSWER_TIMEOUT), update_resources, &request)?;
        Ok(())
    }

    /// Waits until `bytes` of memory are plugged in, or no more can be; returns how
    /// many are.
    pub async fn wait_memory(&self, bytes: u64) -> Result<u64, AgentError> {
        let request = WaitMemoryRequest { plugged_bytes: bytes, ..Default::default() };
        Ok(ask!(self, Some(MEMORY_TIMEOUT), wait_memory, &request)?.bytes)
    }

    /// Has the guest keep so many huge pages of 2 MiB ready; returns how many it keeps.
    pub async fn set_huge_pages(&self, count: u64) -> Result<u64, AgentError> {
        let wanted = HugePages { count, ..Default::default() };
        Ok(ask!(self, Some(MEMORY_TIMEOUT), set_huge_pages, &wanted)?.count)
    }

    /// The container's cgroup files and network interfaces.
    pub async fn stats(&self, container_id: &str) -> Result<ContainerStats, AgentError> {
        Ok(ask!(self, Some(ANSWER_TIMEOUT), get_stats, &container_ref(container_id))?)
    }

    /// Waits until the kernel has killed more processes of the container for
    /// want of memory than `known`, however long that takes; returns how many.
    pub async fn wait_oom(&self, container_id: &str, known: u64) -> Result<u64, AgentError> {
        let request = WaitOomRequest { container_id: container_id.to_owned(), known, ..Default::default() };
        Ok(ask!(self, None, wait_oom, &request)?.count)
    }

    /// Forgets an ended process.
    pub async fn delete(&self, process: &ProcessRef) -> Result<(), AgentError> {
        ask!(self, Some(ANSWER_TIMEOUT), delete_process, process)?;
        Ok(())
    }

    /// Makes the sandbox's network namespace what the request says.
    pub async fn sync_network(&self, request: &SyncNetworkRequest) -> Result<(), AgentError> {
        ask!(self, Some(ANSWER_TIMEOUT), sync_network, request)?;
        Ok(())
    }

    /// Lets go of the disks with these serials, and of files that are memory in these slots.
    pub async fn remove_disks(&self, serials: Vec<String>, pmem_slots: Vec<u32>) -> Result<(), AgentError> {
        let request = RemoveDisksRequest { serials, pmem_slots, ..Default::default() };
        ask!(self, Some(ANSWER_TIMEOUT), remove_disks, &request)?;
        Ok(())
    }

    /// Brings CPUs up or down until `count` are used; returns how many are.
    pub async fn online_cpus(&self, count: u8) -> Result<u32, AgentError> {
        let request = OnlineCpusRequest { count: count.into(), ..Default::default() };
        Ok(ask!(self, Some(ANSWER_TIMEOUT), online_cpus, &request)?.count)
    }

    /// Flushes file systems and powers the guest off. The connection may end
    /// before the answer arrives.
    pub async fn shut_down(&self) -> Result<(), AgentError> {
        ask!(self, Some(ANSWER_TIMEOUT), shutdown, &Empty::default())?;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use protobuf::Message;
    use tokio::{
        io::{AsyncReadExt, AsyncWriteExt},
        net::UnixListener,
    };

    use super::*;
    use crate::vsock::{self, SOCKET, open_dir};

    /// A monitor's side of one connection, and the agent's behind it: takes one
    /// request and answers it with an exit code, or hangs up.
    async fn one_connection(listener: &UnixListener, exit_code: Option<u32>) {
        const HEADER_LEN: usize = 10;
        const RESPONSE: u8 = 2;
        let (mut stream, _) = listener.accept().await.unwrap();
        vsock::read_line(&mut stream).await.unwrap();
        stream.write_all(b"OK 1\n").await.unwrap();
        let mut header = [0; HEADER_LEN];
        stream.read_exact(&mut header).await.unwrap();
        let length = u32::from_be_bytes(header[..4].try_into().unwrap());
        stream.read_exact(&mut vec![0; length as usize]).await.unwrap();
        let Some(exit_code) = exit_code else { return };
        let mut response = ttrpc::Response::new();
        response.payload = ExitStatus { exit_code, ..Default::default() }.write_to_bytes().unwrap();
        let body = response.write_to_bytes().unwrap();
        header[..4].copy_from_slice(&u32::try_from(body.len()).unwrap().to_be_bytes());
        header[8] = RESPONSE;
        stream.write_all(&[&header[..], &body].concat()).await.unwrap();
    }

    #[tokio::test]
    async fn a_lost_connection_is_made_anew() {
        let dir = tempfile::tempdir().unwrap();
        let listener = Arc::new(UnixListener::bind(dir.path().join(SOCKET)).unwrap());
        let peer = tokio::spawn({
            let listener = listener.clone();
            async move {
                one_connection(&listener, None).await;
                one_connection(&listener, Some(7)).await;
            }
        });
        let agent = Agent::connect(&Vsock::new(open_dir(dir.path()).unwrap())).await.unwrap();
        let error = agent.wait(&process_ref("c", "")).await.unwrap_err();
        assert!(error.is_unanswered(), "{error}");
        assert!(error.to_string().starts_with("the agent does not answer wait_process: "), "{error}");
        assert_eq!(agent.wait(&process_ref("c", "")).await.unwrap().exit_code, 7);
        peer.await.unwrap();
    }

    /// Whatever a guest that stands still is asked for ends, and the error says what it was
    /// and how long it was given.
    #[tokio::test(start_paused = true)]
    async fn every_request_but_a_wait_has_a_deadline_that_its_error_names() {
        let dir = tempfile::tempdir().unwrap();
        let listener = UnixListener::bind(dir.path().join(SOCKET)).unwrap();
        let connecting = tokio::spawn(async move {
            let (mut stream, _) = listener.accept().await.unwrap();
            vsock::read_line(&mut stream).await.unwrap();
            stream.write_all(b"OK 1\n").await.unwrap();
            (listener, stream)
        });
        let agent = Agent::connect(&Vsock::new(open_dir(dir.path()).unwrap())).await.unwrap();
        let _standing_still = connecting.await.unwrap();
        let process = process_ref("c", "e");
        let create = CreateContainerRequest::default();
        let hook = |timeout_s| Hook { timeout_s, ..Default::default() };
        assert_eq!(answer_limit(&[hook(1), hook(0)]), None);
        macro_rules! told {
            ($($call:expr => $words:expr),* $(,)?) => {$(
                let error = $call.await.map(drop).unwrap_err();
                assert_eq!(error.to_string(), format!("the agent does not answer {}", $words));
            )*};
        }
        told! {
            agent.set_up_sandbox(SetUpSandboxRequest::default()) => "set_up_sandbox within 60 s",
            agent.adjust_clock(1) => "adjust_clock within 60 s",
            agent.create_container(&create) => "create_container within 60 s",
            agent.create_exec("c", "e", Process::default()) => "create_exec within 60 s",
            agent.start(&process, &[]) => "start_process within 60 s",
            agent.start(&process, &[hook(300), hook(30)]) => "start_process within 390 s",
            agent.signal(process.clone(), 15, false) => "signal_process within 60 s",
            agent.resize(process.clone(), 80, 24) => "resize_pty within 60 s",
            agent.processes("c") => "list_processes within 60 s",
            agent.pause("c") => "pause_container within 60 s",
            agent.resume("c") => "resume_container within 60 s",
            agent.update("c", Resources::default()) => "update_resources within 60 s",
            agent.wait_memory(1) => "wait_memory within 300 s",
            agent.set_huge_pages(1) => "set_huge_pages within 300 s",
            agent.stats("c") => "get_stats within 60 s",
            agent.sync_network(&SyncNetworkRequest::default()) => "sync_network within 60 s",
            agent.delete(&process) => "delete_process within 60 s",
            agent.remove_disks(vec![], vec![]) => "remove_disks within 60 s",
            agent.online_cpus(1) => "online_cpus within 60 s",
            agent.shut_down() => "shutdown within 60 s",
        }
    }
}
