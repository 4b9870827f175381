//! Interfaces: which is in which slot, and what each is like.

use std::collections::BTreeMap;

use nix::errno::Errno;
use rvm_protocol::netlink::{
    Attributes, Refusal, Socket, attributes,
    if_link::{
        IFLA_ADDRESS, IFLA_GROUP, IFLA_IFALIAS, IFLA_IFNAME, IFLA_MTU, IFLA_NET_NS_FD, IFLA_NEW_IFINDEX,
        IFLA_PARENT_DEV_NAME, IFLA_TXQLEN,
    },
    text, u32_at,
};

use crate::error::{Step, StepError, StepResult};

/// `struct ifinfomsg`.
const HEADER: usize = 16;
/// The slot that stands for lo.
pub const LOOPBACK: u32 = 0;

const UP: u32 = libc::IFF_UP as u32;
/// Flags that are set with an interface.
pub const KEPT_FLAGS: u32 =
    (libc::IFF_NOARP | libc::IFF_PROMISC | libc::IFF_ALLMULTI | libc::IFF_MULTICAST) as u32;

/// An interface as the kernel tells it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Link {
    /// Its number in its network namespace.
    pub index: u32,
    /// Its name there.
    pub name: String,
    /// What the kernel calls the device it is of, e.g. `virtio3`; empty: none.
    pub parent: String,
    mac: Vec<u8>,
    mtu: u32,
    flags: u32,
    alias: String,
    tx_queue_len: u32,
    group: u32,
}

impl Link {
    fn parse(message: &[u8]) -> Option<Self> {
        let header: &[u8; HEADER] = message.first_chunk()?;
        let mut link = Self { index: u32_at(header, 4)?, flags: u32_at(header, 8)?, ..Self::default() };
        for (kind, value) in attributes(&message[HEADER..]) {
            match kind {
                IFLA_ADDRESS => link.mac = value.to_vec(),
                IFLA_IFNAME => link.name = text(value),
                IFLA_MTU => link.mtu = u32_at(value, 0)?,
                IFLA_TXQLEN => link.tx_queue_len = u32_at(value, 0)?,
                IFLA_IFALIAS => link.alias = text(value),
                IFLA_GROUP => link.group = u32_at(value, 0)?,
                IFLA_PARENT_DEV_NAME => link.parent = text(value),
                _ => {}
            }
        }
        Some(link)
    }

    /// Whether it is lo.
    pub fn is_loopback(&self) -> bool {
        self.flags & libc::IFF_LOOPBACK as u32 != 0
    }
}

/// All interfaces of a socket's network namespace.
pub fn links(socket: &Socket) -> StepResult<Vec<Link>> {
    let answers = socket.dump(libc::RTM_GETLINK, &[0; HEADER]).step(|| "list network interfaces")?;
    Ok(answers.iter().filter_map(|message| Link::parse(message)).collect())
}

/// What an interface is to be like.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Wanted {
    pub slot: u32,
    pub name: String,
    /// Empty: as it is.
    pub mac: Vec<u8>,
    /// 0: as it is.
    pub mtu: u32,
    pub up: bool,
    /// Of [`KEPT_FLAGS`].
    pub flags: u32,
    pub alias: String,
    pub tx_queue_len: Option<u32>,
    pub group: u32,
    /// 0: any.
    pub index: u32,
}

fn header(index: u32, flags: u32, mask: u32) -> Vec<u8> {
    let mut header = vec![0; 4];
    header.extend([index, flags, mask].map(u32::to_ne_bytes).concat());
    header
}

/// Changes one thing of an interface.
fn set(socket: &Socket, index: u32, fill: impl FnOnce(&mut Attributes)) -> Result<(), Refusal> {
    let mut out = Attributes::default();
    fill(&mut out);
    socket.request(libc::RTM_NEWLINK, 0, &header(index, 0, 0), &out)
}

/// Sets and clears flags of an interface.
fn set_flags(socket: &Socket, index: u32, flags: u32, mask: u32) -> Result<(), Refusal> {
    socket.request(libc::RTM_NEWLINK, 0, &header(index, flags, mask), &Attributes::default())
}

/// Moves an interface to another network namespace, where it gets a name and,
/// unless that is 0, a number.
pub fn move_to(socket: &Socket, link: &Link, namespace: i32, name: &str, index: u32) -> StepResult<()> {
    set(socket, link.index, |out| {
        out.u32(IFLA_NET_NS_FD, namespace.cast_unsigned());
        out.text(IFLA_IFNAME, name);
        if index != 0 {
            out.u32(IFLA_NEW_IFINDEX, index);
        }
    })
    .step(|| format!("interface {name}: move it into the sandbox's network namespace"))
}

