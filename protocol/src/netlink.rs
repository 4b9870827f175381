//! netlink(7), of which rtnetlink(7) above all: requests and answers as bytes, whose
//! meaning is their users'.

mod headers;

use std::{
    io,
    os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd},
};

use nix::{
    errno::Errno,
    sys::socket::{
        AddressFamily, MsgFlags, NetlinkAddr, SockFlag, SockProtocol, SockType, bind, recv, send, socket,
    },
};

pub use headers::{fib_rules, if_addr, if_link, neighbour, rtnetlink};

// linux/netlink.h
const NLM_F_REQUEST: u16 = 0x1;
const NLM_F_ACK: u16 = 0x4;
const NLM_F_DUMP: u16 = 0x300;
const NLM_F_DUMP_INTR: u16 = 0x10;
const NLM_F_CAPPED: u16 = 0x100;
const NLM_F_ACK_TLVS: u16 = 0x200;
/// For a request that makes something: fail if it is there.
pub const NLM_F_EXCL: u16 = 0x200;
/// See [`NLM_F_EXCL`]: change it if it is there.
pub const NLM_F_REPLACE: u16 = 0x100;
/// See [`NLM_F_EXCL`]: make it if it is not there.
pub const NLM_F_CREATE: u16 = 0x400;
/// See [`NLM_F_EXCL`]: put it behind others that are there.
pub const NLM_F_APPEND: u16 = 0x800;
const NLMSG_ERROR: u16 = 2;
const NLMSG_DONE: u16 = 3;
const NLMSGERR_ATTR_MSG: u16 = 1;
const NLA_TYPE_MASK: u16 = 0x3fff;
const NLA_F_NESTED: u16 = 0x8000;

const HEADER: usize = 16;
const ATTRIBUTE_HEADER: usize = 4;
/// No part of a dump is larger, nor an answer to anything asked here.
const BUFFER: usize = 64 * 1024;
/// How often a list is asked for again that changed while it was read.
const ATTEMPTS: usize = 16;

/// A number's bytes at `at`, where there are so many.
pub fn u16_at(bytes: &[u8], at: usize) -> Option<u16> {
    Some(u16::from_ne_bytes(bytes.get(at..at.checked_add(2)?)?.try_into().ok()?))
}

/// See [`u16_at`].
pub fn u32_at(bytes: &[u8], at: usize) -> Option<u32> {
    Some(u32::from_ne_bytes(bytes.get(at..at.checked_add(4)?)?.try_into().ok()?))
}

/// A text with a NUL at its end.
pub fn text(bytes: &[u8]) -> String {
    let end = bytes.iter().position(|&byte| byte == 0).unwrap_or(bytes.len());
    String::from_utf8_lossy(&bytes[..end]).into_owned()
}

fn aligned(length: usize) -> usize {
    length.next_multiple_of(4)
}

/// Attributes of a message that is being made.
#[derive(Debug, Default, Clone, PartialEq, Eq)]
pub struct Attributes(Vec<u8>);

impl Attributes {
    /// Adds one. Values are the program's own and far below 64 KiB.
    pub fn bytes(&mut self, kind: u16, value: &[u8]) {
        let length = (ATTRIBUTE_HEADER + value.len()) as u16;
        self.0.extend(length.to_ne_bytes());
        self.0.extend(kind.to_ne_bytes());
        self.0.extend(value);
        self.0.resize(aligned(self.0.len()), 0);
    }

    /// See [`Self::bytes`].
    pub fn u8(&mut self, kind: u16, value: u8) {
        self.bytes(kind, &[value]);
    }

    /// See [`Self::bytes`].
    pub fn u32(&mut self, kind: u16, value: u32) {
        self.bytes(kind, &value.to_ne_bytes());
    }

    /// A text and its NUL.
    pub fn text(&mut self, kind: u16, value: &str) {
        self.bytes(kind, &[value.as_bytes(), &[0]].concat());
    }

