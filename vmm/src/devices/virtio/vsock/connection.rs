//! One connection: a stream of the guest joined to a Unix socket.
//!
//! Flow control as in section 5.10.6.3: each side says how much it can hold
//! (`buf_alloc`) and how much it has passed on (`fwd_cnt`); the other sends no
//! more than fits. What the guest sends goes straight to the socket, and only
//! what the socket does not take is kept, at most [`WINDOW_BYTES`]. What the
//! host sends stays in the socket until the guest has room for it.

use std::collections::VecDeque;
use std::io;
use std::net::Shutdown;
use std::num::Wrapping;
use std::os::fd::AsRawFd;
use std::os::unix::net::UnixStream;

use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};

use super::packet::{Header, Op, SHUTDOWN_BOTH, SHUTDOWN_RCV, SHUTDOWN_SEND};
use super::{MAX_BURST, WINDOW_BYTES};
use crate::devices::virtio::buffers::GuestBuffers;

/// Bytes passed on after which the guest is told without being asked: a
/// quarter of the window keeps a busy sender from running dry.
const TELL_AFTER: u32 = WINDOW_BYTES / 4;

/// What epoll always tells of a connection's socket; that there is room is
/// asked for when it matters.
pub(super) const ARRIVALS: EventSet = EventSet::from_bits_truncate(
    EventSet::IN.bits() | EventSet::READ_HANG_UP.bits() | EventSet::EDGE_TRIGGERED.bits(),
);

/// Where a connection is in its life.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Phase {
    /// The host asked; the guest has not answered.
    Requested,
    /// Both sides agreed.
    Open,
    /// The guest is done with it; the host has not read everything yet.
    Draining,
}

/// What a guest's packet does to the connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Verdict {
    Keep,
    /// The guest is told that the connection is gone.
    Reset,
    /// The guest is gone already.
    Drop,
}

/// The two ports that name a connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) struct Key {
    pub host_port: u32,
    pub guest_port: u32,
}

pub(super) struct Connection {
    pub(super) key: Key,
    stream: UnixStream,
    pub(super) phase: Phase,
    /// REQUEST or RESPONSE, still to be sent.
    greeting: Option<Op>,
    /// The muxer has this connection in its list of those with something to send.
    pub(super) listed: bool,

    // Host to guest.
    /// The socket may have bytes, or its end, to read.
    readable: bool,
    /// The host sends no more; everything it sent has been passed on.
    host_finished: bool,
    /// The host reads no more.
    host_deaf: bool,
    /// The parts of SHUTDOWN the guest has been told.
    told_shutdown: u32,
    sent: Wrapping<u32>,
    guest_window: u32,
    guest_forwarded: Wrapping<u32>,
    asked_for_credit: bool,
    /// Guest buffers worth trying in one read: grows while reads fill them.
    burst: usize,

    // Guest to host.
    /// The socket may take bytes.
    writable: bool,
    /// Epoll tells when it does.
    awaits_room: bool,
    backlog: VecDeque<u8>,
    forwarded: Wrapping<u32>,
    told_forwarded: Wrapping<u32>,
    owes_credit: bool,
    /// The guest sends no more.
    guest_finished: bool,
    /// The host has been told that.
    told_end: bool,
    /// The guest reads no more.
    guest_deaf: bool,
}

impl Connection {
    /// A connection the host asked for.
    pub(super) fn requested(key: Key, stream: UnixStream) -> Self {
        Self::new(key, stream, Phase::Requested, Op::Request)
    }

    /// A connection the guest asked for with `request`.
    pub(super) fn accepted(key: Key, stream: UnixStream, request: &Header) -> Self {
        let mut connection = Self::new(key, stream, Phase::Open, Op::Response);
        connection.guest_window = request.buf_alloc;
        connection.guest_forwarded = Wrapping(request.fwd_cnt);
        connection
    }

    fn new(key: Key, stream: UnixStream, phase: Phase, greeting: Op) -> Self {
        Self {
            key,
            stream,
            phase,
            greeting: Some(greeting),
            listed: false,
            readable: true,
            host_finished: false,
            host_deaf: false,
            told_shutdown: 0,
            sent: Wrapping(0),
            guest_window: 0,
            guest_forwarded: Wrapping(0),
            asked_for_credit: false,
            burst: 1,
            writable: true,
            awaits_room: false,
            backlog: VecDeque::new(),
            forwarded: Wrapping(0),
            told_forwarded: Wrapping(0),
            owes_credit: false,
            guest_finished: false,
            told_end: false,
            guest_deaf: false,
        }
    }

    /// Takes note of what epoll saw.
    pub(super) fn ready(&mut self, readable: bool, writable: bool, hung_up: bool) {
        self.readable |= readable || hung_up;
        self.writable |= writable || hung_up;
        if hung_up && self.phase != Phase::Requested {
            self.deafen();
        }
    }

