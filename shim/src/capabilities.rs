//! What each process of ours on the host keeps of root's power (capabilities(7)), and why: docs/decisions/0617.
//!
//! A shim runs programs of others, hooks and loggers, which are to have what they have under runc: all that its bounding
//! set gives to whoever executes a program as root. So that one stays whole in a shim, and is taken from the programs and
//! processes that are ours. All here are system calls alone, for between fork and exec.

use std::io;

use caps::Capability;

/// Some of root's capabilities.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Capabilities(u64);

/// A shim's, from before it answers containerd to its end. Threads have no less than the process: one works for all.
pub const SHIM: Capabilities = Capabilities::of(&[
    // Files of bundles, streams, volumes and snapshots are whoever's.
    Capability::CAP_DAC_OVERRIDE,
    // An overlay that is mounted again for who writes to the host copies files up as who mounted it: owners, modes,
    // attributes and device nodes stay what they are, also on the blocks that a file system reserves for root.
    Capability::CAP_CHOWN,
    Capability::CAP_FOWNER,
    Capability::CAP_FSETID,
    Capability::CAP_MKNOD,
    Capability::CAP_SETFCAP,
    // The maps of user namespaces: the monitor's, and those that mounts are mapped by.
    Capability::CAP_SETGID,
    Capability::CAP_SETUID,
    // A hook's group is killed when its time is over, whoever its processes have become.
    Capability::CAP_KILL,
    // Taps, and what leads frames to them.
    Capability::CAP_NET_ADMIN,
    // Mounts, namespaces, BPF programs, marks on cgroups.
    Capability::CAP_SYS_ADMIN,
    // A sandbox's mount namespace is entered for its mounts (setns(2)).
    Capability::CAP_SYS_CHROOT,
    // Namespaces are named /proc/PID/ns/..., of processes that are not dumpable: holders for one.
    Capability::CAP_SYS_PTRACE,
    // An oom_score_adj below containerd's.
    Capability::CAP_SYS_RESOURCE,
    // Taking capabilities from its children for good.
    Capability::CAP_SETPCAP,
]);

/// Those of `delete`, which removes what a dead shim has left and makes nothing.
pub const DELETE: Capabilities = Capabilities::of(&[
    Capability::CAP_DAC_OVERRIDE,
    Capability::CAP_KILL,
    Capability::CAP_NET_ADMIN,
    Capability::CAP_SYS_ADMIN,
    Capability::CAP_SYS_PTRACE,
]);

/// Those a monitor is started with, which gives them up in turn (docs/decisions/0330): a file server's, and what it takes
/// to open what its configuration names and to shut itself in.
pub const MONITOR: Capabilities = Capabilities::of(&[
    Capability::CAP_CHOWN,
    Capability::CAP_DAC_OVERRIDE,
    Capability::CAP_FOWNER,
    Capability::CAP_FSETID,
    Capability::CAP_SETFCAP,
    Capability::CAP_SETGID,
    Capability::CAP_SETUID,
    // Namespaces, and a /proc of its own.
    Capability::CAP_SYS_ADMIN,
    // Its mount namespace, and its root directory.
    Capability::CAP_SYS_CHROOT,
    // As many descriptors as a guest knows files.
    Capability::CAP_SYS_RESOURCE,
]);

/// Those of an image's maker, while it mounts the layers.
pub const IMAGE_MAKER: Capabilities = Capabilities::of(&[
    // An overlay is read as who mounted it may.
    Capability::CAP_DAC_READ_SEARCH,
    Capability::CAP_SYS_ADMIN,
    // Taking the others from who reads them.
    Capability::CAP_SETPCAP,
]);

/// Those of the program that reads the layers, which are whoever's, and writes to a file that is open.
pub const IMAGE_READER: Capabilities = Capabilities::of(&[
    Capability::CAP_DAC_READ_SEARCH,
    // Attributes trusted.* are nobody else's to read.
    Capability::CAP_SYS_ADMIN,
]);

/// Nobody hands on what it does not have.
const _: () = assert!(IMAGE_READER.0 & !IMAGE_MAKER.0 == 0);

/// A holder's, and those of who only prints.
pub const NONE: Capabilities = Capabilities::of(&[]);

/// capget(2) and capset(2).
const VERSION_3: u32 = 0x2008_0522;

#[repr(C)]
struct Header {
    version: u32,
    pid: libc::c_int,
}

/// 32 of each set.
#[repr(C)]
#[derive(Clone, Copy, Default)]
struct Half {
    effective: u32,
    permitted: u32,
    inheritable: u32,
}

impl Capabilities {
    const fn of(list: &[Capability]) -> Self {
        let mut set = 0;
        let mut at = 0;
        while at < list.len() {
            set |= 1 << list[at] as u8;
            at += 1;
        }
        Self(set)
    }

    /// As `/proc/PID/status` has it.
    pub const fn mask(self) -> u64 {
        self.0
    }

    /// Takes all others from the calling thread and from those it starts. What it executes as root has what the bounding
    /// set says, which stays.
    pub fn keep(self) -> io::Result<()> {
        self.set(|inheritable, _| inheritable)
    }

