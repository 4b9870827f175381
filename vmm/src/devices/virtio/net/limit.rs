//! Rate limits: token buckets that may be owed to.
//!
//! What a frame takes is known when it is there, and it is not cut in two: it passes
//! while a bucket has anything left, and what it takes beyond that is waited for
//! before the next. So the average is kept, and no frame is too large to ever pass.

use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use rvm_protocol::vmm::{RateLimit, TokenBucket};

const NANOSECONDS: u128 = 1_000_000_000;
/// Longest wait before a bucket is looked at again.
const LONGEST_WAIT: u64 = NANOSECONDS as u64;

/// A bucket, told by when it is full again: a time says both how much is in it and
/// how fast it fills.
#[derive(Debug)]
struct Bucket {
    per_second: u128,
    /// Nanoseconds it takes to fill.
    depth: u128,
    /// When it is full, in nanoseconds since its making.
    full: u128,
    made: Instant,
}

impl Bucket {
    fn new(config: TokenBucket, now: Instant) -> Self {
        let per_second = u128::from(config.per_second.max(1));
        Self { per_second, depth: u128::from(config.burst) * NANOSECONDS / per_second, full: 0, made: now }
    }

    fn age(&self, now: Instant) -> u128 {
        now.saturating_duration_since(self.made).as_nanos()
    }

    /// How long it is empty; zero where something is left.
    fn wait(&self, now: Instant) -> Duration {
        let empty_for = self.full.saturating_sub(self.age(now) + self.depth);
        Duration::from_nanos(u64::try_from(empty_for).map_or(LONGEST_WAIT, |wait| wait.min(LONGEST_WAIT)))
    }

    fn take(&mut self, count: u64, now: Instant) {
        let taken = u128::from(count) * NANOSECONDS / self.per_second;
        self.full = self.full.max(self.age(now)).saturating_add(taken);
    }
}

/// What may pass in one direction of a device, whatever its queues.
#[derive(Debug)]
pub(super) struct Limit(Mutex<Buckets>);

#[derive(Debug)]
struct Buckets {
    bytes: Option<Bucket>,
    packets: Option<Bucket>,
}

impl Limit {
    pub(super) fn new(config: RateLimit, now: Instant) -> Self {
        let bucket = |config: Option<TokenBucket>| config.map(|config| Bucket::new(config, now));
        Self(Mutex::new(Buckets { bytes: bucket(config.bytes), packets: bucket(config.packets) }))
    }

    /// How long nothing may pass; zero where a frame may.
    pub(super) fn wait(&self, now: Instant) -> Duration {
        let buckets = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let both = buckets.bytes.iter().chain(&buckets.packets);
        both.map(|bucket| bucket.wait(now)).max().unwrap_or_default()
    }

    /// A frame of so many bytes has passed.
    pub(super) fn take(&self, bytes: u64, now: Instant) {
        let mut buckets = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(bucket) = &mut buckets.bytes {
            bucket.take(bytes, now);
        }
        if let Some(bucket) = &mut buckets.packets {
            bucket.take(1, now);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn limit(bytes: Option<(u64, u64)>, packets: Option<(u64, u64)>) -> (Limit, Instant) {
        let bucket = |(per_second, burst)| TokenBucket { per_second, burst };
        let now = Instant::now();
        (Limit::new(RateLimit { bytes: bytes.map(bucket), packets: packets.map(bucket) }, now), now)
    }

    /// Frames of `bytes` that pass within `seconds`, looked at each millisecond.
    fn passed(limit: &Limit, start: Instant, bytes: u64, seconds: u64) -> u64 {
        let mut count = 0;
        for millisecond in 0..seconds * 1000 {
            let now = start + Duration::from_millis(millisecond);
            while limit.wait(now).is_zero() {
                limit.take(bytes, now);
                count += 1;
            }
        }
        count
    }

    #[test]
    fn the_average_is_kept_whatever_the_frames_size() {
        // A full bucket and nine more seconds of it, and at most one frame owed.
        for (bytes, least) in [(100, 101), (1500, 7), (65_536, 1)] {
            let (limit, now) = limit(Some((1000, 1000)), None);
            let count = passed(&limit, now, bytes, 10);
            assert!(count * bytes <= 11_000 + bytes && count >= 10_000 / bytes, "{bytes}: {count}");
            assert!(count >= least, "{bytes}: {count}");
        }
        let (limit, now) = limit(Some((1_000_000, 1)), Some((10, 5)));
        let count = passed(&limit, now, 60, 10);
        assert!((104..=106).contains(&count), "{count}");
    }

    #[test]
    fn extremes_neither_overflow_nor_divide_by_zero() {
        for (per_second, burst) in [(0, 0), (1, u64::MAX), (u64::MAX, u64::MAX), (u64::MAX, 1), (1, 1)] {
            let (limit, now) = limit(Some((per_second, burst)), None);
            limit.take(u64::MAX, now);
            limit.take(u64::MAX, now);
            assert!(limit.wait(now) <= Duration::from_secs(1));
        }
    }
}
