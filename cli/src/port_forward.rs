//! `rvmctl port-forward`: ports of this host that lead to sockets listening on a
//! sandbox's loopback addresses.

use std::{
    io,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
    path::Path,
    str::FromStr,
};

use rvm_protocol::guest::{RELAY_PORT, RelayTarget};
use rvm_shim::{
    process_id::pidfd_open,
    vsock::{self, Vsock, VsockError},
};
use tokio::{
    io::{Interest, unix::AsyncFd},
    net::{TcpListener, TcpStream, UnixStream},
    signal::unix::{SignalKind, signal},
};

/// `[LOCAL:]PORT`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Forward {
    /// Of this host; 0: any that is free.
    local: u16,
    /// Of the sandbox.
    port: u16,
}

impl FromStr for Forward {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let number =
            |text: &str| text.parse::<u16>().map_err(|_| format!("{text:?} must be a port, of 1 to 65535"));
        let (local, port) = match text.split_once(':') {
            None => (number(text)?, number(text)?),
            // As kubectl has it: any.
            Some(("", port)) => (0, number(port)?),
            Some((local, port)) => (number(local)?, number(port)?),
        };
        match port {
            0 => Err(format!("{text:?} must name a port of the sandbox, of 1 to 65535")),
            _ => Ok(Self { local, port }),
        }
    }
}

/// Why nothing is forwarded (any more).
#[derive(Debug, thiserror::Error)]
pub enum PortForwardError {
    /// The local port.
    #[error("cannot listen on {address}: {source}")]
    Listen {
        /// Where.
        address: SocketAddr,
        /// Why not.
        #[source]
        source: io::Error,
    },
    /// The rest.
    #[error("{what}: {source}")]
    Io {
        /// What was tried.
        what: &'static str,
        /// Why not.
        #[source]
        source: io::Error,
    },
}

/// Forwards until it is interrupted or the sandbox is gone. `monitor` is the
/// sandbox's, `dir` its directory.
pub async fn run(
    dir: &Path,
    monitor: u32,
    address: IpAddr,
    forwards: &[Forward],
) -> Result<(), PortForwardError> {
    let failed = |what| move |source| PortForwardError::Io { what, source };
    let vsock = Vsock::new(vsock::open_dir(dir).map_err(failed("the sandbox's directory"))?);
    let mut listeners = Vec::new();
    for forward in forwards {
        let address = SocketAddr::new(address, forward.local);
        let listen = |source| PortForwardError::Listen { address, source };
        let listener = TcpListener::bind(address).await.map_err(listen)?;
        println!("Forwarding from {} -> {}", listener.local_addr().map_err(listen)?, forward.port);
        listeners.push((listener, forward.port));
    }
    for (listener, port) in listeners {
        tokio::spawn(accept(listener, port, vsock.clone()));
    }
    let mut interrupt = signal(SignalKind::interrupt()).map_err(failed("wait for signals"))?;
    let mut terminate = signal(SignalKind::terminate()).map_err(failed("wait for signals"))?;
    tokio::select! {
        _ = interrupt.recv() => Ok(()),
        _ = terminate.recv() => Ok(()),
        ended = end_of(monitor) => ended.map_err(failed("wait for the monitor")),
    }
}

/// Returns when a process has ended.
async fn end_of(pid: u32) -> io::Result<()> {
    match pidfd_open(pid) {
        Ok(pidfd) => {
            // SAFETY: the AsyncFd owns the descriptor, which stays open and the same.
            let pidfd = unsafe { AsyncFd::register_with_interest(pidfd, Interest::READABLE) };
            pidfd.map_err(io::Error::from)?.readable().await.map(drop)
        }
        Err(error) if error.raw_os_error() == Some(libc::ESRCH) => Ok(()),
        Err(error) => Err(error),
    }
}

async fn accept(listener: TcpListener, port: u16, vsock: Vsock) {
    loop {
        match listener.accept().await {
            Ok((client, peer)) => {
                let vsock = vsock.clone();
                tokio::spawn(async move {
                    match carry(client, port, &vsock).await {
                        Ok(()) => {}
                        Err(error) => eprintln!("rvmctl: {peer} -> {port}: {error}"),
                    }
                });
            }
            Err(error) => {
                eprintln!("rvmctl: accept a connection for {port}: {error}");
                // Want of descriptors passes.
                tokio::time::sleep(std::time::Duration::from_millis(100)).await;
            }
        }
    }
}

/// Carries one connection, until both sides have ended it.
async fn carry(mut client: TcpStream, port: u16, vsock: &Vsock) -> Result<(), VsockError> {
    let mut sandbox = connect(port, vsock).await?;
    // A side that breaks the connection off is no failure of the forwarding.
    let _ = tokio::io::copy_bidirectional(&mut client, &mut sandbox).await;
    Ok(())
}

/// As who dials `localhost`: IPv4 first, then IPv6.
async fn connect(port: u16, vsock: &Vsock) -> Result<UnixStream, VsockError> {
    let mut failed = None;
    for ip in [IpAddr::from(Ipv4Addr::LOCALHOST), Ipv6Addr::LOCALHOST.into()] {
        let Some(target) = RelayTarget::new(SocketAddr::new(ip, port)) else { continue };
        match vsock.relay(target).await {
            Err(error @ VsockError::Refused { .. }) => failed = failed.or(Some(error)),
            done => return done,
        }
    }
    let nobody = || VsockError::Refused { port: RELAY_PORT, problem: "no port".into() };
    Err(failed.unwrap_or_else(nobody))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ports_are_one_or_two_numbers() {
        let parse = |text: &str| text.parse::<Forward>().map(|forward| (forward.local, forward.port));
        assert_eq!(parse("80"), Ok((80, 80)));
        assert_eq!(parse("8080:80"), Ok((8080, 80)));
        assert_eq!(parse(":80"), Ok((0, 80)));
        assert_eq!(parse("0:80"), Ok((0, 80)));
        for wrong in ["", "0", ":", "80:", "80:0", "65536", "a", "1:2:3", "-1", " 80"] {
            assert!(parse(wrong).is_err(), "{wrong:?}");
        }
    }
}
