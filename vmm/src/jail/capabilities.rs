//! Capabilities (capabilities(7)): those a file server acts with, and none.

use caps::errors::CapsError;
use caps::{CapSet, Capability, CapsHashSet};
use std::io;

use crate::process::ok;

/// What it takes to make, own and change files as whoever the guest says does: the guest's
/// kernel has checked what he may do.
const FOR_FILES: [Capability; 7] = [
    Capability::CAP_CHOWN,
    Capability::CAP_DAC_OVERRIDE,
    Capability::CAP_FOWNER,
    Capability::CAP_FSETID,
    Capability::CAP_SETGID,
    Capability::CAP_SETUID,
    Capability::CAP_SETFCAP,
];

/// Keeps what a file server needs, also while it acts for another user, and nothing else,
/// for this thread and those it starts.
pub(super) fn keep_for_files() -> io::Result<()> {
    // SAFETY: PR_SET_SECUREBITS takes a number.
    ok(unsafe { libc::prctl(libc::PR_SET_SECUREBITS, libc::SECBIT_NO_SETUID_FIXUP) })?;
    keep(&FOR_FILES.into()).map_err(io::Error::other)
}

/// Gives up every capability of the calling thread.
pub(super) fn drop_all() -> io::Result<()> {
    keep(&CapsHashSet::new()).map_err(io::Error::other)
}

fn keep(set: &CapsHashSet) -> Result<(), CapsError> {
    caps::clear(None, CapSet::Inheritable)?;
    caps::set(None, CapSet::Effective, set)?;
    caps::set(None, CapSet::Permitted, set)
}
