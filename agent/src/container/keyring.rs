//! The session keyring of a container (session-keyring(7)): as with runc each
//! has one of its own, `_ses.` and its id.

use std::ffi::CString;

use nix::errno::Errno;

use crate::error::{Step, StepError, StepResult};

/// Operations of keyctl(2).
const JOIN_SESSION_KEYRING: libc::c_int = 1;
const SETPERM: libc::c_int = 5;
const DESCRIBE: libc::c_int = 6;

/// Permission to search it: for processes of the same user, and for all others.
const SEARCH_BY_USER: u32 = 0x0008_0000;
const SEARCH_BY_OTHERS: u32 = 0x0000_0008;

/// Serial number of a keyring.
#[derive(Clone, Copy, Debug)]
pub struct Keyring(libc::c_long);

/// Leaves the agent's session keyring for the container's, made where it does
/// not exist. None where the kernel has no keyrings.
pub fn join_session(container_id: &str) -> StepResult<Option<Keyring>> {
    let step = || "join the container's session keyring";
    let name = CString::new(format!("_ses.{container_id}")).map_err(|_| Errno::EINVAL).step(step)?;
    // SAFETY: `name` is a NUL-terminated string that outlives the call.
    let result = unsafe { libc::syscall(libc::SYS_keyctl, JOIN_SESSION_KEYRING, name.as_ptr()) };
    match Errno::result(result) {
        Ok(serial) => Ok(Some(Keyring(serial))),
        Err(Errno::ENOSYS) => Ok(None),
        Err(errno) => Err(errno).step(step),
    }
}

/// Lets processes of the container that are added later find it: those of the
/// same user, and in a user namespace all.
pub fn open_to(keyring: Option<Keyring>, user_namespace: bool) -> StepResult<()> {
    let Some(Keyring(serial)) = keyring else { return Ok(()) };
    let step = || "open the container's session keyring";
    // type;uid;gid;permissions;name, of which the name alone can be long.
    let mut text = [0_u8; 512];
    // SAFETY: the kernel writes at most as many bytes as `text` has.
    let result = unsafe { libc::syscall(libc::SYS_keyctl, DESCRIBE, serial, text.as_mut_ptr(), text.len()) };
    Errno::result(result).step(step)?;
    let text = String::from_utf8_lossy(&text);
    let permissions = text.split(';').nth(3).and_then(|field| u32::from_str_radix(field, 16).ok());
    let permissions =
        permissions.ok_or_else(|| StepError::Refused(format!("{}: what is {text:?}", step())))?;
    let search = if user_namespace { SEARCH_BY_OTHERS } else { SEARCH_BY_USER };
    // SAFETY: takes integers only.
    let result = unsafe { libc::syscall(libc::SYS_keyctl, SETPERM, serial, permissions | search) };
    Errno::result(result).map(drop).step(step)
}
