//! Addresses of interfaces.

use std::net::{IpAddr, Ipv4Addr};

use rvm_protocol::netlink::{
    Attributes, NLM_F_CREATE, NLM_F_REPLACE, Refusal, Socket, attributes,
    if_addr::{IFA_ADDRESS, IFA_BROADCAST, IFA_CACHEINFO, IFA_FLAGS, IFA_LABEL, IFA_LOCAL, IFA_RT_PRIORITY},
    text, u32_at,
};

use super::{
    interfaces::Interfaces,
    object::{Object, family, ip, octets},
};

/// Those that say how an address is to be used, not what has become of it.
const KEPT_FLAGS: u32 = libc::IFA_F_NODAD
    | libc::IFA_F_HOMEADDRESS
    | libc::IFA_F_DEPRECATED
    | libc::IFA_F_MANAGETEMPADDR
    | libc::IFA_F_NOPREFIXROUTE
    | libc::IFA_F_MCAUTOJOIN;
const FOR_EVER: u32 = u32::MAX;

/// An address as the kernel tells it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Address {
    /// Whose.
    pub interface: u32,
    /// This end's.
    pub local: IpAddr,
    pub prefix_len: u8,
    pub peer: Option<IpAddr>,
    pub broadcast: Option<Ipv4Addr>,
    pub scope: u8,
    pub flags: u32,
    /// None: the interface's name.
    pub label: Option<String>,
    pub route_metric: u32,
}

impl Address {
    /// Flags of a request that can be set.
    pub fn flags(flags: u32) -> u32 {
        flags & KEPT_FLAGS
    }
}

impl Object for Address {
    const GET: u16 = libc::RTM_GETADDR;
    const NEW: u16 = libc::RTM_NEWADDR;
    const DELETE: u16 = libc::RTM_DELADDR;
    const DUMPS: &[&[u8]] = &[&[0; 8]];

    fn parse(message: &[u8], interfaces: &Interfaces) -> Option<Self> {
        let &[family, prefix_len, _, scope] = message.get(..4)?.first_chunk()?;
        let interface = u32_at(message, 4)?;
        let (mut address, mut local, mut broadcast) = (None, None, None);
        let (mut flags, mut label, mut route_metric) = (0, None, 0);
        for (kind, value) in attributes(message.get(8..)?) {
            match kind {
                IFA_ADDRESS => address = ip(family, value),
                IFA_LOCAL => local = ip(family, value),
                IFA_BROADCAST => broadcast = ip(family, value),
                IFA_LABEL => label = Some(text(value)),
                IFA_FLAGS => flags = u32_at(value, 0)?,
                IFA_RT_PRIORITY => route_metric = u32_at(value, 0)?,
                _ => {}
            }
        }
        let local = local.or(address)?;
        Some(Self {
            interface,
            local,
            prefix_len,
            peer: address.filter(|&address| address != local),
            broadcast: broadcast.and_then(|address| match address {
                IpAddr::V4(address) => Some(address),
                IpAddr::V6(_) => None,
            }),
            scope,
            flags: Self::flags(flags),
            label: label.filter(|label| Some(label.as_str()) != interfaces.name(interface)),
            route_metric,
        })
    }

    fn encode(&self, interfaces: &Interfaces) -> (Vec<u8>, Attributes) {
        let mut header = vec![family(self.local), self.prefix_len, 0, self.scope];
        header.extend(self.interface.to_ne_bytes());
        let mut out = Attributes::default();
        out.bytes(IFA_LOCAL, &octets(self.local));
        out.bytes(IFA_ADDRESS, &octets(self.peer.unwrap_or(self.local)));
        if let Some(broadcast) = self.broadcast {
            out.bytes(IFA_BROADCAST, &broadcast.octets());
        }
        if let (IpAddr::V4(_), Some(label)) =
            (self.local, self.label.as_deref().or_else(|| interfaces.name(self.interface)))
        {
            out.text(IFA_LABEL, label);
        }
        out.u32(IFA_FLAGS, self.flags & !libc::IFA_F_DEPRECATED);
        if self.route_metric != 0 {
            out.u32(IFA_RT_PRIORITY, self.route_metric);
        }
        if self.flags & libc::IFA_F_DEPRECATED != 0 {
            // struct ifa_cacheinfo: preferred for no time, valid for ever, two times
            // that the kernel ignores.
            let times = [0, FOR_EVER, 0, 0].map(u32::to_ne_bytes).concat();
            out.bytes(IFA_CACHEINFO, &times);
        }
        (header, out)
    }

    fn create_flags(&self) -> u16 {
        NLM_F_CREATE
    }

    /// An IPv6 address can be used at once: the host has asked whether somebody else
    /// has it, and a second would pass before a program could bind to it. What the
    /// kernel then says of it is what the host's says: a flag that is taken away
    /// again has had its effect.
    fn make(&self, socket: &Socket, interfaces: &Interfaces) -> Result<(), Refusal> {
        let mut at_once = self.clone();
        if self.local.is_ipv6() {
            at_once.flags |= libc::IFA_F_NODAD;
        }
        let (header, attributes) = at_once.encode(interfaces);
        socket.request(Self::NEW, self.create_flags(), &header, &attributes)?;
        if at_once == *self {
            return Ok(());
        }
        let (header, attributes) = self.encode(interfaces);
        socket.request(Self::NEW, NLM_F_REPLACE, &header, &attributes)
    }

    fn interfaces(&mut self) -> impl Iterator<Item = &mut u32> {
        std::iter::once(&mut self.interface)
    }

    fn describe(&self, interfaces: &Interfaces) -> String {
        let name = interfaces.name(self.interface).unwrap_or("?");
        format!("interface {name}: address {}/{}", self.local, self.prefix_len)
    }
}
