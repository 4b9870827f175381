//! containerd's CRI plugin, asked as kubelet asks it.

pub mod later;
mod pod;
pub mod stream;

use std::{future::Future, path::Path};

use anyhow::{Context, Result, bail, ensure};
use k8s_cri::v1::{
    CreateContainerResponse, ListContainersRequest, ListPodSandboxRequest, RemovePodSandboxRequest,
    StopPodSandboxRequest, VersionRequest, runtime_service_client::RuntimeServiceClient,
};
use rootfs_builder::{image::Image, layer};
use serde_json::{Value, json};
use tokio::runtime::Runtime;
use tonic::{
    Request, Response, Status,
    codegen::http::uri::PathAndQuery,
    transport::{Channel, Endpoint},
};

use crate::{
    ctr::Ctr,
    job::{self, Input},
    scale,
    world::{World, shell},
};

use later::CreateContainer;
pub use pod::{Container, Executed, Pod};

/// The image of pause containers.
const PAUSE: &str = "docker.io/library/pause:rvm";
/// The network of pods.
const BRIDGE: &str = "rvm-cri0";
/// What is kept here from one case to the next.
const DIR: &str = "/run/rvm-tests/cri";
/// The cgroup that kubelet makes for pods.
const CGROUP: &str = "/sys/fs/cgroup/kubepods";

/// The handlers of pods, as RuntimeClasses name them: runc, rvm, and rvm whose shim owns the sandbox (the Sandbox API),
/// which containerd has from 2.0 on.
const HANDLERS: [&str; 3] = ["runc", "rvm", "rvm-sandbox"];

/// How to reach it, and the handler its pods are to have.
pub struct Cri {
    tokio: Runtime,
    channel: Channel,
    handler: &'static str,
    ctr: Ctr,
}

impl Cri {
    /// Makes what all cases have in common: images, what describes the network, and, once the world has settled, a
    /// containerd that has the plugin.
    ///
    /// # Errors
    /// When an image cannot be made or imported.
    pub fn prepare(world: &World) -> Result<()> {
        world.want_containerd_config(Some(&plugin_config("")));
        if Path::new(DIR).exists() {
            return Ok(());
        }
        std::fs::create_dir_all(format!("{DIR}/net.d"))?;
        std::fs::create_dir_all(format!("{DIR}/logs"))?;
        std::fs::write(format!("{DIR}/net.d/10-pods.conflist"), network().to_string())?;
        for path in [pause_image(world)?, world.stage().image.to_string_lossy().into_owned()] {
            let import = world.ctr().command(&["--namespace", "k8s.io", "images", "import", &path]);
            job::run(import, Input::Nothing, scale::container())?.success()?;
        }
        Ok(())
    }

    /// Runs `act` with pods under each handler in turn, in a containerd that has the plugin, and returns what it
    /// returned, with runc's first.
    ///
    /// # Errors
    /// What `act` returns, with the handler; when containerd does not come up; when something of a pod is left.
    pub fn compare<T>(world: &World, act: impl Fn(&Self) -> Result<T>) -> Result<Vec<(&'static str, T)>> {
        Self::compare_with(world, &plugin_config(""), act)
    }

    /// The same, with the containers' layers in a snapshotter of that name.
    ///
    /// # Errors
    /// As of [`Self::compare`].
    pub fn compare_on<T>(
        world: &World,
        snapshotter: &str,
        act: impl Fn(&Self) -> Result<T>,
    ) -> Result<Vec<(&'static str, T)>> {
        let more = format!("{PLUGIN}.containerd]\nsnapshotter = \"{snapshotter}\"\n");
        Self::compare_with(world, &plugin_config(&more), act)
    }

    fn compare_with<T>(
        world: &World,
        config: &str,
        act: impl Fn(&Self) -> Result<T>,
    ) -> Result<Vec<(&'static str, T)>> {
        Self::with(world, config, |cris| {
            let run = |cri: &Self| {
                let result = act(cri).and_then(|result| cri.has_nothing().map(|()| result));
                if result.is_err() {
                    // Else the next case would find it.
                    cri.sweep();
                }
                Ok((cri.handler, result.with_context(|| format!("under {}", cri.handler))?))
            };
            cris.iter().map(run).collect()
        })
    }

