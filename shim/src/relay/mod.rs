//! Who dials 127.0.0.1 or ::1 in a sandbox's network namespace on the host, as
//! CRI's port-forward does, reaches what listens there in the guest.
//!
//! One listening socket of each family takes the connections to every port: a
//! program at the namespace's socket lookup gives them to it ([`steer`]). Which
//! ports the guest listens on need not be known, and there is nothing that who set
//! the namespace up would see or could undo: no rule, no address, no interface.

mod steer;

use std::{
    io,
    net::{Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener as StdListener},
    os::fd::{AsFd, AsRawFd, OwnedFd},
    sync::Arc,
    task::Context,
};

use nix::{
    errno::Errno,
    sys::socket::{
        AddressFamily, Backlog, SockFlag, SockType, SockaddrIn, SockaddrIn6, bind, listen, socket,
    },
};
use rvm_protocol::guest::RelayTarget;
use tokio::{
    net::{TcpListener, TcpStream},
    sync::Semaphore,
    task::JoinSet,
};

use crate::{accept, sandbox::Namespace, vsock::Vsock};

/// Connections there may be at once for a sandbox; each takes two descriptors.
const MOST: usize = 256;
const BACKLOG: i32 = 128;
/// In the log.
const WHAT: &str = "loopback of the sandbox";

/// Why a sandbox's loopback addresses cannot be reached from the host.
#[derive(Debug, thiserror::Error)]
#[error("{what}: {source}")]
pub struct RelayError {
    what: &'static str,
    #[source]
    source: io::Error,
}

fn failed<E: Into<io::Error>>(what: &'static str) -> impl Fn(E) -> RelayError {
    move |source| RelayError { what, source: source.into() }
}

/// The relay of one namespace; ends when it is dropped, and with it what it had in
/// the namespace.
#[derive(Debug)]
pub struct Relay {
    _link: OwnedFd,
    _accepting: JoinSet<()>,
}

impl Relay {
    /// Relays what is dialled in `namespace` to the guest behind `vsock`. The event
    /// loop must be running.
    pub fn open(namespace: &Namespace, vsock: &Vsock) -> Result<Self, RelayError> {
        let (listeners, link) = listen_in(namespace)?;
        let most = Arc::new(Semaphore::new(MOST));
        let mut accepting = JoinSet::new();
        for listener in listeners.into_iter().flatten() {
            let listener = TcpListener::from_std(listener).map_err(failed("watch a listening socket"))?;
            accepting.spawn(serve(listener, vsock.clone(), Arc::clone(&most)));
        }
        Ok(Self { _link: link, _accepting: accepting })
    }
}

/// Whether this host can do it: tries it in a namespace of its own.
pub fn try_out() -> Result<(), RelayError> {
    let namespace =
        Namespace::new().map_err(|error| failed("make a network namespace")(io::Error::other(error)))?;
    listen_in(&namespace).map(drop)
}

/// Listens in the namespace, and has all ports lead there while the descriptor is open.
fn listen_in(namespace: &Namespace) -> Result<([Option<StdListener>; 2], OwnedFd), RelayError> {
    let listeners = namespace
        .run(listeners)
        .map_err(failed("enter the sandbox's network namespace"))?
        .map_err(failed("listen in the sandbox's network namespace"))?;
    let link =
        steer::to(&listeners, namespace.as_fd()).map_err(failed("look up sockets by a BPF program"))?;
    Ok((listeners, link))
}

/// One for IPv4, and one for IPv6 where the host has that.
fn listeners() -> io::Result<[Option<StdListener>; 2]> {
    let v4 = listener(SocketAddr::new(Ipv4Addr::LOCALHOST.into(), 0))?;
    let v6 = match listener(SocketAddr::new(Ipv6Addr::LOCALHOST.into(), 0)) {
        Err(error) if error.raw_os_error() == Some(libc::EAFNOSUPPORT) => None,
        listener => Some(listener?),
    };
    Ok([Some(v4), v6])
}

/// A listening socket whose address need not be there yet: `lo` may be brought up
/// later.
fn listener(address: SocketAddr) -> io::Result<StdListener> {
    let family = if address.is_ipv4() { AddressFamily::Inet } else { AddressFamily::Inet6 };
    let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
    let socket = socket(family, SockType::Stream, flags, None)?;
    let (level, option) = match address {
        SocketAddr::V4(_) => (libc::SOL_IP, libc::IP_FREEBIND),
        SocketAddr::V6(_) => (libc::SOL_IPV6, libc::IPV6_FREEBIND),
    };
    let on: libc::c_int = 1;
    let length = size_of_val(&on) as libc::socklen_t;
    // SAFETY: the option takes an int, which outlives the call.
    Errno::result(unsafe {
        libc::setsockopt(socket.as_raw_fd(), level, option, (&raw const on).cast(), length)
    })?;
    match address {
        SocketAddr::V4(address) => bind(socket.as_raw_fd(), &SockaddrIn::from(address))?,
        SocketAddr::V6(address) => bind(socket.as_raw_fd(), &SockaddrIn6::from(address))?,
    }
    listen(&socket, Backlog::new(BACKLOG)?)?;
    Ok(socket.into())
}

