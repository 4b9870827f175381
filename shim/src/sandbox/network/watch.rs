//! What changes in a namespace, as its kernel tells it.

use std::io;

use rvm_protocol::netlink::Socket;
use tokio::io::unix::AsyncFd;

use super::{Network, NetworkError};

/// linux/rtnetlink.h: links, and addresses, routes and rules of both families.
const GROUPS: [u32; 7] = [1, 5, 7, 8, 9, 11, 19];

/// Tells of changes in a network namespace.
#[derive(Debug)]
pub struct Watch(AsyncFd<Socket>);

impl Watch {
    /// Begins: what changes from now on is told.
    pub fn begin(network: &Network) -> Result<Self, NetworkError> {
        let socket = network.namespace().run(|| Socket::listen(&GROUPS)).map_err(NetworkError::Enter)?;
        let watched = socket.map_err(io::Error::from).and_then(|socket| {
            // SAFETY: the AsyncFd owns the socket, whose descriptor stays open and
            // the same for as long as it is registered.
            unsafe { AsyncFd::register(socket) }.map_err(io::Error::from)
        });
        watched.map(Self).map_err(NetworkError::Enter)
    }

    /// Waits for changes; those that have come together are told once.
    pub async fn changed(&mut self) -> io::Result<()> {
        loop {
            let mut ready = self.0.readable().await?;
            let some = ready.get_inner().drain()?;
            ready.clear_ready();
            if some {
                return Ok(());
            }
        }
    }
}