    /// Takes all others from the calling thread and from whatever it starts or executes, for good.
    pub fn keep_for_good(self) -> io::Result<()> {
        self.bound()?;
        self.set(|inheritable, kept| inheritable & kept)?;
        // SAFETY: PR_SET_NO_NEW_PRIVS takes numbers.
        ok(unsafe { libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) })
    }

    /// Takes all others from what the calling thread executes as root.
    pub fn bound(self) -> io::Result<()> {
        // Who may not is in somebody else's bounds.
        if !Self(joined(&get()?, |half| half.effective)).has(Capability::CAP_SETPCAP) {
            return Ok(());
        }
        for number in 0..u64::BITS {
            // SAFETY: PR_CAPBSET_READ takes a number.
            match unsafe { libc::prctl(libc::PR_CAPBSET_READ, number) } {
                1 if self.0 & (1 << number) == 0 => {
                    // SAFETY: PR_CAPBSET_DROP takes a number.
                    ok(unsafe { libc::prctl(libc::PR_CAPBSET_DROP, number) })?;
                }
                0 | 1 => {}
                // The last one that this kernel knows was before it.
                _ => break,
            }
        }
        Ok(())
    }

    /// Whether this is one of them.
    const fn has(self, capability: Capability) -> bool {
        self.0 & Self::of(&[capability]).0 != 0
    }

    /// Sets what may be used to those of them that the thread has, and what it hands on to what `inheritable` makes of
    /// that and of them.
    fn set(self, inheritable: impl Fn(u32, u32) -> u32) -> io::Result<()> {
        let mut halves = get()?;
        for (half, kept) in halves.iter_mut().zip([self.0 as u32, (self.0 >> 32) as u32]) {
            half.permitted &= kept;
            half.effective = half.permitted;
            half.inheritable = inheritable(half.inheritable, kept);
        }
        let header = Header { version: VERSION_3, pid: 0 };
        // SAFETY: both are complete and of the version that is named; the kernel reads them during the call.
        match unsafe { libc::syscall(libc::SYS_capset, &raw const header, halves.as_ptr()) } {
            0 => Ok(()),
            _ => Err(io::Error::last_os_error()),
        }
    }
}

/// The calling thread's.
fn get() -> io::Result<[Half; 2]> {
    let mut header = Header { version: VERSION_3, pid: 0 };
    let mut halves = [Half::default(); 2];
    // SAFETY: both have room for what the kernel writes for the version that is named.
    match unsafe { libc::syscall(libc::SYS_capget, &raw mut header, halves.as_mut_ptr()) } {
        0 => Ok(halves),
        _ => Err(io::Error::last_os_error()),
    }
}

fn joined([low, high]: &[Half; 2], part: impl Fn(&Half) -> u32) -> u64 {
    u64::from(part(low)) | u64::from(part(high)) << 32
}

fn ok(result: libc::c_int) -> io::Result<()> {
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What `/proc/thread-self/status` says of a set.
    fn seen(name: &str) -> u64 {
        let status = std::fs::read_to_string("/proc/thread-self/status").unwrap();
        let line = status.lines().find_map(|line| line.strip_prefix(name)).unwrap();
        u64::from_str_radix(line.trim(), 16).unwrap()
    }

    /// Does `work` on a thread, whose capabilities are its own.
    fn apart(work: impl FnOnce() + Send) {
        std::thread::scope(|scope| scope.spawn(work).join().unwrap());
    }

    #[test]
    fn others_go_and_what_is_executed_may_have_them() {
        apart(|| {
            let (before, bounds) = (seen("CapPrm:"), seen("CapBnd:"));
            SHIM.keep().unwrap();
            for set in ["CapPrm:", "CapEff:"] {
                assert_eq!(seen(set), before & SHIM.mask(), "{set}");
            }
            assert_eq!(seen("CapBnd:"), bounds);
            // What is gone does not come back.
            MONITOR.keep().unwrap();
            SHIM.keep().unwrap();
            assert_eq!(seen("CapPrm:"), before & SHIM.mask() & MONITOR.mask());
        });
    }

    #[test]
    fn for_good_is_for_what_is_executed_too() {
        if !nix::unistd::geteuid().is_root() {
            return;
        }
        apart(|| {
            IMAGE_READER.keep_for_good().unwrap();
            let output = std::process::Command::new("cat").arg("/proc/self/status").output().unwrap();
            let status = String::from_utf8(output.stdout).unwrap();
            let field = |name: &str| status.lines().find_map(|line| line.strip_prefix(name)).unwrap().trim();
            for set in ["CapPrm:", "CapEff:", "CapBnd:"] {
                assert_eq!(u64::from_str_radix(field(set), 16).unwrap(), IMAGE_READER.mask(), "{status}");
            }
            assert_eq!((field("CapInh:"), field("NoNewPrivs:")), ("0000000000000000", "1"));
        });
        apart(|| {
            NONE.keep_for_good().unwrap();
            assert!(["CapPrm:", "CapEff:", "CapBnd:", "CapInh:", "CapAmb:"].iter().all(|set| seen(set) == 0));
        });
    }
}
