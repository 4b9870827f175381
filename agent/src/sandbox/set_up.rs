//! Settings of the guest as a whole.

use nix::unistd::sethostname;

use crate::error::{Error, Step};

/// Longest host name the kernel takes (`__NEW_UTS_LEN`).
pub const HOST_NAME_MAX: usize = 64;

/// Sets the guest's host name, where one is given.
pub fn hostname(name: &str) -> Result<(), Error> {
    check_name("hostname", name)?;
    if !name.is_empty() {
        sethostname(name).step(|| format!("set the host name {name:?}"))?;
    }
    Ok(())
}

/// Checks a host or domain name, which may be empty.
pub fn check_name(field: &str, name: &str) -> Result<(), Error> {
    if name.len() > HOST_NAME_MAX || name.contains('\0') {
        return Err(Error::invalid(
            field,
            format!("{name:?} must have at most {HOST_NAME_MAX} bytes and no NUL"),
        ));
    }
    Ok(())
}
