//! Rules of the routing policy.

use std::net::IpAddr;

use rvm_protocol::netlink::{
    Attributes, NLM_F_CREATE, NLM_F_EXCL, attributes,
    fib_rules::{
        FIB_RULE_INVERT, FRA_DPORT_RANGE, FRA_DST, FRA_FWMARK, FRA_FWMASK, FRA_GOTO, FRA_IIFNAME,
        FRA_IP_PROTO, FRA_OIFNAME, FRA_PRIORITY, FRA_PROTOCOL, FRA_SPORT_RANGE, FRA_SRC,
        FRA_SUPPRESS_IFGROUP, FRA_SUPPRESS_PREFIXLEN, FRA_TABLE, FRA_UID_RANGE,
    },
    text, u16_at, u32_at,
};

use super::{
    interfaces::Interfaces,
    object::{Object, family, ip, octets},
    route::{Prefix, unspecified},
};

/// What the kernel says where a number is not set.
const UNSET: u32 = u32::MAX;
/// `struct fib_rule_hdr`.
const HEADER: usize = 12;

/// A rule as the kernel tells it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Rule {
    pub source: Prefix,
    pub destination: Prefix,
    pub tos: u8,
    pub priority: u32,
    pub action: u8,
    pub table: u32,
    pub goto: Option<u32>,
    pub invert: bool,
    /// By name: they need not be there.
    pub input_interface: String,
    pub output_interface: String,
    pub mark: u32,
    pub mark_mask: u32,
    pub suppress_prefix_len: Option<u32>,
    pub suppress_group: Option<u32>,
    pub protocol: u8,
    pub ip_protocol: u8,
    pub uids: Option<(u32, u32)>,
    pub source_ports: Option<(u16, u16)>,
    pub destination_ports: Option<(u16, u16)>,
}

impl Rule {
    /// Whether it is of IPv6.
    pub fn is_ipv6(&self) -> bool {
        self.source.0.is_ipv6()
    }
}

fn ports(value: &[u8]) -> Option<(u16, u16)> {
    Some((u16_at(value, 0)?, u16_at(value, 2)?))
}

impl Object for Rule {
    const GET: u16 = libc::RTM_GETRULE;
    const NEW: u16 = libc::RTM_NEWRULE;
    const DELETE: u16 = libc::RTM_DELRULE;
    const DUMPS: &[&[u8]] = &[&[0; HEADER]];

    fn parse(message: &[u8], _: &Interfaces) -> Option<Self> {
        let header: &[u8; HEADER] = message.first_chunk()?;
        let &[family, destination_len, source_len, tos, table, _, _, action, ..] = header;
        let any = unspecified(family)?;
        let mut rule = Self {
            source: (any, source_len),
            destination: (any, destination_len),
            tos,
            priority: 0,
            action,
            table: table.into(),
            goto: None,
            invert: u32_at(header, 8)? & FIB_RULE_INVERT != 0,
            input_interface: String::new(),
            output_interface: String::new(),
            mark: 0,
            mark_mask: 0,
            suppress_prefix_len: None,
            suppress_group: None,
            protocol: 0,
            ip_protocol: 0,
            uids: None,
            source_ports: None,
            destination_ports: None,
        };
        for (kind, value) in attributes(&message[HEADER..]) {
            match kind {
                FRA_SRC => rule.source.0 = ip(family, value)?,
                FRA_DST => rule.destination.0 = ip(family, value)?,
                FRA_IIFNAME => rule.input_interface = text(value),
                FRA_OIFNAME => rule.output_interface = text(value),
                FRA_GOTO => rule.goto = Some(u32_at(value, 0)?),
                FRA_PRIORITY => rule.priority = u32_at(value, 0)?,
                FRA_FWMARK => rule.mark = u32_at(value, 0)?,
                FRA_FWMASK => rule.mark_mask = u32_at(value, 0)?,
                FRA_TABLE => rule.table = u32_at(value, 0)?,
                FRA_SUPPRESS_PREFIXLEN => {
                    rule.suppress_prefix_len = u32_at(value, 0).filter(|&length| length != UNSET);
                }
                FRA_SUPPRESS_IFGROUP => {
                    rule.suppress_group = u32_at(value, 0).filter(|&group| group != UNSET);
                }
                FRA_PROTOCOL => rule.protocol = *value.first()?,
                FRA_IP_PROTO => rule.ip_protocol = *value.first()?,
                FRA_UID_RANGE => rule.uids = Some((u32_at(value, 0)?, u32_at(value, 4)?)),
                FRA_SPORT_RANGE => rule.source_ports = ports(value),
                FRA_DPORT_RANGE => rule.destination_ports = ports(value),
                _ => {}
            }
        }
        Some(rule)
    }

    fn encode(&self, _: &Interfaces) -> (Vec<u8>, Attributes) {
        let table = u8::try_from(self.table).unwrap_or(libc::RT_TABLE_UNSPEC);
        let (source, destination) = (self.source, self.destination);
        let mut header = vec![family(source.0), destination.1, source.1, self.tos, table, 0, 0, self.action];
        header.extend((if self.invert { FIB_RULE_INVERT } else { 0 }).to_ne_bytes());
        let mut out = Attributes::default();
        out.u32(FRA_PRIORITY, self.priority);
        out.u32(FRA_TABLE, self.table);
        for (kind, prefix) in [(FRA_SRC, source), (FRA_DST, destination)] {
            if prefix.1 > 0 {
                out.bytes(kind, &octets(prefix.0));
            }
        }
        for (kind, name) in [(FRA_IIFNAME, &self.input_interface), (FRA_OIFNAME, &self.output_interface)] {
            if !name.is_empty() {
                out.text(kind, name);
            }
        }
        if (self.mark, self.mark_mask) != (0, 0) {
            out.u32(FRA_FWMARK, self.mark);
            out.u32(FRA_FWMASK, self.mark_mask);
        }
        let numbers = [
            (FRA_GOTO, self.goto),
            (FRA_SUPPRESS_PREFIXLEN, self.suppress_prefix_len),
            (FRA_SUPPRESS_IFGROUP, self.suppress_group),
        ];
        for (kind, number) in numbers {
            if let Some(number) = number {
                out.u32(kind, number);
            }
        }
        out.u8(FRA_PROTOCOL, self.protocol);
        if self.ip_protocol != 0 {
            out.u8(FRA_IP_PROTO, self.ip_protocol);
        }
        if let Some((first, last)) = self.uids {
            out.bytes(FRA_UID_RANGE, &[first.to_ne_bytes(), last.to_ne_bytes()].concat());
        }
        for (kind, ports) in [(FRA_SPORT_RANGE, self.source_ports), (FRA_DPORT_RANGE, self.destination_ports)]
        {
            if let Some((first, last)) = ports {
                out.bytes(kind, &[first.to_ne_bytes(), last.to_ne_bytes()].concat());
            }
        }
        (header, out)
    }

    fn create_flags(&self) -> u16 {
        NLM_F_CREATE | NLM_F_EXCL
    }

    fn interfaces(&mut self) -> impl Iterator<Item = &mut u32> {
        std::iter::empty()
    }

    fn describe(&self, _: &Interfaces) -> String {
        let from: IpAddr = self.source.0;
        format!("rule {} from {from}/{} table {}", self.priority, self.source.1, self.table)
    }
}