    /// Has epoll tell of room in the socket, or no longer.
    pub(super) fn await_room(&mut self, epoll: &Epoll, token: u64) -> io::Result<()> {
        let wanted = !self.writable && !self.backlog.is_empty();
        if wanted != self.awaits_room {
            let events = if wanted { ARRIVALS | EventSet::OUT } else { ARRIVALS };
            let event = EpollEvent::new(events, token);
            epoll.ctl(ControlOperation::Modify, self.stream.as_raw_fd(), event)?;
            self.awaits_room = wanted;
        }
        Ok(())
    }

    /// The host's program is gone while the guest has not answered yet.
    pub(super) fn abandoned(&self, hung_up: bool) -> bool {
        hung_up && self.phase == Phase::Requested
    }

    /// Handles a packet of the guest.
    pub(super) fn receive(&mut self, header: &Header, op: Op, data: GuestBuffers<'_>) -> Verdict {
        self.guest_window = header.buf_alloc;
        self.guest_forwarded = Wrapping(header.fwd_cnt);
        if self.credit() > 0 {
            self.asked_for_credit = false;
        }
        match (op, self.phase) {
            (Op::Response, Phase::Requested) => Verdict::Keep,
            (Op::Rst, _) => Verdict::Drop,
            (Op::CreditUpdate, _) => Verdict::Keep,
            (Op::CreditRequest, _) => {
                self.owes_credit = true;
                Verdict::Keep
            }
            (Op::Rw, Phase::Open) if !self.guest_finished => self.take_data(data),
            (Op::Shutdown, Phase::Open) => self.guest_shuts_down(header.flags),
            _ => Verdict::Reset,
        }
    }

    /// The guest has accepted: says so to the host's program.
    pub(super) fn open(&mut self, host_port: u32) -> io::Result<()> {
        self.phase = Phase::Open;
        let line = format!("OK {host_port}\n");
        // Nothing was written before, so that a whole line fits the socket.
        match send(
            &self.stream,
            &[libc::iovec { iov_base: line.as_ptr().cast_mut().cast(), iov_len: line.len() }],
        )? {
            sent if sent == line.len() => Ok(()),
            _ => Err(io::ErrorKind::WriteZero.into()),
        }
    }

    /// The guest sends no more to a connection it is done with.
    pub(super) fn drain(&mut self) {
        self.phase = Phase::Draining;
        self.guest_finished = true;
    }

    /// Whether a draining connection has nothing left to pass on.
    pub(super) fn drained(&self) -> bool {
        self.phase == Phase::Draining && self.backlog.is_empty()
    }

    fn take_data(&mut self, mut data: GuestBuffers<'_>) -> Verdict {
        let len = data.len();
        if self.backlog.len() + len > WINDOW_BYTES as usize {
            // More than the guest was allowed to send.
            return Verdict::Reset;
        }
        while self.backlog.is_empty() && self.writable && !self.host_deaf && !data.is_empty() {
            match send(&self.stream, &data.iovecs()) {
                Ok(sent) => {
                    data.take(sent);
                }
                Err(error) => self.cannot_write(&error),
            }
        }
        if self.host_deaf {
            // Nobody will read it; the guest is told by SHUTDOWN.
            self.pass_on(len);
            return Verdict::Keep;
        }
        self.pass_on(len - data.len());
        let mut kept = Vec::with_capacity(data.len());
        data.read_to_end(&mut kept);
        self.backlog.extend(kept);
        Verdict::Keep
    }

    /// Writes what is kept for the host, as far as the socket takes it.
    pub(super) fn flush(&mut self) {
        while self.writable && !self.backlog.is_empty() {
            let (front, back) = self.backlog.as_slices();
            let pieces = [front, back].map(|piece| libc::iovec {
                iov_base: piece.as_ptr().cast_mut().cast(),
                iov_len: piece.len(),
            });
            match send(&self.stream, &pieces) {
                Ok(sent) => {
                    self.backlog.drain(..sent);
                    self.pass_on(sent);
                }
                Err(error) => self.cannot_write(&error),
            }
        }
        if self.backlog.is_empty() {
            // A burst is over: do not keep its memory.
            self.backlog = VecDeque::new();
            if self.guest_finished && !self.told_end {
                self.told_end = true;
                self.shut(Shutdown::Write);
            }
        }
    }

    fn shut(&self, direction: Shutdown) {
        // Fails where the host's side is gone, and then there is nothing to say.
        let _ = self.stream.shutdown(direction);
    }

    fn cannot_write(&mut self, error: &io::Error) {
        match error.kind() {
            io::ErrorKind::WouldBlock => self.writable = false,
            io::ErrorKind::Interrupted => {}
            _ => self.deafen(),
        }
    }

    /// The host reads no more: what is kept for it is of no use.
    fn deafen(&mut self) {
        self.host_deaf = true;
        self.pass_on(self.backlog.len());
        self.backlog = VecDeque::new();
    }

    fn pass_on(&mut self, bytes: usize) {
        // At most a window at a time.
        self.forwarded += bytes as u32;
    }

