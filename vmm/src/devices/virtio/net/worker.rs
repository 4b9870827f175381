//! A thread of the interface: pairs of queues, and on one of them the control queue.

use std::io;
use std::os::fd::AsRawFd;
use std::sync::Arc;
use std::time::Duration;

use rvm_protocol::vmm::{NetCounts, NetMover};
use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};
use vmm_sys_util::timerfd::TimerFd;

use super::NetError;
use super::control::{Control, attach};
use super::device::Shared;
use super::receive::{Receiver, Waits};
use super::tap::Taps;
use super::transmit::Transmitter;
use super::vhost::Vhost;
use crate::devices::virtio::ring::{Ring, RingError};
use crate::devices::virtio::worker::{Handler, add};
use crate::memory::GuestRam;

const CONTROL: u64 = 0;
const TROUBLE: u64 = 1;
/// Tokens of the pairs, so many each.
const FIRST_PAIR: u64 = 8;
const TOKENS: u64 = 8;
const RX: u64 = 0;
const TX: u64 = 1;
const TAP: u64 = 2;
const RX_TIMER: u64 = 3;
const TX_TIMER: u64 = 4;

/// A receiving and a transmitting queue, and the tap's queue they belong to.
pub(super) struct Pair {
    index: usize,
    rx: Receiver,
    tx: Transmitter,
    rx_timer: Timer,
    tx_timer: Timer,
    /// Epoll is to tell of frames on the tap.
    listens: bool,
    rx_due: bool,
    tx_due: bool,
}

/// For a direction with a limit.
#[derive(Default)]
struct Timer(Option<TimerFd>);

impl Timer {
    fn register(&mut self, epoll: &Epoll, token: u64) -> io::Result<()> {
        let timer = TimerFd::new().map_err(|error| io::Error::from_raw_os_error(error.errno()))?;
        // Never read: every expiry is an edge.
        add(epoll, &timer, EventSet::IN | EventSet::EDGE_TRIGGERED, token)?;
        self.0 = Some(timer);
        Ok(())
    }

    fn set(&mut self, wait: Duration) -> Result<(), NetError> {
        let Some(timer) = &mut self.0 else { return Ok(()) };
        timer.reset(wait, None).map_err(|error| NetError::Events(io::Error::from_raw_os_error(error.errno())))
    }
}

impl Pair {
    pub(super) fn new(index: usize, rx: Receiver, tx: Transmitter) -> Self {
        let (rx_timer, tx_timer) = (Timer::default(), Timer::default());
        Self { index, rx, tx, rx_timer, tx_timer, listens: true, rx_due: true, tx_due: true }
    }

    fn token(&self, which: u64) -> u64 {
        FIRST_PAIR + TOKENS * self.index as u64 + which
    }

    /// Has the monitor move its frames from now on.
    fn register(&mut self, epoll: &Epoll) -> io::Result<()> {
        self.rx.ring().register(epoll, self.token(RX))?;
        self.tx.ring().register(epoll, self.token(TX))?;
        add(epoll, self.rx.tap(), EventSet::IN | EventSet::EDGE_TRIGGERED, self.token(TAP))?;
        self.listens = true;
        if self.rx.is_limited() {
            self.rx_timer.register(epoll, self.token(RX_TIMER))?;
        }
        if self.tx.is_limited() {
            self.tx_timer.register(epoll, self.token(TX_TIMER))?;
        }
        // What there is already.
        self.rx.ring().kick_again();
        self.tx.ring().kick_again();
        Ok(())
    }

    fn ready(&mut self, which: u64) {
        match which {
            RX | TAP | RX_TIMER => self.rx_due = true,
            _ => self.tx_due = true,
        }
    }

    fn work(&mut self, epoll: &Epoll, memory: &GuestRam, shared: &Shared) -> Result<(), NetError> {
        if std::mem::take(&mut self.rx_due) {
            let mut counts = NetCounts { wakeups: 1, ..NetCounts::default() };
            let waits = self.rx.work(memory, &shared.filter(), &mut counts);
            shared.receive.add(counts);
            match waits? {
                Waits::Tap => self.listen(epoll, true)?,
                // Every frame that comes meanwhile would wake the thread for nothing.
                Waits::Guest => self.listen(epoll, false)?,
                Waits::Limit(wait) => {
                    self.listen(epoll, false)?;
                    self.rx_timer.set(wait)?;
                }
                Waits::Nothing => self.rx.ring().kick_again(),
            }
        }
        if std::mem::take(&mut self.tx_due) {
            let mut counts = NetCounts { wakeups: 1, ..NetCounts::default() };
            let waits = self.tx.work(memory, &mut counts);
            shared.transmit.add(counts);
            match waits? {
                Waits::Limit(wait) => self.tx_timer.set(wait)?,
                Waits::Nothing => self.tx.ring().kick_again(),
                Waits::Guest | Waits::Tap => {}
            }
        }
        Ok(())
    }

    /// Has epoll tell of frames on the tap, also of those that are there, or not.
    fn listen(&mut self, epoll: &Epoll, listens: bool) -> Result<(), NetError> {
        if self.listens != listens {
            let events = if listens { EventSet::IN } else { EventSet::empty() };
            let event = EpollEvent::new(events | EventSet::EDGE_TRIGGERED, self.token(TAP));
            let fd = self.rx.tap().as_raw_fd();
            epoll.ctl(ControlOperation::Modify, fd, event).map_err(NetError::Events)?;
            self.listens = listens;
        }
        Ok(())
    }
}

