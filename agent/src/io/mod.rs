//! Standard streams: between a process's pipes or terminal in the guest and the
//! connections the host makes to [`guest::STDIO_PORT`].

mod copy;
mod pty;
mod streams;

use std::{convert::Infallible, os::fd::OwnedFd, sync::Arc};

pub use pty::{Pty, Size};
use rvm_protocol::guest::{self, StreamHeader};
pub use streams::{Attachment, ChildEnds, Streams};
use tokio::io::{AsyncBufReadExt, AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, BufReader};

use crate::{error::Error, vsock::HostListener};

/// Bytes moved at a time; what a pipe holds.
const BUFFER: usize = 64 * 1024;

/// Accepts stream connections for ever, each served in the background; `attach`
/// finds what the one with a header is to carry.
pub async fn accept(
    listener: OwnedFd,
    attach: impl Fn(&StreamHeader) -> Result<Attachment, Error> + Send + Sync + 'static,
) -> std::io::Result<Infallible> {
    let attach = Arc::new(attach);
    let mut listener = HostListener::from(listener);
    loop {
        let stream = std::future::poll_fn(|cx| listener.poll_accept(cx)).await?;
        let attach = Arc::clone(&attach);
        tokio::spawn(async move {
            serve(stream, |header| attach(header)).await;
        });
    }
}

/// Serves one connection.
pub async fn serve(
    connection: impl AsyncRead + AsyncWrite + Send,
    attach: impl FnOnce(&StreamHeader) -> Result<Attachment, Error>,
) {
    if let Err(error) = carry(connection, attach).await {
        log::info!("stream: {error}");
    }
}

/// Reads a connection's header line, then carries the bytes of one stream.
async fn carry(
    connection: impl AsyncRead + AsyncWrite + Send,
    attach: impl FnOnce(&StreamHeader) -> Result<Attachment, Error>,
) -> std::io::Result<()> {
    let (from_host, mut to_host) = tokio::io::split(connection);
    let mut from_host = BufReader::with_capacity(BUFFER, from_host);
    let mut line = Vec::new();
    (&mut from_host).take(guest::MAX_LINE_LEN as u64).read_until(b'\n', &mut line).await?;
    let header = line.strip_suffix(b"\n").and_then(|line| std::str::from_utf8(line).ok());
    let attached = match header.and_then(StreamHeader::parse) {
        Some(header) => attach(&header).map_err(|error| error.to_string()),
        None => Err("the first line is not a stream header".to_owned()),
    };
    match attached {
        Ok(attachment) => {
            to_host.write_all(guest::STREAM_ATTACHED).await?;
            copy::run(attachment, from_host, to_host).await
        }
        Err(reason) => {
            to_host.write_all(format!("error {}\n", reason.replace('\n', " ")).as_bytes()).await?;
            to_host.shutdown().await
        }
    }
}

#[cfg(test)]
mod tests {
    use tokio::net::UnixStream;

    use super::*;

    #[test]
    fn a_connection_that_is_no_stream_is_told_why() {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        runtime.block_on(async {
            for (sent, expected) in [
                ("nonsense\n", "error the first line is not a stream header\n"),
                ("c1\t\tstdin\n", "error no such container: c1\n"),
            ] {
                let (mut host, guest) = UnixStream::pair().unwrap();
                host.write_all(sent.as_bytes()).await.unwrap();
                let none = |header: &StreamHeader| {
                    Err(Error::NotFound(format!("no such container: {}", header.container_id)))
                };
                carry(guest, none).await.unwrap();
                let mut answer = String::new();
                host.read_to_string(&mut answer).await.unwrap();
                assert_eq!(answer, expected);
            }
        });
    }
}
