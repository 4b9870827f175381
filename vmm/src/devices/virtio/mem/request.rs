//! Requests as they lie in the queue (section 5.15.6).

use crate::devices::virtio::buffers::GuestBuffers;

const PLUG: u16 = 0;
const UNPLUG: u16 = 1;
const UNPLUG_ALL: u16 = 2;
const STATE: u16 = 3;

/// `struct virtio_mem_req`.
const REQUEST_BYTES: usize = 24;
/// `struct virtio_mem_resp`.
const ANSWER_BYTES: usize = 10;

/// What the driver asks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Request {
    /// Blocks it wants to use.
    Plug(Named),
    /// Blocks it has stopped using.
    Unplug(Named),
    /// It uses none.
    UnplugAll,
    /// Which of these are plugged?
    State(Named),
    /// Something the specification does not know.
    Unknown,
}

/// Blocks in a row, as the driver names them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Named {
    /// Guest address of the first.
    pub address: u64,
    /// How many.
    pub count: u16,
}

/// What it is answered.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Answer {
    /// Done.
    Ack,
    /// More than is to be plugged.
    Nack,
    /// Not now.
    Busy,
    /// The request makes no sense.
    Error,
    /// All of the blocks are plugged.
    Plugged,
    /// None is.
    Unplugged,
    /// Some are.
    Mixed,
}

impl Request {
    /// Reads a request; `None` where it is too short to be one.
    pub fn decode(buffers: &mut GuestBuffers<'_>) -> Option<Self> {
        let bytes: [u8; REQUEST_BYTES] = buffers.read()?;
        let (kind, _padding, address, count) = (&bytes[..2], &bytes[2..8], &bytes[8..16], &bytes[16..18]);
        let count = u16::from_le_bytes(count.try_into().ok()?);
        let blocks = Named { address: u64::from_le_bytes(address.try_into().ok()?), count };
        Some(match u16::from_le_bytes(kind.try_into().ok()?) {
            PLUG => Self::Plug(blocks),
            UNPLUG => Self::Unplug(blocks),
            UNPLUG_ALL => Self::UnplugAll,
            STATE => Self::State(blocks),
            _ => Self::Unknown,
        })
    }
}

impl Answer {
    /// The answer on the wire: type, padding, state.
    pub fn encode(self) -> [u8; ANSWER_BYTES] {
        let (kind, state) = match self {
            Self::Ack | Self::Plugged => (0, 0),
            Self::Nack => (1, 0),
            Self::Busy => (2, 0),
            Self::Error => (3, 0),
            Self::Unplugged => (0, 1),
            Self::Mixed => (0, 2),
        };
        [kind, 0, 0, 0, 0, 0, 0, 0, state, 0]
    }
}
