//! The connections of clients, and their end.
//!
//! A client may learn that a connection has ended before it looks at the answer that came first (ttrpc for Go does,
//! now and then), so whoever ends with an answer leaves the first step to it.

use std::{
    io,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll, ready},
};

use futures_core::Stream;
use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    net::{UnixListener, UnixStream},
    sync::watch,
};

/// How many connections there are.
#[derive(Debug, Default)]
pub struct Connections(Arc<watch::Sender<usize>>);

impl Connections {
    /// The connections that `listener` takes.
    pub fn of(&self, listener: UnixListener) -> impl Stream<Item = io::Result<Connection>> + use<> {
        Accepting { listener, open: self.0.clone() }
    }

    /// Waits until there is none.
    pub async fn closed(&self) {
        // The sender lives as long as `self`.
        let _ = self.0.subscribe().wait_for(|open| *open == 0).await;
    }
}

struct Accepting {
    listener: UnixListener,
    open: Arc<watch::Sender<usize>>,
}

impl Stream for Accepting {
    type Item = io::Result<Connection>;

    fn poll_next(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        let accepted = ready!(self.listener.poll_accept(context));
        Poll::Ready(Some(accepted.map(|(stream, _)| {
            self.open.send_modify(|open| *open += 1);
            Connection { stream, open: self.open.clone() }
        })))
    }
}

/// A connection, counted as long as it is there.
pub struct Connection {
    stream: UnixStream,
    open: Arc<watch::Sender<usize>>,
}

impl Drop for Connection {
    fn drop(&mut self) {
        self.open.send_modify(|open| *open -= 1);
    }
}

impl AsyncRead for Connection {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_read(context, buffer)
    }
}

impl AsyncWrite for Connection {
    fn poll_write(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write(context, bytes)
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(context)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(context)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        bytes: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write_vectored(context, bytes)
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }
}

#[cfg(test)]
mod tests {
    use std::{future::poll_fn, pin::pin, time::Duration};

    use tokio::time::timeout;

    use super::*;

    #[tokio::test]
    async fn it_is_known_when_the_last_one_is_closed() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("socket");
        let connections = Connections::default();
        connections.closed().await;
        let mut taken = pin!(connections.of(UnixListener::bind(&path).unwrap()));
        let mut held = Vec::new();
        for _ in 0..2 {
            let client = UnixStream::connect(&path).await.unwrap();
            held.push((client, poll_fn(|context| taken.as_mut().poll_next(context)).await.unwrap().unwrap()));
        }
        held.pop();
        let waited = timeout(Duration::from_millis(50), connections.closed()).await;
        assert!(waited.is_err(), "one is open");
        held.pop();
        connections.closed().await;
    }
}
