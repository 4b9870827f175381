//! The threads of a device: born with it, on the thread that makes it, and at work
//! while its driver is.
//!
//! A vCPU's thread only hands work to them and tells them to stop: it waits for
//! none, and none inherits anything of it. A pause leaves a thread in the middle of
//! its work with all it knows; to stop is to let go of it.

use std::io;
use std::sync::atomic::{AtomicBool, AtomicU8, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use super::Interrupt;
use crate::jail::{self, Duty};

/// Events taken from epoll at once; more wait for the next round.
const MAX_EVENTS: usize = 32;
/// Token of the event that has a thread look at what is asked of it; handlers use
/// smaller ones.
const ASKED: u64 = u64::MAX;
/// How long the end of a device may wait for a thread that the host keeps in a
/// system call. It is left behind then: what it uses it has a share in.
const LAST_PATIENCE: Duration = Duration::from_secs(1);

/// What a device does on a thread.
pub trait Handler: Send + 'static {
    /// Why a device stops serving for good, e.g. a ring that makes no sense.
    type Error: std::error::Error + Send;

    /// Registers the device's descriptors, with tokens of its choice.
    fn register(&mut self, epoll: &Epoll) -> io::Result<()>;

    /// Prepares the thread, on the thread; an error ends it.
    fn start(&mut self, _epoll: &Epoll) -> io::Result<()> {
        Ok(())
    }

    /// Serves what became ready, in bounded time. An error ends the work: the
    /// driver is told that only a reset helps.
    fn handle(&mut self, epoll: &Epoll, ready: &[EpollEvent]) -> Result<(), Self::Error>;

    /// The thread stands still from now on; so is to do what works for it elsewhere.
    fn pause(&mut self) {}

    /// It goes on.
    fn resume(&mut self, _epoll: &Epoll) {}

    /// Called last, when the thread is asked to stop.
    fn finish(&mut self, _epoll: &Epoll) {}
}

/// What is asked of a device's threads, for those in the middle of a queue.
#[derive(Clone, Debug, Default)]
pub struct Asked(Arc<AtomicU8>);

const RUN: u8 = 0;
const PAUSE: u8 = 1;
const STOP: u8 = 2;

impl Asked {
    /// Whether to leave the queue after this request.
    pub fn to_leave(&self) -> bool {
        self.0.load(Ordering::Relaxed) != RUN
    }

    /// Whether nobody waits for this request's answer any more.
    pub fn to_stop(&self) -> bool {
        self.0.load(Ordering::Relaxed) == STOP
    }

    fn set(&self, to: u8) {
        self.0.store(to, Ordering::Relaxed);
    }

    /// Who is to stop is not to stand still, or to go on, instead.
    fn change(&self, from: u8, to: u8) {
        let _ = self.0.compare_exchange(from, to, Ordering::Relaxed, Ordering::Relaxed);
    }
}

/// A device's threads; clones are the same threads, which end with the last.
#[derive(Clone)]
pub struct Threads(Arc<Group>);

struct Group {
    members: Vec<Worker>,
    asked: Asked,
    failure: Arc<Failure>,
    /// Nobody waits for them any more.
    given_up: AtomicBool,
}

/// Whether one has given up since the device was started, and whom to tell.
#[derive(Default)]
struct Failure {
    happened: AtomicBool,
    told: Mutex<Option<Arc<dyn Interrupt>>>,
}

impl Threads {
    /// `count` threads called `name` (at most 15 bytes are shown), with nothing to do yet.
    pub fn new(name: &str, count: usize, duty: Duty) -> io::Result<Self> {
        let members = (0..count).map(|_| Worker::spawn(name, duty)).collect::<io::Result<_>>()?;
        Ok(Self(Arc::new(Group {
            members,
            asked: Asked::default(),
            failure: Arc::default(),
            given_up: AtomicBool::new(false),
        })))
    }

    /// Before work is handed to them: `on_failure` is raised when one gives up.
    pub fn begin(&self, on_failure: Arc<dyn Interrupt>) {
        self.0.asked.set(RUN);
        self.0.failure.happened.store(false, Ordering::Relaxed);
        *self.0.failure.told.lock().unwrap_or_else(PoisonError::into_inner) = Some(on_failure);
    }

