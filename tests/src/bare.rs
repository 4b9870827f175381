//! A shim started as containerd starts it, and no containerd: for what `ctr` has
//! no option for, and for what two containerds do to each other.

use std::{
    os::unix::fs::DirBuilderExt,
    path::{Path, PathBuf},
    process::{Command, Stdio},
};

use anyhow::{Context, Result, ensure};
use containerd_shim_protos::{
    Client,
    api::{
        ConnectRequest, ConnectResponse, CreateTaskRequest, DeleteRequest, KillRequest, ShutdownRequest,
        StartRequest, StateRequest, StateResponse, WaitRequest, WaitResponse,
    },
    protobuf::{Message, well_known_types::any::Any},
    ttrpc,
    types::mount::Mount,
};
use serde_json::Value;

use crate::{
    host::Process,
    job::{self, Finished, Input},
    scale,
    world::World,
};

/// Where the tests' containerd takes events.
pub(crate) const EVENTS: &str = "/run/containerd/containerd.sock.ttrpc";

/// A bundle, which goes with its value; the directory of all goes with the last.
struct Bundle(PathBuf);

impl Drop for Bundle {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
        let _ = self.0.parent().map(std::fs::remove_dir);
    }
}

/// A shim with one bundle.
pub struct Bare {
    program: PathBuf,
    arguments: Vec<String>,
    config: PathBuf,
    id: String,
    bundle: Bundle,
    address: String,
    client: Client,
}

impl Bare {
    /// Starts the shim of the container `id` for the containerd at `address`, or for CRI-O where that is
    /// empty, with a bundle of its own that holds `spec`.
    ///
    /// # Errors
    /// When it does not come up.
    pub fn start(world: &World, address: &str, id: &str, spec: &Value) -> Result<Self> {
        let dir = world.dir().join(format!("bare-{}", address.replace('/', "_"))).join(id);
        std::fs::DirBuilder::new().recursive(true).mode(0o711).create(&dir)?;
        let bundle = Bundle(dir.clone());
        std::fs::write(dir.join("config.json"), serde_json::to_vec(spec)?)?;
        let arguments = ["-namespace", "default", "-address", address, "-id", id];
        let arguments: Vec<String> = arguments.iter().map(|&argument| argument.to_owned()).collect();
        let program = world.stage().shim();
        let config = world.config_path();
        // Whatever dumps its core does so into the bundle, unless it sees to that.
        let mut command = Command::new("sh");
        command.args(["-c", "ulimit -c unlimited; exec \"$0\" \"$@\""]).arg(&program);
        command.args(&arguments).arg("start").current_dir(&dir).stdin(Stdio::null());
        // CRI-O has no address of its own, and takes no events.
        let events = if address.is_empty() { "" } else { EVENTS };
        command.env("TTRPC_ADDRESS", events).env("RVM_CONFIG", &config);
        let started = job::run(command, Input::Nothing, scale::command())?.success()?;
        let address = started.text().trim().to_owned();
        let client = Client::connect(&address).context("connecting to the shim")?;
        Ok(Self { program, arguments, config, id: id.to_owned(), bundle, address, client })
    }

    /// Its bundle.
    pub fn bundle(&self) -> &Path {
        &self.bundle.0
    }

    /// What `start` answered.
    pub fn address(&self) -> &str {
        &self.address
    }

    /// Creates the task with a client's options, of a type and encoded.
    ///
    /// # Errors
    /// What the shim answers.
    pub fn create(&self, options: Option<(&str, &[u8])>) -> Result<(), ttrpc::Status> {
        self.create_on(Vec::new(), options)
    }

    /// The same on a snapshot's mounts.
    ///
    /// # Errors
    /// What the shim answers.
    pub fn create_on(&self, rootfs: Vec<Mount>, options: Option<(&str, &[u8])>) -> Result<(), ttrpc::Status> {
        let any = |(kind, value): (&str, &[u8])| Any {
            type_url: kind.to_owned(),
            value: value.to_owned(),
            ..Default::default()
        };
        let request = CreateTaskRequest {
            id: self.id.clone(),
            bundle: self.bundle.0.to_string_lossy().into_owned(),
            rootfs,
            options: options.map(any).into(),
            ..Default::default()
        };
        self.call("Create", &request).map(drop)
    }

    /// Starts the task.
    ///
    /// # Errors
    /// What the shim answers.
    pub fn start_task(&self) -> Result<(), ttrpc::Status> {
        self.call("Start", &StartRequest { id: self.id.clone(), ..Default::default() }).map(drop)
    }

