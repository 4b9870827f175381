//! Rules of the routing policy.

use rvm_protocol::{
    agent::{Range, Rule},
    netlink::{
        Refusal, Socket, attributes,
        fib_rules::{
            FIB_RULE_INVERT, FR_ACT_TO_TBL, FRA_DPORT_RANGE, FRA_DST, FRA_FWMARK, FRA_FWMASK, FRA_GOTO,
            FRA_IIFNAME, FRA_IP_PROTO, FRA_L3MDEV, FRA_OIFNAME, FRA_PRIORITY, FRA_PROTOCOL, FRA_SPORT_RANGE,
            FRA_SRC, FRA_SUPPRESS_IFGROUP, FRA_SUPPRESS_PREFIXLEN, FRA_TABLE, FRA_TUN_ID, FRA_UID_RANGE,
        },
        text, u16_at, u32_at,
    },
};

use crate::sandbox::network::NetworkError;

/// All of them. The inner error names one that cannot be carried.
pub(super) fn read(socket: &Socket) -> Result<Result<Vec<Rule>, NetworkError>, Refusal> {
    let mut found = Vec::new();
    for family in [libc::AF_INET, libc::AF_INET6] {
        let mut header = [0; 12];
        header[0] = family as u8;
        let messages = match socket.dump(libc::RTM_GETRULE, &header) {
            // A host without IPv6.
            Err(Refusal {
                errno: nix::errno::Errno::EAFNOSUPPORT | nix::errno::Errno::EOPNOTSUPP, ..
            }) => {
                continue;
            }
            messages => messages?,
        };
        for message in messages.iter().filter(|message| message.first() == Some(&header[0])) {
            match parse(message) {
                None => {}
                Some(Ok(rule)) => found.push(rule),
                Some(Err(error)) => return Ok(Err(error)),
            }
        }
    }
    Ok(Ok(found))
}

/// Whether they are the kernel's own.
pub(super) fn are_usual(rules: &[Rule]) -> bool {
    rules.iter().all(|rule| {
        // Priority, and the table of the same meaning: local, main, default.
        rule.action == FR_ACT_TO_TBL
            && matches!((rule.priority, rule.table), (0, 255) | (32766, 254) | (32767, 253))
    })
}

fn parse(message: &[u8]) -> Option<Result<Rule, NetworkError>> {
    let &[family, destination_len, source_len, tos, table, _, _, action, ..] = message else { return None };
    let mut rule = Rule {
        family: family.into(),
        destination_len: destination_len.into(),
        source_len: source_len.into(),
        tos: tos.into(),
        table: table.into(),
        action: action.into(),
        invert: u32_at(message, 8)? & FIB_RULE_INVERT != 0,
        ..Default::default()
    };
    let mut other = None;
    for (kind, value) in attributes(message.get(12..)?) {
        let number = || u32_at(value, 0);
        // All bits set: not given.
        let given = || number().filter(|number| *number != u32::MAX);
        match kind {
            FRA_DST => rule.destination = value.to_vec(),
            FRA_SRC => rule.source = value.to_vec(),
            FRA_IIFNAME => rule.input_interface = text(value),
            FRA_OIFNAME => rule.output_interface = text(value),
            FRA_GOTO => rule.goto_priority = number()?,
            FRA_PRIORITY => rule.priority = number()?,
            FRA_FWMARK => rule.mark = number()?,
            FRA_FWMASK => rule.mark_mask = number()?,
            FRA_SUPPRESS_IFGROUP => rule.suppress_group = given(),
            FRA_SUPPRESS_PREFIXLEN => rule.suppress_prefix_len = given(),
            FRA_TABLE => rule.table = number()?,
            FRA_PROTOCOL => rule.protocol = u32::from(*value.first()?),
            FRA_IP_PROTO => rule.ip_protocol = u32::from(*value.first()?),
            FRA_UID_RANGE => rule.uids = Some(range(u32_at(value, 0)?, u32_at(value, 4)?)).into(),
            FRA_SPORT_RANGE => rule.source_ports = ports(value).into(),
            FRA_DPORT_RANGE => rule.destination_ports = ports(value).into(),
            FRA_TUN_ID if value.iter().any(|byte| *byte != 0) => other = Some("tun_id"),
            FRA_L3MDEV if value != [0] => other = Some("l3mdev"),
            _ => {}
        }
    }
    Some(match other {
        None => Ok(rule),
        Some(word) => Err(NetworkError::UnsupportedRule { priority: rule.priority, word }),
    })
}

fn range(first: u32, last: u32) -> Range {
    Range { first, last, ..Default::default() }
}

fn ports(value: &[u8]) -> Option<Range> {
    Some(range(u16_at(value, 0)?.into(), u16_at(value, 2)?.into()))
}
