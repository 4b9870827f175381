//! The system calls of each kind of thread, with what they are for.

use std::collections::BTreeSet;

use libc::c_long;

/// What a thread of the monitor does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Duty {
    /// The first thread: requests of the machine's owner, hot-plug, the machine's end.
    Control,
    /// Runs a vCPU, and does what its exits ask for.
    Vcpu,
    /// Serves a share, in the name of the guest's users.
    Files,
    /// Serves a disk.
    Disk,
    /// Moves frames between a tap and the guest.
    Net,
    /// Moves bytes between Unix sockets and the guest.
    Vsock,
    /// Plugs memory and takes it back.
    Memory,
    /// Gives back what the guest has free.
    Balloon,
    /// Answers for a file that the guest sees as memory.
    Pmem,
}

impl Duty {
    /// All of them.
    pub(super) const ALL: [Self; 9] = [
        Self::Control,
        Self::Vcpu,
        Self::Files,
        Self::Disk,
        Self::Net,
        Self::Vsock,
        Self::Memory,
        Self::Balloon,
        Self::Pmem,
    ];

    /// What its threads' names begin with.
    fn threads(self) -> &'static str {
        match self {
            Self::Control => "rvm-vmm",
            Self::Vcpu => "vcpu",
            Self::Files => "fs",
            Self::Disk => "blk",
            Self::Net => "net",
            Self::Vsock => "vsock",
            Self::Memory => "mem",
            Self::Balloon => "balloon",
            Self::Pmem => "pmem",
        }
    }

    /// What it calls.
    pub(super) fn calls(self) -> impl Iterator<Item = Call> + use<> {
        let groups: &[&[Group]] = match self {
            Self::Control => &[&EVERY, &QUEUE, &VCPU, &DISK, &NET, &MEMORY, &CONTROL],
            Self::Vcpu => &[&EVERY, &VCPU],
            Self::Files => &[&EVERY, &QUEUE, &FILES],
            Self::Disk => &[&EVERY, &QUEUE, &DISK],
            Self::Net => &[&EVERY, &QUEUE, &NET],
            Self::Vsock => &[&EVERY, &QUEUE, &VSOCK],
            Self::Memory | Self::Balloon => &[&EVERY, &QUEUE, &MEMORY],
            Self::Pmem => &[&EVERY, &QUEUE],
        };
        self::calls(groups)
    }
}

/// Thread and number of every call that is a duty's own: what a test compares with those that were
/// made. Without [`EVERY`], which the language and the C library call when they have to.
pub fn own_calls() -> impl Iterator<Item = (&'static str, c_long)> {
    let of_any: BTreeSet<c_long> = calls(&[&EVERY]).map(|call| call.number).collect();
    let own = |duty: Duty| match duty {
        // Those of its own; the others are for threads it starts.
        Duty::Control => calls(&[&CONTROL]).collect::<Vec<_>>(),
        duty => duty.calls().collect(),
    };
    Duty::ALL.into_iter().flat_map(move |duty| {
        let numbers: BTreeSet<c_long> = own(duty).into_iter().map(|call| call.number).collect();
        let numbers: Vec<_> = numbers.difference(&of_any).copied().collect();
        numbers.into_iter().map(move |number| (duty.threads(), number))
    })
}

