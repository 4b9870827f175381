//! One shim's Task API, called without containerd: for added processes with a
//! specification of their own (`ctr task exec` has no options for user ids,
//! capabilities or environment), and to see how long each call takes.

use std::{
    collections::BTreeMap,
    io::Read,
    path::{Path, PathBuf},
    sync::mpsc::{Receiver, channel},
    time::Instant,
};

use anyhow::{Context, Result, anyhow, ensure};
use containerd_shim_protos::{
    Client,
    api::{
        DeleteRequest, DeleteResponse, ExecProcessRequest, KillRequest, StartRequest, StatsRequest,
        StatsResponse, UpdateTaskRequest, WaitRequest, WaitResponse,
    },
    cgroups_v2::metrics::Metrics,
    protobuf::{Message, well_known_types::any::Any},
    ttrpc,
};
use serde_json::Value;

use crate::scale;

/// An added process that has ended.
#[derive(Clone, Debug)]
pub struct Executed {
    /// What it wrote to standard output and error.
    pub output: String,
    /// Its exit code.
    pub code: u32,
    /// Milliseconds each call took: Exec, Start, Wait, Delete.
    pub calls_ms: [f64; 4],
}

/// A shim's Task API, as containerd 1.x speaks it.
pub struct Shim {
    client: Client,
    container: String,
}

impl Shim {
    /// Connects to the shim of a running container.
    ///
    /// # Errors
    /// When containerd's directory names no shim, or it does not listen.
    pub fn of(container: &str) -> Result<Self> {
        let path = Path::new("/run/containerd/io.containerd.runtime.v2.task/default")
            .join(container)
            .join("address");
        let address =
            std::fs::read_to_string(&path).with_context(|| format!("reading {}", path.display()))?;
        let client =
            Client::connect(address.trim()).with_context(|| format!("connecting to {}", address.trim()))?;
        Ok(Self { client, container: container.to_owned() })
    }

    /// Runs a process to its end. `dir` takes the FIFOs of its output.
    ///
    /// # Errors
    /// When the shim refuses, or it does not end in time.
    pub fn exec(&self, exec_id: &str, process: &Value, dir: &Path) -> Result<Executed> {
        // One each, as clients have it: of one for both containerd's own shim may be done with the first use
        // before it comes to the second, and then waits for a reader.
        let stdout = Output::new(dir.join(exec_id))?;
        let terminal = process["terminal"].as_bool().unwrap_or(false);
        let stderr = (!terminal).then(|| Output::new(dir.join(format!("{exec_id}.stderr")))).transpose()?;
        let result = self.run(exec_id, process, &stdout, stderr.as_ref());
        let mut output = stdout.end(result.is_ok());
        if let Some(stderr) = stderr {
            let more = stderr.end(result.is_ok());
            output = output.and_then(|text| Ok(text + &more?));
        }
        let (code, calls_ms) = result?;
        Ok(Executed { output: output?, code, calls_ms })
    }

    /// Starts a process and leaves it running; `output` is a FIFO that somebody reads.
    ///
    /// # Errors
    /// What the shim answers.
    pub fn start_exec(&self, exec_id: &str, process: &Value, output: &Path) -> Result<()> {
        self.add_exec(exec_id, process, output)?;
        self.start_added(exec_id)
    }

    /// Announces a process; `output` is a FIFO that somebody reads.
    ///
    /// # Errors
    /// What the shim answers.
    pub fn add_exec(&self, exec_id: &str, process: &Value, output: &Path) -> Result<()> {
        let output = output.to_string_lossy().into_owned();
        let exec = ExecProcessRequest {
            id: self.container.clone(),
            exec_id: exec_id.to_owned(),
            stdout: output.clone(),
            stderr: output,
            spec: Some(process_spec(process)?).into(),
            ..Default::default()
        };
        self.call("Exec", &exec).map(drop)
    }

    /// Starts a process that [`Shim::add_exec`] has announced.
    ///
    /// # Errors
    /// What the shim answers.
    pub fn start_added(&self, exec_id: &str) -> Result<()> {
        let (id, exec_id) = (self.container.clone(), exec_id.to_owned());
        self.call("Start", &StartRequest { id, exec_id, ..Default::default() }).map(drop)
    }

    /// Kills a process that [`Shim::start_exec`] has started, and deletes it. Returns its exit code.
    ///
    /// # Errors
    /// What the shim answers.
    pub fn end_exec(&self, exec_id: &str) -> Result<u32> {
        let (id, exec_id) = (self.container.clone(), exec_id.to_owned());
        let kill = KillRequest { id: id.clone(), exec_id: exec_id.clone(), signal: 9, ..Default::default() };
        self.call("Kill", &kill)?;
        self.await_exec(&exec_id)
    }

    /// Waits for a process's end, and deletes it. Returns its exit code.
    ///
    /// # Errors
    /// What the shim answers.
    pub fn await_exec(&self, exec_id: &str) -> Result<u32> {
        let (id, exec_id) = (self.container.clone(), exec_id.to_owned());
        let wait = WaitRequest { id: id.clone(), exec_id: exec_id.clone(), ..Default::default() };
        let (ended, _) = self.call("Wait", &wait)?;
        self.call("Delete", &DeleteRequest { id, exec_id, ..Default::default() })?;
        Ok(WaitResponse::parse_from_bytes(&ended)?.exit_status)
    }

