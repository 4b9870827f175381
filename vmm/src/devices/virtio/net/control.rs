//! The control queue (virtio 1.2, section 5.1.6.5): what the driver wants to receive,
//! how finished, under which address, on how many queues.

use std::sync::Arc;
use std::time::Instant;

use rvm_protocol::vmm::{RateLimit, TokenBucket};
use virtio_bindings::virtio_net::*;

use super::device::Shared;
use super::filter::Addresses;
use super::limit::Limit;
use super::tap::{Tap, Taps};
use crate::devices::virtio::buffers::GuestBuffers;
use crate::devices::virtio::ring::{Ring, RingError};
use crate::memory::GuestRam;

/// Features that say what the driver takes unfinished, which it may change its mind on.
pub(super) const OFFLOADS: u64 = 1 << VIRTIO_NET_F_GUEST_CSUM
    | 1 << VIRTIO_NET_F_GUEST_TSO4
    | 1 << VIRTIO_NET_F_GUEST_TSO6
    | 1 << VIRTIO_NET_F_GUEST_ECN
    | 1 << VIRTIO_NET_F_GUEST_USO4
    | 1 << VIRTIO_NET_F_GUEST_USO6;
/// Changes a guest may ask of the host's kernel: each takes a lock that all of the
/// host's network configuration shares.
const KERNEL_CHANGES: TokenBucket = TokenBucket { per_second: 20, burst: 50 };

/// A command the device does not do.
struct Refused;

/// The control queue of an active device.
pub(super) struct Control {
    ring: Ring,
    shared: Arc<Shared>,
    taps: Taps,
    features: u64,
    changes: Limit,
}

impl Control {
    pub(super) fn new(ring: Ring, shared: Arc<Shared>, taps: Taps, features: u64) -> Self {
        let changes = RateLimit { bytes: None, packets: Some(KERNEL_CHANGES) };
        Self { ring, shared, taps, features, changes: Limit::new(changes, Instant::now()) }
    }

    pub(super) fn ring(&self) -> &Ring {
        &self.ring
    }

    /// Does what the driver asks for, a queue full at most.
    pub(super) fn work(&mut self, memory: &GuestRam) -> Result<(), RingError> {
        let Self { ring, shared, taps, features, changes } = self;
        let desk = Desk { shared, taps, features: *features, changes };
        ring.serve(memory, |chain| {
            let Ok((readable, mut writable)) = GuestBuffers::from_chain(memory, chain) else { return 0 };
            if writable.is_empty() {
                return 0;
            }
            let done = desk.execute(readable);
            let answer = if done.is_ok() { VIRTIO_NET_OK } else { VIRTIO_NET_ERR };
            writable.write(&[answer as u8]) as u32
        })
        .map(drop)
    }
}

/// What commands act on.
struct Desk<'a> {
    shared: &'a Shared,
    taps: &'a [Arc<Tap>],
    features: u64,
    changes: &'a Limit,
}