    /// Hands `handler` to one that has nothing to do.
    pub fn start<H: Handler>(&self, handler: H) -> io::Result<()> {
        let free = self.0.members.iter().find(|worker| worker.shared.is_free());
        let worker = free.ok_or_else(|| io::Error::other("all of the device's threads are busy"))?;
        let failure = Arc::clone(&self.0.failure);
        worker.shared.hand_over(Box::new(move |shared| {
            if let Err(error) = serve(shared, handler) {
                log::error!("a device stops: {error}");
                failure.tell();
            }
        }));
        Ok(())
    }

    /// For what they work on.
    pub fn asked(&self) -> Asked {
        self.0.asked.clone()
    }

    /// Whether one has given up since [`Threads::begin`].
    pub fn have_failed(&self) -> bool {
        self.0.failure.happened.load(Ordering::Relaxed)
    }

    /// Asks all to let go of their work.
    pub fn stop(&self) {
        self.0.stop();
    }

    /// Asks all to stand still.
    pub fn pause(&self) {
        self.0.asked.change(RUN, PAUSE);
        self.0.members.iter().for_each(|worker| worker.shared.ask(PAUSE));
    }

    /// Lets those that stand still go on.
    pub fn resume(&self) {
        self.0.asked.change(PAUSE, RUN);
        self.0.members.iter().for_each(|worker| worker.shared.ask(RUN));
    }

    /// Waits until none is at work; false if one still is at `until`.
    pub fn wait(&self, until: Instant) -> bool {
        self.0.members.iter().all(|worker| worker.shared.wait(until))
    }

    /// Waits like [`Threads::wait`] for those that were stopped, for the last time.
    pub fn wait_for_end(&self, until: Instant) {
        if !self.wait(until) {
            self.0.given_up.store(true, Ordering::Relaxed);
        }
    }
}

impl Group {
    fn stop(&self) {
        self.asked.set(STOP);
        self.members.iter().for_each(|worker| worker.shared.ask(STOP));
    }
}

impl Failure {
    fn tell(&self) {
        self.happened.store(true, Ordering::Relaxed);
        let told = self.told.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(Err(error)) = told.as_ref().map(|interrupt| interrupt.trigger()) {
            log::error!("the driver could not be told: {error}");
        }
    }
}

impl Drop for Group {
    fn drop(&mut self) {
        self.stop();
        let patience = if *self.given_up.get_mut() { Duration::ZERO } else { LAST_PATIENCE };
        let until = Instant::now() + patience;
        for worker in &mut self.members {
            worker.end(until);
        }
    }
}

/// One thread.
struct Worker {
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
}

type Job = Box<dyn FnOnce(&Shared) + Send>;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Doing {
    Nothing,
    Work,
    Standing,
}

struct Desk {
    job: Option<Job>,
    doing: Doing,
    asked: u8,
    /// The thread is to end when it has nothing to do.
    over: bool,
}

impl Desk {
    /// Whether something is still done, or will be: who stands still and is not to any more has not
    /// seen that yet.
    fn is_at_work(&self) -> bool {
        match self.doing {
            Doing::Nothing => false,
            Doing::Work => true,
            Doing::Standing => self.asked != PAUSE,
        }
    }
}

struct Shared {
    desk: Mutex<Desk>,
    changed: Condvar,
    /// Readable when the thread is to look at what is asked of it.
    wake: EventFd,
}

impl Worker {
    fn spawn(name: &str, duty: Duty) -> io::Result<Self> {
        let desk = Desk { job: None, doing: Doing::Nothing, asked: RUN, over: false };
        let wake = EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC)?;
        let shared = Arc::new(Shared { desk: Mutex::new(desk), changed: Condvar::new(), wake });
        let of_thread = Arc::clone(&shared);
        let thread = thread::Builder::new().name(name.to_owned()).spawn(move || {
            jail::take_up(duty);
            of_thread.live();
        })?;
        Ok(Self { shared, thread: Some(thread) })
    }

    fn end(&mut self, until: Instant) {
        self.shared.desk().over = true;
        self.shared.changed.notify_all();
        let Some(thread) = self.thread.take() else { return };
        if !self.shared.wait(until) {
            log::warn!("a device's thread is left behind: the host keeps it");
        } else if thread.join().is_err() {
            log::error!("a device's thread panicked");
        }
    }
}

impl Shared {
    fn desk(&self) -> MutexGuard<'_, Desk> {
        self.desk.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The thread: one job after the other.
    fn live(&self) {
        loop {
            let mut desk = self.desk();
            let job = loop {
                if let Some(job) = desk.job.take() {
                    break job;
                }
                if desk.over {
                    return;
                }
                desk = self.changed.wait(desk).unwrap_or_else(PoisonError::into_inner);
            };
            drop(desk);
            // Whatever becomes of it: nobody waits for work that is not done.
            let _done = Done(self);
            job(self);
        }
    }

