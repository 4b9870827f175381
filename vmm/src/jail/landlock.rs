//! Landlock: which files can be opened, by whatever way they are reached
//! (Documentation/userspace-api/landlock.rst).
//!
//! A descriptor names its file in `/proc/self/fd`, and who may read a file may have been
//! given it for reading alone: a disk that is read-only, the kernel that every sandbox boots.
//! Those are of no directory that is allowed.

use std::os::fd::BorrowedFd;

use landlock::{
    ABI, Access, AccessFs, BitFlags, PathBeneath, Ruleset, RulesetAttr, RulesetCreatedAttr, RulesetError,
    RulesetStatus,
};

/// Whether this kernel has Landlock: one (from Linux 5.19 on) that lets files be renamed into
/// another directory.
pub fn is_there() -> bool {
    const LANDLOCK_CREATE_RULESET_VERSION: libc::c_uint = 1;
    let (none, no_bytes) = (std::ptr::null::<u8>(), 0_usize);
    // SAFETY: no rules are given; the version is asked for.
    unsafe {
        libc::syscall(libc::SYS_landlock_create_ruleset, none, no_bytes, LANDLOCK_CREATE_RULESET_VERSION) >= 2
    }
}

/// Restricts this thread and those it starts to what is below `share`, where nothing is
/// executed and no block device is made, and to reading what is below `proc`. False where
/// [`is_there`] says that it cannot be.
pub(super) fn restrict(share: BorrowedFd<'_>, proc: BorrowedFd<'_>) -> Result<bool, RulesetError> {
    if !is_there() {
        return Ok(false);
    }
    let all = AccessFs::from_all(ABI::V5);
    let of_share: BitFlags<AccessFs> = all & !(AccessFs::Execute | AccessFs::MakeBlock);
    let of_proc = AccessFs::ReadFile | AccessFs::ReadDir;
    let status = Ruleset::default()
        .handle_access(all)?
        .create()?
        .add_rule(PathBeneath::new(share, of_share))?
        .add_rule(PathBeneath::new(proc, of_proc))?
        .restrict_self()?;
    Ok(status.ruleset != RulesetStatus::NotEnforced)
}
