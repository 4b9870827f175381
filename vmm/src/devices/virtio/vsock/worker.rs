//! The device's thread: rings on one side, Unix sockets on the other.

use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::net::UnixListener;
use std::sync::Arc;

use vmm_sys_util::epoll::{Epoll, EpollEvent, EventSet};

use super::VsockError;
use super::muxer::{Muxer, Progress};
use super::packet::{HEADER_BYTES, Header};
use crate::devices::virtio::buffers::GuestBuffers;
use crate::devices::virtio::ring::{Ring, RingError};
use crate::devices::virtio::worker::{Handler, add};
use crate::memory::GuestRam;
use crate::process::ok;

const RX: u64 = 0;
const TX: u64 = 1;
const LISTENER: u64 = 2;
const EVENTS: u64 = 3;
/// Tokens from here on belong to connections.
pub(super) const FIRST_CONNECTION: u64 = 4;

/// `struct virtio_vsock_event` with VIRTIO_VSOCK_EVENT_TRANSPORT_RESET (section
/// 5.10.6.8).
const TRANSPORT_RESET: [u8; 4] = [0; 4];

pub(super) struct VsockWorker {
    pub(super) memory: GuestRam,
    pub(super) rx: Ring,
    pub(super) tx: Ring,
    pub(super) listener: Arc<UnixListener>,
    /// Host programs may wait at the listener.
    pub(super) callers: bool,
    /// Where the sockets of the host's ports are.
    pub(super) dir: Arc<OwnedFd>,
    pub(super) muxer: Muxer,
    /// The event queue, until the guest has been told that its connections are gone:
    /// they were those of the machine that was saved.
    pub(super) untold: Option<Ring>,
}

impl Handler for VsockWorker {
    type Error = VsockError;

    fn register(&mut self, epoll: &Epoll) -> io::Result<()> {
        self.rx.register(epoll, RX)?;
        self.tx.register(epoll, TX)?;
        if let Some(events) = &self.untold {
            events.register(epoll, EVENTS)?;
        }
        add(epoll, &*self.listener, EventSet::IN | EventSet::EDGE_TRIGGERED, LISTENER)
    }

    /// The sockets' directory becomes the thread's, which has one of its own from now on.
    fn start(&mut self, _epoll: &Epoll) -> io::Result<()> {
        // SAFETY: touches no memory.
        ok(unsafe { libc::unshare(libc::CLONE_FS) })?;
        // SAFETY: plain system call on an open descriptor.
        ok(unsafe { libc::fchdir(self.dir.as_raw_fd()) })
    }

    fn handle(&mut self, epoll: &Epoll, ready: &[EpollEvent]) -> Result<(), VsockError> {
        for event in ready {
            match event.data() {
                // The rings are looked at in any case.
                RX | TX | EVENTS => {}
                LISTENER => self.callers = true,
                token => self.muxer.ready(epoll, token, event.event_set()),
            }
        }
        self.tell()?;
        self.take(epoll)?;
        self.give()?;
        // Last, since all of the above makes room for callers, and nobody tells of them again.
        if self.callers {
            self.callers = !self.muxer.accept(epoll, &self.listener);
        }
        Ok(())
    }

    /// What the guest sent before it went down still reaches the host, as far
    /// as it takes it at once.
    fn finish(&mut self, epoll: &Epoll) {
        if let Err(error) = self.take(epoll) {
            log::debug!("vsock: {error}");
        }
    }
}

impl VsockWorker {
    /// Tells the guest that its connections are gone, once it has a buffer for that.
    fn tell(&mut self) -> Result<(), RingError> {
        let Some(events) = &mut self.untold else { return Ok(()) };
        // As many of no use as there are: the next one may be of use.
        for _ in 0..events.size() {
            let Some(chain) = events.pop(&self.memory)? else { break };
            let head = chain.head_index();
            let told = match GuestBuffers::from_chain(&self.memory, chain) {
                Ok((_, mut buffer)) if buffer.len() >= TRANSPORT_RESET.len() => {
                    buffer.write(&TRANSPORT_RESET)
                }
                _ => 0,
            };
            events.push(&self.memory, head, told as u32)?;
            events.notify(&self.memory)?;
            if told > 0 {
                self.untold = None;
                return Ok(());
            }
        }
        if events.arm(&self.memory)? {
            events.kick_again();
        }
        Ok(())
    }

    /// Takes the guest's packets, at most a ring full.
    fn take(&mut self, epoll: &Epoll) -> Result<(), RingError> {
        for _ in 0..self.tx.size() {
            if self.muxer.congested() {
                // The guest has to take its refusals first: see `give`.
                self.tx.notify(&self.memory)?;
                return Ok(());
            }
            let Some(chain) = self.tx.pop(&self.memory)? else { break };
            let head = chain.head_index();
            if let Ok((mut packet, _)) = GuestBuffers::from_chain(&self.memory, chain)
                && let Some(bytes) = packet.read::<HEADER_BYTES>()
            {
                let header = Header::decode(&bytes);
                // A packet cannot have more data than it says, nor less.
                if packet.len() >= header.len as usize {
                    let data = packet.take(header.len as usize);
                    self.muxer.receive(epoll, &header, data);
                }
            }
            self.tx.push(&self.memory, head, 0)?;
        }
        self.tx.notify(&self.memory)?;
        if self.tx.arm(&self.memory)? {
            self.tx.kick_again();
        }
        Ok(())
    }

    /// Gives packets to the guest, at most a ring full.
    fn give(&mut self) -> Result<(), RingError> {
        let was_congested = self.muxer.congested();
        let progress = self.muxer.send(&mut self.rx, &self.memory)?;
        self.rx.notify(&self.memory)?;
        match progress {
            Progress::Idle => self.rx.disarm(&self.memory)?,
            Progress::More => self.rx.kick_again(),
            Progress::Starved => {
                if self.rx.arm(&self.memory)? {
                    self.rx.kick_again();
                }
            }
        }
        if was_congested && !self.muxer.congested() {
            self.tx.kick_again();
        }
        Ok(())
    }
}
