//! A sandbox by containerd's Sandbox API, asked of a shim that no containerd has started.

use std::{
    fs,
    path::PathBuf,
    process::{Command, Stdio},
};

use anyhow::{Context, Result, ensure};
use containerd_shim_protos::{
    Client,
    api::{CreateTaskRequest, DeleteRequest, StartRequest, WaitRequest, WaitResponse},
    protobuf::{Message, well_known_types::any::Any},
    sandbox_api::{
        CreateSandboxRequest, SandboxStatusRequest, SandboxStatusResponse, StartSandboxRequest,
        StartSandboxResponse, WaitSandboxRequest, WaitSandboxResponse,
    },
    ttrpc::{self, Status},
    types::mount::Mount,
};
use k8s_cri::v1::PodSandboxConfig;
use serde_json::{Value, json};

use crate::{
    bare::{self, EVENTS},
    bundle,
    host::{self, Process},
    job::{self, Input},
    scale,
    world::World,
};

/// The APIs' names, as containerd 2.x speaks them.
const SANDBOX: &str = "containerd.runtime.sandbox.v1.Sandbox";
const TASK: &str = "containerd.task.v3.Task";

/// A shim whose bundle has no specification.
pub struct PodShim {
    /// The sandbox's id.
    pub id: String,
    dir: PathBuf,
    process: Process,
    address: String,
}

impl PodShim {
    /// Starts one.
    ///
    /// # Errors
    /// When it does not come up.
    pub fn start(world: &World, id: &str) -> Result<Self> {
        let dir = world.dir().join("pod-shim");
        let bundle = dir.join(id);
        fs::create_dir_all(&bundle)?;
        let mut command = Command::new(world.stage().shim());
        command.args([
            "-namespace",
            "default",
            "-address",
            "/run/containerd/containerd.sock",
            "-id",
            id,
            "start",
        ]);
        command.current_dir(&bundle).stdin(Stdio::null());
        command.env("TTRPC_ADDRESS", EVENTS).env("RVM_CONFIG", world.config_path());
        let started = job::run(command, Input::Nothing, scale::command())?.success()?;
        let address = started.text().trim().to_owned();
        let is_it = |process: &Process| {
            process.state != 'Z' && process.args.ends_with(&["-id", id, "start"].map(str::to_owned))
        };
        let process =
            host::pids().into_iter().filter_map(Process::read).find(is_it).context("no shim runs")?;
        Ok(Self { id: id.to_owned(), dir, process, address })
    }

    /// Asks its Sandbox API. One connection for each question: several may be asked at once.
    ///
    /// # Errors
    /// What it answers.
    pub fn ask(&self, method: &str, request: &impl Message) -> Result<Vec<u8>, Status> {
        self.call(SANDBOX, method, request)
    }

    /// Creates the sandbox.
    ///
    /// # Errors
    /// What the shim answers.
    pub fn create(&self, network: &str, config: Option<&PodSandboxConfig>) -> Result<(), Status> {
        let options = |config: &PodSandboxConfig| Any {
            type_url: "runtime.v1.PodSandboxConfig".into(),
            value: prost::Message::encode_to_vec(config),
            ..Default::default()
        };
        let request = CreateSandboxRequest {
            sandbox_id: self.id.clone(),
            bundle_path: self.dir.join(&self.id).to_string_lossy().into_owned(),
            netns_path: network.to_owned(),
            options: config.map(options).into(),
            ..Default::default()
        };
        self.ask("CreateSandbox", &request).map(drop)
    }

    /// Starts it; its pid.
    ///
    /// # Errors
    /// What the shim answers.
    pub fn start_sandbox(&self) -> Result<u32, Status> {
        let answer = self
            .ask("StartSandbox", &StartSandboxRequest { sandbox_id: self.id.clone(), ..Default::default() });
        Ok(StartSandboxResponse::parse_from_bytes(&answer?).unwrap_or_default().pid)
    }

    /// How it is.
    ///
    /// # Errors
    /// What the shim answers.
    pub fn status(&self) -> Result<SandboxStatusResponse, Status> {
        let request =
            SandboxStatusRequest { sandbox_id: self.id.clone(), verbose: true, ..Default::default() };
        Ok(SandboxStatusResponse::parse_from_bytes(&self.ask("SandboxStatus", &request)?).unwrap_or_default())
    }

    /// Waits for its end; with which code.
    ///
    /// # Errors
    /// What the shim answers.
    pub fn wait(&self) -> Result<u32, Status> {
        let answer = self
            .ask("WaitSandbox", &WaitSandboxRequest { sandbox_id: self.id.clone(), ..Default::default() });
        Ok(WaitSandboxResponse::parse_from_bytes(&answer?).unwrap_or_default().exit_status)
    }

