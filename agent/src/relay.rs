//! Connections of the host to sockets that listen on the loopback addresses of the
//! sandbox's network namespace, where nothing from outside arrives.

use std::{
    convert::Infallible,
    net::SocketAddr,
    os::fd::{AsFd, BorrowedFd, OwnedFd},
    sync::Arc,
    time::Duration,
};

use rvm_protocol::guest::{self, RelayTarget};
use tokio::{
    io::{AsyncBufReadExt, AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, BufReader},
    net::{TcpSocket, TcpStream},
    sync::Semaphore,
    time::timeout,
};

use crate::{
    error::{Step, StepError, StepResult, describe},
    sys::namespace::within,
    vsock::HostListener,
};

/// Connections there may be at once; each takes two descriptors and two buffers.
const MOST: usize = 512;
/// Bytes moved at a time.
const BUFFER: usize = 16 * 1024;
/// How long a listener may leave a connection waiting, its backlog being full.
const CONNECT_LIMIT: Duration = Duration::from_secs(10);
/// How long the host may take to say where a connection goes to.
const HEADER_LIMIT: Duration = Duration::from_secs(10);

/// Accepts connections for ever, each served in the background; `namespace` is that
/// of the sandbox, where there is one.
pub async fn accept(
    listener: OwnedFd,
    namespace: impl Fn() -> StepResult<OwnedFd> + Send + Sync + 'static,
) -> std::io::Result<Infallible> {
    let (namespace, most) = (Arc::new(namespace), Arc::new(Semaphore::new(MOST)));
    let mut listener = HostListener::from(listener);
    loop {
        let stream = std::future::poll_fn(|cx| listener.poll_accept(cx)).await?;
        let (namespace, most) = (Arc::clone(&namespace), Arc::clone(&most));
        tokio::spawn(async move {
            let room = most.try_acquire();
            let is_room = room.is_ok();
            let connect = |target| async move {
                if !is_room {
                    return Err(StepError::Refused(format!("{MOST} connections are being relayed")));
                }
                let namespace = namespace()?;
                connect(namespace.as_fd(), target).await
            };
            if let Err(error) = serve(stream, connect).await {
                log::info!("relay: {error}");
            }
            drop(room);
        });
    }
}

/// Serves one connection: reads where it goes to, connects and carries bytes both
/// ways; the end of one is passed on while the other goes on.
async fn serve<C, F>(connection: C, connect: impl FnOnce(SocketAddr) -> F) -> std::io::Result<()>
where
    C: AsyncRead + AsyncWrite + Unpin,
    F: Future<Output = StepResult<TcpStream>>,
{
    let mut host = BufReader::with_capacity(BUFFER, connection);
    let mut line = Vec::new();
    let mut header = (&mut host).take(guest::MAX_LINE_LEN as u64);
    timeout(HEADER_LIMIT, header.read_until(b'\n', &mut line)).await??;
    let target = line.strip_suffix(b"\n").and_then(|line| std::str::from_utf8(line).ok());
    let connected = match target.and_then(RelayTarget::parse) {
        Some(target) => connect(target.address()).await.map_err(|error| error.to_string()),
        None => Err("the first line is no loopback address with a port".to_owned()),
    };
    match connected {
        Ok(mut process) => {
            host.write_all(guest::STREAM_ATTACHED).await?;
            tokio::io::copy_bidirectional_with_sizes(&mut host, &mut process, BUFFER, BUFFER).await.map(drop)
        }
        Err(reason) => {
            host.write_all(format!("error {}\n", reason.replace('\n', " ")).as_bytes()).await?;
            host.shutdown().await
        }
    }
}

/// Connects to an address of a network namespace.
async fn connect(namespace: BorrowedFd<'_>, to: SocketAddr) -> StepResult<TcpStream> {
    let step = || format!("connect to {to}");
    let make = || if to.is_ipv4() { TcpSocket::new_v4() } else { TcpSocket::new_v6() };
    let socket = within(namespace, make).step(|| "create a socket in the sandbox's network namespace")?;
    match timeout(CONNECT_LIMIT, socket.connect(to)).await {
        Ok(connected) => connected.step(step),
        Err(_) => Err(StepError::Refused(format!("{}: {}", step(), describe(nix::errno::Errno::ETIMEDOUT)))),
    }
}

#[cfg(test)]
mod tests {
    use tokio::net::{TcpListener, UnixStream};

    use super::*;

    fn run(test: impl Future<Output = ()>) {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        runtime.block_on(async { timeout(Duration::from_secs(20), test).await.unwrap() });
    }

    /// The host's end of a connection that is relayed in this namespace.
    fn relayed() -> UnixStream {
        let (host, guest) = UnixStream::pair().unwrap();
        let connect = |to: SocketAddr| async move { TcpStream::connect(to).await.step(|| "connect") };
        tokio::spawn(async move { serve(guest, connect).await });
        host
    }

    #[test]
    fn bytes_and_ends_travel_both_ways() {
        run(async {
            for address in ["127.0.0.1:0", "[::1]:0"] {
                let listener = TcpListener::bind(address).await.unwrap();
                let mut host = relayed();
                let target = format!("{}\n", listener.local_addr().unwrap());
                host.write_all(target.as_bytes()).await.unwrap();
                let mut answer = [0; 3];
                host.read_exact(&mut answer).await.unwrap();
                assert_eq!(answer, guest::STREAM_ATTACHED);
                let (mut process, _) = listener.accept().await.unwrap();
                let request = vec![7; 3 << 20];
                let sent = async {
                    host.write_all(&request).await.unwrap();
                    host.shutdown().await.unwrap();
                };
                let mut seen = Vec::new();
                let (_, read) = tokio::join!(sent, process.read_to_end(&mut seen));
                assert!(read.is_ok() && seen == request);
                // The other way goes on after that.
                process.write_all(b"answer").await.unwrap();
                drop(process);
                let mut rest = String::new();
                host.read_to_string(&mut rest).await.unwrap();
                assert_eq!(rest, "answer");
            }
        });
    }

    #[test]
    fn what_cannot_be_reached_is_told() {
        run(async {
            let unused = TcpListener::bind("127.0.0.1:0").await.unwrap().local_addr().unwrap();
            let refused = "error connect: connection refused\n";
            let no_target = "error the first line is no loopback address with a port\n";
            for (line, expected) in [
                (format!("{unused}\n"), refused),
                ("192.0.2.1:80\n".to_owned(), no_target),
                ("nonsense\n".to_owned(), no_target),
            ] {
                let mut host = relayed();
                host.write_all(line.as_bytes()).await.unwrap();
                let mut answer = String::new();
                host.read_to_string(&mut answer).await.unwrap();
                assert_eq!(answer, expected);
            }
        });
    }
}
