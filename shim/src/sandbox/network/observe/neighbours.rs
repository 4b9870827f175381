//! Neighbours that somebody has set.

use rvm_protocol::{
    agent::Neighbour,
    netlink::{
        Refusal, Socket, attributes,
        neighbour::{NDA_DST, NDA_LLADDR, NTF_PROXY, NTF_ROUTER, NUD_PERMANENT},
        u16_at, u32_at,
    },
};

use super::Links;

/// Permanent ones and proxies of interfaces that go to the guest.
pub(super) fn read(socket: &Socket, links: &Links) -> Result<Vec<Neighbour>, Refusal> {
    let mut found = Vec::new();
    for flags in [0, NTF_PROXY] {
        let mut header = [0; 12];
        header[10] = flags;
        let messages = socket.dump(libc::RTM_GETNEIGH, &header)?;
        found.extend(messages.iter().filter_map(|message| parse(message, links)));
    }
    Ok(found)
}

fn parse(message: &[u8], links: &Links) -> Option<Neighbour> {
    let family = i32::from(*message.first()?);
    let (state, flags) = (u16_at(message, 8)?, *message.get(10)?);
    let is_set = state & NUD_PERMANENT != 0 || flags & NTF_PROXY != 0;
    if !is_set || !matches!(family, libc::AF_INET | libc::AF_INET6) {
        return None;
    }
    let mut neighbour = Neighbour {
        interface: links.get(&u32_at(message, 4)?)?.name.clone(),
        flags: u32::from(flags & (NTF_PROXY | NTF_ROUTER)),
        ..Default::default()
    };
    for (kind, value) in attributes(message.get(12..)?) {
        match kind {
            NDA_DST => neighbour.address = value.to_vec(),
            NDA_LLADDR => neighbour.mac = value.to_vec(),
            _ => {}
        }
    }
    Some(neighbour)
}
