//! bpf(2), as far as device filters of cgroups need it.

use std::{
    io,
    os::fd::{BorrowedFd, OwnedFd},
};

use rvm_protocol::bpf::{self, Instruction, raw};

// linux/bpf.h
const BPF_PROG_ATTACH: libc::c_long = 8;
const BPF_PROG_TYPE_CGROUP_DEVICE: u32 = 15;
const BPF_CGROUP_DEVICE: u32 = 6;
const BPF_F_ALLOW_MULTI: u32 = 1 << 1;
const BPF_F_REPLACE: u32 = 1 << 2;

/// `union bpf_attr` for `BPF_PROG_ATTACH`.
#[repr(C)]
struct Attach {
    target_fd: u32,
    attach_bpf_fd: u32,
    attach_type: u32,
    attach_flags: u32,
    replace_bpf_fd: u32,
    unused: u32,
}

/// Loads a program for `BPF_CGROUP_DEVICE`.
pub fn load_device_program(program: &[Instruction]) -> io::Result<OwnedFd> {
    bpf::load(BPF_PROG_TYPE_CGROUP_DEVICE, 0, "", program)
}

/// Attaches a program to a cgroup, at once in the place of `before` where that
/// is attached. Cgroups below may have programs of their own, which can only
/// forbid more.
pub fn attach_device_program(
    cgroup: BorrowedFd<'_>,
    program: &OwnedFd,
    before: Option<&OwnedFd>,
) -> io::Result<()> {
    let attr = Attach {
        target_fd: raw(&cgroup),
        attach_bpf_fd: raw(program),
        attach_type: BPF_CGROUP_DEVICE,
        attach_flags: BPF_F_ALLOW_MULTI | if before.is_some() { BPF_F_REPLACE } else { 0 },
        replace_bpf_fd: before.map_or(0, raw),
        unused: 0,
    };
    // SAFETY: there is no pointer in `attr`.
    unsafe { bpf::call(BPF_PROG_ATTACH, &attr) }.map(drop)
}
