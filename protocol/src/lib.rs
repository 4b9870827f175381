//! What rvm's programs say to each other.
//!
//! * [`guest`]: what the agent finds in a guest and where the host finds the
//!   agent: vsock ports, share tag, the stdio stream header.
//! * `agent` (feature `agent`): the ttrpc service the agent serves on
//!   [`guest::AGENT_PORT`].
//! * `bpf` (feature `bpf`): how shim and agent give programs to the kernel.
//! * `loop_device` (feature `loop`): files as block devices, of the host's kernel and of the guest's.
//! * `netlink` (feature `netlink`): what shim and agent say to the kernel of networks.
//! * `vmm` (feature `vmm`): the monitor's configuration and its control socket.

#[cfg(feature = "agent")]
pub mod agent;
#[cfg(feature = "bpf")]
pub mod bpf;
pub mod guest;
#[cfg(feature = "loop")]
pub mod loop_device;
#[cfg(feature = "netlink")]
pub mod netlink;
#[cfg(feature = "vmm")]
pub mod vmm;