    fn is_free(&self) -> bool {
        self.desk().doing == Doing::Nothing
    }

    fn hand_over(&self, job: Job) {
        let mut desk = self.desk();
        desk.job = Some(job);
        desk.doing = Doing::Work;
        desk.asked = RUN;
        let _ = self.wake.read();
        self.changed.notify_all();
    }

    fn ask(&self, what: u8) {
        let mut desk = self.desk();
        // A pause does not undo that it is to stop.
        if desk.doing != Doing::Nothing && desk.asked != STOP {
            desk.asked = what;
            // Fails only when the counter is full, and then it is readable all the same.
            let _ = self.wake.write(1);
            self.changed.notify_all();
        }
    }

    fn wait(&self, until: Instant) -> bool {
        let mut desk = self.desk();
        while desk.is_at_work() {
            let left = until.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return false;
            }
            desk = self.changed.wait_timeout(desk, left).unwrap_or_else(PoisonError::into_inner).0;
        }
        true
    }

    /// What is asked of the thread.
    fn asked(&self) -> u8 {
        let mut desk = self.desk();
        if desk.asked == RUN {
            desk.doing = Doing::Work;
            let _ = self.wake.read();
        }
        desk.asked
    }

    /// Stands still as long as that is asked.
    fn stand(&self) {
        let mut desk = self.desk();
        while desk.asked == PAUSE {
            desk.doing = Doing::Standing;
            self.changed.notify_all();
            desk = self.changed.wait(desk).unwrap_or_else(PoisonError::into_inner);
        }
        desk.doing = Doing::Work;
    }
}

/// Notes that a thread has nothing more to do.
struct Done<'a>(&'a Shared);

impl Drop for Done<'_> {
    fn drop(&mut self) {
        self.0.desk().doing = Doing::Nothing;
        self.0.changed.notify_all();
    }
}

/// Adds `fd` to `epoll`.
pub fn add(epoll: &Epoll, fd: &impl std::os::fd::AsRawFd, events: EventSet, token: u64) -> io::Result<()> {
    epoll.ctl(ControlOperation::Add, fd.as_raw_fd(), EpollEvent::new(events, token))
}

/// Serves until it is to stop; an error where it cannot go on.
fn serve<H: Handler>(shared: &Shared, mut handler: H) -> Result<(), String> {
    let begin = |handler: &mut H| -> io::Result<Epoll> {
        let epoll = Epoll::new()?;
        add(&epoll, &shared.wake, EventSet::IN, ASKED)?;
        handler.register(&epoll)?;
        handler.start(&epoll)?;
        Ok(epoll)
    };
    let epoll = &begin(&mut handler).map_err(|error| format!("it does not start: {error}"))?;
    let mut events = [EpollEvent::default(); MAX_EVENTS];
    loop {
        let ready = match epoll.wait(-1, &mut events) {
            Ok(count) => events.get(..count).unwrap_or(&[]),
            Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
            Err(error) => return Err(format!("epoll: {error}")),
        };
        while ready.iter().any(|event| event.data() == ASKED) {
            match shared.asked() {
                STOP => {
                    handler.finish(epoll);
                    return Ok(());
                }
                PAUSE => {
                    handler.pause();
                    shared.stand();
                    handler.resume(epoll);
                }
                _ => break,
            }
        }
        handler.handle(epoll, ready).map_err(|error| error.to_string())?;
    }
}

#[cfg(test)]
mod tests {
    use std::convert::Infallible;
    use std::sync::mpsc::{Receiver, Sender, channel};

    use super::*;

    struct Echo {
        kick: EventFd,
        seen: Sender<u64>,
        /// Held up by whoever holds it.
        held: Arc<Mutex<()>>,
    }

    impl Handler for Echo {
        type Error = io::Error;

        fn register(&mut self, epoll: &Epoll) -> io::Result<()> {
            add(epoll, &self.kick, EventSet::IN, 7)
        }

        fn handle(&mut self, _epoll: &Epoll, ready: &[EpollEvent]) -> io::Result<()> {
            for event in ready.iter().filter(|event| event.data() == 7) {
                if self.kick.read()? == 100 {
                    return Err(io::Error::other("broken"));
                }
                self.seen.send(event.data()).unwrap();
                let _held = self.held.lock();
            }
            Ok(())
        }
    }