    /// Attributes in an attribute.
    pub fn nested(&mut self, kind: u16, inner: &Attributes) {
        self.bytes(kind | NLA_F_NESTED, &inner.0);
    }

    /// As they go into a message.
    pub fn as_bytes(&self) -> &[u8] {
        &self.0
    }
}

/// The attributes in `bytes`, as far as they are whole.
pub fn attributes(mut bytes: &[u8]) -> impl Iterator<Item = (u16, &[u8])> {
    std::iter::from_fn(move || {
        let length = usize::from(u16_at(bytes, 0)?);
        let kind = u16_at(bytes, 2)? & NLA_TYPE_MASK;
        let value = bytes.get(ATTRIBUTE_HEADER..length)?;
        bytes = bytes.get(aligned(length)..).unwrap_or_default();
        Some((kind, value))
    })
}

/// Why the kernel did not do what it was asked for.
#[derive(Debug, PartialEq, Eq)]
pub struct Refusal {
    /// The error's number.
    pub errno: Errno,
    /// The kernel's own words; often none.
    pub text: String,
}

impl From<Errno> for Refusal {
    fn from(errno: Errno) -> Self {
        Self { errno, text: String::new() }
    }
}

impl std::fmt::Display for Refusal {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}", io::Error::from(self.errno))?;
        if self.text.is_empty() { Ok(()) } else { write!(f, " ({})", self.text) }
    }
}

impl std::error::Error for Refusal {}

/// One message from the kernel.
struct Received<'a> {
    kind: u16,
    flags: u16,
    payload: &'a [u8],
}

fn messages(mut bytes: &[u8]) -> impl Iterator<Item = Received<'_>> {
    std::iter::from_fn(move || {
        let length = usize::try_from(u32_at(bytes, 0)?).ok()?;
        let payload = bytes.get(HEADER..length)?;
        let received = Received { kind: u16_at(bytes, 4)?, flags: u16_at(bytes, 6)?, payload };
        bytes = bytes.get(aligned(length)..).unwrap_or_default();
        Some(received)
    })
}

/// The outcome an error message, or the end of a dump, tells.
fn outcome(message: &Received<'_>) -> Result<(), Refusal> {
    let number = u32_at(message.payload, 0).map_or(0, u32::cast_signed);
    if number == 0 {
        return Ok(());
    }
    let mut refusal = Refusal::from(Errno::from_raw(number.saturating_neg()));
    if message.flags & NLM_F_ACK_TLVS != 0 && message.kind == NLMSG_ERROR {
        // The request comes back before them: its header alone, or all of it.
        let request = match message.flags & NLM_F_CAPPED {
            0 => u32_at(message.payload, 4).map_or(HEADER, |length| aligned(length as usize)),
            _ => HEADER,
        };
        let rest = message.payload.get(4 + request..).unwrap_or_default();
        refusal.text = attributes(rest)
            .find_map(|(kind, value)| (kind == NLMSGERR_ATTR_MSG).then(|| text(value)))
            .unwrap_or_default();
    }
    Err(refusal)
}

/// One of several requests that are made together.
#[derive(Debug)]
pub struct Request {
    /// The message's type.
    pub kind: u16,
    /// See [`Socket::request`].
    pub flags: u16,
    /// What comes before the attributes.
    pub header: Vec<u8>,
    /// And those.
    pub attributes: Attributes,
}

impl Request {
    fn message(kind: u16, flags: u16, header: &[u8], attributes: &Attributes) -> Vec<u8> {
        let length = HEADER + aligned(header.len()) + attributes.0.len();
        let mut message = Vec::with_capacity(length);
        message.extend((length as u32).to_ne_bytes());
        message.extend(kind.to_ne_bytes());
        message.extend((flags | NLM_F_REQUEST).to_ne_bytes());
        // One at a time: no sequence number is needed to tell answers apart.
        message.extend([0; 8]);
        message.extend(header);
        message.resize(HEADER + aligned(header.len()), 0);
        message.extend(&attributes.0);
        message
    }
}

