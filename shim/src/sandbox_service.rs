//! containerd's Sandbox API (`containerd.runtime.sandbox.v1`): messages in, calls to [`Tasks`], messages out.

use std::{sync::Arc, time::SystemTime};

use async_trait::async_trait;
use containerd_shim_protos::{
    sandbox_api::{
        CreateSandboxRequest, CreateSandboxResponse, PingRequest, PingResponse, PlatformRequest,
        PlatformResponse, SandboxMetricsRequest, SandboxMetricsResponse, SandboxStatusRequest,
        SandboxStatusResponse, ShutdownSandboxRequest, ShutdownSandboxResponse, StartSandboxRequest,
        StartSandboxResponse, StopSandboxRequest, StopSandboxResponse, WaitSandboxRequest,
        WaitSandboxResponse,
    },
    sandbox_async::Sandbox,
    types::platform::Platform,
};
use ttrpc::asynchronous::TtrpcContext;

use crate::{
    error::Error,
    events::timestamp,
    metrics, name,
    service::to_its_end,
    task::{CreateSandbox, Tasks},
};

/// States of a sandbox, in the words of CRI.
const READY: &str = "SANDBOX_READY";
const NOT_READY: &str = "SANDBOX_NOTREADY";

/// The Sandbox API of one shim.
pub struct SandboxService {
    /// What it serves.
    pub tasks: Arc<Tasks>,
}

#[async_trait]
impl Sandbox for SandboxService {
    async fn create_sandbox(
        &self,
        _: &TtrpcContext,
        request: CreateSandboxRequest,
    ) -> ttrpc::Result<CreateSandboxResponse> {
        name::check("sandbox_id", &request.sandbox_id).map_err(Error::from)?;
        if !request.rootfs.is_empty() {
            let reason = "rootfs: a sandbox has no root file system; its containers have their own";
            return Err(Error::InvalidArgument(reason.into()).into());
        }
        let create = CreateSandbox {
            id: request.sandbox_id,
            bundle: request.bundle_path.into(),
            network: request.netns_path.into(),
            options: request.options.into_option(),
        };
        self.tasks.create_sandbox(create).await.inspect_err(|error| log::warn!("create: {error}"))?;
        Ok(CreateSandboxResponse::new())
    }

    async fn start_sandbox(
        &self,
        _: &TtrpcContext,
        request: StartSandboxRequest,
    ) -> ttrpc::Result<StartSandboxResponse> {
        let tasks = self.tasks.clone();
        let start = async move { tasks.start_sandbox(&request.sandbox_id).await };
        let (pid, created_at) = to_its_end(start).await.inspect_err(|error| log::warn!("start: {error}"))?;
        Ok(StartSandboxResponse { pid, created_at: Some(timestamp(created_at)).into(), ..Default::default() })
    }

    async fn platform(&self, _: &TtrpcContext, _: PlatformRequest) -> ttrpc::Result<PlatformResponse> {
        let platform = Platform { os: "linux".into(), architecture: "amd64".into(), ..Default::default() };
        Ok(PlatformResponse { platform: Some(platform).into(), ..Default::default() })
    }

    async fn stop_sandbox(
        &self,
        _: &TtrpcContext,
        request: StopSandboxRequest,
    ) -> ttrpc::Result<StopSandboxResponse> {
        let tasks = self.tasks.clone();
        to_its_end(async move { tasks.stop_sandbox(&request.sandbox_id).await }).await?;
        Ok(StopSandboxResponse::new())
    }

    async fn wait_sandbox(
        &self,
        _: &TtrpcContext,
        request: WaitSandboxRequest,
    ) -> ttrpc::Result<WaitSandboxResponse> {
        let exit = self.tasks.wait_sandbox(&request.sandbox_id).await?;
        Ok(WaitSandboxResponse {
            exit_status: exit.status,
            exited_at: Some(timestamp(exit.at)).into(),
            ..Default::default()
        })
    }

    async fn sandbox_status(
        &self,
        _: &TtrpcContext,
        request: SandboxStatusRequest,
    ) -> ttrpc::Result<SandboxStatusResponse> {
        let status = self.tasks.sandbox_status(&request.sandbox_id)?;
        let state = if status.ready { READY } else { NOT_READY };
        let mut response = SandboxStatusResponse {
            sandbox_id: request.sandbox_id,
            pid: status.pid,
            state: state.into(),
            created_at: Some(timestamp(status.created_at)).into(),
            exited_at: status.exit.map(|exit| timestamp(exit.at)).into(),
            ..Default::default()
        };
        if request.verbose {
            response.info = [("pid", status.pid.to_string()), ("state", state.into())]
                .map(|(k, v)| (k.to_owned(), v))
                .into();
        }
        Ok(response)
    }

    async fn ping_sandbox(&self, _: &TtrpcContext, request: PingRequest) -> ttrpc::Result<PingResponse> {
        self.tasks.ping_sandbox(&request.sandbox_id).await?;
        Ok(PingResponse::new())
    }

    async fn shutdown_sandbox(
        &self,
        _: &TtrpcContext,
        request: ShutdownSandboxRequest,
    ) -> ttrpc::Result<ShutdownSandboxResponse> {
        let (tasks, id) = (self.tasks.clone(), request.sandbox_id.clone());
        to_its_end(async move { tasks.stop_sandbox(&id).await }).await?;
        // With the answer next: once the shim may end, it closes connections.
        self.tasks.shut_down_sandbox(&request.sandbox_id)?;
        Ok(ShutdownSandboxResponse::new())
    }

    async fn sandbox_metrics(
        &self,
        _: &TtrpcContext,
        request: SandboxMetricsRequest,
    ) -> ttrpc::Result<SandboxMetricsResponse> {
        let stats = self.tasks.sandbox_stats(&request.sandbox_id).await?;
        let mut response = SandboxMetricsResponse::new();
        let metric = response.metrics.mut_or_insert_default();
        metric.timestamp = Some(timestamp(SystemTime::now())).into();
        metric.id = request.sandbox_id;
        metric.data = Some(metrics::encode(&stats)).into();
        Ok(response)
    }
}