/// Pairs of an active device, and what else one of its threads does.
pub(super) struct NetWorker {
    memory: GuestRam,
    shared: Arc<Shared>,
    taps: Taps,
    pairs: Vec<Pair>,
    control: Option<Control>,
    /// What was negotiated, on the thread that sets the tap up.
    features: Option<u64>,
    vhost: Option<Arc<Vhost>>,
    /// The kernel moves the frames of the first so many pairs: of all or of none,
    /// except between two steps.
    in_kernel: usize,
}

impl NetWorker {
    pub(super) fn new(
        memory: GuestRam,
        shared: Arc<Shared>,
        taps: Taps,
        pairs: Vec<Pair>,
        first: Option<(Option<Control>, u64)>,
        vhost: Option<Arc<Vhost>>,
    ) -> Self {
        let features = first.as_ref().map(|(_, features)| *features);
        let control = first.and_then(|(control, _)| control);
        Self { memory, shared, taps, pairs, control, features, vhost, in_kernel: 0 }
    }

    /// Hands the rings to the kernel; where that fails they are the monitor's.
    fn give_to_kernel(&mut self, epoll: &Epoll) -> io::Result<()> {
        let Some(vhost) = &self.vhost else { return Ok(()) };
        let failed = self.pairs.iter().find_map(|pair| {
            let rings = [pair.rx.ring(), pair.tx.ring()];
            let started = vhost.start(pair.index, &self.memory, rings, pair.rx.tap());
            self.in_kernel += usize::from(started.is_ok());
            started.err()
        });
        match failed {
            Some(error) => self.fall_back(epoll, error.to_string()),
            None => {
                self.shared.set_mover(NetMover::Vhost);
                Ok(())
            }
        }
    }

    /// Takes the rings back from the kernel, with how far it came.
    fn take_from_kernel(&mut self) {
        let Some(vhost) = &self.vhost else { return };
        for pair in self.pairs.iter_mut().take(std::mem::take(&mut self.in_kernel)) {
            let taken = vhost.stop(pair.index).map_err(|error| error.to_string()).and_then(|[rx, tx]| {
                let back = |ring: &mut Ring, next| {
                    ring.take_over(&self.memory, next).map_err(|error: RingError| error.to_string())
                };
                back(pair.rx.ring_mut(), rx)?;
                back(pair.tx.ring_mut(), tx)
            });
            if let Err(error) = taken {
                log::error!("vhost-net: rings are not given back: {error}");
            }
        }
    }

    /// The monitor goes on where the kernel left off.
    fn fall_back(&mut self, epoll: &Epoll, reason: String) -> io::Result<()> {
        self.take_from_kernel();
        self.vhost = None;
        self.shared.fall_back(reason);
        self.pairs.iter_mut().try_for_each(|pair| pair.register(epoll))
    }

    fn begin(&mut self, epoll: &Epoll) -> io::Result<()> {
        if let Some(features) = self.features {
            if let Some(tap) = self.taps.first()
                && let Err(error) = tap.offload(self.shared.offloads() & features)
            {
                log::warn!("tap: {error}");
            }
            attach(&self.taps, self.shared.pairs());
        }
        let Some(vhost) = &self.vhost else {
            // Of several threads the one that has set up the tap says so.
            if self.features.is_some() {
                self.shared.set_mover(NetMover::UserSpace);
            }
            return self.pairs.iter_mut().try_for_each(|pair| pair.register(epoll));
        };
        match vhost.prepare(self.features.unwrap_or_default(), &self.memory) {
            Ok(()) => {
                // Of an earlier driver.
                let _ = vhost.trouble.read();
                add(epoll, &vhost.trouble, EventSet::IN | EventSet::EDGE_TRIGGERED, TROUBLE)?;
                self.give_to_kernel(epoll)
            }
            Err(error) => self.fall_back(epoll, error.to_string()),
        }
    }
}

impl Handler for NetWorker {
    type Error = NetError;

    fn register(&mut self, epoll: &Epoll) -> io::Result<()> {
        self.control.as_ref().map_or(Ok(()), |control| control.ring().register(epoll, CONTROL))
    }

    /// On the thread, since the host's kernel may take its time.
    fn start(&mut self, epoll: &Epoll) -> io::Result<()> {
        self.begin(epoll)?;
        if let Some(control) = &self.control {
            control.ring().kick_again();
        }
        Ok(())
    }

    fn handle(&mut self, epoll: &Epoll, ready: &[EpollEvent]) -> Result<(), NetError> {
        for event in ready {
            match event.data() {
                CONTROL => {
                    if let Some(control) = &mut self.control {
                        control.work(&self.memory)?;
                    }
                }
                TROUBLE => {
                    if let Some(vhost) = &self.vhost {
                        let _ = vhost.trouble.read();
                        self.fall_back(epoll, "the kernel cannot go on with the rings".into())
                            .map_err(NetError::Events)?;
                    }
                }
                token => {
                    let place = token.wrapping_sub(FIRST_PAIR);
                    let pair = self.pairs.iter_mut().find(|pair| pair.index as u64 == place / TOKENS);
                    if let Some(pair) = pair {
                        pair.ready(place % TOKENS);
                    }
                }
            }
        }
        if self.vhost.is_none() {
            for pair in &mut self.pairs {
                pair.work(epoll, &self.memory, &self.shared)?;
            }
        }
        Ok(())
    }

    fn pause(&mut self) {
        self.take_from_kernel();
    }

    fn resume(&mut self, epoll: &Epoll) {
        if let Err(error) = self.give_to_kernel(epoll) {
            log::error!("net: {error}");
        }
    }
}

/// However the work ends, the kernel does none of it any more.
impl Drop for NetWorker {
    fn drop(&mut self) {
        self.take_from_kernel();
        if self.features.is_some() {
            self.shared.set_mover(NetMover::Nobody);
        }
    }
}
