//! One queue of a tap, Linux's end of the interface (`Documentation/networking/tuntap.rst`).

use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::sync::Arc;

use virtio_bindings::virtio_net::{
    VIRTIO_NET_F_GUEST_CSUM, VIRTIO_NET_F_GUEST_ECN, VIRTIO_NET_F_GUEST_TSO4, VIRTIO_NET_F_GUEST_TSO6,
    VIRTIO_NET_F_GUEST_USO4, VIRTIO_NET_F_GUEST_USO6,
};

use super::HEADER_BYTES;

/// The descriptor of one queue of a tap.
#[derive(Debug)]
pub(super) struct Tap {
    file: File,
}

/// The queues of one tap.
pub(super) type Taps = Arc<[Arc<Tap>]>;

/// What a guest takes unfinished, in the tap's words (`TUNSETOFFLOAD`).
const OFFLOADS: [(u32, libc::c_uint); 6] = [
    (VIRTIO_NET_F_GUEST_CSUM, libc::TUN_F_CSUM),
    (VIRTIO_NET_F_GUEST_TSO4, libc::TUN_F_TSO4),
    (VIRTIO_NET_F_GUEST_TSO6, libc::TUN_F_TSO6),
    (VIRTIO_NET_F_GUEST_ECN, libc::TUN_F_TSO_ECN),
    (VIRTIO_NET_F_GUEST_USO4, libc::TUN_F_USO4),
    (VIRTIO_NET_F_GUEST_USO6, libc::TUN_F_USO6),
];
/// The kernel takes both or none.
const USO: libc::c_uint = libc::TUN_F_USO4 | libc::TUN_F_USO6;

impl Tap {
    /// Takes over a descriptor, which is to be that of a tap's queue.
    pub(super) fn new(file: File, several: bool) -> io::Result<Self> {
        let tap = Self { file };
        // SAFETY: an ifreq is plain numbers, of which zeroes are some.
        let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
        tap.ioctl(libc::TUNGETIFF, (&raw mut request).cast())?;
        // SAFETY: the kernel has filled in the flags; any value is some.
        let flags = libc::c_int::from(unsafe { request.ifr_ifru.ifru_flags });
        let mut wanted = libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR;
        if several {
            wanted |= libc::IFF_MULTI_QUEUE;
        }
        if flags & wanted != wanted {
            return Err(io::Error::other(format!("it has the flags {flags:#x} and needs {wanted:#x}")));
        }
        tap.set_nonblocking()?;
        tap.set(libc::TUNSETVNETHDRSZ, HEADER_BYTES as libc::c_int)?;
        // virtio 1: little-endian, whatever the host is.
        tap.set(libc::TUNSETVNETLE, 1)?;
        Ok(tap)
    }

    /// Whether the host's kernel leaves UDP datagrams to be cut; nothing is left to the
    /// guest afterwards.
    pub(super) fn has_uso(&self) -> io::Result<bool> {
        let has = self.set_offloads(libc::TUN_F_CSUM | USO).is_ok();
        self.set_offloads(0)?;
        Ok(has)
    }

    /// Has the kernel leave to the guest what `features` say it takes; one who does not
    /// finish checksums cuts no segments either.
    pub(super) fn offload(&self, features: u64) -> io::Result<()> {
        let all = OFFLOADS.iter().filter(|(bit, _)| features & (1 << bit) != 0);
        let mut flags = all.fold(0, |flags, (_, flag)| flags | flag);
        if flags & libc::TUN_F_CSUM == 0 {
            flags = 0;
        }
        if flags & USO != USO {
            flags &= !USO;
        }
        if flags & (libc::TUN_F_TSO4 | libc::TUN_F_TSO6) == 0 {
            flags &= !libc::TUN_F_TSO_ECN;
        }
        self.set_offloads(flags)
    }

    /// Has the host's kernel spread frames over this queue, too, or not any more. Both
    /// may be asked for again.
    pub(super) fn attach(&self, attached: bool) -> io::Result<()> {
        // SAFETY: as in `new`.
        let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
        let flag = if attached { libc::IFF_ATTACH_QUEUE } else { libc::IFF_DETACH_QUEUE };
        request.ifr_ifru.ifru_flags = flag as libc::c_short;
        match self.ioctl(libc::TUNSETQUEUE, (&raw mut request).cast()) {
            // It is so already.
            Err(error) if error.raw_os_error() == Some(libc::EINVAL) => Ok(()),
            done => done,
        }
    }

    /// Reads one frame behind its header into `pieces`; the rest of one that is longer
    /// is lost.
    pub(super) fn read(&self, pieces: &[libc::iovec]) -> io::Result<usize> {
        // SAFETY: the caller's pieces are memory that may be written to, as long as
        // they say; guest memory may change under anyone's hands.
        let count =
            unsafe { libc::readv(self.file.as_raw_fd(), pieces.as_ptr(), pieces.len() as libc::c_int) };
        usize::try_from(count).map_err(|_| io::Error::last_os_error())
    }

    /// Writes one frame behind its header, which the kernel checks.
    pub(super) fn write(&self, pieces: &[libc::iovec]) -> io::Result<usize> {
        // SAFETY: as for reading.
        let count =
            unsafe { libc::writev(self.file.as_raw_fd(), pieces.as_ptr(), pieces.len() as libc::c_int) };
        usize::try_from(count).map_err(|_| io::Error::last_os_error())
    }

    fn set_nonblocking(&self) -> io::Result<()> {
        // SAFETY: plain system call on a descriptor we own.
        let flags = unsafe { libc::fcntl(self.file.as_raw_fd(), libc::F_GETFL) };
        if flags < 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: as above.
        let set = unsafe { libc::fcntl(self.file.as_raw_fd(), libc::F_SETFL, flags | libc::O_NONBLOCK) };
        if set < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
    }

    fn set(&self, request: libc::Ioctl, mut value: libc::c_int) -> io::Result<()> {
        self.ioctl(request, (&raw mut value).cast())
    }

    /// Unlike the others it takes a number, not a pointer to one.
    fn set_offloads(&self, flags: libc::c_uint) -> io::Result<()> {
        self.ioctl(libc::TUNSETOFFLOAD, std::ptr::without_provenance_mut(flags as usize))
    }

    fn ioctl(&self, request: libc::Ioctl, argument: *mut libc::c_void) -> io::Result<()> {
        // SAFETY: each caller's argument is what its request takes.
        if unsafe { libc::ioctl(self.file.as_raw_fd(), request, argument) } < 0 {
            return Err(io::Error::last_os_error());
        }
        Ok(())
    }
}

impl AsRawFd for Tap {
    fn as_raw_fd(&self) -> RawFd {
        self.file.as_raw_fd()
    }
}
