//! A shim's Task API, asked as containerd asks it, for what `ctr` has no command.

use std::path::Path;

use anyhow::{Context, Result, anyhow};
use containerd_shim_protos::api::{DeleteRequest, UpdateTaskRequest};
use protobuf::{Message, well_known_types::any::Any};
use ttrpc::{Request, asynchronous::Client};

use crate::scale;

/// Where the shim of `container` listens.
fn address(container: &str) -> Result<String> {
    let path = Path::new("/run/containerd/io.containerd.runtime.v2.task/default").join(container);
    std::fs::read_to_string(path.join("address")).with_context(|| format!("the shim of {container}"))
}

/// One call; the error is the shim's.
fn call(container: &str, method: &str, request: &impl Message) -> Result<Vec<u8>> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    runtime.block_on(async {
        let client = Client::connect(address(container)?.trim()).await.map_err(|error| anyhow!("{error}"))?;
        let request = Request {
            // The name containerd 1.6 and its runc shim know.
            service: "containerd.task.v2.Task".into(),
            method: method.into(),
            timeout_nano: i64::try_from(scale::container().as_nanos())?,
            payload: request.write_to_bytes()?,
            ..Default::default()
        };
        match client.request(request).await {
            Ok(response) => Ok(response.payload),
            Err(ttrpc::Error::RpcStatus(status)) => Err(anyhow!("{}", status.message)),
            Err(error) => Err(anyhow!("{error}")),
        }
    })
}

/// Changes a container's limits; `resources` is a `LinuxResources`.
///
/// # Errors
/// What the shim answers.
pub fn update(container: &str, resources: &serde_json::Value) -> Result<()> {
    let resources = Any {
        type_url: "types.containerd.io/opencontainers/runtime-spec/1/LinuxResources".into(),
        value: resources.to_string().into_bytes(),
        ..Default::default()
    };
    let request =
        UpdateTaskRequest { id: container.into(), resources: Some(resources).into(), ..Default::default() };
    call(container, "Update", &request).map(drop)
}

/// Deletes a container's task, without asking containerd whether that is wise.
///
/// # Errors
/// What the shim answers.
pub fn delete(container: &str) -> Result<()> {
    call(container, "Delete", &DeleteRequest { id: container.into(), ..Default::default() }).map(drop)
}
