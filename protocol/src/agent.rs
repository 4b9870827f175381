//! The agent's messages and ttrpc service, generated from `proto/agent.proto`.

/// Generated messages.
#[allow(warnings, clippy::all, clippy::pedantic)]
mod agent {
    include!(concat!(env!("OUT_DIR"), "/agent_messages.rs"));
}

/// Generated service.
#[allow(warnings, clippy::all, clippy::pedantic)]
mod agent_ttrpc {
    include!(concat!(env!("OUT_DIR"), "/agent_service.rs"));
}

pub use agent::*;
pub use agent_ttrpc::{Agent, AgentClient, create_agent};
