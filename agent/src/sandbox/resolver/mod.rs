//! Docker's name server, which listens at a loopback address of the container's
//! network namespace on the host: the guest's loopback does not lead there, so what
//! is asked at that address is taken here and carried to the host.
//!
//! As Docker's own it listens at ports the kernel chooses, and [`rules`] lead port 53
//! there: a container that serves names itself finds that port free.

mod rules;

use std::{
    io,
    net::{SocketAddr, SocketAddrV4, TcpListener, UdpSocket},
    os::fd::OwnedFd,
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use rules::Rules;
use rvm_protocol::guest::{HOST_CID, RESOLVER_ADDRESS, RESOLVER_DATAGRAM_PORT, RESOLVER_STREAM_PORT};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    sync::Semaphore,
    task::JoinSet,
    time::timeout,
};
use tokio_vsock::{VsockAddr, VsockStream};

use crate::{
    error::{Step, StepResult},
    sys::namespace::within,
};

/// Queries and connections at the same time; what comes beyond is asked again by
/// who has asked, or waits.
const MOST: usize = 128;
/// How long an answer may take. Docker asks each of its own servers for 4 seconds.
const LIMIT: Duration = Duration::from_secs(30);
/// Longest message.
const MAX_MESSAGE: usize = u16::MAX as usize;
/// How long to wait where a socket fails again and again.
const PAUSE: Duration = Duration::from_millis(100);

/// Takes queries once it has been asked to.
#[derive(Debug, Default)]
pub struct Resolver(Mutex<Option<Serving>>);

#[derive(Debug)]
struct Serving {
    _rules: Rules,
    _tasks: JoinSet<()>,
}

impl Resolver {
    /// Takes queries in the network namespace `network` from now on.
    pub fn serve(&self, network: &OwnedFd) -> StepResult<()> {
        let mut serving = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if serving.is_none() {
            *serving = Some(Serving::start(network)?);
        }
        Ok(())
    }
}

impl Serving {
    fn start(network: &OwnedFd) -> StepResult<Self> {
        let step = || format!("take queries at {RESOLVER_ADDRESS}");
        let (rules, datagrams, listener) = within(network, || {
            let any_port = SocketAddrV4::new(RESOLVER_ADDRESS, 0);
            let (datagrams, listener) = (UdpSocket::bind(any_port)?, TcpListener::bind(any_port)?);
            let ports = (datagrams.local_addr()?.port(), listener.local_addr()?.port());
            Ok((Rules::lead_to(ports).map_err(io::Error::other)?, datagrams, listener))
        })
        .step(step)?;
        datagrams.set_nonblocking(true).step(step)?;
        listener.set_nonblocking(true).step(step)?;
        let datagrams = tokio::net::UdpSocket::from_std(datagrams).step(step)?;
        let listener = tokio::net::TcpListener::from_std(listener).step(step)?;
        let places = Arc::new(Semaphore::new(MOST));
        let mut tasks = JoinSet::new();
        tasks.spawn(serve_datagrams(Arc::new(datagrams), places.clone()));
        tasks.spawn(serve_connections(listener, places));
        Ok(Self { _rules: rules, _tasks: tasks })
    }
}

async fn serve_datagrams(socket: Arc<tokio::net::UdpSocket>, places: Arc<Semaphore>) {
    let mut buffer = vec![0; MAX_MESSAGE];
    let mut queries = JoinSet::new();
    loop {
        while queries.try_join_next().is_some() {}
        let (query, from) = match socket.recv_from(&mut buffer).await {
            Ok((length, from)) => (buffer.get(..length).unwrap_or_default().to_vec(), from),
            Err(error) => {
                log::info!("names: {error}");
                tokio::time::sleep(PAUSE).await;
                continue;
            }
        };
        let Ok(place) = places.clone().try_acquire_owned() else { continue };
        let socket = socket.clone();
        queries.spawn(async move {
            let _place = place;
            // Without an answer who has asked asks again, or gives up.
            if let Ok(Err(error)) = timeout(LIMIT, answer(&socket, &query, from)).await {
                log::info!("names: {error}");
            }
        });
    }
}

/// Carries one query and its answer, each after its length in two bytes.
async fn answer(socket: &tokio::net::UdpSocket, query: &[u8], from: SocketAddr) -> io::Result<()> {
    let mut host = connect(RESOLVER_DATAGRAM_PORT).await?;
    let length = u16::try_from(query.len()).map_err(io::Error::other)?;
    host.write_all(&[&length.to_be_bytes(), query].concat()).await?;
    let mut reply = vec![0; host.read_u16().await?.into()];
    host.read_exact(&mut reply).await?;
    socket.send_to(&reply, from).await.map(drop)
}

async fn serve_connections(listener: tokio::net::TcpListener, places: Arc<Semaphore>) {
    let mut connections = JoinSet::new();
    loop {
        while connections.try_join_next().is_some() {}
        let Ok(place) = places.clone().acquire_owned().await else { return };
        match listener.accept().await {
            Ok((mut stream, _)) => {
                connections.spawn(async move {
                    let _place = place;
                    let carried = async {
                        let mut host = connect(RESOLVER_STREAM_PORT).await?;
                        tokio::io::copy_bidirectional(&mut stream, &mut host).await
                    };
                    if let Ok(Err(error)) = timeout(LIMIT, carried).await {
                        log::info!("names: {error}");
                    }
                });
            }
            Err(error) => {
                log::info!("names: {error}");
                tokio::time::sleep(PAUSE).await;
            }
        }
    }
}

async fn connect(port: u32) -> io::Result<VsockStream> {
    VsockStream::connect(VsockAddr::new(HOST_CID, port)).await
}
