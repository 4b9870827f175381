//! Routes.

use rvm_protocol::{
    agent::{NextHop, Route},
    netlink::{
        Refusal, Socket, attributes,
        rtnetlink::{
            RTA_DST, RTA_ENCAP_TYPE, RTA_GATEWAY, RTA_METRICS, RTA_MULTIPATH, RTA_OIF, RTA_PREF, RTA_PREFSRC,
            RTA_PRIORITY, RTA_SRC, RTA_TABLE, RTA_VIA, RTM_F_CLONED, RTNH_F_ONLINK,
        },
        u16_at, u32_at,
    },
};

use super::Links;
use crate::sandbox::network::NetworkError;

// linux/rtnetlink.h
const RTPROT_REDIRECT: u8 = 1;
const RTPROT_RA: u8 = 9;

/// Those of interfaces that go to the guest, and those that lead nowhere. The
/// inner error names one that cannot be carried.
pub(super) fn read(socket: &Socket, links: &Links) -> Result<Result<Vec<Route>, NetworkError>, Refusal> {
    let mut found = Vec::new();
    for message in socket.dump(libc::RTM_GETROUTE, &[0; 12])? {
        match parse(&message, links) {
            None => {}
            Some(Ok(route)) => found.push(route),
            Some(Err(error)) => return Ok(Err(error)),
        }
    }
    Ok(Ok(found))
}

fn parse(message: &[u8], links: &Links) -> Option<Result<Route, NetworkError>> {
    let &[family, destination_len, source_len, tos, table, protocol, scope, kind, ..] = message else {
        return None;
    };
    let flags = u32_at(message, 8)?;
    let is_ip = matches!(i32::from(family), libc::AF_INET | libc::AF_INET6);
    // What a router told is told to the guest too; what was looked up is no route of its own.
    if !is_ip || flags & RTM_F_CLONED != 0 || matches!(protocol, RTPROT_REDIRECT | RTPROT_RA) {
        return None;
    }
    let mut route = Route {
        family: family.into(),
        table: table.into(),
        destination_len: destination_len.into(),
        source_len: source_len.into(),
        tos: tos.into(),
        protocol: protocol.into(),
        scope: scope.into(),
        type_: kind.into(),
        ..Default::default()
    };
    let mut only = Hop { flags, ..Default::default() };
    let mut several = Vec::new();
    for (kind, value) in attributes(message.get(12..)?) {
        match kind {
            RTA_DST => route.destination = value.to_vec(),
            RTA_SRC => route.source = value.to_vec(),
            RTA_PRIORITY => route.metric = u32_at(value, 0)?,
            RTA_PREFSRC => route.preferred_source = value.to_vec(),
            RTA_TABLE => route.table = u32_at(value, 0)?,
            RTA_PREF => route.preference = u32::from(*value.first()?),
            RTA_METRICS => {
                let numbers = attributes(value).filter(|(_, value)| value.len() == 4);
                route.metrics =
                    numbers.filter_map(|(kind, value)| Some((kind.into(), u32_at(value, 0)?))).collect();
            }
            RTA_MULTIPATH => several = hops(value)?,
            _ => only.take(kind, value),
        }
    }
    let hops = if several.is_empty() && only.interface.is_some() { vec![only] } else { several };
    for hop in hops {
        // Of one that stays behind, as does the route.
        let link = links.get(&hop.interface?)?;
        if hop.encapsulated {
            return Some(Err(NetworkError::Unsupported {
                interface: link.name.clone(),
                reason: "a route with an encapsulation (ip route ... encap) leads over it".into(),
            }));
        }
        route.next_hops.push(NextHop {
            interface: link.name.clone(),
            gateway: hop.gateway,
            weight: hop.weight,
            on_link: hop.flags & u32::from(RTNH_F_ONLINK) != 0,
            ..Default::default()
        });
    }
    Some(Ok(route))
}

/// One path of a route.
#[derive(Default)]
struct Hop {
    interface: Option<u32>,
    gateway: Vec<u8>,
    weight: u32,
    flags: u32,
    encapsulated: bool,
}

impl Hop {
    fn take(&mut self, kind: u16, value: &[u8]) {
        match kind {
            RTA_OIF => self.interface = u32_at(value, 0),
            RTA_GATEWAY => self.gateway = value.to_vec(),
            // After its family.
            RTA_VIA => self.gateway = value.get(2..).unwrap_or_default().to_vec(),
            RTA_ENCAP_TYPE => self.encapsulated = u16_at(value, 0) != Some(0),
            _ => {}
        }
    }
}

/// `struct rtnexthop`, each with attributes of its own.
fn hops(mut bytes: &[u8]) -> Option<Vec<Hop>> {
    let mut found = Vec::new();
    while let Some(length) = u16_at(bytes, 0).map(usize::from).filter(|length| *length >= 8) {
        let mut hop = Hop {
            flags: u32::from(*bytes.get(2)?),
            weight: u32::from(*bytes.get(3)?) + 1,
            interface: u32_at(bytes, 4),
            ..Default::default()
        };
        for (kind, value) in attributes(bytes.get(8..length)?) {
            hop.take(kind, value);
        }
        found.push(hop);
        bytes = bytes.get(length.next_multiple_of(4)..).unwrap_or_default();
    }
    Some(found)
}
