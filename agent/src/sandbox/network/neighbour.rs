//! Neighbours that are set, not learned.

use std::net::IpAddr;

use rvm_protocol::netlink::{
    Attributes, NLM_F_CREATE, NLM_F_REPLACE, attributes,
    neighbour::{NDA_DST, NDA_LLADDR, NTF_PROXY, NTF_ROUTER, NUD_PERMANENT},
    u16_at, u32_at,
};

use super::{
    interfaces::Interfaces,
    object::{Object, family, ip, octets},
};

/// Flags that are set with a neighbour.
const KEPT_FLAGS: u8 = NTF_PROXY | NTF_ROUTER;
/// `struct ndmsg`.
const HEADER: usize = 12;

/// A neighbour as the kernel tells it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Neighbour {
    pub interface: u32,
    pub address: IpAddr,
    /// Empty: a proxy's.
    pub mac: Vec<u8>,
    pub flags: u8,
}

impl Neighbour {
    /// Flags of a request that can be set.
    pub fn flags(flags: u32) -> u8 {
        flags as u8 & KEPT_FLAGS
    }

    fn is_proxy(&self) -> bool {
        self.flags & NTF_PROXY != 0
    }
}

impl Object for Neighbour {
    const GET: u16 = libc::RTM_GETNEIGH;
    const NEW: u16 = libc::RTM_NEWNEIGH;
    const DELETE: u16 = libc::RTM_DELNEIGH;
    const DUMPS: &[&[u8]] = &[&[0; HEADER], &[0, 0, 0, 0, 0, 0, 0, 0, 0, 0, NTF_PROXY, 0]];

    fn parse(message: &[u8], _: &Interfaces) -> Option<Self> {
        let header: &[u8; HEADER] = message.first_chunk()?;
        let flags = Self::flags(header[10].into());
        let is_set = u16_at(header, 8)? & NUD_PERMANENT != 0;
        if !is_set && flags & NTF_PROXY == 0 {
            return None;
        }
        let find = |wanted| attributes(&message[HEADER..]).find(|(kind, _)| *kind == wanted).map(|(_, v)| v);
        Some(Self {
            interface: u32_at(header, 4)?,
            address: ip(header[0], find(NDA_DST)?)?,
            mac: find(NDA_LLADDR).unwrap_or_default().to_vec(),
            flags,
        })
    }

    fn encode(&self, _: &Interfaces) -> (Vec<u8>, Attributes) {
        let mut header = vec![family(self.address), 0, 0, 0];
        header.extend(self.interface.to_ne_bytes());
        header.extend((if self.is_proxy() { 0 } else { NUD_PERMANENT }).to_ne_bytes());
        header.extend([self.flags, 0]);
        let mut out = Attributes::default();
        out.bytes(NDA_DST, &octets(self.address));
        if !self.mac.is_empty() {
            out.bytes(NDA_LLADDR, &self.mac);
        }
        (header, out)
    }

    fn create_flags(&self) -> u16 {
        NLM_F_CREATE | NLM_F_REPLACE
    }

    fn interfaces(&mut self) -> impl Iterator<Item = &mut u32> {
        std::iter::once(&mut self.interface)
    }

    fn describe(&self, interfaces: &Interfaces) -> String {
        format!("neighbour {} dev {}", self.address, interfaces.name(self.interface).unwrap_or("?"))
    }
}
