//! System calls by number, so that each attempt is exactly the call it names
//! and not what a library makes of it.

use std::{
    ffi::{CStr, c_long},
    fmt,
    fs::File,
    io::Read,
    os::fd::FromRawFd,
};

use nix::errno::Errno;

/// What a call returned.
pub type Outcome = Result<i64, Errno>;

/// Makes a system call. Arguments that are not given are 0.
///
/// Pointers are passed as numbers: whoever calls keeps what they point to
/// alive and large enough for this call.
pub fn call<const N: usize>(number: c_long, args: [usize; N]) -> Outcome {
    let mut all = [0; 6];
    all[..N].copy_from_slice(&args);
    // SAFETY: each caller's pointers are valid for the call it makes; the calls
    // that would change this process's memory get buffers of their own.
    let result = unsafe { libc::syscall(number, all[0], all[1], all[2], all[3], all[4], all[5]) };
    Errno::result(result)
}

/// A string's address.
pub fn text(text: &CStr) -> usize {
    text.as_ptr() as usize
}

/// A value's address, to be read by a call.
pub fn address<T>(value: &T) -> usize {
    std::ptr::from_ref(value) as usize
}

/// A value's address, to be written by a call.
pub fn address_mut<T>(value: &mut T) -> usize {
    std::ptr::from_mut(value) as usize
}

/// A negative number as an argument.
pub fn signed(number: i64) -> usize {
    number as usize
}

/// `ok` or the error's name.
pub struct Shown<T>(pub Result<T, Errno>);

impl<T> fmt::Display for Shown<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.0 {
            Ok(_) => f.write_str("ok"),
            Err(error) => write!(f, "{error:?}"),
        }
    }
}

/// `ok` or the error's name, of an operation of the standard library.
pub fn shown<T>(result: std::io::Result<T>) -> String {
    match result {
        Ok(_) => "ok".to_owned(),
        Err(error) => error.raw_os_error().map_or_else(|| error.to_string(), |raw| name(raw).to_owned()),
    }
}

/// An error's name.
pub fn name(raw: i32) -> String {
    format!("{:?}", Errno::from_raw(raw))
}

/// Waits for a signal.
pub fn pause() {
    // Without a signal it does not return, and what it returns then says nothing.
    let _ = call(libc::SYS_pause, []);
}

/// Runs `act` in a child process and returns what it said, or how it ended.
pub fn in_child(act: impl FnOnce() -> String) -> String {
    let mut fds = [0i32; 2];
    if let Err(error) =
        call(libc::SYS_pipe2, [fds.as_mut_ptr() as usize, (libc::O_CLOEXEC | libc::O_NONBLOCK) as usize])
    {
        return format!("pipe: {error:?}");
    }
    // SAFETY: this process has one thread.
    let pid = match unsafe { libc::fork() } {
        -1 => return format!("fork: {:?}", Errno::last()),
        pid => pid,
    };
    if pid == 0 {
        let text = act();
        let _ = call(libc::SYS_write, [fds[1] as usize, text.as_ptr() as usize, text.len()]);
        loop {
            let _ = call(libc::SYS_exit_group, [0]);
        }
    }
    let _ = call(libc::SYS_close, [fds[1] as usize]);
    let mut status = 0i32;
    while call(libc::SYS_wait4, [pid as usize, address_mut(&mut status), 0, 0]) == Err(Errno::EINTR) {}
    // SAFETY: the descriptor is the pipe's, and nobody else's.
    let mut pipe = unsafe { File::from_raw_fd(fds[0]) };
    // It has written whatever it was to write; a process it left may hold the other end.
    let mut said = vec![0; 4096];
    let count = pipe.read(&mut said).unwrap_or(0);
    if libc::WIFSIGNALED(status) {
        let signal = libc::WTERMSIG(status);
        let name = nix::sys::signal::Signal::try_from(signal).map_or("a signal", |signal| signal.as_str());
        return format!("killed by {name}");
    }
    String::from_utf8_lossy(&said[..count]).into_owned()
}
