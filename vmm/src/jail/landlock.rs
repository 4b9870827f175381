//! Landlock: which files can be opened for writing, by whatever way they are reached
//! (Documentation/userspace-api/landlock.rst).
//!
//! A descriptor names its file in `/proc/self/fd`, and who may read a file may have been
//! given it for reading alone: a disk that is read-only. Its shim lends it by a mount that
//! nobody writes to; this is a second bolt, for opening it for writing.

use std::os::fd::BorrowedFd;

use landlock::{
    AccessFs, PathBeneath, Ruleset, RulesetAttr, RulesetCreatedAttr, RulesetError, RulesetStatus,
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

/// Restricts this thread and those it starts: a file is opened for writing, or given a name in another
/// directory, below `share` alone; nothing is executed and no block device made. False where
/// [`is_there`] says that it cannot be.
///
/// What is read, made and removed is not asked about. For that the kernel goes up the tree from every
/// file to `share`, a good part of what a small file costs the server, and finds what is so anyway:
/// there is nothing else to be reached.
pub(super) fn restrict(share: BorrowedFd<'_>) -> Result<bool, RulesetError> {
    if !is_there() {
        return Ok(false);
    }
    let of_share = AccessFs::WriteFile | AccessFs::Refer;
    let status = Ruleset::default()
        .handle_access(of_share | AccessFs::Execute | AccessFs::MakeBlock)?
        .create()?
        .add_rule(PathBeneath::new(share, of_share))?
        .restrict_self()?;
    Ok(status.ruleset != RulesetStatus::NotEnforced)
}
