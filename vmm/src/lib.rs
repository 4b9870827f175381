//! The monitor: one microVM on KVM.
//!
//! ```text
//! config ──> builder ──> machine ──> vcpu threads ──exits──> buses ──> pci ──> devices
//!              │             └───> control: the owner, who looks; signals
//!              ├── jail          shut in once everything is open
//!              ├── kvm, memory   the VM and its memory
//!              ├── boot, arch    what is in that memory and in the registers
//!              ├── snapshot      or all of it as it was
//!              └── devices       virtio, on threads of their own
//! ```
//!
//! What the guest can reach are ports and device memory through [`buses`],
//! and queues in its own memory that the devices read. All of that is hostile.

pub mod arch;
pub mod boot;
pub mod builder;
pub mod buses;
pub mod config;
pub mod control;
pub mod devices;
pub mod hotplug;
pub mod jail;
pub mod kvm;
pub mod logging;
pub mod machine;
pub mod memory;
mod mounts;
pub mod pci;
pub mod process;
pub mod procfs;
pub mod snapshot;
pub mod timeline;
pub mod vcpu;
