//! What a container is, as the process in it sees it, as lines `key = value`.
//!
//! The parity suite runs it in the same bundle under runc and under rvm and
//! compares. It is static and small: it is the container's first process.
//!
//! * `rvm-probe [SECTION]...` prints the sections named, all of them by default.
//! * `rvm-probe hold` waits for ever.
//! * `rvm-probe hook NAME FILE` appends what an OCI hook sees to a file.
//! * `rvm-probe seen NAME FILE` does the same for a process that is no hook.
//! * `rvm-probe output BYTES` writes bytes that a reader can tell from any others.
//! * `rvm-probe volume FILE` makes the file and prints how locks and shared
//!   mappings of it behave.
//! * `rvm-probe huge FILE PAGES` makes a file of so many huge pages of 2 MiB,
//!   or takes the one that is there, and writes to each by way of a mapping; with
//!   `-` for FILE the pages are no file's.
//! * `rvm-probe serve DIR...` and `rvm-probe meet DIR` show whether a lock, a
//!   shared mapping and a socket in a directory are one for two containers.
//! * `rvm-probe clock` prints the seconds since the epoch for each line it reads.
//! * `rvm-probe mapped FILE` reads a byte of a shared mapping of the file at the offset of each line it reads.
//! * `rvm-probe held FILE` keeps the file open and reads or writes it for each line it reads.
//! * `rvm-probe walk` prints all there is to know of each file of the root file system.
//! * `rvm-probe flood` makes connections to the host over vsock, as many as it can, and tells of each thousand.
//! * `rvm-probe capabilities` prints what this program's own mode and file
//!   capabilities made of its caller's identity.

// The standard library's start-up ignores SIGPIPE and opens /dev/null in place
// of closed streams: both are things to be seen.
#![no_main]

mod attempts;
mod calls;
mod files;
mod flood;
mod hook;
mod huge;
mod kernel;
mod mounts;
mod neighbour;
mod out;
mod process;
mod terminal;
mod volume;
#[path = "../../src/tree/walk.rs"]
mod walk;

use std::{
    ffi::{c_char, c_int},
    fs::File,
    io::{BufWriter, Write},
    os::fd::AsFd,
    path::Path,
};

use out::Out;

type Section = fn(&mut Out);

const SECTIONS: [(&str, Section); 7] = [
    // First: it sees the process as it was started.
    ("process", process::print),
    ("terminal", terminal::print),
    ("kernel", kernel::print),
    ("mounts", mounts::print),
    ("files", files::print),
    // Last: what succeeds here changes the container.
    ("attempts", attempts::print),
    ("masked", files::print_masked),
];

/// What `ld` calls; the arguments come from the standard library.
#[unsafe(no_mangle)]
pub extern "C" fn main(_argc: c_int, _argv: *const *const c_char) -> c_int {
    let args: Vec<String> =
        std::env::args_os().skip(1).map(|arg| arg.to_string_lossy().into_owned()).collect();
    let words: Vec<&str> = args.iter().map(String::as_str).collect();
    let mut out = Out::default();
    match words.as_slice() {
        ["hold"] => loop {
            calls::pause();
        },
        ["hook", name, file] => return hook::record(name, file, true),
        ["seen", name, file] => return hook::record(name, file, false),
        ["output", bytes] => return output(bytes.parse().unwrap_or(0)),
        ["clock"] => return clock(),
        ["volume", file] => volume::print(file),
        ["huge", file, pages] => return huge::print(file, pages.parse().unwrap_or(0)),
        ["mapped", file] => return ended(volume::mapped(file)),
        ["held", file] => return ended(volume::held(file)),
        ["walk"] => return ended(walked()),
        ["flood"] => return ended(flood::run()),
        ["serve", dirs @ ..] => return ended(neighbour::serve(dirs)),
        ["meet", dir] => return ended(neighbour::meet(dir)),
        ["capabilities"] => {
            process::identity(&mut out);
            out.flush();
        }
        names => {
            for (name, section) in SECTIONS {
                if names.is_empty() || names.contains(&name) {
                    section(&mut out);
                    out.flush();
                }
            }
            // A run that ends before this line has not shown everything.
            Out::line("probe = complete");
        }
    }
    0
}

fn ended(result: std::io::Result<()>) -> c_int {
    match result {
        Ok(()) => 0,
        Err(error) => {
            Out::line(&format!("error = {error}"));
            1
        }
    }
}

/// A line for each file.
fn walked() -> std::io::Result<()> {
    let found = walk::walk(Path::new("/")).map_err(|error| std::io::Error::other(format!("{error:#}")))?;
    let mut stdout = BufWriter::new(std::io::stdout());
    found.iter().try_for_each(|(path, entry)| writeln!(stdout, "{path:?} {entry:?}"))?;
    stdout.flush()
}

fn clock() -> c_int {
    for _ in std::io::stdin().lines() {
        let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap_or_default();
        if writeln!(std::io::stdout(), "{}.{:09}", now.as_secs(), now.subsec_nanos()).is_err() {
            return 1;
        }
    }
    0
}

/// Words of 8 bytes, each from the one before (xorshift64), on standard output.
/// Returns the exit code.
fn output(mut bytes: usize) -> c_int {
    // Without the line buffer of the library's own.
    let Ok(stdout) = std::io::stdout().as_fd().try_clone_to_owned() else { return 1 };
    let mut stdout = File::from(stdout);
    let mut state = 1u64;
    let mut block = Vec::with_capacity(64 << 10);
    while bytes > 0 {
        block.clear();
        while block.len() < block.capacity() {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            block.extend_from_slice(&state.to_le_bytes());
        }
        block.truncate(bytes);
        if stdout.write_all(&block).is_err() {
            return 1;
        }
        bytes -= block.len();
    }
    0
}
