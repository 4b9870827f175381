//! Identity, other processes, namespaces, scheduling.

use libc::{
    CLONE_NEWCGROUP, CLONE_NEWIPC, CLONE_NEWNET, CLONE_NEWNS, CLONE_NEWPID, CLONE_NEWUSER, CLONE_NEWUTS,
    SYS_clone3, SYS_getppid, SYS_ioprio_set, SYS_kcmp, SYS_kill, SYS_mlock, SYS_open, SYS_personality,
    SYS_pidfd_getfd, SYS_pidfd_open, SYS_prctl, SYS_prlimit64, SYS_process_vm_readv, SYS_ptrace,
    SYS_sched_setaffinity, SYS_sched_setscheduler, SYS_setgid, SYS_setgroups, SYS_setns, SYS_setpriority,
    SYS_setresuid, SYS_setsid, SYS_setuid, SYS_unshare,
};
use nix::errno::Errno;

use super::Attempt;
use crate::calls::{Outcome, address, call, signed, text};

const CLONE_NEWTIME: usize = 0x80;

pub const ATTEMPTS: &[Attempt] = &[
    ("setuid_1234", || call(SYS_setuid, [1234])),
    ("setuid_0", || call(SYS_setuid, [0])),
    ("setgid_1234", || call(SYS_setgid, [1234])),
    ("setgroups_1234", || {
        let groups = [1234u32];
        call(SYS_setgroups, [1, address(&groups)])
    }),
    ("setuid_and_back", || {
        call(SYS_setresuid, [signed(-1), 1234, signed(-1)])?;
        call(SYS_setresuid, [signed(-1), 0, signed(-1)])
    }),
    ("gain_all_capabilities", || set_capabilities(u32::MAX, 0x1ff)),
    ("keep_no_capability", || set_capabilities(0, 0)),
    ("bounding_set_drop", || call(SYS_prctl, [libc::PR_CAPBSET_DROP as usize, 0])),
    ("ambient_raise_net_bind", || {
        call(SYS_prctl, [libc::PR_CAP_AMBIENT as usize, libc::PR_CAP_AMBIENT_RAISE as usize, 10])
    }),
    ("secure_bits", || call(SYS_prctl, [libc::PR_SET_SECUREBITS as usize, 0])),
    ("undo_no_new_privileges", || call(SYS_prctl, [libc::PR_SET_NO_NEW_PRIVS as usize, 0])),
    ("set_no_new_privileges", || call(SYS_prctl, [libc::PR_SET_NO_NEW_PRIVS as usize, 1])),
    ("set_dumpable", || call(SYS_prctl, [libc::PR_SET_DUMPABLE as usize, 1])),
    ("load_seccomp_filter", || {
        // BPF_RET | BPF_K, SECCOMP_RET_ALLOW
        let program = [0x7fff_0000_0000_0006u64];
        let filter = [1u64, address(&program) as u64];
        call(libc::SYS_seccomp, [libc::SECCOMP_SET_MODE_FILTER as usize, 0, address(&filter)])
    }),
    ("ptrace_parent", || call(SYS_ptrace, [libc::PTRACE_SEIZE as usize, parent()?, 0, 0])),
    ("ptrace_own_child", || call(SYS_ptrace, [libc::PTRACE_TRACEME as usize])),
    ("read_memory_of_parent", || {
        let mut byte = [0u8; 8];
        let local = [byte.as_mut_ptr() as usize, byte.len()];
        // The same address in the parent holds the same stack.
        let remote = [byte.as_ptr() as usize, byte.len()];
        call(SYS_process_vm_readv, [parent()?, address(&local), 1, address(&remote), 1, 0])
    }),
    ("kcmp_parent", || call(SYS_kcmp, [parent()?, parent()?, 2])),
    ("pidfd_of_init", || call(SYS_pidfd_open, [1, 0])),
    ("descriptor_of_init", || {
        let init = call(SYS_pidfd_open, [1, 0])? as usize;
        call(SYS_pidfd_getfd, [init, 0, 0])
    }),
    ("environment_of_init", || call(SYS_open, [text(c"/proc/1/environ"), 0])),
    ("signal_init", || call(SYS_kill, [1, 0])),
    ("kill_init", || {
        call(SYS_kill, [1, libc::SIGKILL as usize])?;
        call(SYS_kill, [1, 0])
    }),
    ("signal_pid_2", || call(SYS_kill, [2, 0])),
    ("setsid", || call(SYS_setsid, [])),
    ("raise_priority", || call(SYS_setpriority, [libc::PRIO_PROCESS as usize, 0, signed(-5)])),
    ("lower_priority", || call(SYS_setpriority, [libc::PRIO_PROCESS as usize, 0, 5])),
    ("real_time", || {
        let priority = 1u32;
        call(SYS_sched_setscheduler, [0, libc::SCHED_FIFO as usize, address(&priority)])
    }),
    ("batch_scheduling", || {
        let priority = 0u32;
        call(SYS_sched_setscheduler, [0, libc::SCHED_BATCH as usize, address(&priority)])
    }),
    ("affinity", || {
        let cpus = 1u64;
        call(SYS_sched_setaffinity, [0, 8, address(&cpus)])
    }),
    // Class in the upper bits: 1 real time, 3 idle (ioprio_set(2)).
    ("io_real_time", || call(SYS_ioprio_set, [1, 0, 1 << 13])),
    ("io_idle", || call(SYS_ioprio_set, [1, 0, 3 << 13])),
    ("raise_open_files", || raise_limit(libc::RLIMIT_NOFILE)),
    ("raise_locked_memory", || raise_limit(libc::RLIMIT_MEMLOCK)),
    ("lock_memory", || {
        let page = vec![0u8; 4096];
        call(SYS_mlock, [page.as_ptr() as usize, page.len()])
    }),
    ("oom_score_lower", || write(c"/proc/self/oom_score_adj", b"-999")),
    ("oom_score_higher", || write(c"/proc/self/oom_score_adj", b"999")),
    ("personality", || call(SYS_personality, [libc::ADDR_NO_RANDOMIZE as usize])),
    // PER_LINUX32 (personality(2))
    ("personality_32_bit", || call(SYS_personality, [8])),
    ("unshare_user", || call(SYS_unshare, [CLONE_NEWUSER as usize])),
    ("unshare_mount", || call(SYS_unshare, [CLONE_NEWNS as usize])),
    ("unshare_network", || call(SYS_unshare, [CLONE_NEWNET as usize])),
    ("unshare_pid", || call(SYS_unshare, [CLONE_NEWPID as usize])),
    ("unshare_uts", || call(SYS_unshare, [CLONE_NEWUTS as usize])),
    ("unshare_ipc", || call(SYS_unshare, [CLONE_NEWIPC as usize])),
    ("unshare_cgroup", || call(SYS_unshare, [CLONE_NEWCGROUP as usize])),
    ("unshare_time", || call(SYS_unshare, [CLONE_NEWTIME])),
    ("unshare_files", || call(SYS_unshare, [libc::CLONE_FILES as usize])),
    ("clone3_too_small", || call(SYS_clone3, [0, 0])),
    ("enter_own_network", || {
        let namespace = call(SYS_open, [text(c"/proc/self/ns/net"), 0])? as usize;
        call(SYS_setns, [namespace, 0])
    }),
    ("enter_own_mounts", || {
        let namespace = call(SYS_open, [text(c"/proc/self/ns/mnt"), 0])? as usize;
        call(SYS_setns, [namespace, 0])
    }),
    ("set_host_name", || call(libc::SYS_sethostname, [text(c"probe"), 5])),
    ("set_domain_name", || call(libc::SYS_setdomainname, [text(c"probe"), 5])),
];

fn parent() -> Result<usize, Errno> {
    call(SYS_getppid, []).map(|pid| pid as usize)
}

/// Sets permitted and effective set; the header asks for `_LINUX_CAPABILITY_VERSION_3`.
fn set_capabilities(low: u32, high: u32) -> Outcome {
    let header = [0x2008_0522u32, 0];
    let sets = [low, low, 0, high, high, 0];
    call(libc::SYS_capset, [address(&header), address(&sets)])
}

fn raise_limit(resource: libc::__rlimit_resource_t) -> Outcome {
    let mut limit = [0u64; 2];
    call(SYS_prlimit64, [0, resource as usize, 0, limit.as_mut_ptr() as usize])?;
    limit[1] = limit[1].saturating_add(1);
    call(SYS_prlimit64, [0, resource as usize, address(&limit), 0])
}

fn write(path: &std::ffi::CStr, bytes: &[u8]) -> Outcome {
    let file = call(SYS_open, [text(path), libc::O_WRONLY as usize])? as usize;
    call(libc::SYS_write, [file, bytes.as_ptr() as usize, bytes.len()])
}
