//! bpf(2), as far as programs about sockets, packets and devices need it.

use std::{
    io,
    os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd},
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

/// `union bpf_attr` for `BPF_PROG_LOAD`, up to where it is used.
#[repr(C)]
struct Load {
    prog_type: u32,
    insn_cnt: u32,
    insns: u64,
    license: u64,
    log_level: u32,
    log_size: u32,
    log_buf: u64,
    kern_version: u32,
    prog_flags: u32,
    prog_name: [u8; 16],
    prog_ifindex: u32,
    expected_attach_type: u32,
}

/// A command whose result is a number.
///
/// # Safety
/// `attr` must hold no pointer to anything shorter than it says.
pub unsafe fn call<T>(command: libc::c_long, attr: &T) -> io::Result<RawFd> {
    // SAFETY: `attr` is a valid struct of the size given and outlives the call;
    // what it points to is the caller's business.
    let result = unsafe { libc::syscall(libc::SYS_bpf, command, &raw const *attr, size_of::<T>()) };
    if result < 0 {
        return Err(io::Error::last_os_error());
    }
    RawFd::try_from(result).map_err(io::Error::other)
}

/// A command that makes something.
///
/// # Safety
/// As for [`call`], and the command's result must be a new descriptor.
pub unsafe fn make<T>(command: libc::c_long, attr: &T) -> io::Result<OwnedFd> {
    // SAFETY: by this function's own conditions.
    let fd = unsafe { call(command, attr) }?;
    // SAFETY: by this function's own conditions; nobody else has it.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// A descriptor as it is in attributes.
pub fn raw(fd: &impl AsRawFd) -> u32 {
    fd.as_raw_fd().cast_unsigned()
}

/// Has the instructions of a program whose offset is `place` jump to the one at `to`, which comes
/// behind them: for targets that are not known when the jumps are written.
pub fn lead(program: &mut [Instruction], place: i16, to: usize) {
    for (at, instruction) in program.iter_mut().enumerate() {
        if instruction.offset == place {
            // Fewer instructions than an i16 counts.
            instruction.offset = (to - at - 1) as i16;
        }
    }
}

/// Loads a program: its type (`BPF_PROG_TYPE_*`), what it is to be attached to (`BPF_*`;
/// 0 where the type says it), a name of at most 15 bytes that tools show, or none.
pub fn load(kind: u32, attach: u32, name: &str, program: &[Instruction]) -> io::Result<OwnedFd> {
    let mut prog_name = [0; 16];
    for (to, from) in prog_name.iter_mut().take(15).zip(name.bytes()) {
        *to = from;
    }
    let load = Load {
        prog_type: kind,
        insn_cnt: u32::try_from(program.len()).map_err(io::Error::other)?,
        insns: program.as_ptr() as u64,
        license: c"Apache-2.0".as_ptr() as u64,
        log_level: 0,
        log_size: 0,
        log_buf: 0,
        kern_version: 0,
        prog_flags: 0,
        prog_name,
        prog_ifindex: 0,
        expected_attach_type: attach,
    };
    // SAFETY: `insns` points to `insn_cnt` instructions and `license` to a literal;
    // both outlive the call, which makes a descriptor.
    unsafe { make(BPF_PROG_LOAD, &load) }
}
