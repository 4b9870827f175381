//! What an rvm guest runs as PID 1: it makes containers for the shim.
//!
//! ```text
//!  host ──ttrpc/vsock──> service ──> sandbox ──> container ──clone3──> child ──execve──> process
//!  host ──bytes/vsock──> io ───────────────────> pipes and terminals of the process
//!  host ──bytes/vsock──> relay ────────────────> sockets on loopback addresses
//! ```
//!
//! Who knows whom, from the top: `service`, `sandbox`, `container`, then `io` and
//! `storage`, then `helper` (work in a child), `reaper` (ends of children) and
//! [`channel`] (talking to them), then `sys`. `init` brings the guest up before
//! all that.
//!
//! # Invariants
//!
//! * **One thread.** The agent never starts a second one: no multi-threaded
//!   runtime, no `spawn_blocking`, no library with a thread of its own. A child
//!   made with `clone3` therefore finds no lock held by a thread it does not
//!   have, and runs ordinary code (allocation included) until `execve`.
//!   [`sys::process::spawn`] checks this before every clone.
//! * **The child never touches the runtime.** It closes every descriptor it was
//!   not given before anything else, so it shares no epoll instance, no pipe and
//!   no connection with its parent.
//! * **Parent and child meet only through [`channel`].**
//! * **PID 1 never exits.** It ends by rebooting the VM: asked to
//!   ([`init::shutdown`]), or because it panicked ([`init::console`]).

use std::{convert::Infallible, sync::Arc};

use rvm_protocol::guest::StreamHeader;

pub mod channel;
pub mod container;
pub mod error;
pub mod fault;
pub mod helper;
pub mod init;
pub mod io;
pub mod reaper;
pub mod relay;
pub mod sandbox;
pub mod service;
pub mod storage;
pub mod sys;
pub mod vsock;

/// Serves requests until the guest is shut down.
pub fn serve(listeners: init::Listeners) -> Result<Infallible, init::Error> {
    let failed = |step| move |source| init::Error::Io { step, source };
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    runtime.map_err(failed("start the event loop"))?.block_on(async {
        let sandbox = Arc::new(sandbox::Sandbox::new());
        let streams = Arc::clone(&sandbox);
        let attach = move |header: &StreamHeader| streams.attach(header);
        let networked = Arc::clone(&sandbox);
        let network = move || networked.network_namespace();
        let _server = service::start(listeners.agent, Arc::clone(&sandbox)).await?;
        tokio::select! {
            accepted = io::accept(listeners.stdio, attach) => accepted.map_err(failed("accept streams")),
            accepted = relay::accept(listeners.relay, network) => {
                accepted.map_err(failed("accept connections to relay"))
            }
            reaped = sandbox.reaper().run() => reaped.map_err(failed("collect ended processes")),
            () = shut_down(&sandbox) => init::shutdown::reboot(),
        }
    })
}

/// Times the other tasks get to run before the guest goes down: the reply to the
/// request passes through two of them on its way to the host.
const TURNS_FOR_REPLY: usize = 16;

/// Returns when the sandbox was asked to end and what is left to do is to reset
/// the machine.
async fn shut_down(sandbox: &sandbox::Sandbox) {
    sandbox.shutdown_requested().await;
    for _ in 0..TURNS_FOR_REPLY {
        tokio::task::yield_now().await;
    }
    sandbox.release_storage().await;
}
