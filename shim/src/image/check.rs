//! Whether an image is as it was made, which a guest's word does not say.

use std::{
    fs::File,
    io,
    os::unix::process::CommandExt,
    path::Path,
    process::{Command, Stdio},
};

use nix::sys::resource::{Resource, setrlimit};

use super::maker::MEMORY_LIMIT;
use crate::{capabilities, own_file, scratch::search_path};

/// The program that looks at a whole file system (erofs-utils).
const FSCK: &str = "fsck.erofs";
/// Of it, in seconds of a processor: what it reads may be damaged.
const TIME_LIMIT: u64 = 60;

/// Whether nothing is wrong with the image at `path`, which is not opened by way of a link. One that cannot be looked at
/// is taken to be damaged. May take a minute.
pub(super) fn is_intact(path: &Path) -> bool {
    let looked = own_file::open(path).and_then(fsck);
    looked.inspect_err(|error| log::warn!("{FSCK} {}: {error}", path.display())).unwrap_or(false)
}

fn fsck(image: File) -> io::Result<bool> {
    let mut command = Command::new(FSCK);
    command
        .arg("/proc/self/fd/0")
        .env_clear()
        .env("PATH", search_path())
        .current_dir("/")
        .stdin(image)
        .stdout(Stdio::null())
        .stderr(Stdio::null());
    let limit = || {
        capabilities::NONE.keep_for_good()?;
        setrlimit(Resource::RLIMIT_CPU, TIME_LIMIT, TIME_LIMIT)?;
        Ok(setrlimit(Resource::RLIMIT_AS, MEMORY_LIMIT, MEMORY_LIMIT)?)
    };
    // SAFETY: system calls only.
    unsafe { command.pre_exec(limit) };
    command.status().map(|status| status.success())
}
