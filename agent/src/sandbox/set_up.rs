//! Settings of the guest as a whole.

use nix::unistd::sethostname;

use crate::error::{Error, Step, check_name};

/// Sets the guest's host name, where one is given.
pub fn hostname(name: &str) -> Result<(), Error> {
    check_name("hostname", name)?;
    if !name.is_empty() {
        sethostname(name).step(|| format!("set the host name {name:?}"))?;
    }
    Ok(())
}