/// Gives an interface another name.
pub fn rename(socket: &Socket, link: &Link, name: &str) -> StepResult<()> {
    let rename = || set(socket, link.index, |out| out.text(IFLA_IFNAME, name));
    let renamed = match rename() {
        // Kernels before 6.2 rename no interface that is up.
        Err(refusal) if refusal.errno == Errno::EBUSY => {
            set_flags(socket, link.index, 0, UP).and_then(|()| rename())
        }
        renamed => renamed,
    };
    renamed.step(|| format!("interface {name}: name (it is called {:?})", link.name))
}

impl Wanted {
    /// Makes an interface like this but for its name and whether it is up.
    pub fn apply(&self, socket: &Socket, link: &Link) -> StepResult<()> {
        let field = |field: String| move || format!("interface {}: {field}", self.name);
        let one = |is: bool, what: String, fill: &dyn Fn(&mut Attributes)| match is {
            true => Ok(()),
            false => set(socket, link.index, fill).step(field(what)),
        };
        let mac = || self.mac.iter().map(|byte| format!("{byte:02x}")).collect::<Vec<_>>().join(":");
        let is_mac = self.mac.is_empty() || self.mac == link.mac;
        one(is_mac, format!("mac {}", mac()), &|out| out.bytes(IFLA_ADDRESS, &self.mac))?;
        let is_mtu = self.mtu == 0 || self.mtu == link.mtu;
        one(is_mtu, format!("mtu {}", self.mtu), &|out| out.u32(IFLA_MTU, self.mtu))?;
        one(self.alias == link.alias, format!("alias {:?}", self.alias), &|out| {
            // Without its NUL: an empty one removes it.
            out.bytes(IFLA_IFALIAS, self.alias.as_bytes());
        })?;
        let length = self.tx_queue_len.unwrap_or(link.tx_queue_len);
        one(length == link.tx_queue_len, format!("tx_queue_len {length}"), &|out| {
            out.u32(IFLA_TXQLEN, length);
        })?;
        one(self.group == link.group, format!("group {}", self.group), &|out| {
            out.u32(IFLA_GROUP, self.group);
        })?;
        if self.flags != link.flags & KEPT_FLAGS && !link.is_loopback() {
            set_flags(socket, link.index, self.flags, KEPT_FLAGS)
                .step(field(format!("flags {:#x}", self.flags)))?;
        }
        Ok(())
    }

    /// Brings it up or down.
    pub fn apply_state(&self, socket: &Socket, link: &Link) -> StepResult<()> {
        let wanted = if self.up || link.is_loopback() { UP } else { 0 };
        if link.flags & UP == wanted {
            return Ok(());
        }
        // Asked for, the kernel takes note of the link at once, not within a second.
        let noted =
            || socket.request(libc::RTM_GETLINK, 0, &header(link.index, 0, 0), &Attributes::default());
        set_flags(socket, link.index, wanted, UP)
            .and_then(|()| noted())
            .step(|| format!("interface {}: {}", self.name, if wanted == 0 { "down" } else { "up" }))
    }
}

/// The interfaces of the sandbox's network namespace, by their slots.
#[derive(Clone, Debug, Default)]
pub struct Interfaces {
    links: Vec<Link>,
    indexes: BTreeMap<u32, u32>,
}

impl Interfaces {
    /// Reads them; `slots` says which number is in which slot.
    pub fn read(socket: &Socket, slots: &BTreeMap<u32, u32>) -> StepResult<Self> {
        let links = links(socket)?;
        let mut indexes = slots.clone();
        indexes.extend(links.iter().find(|link| link.is_loopback()).map(|link| (LOOPBACK, link.index)));
        Ok(Self { links, indexes })
    }

    /// The number of the one in a slot.
    pub fn index(&self, slot: u32) -> Option<u32> {
        self.indexes.get(&slot).copied()
    }

    /// The name of the one with a number.
    pub fn name(&self, index: u32) -> Option<&str> {
        self.links.iter().find(|link| link.index == index).map(|link| link.name.as_str())
    }

    /// The one in a slot.
    pub fn in_slot(&self, slot: u32) -> StepResult<&Link> {
        let index = self.index(slot);
        self.links
            .iter()
            .find(|link| Some(link.index) == index)
            .ok_or_else(|| StepError::Refused(format!("the network interface in PCI slot {slot} has gone")))
    }
}
