//! Filling buffers with entropy.

use std::io;

use vmm_sys_util::epoll::{Epoll, EpollEvent};

use super::{MAX_REQUEST_BYTES, RngError};
use crate::devices::virtio::ring::{GuestBuffers, Ring};
use crate::devices::virtio::worker::Handler;
use crate::memory::GuestRam;

pub(super) struct RngWorker {
    memory: GuestRam,
    ring: Ring,
}

impl RngWorker {
    pub(super) fn new(memory: GuestRam, ring: Ring) -> Self {
        Self { memory, ring }
    }
}

impl Handler for RngWorker {
    type Error = RngError;

    fn register(&mut self, epoll: &Epoll) -> io::Result<()> {
        self.ring.register(epoll, 0)
    }

    fn handle(&mut self, _epoll: &Epoll, _ready: &[EpollEvent]) -> Result<(), RngError> {
        // A malformed request gets no bytes.
        self.ring.serve(&self.memory, |chain| match GuestBuffers::from_chain(&self.memory, chain) {
            Ok((_, mut buffers)) => fill(&buffers.take(MAX_REQUEST_BYTES)),
            Err(_) => 0,
        })?;
        Ok(())
    }
}

/// Fills `buffers` from the host's generator; returns how many bytes it gave.
fn fill(buffers: &GuestBuffers<'_>) -> u32 {
    let mut filled = 0;
    for piece in buffers.iovecs() {
        // SAFETY: the piece is mapped guest memory, writable for `iov_len` bytes.
        let count = unsafe { libc::getrandom(piece.iov_base, piece.iov_len, 0) };
        match u32::try_from(count) {
            Ok(count) => filled += count,
            Err(_) => break,
        }
        if count.cast_unsigned() < piece.iov_len {
            break;
        }
    }
    filled
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::devices::virtio::test_queue::{TestQueue, WRITE};
    use crate::devices::virtio::{VirtioDevice, rng::Rng};

    #[test]
    fn buffers_are_filled_up_to_the_cap() {
        let mut queue = TestQueue::new();
        let mut rng = Rng::new();
        rng.activate(queue.activation(1, 0)).unwrap();

        queue.send(0, &[(0x1_0000, 64, WRITE), (0x1_1000, 32, WRITE)]);
        assert_eq!(queue.wait_used(0), 96);
        assert_ne!(queue.read(0x1_0000, 64), [0; 64]);
        assert_ne!(queue.read(0x1_1000, 32), [0; 32]);

        queue.send(0, &[(0x1_0000, 0x8000, WRITE)]);
        assert_eq!(queue.wait_used(0) as usize, MAX_REQUEST_BYTES);
    }

    #[test]
    fn malformed_requests_get_nothing_and_the_next_is_served() {
        let mut queue = TestQueue::new();
        let mut rng = Rng::new();
        rng.activate(queue.activation(1, 0)).unwrap();
        // Readable only, outside memory, empty.
        queue.send(0, &[(0x1_0000, 64, 0)]);
        assert_eq!(queue.wait_used(0), 0);
        queue.send(0, &[(u64::MAX - 3, 64, WRITE)]);
        assert_eq!(queue.wait_used(0), 0);
        queue.send(0, &[(0x1_0000, 0, WRITE)]);
        assert_eq!(queue.wait_used(0), 0);
        queue.send_loop(0, 0x1_0000, WRITE);
        assert_eq!(queue.wait_used(0), 0);
        queue.send(0, &[(0x1_0000, 8, WRITE)]);
        assert_eq!(queue.wait_used(0), 8);
    }

    #[test]
    fn a_device_can_be_reset_and_activated_again() {
        let mut queue = TestQueue::new();
        let mut rng = Rng::new();
        for _ in 0..2 {
            rng.activate(queue.activation(1, 0)).unwrap();
            queue.send(0, &[(0x1_0000, 8, WRITE)]);
            assert_eq!(queue.wait_used(0), 8);
            queue.reset();
        }
    }
}