    /// Changes the container's limits; `resources` is a `LinuxResources`.
    ///
    /// # Errors
    /// What the shim answers.
    pub fn update(&self, resources: &Value) -> Result<()> {
        let resources = Any {
            type_url: "types.containerd.io/opencontainers/runtime-spec/1/LinuxResources".into(),
            value: resources.to_string().into_bytes(),
            ..Any::default()
        };
        let id = self.container.clone();
        let request = UpdateTaskRequest { id, resources: Some(resources).into(), ..Default::default() };
        self.call("Update", &request).map(drop)
    }

    /// What the container's statistics say of its network interfaces, by name: bytes and packets received, then sent.
    ///
    /// # Errors
    /// What the shim answers.
    pub fn networks(&self) -> Result<BTreeMap<String, [u64; 4]>> {
        let request = StatsRequest { id: self.container.clone(), ..Default::default() };
        let (answer, _) = self.call("Stats", &request)?;
        let metrics = StatsResponse::parse_from_bytes(&answer)?.stats.value.clone();
        let networks = Metrics::parse_from_bytes(&metrics)?.network;
        let counts = networks
            .into_iter()
            .map(|net| (net.name, [net.rx_bytes, net.rx_packets, net.tx_bytes, net.tx_packets]));
        Ok(counts.collect())
    }

    /// Deletes the container's task, without asking containerd whether that is wise.
    ///
    /// # Errors
    /// What the shim answers.
    pub fn delete(&self) -> Result<()> {
        let request = DeleteRequest { id: self.container.clone(), ..Default::default() };
        self.call("Delete", &request).map(drop)
    }

    fn run(
        &self,
        exec_id: &str,
        process: &Value,
        stdout: &Output,
        stderr: Option<&Output>,
    ) -> Result<(u32, [f64; 4])> {
        let spec = process_spec(process)?;
        let (id, exec_id) = (self.container.clone(), exec_id.to_owned());
        let path = |output: &Output| output.fifo.to_string_lossy().into_owned();
        let exec = ExecProcessRequest {
            id: id.clone(),
            exec_id: exec_id.clone(),
            // containerd's own shim wants both where there is no terminal.
            terminal: stderr.is_none(),
            stderr: stderr.map(path).unwrap_or_default(),
            stdout: path(stdout),
            spec: Some(spec).into(),
            ..Default::default()
        };
        let start = StartRequest { id: id.clone(), exec_id: exec_id.clone(), ..Default::default() };
        let wait = WaitRequest { id: id.clone(), exec_id: exec_id.clone(), ..Default::default() };
        let delete = DeleteRequest { id, exec_id, ..Default::default() };
        let (_, exec_ms) = self.call("Exec", &exec)?;
        let ended = self.call("Start", &start).and_then(|(_, start_ms)| {
            let (ended, wait_ms) = self.call("Wait", &wait)?;
            Ok((WaitResponse::parse_from_bytes(&ended)?.exit_status, start_ms, wait_ms))
        });
        let deleted = self.call("Delete", &delete);
        let (code, start_ms, wait_ms) = ended?;
        let (deleted, delete_ms) = deleted?;
        let deleted = DeleteResponse::parse_from_bytes(&deleted)?.exit_status;
        ensure!(deleted == code, "Wait says exit code {code}, Delete {deleted}");
        Ok((code, [exec_ms, start_ms, wait_ms, delete_ms]))
    }

    /// The response's payload, and how many milliseconds it took.
    fn call(&self, method: &str, message: &impl Message) -> Result<(Vec<u8>, f64)> {
        let mut request = ttrpc::Request::new();
        request.service = "containerd.task.v2.Task".into();
        request.method = method.into();
        request.timeout_nano = i64::try_from(scale::container().as_nanos())?;
        request.payload = message.write_to_bytes()?;
        let started = Instant::now();
        let response = self.client.request(request).map_err(|error| match error {
            ttrpc::Error::RpcStatus(status) => anyhow!("{}", status.message),
            error => anyhow!("{method}: {error}"),
        })?;
        Ok((response.payload, started.elapsed().as_secs_f64() * 1e3))
    }
}

/// A FIFO, read from when somebody opens it for writing.
struct Output {
    fifo: PathBuf,
    text: Receiver<std::io::Result<Vec<u8>>>,
}

impl Output {
    fn new(fifo: PathBuf) -> Result<Self> {
        nix::unistd::mkfifo(&fifo, nix::sys::stat::Mode::from_bits_truncate(0o600))?;
        let (sender, text) = channel();
        let reader = fifo.clone();
        std::thread::spawn(move || {
            let mut text = Vec::new();
            let read = std::fs::File::open(reader).and_then(|mut file| file.read_to_end(&mut text));
            sender.send(read.map(|_| text))
        });
        Ok(Self { fifo, text })
    }

    /// What came, once those who write are done; where it is not known that there are any, what came so far.
    fn end(self, written: bool) -> Result<String> {
        if !written {
            drop(std::fs::File::options().read(true).write(true).open(&self.fifo));
        }
        let text = self.text.recv_timeout(scale::container());
        std::fs::remove_file(&self.fifo)?;
        Ok(String::from_utf8_lossy(&text.context("the output does not end")??).into_owned())
    }
}

/// A process's specification as the API takes it.
fn process_spec(process: &Value) -> Result<Any> {
    Ok(Any {
        type_url: "types.containerd.io/opencontainers/runtime-spec/1/Process".into(),
        value: serde_json::to_vec(process)?,
        ..Any::default()
    })
}
