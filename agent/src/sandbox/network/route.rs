//! Routes.

use std::{collections::BTreeMap, net::IpAddr};

use rvm_protocol::netlink::{
    Attributes, NLM_F_APPEND, NLM_F_CREATE, attributes,
    rtnetlink::{
        RTA_DST, RTA_GATEWAY, RTA_METRICS, RTA_MULTIPATH, RTA_OIF, RTA_PREF, RTA_PREFSRC, RTA_PRIORITY,
        RTA_SRC, RTA_TABLE, RTA_VIA, RTAX_CC_ALGO, RTNH_F_ONLINK,
    },
    u16_at, u32_at,
};

use super::{
    interfaces::Interfaces,
    object::{Object, family, ip, octets},
};

/// `struct rtmsg`.
const HEADER: usize = 12;
/// `struct rtnexthop`.
const HOP_HEADER: usize = 8;

/// An address and how much of it counts.
pub type Prefix = (IpAddr, u8);

/// A route as the kernel tells it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Route {
    pub destination: Prefix,
    pub source: Prefix,
    pub table: u32,
    pub kind: u8,
    pub protocol: u8,
    pub scope: u8,
    pub tos: u8,
    pub metric: u32,
    pub preferred_source: Option<IpAddr>,
    pub preference: u8,
    pub metrics: BTreeMap<u16, u32>,
    pub hops: Vec<Hop>,
}

/// One path of a route.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Hop {
    pub interface: u32,
    pub gateway: Option<IpAddr>,
    /// From 0.
    pub weight: u8,
    pub on_link: bool,
}

impl Route {
    /// Whether the kernel makes it with an address, and makes it again: nobody has
    /// to.
    pub fn is_the_kernels(&self) -> bool {
        self.table == u32::from(libc::RT_TABLE_LOCAL) && self.protocol == libc::RTPROT_KERNEL
    }

    /// Whether it leads nowhere, and so has no path.
    pub fn leads_nowhere(kind: u8) -> bool {
        [libc::RTN_BLACKHOLE, libc::RTN_UNREACHABLE, libc::RTN_PROHIBIT, libc::RTN_THROW].contains(&kind)
    }

    /// Whether it leads over a gateway, which has to be reachable when it is made.
    pub fn has_gateway(&self) -> bool {
        self.hops.iter().any(|hop| hop.gateway.is_some())
    }

    fn family(&self) -> u8 {
        family(self.destination.0)
    }
}

/// The start of an address range that holds everything.
pub fn unspecified(family: u8) -> Option<IpAddr> {
    ip(family, &[0; 4]).or_else(|| ip(family, &[0; 16]))
}

fn gateway(family: u8, kind: u16, value: &[u8]) -> Option<IpAddr> {
    match kind {
        RTA_GATEWAY => ip(family, value),
        RTA_VIA => ip(u16_at(value, 0)?.try_into().ok()?, value.get(2..)?),
        _ => None,
    }
}

fn parse_hops(family: u8, mut bytes: &[u8]) -> Vec<Hop> {
    let mut hops = Vec::new();
    while let Some(header) = bytes.first_chunk::<HOP_HEADER>() {
        let length = usize::from(u16::from_ne_bytes([header[0], header[1]]));
        let Some(inner) = bytes.get(HOP_HEADER..length) else { break };
        hops.push(Hop {
            interface: u32::from_ne_bytes([header[4], header[5], header[6], header[7]]),
            gateway: attributes(inner).find_map(|(kind, value)| gateway(family, kind, value)),
            weight: header[3],
            on_link: header[2] & RTNH_F_ONLINK != 0,
        });
        bytes = bytes.get(length.next_multiple_of(4)..).unwrap_or_default();
    }
    hops
}

fn put_gateway(out: &mut Attributes, family_of_route: u8, gateway: Option<IpAddr>) {
    match gateway {
        Some(gateway) if family(gateway) == family_of_route => {
            out.bytes(RTA_GATEWAY, &octets(gateway));
        }
        Some(gateway) => {
            let family = u16::from(family(gateway)).to_ne_bytes();
            out.bytes(RTA_VIA, &[&family, octets(gateway).as_slice()].concat());
        }
        None => {}
    }
}

impl Object for Route {
    const GET: u16 = libc::RTM_GETROUTE;
    const NEW: u16 = libc::RTM_NEWROUTE;
    const DELETE: u16 = libc::RTM_DELROUTE;
    const DUMPS: &[&[u8]] = &[&[0; HEADER]];

