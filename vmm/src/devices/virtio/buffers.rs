//! The guest buffers in a request.
//!
//! Guest memory is shared with running vCPUs: what was read once is not read
//! again, and bytes are moved by `vm-memory`'s volatile copies or by the
//! kernel, never through Rust references.

use thiserror::Error;
use virtio_queue::DescriptorChain;
use vm_memory::{Bytes, GuestMemory, VolatileSlice};

use crate::memory::GuestRam;

/// Most pieces of guest memory one request may consist of; what Linux takes in
/// one `preadv`/`pwritev` (`UIO_MAXIOV`).
pub const MAX_PIECES: usize = 1024;

/// A request that is answered without being looked at further.
#[derive(Debug, Error, PartialEq, Eq)]
pub enum ChainError {
    /// A buffer is not in guest memory.
    #[error("a buffer lies outside guest memory")]
    OutsideMemory,
    /// The chain loops, leaves its table, or has too many pieces.
    #[error("the descriptor chain is malformed or has more than {MAX_PIECES} pieces")]
    Malformed,
    /// A device-readable buffer follows a device-writable one (section 2.7.4.2).
    #[error("a readable buffer follows a writable one")]
    Order,
}

/// A sequence of guest buffers, consumed from the front.
#[derive(Default)]
pub struct GuestBuffers<'m> {
    pieces: Vec<Piece<'m>>,
    len: usize,
}

#[derive(Clone, Copy)]
struct Piece<'m> {
    memory: VolatileSlice<'m>,
    /// Of a file's ([`GuestRam::lent`]): for the host's kernel alone to read.
    lent: bool,
}

impl<'m> Piece<'m> {
    fn own(memory: VolatileSlice<'m>) -> Self {
        Self { memory, lent: false }
    }

    fn len(&self) -> usize {
        self.memory.len()
    }

    fn split_at(&self, offset: usize) -> Option<(Self, Self)> {
        let head = self.memory.subslice(0, offset).ok()?;
        let tail = self.memory.offset(offset).ok()?;
        let piece = |memory| Self { memory, lent: self.lent };
        Some((piece(head), piece(tail)))
    }
}

impl<'m> GuestBuffers<'m> {
    /// The device-readable and the device-writable buffers of a request.
    pub fn from_chain(
        memory: &'m GuestRam,
        chain: DescriptorChain<&'m GuestRam>,
    ) -> Result<(Self, Self), ChainError> {
        Self::of_chain(memory, chain, false)
    }

    /// The same where the readable ones may also be of a file that the guest has mapped
    /// ([`GuestRam::lent`]), for a device that has the kernel read them: [`iovecs`](Self::iovecs)
    /// has these, and nothing else that reads does.
    pub fn with_lent(
        memory: &'m GuestRam,
        chain: DescriptorChain<&'m GuestRam>,
    ) -> Result<(Self, Self), ChainError> {
        Self::of_chain(memory, chain, true)
    }

    fn of_chain(
        memory: &'m GuestRam,
        chain: DescriptorChain<&'m GuestRam>,
        with_lent: bool,
    ) -> Result<(Self, Self), ChainError> {
        let (mut readable, mut writable) = (Self::default(), Self::default());
        let mut unfinished = true;
        for descriptor in chain {
            unfinished = descriptor.has_next();
            let side = match (descriptor.is_write_only(), writable.pieces.is_empty()) {
                (true, _) => &mut writable,
                (false, true) => &mut readable,
                (false, false) => return Err(ChainError::Order),
            };
            let length = descriptor.len() as usize;
            let lent = (with_lent && !descriptor.is_write_only())
                .then(|| memory.lent(descriptor.addr(), length))
                .flatten();
            if let Some(memory) = lent {
                side.add(Piece { memory, lent: true })?;
                continue;
            }
            for piece in memory.get_slices(descriptor.addr(), length) {
                side.add(Piece::own(piece.map_err(|_| ChainError::OutsideMemory)?))?;
            }
        }
        // The iterator ends early where the chain is broken or loops.
        if unfinished { Err(ChainError::Malformed) } else { Ok((readable, writable)) }
    }

    fn add(&mut self, piece: Piece<'m>) -> Result<(), ChainError> {
        if self.pieces.len() == MAX_PIECES {
            return Err(ChainError::Malformed);
        }
        self.len += piece.len();
        self.pieces.push(piece);
        Ok(())
    }

    /// Bytes left.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether nothing is left.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Takes the first `count` bytes, or as many as there are.
    pub fn take(&mut self, count: usize) -> Self {
        let mut front = Self::default();
        let mut whole = 0;
        for piece in &self.pieces {
            let missing = count - front.len;
            if missing < piece.len() {
                if let Some((head, tail)) = piece.split_at(missing) {
                    if missing > 0 {
                        front.len += missing;
                        front.pieces.push(head);
                    }
                    if let Some(first) = self.pieces.get_mut(whole) {
                        *first = tail;
                    }
                }
                break;
            }
            front.len += piece.len();
            front.pieces.push(*piece);
            whole += 1;
        }
        self.pieces.drain(..whole);
        self.len -= front.len;
        front
    }

