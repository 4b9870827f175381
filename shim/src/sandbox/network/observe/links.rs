//! Interfaces: which of them a virtio-net device can stand in for.

use rvm_protocol::{
    agent::{Address, Interface},
    netlink::{
        Refusal, Socket, attributes,
        if_link::{
            IFLA_ADDRESS, IFLA_GROUP, IFLA_IFALIAS, IFLA_IFNAME, IFLA_INFO_KIND, IFLA_LINK,
            IFLA_LINK_NETNSID, IFLA_LINKINFO, IFLA_MASTER, IFLA_MTU, IFLA_TXQLEN,
        },
        text, u16_at, u32_at,
    },
};

use super::{super::tap, Links};
use crate::sandbox::network::NetworkError;

/// Kinds that are a part of another interface: where that is in the namespace
/// too, its frames are the guest's before they are theirs.
const STACKED: [&str; 6] = ["ipvlan", "ipvtap", "macsec", "macvlan", "macvtap", "vlan"];
/// Those the kernel itself puts into every namespace when their module is there.
const FALLBACKS: [&str; 9] =
    ["erspan0", "gre0", "gretap0", "ip6_vti0", "ip6gre0", "ip6tnl0", "ip_vti0", "sit0", "tunl0"];

/// What an interface is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// `lo`.
    Loopback,
    /// It carries Ethernet frames: veth, macvlan, ipvlan, vlan, bridge, dummy, tap
    /// and whatever else does.
    Ethernet,
}

/// An interface of the host.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Link {
    /// Its number in the namespace.
    pub index: u32,
    /// Its name.
    pub name: String,
    /// What it is to us.
    pub kind: Kind,
    /// Its hardware address; empty: none.
    pub mac: Vec<u8>,
    /// Its MTU.
    pub mtu: u32,
    flags: u32,
    alias: String,
    /// Frames its queue has room for.
    pub tx_queue_len: u32,
    group: u32,
    /// `IFLA_INFO_KIND`: its driver's word for it.
    driver: String,
    /// Of the hardware (`ARPHRD_*`).
    hardware: u16,
    /// The interface it is a part of, or the other end, in whichever namespace.
    link: Option<u32>,
    /// Whether that is in another one.
    elsewhere: bool,
    /// The one that it is a port of.
    master: Option<u32>,
}

impl Link {
    fn parse(message: &[u8]) -> Option<Self> {
        let mut link = Self {
            index: u32_at(message, 4)?,
            name: String::new(),
            kind: Kind::Ethernet,
            mac: Vec::new(),
            mtu: 0,
            flags: u32_at(message, 8)?,
            alias: String::new(),
            tx_queue_len: 0,
            group: 0,
            driver: String::new(),
            hardware: u16_at(message, 2)?,
            link: None,
            elsewhere: false,
            master: None,
        };
        for (kind, value) in attributes(message.get(16..)?) {
            let number = || u32_at(value, 0);
            match kind {
                IFLA_ADDRESS => link.mac = value.to_vec(),
                IFLA_IFNAME => link.name = text(value),
                IFLA_MTU => link.mtu = number()?,
                IFLA_LINK => link.link = number(),
                IFLA_MASTER => link.master = number(),
                IFLA_TXQLEN => link.tx_queue_len = number()?,
                IFLA_IFALIAS => link.alias = text(value),
                IFLA_GROUP => link.group = number()?,
                IFLA_LINK_NETNSID => link.elsewhere = true,
                IFLA_LINKINFO => {
                    let found = attributes(value).find(|(kind, _)| *kind == IFLA_INFO_KIND);
                    link.driver = found.map(|(_, value)| text(value)).unwrap_or_default();
                }
                _ => {}
            }
        }
        if link.flags & libc::IFF_LOOPBACK.cast_unsigned() != 0 {
            link.kind = Kind::Loopback;
        }
        Some(link)
    }

    /// Whether it is one of those that stand beside a carried interface.
    pub fn is_our_tap(&self) -> bool {
        self.driver == "tun" && tap::is_tap(&self.name)
    }

    /// What tells it from one that had its number before.
    pub fn identity(&self) -> (u32, Option<u32>) {
        (self.index, self.link)
    }

    /// Whether it is set up.
    pub fn is_up(&self) -> bool {
        self.flags & libc::IFF_UP.cast_unsigned() != 0
    }

    /// Why no virtio-net device can stand in for it.
    fn problem(&self, all: &[Self]) -> Option<String> {
        let other = |index: Option<u32>| all.iter().find(|other| Some(other.index) == index);
        if self.hardware != libc::ARPHRD_ETHER {
            let what = if self.driver.is_empty() { "it" } else { &self.driver };
            return Some(format!("{what} carries no Ethernet frames"));
        }
        if self.driver == "vrf" {
            return Some("a vrf is a part of the host's routing".into());
        }
        if STACKED.contains(&self.driver.as_str())
            && !self.elsewhere
            && let Some(below) = other(self.link)
        {
            return Some(format!(
                "{} on {}, which is in the same namespace and goes to the guest itself; \
                 make it inside the container, or leave {1} outside the namespace",
                self.driver, below.name,
            ));
        }
        let octets: Option<[u8; 6]> = self.mac.as_slice().try_into().ok();
        match octets {
            Some(mac) if mac[0] & 1 == 0 && mac != [0; 6] => None,
            _ => Some("it has no Ethernet address of its own".into()),
        }
    }

    /// What the guest's interface is to be.
    pub(super) fn wanted(&self, slot: u8, addresses: Vec<Address>) -> Interface {
        const KEPT: libc::c_int =
            libc::IFF_NOARP | libc::IFF_PROMISC | libc::IFF_ALLMULTI | libc::IFF_MULTICAST;
        Interface {
            slot: slot.into(),
            name: self.name.clone(),
            mac: if self.kind == Kind::Ethernet { self.mac.clone() } else { Vec::new() },
            mtu: self.mtu,
            up: self.is_up(),
            addresses,
            alias: self.alias.clone(),
            // A veth needs none; a virtio-net without one drops what its ring does not take.
            tx_queue_len: (self.tx_queue_len > 0).then_some(self.tx_queue_len),
            index: self.index,
            flags: self.flags & KEPT.cast_unsigned(),
            group: self.group,
            ..Default::default()
        }
    }
}

pub(super) fn read(socket: &Socket) -> Result<Vec<Link>, Refusal> {
    let messages = socket.dump(libc::RTM_GETLINK, &[0; 16])?;
    Ok(messages.iter().filter_map(|message| Link::parse(message)).collect())
}

/// Those that go to the guest. One that is used and cannot is an error; ports of
/// a bridge and what the kernel puts into every namespace stay behind.
pub(super) fn carried(all: Vec<Link>, has_addresses: impl Fn(u32) -> bool) -> Result<Links, NetworkError> {
    let mut links = Links::new();
    for link in &all {
        let is_unused = !link.is_up() && !has_addresses(link.index);
        let is_fallback = is_unused && FALLBACKS.contains(&link.name.as_str());
        if link.is_our_tap() || is_fallback {
            continue;
        }
        if link.kind == Kind::Ethernet {
            let master = all.iter().find(|other| Some(other.index) == link.master);
            if master.is_some_and(|master| master.driver != "vrf") {
                continue;
            }
            if let Some(reason) = link.problem(&all) {
                if is_unused {
                    continue;
                }
                return Err(NetworkError::Unsupported { interface: link.name.clone(), reason });
            }
        }
        links.insert(link.index, link.clone());
    }
    Ok(links)
}
