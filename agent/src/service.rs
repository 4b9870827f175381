//! The ttrpc service: which method asks what of the sandbox, and which status
//! code an error becomes. No logic lives here.

use std::{
    os::fd::{IntoRawFd, OwnedFd},
    sync::Arc,
};

use async_trait::async_trait;
use rvm_protocol::agent::{Agent, Empty, SetUpSandboxRequest, create_agent};
use ttrpc::{
    Code,
    r#async::{Server, TtrpcContext},
};

use crate::{error::Error, init, sandbox::Sandbox};

struct Service {
    sandbox: Arc<Sandbox>,
}

/// Serves requests that arrive at `listener`, in the background.
pub async fn start(listener: OwnedFd, sandbox: Arc<Sandbox>) -> Result<(), init::Error> {
    let server = Server::new().register_service(create_agent(Arc::new(Service { sandbox })));
    // SAFETY: `listener` is a listening vsock socket and gives up its descriptor.
    let server = unsafe { server.add_vsock_listener(listener.into_raw_fd()) };
    server.map_err(init::Error::Serve)?.start().await.map_err(init::Error::Serve)
}

/// The one place where errors become status codes.
fn status(error: Error) -> ttrpc::Error {
    let code = match error {
        Error::Invalid { .. } => Code::INVALID_ARGUMENT,
        Error::NotFound(_) => Code::NOT_FOUND,
        Error::AlreadyExists(_) => Code::ALREADY_EXISTS,
        Error::Precondition(_) => Code::FAILED_PRECONDITION,
        // As containerd's own shim reports what runc could not do.
        Error::Step(_) => Code::UNKNOWN,
    };
    ttrpc::Error::RpcStatus(ttrpc::get_status(code, error.to_string()))
}

fn answer<T>(method: &str, result: Result<T, Error>) -> ttrpc::Result<T> {
    result.map_err(|error| {
        log::info!("{method}: {error}");
        status(error)
    })
}

#[async_trait]
impl Agent for Service {
    async fn set_up_sandbox(&self, _: &TtrpcContext, request: SetUpSandboxRequest) -> ttrpc::Result<Empty> {
        answer("SetUpSandbox", self.sandbox.set_up(&request)).map(|()| Empty::new())
    }

    async fn shutdown(&self, _: &TtrpcContext, _: Empty) -> ttrpc::Result<Empty> {
        self.sandbox.request_shutdown();
        Ok(Empty::new())
    }
}
