//! The errors of the task service, and the one place where they become ttrpc's.

use ttrpc::Code;

use crate::{
    agent::AgentError,
    config::ConfigError,
    hooks::HookError,
    io::IoError,
    name::NameError,
    rootfs::RootfsError,
    sandbox::{NetworkError, SandboxError},
    scratch::ScratchError,
    share::ShareError,
    spec::SpecError,
};

/// Why a request is refused or failed.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The configuration.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// The container's specification.
    #[error(transparent)]
    Spec(#[from] SpecError),
    /// A hook of the specification.
    #[error(transparent)]
    Hook(#[from] HookError),
    /// The sandbox.
    #[error(transparent)]
    Sandbox(#[from] SandboxError),
    /// The standard streams.
    #[error(transparent)]
    Io(#[from] IoError),
    /// The agent.
    #[error(transparent)]
    Agent(#[from] AgentError),
    /// A name a client chose.
    #[error(transparent)]
    Name(#[from] NameError),
    /// No such container or process.
    #[error("{0}")]
    NotFound(String),
    /// The name is taken.
    #[error("{0}")]
    AlreadyExists(String),
    /// Not in this state.
    #[error("{0}")]
    FailedPrecondition(String),
    /// A part of the request.
    #[error("{0}")]
    InvalidArgument(String),
    /// A call this version does not have.
    #[error("{0}")]
    Unimplemented(&'static str),
    /// The sandbox has ended.
    #[error("the guest ended: {0}")]
    SandboxEnded(String),
}

impl Error {
    /// Whether the agent may have done what it was asked for, and has not said so.
    pub fn is_unanswered(&self) -> bool {
        matches!(self, Self::Agent(error) if error.is_unanswered())
    }

    /// Which of ttrpc's codes, which are gRPC's, tells the client best.
    pub fn code(&self) -> Code {
        match self {
            Self::NotFound(_) => Code::NOT_FOUND,
            Self::AlreadyExists(_) | Self::Sandbox(SandboxError::Exists { .. }) => Code::ALREADY_EXISTS,
            Self::FailedPrecondition(_) => Code::FAILED_PRECONDITION,
            Self::Unimplemented(_) => Code::UNIMPLEMENTED,
            Self::InvalidArgument(_)
            | Self::Name(_)
            | Self::Io(IoError::Scheme { .. })
            | Self::Sandbox(
                SandboxError::Name(_)
                | SandboxError::NoRoom { .. }
                | SandboxError::Network(
                    NetworkError::Namespace { .. }
                    | NetworkError::Unsupported { .. }
                    | NetworkError::UnsupportedRule { .. }
                    | NetworkError::TooMany { .. },
                )
                | SandboxError::Scratch(ScratchError::Disk { .. })
                | SandboxError::Share(
                    ShareError::Volume { .. }
                    | ShareError::Useless { .. }
                    | ShareError::Rootfs(RootfsError::Layer { .. } | RootfsError::Root { .. }),
                ),
            ) => Code::INVALID_ARGUMENT,
            Self::Spec(_) => Code::INVALID_ARGUMENT,
            Self::Agent(error) | Self::Sandbox(SandboxError::Agent(error)) => agent_code(error),
            Self::Config(_) | Self::Hook(_) | Self::Sandbox(_) | Self::Io(_) | Self::SandboxEnded(_) => {
                Code::UNKNOWN
            }
        }
    }
}

/// Only what says something about the request is passed on: containerd takes
/// NOT_FOUND for "there is no such task", UNAVAILABLE for a dead shim, and
/// UNIMPLEMENTED for one that speaks an older version.
fn agent_code(error: &AgentError) -> Code {
    match error {
        AgentError::Refused { code: Code::INVALID_ARGUMENT | Code::UNIMPLEMENTED, .. } => {
            Code::INVALID_ARGUMENT
        }
        _ => Code::UNKNOWN,
    }
}

impl From<Error> for ttrpc::Error {
    fn from(error: Error) -> Self {
        ttrpc::Error::RpcStatus(ttrpc::get_status(error.code(), error.to_string()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn code(error: impl Into<Error>) -> Code {
        error.into().code()
    }

    #[test]
    fn codes_say_whose_fault_it_is() {
        assert_eq!(code(Error::NotFound("x".into())), Code::NOT_FOUND);
        assert_eq!(code(SpecError::Field { field: "f".into(), problem: "p".into() }), Code::INVALID_ARGUMENT);
        assert_eq!(
            code(SpecError::Unsupported { field: "f".into(), reason: "r".into() }),
            Code::INVALID_ARGUMENT
        );
        let exists = SandboxError::Exists { namespace: "default".into(), id: "x".into() };
        assert_eq!(code(exists), Code::ALREADY_EXISTS);
        assert_eq!(code(SandboxError::Ended("x".into())), Code::UNKNOWN);
    }

    #[test]
    fn the_guest_cannot_pretend_that_a_task_is_missing() {
        let refused = |code| AgentError::Refused { code, message: "m".into() };
        assert_eq!(code(refused(Code::NOT_FOUND)), Code::UNKNOWN);
        assert_eq!(code(refused(Code::INVALID_ARGUMENT)), Code::INVALID_ARGUMENT);
        assert_eq!(code(refused(Code::UNIMPLEMENTED)), Code::INVALID_ARGUMENT);
        assert_eq!(code(AgentError::Lost { request: "wait_process", problem: "gone".into() }), Code::UNKNOWN);
    }

    #[test]
    fn messages_travel() {
        let error: ttrpc::Error = Error::FailedPrecondition("still running".into()).into();
        match error {
            ttrpc::Error::RpcStatus(status) => {
                assert_eq!(status.code(), Code::FAILED_PRECONDITION);
                assert_eq!(status.message, "still running");
            }
            other => panic!("{other:?}"),
        }
    }
}
