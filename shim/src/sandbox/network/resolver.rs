//! The name server that Docker has for a container on a network of its own. It
//! listens at 127.0.0.11 of the container's network namespace, by rules of netfilter
//! there; what the guest asks that address comes here by vsock.

use std::{
    fs, io,
    net::{Ipv4Addr, SocketAddr, SocketAddrV4, TcpStream as StdTcpStream, UdpSocket as StdUdpSocket},
    sync::Arc,
    task::Context,
    time::Duration,
};

use rvm_protocol::guest::{RESOLVER_ADDRESS, RESOLVER_DATAGRAM_PORT, RESOLVER_STREAM_PORT};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpStream, UdpSocket, UnixListener, UnixStream},
    sync::Semaphore,
    task::{JoinSet, spawn_blocking},
    time::timeout,
};

use super::{Host, Machine, NetworkError};
use crate::accept;

const SERVER: SocketAddr = SocketAddr::V4(SocketAddrV4::new(RESOLVER_ADDRESS, 53));
/// Queries and connections at the same time: the guest's agent has no more, its
/// containers can connect as well.
const MOST: usize = 128;
/// How long one may take.
const LIMIT: Duration = Duration::from_secs(60);
/// Longest message.
const MAX_MESSAGE: usize = u16::MAX as usize;
/// In the log.
const WHAT: &str = "names for the guest";

/// Whether it listens in the calling thread's network namespace.
pub(super) fn is_there() -> io::Result<bool> {
    fs::read_to_string("/proc/thread-self/net/udp").map(|sockets| is_in(&sockets))
}

/// Whether one of the sockets is bound to its address (proc_net(5)).
fn is_in(sockets: &str) -> bool {
    let address = format!("{:08X}:", u32::from_ne_bytes(RESOLVER_ADDRESS.octets()));
    sockets.lines().any(|line| line.split_whitespace().nth(1).is_some_and(|at| at.starts_with(&address)))
}

/// Carries queries for as long as it lives.
#[derive(Debug)]
pub(super) struct Relay {
    _serving: JoinSet<()>,
}

impl Relay {
    /// Carries those of the machine's guest to the server in the namespace.
    pub(super) fn start(machine: &impl Machine, host: &Arc<Host>) -> Result<Self, NetworkError> {
        let datagrams = machine.listen(RESOLVER_DATAGRAM_PORT).map_err(NetworkError::Resolver)?;
        let streams = machine.listen(RESOLVER_STREAM_PORT).map_err(NetworkError::Resolver)?;
        let places = Arc::new(Semaphore::new(MOST));
        let mut serving = JoinSet::new();
        serving.spawn(serve(datagrams, host.clone(), places.clone(), carry_datagram));
        serving.spawn(serve(streams, host.clone(), places, carry_stream));
        Ok(Self { _serving: serving })
    }
}

async fn serve<F>(
    listener: UnixListener,
    host: Arc<Host>,
    places: Arc<Semaphore>,
    carry: impl Fn(UnixStream, Arc<Host>) -> F,
) where
    F: Future<Output = io::Result<()>> + Send + 'static,
{
    let accept = |cx: &mut Context<'_>| listener.poll_accept(cx).map_ok(|(guest, _)| guest);
    accept::serve(WHAT, places, accept, |guest| {
        let carried = timeout(LIMIT, carry(guest, host.clone()));
        async move {
            if let Ok(Err(error)) = carried.await {
                log::debug!("{WHAT}: {error}");
            }
        }
    })
    .await;
}

/// One query and its answer: what came in a datagram goes on in one, as Docker asks
/// others the way it was asked.
async fn carry_datagram(mut guest: UnixStream, host: Arc<Host>) -> io::Result<()> {
    let mut query = vec![0; guest.read_u16().await?.into()];
    guest.read_exact(&mut query).await?;
    let server = within(host, || {
        let server = StdUdpSocket::bind((Ipv4Addr::UNSPECIFIED, 0))?;
        server.connect(SERVER)?;
        server.set_nonblocking(true)?;
        Ok(server)
    });
    let server = UdpSocket::from_std(server.await?)?;
    server.send(&query).await?;
    let mut answer = vec![0; MAX_MESSAGE];
    let length = server.recv(&mut answer).await?;
    answer.truncate(length);
    let length = u16::try_from(length).map_err(io::Error::other)?;
    guest.write_all(&[&length.to_be_bytes()[..], &answer].concat()).await
}

async fn carry_stream(mut guest: UnixStream, host: Arc<Host>) -> io::Result<()> {
    let server = within(host, || {
        let server = StdTcpStream::connect_timeout(&SERVER, LIMIT)?;
        server.set_nonblocking(true)?;
        Ok(server)
    });
    let mut server = TcpStream::from_std(server.await?)?;
    tokio::io::copy_bidirectional(&mut guest, &mut server).await.map(drop)
}

/// Makes a socket that is in the namespace.
async fn within<T: Send + 'static>(
    host: Arc<Host>,
    make: impl FnOnce() -> io::Result<T> + Send + 'static,
) -> io::Result<T> {
    spawn_blocking(move || host.namespace.run(make).flatten()).await.map_err(io::Error::other)?
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn dockers_socket_is_known_by_its_address() {
        let others = "  sl  local_address rem_address   st\n  12: 0100007F:0035 00000000:0000 07\n";
        assert!(!is_in(others) && !is_in(""));
        assert!(is_in(&format!("{others}  13: 0B00007F:B0F6 00000000:0000 07 00000000:00000000\n")));
    }
}
