//! The interface as the transport and its owner see it.

use std::fs::File;
use std::io;
use std::sync::atomic::{AtomicU16, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use rvm_protocol::vmm::{NetConfig, NetMetrics, NetMover};
use serde_json::Value;
use virtio_bindings::virtio_net::*;
use virtio_bindings::virtio_ring::{VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC};

use super::control::{Control, OFFLOADS};
use super::filter::Filter;
use super::limit::Limit;
use super::receive::Receiver;
use super::tap::{Tap, Taps};
use super::transmit::Transmitter;
use super::vhost::Vhost;
use super::worker::{NetWorker, Pair};
use super::{CONTROL_QUEUE_SIZE, Counters, DEVICE_TYPE, NetError, NetState, QUEUE_SIZE, check};
use crate::devices::virtio::ring::Ring;
use crate::devices::virtio::{
    ActivateError, Activation, Interrupt, StateError, VirtioDevice, read_config_bytes,
};
use crate::jail::Duty;

/// Bytes of `struct virtio_net_config` up to `duplex`.
const CONFIG_BYTES: usize = 17;
/// What a veth says of itself, which the guest's interface stands for.
const SPEED_MBIT: u32 = 10_000;
const FULL_DUPLEX: u8 = 1;

/// A network interface.
pub struct Net {
    config: NetConfig,
    name: String,
    taps: Taps,
    vhost: Option<Arc<Vhost>>,
    uso: bool,
    queue_sizes: Vec<u16>,
    receive: Option<Arc<Limit>>,
    transmit: Option<Arc<Limit>>,
    shared: Arc<Shared>,
    /// The driver that is active next is one that was saved.
    restored: bool,
}

/// What the device, its threads and its owner share.
pub(super) struct Shared {
    slot: u8,
    registers: Mutex<Registers>,
    filter: Mutex<Arc<Filter>>,
    pairs: AtomicU16,
    offloads: AtomicU64,
    /// Of a device that is active.
    changed: Mutex<Option<Arc<dyn Interrupt>>>,
    mover: Mutex<(NetMover, Option<String>)>,
    pub(super) receive: Counters,
    pub(super) transmit: Counters,
}

/// What the driver reads of what changes.
#[derive(Clone, Copy)]
struct Registers {
    mac: [u8; 6],
    status: u16,
    generation: u8,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Shared {
    fn new(slot: u8, mac: [u8; 6]) -> Self {
        Self {
            slot,
            registers: Mutex::new(Registers { mac, status: VIRTIO_NET_S_LINK_UP as u16, generation: 0 }),
            filter: Mutex::new(Arc::new(Filter::new(mac, false))),
            pairs: AtomicU16::new(1),
            offloads: AtomicU64::new(0),
            changed: Mutex::new(None),
            mover: Mutex::default(),
            receive: Counters::default(),
            transmit: Counters::default(),
        }
    }

    /// As it is now. Who goes by it for a while holds up no other queue, nor the driver's
    /// commands.
    pub(super) fn filter(&self) -> Arc<Filter> {
        Arc::clone(&lock(&self.filter))
    }

    /// Those who go by it at present go on with what it was.
    pub(super) fn change_filter<T>(&self, change: impl FnOnce(&mut Filter) -> T) -> T {
        change(Arc::make_mut(&mut lock(&self.filter)))
    }

    fn set_filter(&self, filter: Filter) {
        *lock(&self.filter) = Arc::new(filter);
    }

    pub(super) fn set_mac(&self, mac: [u8; 6]) {
        self.change_filter(|filter| filter.mac = mac);
        self.change(|registers| registers.mac = mac);
    }

    /// The driver has told the network where it is.
    pub(super) fn announced(&self) {
        self.change(|registers| registers.status &= !(VIRTIO_NET_S_ANNOUNCE as u16));
    }

    pub(super) fn pairs(&self) -> u16 {
        self.pairs.load(Ordering::Relaxed)
    }

    pub(super) fn set_pairs(&self, pairs: u16) {
        self.pairs.store(pairs, Ordering::Relaxed);
    }

    pub(super) fn offloads(&self) -> u64 {
        self.offloads.load(Ordering::Relaxed)
    }

    pub(super) fn set_offloads(&self, offloads: u64) {
        self.offloads.store(offloads, Ordering::Relaxed);
    }

    pub(super) fn set_mover(&self, mover: NetMover) {
        lock(&self.mover).0 = mover;
    }

    /// The kernel does not move the frames, and why.
    pub(super) fn fall_back(&self, reason: String) {
        log::warn!("net {}: the monitor moves the frames, vhost-net does not: {reason}", self.slot);
        *lock(&self.mover) = (NetMover::UserSpace, Some(reason));
    }

    fn change(&self, change: impl FnOnce(&mut Registers)) {
        let mut registers = lock(&self.registers);
        change(&mut registers);
        registers.generation = registers.generation.wrapping_add(1);
    }

    fn status(&self) -> u16 {
        lock(&self.registers).status
    }
}

/// The owner's side of a [`Net`].
#[derive(Clone)]
pub struct NetControl(Arc<Shared>);

impl NetControl {
    /// Tells the guest whether the link is up.
    pub fn set_link(&self, up: bool) -> io::Result<()> {
        let link = VIRTIO_NET_S_LINK_UP as u16;
        if (self.0.status() & link != 0) == up {
            return Ok(());
        }
        self.0.change(|registers| registers.status ^= link);
        // A driver that comes later reads it anyway.
        lock(&self.0.changed).as_ref().map_or(Ok(()), |interrupt| interrupt.trigger())
    }

    /// Its counters.
    pub fn metrics(&self) -> NetMetrics {
        let shared = &self.0;
        let (mover, fallback) = lock(&shared.mover).clone();
        NetMetrics {
            slot: shared.slot,
            mover,
            fallback,
            receive: shared.receive.get(),
            transmit: shared.transmit.get(),
        }
    }
}

impl Net {
    /// A device on a tap, opened once per queue pair, not active; vhost-net as often
    /// where the kernel is to move the frames.
    pub fn new(config: &NetConfig, taps: Vec<File>, vhost: Vec<File>) -> Result<Self, NetError> {
        check(config, taps.len(), vhost.len())?;
        let several = taps.len() > 1;
        let queue = |(index, file)| match Tap::new(file, several) {
            Ok(tap) => Ok(Arc::new(tap)),
            Err(source) => Err(NetError::Tap { index, source }),
        };
        let taps: Taps = taps.into_iter().enumerate().map(queue).collect::<Result<_, _>>()?;
        let uso = taps.first().map_or(Ok(false), |tap| tap.has_uso());
        let uso = uso.map_err(|source| NetError::Tap { index: 0, source })?;
        let shared = Shared::new(config.slot, config.mac);
        let limited = config.receive.is_some() || config.transmit.is_some();
        let vhost = match (vhost.is_empty(), limited) {
            (true, _) => None,
            (false, true) => {
                // Asked for, and no fault of the host's.
                lock(&shared.mover).1 = Some("there is a rate limit, which the monitor keeps".into());
                None
            }
            (false, false) => match Vhost::new(vhost) {
                Ok(vhost) => Some(Arc::new(vhost)),
                Err(error) => {
                    shared.fall_back(error.to_string());
                    shared.set_mover(NetMover::Nobody);
                    None
                }
            },
        };
        let now = Instant::now();
        let limit = |limit: Option<_>| limit.map(|limit| Arc::new(Limit::new(limit, now)));
        let mut queue_sizes = vec![QUEUE_SIZE; 2 * taps.len()];
        queue_sizes.push(CONTROL_QUEUE_SIZE);
        Ok(Self {
            name: format!("net{}", config.slot),
            receive: limit(config.receive),
            transmit: limit(config.transmit),
            config: config.clone(),
            taps,
            vhost,
            uso,
            queue_sizes,
            shared: Arc::new(shared),
            restored: false,
        })
    }

    /// For its owner.
    pub fn control(&self) -> NetControl {
        NetControl(Arc::clone(&self.shared))
    }

    /// `struct virtio_net_config` (section 5.1.4).
    fn config_space(&self) -> [u8; CONFIG_BYTES] {
        let Registers { mac, status, .. } = *lock(&self.shared.registers);
        let mut config = [0; CONFIG_BYTES];
        let mut put = |offset: usize, value: &[u8]| {
            if let Some(place) = config.get_mut(offset..offset + value.len()) {
                place.copy_from_slice(value);
            }
        };
        put(0, &mac);
        put(6, &status.to_le_bytes());
        put(8, &u16::from(self.config.queue_pairs).to_le_bytes());
        put(10, &self.config.mtu.to_le_bytes());
        put(12, &SPEED_MBIT.to_le_bytes());
        put(16, &[FULL_DUPLEX]);
        config
    }

    /// What a new driver finds, or a saved one goes on with.
    fn begin(&mut self, features: u64) {
        if self.restored {
            if features & (1 << VIRTIO_NET_F_GUEST_ANNOUNCE) != 0 {
                // It may be somewhere else.
                self.shared.change(|registers| registers.status |= VIRTIO_NET_S_ANNOUNCE as u16);
            }
            return;
        }
        let by_vlan = features & (1 << VIRTIO_NET_F_CTRL_VLAN) != 0;
        self.shared.set_filter(Filter::new(self.config.mac, by_vlan));
        self.shared.set_pairs(1);
        self.shared.set_offloads(features & OFFLOADS);
    }
}

impl VirtioDevice for Net {
    fn device_type(&self) -> u32 {
        DEVICE_TYPE
    }

    fn name(&self) -> &str {
        &self.name
    }

    /// Receiving and transmitting in turn, and the control queue.
    fn queue_sizes(&self) -> &[u16] {
        &self.queue_sizes
    }

    fn features(&self) -> u64 {
        let mut features: u64 = [
            VIRTIO_RING_F_EVENT_IDX,
            VIRTIO_RING_F_INDIRECT_DESC,
            VIRTIO_NET_F_CSUM,
            VIRTIO_NET_F_GUEST_CSUM,
            VIRTIO_NET_F_CTRL_GUEST_OFFLOADS,
            VIRTIO_NET_F_MAC,
            VIRTIO_NET_F_GUEST_TSO4,
            VIRTIO_NET_F_GUEST_TSO6,
            VIRTIO_NET_F_GUEST_ECN,
            VIRTIO_NET_F_HOST_TSO4,
            VIRTIO_NET_F_HOST_TSO6,
            VIRTIO_NET_F_HOST_ECN,
            VIRTIO_NET_F_MRG_RXBUF,
            VIRTIO_NET_F_STATUS,
            VIRTIO_NET_F_CTRL_VQ,
            VIRTIO_NET_F_CTRL_RX,
            VIRTIO_NET_F_CTRL_RX_EXTRA,
            VIRTIO_NET_F_CTRL_VLAN,
            VIRTIO_NET_F_CTRL_MAC_ADDR,
            VIRTIO_NET_F_GUEST_ANNOUNCE,
            VIRTIO_NET_F_SPEED_DUPLEX,
        ]
        .iter()
        .fold(0, |features, bit| features | 1 << bit);
        if self.config.mtu != 0 {
            features |= 1 << VIRTIO_NET_F_MTU;
        }
        if self.taps.len() > 1 {
            features |= 1 << VIRTIO_NET_F_MQ;
        }
        if self.uso {
            features |=
                1 << VIRTIO_NET_F_HOST_USO | 1 << VIRTIO_NET_F_GUEST_USO4 | 1 << VIRTIO_NET_F_GUEST_USO6;
        }
        features
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        read_config_bytes(&self.config_space(), offset, data);
    }

    fn config_generation(&self) -> u8 {
        lock(&self.shared.registers).generation
    }

    /// One per queue pair; where the kernel moves the frames, one for all.
    fn threads(&self) -> usize {
        if self.vhost.is_some() { 1 } else { self.taps.len() }
    }

    fn duty(&self) -> Duty {
        Duty::Net
    }

    fn activate(&mut self, activation: Activation) -> Result<(), ActivateError> {
        let Activation { memory, queues, features, config_interrupt, threads } = activation;
        let mut rings: Vec<_> =
            queues.into_iter().map(|queue| queue.map(|queue| Ring::new(queue, features))).collect();
        let mut take = |index: usize| rings.get_mut(index).and_then(Option::take);
        let has = |feature: u32| features & (1 << feature) != 0;
        let several = has(VIRTIO_NET_F_MQ);
        // Section 5.1.2: without MQ it is the third.
        let control =
            take(if several { 2 * self.taps.len() } else { 2 }).filter(|_| has(VIRTIO_NET_F_CTRL_VQ));
        let mut pairs = Vec::new();
        let used = if several { self.taps.len() } else { 1 };
        for (index, tap) in self.taps.iter().take(used).enumerate() {
            match (take(2 * index), take(2 * index + 1)) {
                (Some(rx), Some(tx)) => {
                    let (receive, transmit) = (self.receive.clone(), self.transmit.clone());
                    let mergeable = has(VIRTIO_NET_F_MRG_RXBUF);
                    let rx = Receiver::new(rx, Arc::clone(tap), receive, mergeable);
                    pairs.push(Pair::new(index, rx, Transmitter::new(tx, Arc::clone(tap), transmit)));
                }
                (rx, _) if index == 0 => {
                    return Err(ActivateError::MissingQueue(usize::from(rx.is_some())));
                }
                // The driver does not want as many.
                _ => {}
            }
        }
        self.begin(features);
        let control = control
            .map(|ring| Control::new(ring, Arc::clone(&self.shared), Arc::clone(&self.taps), features));
        // The first has the control queue and sets the tap up.
        let mut first = Some((control, features));
        let alone = self.vhost.is_some();
        while !pairs.is_empty() {
            let count = if alone { pairs.len() } else { 1 };
            let worker = NetWorker::new(
                memory.clone(),
                Arc::clone(&self.shared),
                Arc::clone(&self.taps),
                pairs.drain(..count).collect(),
                first.take(),
                self.vhost.clone(),
            );
            threads.start(worker).map_err(ActivateError::Worker)?;
        }
        let announce = self.shared.status() & VIRTIO_NET_S_ANNOUNCE as u16 != 0;
        *lock(&self.shared.changed) = Some(Arc::clone(&config_interrupt));
        if announce {
            config_interrupt.trigger().map_err(ActivateError::Worker)?;
        }
        Ok(())
    }

    fn save(&self) -> Result<Value, StateError> {
        let NetConfig { mac, queue_pairs, mtu, .. } = self.config;
        let state = NetState {
            mac,
            queue_pairs,
            mtu,
            link: self.shared.status() & VIRTIO_NET_S_LINK_UP as u16 != 0,
            filter: Filter::clone(&self.shared.filter()),
            pairs: self.shared.pairs(),
            offloads: self.shared.offloads(),
        };
        Ok(serde_json::to_value(state)?)
    }

    fn restore(&mut self, state: Value) -> Result<(), StateError> {
        let NetState { mac, queue_pairs, mtu, link, filter, pairs, offloads } =
            serde_json::from_value(state)?;
        let ours = &self.config;
        if (mac, queue_pairs, mtu) != (ours.mac, ours.queue_pairs, ours.mtu) {
            let text = |mac: [u8; 6]| mac.map(|byte| format!("{byte:02x}")).join(":");
            return Err(StateError::Other(format!(
                "the interface has mac {}, queue_pairs {}, mtu {}; the snapshot's had {}, {queue_pairs}, {mtu}",
                text(ours.mac),
                ours.queue_pairs,
                ours.mtu,
                text(mac),
            )));
        }
        self.shared.change(|registers| {
            registers.mac = filter.mac;
            registers.status = if link { VIRTIO_NET_S_LINK_UP as u16 } else { 0 };
        });
        self.shared.set_filter(filter);
        self.shared.set_pairs(pairs.clamp(1, self.taps.len() as u16));
        self.shared.set_offloads(offloads & OFFLOADS);
        self.restored = true;
        Ok(())
    }

    fn reset(&mut self) {
        *lock(&self.shared.changed) = None;
        self.restored = false;
        // A driver that comes anew finds the address it was given.
        let mac = self.config.mac;
        self.shared.change(|registers| {
            registers.mac = mac;
            registers.status &= !(VIRTIO_NET_S_ANNOUNCE as u16);
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn queues_go_by_the_filter_side_by_side_and_a_command_waits_for_none() {
        let (first, second) = ([2, 0, 0, 0, 0, 1], [2, 0, 0, 0, 0, 2]);
        let shared = Shared::new(0, first);
        // Each as a queue holds it for a round.
        let rounds = [shared.filter(), shared.filter()];
        shared.set_mac(second);
        shared.change_filter(|filter| filter.promiscuous = false);
        assert!(rounds.iter().all(|filter| filter.mac == first && filter.promiscuous));
        let next = shared.filter();
        assert!(next.mac == second && !next.promiscuous);
    }
}
