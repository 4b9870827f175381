//! Copying between a stream and its connection.
//!
//! Nothing is read that cannot be written: a slow reader holds the writer back
//! through the pipe, or through vsock's credit. End of file travels as a
//! half-close, both ways.

use std::{io, time::Duration};

use tokio::{
    io::{
        AsyncBufRead, AsyncBufReadExt, AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, BufReader,
        copy_buf,
    },
    net::unix::pipe,
    sync::{Notify, watch},
};

use super::{Attachment, BUFFER, Pty};

/// After a request to close standard input, how long its connection must have
/// been silent for what was sent before the request to have arrived: request
/// and bytes take different connections. A client that half-closes its
/// connection, as it should, is not kept waiting.
const SILENCE: Duration = Duration::from_millis(100);

/// Carries one stream until it ends.
pub async fn run(
    attachment: Attachment,
    from_host: impl AsyncBufRead + Unpin,
    to_host: impl AsyncWrite + Unpin,
) -> io::Result<()> {
    match attachment {
        Attachment::Input(pipe, close) => input(from_host, pipe, &close).await,
        Attachment::Output(pipe) => output(BufReader::with_capacity(BUFFER, pipe), to_host, from_host).await,
        Attachment::Terminal(pty) => match opened(pty).await {
            Some(pty) => terminal(pty, from_host, to_host).await,
            None => Ok(()),
        },
    }
}

/// Host to process. The pipe is closed on return.
async fn input(mut from: impl AsyncBufRead + Unpin, mut to: pipe::Sender, close: &Notify) -> io::Result<()> {
    let copied = tokio::select! {
        copied = copy_buf(&mut from, &mut to) => copied.map(drop),
        () = close.notified() => deliver_rest(&mut from, &mut to).await,
    };
    match copied {
        // The process has closed its standard input or ended.
        Err(error) if error.kind() == io::ErrorKind::BrokenPipe => Ok(()),
        copied => copied,
    }
}

async fn deliver_rest(from: &mut (impl AsyncBufRead + Unpin), to: &mut pipe::Sender) -> io::Result<()> {
    // Cancelling `copy_buf` loses nothing: it consumes what it has written only.
    while let Ok(arrived) = tokio::time::timeout(SILENCE, from.fill_buf()).await {
        let arrived = arrived?;
        if arrived.is_empty() {
            break;
        }
        let written = to.write(arrived).await?;
        from.consume(written);
    }
    Ok(())
}

/// Process to host.
async fn output(
    mut from: impl AsyncBufRead + Unpin,
    mut to: impl AsyncWrite + Unpin,
    from_host: impl AsyncRead + Unpin,
) -> io::Result<()> {
    copy_buf(&mut from, &mut to).await?;
    drop(from);
    end(to, from_host).await
}

/// Says that nothing more comes and waits until the host has seen it: closing
/// at once might overtake what is still on its way.
async fn end(mut to: impl AsyncWrite + Unpin, mut from_host: impl AsyncRead + Unpin) -> io::Result<()> {
    to.shutdown().await?;
    let mut ignored = [0; 64];
    while from_host.read(&mut ignored).await? > 0 {}
    Ok(())
}

/// The terminal once the process has opened it; none if it never will.
async fn opened(mut pty: watch::Receiver<Option<Pty>>) -> Option<Pty> {
    let opened = pty.wait_for(Option::is_some).await.ok()?;
    opened.clone()
}

/// Both ways, until nobody in the container has the terminal open any more.
async fn terminal(
    pty: Pty,
    mut from_host: impl AsyncBufRead + Unpin,
    mut to_host: impl AsyncWrite + Unpin,
) -> io::Result<()> {
    let mut to_process = pty.clone();
    let mut from_process = BufReader::with_capacity(BUFFER, pty);
    let input = async {
        match copy_buf(&mut from_host, &mut to_process).await {
            // The host will type no more; output goes on.
            Ok(_) => std::future::pending().await,
            Err(error) => Err(error),
        }
    };
    tokio::select! {
        copied = copy_buf(&mut from_process, &mut to_host) => copied.map(drop),
        failed = input => failed,
    }?;
    end(to_host, from_host).await
}

#[cfg(test)]
mod tests {
    use std::os::fd::OwnedFd;

    use tokio::net::UnixStream;

    use super::*;

    fn run_test(test: impl Future<Output = ()>) {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        runtime.block_on(async { tokio::time::timeout(Duration::from_secs(20), test).await.unwrap() });
    }

    fn pattern(length: usize) -> Vec<u8> {
        (0..length).map(|i| (i % 251) as u8).collect()
    }

