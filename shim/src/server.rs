//! The serving process: from its first breath to leaving nothing behind.

use std::{
    io,
    os::fd::{FromRawFd, OwnedFd},
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use log::LevelFilter;
use nix::{
    fcntl::{FcntlArg, fcntl},
    sys::prctl,
};
use tokio::{
    net::UnixListener,
    signal::unix::{SignalKind, signal},
    time::timeout,
};
use ttrpc::asynchronous::{Server, transport::Listener};

use crate::{
    bootstrap::Serve, config::Config, connections::Connections, events::Events, logger, remains,
    service::services, task::Tasks,
};

/// How long the last answers and events may take.
const FAREWELL_TIMEOUT: Duration = Duration::from_secs(5);
/// How long clients may take to close their connections, once they have their answers.
const CLOSING_TIMEOUT: Duration = Duration::from_secs(1);
/// How long a shim that is told to end lets what is being created or deleted go on: a
/// guest that does not power off and mounts that do not come off have limits of their own,
/// hooks need none.
const CHANGING_TIMEOUT: Duration = Duration::from_secs(30);
/// Descriptors there is room for from the start: a pod has some for each container and each added process.
const DESCRIPTORS: i32 = 512;
/// A shim that has had nothing to do for this long has been forgotten: by a
/// containerd that died between `start` and `Create`, or before `Shutdown`.
const IDLE_LIMIT: Duration = Duration::from_secs(60);

/// Serves until containerd has no more use for it. The working directory is the
/// bundle.
pub fn run(serve: Serve) -> io::Result<()> {
    let sandbox = format!("{}/{}", serve.namespace, serve.id);
    // A wrong configuration is reported where it matters, by Create.
    let configured = Config::load(None).map_or(LevelFilter::Info, |config| config.log_level);
    let level = if serve.debug { configured.max(LevelFilter::Debug) } else { configured };
    // Where containerd does not collect logs there is nobody to tell.
    let _ = logger::init(Path::new("."), sandbox, level);
    // A core file would hold what containers were given and what they said. The
    // limit for one is theirs, who inherit this process's.
    if let Err(errno) = prctl::set_dumpable(false) {
        log::debug!("PR_SET_DUMPABLE: {errno}");
    }
    // A table of descriptors that grows while threads share it waits until every processor has been out of the kernel
    // (`synchronize_rcu` in expand_fdtable()); it stays as long as it was.
    match fcntl(std::io::stderr(), FcntlArg::F_DUPFD_CLOEXEC(DESCRIPTORS - 1)) {
        // SAFETY: the kernel has just returned this descriptor, nobody else owns it.
        Ok(high) => drop(unsafe { OwnedFd::from_raw_fd(high) }),
        Err(errno) => log::debug!("room for descriptors: {errno}"),
    }
    // One thread: the shim waits, and what it starts dies with this thread.
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let socket = Socket(serve.socket.clone());
    let served = runtime.block_on(serve_until_done(serve, socket));
    // A file system of the host may keep a thread for ever.
    runtime.shutdown_timeout(FAREWELL_TIMEOUT);
    remains::wait();
    served
}

/// The socket's name, which goes once: whoever comes after may have it again.
struct Socket(PathBuf);

impl Drop for Socket {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.0);
    }
}

/// Where memory is short a shim goes before containerd, as runc's does: it is
/// one of many, and containerd cleans up after it.
fn go_before_containerd() {
    const FILE: &str = "/proc/self/oom_score_adj";
    let raised =
        std::fs::read_to_string(FILE).and_then(|text| std::fs::write(FILE, one_more(&text).to_string()));
    if let Err(error) = raised {
        log::debug!("{FILE}: {error}");
    }
}

/// The score after the one containerd started this process with.
fn one_more(inherited: &str) -> i32 {
    const MOST: i32 = 1000;
    inherited.trim().parse().map_or(0, |score: i32| score.saturating_add(1)).min(MOST)
}

async fn serve_until_done(serve: Serve, socket: Socket) -> io::Result<()> {
    let events = match serve.events_address.as_str() {
        "" => Events::to_nobody(&serve.namespace),
        address => Events::publish_to(&serve.namespace, address),
    };
    let tasks = Arc::new(Tasks::new(&serve.namespace, events.clone()));
    serve.listener.set_nonblocking(true)?;
    let connections = Connections::default();
    let listener = Listener::new(connections.of(UnixListener::from_std(serve.listener)?));
    let mut server = Server::new().add_listener(listener).register_service(services(tasks.clone()));
    server.start().await.map_err(io::Error::other)?;
    log::debug!("serving {}", serve.socket.display());
    go_before_containerd();

    let mut terminate = signal(SignalKind::terminate())?;
    let mut interrupt = signal(SignalKind::interrupt())?;
    let mut told = false;
    tokio::select! {
        () = tasks.done() => told = true,
        () = tasks.idle(IDLE_LIMIT) => log::warn!("ending: nothing to do for {} s", IDLE_LIMIT.as_secs()),
        _ = terminate.recv() => log::warn!("terminated"),
        _ = interrupt.recv() => log::warn!("interrupted"),
    }
    // New connections belong to a new shim; the running ones get their answers.
    drop(socket);
    tasks.close_all(CHANGING_TIMEOUT).await;
    let farewell = async {
        events.flush(FAREWELL_TIMEOUT).await;
        // The client that told this one to end waits for nothing else; others may not know of its end.
        if told && timeout(CLOSING_TIMEOUT, connections.closed()).await.is_err() {
            log::debug!("a client keeps its connection");
        }
        server.shutdown().await
    };
    if timeout(FAREWELL_TIMEOUT, farewell).await.is_err() {
        log::debug!("some answers were not taken");
    }
    log::debug!("done");
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_score_above_containerds() {
        for (containerds, ours) in [("-999\n", -998), ("0\n", 1), ("1000\n", 1000), ("", 0)] {
            assert_eq!(one_more(containerds), ours);
        }
    }

    #[test]
    fn the_sockets_name_goes_once() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("s");
        std::fs::write(&path, "").unwrap();
        let socket = Socket(path.clone());
        drop(socket);
        assert!(!path.exists());
    }
}
