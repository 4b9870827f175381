//! End-to-end cases: a real containerd, a real image, real kernels.
//!
//! `cargo xtask test` stages what they need and runs them where KVM can run a
//! kernel; the module `ring0` is for machines where it cannot.

mod broken;
mod clients;
mod clock;
mod crio;
mod dead_storage;
mod death;
mod debian;
mod devices;
mod docker;
mod docker_network;
mod docker_session;
mod erofs_snapshotter;
mod exec;
mod exec_robust;
mod failures;
mod faults;
mod guest_faults;
mod guest_kernel;
mod hooks;
mod hostile;
mod huge_pages;
mod images;
mod interfaces;
mod jail;
mod joined;
mod limits;
mod loopback;
mod network;
mod parity;
mod planted;
mod pod_streams;
mod pod_users;
mod pod_volumes;
mod pods;
mod process;
mod processors;
mod ring0;
mod rootfs;
mod rootless;
mod run;
mod rvmctl;
mod sandbox_api;
mod scratch;
mod seccomp;
mod shortage;
mod size;
mod soak;
mod specifications;
mod volumes;
mod volumes_faults;
