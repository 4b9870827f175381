//! bpf(2), as far as programs about packets and sockets need it.

use std::{
    io,
    os::fd::{FromRawFd, OwnedFd, RawFd},
};

// linux/bpf.h
const BPF_PROG_LOAD: libc::c_long = 5;

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

/// `union bpf_attr` for `BPF_PROG_LOAD`, up to where it is used; the kernel takes what
/// is missing for zeroes.
#[repr(C)]
struct Load {
    prog_type: u32,
    insn_cnt: u32,
    insns: u64,
    license: u64,
}

/// Loads a program of the type `kind` (`BPF_PROG_TYPE_*`).
pub fn load(kind: u32, program: &[Instruction]) -> io::Result<OwnedFd> {
    let attr = Load {
        prog_type: kind,
        insn_cnt: u32::try_from(program.len()).map_err(io::Error::other)?,
        insns: program.as_ptr() as u64,
        license: c"Apache-2.0".as_ptr() as u64,
    };
    // SAFETY: `attr` is a valid struct of the size given; it, the `insn_cnt`
    // instructions that `insns` points to and the literal outlive the call.
    let result = unsafe { libc::syscall(libc::SYS_bpf, BPF_PROG_LOAD, &raw const attr, size_of::<Load>()) };
    if result < 0 {
        return Err(io::Error::last_os_error());
    }
    let fd = RawFd::try_from(result).map_err(io::Error::other)?;
    // SAFETY: the call returned a new descriptor that nobody else owns.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}
