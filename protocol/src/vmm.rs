//! The monitor's configuration, and how it is controlled.
//!
//! `rvm-vmm --config FILE` reads one [`VmConfig`] as JSON. Relative paths are
//! relative to the monitor's working directory: the shim starts it in the
//! sandbox's directory, so socket paths stay below the 107 bytes of
//! `sockaddr_un` however long a container's id is.
//!
//! Its owner controls it over one end of a pair of connected sockets
//! (`SOCK_SEQPACKET`) that it inherits as `--control-fd N`: each packet is a
//! [`Call`] or a [`Reply`] as JSON, with descriptors attached where the request
//! says so. When the owner's end is closed the machine ends, in order.
//!
//! The control socket at a path is for others to look: a Unix stream socket, each
//! request and each answer one line of JSON ([`Request`], [`Response`]), and the
//! only request it answers is [`Request::Metrics`].

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

/// Everything a monitor needs to know to run one VM.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct VmConfig {
    /// Sandbox id, for logs.
    pub id: String,
    /// Number of vCPUs, 1 to [`MAX_VCPUS`].
    pub vcpus: u8,
    /// How many there can be while it runs ([`Request::SetVcpus`]),
    /// [`MAX_VCPUS`] at most; 0 for no more than it starts with.
    #[serde(default)]
    pub max_vcpus: u8,
    /// Guest memory in MiB.
    pub memory_mib: u64,
    /// How much more can be plugged in while it runs, in MiB, a multiple of 128.
    /// It costs nothing until it is asked for ([`Request::SetHotplugMemory`]).
    #[serde(default)]
    pub hotplug_memory_mib: u64,
    /// How much of the host's huge pages of 2 MiB (hugetlbfs) can be plugged in beside that,
    /// in MiB, a multiple of 128. None is taken or reserved until it is asked for
    /// ([`Request::SetHugetlbMemory`]).
    #[serde(default)]
    pub hugetlb_memory_mib: u64,
    /// Largest file that can be plugged in as memory ([`Request::AddPmem`]), in MiB, a multiple of 128: so
    /// many of the guest's addresses are kept for each, and nothing else. 0 for none.
    #[serde(default)]
    pub pmem_mib: u64,
    /// Whether the host may put pages of 2 MiB behind guest memory, where it has
    /// some: fewer exits and faster translations, but the guest's first byte in
    /// each takes all of it.
    #[serde(default)]
    pub huge_pages: bool,
    /// Whether the guest can tell which of its pages are free, so that the host has them back until they are used
    /// again (virtio-balloon's free page reporting).
    #[serde(default)]
    pub free_page_reporting: bool,
    /// Uncompressed ELF kernel (`vmlinux`).
    pub kernel: PathBuf,
    /// Kernel command line as given to the kernel, except what the monitor
    /// itself must add for the machine it presents.
    pub cmdline: String,
    /// Initial RAM file system; none boots without one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub initramfs: Option<PathBuf>,
    /// File that receives the serial console, appended to; none discards it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub console_log: Option<PathBuf>,
    /// Path of the control socket to create; none for no control socket.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub control_socket: Option<PathBuf>,
    /// The vsock device.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub vsock: Option<VsockConfig>,
    /// virtio-fs devices.
    #[serde(default)]
    pub shares: Vec<ShareConfig>,
    /// virtio-blk devices.
    #[serde(default)]
    pub disks: Vec<DiskConfig>,
    /// virtio-net devices that are there from the start.
    #[serde(default)]
    pub nets: Vec<InheritedNet>,
    /// What the monitor shuts itself in before its first guest instruction; none
    /// leaves it all that it was started with.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub jail: Option<JailConfig>,
}

/// How the monitor is shut in. It has to be the first process of a pid namespace.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct JailConfig {
    /// Inherited descriptor of the mount namespace it ends up in.
    pub mount_namespace: i32,
    /// Inherited descriptor of the directory there that becomes its root directory: what it serves of the
    /// host is below, and shares are named from there.
    pub root: i32,
    /// Inherited descriptor of the user namespace it ends up in; none leaves it in
    /// its own, with fewer capabilities.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub user_namespace: Option<i32>,
}

