//! Calls a container may be refused, each made in a process of its own.
//!
//! None does harm where it succeeds: what is changed is set to what it was, or
//! belongs to the process that ends with the attempt, or to the container.

mod devices;
mod mounts;
mod network;
mod processes;
mod system;

use crate::{
    calls::{Outcome, Shown, call, in_child},
    out::Out,
};

/// A name and what it tries.
type Attempt = (&'static str, fn() -> Outcome);

/// The section.
pub fn print(out: &mut Out) {
    out.section("try");
    for (name, attempt) in mounts::CHANGING {
        let result = in_child(|| {
            // Who may not make one may not mount either.
            let _ = call(libc::SYS_unshare, [libc::CLONE_NEWNS as usize]);
            Shown(attempt()).to_string()
        });
        out.put(name, result);
    }
    let groups = [mounts::ATTEMPTS, network::ATTEMPTS, processes::ATTEMPTS, system::ATTEMPTS];
    for (name, attempt) in groups.into_iter().flatten() {
        out.put(name, in_child(|| Shown(attempt()).to_string()));
    }
    out.section("");
    devices::print(out);
}
