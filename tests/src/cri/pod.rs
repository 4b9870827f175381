//! A pod and its containers.

use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use k8s_cri::v1::{
    ContainerConfig, ContainerMetadata, ContainerState, ContainerStats, ContainerStatsRequest,
    ContainerStatus, ContainerStatusRequest, CreateContainerRequest, ExecSyncRequest, ImageSpec,
    LinuxContainerConfig, LinuxContainerResources, LinuxContainerSecurityContext, LinuxPodSandboxConfig,
    LinuxSandboxSecurityContext, NamespaceMode, NamespaceOption, PodSandboxConfig, PodSandboxMetadata,
    PodSandboxStatus, PodSandboxStatusRequest, RemoveContainerRequest, RemovePodSandboxRequest,
    RunPodSandboxRequest, StartContainerRequest, StopContainerRequest, StopPodSandboxRequest,
    UpdateContainerResourcesRequest,
};

use super::{
    CGROUP, Cri, DIR,
    later::{CreateContainer, More},
};
use crate::{scale, world::IMAGE};

/// A pod; removed by [`Pod::remove`].
pub struct Pod<'a> {
    /// Its id.
    pub id: String,
    pub(super) cri: &'a Cri,
    config: PodSandboxConfig,
}

/// A container of a pod; removed with it.
pub struct Container<'a> {
    /// Its id.
    pub id: String,
    pod: &'a Pod<'a>,
    log: String,
}

/// What a command in a container gave.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Executed {
    /// Its exit code.
    pub code: i32,
    /// Its standard output.
    pub stdout: String,
    /// Its standard error.
    pub stderr: String,
}

impl<'a> Pod<'a> {
    /// Runs one; `edit` changes what kubelet would say of a plain pod.
    ///
    /// # Errors
    /// What containerd answers.
    pub fn run(cri: &'a Cri, name: &str, edit: impl FnOnce(&mut PodSandboxConfig)) -> Result<Self> {
        let logs = logs(name);
        std::fs::create_dir_all(&logs)?;
        // Kubelet makes the pod's cgroup, and removes it.
        std::fs::create_dir_all(cgroup(name))?;
        let mut config = PodSandboxConfig {
            metadata: Some(PodSandboxMetadata {
                name: name.to_owned(),
                uid: format!("uid-{name}"),
                namespace: "default".into(),
                attempt: 0,
            }),
            hostname: name.to_owned(),
            log_directory: logs,
            linux: Some(LinuxPodSandboxConfig {
                cgroup_parent: cgroup(name).trim_start_matches("/sys/fs/cgroup").to_owned(),
                security_context: Some(LinuxSandboxSecurityContext {
                    namespace_options: Some(NamespaceOption {
                        pid: NamespaceMode::Container.into(),
                        ..Default::default()
                    }),
                    ..Default::default()
                }),
                ..Default::default()
            }),
            ..Default::default()
        };
        edit(&mut config);
        let request =
            RunPodSandboxRequest { config: Some(config.clone()), runtime_handler: cri.handler.to_owned() };
        let id = cri.wait("RunPodSandbox", cri.client().run_pod_sandbox(request))?.pod_sandbox_id;
        Ok(Self { id, cri, config })
    }

    /// Runs one that cannot be. Returns why.
    ///
    /// # Errors
    /// When it runs all the same.
    pub fn refused(cri: &Cri, name: &str, edit: impl FnOnce(&mut PodSandboxConfig)) -> Result<String> {
        match Pod::run(cri, name, edit) {
            Ok(pod) => {
                pod.remove()?;
                bail!("{name} runs");
            }
            Err(error) => {
                std::fs::remove_dir_all(logs(name))?;
                std::fs::remove_dir(cgroup(name)).with_context(|| format!("removing {}", cgroup(name)))?;
                Ok(format!("{error:#}"))
            }
        }
    }

    /// A file of its cgroup on the host.
    ///
    /// # Errors
    /// When it is not there.
    pub fn cgroup_file(&self, file: &str) -> Result<String> {
        let name = &self.config.metadata.as_ref().context("a pod has a name")?.name;
        let path = format!("{}/{file}", cgroup(name));
        std::fs::read_to_string(&path).context(path)
    }