/// A socket to the network namespace it was opened in. What is asked for is
/// waited for: the kernel answers before `send` returns.
#[derive(Debug)]
pub struct Socket(OwnedFd);

impl Socket {
    /// Opens one in the calling thread's network namespace.
    pub fn open() -> nix::Result<Self> {
        Self::with(SockFlag::SOCK_CLOEXEC, SockProtocol::NetlinkRoute)
    }

    /// The same to netfilter.
    pub fn netfilter() -> nix::Result<Self> {
        Self::with(SockFlag::SOCK_CLOEXEC, SockProtocol::NetlinkNetFilter)
    }

    /// Opens one that is told of changes (`RTNLGRP_*`) and never waits.
    pub fn listen(groups: &[u32]) -> nix::Result<Self> {
        let socket =
            Self::with(SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK, SockProtocol::NetlinkRoute)?;
        for group in groups {
            socket.set_option(libc::NETLINK_ADD_MEMBERSHIP, group.cast_signed())?;
        }
        Ok(socket)
    }

    fn with(flags: SockFlag, protocol: SockProtocol) -> nix::Result<Self> {
        let socket = socket(AddressFamily::Netlink, SockType::Raw, flags, protocol)?;
        bind(socket.as_raw_fd(), &NetlinkAddr::new(0, 0))?;
        let socket = Self(socket);
        socket.set_option(libc::NETLINK_EXT_ACK, 1)?;
        Ok(socket)
    }

    fn set_option(&self, option: libc::c_int, value: libc::c_int) -> nix::Result<()> {
        // SAFETY: the option takes an int, which outlives the call.
        let set = unsafe {
            libc::setsockopt(
                self.0.as_raw_fd(),
                libc::SOL_NETLINK,
                option,
                (&raw const value).cast(),
                size_of_val(&value) as libc::socklen_t,
            )
        };
        Errno::result(set).map(drop)
    }

    /// Has something made, changed or removed; `flags` are of [`NLM_F_CREATE`] and
    /// its like.
    pub fn request(
        &self,
        kind: u16,
        flags: u16,
        header: &[u8],
        attributes: &Attributes,
    ) -> Result<(), Refusal> {
        self.send(&Request::message(kind, flags | NLM_F_ACK, header, attributes))?;
        self.answer()
    }

    /// Has all of them done, or none: the first begins a batch of nf_tables's and the
    /// last ends it.
    pub fn batch(&self, requests: &[Request]) -> Result<(), Refusal> {
        let mut messages = Vec::new();
        for (number, Request { kind, flags, header, attributes }) in requests.iter().enumerate() {
            // A refusal is told by itself; that there was none, after the last but the end.
            let ack = if number + 2 == requests.len() { NLM_F_ACK } else { 0 };
            messages.extend(Request::message(*kind, flags | ack, header, attributes));
        }
        self.send(&messages)?;
        self.answer()
    }

    fn answer(&self) -> Result<(), Refusal> {
        let mut buffer = vec![0; BUFFER];
        loop {
            let length = self.receive(&mut buffer)?;
            if let Some(answer) = messages(&buffer[..length]).find(|message| message.kind == NLMSG_ERROR) {
                return outcome(&answer);
            }
        }
    }

    /// All objects of a kind: what each message carries.
    pub fn dump(&self, kind: u16, header: &[u8]) -> Result<Vec<Vec<u8>>, Refusal> {
        for _ in 0..ATTEMPTS {
            if let Some(objects) = self.dump_once(kind, header)? {
                return Ok(objects);
            }
        }
        Err(Errno::EAGAIN.into())
    }

