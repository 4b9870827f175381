//! rvm's shim: containerd's Task API over one microVM per sandbox.
//!
//! From the outside in: [`bootstrap`] starts the serving process, [`server`]
//! serves, [`delete`] cleans up after a dead one. [`service`] translates
//! messages into calls to [`task`], which owns containers, and a client's [`options`]; a [`container`] has
//! [`process`]es with [`io`], runs in a [`sandbox`] (directory, [`share`],
//! [`cgroup`], monitor, agent) and is described by its [`spec`]. What happens is told by
//! [`events`] and kept in [`state`]. `rvmctl` uses the same parts from
//! [`container`] downwards, without containerd.

mod accept;
pub mod agent;
mod background;
pub mod bootstrap;
pub mod capabilities;
pub mod cgroup;
pub mod clock;
pub mod config;
mod connections;
pub mod container;
pub mod delete;
pub mod error;
pub mod events;
pub mod fault;
pub mod features;
pub mod flags;
pub mod holder;
pub mod hooks;
pub mod huge_pages;
pub mod ids;
pub mod image;
pub mod io;
mod logger;
pub mod metrics;
pub mod mount;
pub mod mountinfo;
pub mod name;
pub mod options;
pub mod own_file;
pub mod process;
pub mod process_id;
pub mod relay;
pub mod remains;
pub mod rootfs;
pub mod rootless;
pub mod sandbox;
pub mod sandbox_service;
pub mod scratch;
pub mod seccomp;
pub mod server;
pub mod service;
pub mod share;
pub mod spec;
pub mod state;
pub mod sysctl;
pub mod task;
pub mod timeline;
pub mod user_namespace;
pub mod vmm;
pub mod vsock;
