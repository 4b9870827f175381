//! Capability sets (capabilities(7)). Bit n of a set is capability n.

use nix::errno::Errno;
use rvm_protocol::agent;

use crate::error::{Error, Step, StepResult};

/// `_LINUX_CAPABILITY_VERSION_3`.
const VERSION_3: u32 = 0x2008_0522;

#[repr(C)]
struct Header {
    version: u32,
    pid: i32,
}

#[repr(C)]
#[derive(Clone, Copy, Default)]
struct Half {
    effective: u32,
    permitted: u32,
    inheritable: u32,
}

/// Checks the sets against each other: the kernel's refusal would not say why.
pub fn check(field: &str, sets: &agent::Capabilities) -> Result<(), Error> {
    let extra = sets.effective & !sets.permitted;
    if extra != 0 {
        let reason = format!("capabilities {extra:#x} must be in permitted too");
        return Err(Error::invalid(format!("{field}.effective"), reason));
    }
    let unraisable = sets.ambient & !raisable(sets);
    if unraisable != 0 {
        // As runc does; specs written for it have such sets.
        log::warn!("{field}.ambient: {unraisable:#x} cannot be raised: not permitted and inheritable");
    }
    Ok(())
}

/// What the kernel lets be ambient.
fn raisable(sets: &agent::Capabilities) -> u64 {
    sets.permitted & sets.inheritable
}

/// Gives up what the bounding set does not hold, while still privileged.
pub fn apply_bounding(sets: &agent::Capabilities) -> StepResult<()> {
    for capability in 0..u64::BITS {
        if sets.bounding & (1 << capability) != 0 {
            continue;
        }
        match prctl(libc::PR_CAPBSET_DROP, capability.into(), 0) {
            Ok(()) => {}
            // Beyond the last capability this kernel knows.
            Err(Errno::EINVAL) => break,
            Err(errno) => {
                return Err(errno).step(|| format!("drop capability {capability} from the bounding set"));
            }
        }
    }
    Ok(())
}

/// Keeps the permitted set over the change of user that follows.
pub fn keep_over_user_change(keep: bool) -> StepResult<()> {
    prctl(libc::PR_SET_KEEPCAPS, keep.into(), 0).step(|| "keep capabilities")
}

/// Sets everything but the bounding set, after the change of user.
pub fn apply(sets: &agent::Capabilities) -> StepResult<()> {
    let half = |shift: u32| Half {
        effective: (sets.effective >> shift) as u32,
        permitted: (sets.permitted >> shift) as u32,
        inheritable: (sets.inheritable >> shift) as u32,
    };
    let header = Header { version: VERSION_3, pid: 0 };
    let data = [half(0), half(32)];
    // SAFETY: version 3 reads a header and two data structs, which outlive the call.
    let result = unsafe { libc::syscall(libc::SYS_capset, &raw const header, data.as_ptr()) };
    Errno::result(result).map(drop).step(|| "set capabilities")?;

    prctl(libc::PR_CAP_AMBIENT, libc::PR_CAP_AMBIENT_CLEAR_ALL as u64, 0)
        .step(|| "clear ambient capabilities")?;
    let ambient = sets.ambient & raisable(sets);
    for capability in (0..u64::BITS).filter(|capability| ambient & (1 << capability) != 0) {
        prctl(libc::PR_CAP_AMBIENT, libc::PR_CAP_AMBIENT_RAISE as u64, capability.into())
            .step(|| format!("raise ambient capability {capability}"))?;
    }
    Ok(())
}

/// Lets no `execve` from here on give privileges.
pub fn set_no_new_privileges() -> StepResult<()> {
    prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0).step(|| "set no_new_privs")
}

fn prctl(option: i32, second: u64, third: u64) -> nix::Result<()> {
    // SAFETY: the options used here take integers only.
    Errno::result(unsafe { libc::prctl(option, second, third, 0, 0) }).map(drop)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn contradictions_are_refused_by_name() {
        let net_bind = 1 << 10;
        let sets = agent::Capabilities { effective: net_bind, permitted: net_bind, ..Default::default() };
        assert!(check("process.capabilities", &sets).is_ok());
        let sets = agent::Capabilities { effective: net_bind, ..Default::default() };
        assert_eq!(
            check("process.capabilities", &sets).unwrap_err().to_string(),
            "process.capabilities.effective: capabilities 0x400 must be in permitted too"
        );
    }

    #[test]
    fn only_what_is_permitted_and_inheritable_becomes_ambient() {
        let sets = agent::Capabilities {
            permitted: 0b011,
            inheritable: 0b110,
            ambient: 0b111,
            ..Default::default()
        };
        assert!(check("c", &sets).is_ok());
        assert_eq!(raisable(&sets), 0b010);
    }
}