    fn parse(message: &[u8], _: &Interfaces) -> Option<Self> {
        let header: &[u8; HEADER] = message.first_chunk()?;
        let &[family, destination_len, source_len, tos, table, protocol, scope, kind, ..] = header;
        if u32_at(header, 8)? & libc::RTM_F_CLONED != 0 {
            return None;
        }
        let mut route = Self {
            destination: (unspecified(family)?, destination_len),
            source: (unspecified(family)?, source_len),
            table: table.into(),
            kind,
            protocol,
            scope,
            tos,
            metric: 0,
            preferred_source: None,
            preference: 0,
            metrics: BTreeMap::new(),
            hops: Vec::new(),
        };
        let mut hop = Hop { interface: 0, gateway: None, weight: 0, on_link: header[8] & RTNH_F_ONLINK != 0 };
        for (kind, value) in attributes(&message[HEADER..]) {
            match kind {
                RTA_DST => route.destination.0 = ip(family, value)?,
                RTA_SRC => route.source.0 = ip(family, value)?,
                RTA_OIF => hop.interface = u32_at(value, 0)?,
                RTA_GATEWAY | RTA_VIA => hop.gateway = gateway(family, kind, value),
                RTA_PRIORITY => route.metric = u32_at(value, 0)?,
                RTA_PREFSRC => route.preferred_source = ip(family, value),
                RTA_TABLE => route.table = u32_at(value, 0)?,
                RTA_MULTIPATH => route.hops = parse_hops(family, value),
                RTA_METRICS => {
                    let numbers = attributes(value).filter(|(kind, _)| *kind != RTAX_CC_ALGO);
                    route.metrics =
                        numbers.filter_map(|(kind, value)| Some((kind, u32_at(value, 0)?))).collect();
                }
                RTA_PREF => route.preference = *value.first()?,
                _ => {}
            }
        }
        if Self::leads_nowhere(route.kind) {
            route.hops.clear();
        } else if route.hops.is_empty() {
            route.hops.push(hop);
        }
        Some(route)
    }

    fn encode(&self, _: &Interfaces) -> (Vec<u8>, Attributes) {
        let one = match self.hops.as_slice() {
            [one] => Some(one),
            _ => None,
        };
        let table = u8::try_from(self.table).unwrap_or(libc::RT_TABLE_UNSPEC);
        let mut header = vec![
            self.family(),
            self.destination.1,
            self.source.1,
            self.tos,
            table,
            self.protocol,
            self.scope,
            self.kind,
        ];
        let flags = if one.is_some_and(|hop| hop.on_link) { RTNH_F_ONLINK } else { 0 };
        header.extend(u32::from(flags).to_ne_bytes());
        let mut out = Attributes::default();
        out.u32(RTA_TABLE, self.table);
        for (kind, prefix) in [(RTA_DST, self.destination), (RTA_SRC, self.source)] {
            if prefix.1 > 0 {
                out.bytes(kind, &octets(prefix.0));
            }
        }
        if self.metric != 0 {
            out.u32(RTA_PRIORITY, self.metric);
        }
        if let Some(source) = self.preferred_source {
            out.bytes(RTA_PREFSRC, &octets(source));
        }
        if !self.metrics.is_empty() {
            let mut metrics = Attributes::default();
            self.metrics.iter().for_each(|(&kind, &value)| metrics.u32(kind, value));
            out.nested(RTA_METRICS, &metrics);
        }
        if self.preference != 0 {
            out.u8(RTA_PREF, self.preference);
        }
        if let Some(hop) = one {
            out.u32(RTA_OIF, hop.interface);
            put_gateway(&mut out, self.family(), hop.gateway);
        } else if !self.hops.is_empty() {
            let mut hops = Vec::new();
            for hop in &self.hops {
                let mut inner = Attributes::default();
                put_gateway(&mut inner, self.family(), hop.gateway);
                hops.extend(((HOP_HEADER + inner.as_bytes().len()) as u16).to_ne_bytes());
                hops.extend([if hop.on_link { RTNH_F_ONLINK } else { 0 }, hop.weight]);
                hops.extend(hop.interface.to_ne_bytes());
                hops.extend(inner.as_bytes());
            }
            out.bytes(RTA_MULTIPATH, &hops);
        }
        (header, out)
    }

    fn create_flags(&self) -> u16 {
        match self.destination.0 {
            // The same destination and metric on another interface is another route.
            IpAddr::V4(_) => NLM_F_CREATE | NLM_F_APPEND,
            // Where appending would make one route with two paths.
            IpAddr::V6(_) => NLM_F_CREATE,
        }
    }

    fn interfaces(&mut self) -> impl Iterator<Item = &mut u32> {
        self.hops.iter_mut().map(|hop| &mut hop.interface)
    }

    fn describe(&self, interfaces: &Interfaces) -> String {
        let mut text = format!("route {}/{}", self.destination.0, self.destination.1);
        for hop in &self.hops {
            if let Some(gateway) = hop.gateway {
                text += &format!(" via {gateway}");
            }
            text += &format!(" dev {}", interfaces.name(hop.interface).unwrap_or("?"));
        }
        text + &format!(" table {}", self.table)
    }
}