    /// Runs `act` with all handlers that this containerd can have, in one that has the plugin.
    ///
    /// # Errors
    /// What `act` returns; when containerd does not come up.
    pub fn with_all<T>(world: &World, act: impl FnOnce(&[Self]) -> Result<T>) -> Result<T> {
        Self::with(world, &plugin_config(""), act)
    }

    fn with<T>(world: &World, config: &str, act: impl FnOnce(&[Self]) -> Result<T>) -> Result<T> {
        world.want_containerd_config(Some(config));
        world.settle()?;
        let ctr = world.ctr();
        let compared = || -> Result<T> {
            let has_sandboxers = Self::connect(ctr.clone(), "runc")?.containerd_major()? >= 2;
            let handlers = if has_sandboxers { &HANDLERS[..] } else { &HANDLERS[..2] };
            let cris = handlers.iter().map(|handler| Self::connect(ctr.clone(), handler));
            let result = act(&cris.collect::<Result<Vec<_>>>()?)?;
            collect_garbage(world)?;
            Ok(result)
        };
        let outcome = compared();
        // What kubelet and the network's administrator would keep.
        let removed = shell(&format!(
            "ip link delete {BRIDGE} || true; rm -rf {DIR}/addresses; \
             for dir in {CGROUP} /run/netns; do [ ! -e $dir ] || rmdir $dir; done"
        ));
        let result = outcome?;
        removed?;
        Ok(result)
    }

    /// The first number of containerd's version.
    ///
    /// # Errors
    /// When it does not say.
    pub fn containerd_major(&self) -> Result<u32> {
        let mut client = self.client();
        let version = self.wait("Version", client.version(VersionRequest::default()))?.runtime_version;
        let major = version.trim_start_matches('v').split('.').next().and_then(|major| major.parse().ok());
        major.with_context(|| format!("the version of containerd: {version:?}"))
    }

    fn connect(ctr: Ctr, handler: &'static str) -> Result<Self> {
        // On this thread, which is in the mount namespace.
        let tokio = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        let endpoint = Endpoint::from_shared(format!("unix://{}", ctr.address()))?;
        let channel = tokio.block_on(endpoint.connect()).context("connecting to containerd")?;
        Ok(Self { tokio, channel, handler, ctr })
    }

    /// Another connection with the same handler, for another thread.
    ///
    /// # Errors
    /// When containerd does not answer.
    pub fn again(&self, world: &World) -> Result<Self> {
        Self::connect(world.ctr(), self.handler)
    }