    /// The task's state.
    ///
    /// # Errors
    /// What the shim answers.
    pub fn state(&self) -> Result<StateResponse> {
        let answer = self.call("State", &StateRequest { id: self.id.clone(), ..Default::default() });
        Ok(StateResponse::parse_from_bytes(&answer.map_err(said)?)?)
    }

    /// The shim's process.
    ///
    /// # Errors
    /// What the shim answers.
    pub fn pid(&self) -> Result<u32> {
        let answer = self.call("Connect", &ConnectRequest { id: self.id.clone(), ..Default::default() });
        Ok(ConnectResponse::parse_from_bytes(&answer.map_err(said)?)?.shim_pid)
    }

    /// Waits for the task's end; with which code.
    ///
    /// # Errors
    /// What the shim answers.
    pub fn wait(&self) -> Result<u32> {
        let answer = self.call("Wait", &WaitRequest { id: self.id.clone(), ..Default::default() });
        Ok(WaitResponse::parse_from_bytes(&answer.map_err(said)?)?.exit_status)
    }

    /// Deletes the task, which has ended.
    ///
    /// # Errors
    /// What the shim answers.
    pub fn delete_task(&self) -> Result<()> {
        let request = DeleteRequest { id: self.id.clone(), ..Default::default() };
        self.call("Delete", &request).map_err(said).map(drop)
    }

    /// Kills the task, waits for its end and deletes it.
    ///
    /// # Errors
    /// What the shim answers.
    pub fn end_task(&self) -> Result<()> {
        let id = &self.id;
        let kill = KillRequest { id: id.clone(), signal: 9, all: true, ..Default::default() };
        self.call("Kill", &kill).map_err(said)?;
        self.wait()?;
        self.delete_task()
    }

    /// Runs the shim's `delete`, as containerd does for a shim that has gone.
    ///
    /// # Errors
    /// When it cannot be started or does not end.
    pub fn delete(&self) -> Result<Finished> {
        let mut command = Command::new(&self.program);
        command.args(&self.arguments).arg("-bundle").arg(&self.bundle.0).arg("delete");
        command.current_dir(&self.bundle.0).env("RVM_CONFIG", &self.config);
        job::run(command, Input::Nothing, scale::command())
    }

    /// Ends the shim and removes its bundle.
    ///
    /// # Errors
    /// When it goes on.
    pub fn shut_down(self) -> Result<()> {
        let pid = self.pid()?;
        let ended = Process::read(pid.cast_signed()).context("the shim is gone already")?;
        // The answer may be lost with the connection.
        let _ = self.call("Shutdown", &ShutdownRequest { id: self.id.clone(), ..Default::default() });
        drop(self.client);
        until_gone(&ended)?;
        Ok(())
    }

    /// The response's payload.
    fn call(&self, method: &str, message: &impl Message) -> Result<Vec<u8>, ttrpc::Status> {
        ask(&self.client, "containerd.task.v2.Task", method, message)
    }
}

/// What a shim's service answers: the response's payload.
pub(crate) fn ask(
    client: &Client,
    service: &str,
    method: &str,
    message: &impl Message,
) -> Result<Vec<u8>, ttrpc::Status> {
    let request = ttrpc::Request {
        service: service.into(),
        method: method.into(),
        timeout_nano: i64::try_from(scale::container().as_nanos()).unwrap_or(i64::MAX),
        payload: message.write_to_bytes().unwrap_or_default(),
        ..Default::default()
    };
    match client.request(request) {
        Ok(response) => Ok(response.payload),
        Err(ttrpc::Error::RpcStatus(status)) => Err(status),
        Err(error) => Err(ttrpc::get_status(ttrpc::Code::UNKNOWN, format!("{method}: {error}"))),
    }
}

/// Waits until a shim that was told to end has gone.
pub(crate) fn until_gone(shim: &Process) -> Result<()> {
    let until = std::time::Instant::now() + scale::command();
    while is_there(shim) {
        ensure!(std::time::Instant::now() < until, "the shim goes on after Shutdown");
        std::thread::sleep(std::time::Duration::from_millis(10));
    }
    Ok(())
}

/// Whether this very process runs.
pub(crate) fn is_there(process: &Process) -> bool {
    Process::read(process.pid).is_some_and(|now| now.start_ticks == process.start_ticks && now.state != 'Z')
}

fn said(status: ttrpc::Status) -> anyhow::Error {
    anyhow::anyhow!("{}", status.message)
}