    struct Bell(AtomicBool);

    impl Interrupt for Bell {
        fn trigger(&self) -> io::Result<()> {
            self.0.store(true, Ordering::Relaxed);
            Ok(())
        }
    }

    struct Rig {
        threads: Threads,
        kick: EventFd,
        received: Receiver<u64>,
        held: Arc<Mutex<()>>,
        bell: Arc<Bell>,
    }

    fn rig() -> Rig {
        let threads = Threads::new("echo", 1, Duty::Disk).unwrap();
        let (kick, held, bell) =
            (EventFd::new(EFD_NONBLOCK).unwrap(), Arc::default(), Arc::new(Bell(AtomicBool::new(false))));
        let (_, received) = channel();
        let mut rig = Rig { threads, kick, received, held, bell };
        rig.start();
        rig
    }

    fn soon() -> Instant {
        Instant::now() + Duration::from_secs(5)
    }

    impl Rig {
        fn start(&mut self) {
            let (seen, received) = channel();
            self.received = received;
            self.threads.begin(self.bell.clone());
            let echo = Echo { kick: self.kick.try_clone().unwrap(), seen, held: self.held.clone() };
            self.threads.start(echo).unwrap();
        }

        fn kick(&self) {
            self.kick.write(1).unwrap();
        }

        fn wait_seen(&self) {
            assert_eq!(self.received.recv_timeout(Duration::from_secs(5)).unwrap(), 7);
        }
    }

    #[test]
    fn one_thread_serves_again_after_a_stop() {
        let mut rig = rig();
        for _ in 0..3 {
            rig.kick();
            rig.wait_seen();
            rig.threads.stop();
            assert!(rig.threads.wait(soon()));
            // The handler, and with it the sender, is gone.
            assert!(rig.received.recv().is_err());
            rig.start();
        }
        assert!(rig.threads.start(Never).is_err(), "there is one thread");
    }

    struct Never;

    impl Handler for Never {
        type Error = Infallible;

        fn register(&mut self, _epoll: &Epoll) -> io::Result<()> {
            Ok(())
        }

        fn handle(&mut self, _epoll: &Epoll, _ready: &[EpollEvent]) -> Result<(), Infallible> {
            Ok(())
        }
    }

    #[test]
    fn a_pause_loses_nothing() {
        let rig = rig();
        for _ in 0..100 {
            rig.threads.pause();
            assert!(rig.threads.wait(soon()));
            rig.kick();
            rig.threads.resume();
            rig.wait_seen();
        }
        rig.threads.pause();
        assert!(rig.threads.wait(soon()));
        rig.kick();
        assert!(rig.received.recv_timeout(Duration::from_millis(20)).is_err());
        rig.threads.stop();
        assert!(rig.threads.wait(soon()), "one that stands still can be stopped");
    }

    /// The owner may pause a machine whose guest is resetting a device.
    #[test]
    fn a_pause_does_not_undo_a_stop() {
        let rig = rig();
        let held = rig.held.lock().unwrap();
        rig.kick();
        rig.wait_seen();
        rig.threads.stop();
        rig.threads.pause();
        rig.threads.resume();
        assert!(rig.threads.asked().to_stop());
        drop(held);
        assert!(rig.threads.wait(soon()), "it goes on");
    }

    #[test]
    fn who_stood_still_is_waited_for() {
        let mut rig = rig();
        for _ in 0..500 {
            rig.threads.pause();
            assert!(rig.threads.wait(soon()));
            rig.threads.resume();
            rig.threads.stop();
            assert!(rig.threads.wait(soon()));
            // It would be busy otherwise.
            rig.start();
        }
    }

    #[test]
    fn nobody_waits_longer_than_asked_for_a_thread_that_the_host_keeps() {
        let rig = rig();
        let held = rig.held.lock().unwrap();
        rig.kick();
        rig.wait_seen();
        let started = Instant::now();
        rig.threads.stop();
        assert!(!rig.threads.wait(Instant::now() + Duration::from_millis(50)));
        rig.threads.wait_for_end(Instant::now());
        drop(rig.threads);
        assert!(started.elapsed() < Duration::from_millis(900), "{:?}", started.elapsed());
        drop(held);
    }

    #[test]
    fn a_handler_that_gives_up_is_told_of() {
        let rig = rig();
        rig.kick.write(100).unwrap();
        assert!(rig.threads.wait(soon()));
        assert!(rig.threads.have_failed() && rig.bell.0.load(Ordering::Relaxed));
    }
}