/// virtio-vsock in user space. A host program connects to `socket`, writes
/// `CONNECT <port>\n` and reads `OK <port>\n`; a connection the guest makes to
/// host port P arrives at the Unix socket `<socket>_P`, which the host program
/// has created.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct VsockConfig {
    /// The guest's CID, 3 or more.
    pub guest_cid: u32,
    /// Path of the Unix socket to create.
    pub socket: PathBuf,
}

/// One directory tree seen by the guest over virtio-fs.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ShareConfig {
    /// Mount tag, 1 to 36 bytes.
    pub tag: String,
    /// The directory; where there is a jail, from its root directory on.
    pub dir: PathBuf,
    /// Whether every write is refused by the server itself.
    #[serde(default)]
    pub readonly: bool,
    /// How long the guest may keep what it has read.
    #[serde(default)]
    pub cache: CachePolicy,
}

/// How long a guest may keep what it has read of a share.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum CachePolicy {
    /// Nothing below the root directory's entries changes while it is shared;
    /// the entries themselves may come and go, as mounts do.
    Always,
    /// The host may change it: attributes and names are asked again after a second.
    #[default]
    Auto,
}

/// One virtio-blk device backed by a raw file or block device.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DiskConfig {
    /// Serial the guest sees, 1 to 20 bytes.
    pub serial: String,
    /// The file or block device.
    pub path: PathBuf,
    /// Whether writes are refused.
    #[serde(default)]
    pub readonly: bool,
}

/// One virtio-net device: a tap of the host's, opened once per queue pair.
///
/// The taps are made with `IFF_TAP | IFF_NO_PI | IFF_VNET_HDR`, and
/// `IFF_MULTI_QUEUE` where there are several pairs; what they take over from the
/// network stack (`TUNSETOFFLOAD`) and their header's size are the monitor's to set.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct NetConfig {
    /// Its PCI device number, one of [`NET_SLOTS`](crate::guest::NET_SLOTS), by
    /// which shim, monitor and agent know it.
    pub slot: u8,
    /// Its address: neither multicast nor zero.
    pub mac: [u8; 6],
    /// Largest MTU the guest can set on it, which is also what it starts with, 68 or
    /// more; 0 where the guest may set any and starts with 1500, which is right
    /// for an interface whose MTU can be raised later.
    #[serde(default)]
    pub mtu: u16,
    /// Pairs of queues, 1 to [`MAX_QUEUE_PAIRS`]: more than vCPUs are of no use.
    pub queue_pairs: u8,
    /// How fast the guest may receive. A limit in either direction has the monitor
    /// move the frames even where vhost-net could.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub receive: Option<RateLimit>,
    /// How fast it may transmit.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub transmit: Option<RateLimit>,
}

/// A [`NetConfig`] with descriptors the monitor inherits, by their numbers.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct InheritedNet {
    /// The device.
    pub net: NetConfig,
    /// Its tap, opened once per queue pair.
    pub taps: Vec<i32>,
    /// `/dev/vhost-net`, opened once per queue pair, or none where the monitor
    /// is to move the frames itself.
    #[serde(default)]
    pub vhost: Vec<i32>,
}

/// How much may pass in one direction.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RateLimit {
    /// Bytes of frames, with their Ethernet headers.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub bytes: Option<TokenBucket>,
    /// Frames. One that the guest's kernel or the host's is still to cut into
    /// segments counts as one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub packets: Option<TokenBucket>,
}

/// A bucket that starts full. What takes more than it holds is let through and
/// owed, so that the average is kept whatever the size.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TokenBucket {
    /// What flows in, 1 or more.
    pub per_second: u64,
    /// What it holds, 1 or more.
    pub burst: u64,
}

/// Most queue pairs of one virtio-net device.
pub const MAX_QUEUE_PAIRS: u8 = 32;
/// Most vCPUs of one machine: APIC ids in its MP table are bytes, and 255 is
/// broadcast. The guest's kernel is built for as many (`CONFIG_NR_CPUS`).
pub const MAX_VCPUS: u8 = 255;
/// What [`VmConfig::pmem_mib`] is a multiple of.
pub const PMEM_STEP_MIB: u64 = 128;
/// Longest [`Call`] or [`Reply`], in bytes.
pub const MAX_MESSAGE_LEN: usize = 64 << 10;