    /// Reads and consumes exactly `N` bytes; `None` if there are fewer, or one that is not the
    /// guest's own.
    pub fn read<const N: usize>(&mut self) -> Option<[u8; N]> {
        if self.len < N {
            return None;
        }
        let mut bytes = [0; N];
        let mut rest = bytes.as_mut_slice();
        for piece in &self.take(N).pieces {
            if piece.lent {
                return None;
            }
            let (now, later) = rest.split_at_mut(piece.len().min(rest.len()));
            piece.memory.copy_to(now);
            rest = later;
        }
        Some(bytes)
    }

    /// Appends everything up to what is not the guest's own to `bytes`, and consumes it.
    pub fn read_to_end(&mut self, bytes: &mut Vec<u8>) {
        for piece in self.pieces.drain(..).take_while(|piece| !piece.lent) {
            let start = bytes.len();
            bytes.resize(start + piece.len(), 0);
            if let Some(target) = bytes.get_mut(start..) {
                piece.memory.copy_to(target);
            }
        }
        self.len = 0;
    }

    /// Copies the bytes from `offset` on up to what is not the guest's own, as many as fit and there are; how many.
    pub fn read_at(&self, mut offset: usize, bytes: &mut [u8]) -> usize {
        let mut read = 0;
        for piece in self.pieces.iter().take_while(|piece| !piece.lent) {
            if offset >= piece.len() {
                offset -= piece.len();
                continue;
            }
            let (Ok(rest), Some(target)) = (piece.memory.offset(offset), bytes.get_mut(read..)) else {
                break;
            };
            read += rest.copy_to(target);
            offset = 0;
        }
        read
    }

    /// Writes `bytes` from `offset` on, as far as they fit; how many did.
    pub fn write_at(&self, mut offset: usize, bytes: &[u8]) -> usize {
        let mut written = 0;
        for piece in &self.pieces {
            if offset >= piece.len() {
                offset -= piece.len();
                continue;
            }
            let Some(rest) = bytes.get(written..).filter(|rest| !rest.is_empty()) else { break };
            let now = rest.get(..piece.len() - offset).unwrap_or(rest);
            // In range: it was just cut to fit.
            let _ = piece.memory.write_slice(now, offset);
            written += now.len();
            offset = 0;
        }
        written
    }

    /// Writes `bytes` to the front and consumes what was written; returns how
    /// many bytes fitted.
    pub fn write(&mut self, bytes: &[u8]) -> usize {
        let target = self.take(bytes.len());
        let mut rest = bytes;
        for piece in &target.pieces {
            let (now, later) = rest.split_at(piece.len().min(rest.len()));
            // In range: the piece is at least as long as `now`.
            let _ = piece.memory.write_slice(now, 0);
            rest = later;
        }
        target.len
    }

    /// Pieces of memory left.
    pub fn pieces(&self) -> usize {
        self.pieces.len()
    }

    /// The buffers as the kernel wants them. They stay valid as long as guest
    /// memory does, which is what `'m` stands for.
    pub fn iovecs(&self) -> Vec<libc::iovec> {
        self.pieces
            .iter()
            .map(|piece| libc::iovec {
                iov_base: piece.memory.ptr_guard_mut().as_ptr().cast(),
                iov_len: piece.len(),
            })
            .collect()
    }

    /// Appends the buffers of `other`.
    pub fn extend(&mut self, other: &Self) {
        self.pieces.extend_from_slice(&other.pieces);
        self.len += other.len;
    }
}

#[cfg(test)]
mod tests {
    use virtio_bindings::virtio_ring::{VRING_DESC_F_NEXT, VRING_DESC_F_WRITE};
    use virtio_queue::desc::{RawDescriptor, split::Descriptor};
    use virtio_queue::mock::MockSplitQueue;
    use virtio_queue::{Queue, QueueOwnedT};
    use vm_memory::GuestAddress;

    use super::*;

    const WRITE: u16 = VRING_DESC_F_WRITE as u16;
    const NEXT: u16 = VRING_DESC_F_NEXT as u16;

    fn memory() -> GuestRam {
        // Two regions that touch: a buffer may lie across them.
        GuestRam::from_ranges(&[(GuestAddress(0), 0x8000), (GuestAddress(0x8000), 0x8000)])
    }

