//! bpf(2), as far as device filters of cgroups need it.

use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};

use nix::errno::Errno;

// linux/bpf.h
const BPF_PROG_LOAD: libc::c_long = 5;
const BPF_PROG_ATTACH: libc::c_long = 8;
const BPF_PROG_TYPE_CGROUP_DEVICE: u32 = 15;
const BPF_CGROUP_DEVICE: u32 = 6;
const BPF_F_ALLOW_MULTI: u32 = 1 << 1;
const BPF_F_REPLACE: u32 = 1 << 2;

/// `struct bpf_insn`.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Instruction {
    /// Operation.
    pub code: u8,
    /// Destination in the lower four bits, source in the upper ones.
    pub registers: u8,
    /// Of a jump or a load.
    pub offset: i16,
    /// Constant operand.
    pub immediate: i32,
}

/// `union bpf_attr` for `BPF_PROG_LOAD`, up to where it is used; the kernel
/// takes what is missing for zeroes.
#[repr(C)]
struct Load {
    prog_type: u32,
    insn_cnt: u32,
    insns: u64,
    license: u64,
}

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

/// `attr` must hold no pointer to anything shorter than it says.
unsafe fn bpf<T>(command: libc::c_long, attr: &T) -> nix::Result<libc::c_long> {
    // SAFETY: `attr` is a valid struct of the size given and outlives the call;
    // what it points to is the caller's business.
    Errno::result(unsafe { libc::syscall(libc::SYS_bpf, command, &raw const *attr, size_of::<T>()) })
}

fn raw(fd: RawFd) -> u32 {
    fd.cast_unsigned()
}

/// Loads a program for `BPF_CGROUP_DEVICE`.
pub fn load_device_program(program: &[Instruction]) -> nix::Result<OwnedFd> {
    let attr = Load {
        prog_type: BPF_PROG_TYPE_CGROUP_DEVICE,
        insn_cnt: u32::try_from(program.len()).map_err(|_| Errno::E2BIG)?,
        insns: program.as_ptr() as u64,
        license: c"Apache-2.0".as_ptr() as u64,
    };
    // SAFETY: `insns` points to `insn_cnt` instructions and `license` to a
    // literal; both outlive the call.
    let fd = unsafe { bpf(BPF_PROG_LOAD, &attr) }?;
    // SAFETY: the call returned a new descriptor that nobody else owns;
    // descriptors fit in an int.
    Ok(unsafe { OwnedFd::from_raw_fd(fd as RawFd) })
}

/// Attaches a program to a cgroup, at once in the place of `before` where that
/// is attached. Cgroups below may have programs of their own, which can only
/// forbid more.
pub fn attach_device_program(
    cgroup: BorrowedFd<'_>,
    program: &OwnedFd,
    before: Option<&OwnedFd>,
) -> nix::Result<()> {
    let attr = Attach {
        target_fd: raw(cgroup.as_raw_fd()),
        attach_bpf_fd: raw(program.as_raw_fd()),
        attach_type: BPF_CGROUP_DEVICE,
        attach_flags: BPF_F_ALLOW_MULTI | if before.is_some() { BPF_F_REPLACE } else { 0 },
        replace_bpf_fd: before.map_or(0, |before| raw(before.as_raw_fd())),
        unused: 0,
    };
    // SAFETY: there is no pointer in `attr`.
    unsafe { bpf(BPF_PROG_ATTACH, &attr) }.map(drop)
}