    /// None: it changed while it was read.
    fn dump_once(&self, kind: u16, header: &[u8]) -> Result<Option<Vec<Vec<u8>>>, Refusal> {
        self.send(&Request::message(kind, NLM_F_DUMP, header, &Attributes::default()))?;
        let (mut objects, mut whole) = (Vec::new(), true);
        let mut buffer = vec![0; BUFFER];
        loop {
            let length = self.receive(&mut buffer)?;
            for message in messages(&buffer[..length]) {
                whole &= message.flags & NLM_F_DUMP_INTR == 0;
                match message.kind {
                    NLMSG_DONE => return outcome(&message).map(|()| whole.then_some(objects)),
                    NLMSG_ERROR => outcome(&message)?,
                    _ => objects.push(message.payload.to_vec()),
                }
            }
        }
    }

    /// Throws away what has arrived; whether there was something, or more than fits.
    pub fn drain(&self) -> nix::Result<bool> {
        let mut buffer = [0; 4096];
        let mut some = false;
        loop {
            match self.receive(&mut buffer) {
                Err(Errno::EAGAIN) => return Ok(some),
                Ok(_) | Err(Errno::ENOBUFS) => some = true,
                Err(error) => return Err(error),
            }
        }
    }

    fn send(&self, messages: &[u8]) -> nix::Result<()> {
        send(self.0.as_raw_fd(), messages, MsgFlags::empty()).map(drop)
    }

    fn receive(&self, buffer: &mut [u8]) -> nix::Result<usize> {
        loop {
            match recv(self.0.as_raw_fd(), buffer, MsgFlags::empty()) {
                Err(Errno::EINTR) => {}
                received => return received,
            }
        }
    }
}

impl AsFd for Socket {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

impl AsRawFd for Socket {
    fn as_raw_fd(&self) -> std::os::fd::RawFd {
        self.0.as_raw_fd()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn attributes_come_back_as_they_were_put_in() {
        let (mut outer, mut inner) = (Attributes::default(), Attributes::default());
        inner.u8(7, 9);
        outer.text(1, "eth0");
        outer.u32(2, 0xdead_beef);
        outer.nested(3, &inner);
        let read: Vec<_> = attributes(outer.as_bytes()).collect();
        assert_eq!(read.len(), 3);
        assert_eq!((read[0].0, text(read[0].1)), (1, "eth0".to_owned()));
        assert_eq!((read[1].0, u32_at(read[1].1, 0)), (2, Some(0xdead_beef)));
        assert_eq!((read[2].0, attributes(read[2].1).collect::<Vec<_>>()), (3, vec![(7, [9].as_slice())]));
    }

    #[test]
    fn what_is_cut_off_is_left_out() {
        let mut two = Attributes::default();
        two.u32(1, 1);
        two.u32(2, 2);
        for cut in 0..two.as_bytes().len() {
            let whole = attributes(&two.as_bytes()[..cut]).count();
            assert_eq!(whole, usize::from(cut >= 8), "{cut}");
        }
        // A length of nothing would be read for ever.
        assert_eq!(attributes(&[0, 0, 1, 0, 4, 0, 1, 0]).count(), 0);
        assert_eq!(messages(&[0; 64]).count(), 0);
    }

    #[test]
    fn the_kernel_says_what_it_has_and_what_is_wrong() {
        let socket = Socket::open().unwrap();
        let links = socket.dump(libc::RTM_GETLINK, &[0; 16]).unwrap();
        let is_lo =
            |link: &Vec<u8>| attributes(&link[16..]).any(|(kind, value)| kind == 3 && text(value) == "lo");
        assert_eq!(links.iter().filter(|link| is_lo(link)).count(), 1);
        // No interface has this number.
        let mut header = [0; 16];
        header[4..8].copy_from_slice(&0x7fff_fff0_u32.to_ne_bytes());
        let refused = socket.request(libc::RTM_GETLINK, 0, &header, &Attributes::default());
        assert_eq!(refused.unwrap_err().errno, Errno::ENODEV);
    }
}
