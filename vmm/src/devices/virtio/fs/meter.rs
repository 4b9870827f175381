//! What a share's server has done: the round trips that its guest waited for.

use std::array;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use rvm_protocol::vmm::ShareMetrics;

/// Above every opcode there is (`enum fuse_opcode` of linux/fuse.h).
const OPCODES: usize = 64;

/// Counts what the threads of a share do; clones count together.
#[derive(Clone, Debug)]
pub struct FsMeter(Arc<Counts>);

#[derive(Debug)]
struct Counts {
    tag: String,
    messages: [AtomicU64; OPCODES],
    wakeups: AtomicU64,
    interrupts: AtomicU64,
    /// Where there is one, it is told of each request.
    #[cfg(any(test, feature = "record"))]
    recorder: std::sync::OnceLock<super::record::Recorder>,
}

impl FsMeter {
    pub(super) fn new(tag: &str) -> Self {
        Self(Arc::new(Counts {
            tag: tag.to_owned(),
            messages: array::from_fn(|_| AtomicU64::new(0)),
            wakeups: AtomicU64::new(0),
            interrupts: AtomicU64::new(0),
            #[cfg(any(test, feature = "record"))]
            recorder: std::sync::OnceLock::new(),
        }))
    }

    /// Has what is asked from now on written down, by the first recorder that it is given.
    #[cfg(any(test, feature = "record"))]
    pub(super) fn set_recorder(&self, recorder: super::record::Recorder) {
        let _ = self.0.recorder.set(recorder);
    }

    /// A request was answered with `written` bytes.
    #[cfg(any(test, feature = "record"))]
    pub(super) fn record(
        &self,
        memory: &crate::memory::GuestRam,
        chain: virtio_queue::DescriptorChain<&crate::memory::GuestRam>,
        written: usize,
    ) {
        if let Some(recorder) = self.0.recorder.get() {
            recorder.note(memory, chain, written);
        }
    }

    pub(super) fn message(&self, opcode: u32) {
        let known = usize::try_from(opcode).ok().and_then(|opcode| self.0.messages.get(opcode));
        if let Some(count) = known.or(self.0.messages.first()) {
            count.fetch_add(1, Ordering::Relaxed);
        }
    }

    pub(super) fn round(&self, interrupts: u64) {
        self.0.wakeups.fetch_add(1, Ordering::Relaxed);
        self.0.interrupts.fetch_add(interrupts, Ordering::Relaxed);
    }

    /// The counters.
    pub fn metrics(&self) -> ShareMetrics {
        let of = |count: &AtomicU64| count.load(Ordering::Relaxed);
        let messages = (0..).zip(self.0.messages.iter().map(of));
        ShareMetrics {
            tag: self.0.tag.clone(),
            messages: messages.filter(|(_, count)| *count > 0).collect(),
            wakeups: of(&self.0.wakeups),
            interrupts: of(&self.0.interrupts),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_no_opcode_is_counts_as_0() {
        let meter = FsMeter::new("rvm");
        for opcode in [1, 63, 64, u32::MAX, 1] {
            meter.message(opcode);
        }
        meter.round(3);
        let metrics = meter.metrics();
        assert_eq!(metrics.messages, [(0, 2), (1, 2), (63, 1)]);
        assert_eq!((metrics.wakeups, metrics.interrupts), (1, 3));
    }
}