fn calls(groups: &[&'static [Group]]) -> impl Iterator<Item = Call> + use<> {
    let groups = groups.to_vec();
    groups.into_iter().flatten().flat_map(|(_, calls)| calls.iter().copied())
}

/// Calls before the threads have their duties, beside all of theirs: the kernel is loaded, the
/// machine is built or restored.
pub(super) fn building() -> impl Iterator<Item = Call> {
    calls(&[&BUILDING])
}

/// Calls, and what they are for.
type Group = (&'static str, &'static [Call]);

/// A call, and which of it.
#[derive(Clone, Copy, Debug)]
pub(super) struct Call {
    pub(super) number: c_long,
    pub(super) only: Only,
}

/// Which of a call is allowed. Arguments are counted from 0, and looked at in their lower half.
#[derive(Clone, Copy, Debug)]
pub(super) enum Only {
    /// All.
    Any,
    /// Those whose argument is one of these, of the bits of the mask.
    These(u8, u32, &'static [u32]),
    /// Those whose argument has none of these bits.
    Without(u8, u32),
    /// Those whose argument has all of these bits.
    With(u8, u32),
}

const fn any(number: c_long) -> Call {
    Call { number, only: Only::Any }
}

const fn of(number: c_long, argument: u8, values: &'static [u32]) -> Call {
    Call { number, only: Only::These(argument, u32::MAX, values) }
}

/// Requests by their type and number, whatever the size of what they carry.
const fn ioctl(requests: &'static [u32]) -> Call {
    Call { number: libc::SYS_ioctl, only: Only::These(1, 0xffff, requests) }
}

const fn without(number: c_long, argument: u8, bits: libc::c_int) -> Call {
    Call { number, only: Only::Without(argument, bits.cast_unsigned()) }
}

const fn with(number: c_long, argument: u8, bits: libc::c_int) -> Call {
    Call { number, only: Only::With(argument, bits.cast_unsigned()) }
}

/// What the C library calls to look for a kernel parameter when it gives memory back, and does
/// without: it fails instead of ending the monitor, but for a file server, which has it.
pub(super) const LOOKED_FOR: Call = any(libc::SYS_openat);

const GET_FLAGS: u32 = libc::F_GETFL as u32;
const SET_FLAGS: u32 = libc::F_SETFL as u32;
const DUPLICATE: u32 = libc::F_DUPFD_CLOEXEC as u32;

const EVERY: [Group; 5] = [
    (
        "memory, without code",
        &[
            without(libc::SYS_mmap, 2, libc::PROT_EXEC),
            without(libc::SYS_mprotect, 2, libc::PROT_EXEC),
            any(libc::SYS_munmap),
            any(libc::SYS_mremap),
            any(libc::SYS_madvise),
            any(libc::SYS_brk),
        ],
    ),
    ("each other", &[any(libc::SYS_futex)]),
    (
        "eventfds, and the log on stderr",
        &[
            any(libc::SYS_read),
            any(libc::SYS_write),
            any(libc::SYS_close),
            // Before it closes one, where a build has assertions.
            of(libc::SYS_fcntl, 1, &[libc::F_GETFD as u32]),
        ],
    ),
    (
        "time, where the vDSO has none, and keys of hash tables",
        &[any(libc::SYS_clock_gettime), any(libc::SYS_getrandom), any(libc::SYS_restart_syscall)],
    ),
    (
        "signals, and the end, in order or by abort()",
        &[
            any(libc::SYS_rt_sigreturn),
            any(libc::SYS_rt_sigprocmask),
            any(libc::SYS_sigaltstack),
            any(libc::SYS_exit),
            any(libc::SYS_exit_group),
            any(libc::SYS_gettid),
            any(libc::SYS_getpid),
            // The monitor is the first process of its pid namespace.
            of(libc::SYS_tgkill, 0, &[1]),
        ],
    ),
];

/// Of a thread that serves queues.
const QUEUE: [Group; 1] = [(
    "waiting for the driver",
    &[any(libc::SYS_epoll_create1), any(libc::SYS_epoll_ctl), any(libc::SYS_epoll_wait)],
)];

const VCPU: [Group; 3] = [
    (
        "the guest, its state, its interrupts and notifications",
        &[ioctl(&[
            // KVM_RUN, KVM_KVMCLOCK_CTRL
            0xae80, 0xaead,
            // KVM_IRQFD, KVM_IOEVENTFD, KVM_SET_GSI_ROUTING, KVM_(UN)REGISTER_COALESCED_MMIO
            0xae76, 0xae79, 0xae6a, 0xae67, 0xae68,
            // KVM_GET_REGS, _SREGS, _MSRS, _LAPIC, _CPUID2, _MP_STATE, _VCPU_EVENTS, _DEBUGREGS, _XSAVE, _XCRS
            0xae81, 0xae83, 0xae88, 0xae8e, 0xae91, 0xae98, 0xae9f, 0xaea1, 0xaea4, 0xaea6,
        ])],
    ),
    (
        "a device begins: its events",
        &[any(libc::SYS_eventfd2), of(libc::SYS_fcntl, 1, &[DUPLICATE]), any(libc::SYS_poll)],
    ),
    ("the console's log is turned over", &[any(libc::SYS_pread64), any(libc::SYS_ftruncate)]),
];

const FILES: [Group; 7] = [
    (
        "what a file is",
        &[
            any(libc::SYS_statx),
            any(libc::SYS_fstatfs),
            any(libc::SYS_readlinkat),
            any(libc::SYS_getxattr),
            any(libc::SYS_listxattr),
        ],
    ),
    (
        "what is in it",
        &[
            any(libc::SYS_openat),
            any(libc::SYS_preadv),
            any(libc::SYS_pwritev),
            any(libc::SYS_lseek),
            any(libc::SYS_getdents64),
        ],
    ),
    (
        "changing it",
        &[
            any(libc::SYS_chmod),
            any(libc::SYS_fchownat),
            any(libc::SYS_utimensat),
            any(libc::SYS_ftruncate),
            any(libc::SYS_fallocate),
            any(libc::SYS_setxattr),
            any(libc::SYS_removexattr),
            any(libc::SYS_fsync),
            any(libc::SYS_fdatasync),
            any(libc::SYS_syncfs),
        ],
    ),
    (
        "names",
        &[
            any(libc::SYS_mkdirat),
            any(libc::SYS_mknodat),
            any(libc::SYS_symlinkat),
            any(libc::SYS_linkat),
            any(libc::SYS_unlinkat),
            // What the C library calls for renameat2() without flags.
            any(libc::SYS_renameat),
            any(libc::SYS_renameat2),
        ],
    ),
    (
        "flags of an open file, and it once more",
        &[of(libc::SYS_fcntl, 1, &[GET_FLAGS, SET_FLAGS, DUPLICATE])],
    ),
    (
        "a directory and a mask of the thread's own",
        &[
            of(libc::SYS_unshare, 0, &[libc::CLONE_FS as u32]),
            any(libc::SYS_fchdir),
            any(libc::SYS_umask),
            of(libc::SYS_prctl, 0, &[libc::PR_GET_SECUREBITS as u32, libc::PR_SET_SECUREBITS as u32]),
        ],
    ),
    ("acting for a user", &[any(libc::SYS_setfsuid), any(libc::SYS_setfsgid)]),
];

const DISK: [Group; 2] = [
    (
        "what is on it",
        &[
            any(libc::SYS_preadv),
            any(libc::SYS_pwritev),
            any(libc::SYS_pwrite64),
            any(libc::SYS_fdatasync),
            any(libc::SYS_fallocate),
        ],
    ),
    ("waiting for room on the host", &[any(libc::SYS_clock_nanosleep)]),
];

const NET: [Group; 4] = [
    ("frames", &[any(libc::SYS_readv), any(libc::SYS_writev)]),
    ("a queue's interrupt, for vhost-net", &[of(libc::SYS_fcntl, 1, &[DUPLICATE])]),
    ("a limit's next moment", &[any(libc::SYS_timerfd_create), any(libc::SYS_timerfd_settime)]),
    (
        "tap and vhost-net as the driver wants them",
        &[ioctl(&[
            // TUNSETOFFLOAD, TUNSETVNETHDRSZ, TUNSETVNETLE, TUNSETQUEUE
            0x54d0, 0x54d8, 0x54dc, 0x54d9,
            // VHOST_GET/SET_FEATURES, _SET_MEM_TABLE, _SET_VRING_NUM, _ADDR, _BASE, _KICK, _CALL, _ERR
            0xaf00, 0xaf03, 0xaf10, 0xaf11, 0xaf12, 0xaf20, 0xaf21, 0xaf22,
            // VHOST_NET_SET_BACKEND
            0xaf30,
        ])],
    ),
];

const MEMORY: [Group; 1] = [("pages go back to the host", &[any(libc::SYS_fallocate)])];

const VSOCK: [Group; 2] = [
    (
        "sockets of the host's programs",
        &[
            any(libc::SYS_accept4),
            of(libc::SYS_socket, 0, &[libc::AF_UNIX as u32]),
            any(libc::SYS_connect),
            any(libc::SYS_readv),
            any(libc::SYS_recvfrom),
            any(libc::SYS_sendmsg),
            any(libc::SYS_shutdown),
            // FIONBIO
            ioctl(&[0x5421]),
        ],
    ),
    (
        "a directory of the thread's own",
        &[of(libc::SYS_unshare, 0, &[libc::CLONE_FS as u32]), any(libc::SYS_fchdir)],
    ),
];

/// Beside what threads of vCPUs, disks and network interfaces call: those that are plugged into the
/// running machine are started here, and a thread can have no more than who starts it.
const CONTROL: [Group; 7] = [
    ("signals, the owner's requests", &[any(libc::SYS_recvmsg)]),
    (
        "those who ask for metrics",
        &[
            any(libc::SYS_accept4),
            any(libc::SYS_sendto),
            any(libc::SYS_recvfrom),
            // FIONBIO
            ioctl(&[0x5421]),
        ],
    ),
    (
        "threads",
        &[
            with(libc::SYS_clone, 0, libc::CLONE_THREAD),
            // It is said not to be there.
            any(libc::SYS_clone3),
            any(libc::SYS_set_robust_list),
            any(libc::SYS_rseq),
            any(libc::SYS_sched_getaffinity),
            any(libc::SYS_rt_sigaction),
            // What they begin with: a name, no capabilities, calls of their own.
            of(libc::SYS_prctl, 0, &[libc::PR_SET_NAME as u32]),
            any(libc::SYS_capget),
            any(libc::SYS_capset),
            any(libc::SYS_seccomp),
        ],
    ),
    (
        "a disk is plugged in",
        &[
            any(libc::SYS_statx),
            of(libc::SYS_fcntl, 1, &[GET_FLAGS, SET_FLAGS]),
            any(libc::SYS_flock),
            any(libc::SYS_lseek),
        ],
    ),
    (
        "a network interface is plugged in",
        &[
            // TUNGETIFF, VHOST_SET_OWNER
            ioctl(&[0x54d2, 0xaf01]),
        ],
    ),
    (
        "a vCPU, memory or a file as memory is plugged in",
        &[
            // KVM_CHECK_EXTENSION, KVM_CREATE_VCPU, KVM_SET_USER_MEMORY_REGION, KVM_X86_SET_MSR_FILTER
            ioctl(&[0xae03, 0xae41, 0xae46, 0xaec6]),
            // KVM_SET_CPUID2, _LAPIC, _MSRS
            ioctl(&[0xae90, 0xae8f, 0xae89]),
        ],
    ),
    (
        "the machine is saved",
        &[
            any(libc::SYS_pwrite64),
            // KVM_GET_IRQCHIP, KVM_GET_CLOCK
            ioctl(&[0xae62, 0xae7c]),
        ],
    ),
];

const BUILDING: [Group; 1] = [
    // KVM's, by their type.
    ("a VM", &[Call { number: libc::SYS_ioctl, only: Only::These(1, 0xff00, &[0xae00]) }]),
];
