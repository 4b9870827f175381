//! System calls that no thread of the monitor has a use for once it is shut in (seccomp(2)).
//!
//! Most of them the jail refuses anyway. But each is a part of the host's kernel that a guest
//! which has taken the monitor over would look for a fault in.

use std::collections::BTreeMap;
use std::io;

use libc::c_long;
use seccompiler::SeccompCmpArgLen::Dword;
use seccompiler::SeccompCmpOp::{MaskedEq, Ne};
use seccompiler::{
    BackendError, BpfProgram, SeccompAction, SeccompCmpOp, SeccompCondition, SeccompFilter, SeccompRule,
    TargetArch,
};

use crate::process::ok;

/// Calls that end the monitor. One that the kernel does not know does no harm here.
pub(super) const NEVER: [(&str, &[c_long]); 8] = [
    (
        "mounts, roots and namespaces",
        &[
            libc::SYS_mount,
            libc::SYS_umount2,
            libc::SYS_pivot_root,
            libc::SYS_chroot,
            libc::SYS_setns,
            libc::SYS_open_tree,
            libc::SYS_move_mount,
            libc::SYS_mount_setattr,
            libc::SYS_fsopen,
            libc::SYS_fsconfig,
            libc::SYS_fsmount,
            libc::SYS_fspick,
        ],
    ),
    (
        "other programs and processes",
        &[libc::SYS_execve, libc::SYS_execveat, libc::SYS_fork, libc::SYS_vfork],
    ),
    (
        "what is in other processes",
        &[
            libc::SYS_ptrace,
            libc::SYS_process_vm_readv,
            libc::SYS_process_vm_writev,
            libc::SYS_process_madvise,
            libc::SYS_pidfd_open,
            libc::SYS_pidfd_getfd,
            libc::SYS_kcmp,
            libc::SYS_move_pages,
            libc::SYS_migrate_pages,
        ],
    ),
    (
        "programs and rings in the kernel",
        &[
            libc::SYS_bpf,
            libc::SYS_perf_event_open,
            libc::SYS_userfaultfd,
            libc::SYS_io_uring_setup,
            libc::SYS_io_uring_enter,
            libc::SYS_io_uring_register,
            libc::SYS_io_setup,
            libc::SYS_modify_ldt,
        ],
    ),
    ("keys", &[libc::SYS_add_key, libc::SYS_request_key, libc::SYS_keyctl]),
    ("files by handle", &[libc::SYS_name_to_handle_at, libc::SYS_open_by_handle_at]),
    (
        "what is watched or accounted for the host",
        &[
            libc::SYS_fanotify_init,
            libc::SYS_inotify_init,
            libc::SYS_inotify_init1,
            libc::SYS_quotactl,
            libc::SYS_acct,
            libc::SYS_syslog,
            libc::SYS_lookup_dcookie,
        ],
    ),
    (
        "the host itself",
        &[
            libc::SYS_init_module,
            libc::SYS_finit_module,
            libc::SYS_delete_module,
            libc::SYS_kexec_load,
            libc::SYS_kexec_file_load,
            libc::SYS_reboot,
            libc::SYS_swapon,
            libc::SYS_swapoff,
            libc::SYS_sethostname,
            libc::SYS_setdomainname,
            libc::SYS_settimeofday,
            libc::SYS_clock_settime,
            libc::SYS_clock_adjtime,
            libc::SYS_adjtimex,
            libc::SYS_iopl,
            libc::SYS_ioperm,
            libc::SYS_personality,
            libc::SYS_vhangup,
            libc::SYS_nfsservctl,
        ],
    ),
];

/// Calls that end the monitor where an argument is so.
fn unless_harmless() -> Result<Vec<(c_long, SeccompCondition)>, BackendError> {
    let argument = |index, op: SeccompCmpOp, value: libc::c_int| {
        SeccompCondition::new(index, Dword, op, u64::from(value.cast_unsigned()))
    };
    let bits =
        |index, mask: libc::c_int, value| argument(index, MaskedEq(u64::from(mask.cast_unsigned())), value);
    Ok(vec![
        // A thread's own working directory is all that is left of namespaces.
        (libc::SYS_unshare, argument(0, Ne, libc::CLONE_FS)?),
        (libc::SYS_clone, bits(0, libc::CLONE_THREAD, 0)?),
        (libc::SYS_socket, argument(0, Ne, libc::AF_UNIX)?),
        // No code comes into being.
        (libc::SYS_mmap, bits(2, libc::PROT_EXEC, libc::PROT_EXEC)?),
        (libc::SYS_mprotect, bits(2, libc::PROT_EXEC, libc::PROT_EXEC)?),
        (libc::SYS_pkey_mprotect, bits(2, libc::PROT_EXEC, libc::PROT_EXEC)?),
    ])
}

/// Forbids these calls to this thread and those it starts, for good. Needs `no_new_privs`.
pub(super) fn forbid() -> io::Result<()> {
    let [first, second] = programs().map_err(io::Error::other)?;
    install(&first)?;
    install(&second)
}

/// `clone3` has its flags in memory, where no filter sees them: it is said not to be there, and
/// the C library uses `clone`.
fn programs() -> Result<[BpfProgram; 2], BackendError> {
    let never = NEVER.iter().flat_map(|(_, calls)| calls.iter()).map(|&call| (call, Vec::new()));
    let mut calls: BTreeMap<c_long, Vec<SeccompRule>> = never.collect();
    for (call, condition) in unless_harmless()? {
        calls.insert(call, vec![SeccompRule::new(vec![condition])?]);
    }
    let filter = |calls, action| {
        SeccompFilter::new(calls, SeccompAction::Allow, action, TargetArch::x86_64)
            .and_then(BpfProgram::try_from)
    };
    let clone3 = BTreeMap::from([(libc::SYS_clone3, Vec::new())]);
    Ok([
        filter(clone3, SeccompAction::Errno(libc::ENOSYS.cast_unsigned()))?,
        filter(calls, SeccompAction::KillProcess)?,
    ])
}

fn install(program: &BpfProgram) -> io::Result<()> {
    let len = u16::try_from(program.len()).map_err(io::Error::other)?;
    let program = libc::sock_fprog { len, filter: program.as_ptr().cast_mut().cast() };
    // What a filter is to keep apart is not in one process with what it is kept from: nothing is
    // gained by having the processor guess less.
    let flags = libc::SECCOMP_FILTER_FLAG_SPEC_ALLOW;
    // SAFETY: a program of the length it says, which the kernel copies.
    let result =
        unsafe { libc::syscall(libc::SYS_seccomp, libc::SECCOMP_SET_MODE_FILTER, flags, &raw const program) };
    ok(result as libc::c_int)
}
