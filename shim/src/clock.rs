//! Keeps the guest's wall clock with the host's.
//!
//! A guest is told the time when its sandbox is set up. From there on its clock
//! runs at the rate the machine has, without the corrections the host gets, and
//! it does not see when somebody sets the host's clock or the host slept.

use std::{
    io,
    os::fd::{AsFd, AsRawFd, RawFd},
    sync::Arc,
    time::{Duration, Instant, SystemTime, UNIX_EPOCH},
};

use nix::sys::timerfd::{ClockId, Expiration, TimerFd, TimerFlags, TimerSetTimeFlags};
use tokio::{
    io::{Interest, unix::AsyncFd},
    sync::Notify,
    task::JoinHandle,
};

use crate::agent::{Agent, AgentError, nanoseconds};

/// How often the guest is told the time. Clocks drift by up to 0.5 ms a second.
const TELL: Duration = Duration::from_secs(60);
/// And first: what it was told when its sandbox was set up it has heard in the middle of
/// other work.
const TELL_FIRST: Duration = Duration::from_secs(1);
/// Where the answer takes longer, what it says may be old, or new: it is asked
/// again.
const PROMPT: Duration = Duration::from_millis(20);
/// How often at most, on a host that is that busy.
const TRIES: usize = 8;

/// The task that keeps one guest's clock; ends with this value.
#[derive(Debug)]
pub struct Keeper {
    task: JoinHandle<()>,
    resumed: Arc<Notify>,
}

impl Keeper {
    /// Begins.
    pub fn start(agent: Agent) -> Self {
        let resumed = Arc::new(Notify::new());
        let told = Arc::clone(&resumed);
        let keep = async move {
            if let Err(error) = keep(agent, &told).await {
                log::error!("the guest's clock is not kept: {error}");
            }
        };
        Self { task: tokio::spawn(keep), resumed }
    }

    /// The guest stood still: it is told the time at once.
    pub fn resumed(&self) {
        self.resumed.notify_one();
    }
}

impl Drop for Keeper {
    fn drop(&mut self) {
        self.task.abort();
    }
}

/// A timer the event loop can watch.
#[derive(Debug)]
struct Timer(TimerFd);

impl AsRawFd for Timer {
    fn as_raw_fd(&self) -> RawFd {
        self.0.as_fd().as_raw_fd()
    }
}

async fn keep(agent: Agent, resumed: &Notify) -> io::Result<()> {
    let timer = watch(new_timer()?)?;
    let mut after = TELL_FIRST;
    loop {
        set(timer.get_ref(), after)?;
        after = TELL;
        tokio::select! {
            ready = timer.readable() => ready?.clear_ready(),
            () = resumed.notified() => {}
        }
        tell(&agent).await;
    }
}

fn new_timer() -> io::Result<Timer> {
    let flags = TimerFlags::TFD_CLOEXEC | TimerFlags::TFD_NONBLOCK;
    Ok(Timer(TimerFd::new(ClockId::CLOCK_REALTIME, flags)?))
}

fn watch(timer: Timer) -> io::Result<AsyncFd<Timer>> {
    // SAFETY: the AsyncFd owns the timer, whose descriptor stays open and the same.
    unsafe { AsyncFd::register_with_interest(timer, Interest::READABLE) }.map_err(io::Error::from)
}

/// Makes the timer readable after so long, and at once when the host's clock is
/// set or the host wakes up.
fn set(Timer(timer): &Timer, after: Duration) -> io::Result<()> {
    let flags = TimerSetTimeFlags::TFD_TIMER_ABSTIME | TimerSetTimeFlags::TFD_TIMER_CANCEL_ON_SET;
    let at = wall_clock().saturating_add(after);
    match timer.set(Expiration::OneShot(at.into()), flags) {
        // The clock was set in between; the timer is set all the same (timerfd_settime(2)).
        Ok(()) | Err(nix::errno::Errno::ECANCELED) => Ok(()),
        Err(errno) => Err(errno.into()),
    }
}

async fn tell(agent: &Agent) {
    let told = async {
        let behind = how_far_behind(agent).await?;
        agent.adjust_clock(behind).await
    };
    // Whoever needs the guest for something else says what is wrong with it.
    if let Err(error) = told.await {
        log::debug!("set the guest's clock: {error}");
    }
}

/// By how many nanoseconds the guest's clock is behind the host's, or ahead (below 0): as the answer that came soonest
/// says, which was given half way between its question and its arrival, give or take the other half.
async fn how_far_behind(agent: &Agent) -> Result<i64, AgentError> {
    let (mut soonest, mut behind) = (Duration::MAX, 0);
    for _ in 0..TRIES {
        let begun = Instant::now();
        let guest = agent.adjust_clock(0).await?;
        let took = begun.elapsed();
        if took < soonest {
            soonest = took;
            behind = nanoseconds(wall_clock().saturating_sub(took / 2)).saturating_sub(guest);
        }
        if soonest <= PROMPT {
            break;
        }
    }
    Ok(behind)
}

/// The wall clock, from the epoch.
pub fn wall_clock() -> Duration {
    SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_timer_counts_from_now_on() {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        runtime.block_on(async {
            let timer = watch(new_timer().unwrap()).unwrap();
            for _ in 0..2 {
                let begun = Instant::now();
                set(timer.get_ref(), Duration::from_millis(50)).unwrap();
                timer.readable().await.unwrap().clear_ready();
                assert!(begun.elapsed() >= Duration::from_millis(45), "{:?}", begun.elapsed());
            }
        });
    }
}
