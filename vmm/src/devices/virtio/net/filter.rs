//! Which frames the guest wants (virtio 1.2, 5.1.6.5.1 to 5.1.6.5.3).
//!
//! A driver that says nothing gets everything. What a driver says is a wish, not a
//! wall: a frame it does not want may still come, from vhost-net for one.

use serde::{Deserialize, Serialize};

/// Addresses of each kind that are kept apart; of a driver with more, all of that
/// kind are wanted.
const MAX_ADDRESSES: usize = 64;
const BROADCAST: [u8; 6] = [0xff; 6];
/// Words of the bitmap of VLANs.
const VLAN_WORDS: usize = 4096 / 64;
/// Bytes of a frame that are looked at: both addresses, type and VLAN tag.
pub(super) const LOOKED_AT: usize = 16;
const TYPE_VLAN: [u8; 2] = [0x81, 0x00];

/// The driver's filter.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Filter {
    /// The device's own address.
    pub(super) mac: [u8; 6],
    pub(super) promiscuous: bool,
    pub(super) all_multicast: bool,
    pub(super) all_unicast: bool,
    pub(super) no_multicast: bool,
    pub(super) no_unicast: bool,
    pub(super) no_broadcast: bool,
    unicast: Addresses,
    multicast: Addresses,
    /// A bit for each VLAN, where the driver filters by them.
    vlans: Option<Vec<u64>>,
}

/// Addresses of one kind.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Addresses {
    list: Vec<[u8; 6]>,
    /// There are more than are kept.
    too_many: bool,
}

impl FromIterator<[u8; 6]> for Addresses {
    fn from_iter<I: IntoIterator<Item = [u8; 6]>>(addresses: I) -> Self {
        let mut list: Vec<_> = addresses.into_iter().take(MAX_ADDRESSES + 1).collect();
        let too_many = list.len() > MAX_ADDRESSES;
        list.truncate(MAX_ADDRESSES);
        Self { list, too_many }
    }
}

impl Addresses {
    fn contain(&self, address: &[u8]) -> bool {
        self.too_many || self.list.iter().any(|known| known == address)
    }
}

impl Filter {
    /// Everything passes; VLANs are told apart where the driver negotiated that, and
    /// then none is wanted until it says so.
    pub(super) fn new(mac: [u8; 6], by_vlan: bool) -> Self {
        Self {
            mac,
            promiscuous: true,
            all_multicast: false,
            all_unicast: false,
            no_multicast: false,
            no_unicast: false,
            no_broadcast: false,
            unicast: Addresses::default(),
            multicast: Addresses::default(),
            vlans: by_vlan.then(|| vec![0; VLAN_WORDS]),
        }
    }

    /// The driver's table.
    pub(super) fn set_addresses(&mut self, unicast: Addresses, multicast: Addresses) {
        self.unicast = unicast;
        self.multicast = multicast;
    }

    /// Wants a VLAN or does not; false where there is none of that number.
    pub(super) fn set_vlan(&mut self, id: u16, wanted: bool) -> bool {
        let word = self.vlans.as_mut().and_then(|words| words.get_mut(usize::from(id / 64)));
        let Some(word) = word else { return false };
        let bit = 1 << (id % 64);
        *word = if wanted { *word | bit } else { *word & !bit };
        true
    }

    /// Whether every frame passes, so that none need be looked at.
    pub(super) fn takes_all(&self) -> bool {
        self.promiscuous && self.vlans.is_none()
    }

    /// Whether a frame that begins so is wanted; one that is shorter is not.
    pub(super) fn wants(&self, frame: &[u8]) -> bool {
        let (Some(to), Some(kind)) = (frame.get(..6), frame.get(12..14)) else { return false };
        self.wants_address(to) && (kind != TYPE_VLAN || self.wants_vlan(frame.get(14..16)))
    }