    /// Asks its Task API.
    ///
    /// # Errors
    /// What it answers.
    pub fn ask_task(&self, method: &str, request: &impl Message) -> Result<Vec<u8>, Status> {
        self.call(TASK, method, request)
    }

    /// Creates and starts a container in the sandbox that runs a shell script; `edit` changes its specification.
    ///
    /// # Errors
    /// What the shim answers.
    pub fn run(&self, world: &World, id: &str, script: &str, edit: impl FnOnce(&mut Value)) -> Result<()> {
        self.run_on(world, id, Vec::new(), script, edit)
    }

    /// The same on a snapshot's mounts.
    ///
    /// # Errors
    /// What the shim answers.
    pub fn run_on(
        &self,
        world: &World,
        id: &str,
        rootfs: Vec<Mount>,
        script: &str,
        edit: impl FnOnce(&mut Value),
    ) -> Result<()> {
        let pid = self.status().map_err(said)?.pid;
        let bundle = self.dir.join(id);
        fs::create_dir_all(&bundle)?;
        let mut spec = bundle::spec(&world.rootfs()?, &["sh", "-c", script]);
        spec["root"]["readonly"] = true.into();
        // As containerd's CRI plugin has it, whichever way the sandbox was made.
        spec["hostname"] = "".into();
        spec["annotations"] = json!({
            "io.kubernetes.cri.container-type": "container",
            "io.kubernetes.cri.sandbox-id": self.id,
        });
        spec["linux"]["namespaces"] = json!([
            {"type": "pid"}, {"type": "mount"},
            {"type": "ipc", "path": format!("/proc/{pid}/ns/ipc")},
            {"type": "uts", "path": format!("/proc/{pid}/ns/uts")},
            {"type": "network", "path": format!("/proc/{pid}/ns/net")},
        ]);
        let shm = json!({"destination": "/dev/shm", "type": "bind", "source": "/run/nobody/made/this/shm", "options": ["rbind", "rw"]});
        let out =
            json!({"destination": "/tmp", "type": "bind", "source": bundle, "options": ["rbind", "rw"]});
        if let Some(mounts) = spec["mounts"].as_array_mut() {
            mounts.extend([shm, out]);
        }
        edit(&mut spec);
        fs::write(bundle.join("config.json"), serde_json::to_vec(&spec)?)?;
        let create = CreateTaskRequest {
            id: id.to_owned(),
            bundle: bundle.to_string_lossy().into_owned(),
            rootfs,
            ..Default::default()
        };
        self.ask_task("Create", &create).map_err(said)?;
        self.ask_task("Start", &StartRequest { id: id.to_owned(), ..Default::default() }).map_err(said)?;
        Ok(())
    }

    /// What a container has written to the file `/tmp/out`, once it has ended; it is deleted.
    ///
    /// # Errors
    /// When it does not end with 0.
    pub fn output(&self, id: &str) -> Result<String> {
        let code = self.exit(id)?;
        let text = fs::read_to_string(self.dir.join(id).join("out")).unwrap_or_default();
        ensure!(code == 0, "{id} ends with {code}: {text}");
        self.delete(id)?;
        Ok(text)
    }

    /// Waits for a container's end; with which code.
    ///
    /// # Errors
    /// What the shim answers.
    pub fn exit(&self, id: &str) -> Result<u32> {
        let wait = self.ask_task("Wait", &WaitRequest { id: id.to_owned(), ..Default::default() });
        Ok(WaitResponse::parse_from_bytes(&wait.map_err(said)?)?.exit_status)
    }

    /// Deletes a container that has ended.
    ///
    /// # Errors
    /// What the shim answers.
    pub fn delete(&self, id: &str) -> Result<()> {
        self.ask_task("Delete", &DeleteRequest { id: id.to_owned(), ..Default::default() })
            .map_err(said)
            .map(drop)
    }

    /// Whether the shim runs.
    pub fn is_there(&self) -> bool {
        bare::is_there(&self.process)
    }

    /// Waits until the shim has gone, and removes the bundles.
    ///
    /// # Errors
    /// When it goes on.
    pub fn gone(self) -> Result<()> {
        bare::until_gone(&self.process)?;
        fs::remove_dir_all(&self.dir).context("removing the bundles")
    }

    fn call(&self, service: &str, method: &str, message: &impl Message) -> Result<Vec<u8>, Status> {
        let unknown = |error| ttrpc::get_status(ttrpc::Code::UNKNOWN, format!("{method}: {error}"));
        bare::ask(&Client::connect(&self.address).map_err(unknown)?, service, method, message)
    }
}

/// An answer that was none, as an error.
#[must_use]
pub fn said(status: Status) -> anyhow::Error {
    anyhow::anyhow!("{:?}: {}", status.code(), status.message)
}