/// A request on the inherited control socket.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Call {
    /// Chosen by the owner: the answer to a request it no longer waits for is
    /// known by it.
    pub id: u64,
    /// The request.
    pub request: Request,
}

/// The answer to a [`Call`].
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Reply {
    /// The call's.
    pub id: u64,
    /// The answer.
    pub response: Response,
}

/// What is asked of a monitor.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "request", rename_all = "snake_case", deny_unknown_fields)]
pub enum Request {
    /// Stops every vCPU between two instructions.
    Pause,
    /// Lets paused vCPUs go on.
    Resume,
    /// Writes the paused machine into the attached file, empty and open for writing,
    /// from which another monitor can run it (`rvm-vmm --restore`). Shares and
    /// memory that was plugged in cannot be saved. It stays paused.
    Save,
    /// Ends the VM and the monitor.
    Stop,
    /// Reads the counters.
    Metrics,
    /// Plugs a virtio-blk device into the running machine, on the file or block
    /// device whose descriptor is attached. The guest finds it when it scans its
    /// PCI bus again.
    AddDisk {
        /// Serial the guest sees, 1 to 20 bytes, none of those that are there.
        serial: String,
        /// Whether writes are refused; else the descriptor is open for them.
        readonly: bool,
    },
    /// Takes a disk out of the running machine and closes its file; the guest has
    /// been told to let go of it before. One that has not finds nothing there.
    RemoveDisk {
        /// The disk's serial.
        serial: String,
    },
    /// Plugs a virtio-pmem device into the running machine: the regular file whose descriptor
    /// is attached, open for reading, as memory that the guest can read. Answered with
    /// [`Response::Plugged`]. The file must not shrink: a guest that reads what is gone ends.
    AddPmem,
    /// Takes a virtio-pmem device out of the running machine and lets go of its file; the
    /// guest has been told to let go of it before. One that has not finds nothing there.
    RemovePmem {
        /// The device's.
        slot: u8,
    },
    /// Plugs a virtio-net device into the running machine. Attached are the tap's
    /// descriptors, one for each queue pair, and after them none, or one of
    /// `/dev/vhost-net` for each. The guest finds it when it scans its PCI bus again.
    AddNet(NetConfig),
    /// Takes a virtio-net device out of the running machine and closes its
    /// descriptors; the guest has been told to let go of it before. One that has not
    /// finds nothing there.
    RemoveNet {
        /// The device's.
        slot: u8,
    },
    /// Tells the guest whether a virtio-net device's link is up; it is at first.
    SetLink {
        /// The device's.
        slot: u8,
        /// Whether there is a carrier.
        up: bool,
    },
    /// Makes so many vCPUs exist, if there are fewer: the guest can bring them up
    /// from then on. One that exists stays; a guest that has taken it down leaves
    /// it idle.
    SetVcpus {
        /// How many, at most [`VmConfig::max_vcpus`].
        count: u8,
    },
    /// Offers the guest so much memory beside what it started with, or asks for
    /// what it has above that back. Answered when the guest has been told; it
    /// takes and gives at its own pace, which [`Metrics::memory_plugged_bytes`]
    /// tells. The first request plugs a virtio-mem device in, which the guest
    /// finds when it scans its PCI bus again.
    SetHotplugMemory {
        /// MiB, a multiple of 2, at most [`VmConfig::hotplug_memory_mib`].
        mib: u64,
    },
    /// The same of the host's huge pages, by a device of their own. A page is taken from the
    /// host's pool when the guest plugs it in; where there is none left, the guest gets no more
    /// ([`Metrics::hugetlb_plugged_bytes`]).
    SetHugetlbMemory {
        /// MiB, a multiple of 2, at most [`VmConfig::hugetlb_memory_mib`].
        mib: u64,
    },
}

