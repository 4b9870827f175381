//! Rules of netfilter that lead one address's port 53 to other ports, as Docker has
//! them on the host: `ip daddr ADDRESS udp dport 53 dnat to :PORT`, and for TCP.
//!
//! Their table is owned by the socket that made it: it goes when that is closed, and
//! a container that flushes its rules keeps its names.

use rvm_protocol::{
    guest::RESOLVER_ADDRESS,
    netlink::{Attributes, NLM_F_APPEND, NLM_F_CREATE, Refusal, Request, Socket},
};

const TABLE: &str = "docker-resolver";
const CHAIN: &str = "output";
/// The port of name servers.
const PORT: u16 = 53;

// linux/netfilter/nfnetlink.h and nf_tables.h
const NFNL_SUBSYS_NFTABLES: u16 = 10;
const NFNL_MSG_BATCH_BEGIN: u16 = 0x10;
const NFNL_MSG_BATCH_END: u16 = 0x11;
const NFT_MSG_NEWTABLE: u16 = 0;
const NFT_MSG_NEWCHAIN: u16 = 3;
const NFT_MSG_NEWRULE: u16 = 6;
const NFT_TABLE_F_OWNER: u32 = 2;
const NFTA_TABLE_NAME: u16 = 1;
const NFTA_TABLE_FLAGS: u16 = 2;
const NFTA_CHAIN_TABLE: u16 = 1;
const NFTA_CHAIN_NAME: u16 = 3;
const NFTA_CHAIN_HOOK: u16 = 4;
const NFTA_CHAIN_TYPE: u16 = 7;
const NFTA_HOOK_HOOKNUM: u16 = 1;
const NFTA_HOOK_PRIORITY: u16 = 2;
const NFTA_RULE_TABLE: u16 = 1;
const NFTA_RULE_CHAIN: u16 = 2;
const NFTA_RULE_EXPRESSIONS: u16 = 4;
const NFTA_LIST_ELEM: u16 = 1;
const NFTA_EXPR_NAME: u16 = 1;
const NFTA_EXPR_DATA: u16 = 2;
const NFTA_DATA_VALUE: u16 = 1;
const NFT_REG_1: u32 = 1;
const NFT_META_L4PROTO: u32 = 16;
const NFT_PAYLOAD_NETWORK_HEADER: u32 = 1;
const NFT_PAYLOAD_TRANSPORT_HEADER: u32 = 2;
const NFT_CMP_EQ: u32 = 0;
const NFT_NAT_DNAT: u32 = 1;
const NF_INET_LOCAL_OUT: u32 = 3;
const NF_IP_PRI_NAT_DST: i32 = -100;

/// Offset of the destination in an IPv4 header.
const DESTINATION: u32 = 16;
/// Offset of the destination port in the headers of UDP and TCP.
const DESTINATION_PORT: u32 = 2;

