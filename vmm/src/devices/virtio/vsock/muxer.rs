//! All connections of the guest: which packet belongs to which, whose turn it is.

use std::collections::{HashMap, VecDeque};
use std::ffi::{OsStr, OsString};
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::net::{UnixListener, UnixStream};

use vmm_sys_util::epoll::{Epoll, EventSet};

use super::connection::{ARRIVALS, Connection, Key, Phase, Verdict};
use super::packet::{HEADER_BYTES, Header, Op, TYPE_STREAM};
use super::{HOST_CID, HOST_PORTS, MAX_CONNECTIONS, MAX_CONNECTIONS_OF_GUEST, MAX_LINE_BYTES, MAX_REFUSALS};
use crate::devices::virtio::buffers::{GuestBuffers, MAX_PIECES};
use crate::devices::virtio::ring::{Ring, RingError};
use crate::devices::virtio::worker::add;
use crate::memory::GuestRam;
use crate::process::owned;

/// How far the rx ring could be served.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Progress {
    /// Nothing is left to send.
    Idle,
    /// The guest has to give buffers first.
    Starved,
    /// More can be sent right away.
    More,
}

pub(super) struct Muxer {
    guest_cid: u64,
    /// The socket's name in the thread's working directory.
    socket: OsString,
    /// Host programs that have not said yet where they want to.
    greeting: HashMap<u64, UnixStream>,
    connections: HashMap<u64, Connection>,
    /// Connections the guest knows.
    tokens: HashMap<Key, u64>,
    /// Connections that may have something for the guest, in turn.
    due: VecDeque<u64>,
    /// RST packets for which there is no connection (any more).
    refusals: VecDeque<Header>,
    next_token: u64,
    next_host_port: u32,
}

impl Muxer {
    /// No connections; they will be known to epoll by tokens from `first_token` on.
    pub(super) fn new(guest_cid: u32, socket: OsString, first_token: u64) -> Self {
        Self {
            guest_cid: guest_cid.into(),
            socket,
            greeting: HashMap::new(),
            connections: HashMap::new(),
            tokens: HashMap::new(),
            due: VecDeque::new(),
            refusals: VecDeque::new(),
            next_token: first_token,
            next_host_port: HOST_PORTS.start,
        }
    }

    /// Too many refusals wait: no packet is taken from the guest now.
    pub(super) fn congested(&self) -> bool {
        self.refusals.len() >= MAX_REFUSALS
    }

    fn full(&self, most: usize) -> bool {
        self.connections.len() + self.greeting.len() >= most
    }

    fn token(&mut self) -> u64 {
        let token = self.next_token;
        self.next_token += 1;
        token
    }

    /// Takes host programs that connected; false if more of them may wait.
    pub(super) fn accept(&mut self, epoll: &Epoll, listener: &UnixListener) -> bool {
        while !self.full(MAX_CONNECTIONS) && !self.congested() {
            match listener.accept() {
                Ok((stream, _)) => {
                    let token = self.token();
                    match watch(epoll, &stream, token) {
                        Ok(()) => {
                            self.greeting.insert(token, stream);
                        }
                        Err(error) => log::warn!("vsock: a connection is dropped: {error}"),
                    }
                }
                Err(error) => match error.kind() {
                    io::ErrorKind::WouldBlock => return true,
                    io::ErrorKind::Interrupted | io::ErrorKind::ConnectionAborted => {}
                    // No descriptors left: tried again when something happens.
                    _ => {
                        log::debug!("vsock: accept: {error}");
                        return false;
                    }
                },
            }
        }
        false
    }

    /// Handles what epoll saw of a host program's socket.
    pub(super) fn ready(&mut self, epoll: &Epoll, token: u64, events: EventSet) {
        let hung_up = events.intersects(EventSet::HANG_UP | EventSet::ERROR);
        if let Some(connection) = self.connections.get_mut(&token) {
            if connection.abandoned(hung_up) {
                let key = connection.key;
                self.refuse(key, TYPE_STREAM);
                self.forget(token);
                return;
            }
            let readable = events.intersects(EventSet::IN | EventSet::READ_HANG_UP);
            connection.ready(readable, events.contains(EventSet::OUT), hung_up);
            connection.flush();
            if connection.drained() {
                self.connections.remove(&token);
            } else {
                self.list(token);
                self.await_room(epoll, token);
            }
        } else if self.greeting.contains_key(&token) {
            if hung_up {
                self.greeting.remove(&token);
            } else {
                self.greet(token);
            }
        }
    }

