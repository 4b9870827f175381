//! The serving process: from its first breath to leaving nothing behind.

use std::{io, path::Path, sync::Arc, time::Duration};

use log::LevelFilter;
use tokio::{
    signal::unix::{SignalKind, signal},
    time::timeout,
};
use ttrpc::asynchronous::{Server, transport::Listener};

use crate::{bootstrap::Serve, config::Config, events::Events, logger, service::services, task::Tasks};

/// How long the last answers and events may take.
const FAREWELL_TIMEOUT: Duration = Duration::from_secs(5);
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
    // One thread: the shim waits, and what it starts dies with this thread.
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let socket = serve.socket.clone();
    let result = runtime.block_on(serve_until_done(serve));
    let _ = std::fs::remove_file(&socket);
    result
}

async fn serve_until_done(serve: Serve) -> io::Result<()> {
    let events = Events::publish_to(&serve.namespace, &serve.events_address);
    let tasks = Arc::new(Tasks::new(&serve.namespace, events.clone()));
    serve.listener.set_nonblocking(true)?;
    let listener = Listener::try_from(serve.listener)?;
    let mut server = Server::new().add_listener(listener).register_service(services(tasks.clone()));
    server.start().await.map_err(io::Error::other)?;
    log::debug!("serving {}", serve.socket.display());

    let mut terminate = signal(SignalKind::terminate())?;
    let mut interrupt = signal(SignalKind::interrupt())?;
    tokio::select! {
        () = tasks.done() => {}
        () = tasks.idle(IDLE_LIMIT) => log::warn!("ending: nothing to do for {} s", IDLE_LIMIT.as_secs()),
        _ = terminate.recv() => log::warn!("terminated"),
        _ = interrupt.recv() => log::warn!("interrupted"),
    }
    // New connections belong to a new shim; the running ones get their answers.
    let _ = std::fs::remove_file(&serve.socket);
    tasks.close_all().await;
    let farewell = async {
        events.flush(FAREWELL_TIMEOUT).await;
        server.shutdown().await
    };
    if timeout(FAREWELL_TIMEOUT, farewell).await.is_err() {
        log::debug!("some answers were not taken");
    }
    log::debug!("done");
    Ok(())
}