/// The rules, which are there as long as this is.
#[derive(Debug)]
pub struct Rules(#[expect(dead_code, reason = "owns the table")] Socket);

impl Rules {
    /// Makes them in the calling thread's network namespace, for UDP and TCP.
    pub fn lead_to((udp, tcp): (u16, u16)) -> Result<Self, Refusal> {
        let socket = Socket::netfilter()?;
        let mut table = Attributes::default();
        table.text(NFTA_TABLE_NAME, TABLE);
        number(&mut table, NFTA_TABLE_FLAGS, NFT_TABLE_F_OWNER);
        let (mut hook, mut chain) = (Attributes::default(), Attributes::default());
        number(&mut hook, NFTA_HOOK_HOOKNUM, NF_INET_LOCAL_OUT);
        number(&mut hook, NFTA_HOOK_PRIORITY, NF_IP_PRI_NAT_DST.cast_unsigned());
        chain.text(NFTA_CHAIN_TABLE, TABLE);
        chain.text(NFTA_CHAIN_NAME, CHAIN);
        chain.nested(NFTA_CHAIN_HOOK, &hook);
        chain.text(NFTA_CHAIN_TYPE, "nat");
        socket.batch(&[
            bound(NFNL_MSG_BATCH_BEGIN),
            request(NFT_MSG_NEWTABLE, 0, table),
            request(NFT_MSG_NEWCHAIN, 0, chain),
            request(NFT_MSG_NEWRULE, NLM_F_APPEND, rule(libc::IPPROTO_UDP as u8, udp)),
            request(NFT_MSG_NEWRULE, NLM_F_APPEND, rule(libc::IPPROTO_TCP as u8, tcp)),
            bound(NFNL_MSG_BATCH_END),
        ])?;
        Ok(Self(socket))
    }
}

/// `struct nfgenmsg`.
fn header(family: i32, resource: u16) -> Vec<u8> {
    let [high, low] = resource.to_be_bytes();
    vec![family as u8, 0, high, low]
}

fn bound(kind: u16) -> Request {
    Request {
        kind,
        flags: 0,
        header: header(libc::AF_UNSPEC, NFNL_SUBSYS_NFTABLES),
        attributes: Attributes::default(),
    }
}

fn request(kind: u16, flags: u16, attributes: Attributes) -> Request {
    let kind = NFNL_SUBSYS_NFTABLES << 8 | kind;
    Request { kind, flags: flags | NLM_F_CREATE, header: header(libc::AF_INET, 0), attributes }
}

/// Numbers are big-endian in netfilter's messages.
fn number(attributes: &mut Attributes, kind: u16, value: u32) {
    attributes.bytes(kind, &value.to_be_bytes());
}

fn rule(protocol: u8, to: u16) -> Attributes {
    let mut expressions = Attributes::default();
    let mut add = |name: &str, data: &Attributes| {
        let mut expression = Attributes::default();
        expression.text(NFTA_EXPR_NAME, name);
        expression.nested(NFTA_EXPR_DATA, data);
        expressions.nested(NFTA_LIST_ELEM, &expression);
    };
    let numbers = |values: &[u32]| {
        let mut data = Attributes::default();
        // Each kind of expression counts its attributes from 1.
        for (kind, &value) in (1..).zip(values) {
            number(&mut data, kind, value);
        }
        data
    };
    let with_value = |mut data: Attributes, kind: u16, value: &[u8]| {
        let mut inner = Attributes::default();
        inner.bytes(NFTA_DATA_VALUE, value);
        data.nested(kind, &inner);
        data
    };
    // NFTA_CMP_SREG, _OP, _DATA
    let equals = |value: &[u8]| with_value(numbers(&[NFT_REG_1, NFT_CMP_EQ]), 3, value);
    // NFTA_PAYLOAD_DREG, _BASE, _OFFSET, _LEN
    add("payload", &numbers(&[NFT_REG_1, NFT_PAYLOAD_NETWORK_HEADER, DESTINATION, 4]));
    add("cmp", &equals(&RESOLVER_ADDRESS.octets()));
    // NFTA_META_DREG, _KEY
    add("meta", &numbers(&[NFT_REG_1, NFT_META_L4PROTO]));
    add("cmp", &equals(&[protocol]));
    add("payload", &numbers(&[NFT_REG_1, NFT_PAYLOAD_TRANSPORT_HEADER, DESTINATION_PORT, 2]));
    add("cmp", &equals(&PORT.to_be_bytes()));
    // NFTA_IMMEDIATE_DREG, _DATA
    add("immediate", &with_value(numbers(&[NFT_REG_1]), 2, &to.to_be_bytes()));
    // NFTA_NAT_TYPE, _FAMILY, and _REG_PROTO_MIN
    let mut nat = numbers(&[NFT_NAT_DNAT, libc::AF_INET.cast_unsigned()]);
    number(&mut nat, 5, NFT_REG_1);
    add("nat", &nat);

    let mut rule = Attributes::default();
    rule.text(NFTA_RULE_TABLE, TABLE);
    rule.text(NFTA_RULE_CHAIN, CHAIN);
    rule.nested(NFTA_RULE_EXPRESSIONS, &expressions);
    rule
}

#[cfg(test)]
mod tests {
    use std::{
        io::{Read, Write},
        net::{SocketAddrV4, TcpListener, TcpStream, UdpSocket},
        time::Duration,
    };

    use nix::sched::{CloneFlags, unshare};

    use super::*;
    use crate::sys::loopback;

    /// In a network namespace of the test's own.
    #[test]
    fn port_53_leads_to_others_and_stays_free() {
        let in_its_own = || {
            unshare(CloneFlags::CLONE_NEWNET).unwrap();
            loopback::up().unwrap();
            let at = |port| SocketAddrV4::new(RESOLVER_ADDRESS, port);
            let (udp, tcp) = (UdpSocket::bind(at(0)).unwrap(), TcpListener::bind(at(0)).unwrap());
            let ports = (udp.local_addr().unwrap().port(), tcp.local_addr().unwrap().port());
            let rules = Rules::lead_to(ports).unwrap();
            // A container that serves names itself.
            let _own = UdpSocket::bind("0.0.0.0:53").unwrap();
            let _own = TcpListener::bind("0.0.0.0:53").unwrap();

            let client = UdpSocket::bind("0.0.0.0:0").unwrap();
            client.set_read_timeout(Some(Duration::from_secs(10))).unwrap();
            // Connected: an answer from elsewhere would not be taken.
            client.connect(at(53)).unwrap();
            client.send(b"who").unwrap();
            let mut buffer = [0; 8];
            let (length, from) = udp.recv_from(&mut buffer).unwrap();
            assert_eq!(&buffer[..length], b"who");
            udp.send_to(b"you", from).unwrap();
            assert_eq!(client.recv(&mut buffer).unwrap(), 3);

            let mut client = TcpStream::connect(at(53)).unwrap();
            client.write_all(b"who").unwrap();
            let (mut server, _) = tcp.accept().unwrap();
            server.read_exact(&mut buffer[..3]).unwrap();
            assert_eq!(&buffer[..3], b"who");

            // Other addresses are not concerned, and it all goes with its owner.
            assert!(TcpStream::connect("127.0.0.1:53").is_ok());
            assert!(Rules::lead_to(ports).is_err(), "twice");
            drop(rules);
        };
        std::thread::spawn(in_its_own).join().unwrap();
    }
}