    fn wants_address(&self, to: &[u8]) -> bool {
        if self.promiscuous {
            true
        } else if to == BROADCAST {
            !self.no_broadcast
        } else if to.first().is_some_and(|byte| byte & 1 != 0) {
            !self.no_multicast && (self.all_multicast || self.multicast.contain(to))
        } else {
            !self.no_unicast && (self.all_unicast || to == self.mac || self.unicast.contain(to))
        }
    }

    fn wants_vlan(&self, tag: Option<&[u8]>) -> bool {
        let Some(words) = &self.vlans else { return true };
        let Some([high, low]) = tag else { return false };
        let id = u16::from_be_bytes([high & 0x0f, *low]);
        // Priority tags name no VLAN.
        id == 0 || words.get(usize::from(id / 64)).is_some_and(|word| word >> (id % 64) & 1 != 0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MAC: [u8; 6] = [2, 0, 0, 0, 0, 1];
    const OTHER: [u8; 6] = [2, 0, 0, 0, 0, 2];
    const GROUP: [u8; 6] = [0x33, 0x33, 0, 0, 0, 1];

    fn frame(to: [u8; 6], vlan: Option<u16>) -> Vec<u8> {
        let mut bytes = to.to_vec();
        bytes.extend(OTHER);
        if let Some(id) = vlan {
            bytes.extend(TYPE_VLAN);
            bytes.extend((0xe000 | id).to_be_bytes());
        }
        bytes.extend([8, 0, 0x45, 0]);
        bytes
    }

    #[test]
    fn a_driver_gets_what_it_wants() {
        let mut filter = Filter::new(MAC, false);
        assert!(filter.takes_all() && filter.wants(&frame(OTHER, Some(7))));
        filter.promiscuous = false;
        let wants = |filter: &Filter| [MAC, OTHER, GROUP, BROADCAST].map(|to| filter.wants(&frame(to, None)));
        assert_eq!(wants(&filter), [true, false, false, true]);
        filter.set_addresses([OTHER].into_iter().collect(), [GROUP].into_iter().collect());
        assert_eq!(wants(&filter), [true; 4]);
        filter.set_addresses(Addresses::default(), Addresses::default());
        filter.all_multicast = true;
        assert_eq!(wants(&filter), [true, false, true, true]);
        filter.all_unicast = true;
        filter.no_broadcast = true;
        filter.no_multicast = true;
        assert_eq!(wants(&filter), [true, true, false, false]);
        for short in [&[][..], &[0xff; 6], &[0xff; 13]] {
            assert!(!filter.wants(short));
        }
    }

    #[test]
    fn of_too_many_addresses_all_are_wanted_and_few_are_kept() {
        let many = || (0..1_000_000u32).map(|n| [2, 1, (n >> 16) as u8, (n >> 8) as u8, n as u8, 0]);
        let mut filter = Filter::new(MAC, false);
        filter.promiscuous = false;
        filter.set_addresses(many().take(MAX_ADDRESSES).collect(), Addresses::default());
        assert!(!filter.wants(&frame(OTHER, None)));
        filter.set_addresses(many().collect(), Addresses::default());
        assert!(filter.wants(&frame(OTHER, None)) && !filter.wants(&frame(GROUP, None)));
        assert_eq!(filter.unicast.list.len(), MAX_ADDRESSES);
    }

    #[test]
    fn vlans_are_told_apart_where_the_driver_asked_for_that() {
        let mut filter = Filter::new(MAC, true);
        assert!(!filter.takes_all());
        let wants = |filter: &Filter| {
            [None, Some(0), Some(7), Some(4095)].map(|vlan| filter.wants(&frame(MAC, vlan)))
        };
        assert_eq!(wants(&filter), [true, true, false, false]);
        assert!(filter.set_vlan(7, true) && filter.set_vlan(4095, true) && !filter.set_vlan(4096, true));
        assert_eq!(wants(&filter), [true; 4]);
        assert!(filter.set_vlan(7, false));
        assert_eq!(wants(&filter), [true, true, false, true]);
        assert!(!filter.wants(&frame(MAC, Some(7))[..15]), "the tag is cut off");
        assert!(!Filter::new(MAC, false).set_vlan(7, true));
    }
}