    fn guest_shuts_down(&mut self, flags: u32) -> Verdict {
        self.guest_finished |= flags & SHUTDOWN_SEND != 0;
        if flags & SHUTDOWN_RCV != 0 {
            self.guest_deaf = true;
            self.shut(Shutdown::Read);
        }
        self.flush();
        // Section 5.10.6.6: an orderly end is answered by RST.
        if self.guest_finished && self.guest_deaf { Verdict::Reset } else { Verdict::Keep }
    }

    /// Bytes the guest has room for.
    fn credit(&self) -> usize {
        let under_way = (self.sent - self.guest_forwarded).0;
        self.guest_window.saturating_sub(under_way) as usize
    }

    /// Whether there may be something for the guest.
    pub(super) fn is_due(&self) -> bool {
        self.greeting.is_some()
            || self.phase == Phase::Open
                && (self.owes_credit
                    || (self.forwarded - self.told_forwarded).0 >= TELL_AFTER
                    || self.shutdown_flags() & !self.told_shutdown != 0
                    || self.unread() && (self.credit() > 0 || !self.asked_for_credit))
    }

    /// The directions that have come to their end on the host's side.
    fn shutdown_flags(&self) -> u32 {
        let send = if self.host_finished { SHUTDOWN_SEND } else { 0 };
        let receive = if self.host_deaf { SHUTDOWN_RCV } else { 0 };
        send | receive
    }

    /// A packet without data that is due, data excepted.
    pub(super) fn next_control(&mut self) -> Option<(Op, u32)> {
        if let Some(greeting) = self.greeting.take() {
            return Some((greeting, 0));
        }
        if self.phase != Phase::Open {
            return None;
        }
        let unsaid = (self.forwarded - self.told_forwarded).0;
        if self.owes_credit || unsaid >= TELL_AFTER {
            return Some((Op::CreditUpdate, 0));
        }
        if self.unread() {
            let ask = self.credit() == 0 && !self.asked_for_credit;
            self.asked_for_credit |= ask;
            return ask.then_some((Op::CreditRequest, 0));
        }
        let flags = self.shutdown_flags();
        if flags & !self.told_shutdown != 0 {
            self.told_shutdown |= flags;
            return Some((Op::Shutdown, self.told_shutdown));
        }
        None
    }

    /// The socket may have bytes the guest still wants, or its end.
    fn unread(&self) -> bool {
        self.phase == Phase::Open && self.readable && !self.host_finished && !self.guest_deaf
    }

    /// Whether there may be data for the guest and the guest has room.
    pub(super) fn wants_data(&self) -> bool {
        self.unread() && self.credit() > 0
    }

    /// Both directions are at their end and the guest knows.
    pub(super) fn finished(&self) -> bool {
        self.told_shutdown == SHUTDOWN_BOTH
    }

    /// Guest buffers worth offering to [`Self::read`].
    pub(super) fn burst(&self) -> usize {
        self.burst
    }

    /// Reads from the socket into `target` as much as the guest has room for.
    pub(super) fn read(&mut self, mut target: GuestBuffers<'_>) -> usize {
        let target = target.take(self.credit());
        if target.is_empty() {
            return 0;
        }
        let iovecs = target.iovecs();
        // SAFETY: the iovecs are mapped guest memory that outlives the call.
        let count =
            unsafe { libc::readv(self.stream.as_raw_fd(), iovecs.as_ptr(), iovecs.len() as libc::c_int) };
        match usize::try_from(count) {
            Ok(0) => {
                self.readable = false;
                self.host_finished = true;
                0
            }
            Ok(count) => {
                self.sent += count as u32;
                self.burst = if count == target.len() { (self.burst * 2).min(MAX_BURST) } else { 1 };
                count
            }
            Err(_) => {
                match io::Error::last_os_error().kind() {
                    io::ErrorKind::Interrupted => {}
                    io::ErrorKind::WouldBlock => self.readable = false,
                    // Reset by the host: no more bytes, in either direction.
                    _ => {
                        self.readable = false;
                        self.host_finished = true;
                        self.deafen();
                    }
                }
                0
            }
        }
    }

    /// The state of flow control, for a packet that is about to be sent.
    pub(super) fn tell_credit(&mut self) -> (u32, u32) {
        self.told_forwarded = self.forwarded;
        self.owes_credit = false;
        (WINDOW_BYTES, self.forwarded.0)
    }
}

/// Sends without waiting and without SIGPIPE.
fn send(stream: &UnixStream, pieces: &[libc::iovec]) -> io::Result<usize> {
    // SAFETY: an all-zero msghdr is a valid one.
    let mut message: libc::msghdr = unsafe { std::mem::zeroed() };
    message.msg_iov = pieces.as_ptr().cast_mut();
    message.msg_iovlen = pieces.len();
    let flags = libc::MSG_DONTWAIT | libc::MSG_NOSIGNAL;
    // SAFETY: the message points at `pieces`, which point at memory the caller
    // holds for the time of the call; the kernel only reads it.
    let sent = unsafe { libc::sendmsg(stream.as_raw_fd(), &raw const message, flags) };
    usize::try_from(sent).map_err(|_| io::Error::last_os_error())
}
