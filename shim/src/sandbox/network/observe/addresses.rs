//! Addresses of interfaces.

use std::collections::BTreeMap;

use rvm_protocol::{
    agent::Address,
    netlink::{
        Refusal, Socket, attributes,
        if_addr::{IFA_ADDRESS, IFA_BROADCAST, IFA_FLAGS, IFA_LABEL, IFA_LOCAL, IFA_PROTO, IFA_RT_PRIORITY},
        text, u32_at,
    },
};

// linux/if_addr.h
const IFAPROT_KERNEL_RA: u8 = 2;
/// Where duplicate address detection stands; it is the kernel's to say, and not
/// waited for in the guest.
const TRANSIENT: u32 = 0x40 | 0x04 | 0x08;

/// By interface. What a router's advertisement made is left out: the guest hears
/// the router itself.
pub(super) fn read(socket: &Socket) -> Result<BTreeMap<u32, Vec<Address>>, Refusal> {
    let mut found = BTreeMap::<u32, Vec<Address>>::new();
    for message in socket.dump(libc::RTM_GETADDR, &[0; 8])? {
        if let Some((index, address)) = parse(&message) {
            found.entry(index).or_default().push(address);
        }
    }
    Ok(found)
}

fn parse(message: &[u8]) -> Option<(u32, Address)> {
    let &[family, prefix_len, flags, scope, ..] = message else { return None };
    let mut address = Address {
        prefix_len: prefix_len.into(),
        scope: scope.into(),
        flags: flags.into(),
        ..Default::default()
    };
    let mut local = None;
    for (kind, value) in attributes(message.get(8..)?) {
        match kind {
            IFA_ADDRESS => address.peer = value.to_vec(),
            IFA_LOCAL => local = Some(value.to_vec()),
            IFA_LABEL => address.label = text(value),
            IFA_BROADCAST => address.broadcast = value.to_vec(),
            IFA_FLAGS => address.flags = u32_at(value, 0)?,
            IFA_RT_PRIORITY => address.route_metric = u32_at(value, 0)?,
            IFA_PROTO if value == [IFAPROT_KERNEL_RA] => return None,
            _ => {}
        }
    }
    // Without a local one the address is that, with one it is the other end's.
    address.address = match local {
        Some(local) => local,
        None => std::mem::take(&mut address.peer),
    };
    if address.peer == address.address {
        address.peer.clear();
    }
    address.flags &= !TRANSIENT;
    let length = match i32::from(family) {
        libc::AF_INET => 4,
        libc::AF_INET6 => 16,
        _ => return None,
    };
    (address.address.len() == length).then_some((u32_at(message, 4)?, address))
}