    /// Reads the `CONNECT` line, once all of it is there, and asks the guest.
    fn greet(&mut self, token: u64) {
        let Some(stream) = self.greeting.get(&token) else { return };
        match read_port(stream) {
            Ok(None) => {}
            Ok(Some(guest_port)) => {
                let key = Key { host_port: self.host_port(guest_port), guest_port };
                if let Some(stream) = self.greeting.remove(&token) {
                    self.connections.insert(token, Connection::requested(key, stream));
                    self.tokens.insert(key, token);
                    self.list(token);
                }
            }
            Err(error) => {
                log::warn!("vsock: a host program is turned away: {error}");
                self.greeting.remove(&token);
            }
        }
    }

    /// A host port no other connection to that guest port has. There are more
    /// ports than connections, so that the search ends.
    fn host_port(&mut self, guest_port: u32) -> u32 {
        loop {
            let host_port = self.next_host_port;
            self.next_host_port =
                if host_port + 1 == HOST_PORTS.end { HOST_PORTS.start } else { host_port + 1 };
            if !self.tokens.contains_key(&Key { host_port, guest_port }) {
                return host_port;
            }
        }
    }

    /// Handles a packet of the guest.
    pub(super) fn receive(&mut self, epoll: &Epoll, header: &Header, data: GuestBuffers<'_>) {
        // Not for us, or in another's name: no answer would arrive.
        if header.src_cid != self.guest_cid || header.dst_cid != HOST_CID {
            return;
        }
        let key = Key { host_port: header.dst_port, guest_port: header.src_port };
        let known = self.tokens.get(&key).copied();
        match (header.op, known) {
            (Some(op), Some(token)) if header.kind == TYPE_STREAM => {
                self.continued(epoll, token, op, header, data)
            }
            (Some(Op::Request), None) if header.kind == TYPE_STREAM => self.requested(epoll, key, header),
            (Some(Op::Rst), _) => {}
            _ => self.refuse(key, header.kind),
        }
    }

    fn continued(&mut self, epoll: &Epoll, token: u64, op: Op, header: &Header, data: GuestBuffers<'_>) {
        let Some(connection) = self.connections.get_mut(&token) else { return };
        let was_requested = connection.phase == Phase::Requested;
        let key = connection.key;
        let mut verdict = connection.receive(header, op, data);
        if verdict == Verdict::Keep
            && was_requested
            && op == Op::Response
            && connection.open(key.host_port).is_err()
        {
            // The host's program is gone, or does not want to know.
            verdict = Verdict::Reset;
        }
        match verdict {
            Verdict::Keep => self.list(token),
            Verdict::Drop => self.forget(token),
            Verdict::Reset => {
                self.refuse(key, TYPE_STREAM);
                self.forget(token);
            }
        }
        self.await_room(epoll, token);
    }

    /// Has epoll tell of room in a socket while, and only while, something
    /// waits for it: a reader makes room with everything it reads.
    fn await_room(&mut self, epoll: &Epoll, token: u64) {
        if let Some(connection) = self.connections.get_mut(&token)
            && let Err(error) = connection.await_room(epoll, token)
        {
            log::warn!("vsock: a connection is dropped: {error}");
            let key = connection.key;
            self.tokens.remove(&key);
            self.connections.remove(&token);
            self.refuse(key, TYPE_STREAM);
        }
    }

    /// The guest wants a connection to a host port: somebody listens, or not.
    fn requested(&mut self, epoll: &Epoll, key: Key, header: &Header) {
        if self.full(MAX_CONNECTIONS_OF_GUEST) {
            return self.refuse(key, TYPE_STREAM);
        }
        let token = self.token();
        match connect(&self.socket, key.host_port).and_then(|stream| {
            watch(epoll, &stream, token)?;
            Ok(stream)
        }) {
            Ok(stream) => {
                self.connections.insert(token, Connection::accepted(key, stream, header));
                self.tokens.insert(key, token);
                self.list(token);
            }
            Err(error) => {
                log::debug!("vsock: host port {}: {error}", key.host_port);
                self.refuse(key, TYPE_STREAM);
            }
        }
    }