/// The answer to a [`Request`].
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "response", rename_all = "snake_case")]
pub enum Response {
    /// Done.
    Ok,
    /// Done: the device is in the PCI slot of this number.
    Plugged {
        /// By which it is known from now on.
        slot: u8,
    },
    /// Counters since the monitor started.
    Metrics(Metrics),
    /// Refused or failed.
    Error {
        /// What went wrong, in one line.
        message: String,
    },
}

/// The monitor's counters.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Metrics {
    /// Returns of `KVM_RUN` to user space, all vCPUs, by reason.
    pub exits: ExitCounts,
    /// Microseconds from the monitor's exec to each step of the start, in order.
    pub start_us: Vec<(String, u64)>,
    /// Guest memory in bytes, with what was plugged in.
    pub memory_bytes: u64,
    /// Of that, what the guest has plugged in since it runs.
    pub memory_plugged_bytes: u64,
    /// Of that too, the host's huge pages.
    #[serde(default)]
    pub hugetlb_plugged_bytes: u64,
    /// Guest memory resident on the host, in bytes; the host counts its huge pages apart.
    pub memory_resident_bytes: u64,
    /// The virtio-net devices, by slot.
    #[serde(default)]
    pub nets: Vec<NetMetrics>,
    /// The shares, as they were configured.
    #[serde(default)]
    pub shares: Vec<ShareMetrics>,
    /// Files that are the guest's to read as memory, in bytes, which are no part of
    /// [`memory_bytes`](Self::memory_bytes).
    #[serde(default)]
    pub pmem_bytes: u64,
}

/// What the server of a share has done since its driver began.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ShareMetrics {
    /// Its tag.
    pub tag: String,
    /// Messages by FUSE opcode, in order, without those there were none of; 0 stands for opcodes that the
    /// server has never heard of.
    pub messages: Vec<(u32, u64)>,
    /// How often one of its threads was woken up.
    pub wakeups: u64,
    /// Interrupts of the guest.
    pub interrupts: u64,
}

/// A virtio-net device's counters.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct NetMetrics {
    /// Its PCI device number.
    pub slot: u8,
    /// Who moves its frames.
    pub mover: NetMover,
    /// Why that is not vhost-net although its descriptors were given.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub fallback: Option<String>,
    /// To the guest, as far as the monitor moved it: what vhost-net moves, the
    /// tap's own counters on the host tell.
    pub receive: NetCounts,
    /// From the guest.
    pub transmit: NetCounts,
}

/// Who moves frames between a tap and the guest.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum NetMover {
    /// Nobody: no driver drives the device.
    #[default]
    Nobody,
    /// The monitor.
    UserSpace,
    /// The host's kernel.
    Vhost,
}

/// What the monitor moved in one direction of a virtio-net device.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct NetCounts {
    /// Frames.
    pub frames: u64,
    /// Their bytes, with Ethernet headers.
    pub bytes: u64,
    /// Frames that the guest's filter, the host or their form kept from passing.
    pub dropped: u64,
    /// Frames of which bytes were copied in the monitor.
    pub copied: u64,
    /// Times the monitor's thread took up work.
    pub wakeups: u64,
    /// Interrupts raised in the guest.
    pub interrupts: u64,
}

/// Returns of `KVM_RUN` to user space by reason.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ExitCounts {
    /// Port reads and writes of PCI configuration space.
    pub pci_config: u64,
    /// Port reads and writes of the serial console.
    pub serial: u64,
    /// Other port reads and writes.
    pub other_pio: u64,
    /// MMIO reads and writes of device registers.
    pub mmio: u64,
    /// Interrupted by a signal or by the monitor.
    pub interrupted: u64,
    /// Everything else.
    pub other: u64,
}

/// Exit codes of `rvm-vmm`.
pub mod exit_code {
    /// The guest powered off or was stopped by request.
    pub const OK: i32 = 0;
    /// The configuration is wrong; the reason is on stderr.
    pub const BAD_CONFIG: i32 = 2;
    /// The VM could not be built; the reason is on stderr.
    pub const BUILD_FAILED: i32 = 3;
    /// The guest stopped in a way no guest should: triple fault, an
    /// instruction KVM cannot run, a KVM error.
    pub const GUEST_CRASHED: i32 = 4;
}