    /// How it is.
    ///
    /// # Errors
    /// What containerd answers.
    pub fn status(&self) -> Result<PodSandboxStatus> {
        let request = PodSandboxStatusRequest { pod_sandbox_id: self.id.clone(), verbose: false };
        let answer = self.cri.wait("PodSandboxStatus", self.cri.client().pod_sandbox_status(request))?;
        answer.status.context("PodSandboxStatus: no status")
    }

    /// Makes a container of the busybox image with this command; `edit` changes what kubelet would say of a plain one.
    ///
    /// # Errors
    /// What containerd answers.
    pub fn create(
        &self,
        name: &str,
        command: &[&str],
        edit: impl FnOnce(&mut ContainerConfig),
    ) -> Result<Container<'_>> {
        self.create_with(name, command, More::default(), edit)
    }

    /// The same with what the client's messages do not have yet.
    ///
    /// # Errors
    /// What containerd answers.
    pub fn create_with(
        &self,
        name: &str,
        command: &[&str],
        more: More,
        edit: impl FnOnce(&mut ContainerConfig),
    ) -> Result<Container<'_>> {
        let log = format!("{name}.log");
        let mut config = ContainerConfig {
            metadata: Some(ContainerMetadata { name: name.to_owned(), attempt: 0 }),
            image: Some(ImageSpec { image: IMAGE.to_owned(), ..Default::default() }),
            command: command.iter().map(|&word| word.to_owned()).collect(),
            log_path: log.clone(),
            linux: Some(LinuxContainerConfig {
                security_context: Some(LinuxContainerSecurityContext {
                    namespace_options: self.namespaces(),
                    ..Default::default()
                }),
                ..Default::default()
            }),
            ..Default::default()
        };
        edit(&mut config);
        let request = CreateContainerRequest {
            pod_sandbox_id: self.id.clone(),
            config: Some(config),
            sandbox_config: Some(self.config.clone()),
        };
        let id = self.cri.create_container(CreateContainer::new(request, more))?;
        Ok(Container { id, pod: self, log: format!("{}/{log}", self.config.log_directory) })
    }

    /// Makes one and starts it.
    ///
    /// # Errors
    /// What containerd answers.
    pub fn start(
        &self,
        name: &str,
        command: &[&str],
        edit: impl FnOnce(&mut ContainerConfig),
    ) -> Result<Container<'_>> {
        let container = self.create(name, command, edit)?;
        container.start()?;
        Ok(container)
    }

    /// Stops and removes it with its containers, as kubelet does.
    ///
    /// # Errors
    /// What containerd answers.
    pub fn remove(self) -> Result<()> {
        let stop = StopPodSandboxRequest { pod_sandbox_id: self.id.clone() };
        self.cri.wait("StopPodSandbox", self.cri.client().stop_pod_sandbox(stop))?;
        let remove = RemovePodSandboxRequest { pod_sandbox_id: self.id.clone() };
        self.cri.wait("RemovePodSandbox", self.cri.client().remove_pod_sandbox(remove))?;
        std::fs::remove_dir_all(&self.config.log_directory)?;
        // Nothing is in it.
        let cgroup = cgroup(self.config.metadata.as_ref().map_or("", |of| &of.name));
        std::fs::remove_dir(&cgroup).with_context(|| format!("removing {cgroup}"))
    }

    fn namespaces(&self) -> Option<NamespaceOption> {
        self.config.linux.as_ref()?.security_context.as_ref()?.namespace_options.clone()
    }
}

/// Where a pod with this name has the logs of its containers.
fn logs(name: &str) -> String {
    format!("{DIR}/logs/{name}")
}

/// The cgroup of a pod with this name.
fn cgroup(name: &str) -> String {
    format!("{CGROUP}/pod-{name}")
}