    /// The guest's side of a connection is gone: what it sent before still
    /// reaches the host's program.
    fn forget(&mut self, token: u64) {
        let Some(connection) = self.connections.get_mut(&token) else { return };
        self.tokens.remove(&connection.key);
        connection.drain();
        connection.flush();
        if connection.drained() {
            self.connections.remove(&token);
        }
    }

    fn refuse(&mut self, key: Key, kind: u16) {
        self.refusals.push_back(self.header(key, kind, Op::Rst));
    }

    fn header(&self, key: Key, kind: u16, op: Op) -> Header {
        Header {
            src_cid: HOST_CID,
            dst_cid: self.guest_cid,
            src_port: key.host_port,
            dst_port: key.guest_port,
            len: 0,
            kind,
            op: Some(op),
            flags: 0,
            buf_alloc: 0,
            fwd_cnt: 0,
        }
    }

    /// Gives a connection a turn.
    fn list(&mut self, token: u64) {
        if let Some(connection) = self.connections.get_mut(&token)
            && !connection.listed
            && connection.is_due()
        {
            connection.listed = true;
            self.due.push_back(token);
        }
    }

    /// Fills the guest's buffers, at most a ring full: first refusals, then the
    /// connections in turn.
    pub(super) fn send(&mut self, ring: &mut Ring, memory: &GuestRam) -> Result<Progress, RingError> {
        for _ in 0..ring.size() {
            if self.refusals.is_empty() && self.due.is_empty() {
                return Ok(Progress::Idle);
            }
            let first = match RxBuffer::pop(ring, memory)? {
                None => return Ok(Progress::Starved),
                Some(Ok(buffer)) => buffer,
                // One of no use goes back empty, and counts: a guest may offer it for ever.
                Some(Err(head)) => {
                    ring.push(memory, head, 0)?;
                    continue;
                }
            };
            if let Some(header) = self.refusals.pop_front() {
                first.send(ring, memory, &header)?;
            } else if let Some(token) = self.due.pop_front() {
                self.turn(token, first, ring, memory)?;
            }
        }
        Ok(Progress::More)
    }

    fn turn(
        &mut self,
        token: u64,
        first: RxBuffer<'_>,
        ring: &mut Ring,
        memory: &GuestRam,
    ) -> Result<(), RingError> {
        let Some(connection) = self.connections.get_mut(&token) else {
            ring.unpop(1);
            return Ok(());
        };
        connection.listed = false;
        let key = connection.key;
        if let Some((op, flags)) = connection.next_control() {
            let (buf_alloc, fwd_cnt) = connection.tell_credit();
            let finished = connection.finished();
            let header = Header { flags, buf_alloc, fwd_cnt, ..self.header(key, TYPE_STREAM, op) };
            first.send(ring, memory, &header)?;
            if finished {
                self.forget(token);
            }
        } else if connection.wants_data() {
            let buffers = more_buffers(first, connection.burst(), ring, memory)?;
            let mut target = GuestBuffers::default();
            for buffer in &buffers {
                target.extend(&buffer.data);
            }
            let mut left = connection.read(target);
            let (buf_alloc, fwd_cnt) = connection.tell_credit();
            let blank = self.header(key, TYPE_STREAM, Op::Rw);
            let mut unused = 0;
            for buffer in buffers {
                let len = left.min(buffer.data.len());
                left -= len;
                if len == 0 {
                    unused += 1;
                    continue;
                }
                buffer.send(ring, memory, &Header { len: len as u32, buf_alloc, fwd_cnt, ..blank })?;
            }
            ring.unpop(unused);
        } else {
            ring.unpop(1);
            return Ok(());
        }
        self.list(token);
        Ok(())
    }
}

/// A buffer of the rx ring.
struct RxBuffer<'m> {
    head: u16,
    header: GuestBuffers<'m>,
    data: GuestBuffers<'m>,
}

impl<'m> RxBuffer<'m> {
    /// Takes the next one; the inner error is a buffer of no use, by its head.
    fn pop(ring: &mut Ring, memory: &'m GuestRam) -> Result<Option<Result<Self, u16>>, RingError> {
        let Some(chain) = ring.pop(memory)? else { return Ok(None) };
        let head = chain.head_index();
        Ok(Some(match GuestBuffers::from_chain(memory, chain) {
            Ok((_, mut data)) if data.len() > HEADER_BYTES => {
                let header = data.take(HEADER_BYTES);
                Ok(Self { head, header, data })
            }
            _ => Err(head),
        }))
    }

