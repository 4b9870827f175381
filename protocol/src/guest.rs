//! Conventions between the host and the guest.
//!
//! The order of a start: the agent mounts what it needs, listens on
//! [`AGENT_PORT`] and [`STDIO_PORT`], then connects to [`READY_PORT`] of the
//! host and writes [`ready_line`]. The host polls nothing: it listens where the
//! monitor forwards that connection before it starts the monitor.

use std::net::{Ipv4Addr, SocketAddr};

/// vsock CID of the guest. Every sandbox has the same: the monitor's vsock is
/// its own, no other sandbox sees it.
pub const GUEST_CID: u32 = 3;
/// vsock CID of the host (virtio specification 1.2, 5.10.4).
pub const HOST_CID: u32 = 2;

/// Guest port of the agent's ttrpc service.
pub const AGENT_PORT: u32 = 1024;
/// Host port the agent connects to once it serves [`AGENT_PORT`].
pub const READY_PORT: u32 = 1025;
/// Guest port for processes' standard streams; see [`StreamHeader`].
pub const STDIO_PORT: u32 = 1026;
/// Guest port for connections to loopback addresses; see [`RelayTarget`].
pub const RELAY_PORT: u32 = 1027;
/// Host port for one query to Docker's name server that came in a datagram: it and
/// the answer, each after its length in two bytes, the higher one first.
pub const RESOLVER_DATAGRAM_PORT: u32 = 1028;
/// Host port for a connection to Docker's name server.
pub const RESOLVER_STREAM_PORT: u32 = 1029;

/// Where Docker's name server listens in a container's network namespace, whose
/// `/etc/resolv.conf` says so.
pub const RESOLVER_ADDRESS: Ipv4Addr = Ipv4Addr::new(127, 0, 0, 11);

/// virtio-fs tag of the containers' layers: read-only, and constant but for
/// containers that come and go.
pub const LAYERS_TAG: &str = "layers";
/// Where the agent mounts the layers; a container's are at its id.
pub const LAYERS_DIR: &str = "/run/rvm/layers";
/// virtio-fs tag of what containers see of the host's files, which may change.
pub const VOLUMES_TAG: &str = "volumes";
/// Where the agent mounts the volumes; all of a container's are below its id.
pub const VOLUMES_DIR: &str = "/run/rvm/volumes";
/// Where the agent mounts images of layers, by their devices' serials.
pub const IMAGES_DIR: &str = "/run/rvm/images";
/// Where the agent mounts the scratch.
pub const SCRATCH_DIR: &str = "/run/rvm/scratch";
/// virtio-blk serial of the scratch device.
pub const SCRATCH_SERIAL: &str = "rvm-scratch";

/// PCI device numbers of network interfaces, on bus 0 and function 0 (in the guest
/// `/sys/bus/pci/devices/0000:00:XX.0`, in hexadecimal); no other device gets one.
/// The shim gives each interface its number, by which all know it.
pub const NET_SLOTS: std::ops::Range<u8> = 24..32;

/// Kernel parameters every guest is started with; a user's own come after them.
/// What the machine itself needs (PCI, memory) is the monitor's to add.
pub const DEFAULT_CMDLINE: &str = concat!(
    // Panics and what is worse than an error go to the console log, every other message would cost an exit
    // per character; the agent adds errors once it is up.
    "console=ttyS0 loglevel=3 ",
    // A panic ends the machine at once, by the keyboard controller's reset line.
    "reboot=k panic=-1 ",
    // Keep the lock prefixes on one vCPU: to patch them away is to write to pages that all guests share.
    "noreplace-smp ",
    // KVM vouches for the TSC or the guest uses KVM's clock: no timer twice a second that checks one by the other.
    "tsc=reliable ",
    // Grace periods by interrupt instead of waiting for ticks: mounts and namespaces are made and undone faster.
    "rcupdate.rcu_expedited=1 ",
    // No look at each PCI slot for chips that need work-arounds before the scan proper.
    "pci=noearly ",
    // A root file system that can have pages of the initramfs for its own.
    "rootfstype=ramfs ",
    // No 64 MiB of bounce buffers in guests with memory above 4 GiB: virtio reaches all of it.
    "swiotlb=noforce",
);

/// Version of this protocol. Shim and agent are installed together; a
/// difference means a mixed installation and is refused by name.
pub const PROTOCOL_VERSION: u32 = 1;

/// Longest container or exec id (containerd's own limit is 76).
pub const MAX_ID_LEN: usize = 256;

/// The line the agent writes to [`READY_PORT`].
pub fn ready_line() -> String {
    format!("rvm-agent {PROTOCOL_VERSION}\n")
}

