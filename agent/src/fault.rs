//! The agent's death before an answer, for tests: a build without the feature `faults` has nothing of it.
//!
//! `rvm_fault=N` among the kernel's parameters, which the kernel hands on to its first process, says before which.

#[cfg(feature = "faults")]
pub use planned::answering;

/// Nothing is planned.
#[cfg(not(feature = "faults"))]
pub fn answering() {}

#[cfg(feature = "faults")]
mod planned {
    use std::sync::{
        OnceLock,
        atomic::{AtomicU64, Ordering},
    };

    static AT: OnceLock<Option<u64>> = OnceLock::new();
    static ANSWERED: AtomicU64 = AtomicU64::new(0);

    /// Comes to an answer; dies where it is the chosen one.
    pub fn answering() {
        let at = AT.get_or_init(|| std::env::var("rvm_fault").ok()?.parse().ok());
        if *at == Some(ANSWERED.fetch_add(1, Ordering::Relaxed) + 1) {
            // SAFETY: ends the process, and nothing of it runs after that: as if it had been killed.
            unsafe { libc::_exit(1) }
        }
    }
}
