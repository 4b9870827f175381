//! End-to-end tests: a private containerd, `ctr` with time limits, a host
//! compared before and after, and what a test needs to break things on purpose.
//!
//! * [`stage`]: where the programs under test are (environment).
//! * [`scale`]: every time limit, from one factor.
//! * [`job`]: one child process, its output, its end.
//! * [`world`]: a mount namespace with its own `/run` and a containerd in it.
//! * [`config`]: rvm's configuration file.
//! * [`ctr`]: `ctr` commands.
//! * [`bundle`]: specifications and bundles for what `ctr` has no option for.
//! * [`cri`]: pods by containerd's CRI plugin.
//! * [`docker`]: a dockerd and its command line.
//! * [`cni`]: plugins of the Container Network Interface.
//! * [`events`]: what containerd published.
//! * [`sandbox`]: the host side of one running sandbox.
//! * [`machine`]: a monitor by itself, with a guest of the tests' own: hostile, or networked.
//! * [`programs`]: programs of this machine for guests without libraries.
//! * [`task`]: one shim's Task API.
//! * [`timeline`]: how one start went.
//! * [`host`]: what a sandbox could leave behind.
//! * [`script`]: shell for containers.
//! * [`case`]: one test case from lock to comparison.
//! * [`parity`]: the same bundles under runc and under rvm.
//!
//! The cases are libtest functions in `e2e/`; `cargo xtask test` runs them.

pub mod bare;
pub mod bundle;
pub mod case;
pub mod cni;
pub mod config;
pub mod cri;
pub mod ctr;
pub mod docker;
pub mod events;
pub mod hanging;
pub mod host;
pub mod images;
pub mod job;
pub mod machine;
pub mod parity;
pub mod pod_shim;
pub mod programs;
pub mod rootless;
pub mod sandbox;
pub mod scale;
pub mod script;
pub mod stage;
pub mod task;
pub mod timeline;
pub mod tree;
pub mod world;

pub use case::{case, case_with};
