//! Copying one stream.

use std::{
    io,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
};

use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};

/// What a pipe holds: more would only wait.
const BUFFER_LEN: usize = 64 << 10;

/// What happens to the writing side when the reading one has ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Direction {
    /// It ends as well.
    Close,
    /// It stays as it is.
    KeepOpen,
}

/// How many bytes have been written.
#[derive(Debug, Default)]
pub(super) struct Progress(AtomicU64);

impl Progress {
    pub(super) fn count(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }
}

/// Copies until either side has ended.
pub(super) async fn copy(
    mut from: impl AsyncRead + Unpin,
    mut to: impl AsyncWrite + Unpin,
    at_end: Direction,
    progress: Arc<Progress>,
) {
    if let Err(error) = pump(&mut from, &mut to, &progress).await {
        log::debug!("a stream ended: {error}");
    }
    match at_end {
        Direction::Close => {
            let _ = to.shutdown().await;
        }
        // Dropping a socket's half closes it.
        Direction::KeepOpen => std::future::pending().await,
    }
}

async fn pump(
    from: &mut (impl AsyncRead + Unpin),
    to: &mut (impl AsyncWrite + Unpin),
    progress: &Progress,
) -> io::Result<()> {
    let mut buffer = vec![0; BUFFER_LEN];
    loop {
        let count = from.read(&mut buffer).await?;
        if count == 0 {
            return Ok(());
        }
        to.write_all(&buffer[..count]).await?;
        progress.0.fetch_add(count as u64, Ordering::Relaxed);
    }
}