    async fn carry(attachment: Attachment, guest: UnixStream) {
        let (from_host, to_host) = tokio::io::split(guest);
        run(attachment, BufReader::new(from_host), to_host).await.unwrap();
    }

    #[test]
    fn output_arrives_whole_and_its_end_is_a_half_close() {
        run_test(async {
            let (mut writer, reader) = pipe::pipe().unwrap();
            let (mut host, guest) = UnixStream::pair().unwrap();
            let sent = pattern(3 * 1024 * 1024 + 17);
            let (expected, mut received) = (sent.clone(), Vec::new());
            let process = async move { writer.write_all(&sent).await.unwrap() };
            let client = async {
                host.read_to_end(&mut received).await.unwrap();
                drop(host);
            };
            tokio::join!(process, client, carry(Attachment::Output(reader), guest));
            assert!(received == expected);
        });
    }

    #[test]
    fn input_arrives_whole_and_a_half_close_is_its_end() {
        run_test(async {
            let (writer, mut reader) = pipe::pipe().unwrap();
            let (mut host, guest) = UnixStream::pair().unwrap();
            let sent = pattern(1024 * 1024 + 5);
            let mut received = Vec::new();
            let client = async {
                host.write_all(&sent).await.unwrap();
                host.shutdown().await.unwrap();
            };
            let process = async { reader.read_to_end(&mut received).await.unwrap() };
            tokio::join!(client, process, carry(Attachment::Input(writer, Default::default()), guest));
            assert!(received == sent);
        });
    }

    #[test]
    fn closing_input_delivers_what_was_sent_first() {
        run_test(async {
            let (writer, mut reader) = pipe::pipe().unwrap();
            let (mut host, guest) = UnixStream::pair().unwrap();
            let close = std::sync::Arc::new(Notify::new());
            // More than a pipe holds: part of it is still in the connection.
            let sent = pattern(150 * 1024);
            close.notify_one();
            let mut received = Vec::new();
            let client = async { host.write_all(&sent).await.unwrap() };
            let process = async { reader.read_to_end(&mut received).await.unwrap() };
            tokio::join!(client, process, carry(Attachment::Input(writer, close), guest));
            assert!(received == sent);
        });
    }

    #[test]
    fn a_process_that_reads_no_input_ends_the_connection() {
        run_test(async {
            let (writer, reader) = pipe::pipe().unwrap();
            drop(reader);
            let (mut host, guest) = UnixStream::pair().unwrap();
            host.write_all(b"unwanted").await.unwrap();
            carry(Attachment::Input(writer, Default::default()), guest).await;
            // Unread data makes a close of a Unix socket a reset.
            assert!(matches!(host.read(&mut [0]).await, Ok(0) | Err(_)));
        });
    }

    #[test]
    fn a_terminal_carries_both_ways_and_its_hangup_is_the_end() {
        run_test(async {
            let pair = nix::pty::openpty(None, None).unwrap();
            let nonblocking = nix::fcntl::FcntlArg::F_SETFL(nix::fcntl::OFlag::O_NONBLOCK);
            nix::fcntl::fcntl(&pair.master, nonblocking).unwrap();
            let pty = Pty::new(pair.master).unwrap();
            let (sender, receiver) = watch::channel(Some(pty));
            let slave: OwnedFd = pair.slave;
            let (mut host, guest) = UnixStream::pair().unwrap();
            let client = async {
                host.write_all(b"hello\n").await.unwrap();
                let mut echoed = [0; 7];
                host.read_exact(&mut echoed).await.unwrap();
                assert_eq!(&echoed, b"hello\r\n");
                let mut line = [0; 16];
                assert_eq!(nix::unistd::read(&slave, &mut line), Ok(6));
                nix::unistd::write(&slave, b"last words").unwrap();
                drop(slave);
                let mut rest = String::new();
                host.read_to_string(&mut rest).await.unwrap();
                assert_eq!(rest, "last words");
                drop(host);
            };
            tokio::join!(client, carry(Attachment::Terminal(receiver), guest));
            drop(sender);
        });
    }

    #[test]
    fn a_terminal_that_is_never_opened_ends_its_connection() {
        run_test(async {
            let (sender, receiver) = watch::channel(None);
            let (mut host, guest) = UnixStream::pair().unwrap();
            let client = async {
                drop(sender);
                assert_eq!(host.read(&mut [0]).await.unwrap(), 0);
            };
            tokio::join!(client, carry(Attachment::Terminal(receiver), guest));
        });
    }
}