impl Container<'_> {
    /// Starts it.
    ///
    /// # Errors
    /// What containerd answers.
    pub fn start(&self) -> Result<()> {
        let request = StartContainerRequest { container_id: self.id.clone() };
        self.cri().wait("StartContainer", self.cri().client().start_container(request)).map(drop)
    }

    /// Runs a command in it to its end.
    ///
    /// # Errors
    /// What containerd answers.
    pub fn exec(&self, command: &[&str]) -> Result<Executed> {
        let request = ExecSyncRequest {
            container_id: self.id.clone(),
            cmd: command.iter().map(|&word| word.to_owned()).collect(),
            timeout: 0,
        };
        let answer = self.cri().wait("ExecSync", self.cri().client().exec_sync(request))?;
        let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
        Ok(Executed { code: answer.exit_code, stdout: text(&answer.stdout), stderr: text(&answer.stderr) })
    }

    /// What a shell script in it prints; it has to end with 0.
    ///
    /// # Errors
    /// When it does not.
    pub fn sh(&self, script: &str) -> Result<String> {
        let done = self.exec(&["sh", "-ec", script])?;
        ensure!(done.code == 0, "{script}: {done:?}");
        Ok(done.stdout)
    }

    /// How it is.
    ///
    /// # Errors
    /// What containerd answers.
    pub fn status(&self) -> Result<ContainerStatus> {
        let request = ContainerStatusRequest { container_id: self.id.clone(), verbose: false };
        let answer = self.cri().wait("ContainerStatus", self.cri().client().container_status(request))?;
        answer.status.context("ContainerStatus: no status")
    }

    /// Changes its limits that are set.
    ///
    /// # Errors
    /// What containerd answers.
    pub fn update(&self, resources: LinuxContainerResources) -> Result<()> {
        let request = UpdateContainerResourcesRequest {
            container_id: self.id.clone(),
            linux: Some(resources),
            ..Default::default()
        };
        let mut client = self.cri().client();
        self.cri().wait("UpdateContainerResources", client.update_container_resources(request)).map(drop)
    }

    /// What it has used.
    ///
    /// # Errors
    /// What containerd answers.
    pub fn stats(&self) -> Result<ContainerStats> {
        let request = ContainerStatsRequest { container_id: self.id.clone() };
        let answer = self.cri().wait("ContainerStats", self.cri().client().container_stats(request))?;
        answer.stats.context("ContainerStats: no statistics")
    }

    /// What its shim tells of it, as `ctr` has it: the message for cgroups of version 2.
    ///
    /// # Errors
    /// What containerd answers.
    pub fn metrics(&self) -> Result<serde_json::Value> {
        let args = ["--namespace", "k8s.io", "task", "metrics", "--format", "json", &self.id];
        Ok(serde_json::from_str(&self.cri().ctr.run(&args, scale::command())?.success()?.text())?)
    }

    /// Waits until it has ended; how.
    ///
    /// # Errors
    /// When the limit passes.
    pub fn ended(&self) -> Result<ContainerStatus> {
        let until = Instant::now() + scale::container();
        loop {
            let status = self.status()?;
            if status.state() == ContainerState::ContainerExited {
                return Ok(status);
            }
            ensure!(Instant::now() < until, "{} does not end: {status:?}", self.id);
            std::thread::sleep(scale::seconds(0.01));
        }
    }

    /// What it has printed, without the times of day: `stdout F text`.
    ///
    /// # Errors
    /// When there is no log.
    pub fn log(&self) -> Result<String> {
        let text = std::fs::read_to_string(&self.log).with_context(|| format!("reading {}", self.log))?;
        let without_time = |line: &str| line.split_once(' ').map_or("", |(_, rest)| rest).to_owned() + "\n";
        Ok(text.lines().map(without_time).collect())
    }

    /// Waits until it has printed `text`; what it has printed.
    ///
    /// # Errors
    /// When the limit passes.
    pub fn printed(&self, text: &str) -> Result<String> {
        let until = Instant::now() + scale::container();
        loop {
            let log = self.log().unwrap_or_default();
            if log.contains(text) {
                return Ok(log);
            }
            ensure!(Instant::now() < until, "{text:?} is not in {log:?}");
            // Benchmarks wait for this, too.
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    /// Stops it, killing it after `seconds`.
    ///
    /// # Errors
    /// What containerd answers.
    pub fn stop(&self, seconds: i64) -> Result<()> {
        let request = StopContainerRequest { container_id: self.id.clone(), timeout: seconds };
        self.cri().wait("StopContainer", self.cri().client().stop_container(request)).map(drop)
    }

    /// Removes it.
    ///
    /// # Errors
    /// What containerd answers.
    pub fn remove(self) -> Result<()> {
        let request = RemoveContainerRequest { container_id: self.id.clone() };
        self.cri().wait("RemoveContainer", self.cri().client().remove_container(request)).map(drop)
    }

    pub(super) fn cri(&self) -> &Cri {
        self.pod.cri
    }
}
