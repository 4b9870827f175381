//! Landlock: which files can be opened, by whatever way they are reached
//! (Documentation/userspace-api/landlock.rst).
//!
//! A descriptor names its file in `/proc/self/fd`, and who may read a file may have been
//! given it for reading alone: a disk that is read-only, the kernel that every sandbox boots.
//! Those are of no directory that is allowed.

use std::os::fd::BorrowedFd;

use landlock::{
    ABI, Access, AccessFs, BitFlags, CompatLevel, Compatible, PathBeneath, Ruleset, RulesetAttr,
    RulesetCreatedAttr, RulesetError, RulesetStatus,
};

/// Restricts this thread and those it starts to what is below `share`, where nothing is
/// executed and no block device is made, and to reading what is below `proc`. False where the
/// kernel has no Landlock, or one (before Linux 5.19) that would let nobody rename a file
/// into another directory.
pub(super) fn restrict(share: BorrowedFd<'_>, proc: BorrowedFd<'_>) -> Result<bool, RulesetError> {
    let renaming =
        Ruleset::default().set_compatibility(CompatLevel::HardRequirement).handle_access(AccessFs::Refer);
    let Ok(rules) = renaming else { return Ok(false) };
    let all = AccessFs::from_all(ABI::V5);
    let of_share: BitFlags<AccessFs> = all & !(AccessFs::Execute | AccessFs::MakeBlock);
    let of_proc = AccessFs::ReadFile | AccessFs::ReadDir;
    let status = rules
        .set_compatibility(CompatLevel::BestEffort)
        .handle_access(all)?
        .create()?
        .add_rule(PathBeneath::new(share, of_share))?
        .add_rule(PathBeneath::new(proc, of_proc))?
        .restrict_self()?;
    Ok(status.ruleset != RulesetStatus::NotEnforced)
}
