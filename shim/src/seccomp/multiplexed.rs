//! x86's `socketcall` and `ipc`: one number each for many calls, which of them
//! being the first argument (linux/net.h, linux/ipc.h).

use super::profile::{Comparison, Condition};

const SOCKETCALL: u32 = 102;
const IPC: u32 = 117;

/// From 1 on.
const SOCKET_CALLS: [&str; 20] = [
    "socket",
    "bind",
    "connect",
    "listen",
    "accept",
    "getsockname",
    "getpeername",
    "socketpair",
    "send",
    "recv",
    "sendto",
    "recvfrom",
    "shutdown",
    "setsockopt",
    "getsockopt",
    "sendmsg",
    "recvmsg",
    "accept4",
    "recvmmsg",
    "sendmmsg",
];

const IPC_CALLS: [(&str, u64); 12] = [
    ("semop", 1),
    ("semget", 2),
    ("semctl", 3),
    ("semtimedop", 4),
    ("msgsnd", 11),
    ("msgrcv", 12),
    ("msgget", 13),
    ("msgctl", 14),
    ("shmat", 21),
    ("shmdt", 22),
    ("shmget", 23),
    ("shmctl", 24),
];

/// The multiplexer of a call and what selects the call in it.
pub(super) fn call(name: &str) -> Option<(u32, Condition)> {
    let selector = |mask, value| Condition { argument: 0, comparison: Comparison::MaskedEqual(mask, value) };
    if let Some(n) = SOCKET_CALLS.iter().position(|call| *call == name) {
        return Some((SOCKETCALL, selector(u64::MAX, n as u64 + 1)));
    }
    // The upper half of the argument is a version.
    let (_, number) = IPC_CALLS.iter().find(|(call, _)| *call == name)?;
    Some((IPC, selector(0xffff, *number)))
}