impl Desk<'_> {
    fn execute(&self, mut command: GuestBuffers<'_>) -> Result<(), Refused> {
        let [class, code] = command.read::<2>().ok_or(Refused)?;
        let has = |feature: u32| if self.features & (1 << feature) != 0 { Ok(()) } else { Err(Refused) };
        match u32::from(class) {
            VIRTIO_NET_CTRL_RX => self.receive_mode(code.into(), &mut command, &has),
            VIRTIO_NET_CTRL_MAC => match u32::from(code) {
                VIRTIO_NET_CTRL_MAC_TABLE_SET => {
                    has(VIRTIO_NET_F_CTRL_RX)?;
                    let tables = (addresses(&mut command)?, addresses(&mut command)?);
                    self.shared.change_filter(|filter| filter.set_addresses(tables.0, tables.1));
                    Ok(())
                }
                VIRTIO_NET_CTRL_MAC_ADDR_SET => {
                    has(VIRTIO_NET_F_CTRL_MAC_ADDR)?;
                    let mac = only::<6>(&mut command)?;
                    if mac[0] & 1 != 0 || mac == [0; 6] {
                        return Err(Refused);
                    }
                    self.shared.set_mac(mac);
                    Ok(())
                }
                _ => Err(Refused),
            },
            VIRTIO_NET_CTRL_VLAN => {
                has(VIRTIO_NET_F_CTRL_VLAN)?;
                let wanted = match u32::from(code) {
                    VIRTIO_NET_CTRL_VLAN_ADD => true,
                    VIRTIO_NET_CTRL_VLAN_DEL => false,
                    _ => return Err(Refused),
                };
                let id = u16::from_le_bytes(only(&mut command)?);
                let done = self.shared.change_filter(|filter| filter.set_vlan(id, wanted));
                if done { Ok(()) } else { Err(Refused) }
            }
            VIRTIO_NET_CTRL_ANNOUNCE if u32::from(code) == VIRTIO_NET_CTRL_ANNOUNCE_ACK => {
                has(VIRTIO_NET_F_GUEST_ANNOUNCE)?;
                only::<0>(&mut command)?;
                self.shared.announced();
                Ok(())
            }
            VIRTIO_NET_CTRL_MQ if u32::from(code) == VIRTIO_NET_CTRL_MQ_VQ_PAIRS_SET => {
                has(VIRTIO_NET_F_MQ)?;
                self.set_pairs(u16::from_le_bytes(only(&mut command)?))
            }
            VIRTIO_NET_CTRL_GUEST_OFFLOADS if u32::from(code) == VIRTIO_NET_CTRL_GUEST_OFFLOADS_SET => {
                has(VIRTIO_NET_F_CTRL_GUEST_OFFLOADS)?;
                self.set_offloads(u64::from_le_bytes(only(&mut command)?))
            }
            _ => Err(Refused),
        }
    }

    fn receive_mode(
        &self,
        code: u32,
        command: &mut GuestBuffers<'_>,
        has: &dyn Fn(u32) -> Result<(), Refused>,
    ) -> Result<(), Refused> {
        let basic = matches!(code, VIRTIO_NET_CTRL_RX_PROMISC | VIRTIO_NET_CTRL_RX_ALLMULTI);
        has(if basic { VIRTIO_NET_F_CTRL_RX } else { VIRTIO_NET_F_CTRL_RX_EXTRA })?;
        let [on] = only::<1>(command)?;
        self.shared.change_filter(|filter| {
            let mode = match code {
                VIRTIO_NET_CTRL_RX_PROMISC => &mut filter.promiscuous,
                VIRTIO_NET_CTRL_RX_ALLMULTI => &mut filter.all_multicast,
                VIRTIO_NET_CTRL_RX_ALLUNI => &mut filter.all_unicast,
                VIRTIO_NET_CTRL_RX_NOMULTI => &mut filter.no_multicast,
                VIRTIO_NET_CTRL_RX_NOUNI => &mut filter.no_unicast,
                VIRTIO_NET_CTRL_RX_NOBCAST => &mut filter.no_broadcast,
                _ => return Err(Refused),
            };
            *mode = on != 0;
            Ok(())
        })
    }

    fn set_pairs(&self, pairs: u16) -> Result<(), Refused> {
        if pairs == 0 || usize::from(pairs) > self.taps.len() {
            return Err(Refused);
        }
        if self.shared.pairs() == pairs {
            return Ok(());
        }
        self.ask_the_kernel()?;
        attach(self.taps, pairs);
        self.shared.set_pairs(pairs);
        Ok(())
    }

    fn set_offloads(&self, offloads: u64) -> Result<(), Refused> {
        if offloads & !(self.features & OFFLOADS) != 0 {
            return Err(Refused);
        }
        if self.shared.offloads() == offloads {
            return Ok(());
        }
        self.ask_the_kernel()?;
        let [tap, ..] = self.taps else { return Err(Refused) };
        tap.offload(offloads).map_err(|error| {
            log::warn!("tap: offloads {offloads:#x}: {error}");
            Refused
        })?;
        self.shared.set_offloads(offloads);
        Ok(())
    }

    /// Whether the guest may ask the host's kernel for one more change.
    fn ask_the_kernel(&self) -> Result<(), Refused> {
        let now = Instant::now();
        if !self.changes.wait(now).is_zero() {
            return Err(Refused);
        }
        self.changes.take(0, now);
        Ok(())
    }
}

/// Has the host spread frames over the first `pairs` queues of the tap.
pub(super) fn attach(taps: &[Arc<Tap>], pairs: u16) {
    // One queue alone has no such switch; the first is always attached.
    for (index, tap) in taps.iter().enumerate().skip(1) {
        if let Err(error) = tap.attach(index < usize::from(pairs)) {
            log::warn!("tap: queue {index}: {error}");
        }
    }
}

/// The rest of a command, which has that length.
fn only<const N: usize>(command: &mut GuestBuffers<'_>) -> Result<[u8; N], Refused> {
    if command.len() == N { command.read::<N>().ok_or(Refused) } else { Err(Refused) }
}

/// A table of addresses (`struct virtio_net_ctrl_mac`), of which no more are looked at
/// than are kept.
fn addresses(command: &mut GuestBuffers<'_>) -> Result<Addresses, Refused> {
    let count = u32::from_le_bytes(command.read().ok_or(Refused)?);
    let bytes = usize::try_from(count).ok().and_then(|count| count.checked_mul(6)).ok_or(Refused)?;
    if bytes > command.len() {
        return Err(Refused);
    }
    let mut table = command.take(bytes);
    Ok(std::iter::from_fn(|| table.read::<6>()).collect())
}
