//! What addresses, routes, rules and neighbours have in common: a list of them is
//! there, another is wanted.

use std::net::IpAddr;

use nix::errno::Errno;
use rvm_protocol::netlink::{Attributes, Refusal, Socket};

use super::interfaces::Interfaces;
use crate::error::{Step, StepResult};

/// Something of which the kernel keeps a list for each network namespace.
pub trait Object: Clone + PartialEq {
    /// `RTM_GET...` of rtnetlink(7).
    const GET: u16;
    /// See [`Self::GET`].
    const NEW: u16;
    /// See [`Self::GET`].
    const DELETE: u16;
    /// Headers of the requests whose answers are all there is.
    const DUMPS: &[&[u8]];

    /// What a message of the kernel's tells; none where it is of no concern here.
    fn parse(message: &[u8], interfaces: &Interfaces) -> Option<Self>;

    /// Header and attributes of a request to make or delete it.
    fn encode(&self, interfaces: &Interfaces) -> (Vec<u8>, Attributes);

    /// `NLM_F_CREATE` and what else a request to make it takes.
    fn create_flags(&self) -> u16;

    /// Makes it.
    fn make(&self, socket: &Socket, interfaces: &Interfaces) -> Result<(), Refusal> {
        let (header, attributes) = self.encode(interfaces);
        socket.request(Self::NEW, self.create_flags(), &header, &attributes)
    }

    /// The numbers of the interfaces it is of.
    fn interfaces(&mut self) -> impl Iterator<Item = &mut u32>;

    /// What it is called in errors.
    fn describe(&self, interfaces: &Interfaces) -> String;

    /// It with the interfaces' numbers in this namespace instead of those of a
    /// request, which are their slots; none where one is not there.
    fn placed(&self, interfaces: &Interfaces) -> Option<Self> {
        let mut placed = self.clone();
        for interface in placed.interfaces() {
            *interface = interfaces.index(*interface)?;
        }
        Some(placed)
    }
}

/// All there are.
pub fn present<T: Object>(socket: &Socket, interfaces: &Interfaces) -> StepResult<Vec<T>> {
    let mut present = Vec::new();
    for header in T::DUMPS {
        let answers = socket.dump(T::GET, header).step(|| "list what the network namespace has")?;
        present.extend(answers.iter().filter_map(|message| T::parse(message, interfaces)));
    }
    Ok(present)
}

/// Makes what is wanted and is not there, in its order, after removing what is
/// there, is not wanted and is `stray`. Both are placed.
pub fn reconcile<T: Object>(
    socket: &Socket,
    interfaces: &Interfaces,
    wanted: &[T],
    stray: impl Fn(&T) -> bool,
) -> StepResult<()> {
    let mut there = present::<T>(socket, interfaces)?;
    let mut removed = false;
    for object in there.iter().filter(|object| !wanted.contains(object) && stray(object)) {
        let (header, attributes) = object.encode(interfaces);
        match socket.request(T::DELETE, 0, &header, &attributes) {
            // It went with something else.
            Err(refusal) if GONE.contains(&refusal.errno) => {}
            done => done.step(|| format!("remove {}", object.describe(interfaces)))?,
        }
        removed = true;
    }
    if removed {
        there = present(socket, interfaces)?;
    }
    for object in wanted.iter().filter(|object| !there.contains(object)) {
        match object.make(socket, interfaces) {
            // Of something else that was made, or one the kernel takes for the same.
            Err(refusal) if refusal.errno == Errno::EEXIST => {}
            done => done.step(|| object.describe(interfaces))?,
        }
    }
    Ok(())
}

/// What the kernel says of what is not there (any more).
const GONE: [Errno; 4] = [Errno::ENOENT, Errno::ESRCH, Errno::EADDRNOTAVAIL, Errno::ENODEV];

/// `AF_INET` or `AF_INET6` as headers have it.
pub fn family(address: IpAddr) -> u8 {
    match address {
        IpAddr::V4(_) => libc::AF_INET as u8,
        IpAddr::V6(_) => libc::AF_INET6 as u8,
    }
}

/// An address's bytes.
pub fn octets(address: IpAddr) -> Vec<u8> {
    match address {
        IpAddr::V4(address) => address.octets().to_vec(),
        IpAddr::V6(address) => address.octets().to_vec(),
    }
}

/// The address of a family in `bytes`.
pub fn ip(family: u8, bytes: &[u8]) -> Option<IpAddr> {
    match i32::from(family) {
        libc::AF_INET => <[u8; 4]>::try_from(bytes).ok().map(IpAddr::from),
        libc::AF_INET6 => <[u8; 16]>::try_from(bytes).ok().map(IpAddr::from),
        _ => None,
    }
}
