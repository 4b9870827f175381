//! Listening sockets served for ever, with a limit.

use std::{
    future::poll_fn,
    io,
    sync::Arc,
    task::{Context, Poll},
    time::Duration,
};

use tokio::{sync::Semaphore, task::JoinSet};

/// How long to wait where no connection can be accepted: want of descriptors passes.
const PAUSE: Duration = Duration::from_millis(100);

/// Serves each connection that `accept` gives, as many at once as there are `places`; they
/// end with this. `what` names them in the log.
pub async fn serve<S, F>(
    what: &str,
    places: Arc<Semaphore>,
    accept: impl Fn(&mut Context<'_>) -> Poll<io::Result<S>>,
    carry: impl Fn(S) -> F,
) where
    F: Future<Output = ()> + Send + 'static,
{
    let mut connections = JoinSet::new();
    loop {
        while connections.try_join_next().is_some() {}
        let Ok(place) = places.clone().acquire_owned().await else { return };
        match poll_fn(&accept).await {
            Ok(stream) => {
                let carried = carry(stream);
                connections.spawn(async move {
                    let _place = place;
                    carried.await;
                });
            }
            Err(error) => {
                log::warn!("{what}: accept a connection: {error}");
                tokio::time::sleep(PAUSE).await;
            }
        }
    }
}