/// Serves a listening socket for ever.
async fn serve(listener: TcpListener, vsock: Vsock, most: Arc<Semaphore>) {
    let accept = |cx: &mut Context<'_>| listener.poll_accept(cx).map_ok(|(client, _)| client);
    accept::serve(WHAT, most, accept, |client| {
        let vsock = vsock.clone();
        async move {
            if let Err(error) = carry(client, &vsock).await {
                log::info!("{WHAT}: {error}");
            }
        }
    })
    .await;
}

/// Carries one connection. One that nobody in the guest takes is reset: here it has
/// been accepted already.
async fn carry(mut client: TcpStream, vsock: &Vsock) -> io::Result<()> {
    let target = RelayTarget::new(client.local_addr()?)
        .ok_or_else(|| io::Error::other("dialled at no loopback address"))?;
    match vsock.relay(target).await {
        Ok(mut guest) => {
            // A side that breaks the connection off is no failure of the relay.
            let _ = tokio::io::copy_bidirectional(&mut client, &mut guest).await;
            Ok(())
        }
        Err(error) => {
            client.set_zero_linger()?;
            Err(io::Error::other(error))
        }
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use tokio::{
        io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader},
        net::UnixListener,
        time::timeout,
    };

    use super::*;
    use crate::vsock::{SOCKET, open_dir};

    /// A guest in which one port is listened on, and what is sent there comes back.
    async fn guest(listener: UnixListener, port: u16) {
        loop {
            let (stream, _) = listener.accept().await.unwrap();
            tokio::spawn(async move {
                let mut stream = BufReader::new(stream);
                let mut line = String::new();
                stream.read_line(&mut line).await.unwrap();
                stream.write_all(b"OK 1\n").await.unwrap();
                line.clear();
                stream.read_line(&mut line).await.unwrap();
                if !line.trim_end().ends_with(&format!(":{port}")) {
                    stream.write_all(b"error connection refused\n").await.unwrap();
                    return;
                }
                stream.write_all(b"ok\n").await.unwrap();
                let mut all = Vec::new();
                stream.read_to_end(&mut all).await.unwrap();
                stream.write_all(&[line.as_bytes(), &all].concat()).await.unwrap();
            });
        }
    }

    #[tokio::test]
    async fn any_port_dialled_in_the_namespace_leads_to_the_guest() {
        if !nix::unistd::geteuid().is_root() {
            println!("needs root");
            return;
        }
        let dir = tempfile::tempdir().unwrap();
        tokio::spawn(guest(UnixListener::bind(dir.path().join(SOCKET)).unwrap(), 8080));
        let vsock = Vsock::new(open_dir(dir.path()).unwrap());
        let namespace = Namespace::new().unwrap();
        let dial = |to: &str| {
            let to: SocketAddr = to.parse().unwrap();
            let stream = namespace.run(move || std::net::TcpStream::connect(to)).unwrap();
            stream.map(|stream| {
                stream.set_nonblocking(true).unwrap();
                TcpStream::from_std(stream).unwrap()
            })
        };
        let refused = |to: &str| dial(to).unwrap_err().kind() == io::ErrorKind::ConnectionRefused;
        assert!(refused("127.0.0.1:8080"));
        let relay = Relay::open(&namespace, &vsock).unwrap();
        for to in ["127.0.0.1:8080", "[::1]:8080"] {
            let mut stream = dial(to).unwrap();
            stream.write_all(b"hello").await.unwrap();
            stream.shutdown().await.unwrap();
            let mut all = String::new();
            timeout(Duration::from_secs(20), stream.read_to_string(&mut all)).await.unwrap().unwrap();
            assert_eq!(all, format!("{to}\nhello"));
        }
        // Nobody listens there in the guest.
        let mut stream = dial("127.0.0.1:81").unwrap();
        let error = timeout(Duration::from_secs(20), stream.read(&mut [0])).await.unwrap().unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::ConnectionReset);
        // Other addresses of the namespace are its own.
        assert!(refused("127.0.0.2:8080"));
        // A dropped task's listener is closed when the loop gets to it.
        drop(relay);
        tokio::task::yield_now().await;
        assert!(refused("127.0.0.1:8080"));
    }
}
