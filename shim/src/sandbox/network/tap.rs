//! The host's end of a virtio-net device: a tap beside the interface that it
//! stands in for, opened once per queue pair, and `/dev/vhost-net` as often.

use std::{
    fs::File,
    io,
    os::fd::{AsFd, AsRawFd, BorrowedFd},
};

use nix::errno::Errno;
use rvm_protocol::netlink::{
    Attributes, Refusal, Socket,
    if_link::{IFLA_AF_SPEC, IFLA_INET6_ADDR_GEN_MODE, IFLA_MTU, IFLA_TXQLEN},
};

use super::{
    NetworkError,
    namespace::{Namespace, set_up},
    observe::Link,
    redirect::index_of,
};
use crate::config::Vhost;

const TUN: &str = "/dev/net/tun";
const VHOST: &str = "/dev/vhost-net";
/// What taps' names begin with; the slot follows.
const PREFIX: &str = "rvm-tap";
const IN6_ADDR_GEN_MODE_NONE: u8 = 1;

/// A tap, which is gone when it and who was given its descriptors are.
#[derive(Debug)]
pub struct Tap {
    queues: Vec<File>,
    vhost: Vec<File>,
    /// Number of the interface.
    pub index: u32,
}

impl Tap {
    /// Makes the one for `slot`, up and with an interface's MTU.
    pub fn create(
        namespace: &Namespace,
        socket: &Socket,
        (slot, mtu): (u8, u32),
        queue_pairs: u8,
        vhost: Vhost,
    ) -> Result<Self, NetworkError> {
        let name = format!("{PREFIX}{slot}");
        let open = || (0..queue_pairs).map(|nth| open_queue(&name, nth, queue_pairs)).collect();
        let queues: io::Result<Vec<File>> = namespace.run(open).flatten();
        let queues = queues.map_err(|source| match source.raw_os_error() {
            Some(libc::EBUSY) => NetworkError::InUse,
            _ => NetworkError::Device { device: TUN, source },
        })?;
        let vhost = open_vhost(vhost, queue_pairs)?;
        let failed = |what| {
            let on = name.clone();
            move |source| NetworkError::Step { what, on, source }
        };
        let index = index_of(socket, &name).map_err(failed("finding"))?;
        set_mtu(socket, index, mtu).map_err(failed("setting the MTU of"))?;
        be_silent(socket, index).map_err(failed("turning IPv6 off on"))?;
        set_up(socket, index).map_err(failed("setting up"))?;
        Ok(Self { queues, vhost, index })
    }

    /// One descriptor per queue pair.
    pub fn queues(&self) -> Vec<BorrowedFd<'_>> {
        self.queues.iter().map(AsFd::as_fd).collect()
    }

    /// As many of `/dev/vhost-net`, or none.
    pub fn vhost(&self) -> Vec<BorrowedFd<'_>> {
        self.vhost.iter().map(AsFd::as_fd).collect()
    }

    /// Closes the descriptors, when the monitor has its own.
    pub fn handed_over(&mut self) {
        self.queues.clear();
        self.vhost.clear();
    }
}

/// Whether an interface is a tap of a sandbox's.
pub fn is_tap(name: &str) -> bool {
    name.strip_prefix(PREFIX).is_some_and(|slot| slot.parse::<u8>().is_ok())
}

fn open_queue(name: &str, nth: u8, of: u8) -> io::Result<File> {
    let file = File::options().read(true).write(true).open(TUN)?;
    let mut request = libc::ifreq {
        ifr_name: [0; libc::IFNAMSIZ],
        ifr_ifru: libc::__c_anonymous_ifr_ifru { ifru_flags: 0 },
    };
    for (to, from) in request.ifr_name.iter_mut().zip(name.bytes()) {
        *to = from.cast_signed();
    }
    let mut flags = libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR;
    if of > 1 {
        flags |= libc::IFF_MULTI_QUEUE;
    }
    if nth == 0 {
        // Not one more queue of somebody else's.
        flags |= libc::IFF_TUN_EXCL;
    }
    request.ifr_ifru.ifru_flags = flags as libc::c_short;
    // SAFETY: TUNSETIFF reads and writes the ifreq, which outlives the call.
    let set = unsafe { libc::ioctl(file.as_raw_fd(), libc::TUNSETIFF as _, &raw mut request) };
    if set < 0 { Err(io::Error::last_os_error()) } else { Ok(file) }
}

fn open_vhost(wanted: Vhost, count: u8) -> Result<Vec<File>, NetworkError> {
    if wanted == Vhost::Off {
        return Ok(Vec::new());
    }
    let open = |_| File::options().read(true).write(true).open(VHOST);
    match (0..count).map(open).collect::<io::Result<_>>() {
        Ok(files) => Ok(files),
        Err(_) if wanted == Vhost::Auto => Ok(Vec::new()),
        Err(source) => Err(NetworkError::Device { device: "network.vhost = \"on\": /dev/vhost-net", source }),
    }
}

pub(super) fn set_mtu(socket: &Socket, index: u32, mtu: u32) -> Result<(), Refusal> {
    set(socket, index, IFLA_MTU, mtu)
}

/// Sets one attribute of an interface.
fn set(socket: &Socket, index: u32, attribute: u16, value: u32) -> Result<(), Refusal> {
    let mut attributes = Attributes::default();
    attributes.u32(attribute, value);
    socket.request(libc::RTM_NEWLINK, 0, &link_header(index), &attributes)
}

/// Has the interface's queue as long afterwards as before. Who makes a veth often gives it none;
/// Linux takes that for a mistake when the first qdisc comes, makes it 1000 and tells the host's log.
pub(super) fn keeping_queue<T>(
    socket: &Socket,
    link: &Link,
    make: impl FnOnce() -> Result<T, Refusal>,
) -> Result<T, Refusal> {
    if link.tx_queue_len > 0 {
        return make();
    }
    set(socket, link.index, IFLA_TXQLEN, 1)?;
    let made = make();
    if let Err(refusal) = set(socket, link.index, IFLA_TXQLEN, 0) {
        log::warn!("interface {:?}: its queue has a length now: {refusal}", link.name);
    }
    made
}

/// Keeps the namespace's own network stack from speaking to the guest: without an
/// address of its own it has nothing to say.
fn be_silent(socket: &Socket, index: u32) -> Result<(), Refusal> {
    let (mut inet6, mut families, mut attributes) =
        (Attributes::default(), Attributes::default(), Attributes::default());
    inet6.u8(IFLA_INET6_ADDR_GEN_MODE, IN6_ADDR_GEN_MODE_NONE);
    families.nested(libc::AF_INET6 as u16, &inet6);
    attributes.nested(IFLA_AF_SPEC, &families);
    match socket.request(libc::RTM_NEWLINK, 0, &link_header(index), &attributes) {
        // A host without IPv6.
        Err(Refusal { errno: Errno::EAFNOSUPPORT | Errno::EOPNOTSUPP, .. }) => Ok(()),
        result => result,
    }
}

fn link_header(index: u32) -> [u8; 16] {
    let mut header = [0; 16];
    header[4..8].copy_from_slice(&index.to_ne_bytes());
    header
}
