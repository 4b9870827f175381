//! What is different where root is root of a user namespace alone, as under rootlesskit: docs/decisions/0618.

use std::{env, fs, path::PathBuf};

/// Whether this process is in another user namespace than the host's first one: what it owns and made is its to change,
/// the host is not.
pub fn is_rootless() -> bool {
    // user_namespaces(7): all ids, each of which is itself.
    const INITIAL: [&str; 3] = ["0", "0", "4294967295"];
    let map = fs::read_to_string("/proc/self/uid_map").unwrap_or_default();
    // Without user namespaces there is but one.
    !map.is_empty() && !map.split_whitespace().eq(INITIAL)
}

/// The user's directory for what goes when it logs out (XDG Base Directory Specification).
pub(crate) fn runtime_dir() -> Option<PathBuf> {
    absolute("XDG_RUNTIME_DIR").map(|dir| dir.join("rvm"))
}

/// The user's directory for what can be made again.
pub(crate) fn cache_dir() -> Option<PathBuf> {
    let dir = absolute("XDG_CACHE_HOME").or_else(|| Some(absolute("HOME")?.join(".cache")))?;
    Some(dir.join("rvm"))
}

fn absolute(variable: &str) -> Option<PathBuf> {
    env::var_os(variable).map(PathBuf::from).filter(|path| path.is_absolute())
}
