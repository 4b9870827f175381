//! What rvm's programs say to each other.
//!
//! * [`guest`]: what the agent finds in a guest and where the host finds the
//!   agent: vsock ports, share tag, the stdio stream header.
//! * `agent` (feature `agent`): the ttrpc service the agent serves on
//!   [`guest::AGENT_PORT`].
//! * `vmm` (feature `vmm`): the monitor's configuration and its control socket.

#[cfg(feature = "agent")]
pub mod agent;
pub mod guest;
#[cfg(feature = "vmm")]
pub mod vmm;