    fn chain<'m>(
        memory: &'m GuestRam,
        descriptors: &[(u64, u32, u16, u16)],
    ) -> DescriptorChain<&'m GuestRam> {
        let mock = MockSplitQueue::new(memory, 16);
        let raw: Vec<RawDescriptor> = descriptors
            .iter()
            .map(|&(addr, len, flags, next)| Descriptor::new(addr, len, flags, next).into())
            .collect();
        mock.add_desc_chains(&raw, 0).unwrap();
        let mut queue: Queue = mock.create_queue().unwrap();
        queue.iter(memory).unwrap().next().unwrap()
    }

    fn parse<'m>(
        memory: &'m GuestRam,
        descriptors: &[(u64, u32, u16, u16)],
    ) -> Result<(GuestBuffers<'m>, GuestBuffers<'m>), ChainError> {
        GuestBuffers::from_chain(memory, chain(memory, descriptors))
    }

    #[test]
    fn buffers_are_split_where_asked_also_across_regions() {
        let memory = memory();
        let (mut readable, mut writable) =
            parse(&memory, &[(0x7ffe, 4, NEXT, 1), (0x1000, 3, NEXT | WRITE, 2), (0x2000, 3, WRITE, 0)])
                .unwrap();
        assert_eq!((readable.len(), writable.len()), (4, 6));
        memory.write_slice(b"abcd", GuestAddress(0x7ffe)).unwrap();
        assert_eq!(&readable.read::<3>().unwrap(), b"abc");
        assert!(readable.read::<2>().is_none());
        let mut rest = Vec::new();
        readable.read_to_end(&mut rest);
        assert_eq!(rest, b"d");

        assert_eq!(writable.write(b"12345"), 5);
        assert_eq!(writable.write(b"678"), 1);
        let mut seen = [0; 3];
        memory.read_slice(&mut seen, GuestAddress(0x2000)).unwrap();
        assert_eq!(&seen, b"456");
        assert!(writable.is_empty());
    }

    #[test]
    fn malformed_chains_are_refused() {
        let memory = memory();
        // A loop.
        assert_eq!(
            parse(&memory, &[(0x1000, 1, NEXT, 1), (0x1000, 1, NEXT, 0)]).err(),
            Some(ChainError::Malformed)
        );
        // Out of the table.
        assert_eq!(parse(&memory, &[(0x1000, 1, NEXT, 99)]).err(), Some(ChainError::Malformed));
        // Out of memory, also where the end would overflow.
        assert_eq!(parse(&memory, &[(0xfff0, 0x20, 0, 0)]).err(), Some(ChainError::OutsideMemory));
        assert_eq!(parse(&memory, &[(u64::MAX - 1, 0x20, 0, 0)]).err(), Some(ChainError::OutsideMemory));
        assert_eq!(
            parse(&memory, &[(0x1000, 1, NEXT | WRITE, 1), (0x1000, 1, 0, 0)]).err(),
            Some(ChainError::Order)
        );
    }

    #[test]
    fn of_a_file_the_guest_has_mapped_only_the_kernel_reads() {
        const FILE: u64 = 4 << 30;
        let shape = crate::memory::Shape { boot: 1 << 20, window: 128 << 20, ..Default::default() };
        let memory = crate::memory::create_shaped(shape).unwrap();
        let file = tempfile::tempfile().unwrap();
        file.set_len(8192).unwrap();
        let (window, bytes) = memory.map(&file).unwrap();
        memory.lend(window, bytes);
        let parse_lent = |descriptors: &[(u64, u32, u16, u16)]| {
            GuestBuffers::with_lent(&memory, chain(&memory, descriptors))
        };
        let both = [(0x8000, 4, NEXT, 1), (FILE + 4096, 4096, 0, 0)];
        assert_eq!(parse(&memory, &both).err(), Some(ChainError::OutsideMemory));
        let (mut readable, _) = parse_lent(&both).unwrap();
        assert_eq!((readable.len(), readable.pieces()), (4100, 2));
        let mut bytes = [0xee; 8];
        assert_eq!(readable.read_at(0, &mut bytes), 4);
        assert_eq!(readable.read::<4>(), Some([0; 4]));
        let front = readable.take(512).iovecs();
        assert_eq!((front.len(), front[0].iov_len), (1, 512));
        let mut rest = Vec::new();
        assert_eq!((readable.len(), readable.read::<1>()), (3584, None));
        readable.read_to_end(&mut rest);
        assert!(rest.is_empty());
        // Nothing is written there, and what is not lent is nothing.
        for descriptors in [(FILE, 4, WRITE, 0), (FILE + (2 << 20) - 1, 2, 0, 0), (FILE - 1, 2, 0, 0)] {
            assert_eq!(parse_lent(&[descriptors]).err(), Some(ChainError::OutsideMemory), "{descriptors:?}");
        }
    }

    #[test]
    fn take_may_ask_for_more_than_there_is() {
        let memory = memory();
        let (mut readable, _) = parse(&memory, &[(0x1000, 8, 0, 0)]).unwrap();
        assert_eq!(readable.take(5).len(), 5);
        assert_eq!(readable.take(5).len(), 3);
        assert_eq!(readable.take(5).len(), 0);
        assert!(readable.iovecs().is_empty());
    }
}