    /// Returns it to the guest with `header`, its data being in place.
    fn send(mut self, ring: &mut Ring, memory: &GuestRam, header: &Header) -> Result<(), RingError> {
        self.header.write(&header.encode());
        ring.push(memory, self.head, HEADER_BYTES as u32 + header.len)
    }
}

/// `first` and those after it, up to `burst` and as long as they are of use.
fn more_buffers<'m>(
    first: RxBuffer<'m>,
    burst: usize,
    ring: &mut Ring,
    memory: &'m GuestRam,
) -> Result<Vec<RxBuffer<'m>>, RingError> {
    let mut pieces = first.data.pieces();
    let mut buffers = vec![first];
    while buffers.len() < burst {
        match RxBuffer::pop(ring, memory)? {
            None => break,
            Some(Ok(buffer)) if pieces + buffer.data.pieces() <= MAX_PIECES => {
                pieces += buffer.data.pieces();
                buffers.push(buffer);
            }
            Some(_) => {
                ring.unpop(1);
                break;
            }
        }
    }
    Ok(buffers)
}

/// Has epoll report what arrives at a socket, each change once.
fn watch(epoll: &Epoll, stream: &UnixStream, token: u64) -> io::Result<()> {
    stream.set_nonblocking(true)?;
    add(epoll, stream, ARRIVALS, token)
}

/// Connects to `<socket>_<port>` in the working directory, without waiting for room in its
/// backlog.
fn connect(socket: &OsStr, port: u32) -> io::Result<UnixStream> {
    let mut address =
        libc::sockaddr_un { sun_family: libc::AF_UNIX as libc::sa_family_t, sun_path: [0; 108] };
    let suffix = format!("_{port}");
    let path = socket.as_bytes().iter().chain(suffix.as_bytes());
    // The device's constructor has made sure that it fits with its final NUL.
    for (place, byte) in address.sun_path.iter_mut().zip(path) {
        *place = byte.cast_signed();
    }
    let kind = libc::SOCK_STREAM | libc::SOCK_NONBLOCK | libc::SOCK_CLOEXEC;
    // SAFETY: plain system call.
    let fd = owned(unsafe { libc::socket(libc::AF_UNIX, kind, 0) }.into())?;
    let len = size_of::<libc::sockaddr_un>() as libc::socklen_t;
    // SAFETY: `address` is a whole sockaddr_un.
    let connected = unsafe { libc::connect(fd.as_raw_fd(), (&raw const address).cast(), len) };
    if connected == 0 { Ok(fd.into()) } else { Err(io::Error::last_os_error()) }
}

/// Reads the port of a `CONNECT` line and leaves what follows it in the
/// socket; `None` if the line is not complete yet.
fn read_port(stream: &UnixStream) -> io::Result<Option<u32>> {
    let mut bytes = [0; MAX_LINE_BYTES];
    let seen = match receive(stream, &mut bytes, libc::MSG_PEEK) {
        Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
        Ok(count) => bytes.get(..count).unwrap_or(&[]),
        Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(None),
        Err(error) => return Err(error),
    };
    let not_a_line = || io::Error::new(io::ErrorKind::InvalidData, "it did not say CONNECT <port>");
    let Some(end) = seen.iter().position(|byte| *byte == b'\n') else {
        return if seen.len() == MAX_LINE_BYTES { Err(not_a_line()) } else { Ok(None) };
    };
    let port = seen
        .get(..end)
        .and_then(|line| line.strip_prefix(b"CONNECT "))
        .and_then(|digits| std::str::from_utf8(digits).ok())
        .and_then(|digits| digits.parse().ok())
        .ok_or_else(not_a_line)?;
    let mut line = [0; MAX_LINE_BYTES];
    receive(stream, line.get_mut(..=end).unwrap_or(&mut []), 0)?;
    Ok(Some(port))
}

fn receive(stream: &UnixStream, bytes: &mut [u8], flags: libc::c_int) -> io::Result<usize> {
    let flags = flags | libc::MSG_DONTWAIT;
    // SAFETY: the kernel writes at most `bytes.len()` bytes.
    let count = unsafe { libc::recv(stream.as_raw_fd(), bytes.as_mut_ptr().cast(), bytes.len(), flags) };
    usize::try_from(count).map_err(|_| io::Error::last_os_error())
}
