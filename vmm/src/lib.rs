//! The monitor: one microVM on KVM.
//!
//! ```text
//! config ──> builder ──> vmm ──> vcpu threads ──exits──> machine ──> pci ──> devices
//!              │           └───> control socket, signals, the parent's death
//!              ├── kvm, memory   the VM and its memory
//!              ├── boot, arch    what is in that memory and in the registers
//!              └── devices       virtio, one thread each once the guest uses them
//! ```
//!
//! What the guest can reach are ports and device memory through [`machine`],
//! and queues in its own memory that the devices read. All of that is hostile.

pub mod arch;
pub mod boot;
pub mod builder;
pub mod config;
pub mod control;
pub mod devices;
pub mod hotplug;
pub mod kvm;
pub mod logging;
pub mod machine;
pub mod memory;
pub mod pci;
pub mod timeline;
pub mod vcpu;
pub mod vmm;
