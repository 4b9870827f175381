//! The thread of an active device: an epoll loop that ends on request.

use std::io;
use std::thread::{self, JoinHandle};

use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

/// Events taken from epoll at once; more wait for the next round.
const MAX_EVENTS: usize = 32;
/// Token of the stop event; handlers use smaller ones.
const STOP: u64 = u64::MAX;

/// What a device does on its thread.
pub trait Handler: Send + 'static {
    /// Why a device stops serving for good, e.g. a ring that makes no sense.
    type Error: std::error::Error + Send;

    /// Registers the device's descriptors, with tokens of its choice.
    fn register(&mut self, epoll: &Epoll) -> io::Result<()>;

    /// Prepares the thread, on the thread; an error ends it.
    fn start(&mut self) -> io::Result<()> {
        Ok(())
    }

    /// Serves what became ready, in bounded time. An error ends the thread:
    /// the driver gets no more answers until it resets the device.
    fn handle(&mut self, epoll: &Epoll, ready: &[EpollEvent]) -> Result<(), Self::Error>;

    /// Called last, when the thread is asked to end.
    fn finish(&mut self, _epoll: &Epoll) {}
}

/// A running thread; dropping it stops and joins the thread.
#[derive(Debug)]
pub struct Worker {
    stop: EventFd,
    thread: Option<JoinHandle<()>>,
}

impl Worker {
    /// Starts `handler` on a thread called `name` (at most 15 bytes are shown).
    pub fn spawn<H: Handler>(name: &str, mut handler: H) -> io::Result<Self> {
        let epoll = Epoll::new()?;
        let stop = EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC)?;
        add(&epoll, &stop, EventSet::IN, STOP)?;
        handler.register(&epoll)?;
        let thread = thread::Builder::new().name(name.to_owned()).spawn(move || serve(&epoll, handler))?;
        Ok(Self { stop, thread: Some(thread) })
    }
}

impl Drop for Worker {
    fn drop(&mut self) {
        // Writing 1 to an eventfd fails only when its counter is full, and then
        // the thread sees it readable all the same.
        let _ = self.stop.write(1);
        if let Some(thread) = self.thread.take()
            && thread.join().is_err()
        {
            log::error!("a device's thread panicked");
        }
    }
}

/// Adds `fd` to `epoll`.
pub fn add(epoll: &Epoll, fd: &impl std::os::fd::AsRawFd, events: EventSet, token: u64) -> io::Result<()> {
    epoll.ctl(ControlOperation::Add, fd.as_raw_fd(), EpollEvent::new(events, token))
}

fn serve<H: Handler>(epoll: &Epoll, mut handler: H) {
    if let Err(error) = handler.start() {
        log::error!("device does not start: {error}");
        return;
    }
    let mut events = [EpollEvent::default(); MAX_EVENTS];
    loop {
        let ready = match epoll.wait(-1, &mut events) {
            Ok(count) => events.get(..count).unwrap_or(&[]),
            Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
            Err(error) => {
                log::error!("device stops: epoll: {error}");
                return;
            }
        };
        if ready.iter().any(|event| event.data() == STOP) {
            return handler.finish(epoll);
        }
        if let Err(error) = handler.handle(epoll, ready) {
            log::error!("device stops: {error}");
            return;
        }
    }
}

#[cfg(test)]
mod tests {
    use std::convert::Infallible;
    use std::sync::mpsc::{Sender, channel};
    use std::time::Duration;

    use super::*;

    struct Echo {
        kick: EventFd,
        seen: Sender<u64>,
    }

    impl Handler for Echo {
        type Error = Infallible;

        fn register(&mut self, epoll: &Epoll) -> io::Result<()> {
            add(epoll, &self.kick, EventSet::IN, 7)
        }

        fn handle(&mut self, _epoll: &Epoll, ready: &[EpollEvent]) -> Result<(), Infallible> {
            for event in ready {
                self.kick.read().unwrap();
                self.seen.send(event.data()).unwrap();
            }
            Ok(())
        }
    }

    #[test]
    fn events_reach_the_handler_and_drop_ends_the_thread() {
        let kick = EventFd::new(EFD_NONBLOCK).unwrap();
        let (seen, received) = channel();
        let worker = Worker::spawn("echo", Echo { kick: kick.try_clone().unwrap(), seen }).unwrap();
        kick.write(1).unwrap();
        assert_eq!(received.recv_timeout(Duration::from_secs(5)).unwrap(), 7);
        drop(worker);
        // The handler, and with it the sender, is gone.
        assert!(received.recv().is_err());
    }
}