    /// The handler of its pods.
    pub fn handler(&self) -> &'static str {
        self.handler
    }

    /// Whether its pods are microVMs.
    pub fn is_rvm(&self) -> bool {
        self.handler != "runc"
    }

    fn client(&self) -> RuntimeServiceClient<Channel> {
        RuntimeServiceClient::new(self.channel.clone())
    }

    /// The id of a container that is made as `request` says.
    fn create_container(&self, request: CreateContainer) -> Result<String> {
        const PATH: &str = "/runtime.v1.RuntimeService/CreateContainer";
        let mut client = tonic::client::Grpc::new(self.channel.clone());
        let call = async {
            client.ready().await.map_err(|error| Status::unavailable(error.to_string()))?;
            let codec = tonic_prost::ProstCodec::<_, CreateContainerResponse>::default();
            client.unary(Request::new(request), PathAndQuery::from_static(PATH), codec).await
        };
        Ok(self.wait("CreateContainer", call)?.container_id)
    }

    /// Waits for an answer, as long as a container may take.
    fn wait<T>(&self, name: &str, call: impl Future<Output = Result<Response<T>, Status>>) -> Result<T> {
        let limit = scale::container();
        let answer = self.tokio.block_on(async { tokio::time::timeout(limit, call).await });
        match answer.with_context(|| format!("no answer to {name} within {limit:?}"))? {
            Ok(answer) => Ok(answer.into_inner()),
            Err(status) => bail!("{name}: {:?}: {}", status.code(), status.message()),
        }
    }

    /// Removes what a failed case left.
    fn sweep(&self) {
        let mut client = self.client();
        let listed = self.wait("ListPodSandbox", client.list_pod_sandbox(ListPodSandboxRequest::default()));
        for pod in listed.map(|pods| pods.items).unwrap_or_default() {
            let pod_sandbox_id = pod.id;
            let stop = StopPodSandboxRequest { pod_sandbox_id: pod_sandbox_id.clone() };
            let stopped = self.wait("StopPodSandbox", client.stop_pod_sandbox(stop)).map(drop);
            let remove = client.remove_pod_sandbox(RemovePodSandboxRequest { pod_sandbox_id });
            let removed = self.wait("RemovePodSandbox", remove).map(drop);
            if let Err(error) = stopped.and(removed) {
                println!("{error:#}");
            }
        }
        if let Err(error) = shell(&format!("rmdir {CGROUP}/pod-*; rm -rf {DIR}/logs/*")) {
            println!("{error:#}");
        }
    }

    /// Checks that no pod and no container is left.
    fn has_nothing(&self) -> Result<()> {
        let mut client = self.client();
        let pods = self.wait("ListPodSandbox", client.list_pod_sandbox(ListPodSandboxRequest::default()))?;
        let containers =
            self.wait("ListContainers", client.list_containers(ListContainersRequest::default()))?;
        ensure!(pods.items.is_empty() && containers.containers.is_empty(), "left: {pods:?} {containers:?}");
        Ok(())
    }
}

/// Has containerd remove what removed containers had, which it does a moment later by itself.
fn collect_garbage(world: &World) -> Result<()> {
    for args in [["create", "--id", "garbage"], ["delete", "--sync", "garbage"]] {
        let args = [&["--namespace", "k8s.io", "leases"][..], &args].concat();
        world.ctr().run(&args, scale::command())?.success()?;
    }
    Ok(())
}

/// An image whose program waits.
fn pause_image(world: &World) -> Result<String> {
    let layer = layer::busybox(&world.rootfs()?.join("bin/busybox"))?;
    let mut image = Image::new(PAUSE, vec![layer])?;
    image.command = vec!["sleep".into(), "2147483647".into()];
    let path = format!("{DIR}/pause.tar");
    std::fs::write(&path, image.archive()?)?;
    Ok(path)
}

/// The network of pods, as a list of CNI's plugins.
fn network() -> Value {
    json!({
        "cniVersion": "0.4.0",
        "name": "pods",
        "plugins": [{
            "type": "bridge",
            "bridge": BRIDGE,
            "isGateway": true,
            "ipam": {
                "type": "host-local",
                "dataDir": format!("{DIR}/addresses"),
                "ranges": [[{ "subnet": "10.85.0.0/24" }]],
                "routes": [{ "dst": "0.0.0.0/0" }],
            },
        }],
    })
}

/// How each of the plugin's tables in containerd's configuration (version 2) begins.
const PLUGIN: &str = "[plugins.\"io.containerd.grpc.v1.cri\"";

/// The part of containerd's configuration that is the plugin's, with `more` tables.
fn plugin_config(more: &str) -> String {
    let rvm = "runtime_type = \"io.rvm.v2\"\nprivileged_without_host_devices = true\npod_annotations = [\"io.rvm.*\"]\n";
    format!(
        "[plugins.\"io.containerd.nri.v1.nri\"]\ndisable = true\n\
         {PLUGIN}]\nsandbox_image = \"{PAUSE}\"\nstream_server_address = \"127.0.0.1\"\n\
         disable_hugetlb_controller = false\n\
         {PLUGIN}.cni]\nbin_dir = \"{}\"\nconf_dir = \"{DIR}/net.d\"\n\
         {PLUGIN}.containerd.runtimes.runc]\nruntime_type = \"io.containerd.runc.v2\"\n\
         {PLUGIN}.containerd.runtimes.rvm]\n{rvm}\
         {PLUGIN}.containerd.runtimes.rvm-sandbox]\n{rvm}sandboxer = \"shim\"\n{more}",
        crate::cni::plugins().display()
    )
}