/// Longest line accepted on [`READY_PORT`], [`STDIO_PORT`] and [`RELAY_PORT`].
pub const MAX_LINE_LEN: usize = 2 * MAX_ID_LEN + 64;

/// What the agent answers on [`STDIO_PORT`] once a stream is attached, and on
/// [`RELAY_PORT`] once it is connected.
pub const STREAM_ATTACHED: &[u8] = b"ok\n";

/// One of a process's standard streams.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Stream {
    /// Host to process.
    Stdin,
    /// Process to host.
    Stdout,
    /// Process to host.
    Stderr,
    /// Both ways: the terminal of a process that has one.
    Terminal,
}

impl Stream {
    /// The stream's name on the wire.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Stdin => "stdin",
            Self::Stdout => "stdout",
            Self::Stderr => "stderr",
            Self::Terminal => "terminal",
        }
    }

    fn from_name(name: &str) -> Option<Self> {
        [Self::Stdin, Self::Stdout, Self::Stderr, Self::Terminal].into_iter().find(|s| s.as_str() == name)
    }
}

/// First line of a connection to [`STDIO_PORT`]:
/// `CONTAINER<tab>EXEC<tab>STREAM<newline>`, EXEC empty for the container's
/// first process. The agent answers [`STREAM_ATTACHED`], or a line starting
/// with `error ` and closes; after that the connection carries the stream's
/// bytes alone. End of file travels as a half-close, both ways.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct StreamHeader {
    /// The container.
    pub container_id: String,
    /// The exec, or empty for the container's first process.
    pub exec_id: String,
    /// Which of its streams.
    pub stream: Stream,
}

impl StreamHeader {
    /// The header as it goes over the wire, newline included.
    pub fn to_line(&self) -> String {
        format!("{}\t{}\t{}\n", self.container_id, self.exec_id, self.stream.as_str())
    }

    /// Parses a line without its newline; `None` where it is not a header.
    pub fn parse(line: &str) -> Option<Self> {
        let mut fields = line.split('\t');
        let (container_id, exec_id, stream) = (fields.next()?, fields.next()?, fields.next()?);
        if fields.next().is_some() || container_id.is_empty() {
            return None;
        }
        if container_id.len() > MAX_ID_LEN || exec_id.len() > MAX_ID_LEN {
            return None;
        }
        Some(Self {
            container_id: container_id.to_owned(),
            exec_id: exec_id.to_owned(),
            stream: Stream::from_name(stream)?,
        })
    }
}

/// First line of a connection to [`RELAY_PORT`]: a loopback address of the sandbox's
/// network namespace with a port and a newline, e.g. `127.0.0.1:80` or `[::1]:80`.
/// The agent answers [`STREAM_ATTACHED`], or a line starting with `error ` and
/// closes; after that the connection carries what that to the address would. End of
/// file travels as a half-close, both ways.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RelayTarget(SocketAddr);

impl RelayTarget {
    /// One of that address, where it is a loopback address, and a port other than 0.
    pub fn new(address: SocketAddr) -> Option<Self> {
        (address.ip().is_loopback() && address.port() != 0).then_some(Self(address))
    }

    /// The address.
    pub fn address(self) -> SocketAddr {
        self.0
    }

    /// The line as it goes over the wire, newline included.
    pub fn to_line(self) -> String {
        format!("{}\n", self.0)
    }

    /// Parses a line without its newline; `None` where it is none of these.
    pub fn parse(line: &str) -> Option<Self> {
        Self::new(line.parse().ok()?)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn stream_header_round_trip() {
        for stream in [Stream::Stdin, Stream::Stdout, Stream::Stderr, Stream::Terminal] {
            let header = StreamHeader { container_id: "c1".into(), exec_id: "e1".into(), stream };
            assert_eq!(StreamHeader::parse(header.to_line().trim_end_matches('\n')), Some(header));
        }
    }

    #[test]
    fn stream_header_refuses_what_is_not_one() {
        let long = format!("{}\t\tstdin", "x".repeat(MAX_ID_LEN + 1));
        for line in ["", "c1", "c1\t", "\t\tstdin", "c1\t\tstdoub", "c1\t\tstdin\t", long.as_str()] {
            assert_eq!(StreamHeader::parse(line), None, "{line:?}");
        }
    }

    #[test]
    fn relays_lead_to_loopback_addresses_alone() {
        for text in ["127.0.0.1:80", "127.8.9.10:65535", "[::1]:1"] {
            assert_eq!(RelayTarget::parse(text).unwrap().to_line(), format!("{text}\n"));
        }
        for text in
            ["", "127.0.0.1", "127.0.0.1:0", "10.0.0.1:80", "[::]:80", "[fe80::1%2]:80", "127.0.0.1:80 "]
        {
            assert_eq!(RelayTarget::parse(text), None, "{text:?}");
        }
    }
}
