//! Locks and shared mappings of one file, a file without a name, and one that is being executed.

use std::{
    ffi::CString,
    fs::File,
    io::Result,
    os::{
        fd::AsRawFd,
        unix::fs::{FileExt, OpenOptionsExt},
    },
};

use crate::{
    calls::{Shown, address_mut, call, signed, text},
    out::Out,
};

const PAGE: usize = 4096;

/// Makes `path` and prints what a second description of it is allowed while the
/// first has locked it, and what is read of a page another mapping has written.
pub fn print(path: &str) {
    if let Err(error) = try_print(path) {
        Out::line(&format!("error = {error}"));
    }
    Out::line("volume = complete");
}

/// A shared mapping of the first bytes of a file, which is as long as that.
pub fn map(file: &File, bytes: usize) -> Result<*mut u8> {
    let access = libc::PROT_READ | libc::PROT_WRITE;
    // SAFETY: a new mapping, which nobody has yet.
    let page =
        unsafe { libc::mmap(std::ptr::null_mut(), bytes, access, libc::MAP_SHARED, file.as_raw_fd(), 0) };
    if page == libc::MAP_FAILED { Err(std::io::Error::last_os_error()) } else { Ok(page.cast()) }
}

/// Prints a byte of a mapping of `path`, for each offset that it is told.
pub fn mapped(path: &str) -> Result<()> {
    let file = File::options().read(true).write(true).open(path)?;
    let bytes = usize::try_from(file.metadata()?.len()).unwrap_or(0);
    let start = map(&file, bytes)?;
    Out::line("mapped");
    for line in std::io::stdin().lines() {
        let offset = line?.trim().parse().ok().filter(|offset| *offset < bytes);
        let offset = offset.ok_or(std::io::ErrorKind::InvalidInput)?;
        // SAFETY: within the mapping.
        let place = unsafe { start.add(offset) };
        // SAFETY: mapped; that the file may be shorter meanwhile is what is tried.
        let byte = unsafe { place.read_volatile() };
        Out::line(&format!("{offset} = {}", byte as char));
    }
    Ok(())
}

/// Holds `path` open: `w` writes to its first page, `r` prints the first byte of its second one, each with its number.
pub fn held(path: &str) -> Result<()> {
    let file = File::options().read(true).write(true).open(path)?;
    for (number, line) in std::io::stdin().lines().enumerate() {
        let mut byte = *b"w";
        match line?.as_str() {
            "w" => file.write_all_at(&byte, 0)?,
            "r" => file.read_exact_at(&mut byte, PAGE as u64)?,
            _ => return Err(std::io::ErrorKind::InvalidInput.into()),
        }
        Out::line(&format!("{number} = {}", byte[0] as char));
    }
    Ok(())
}

fn try_print(path: &str) -> Result<()> {
    let open = || File::options().read(true).write(true).create(true).truncate(false).open(path);
    let (first, second) = (open()?, open()?);
    first.set_len(2 * PAGE as u64)?;
    let flock = |file: &File, how: i32| {
        Shown(call(libc::SYS_flock, [file.as_raw_fd() as usize, (how | libc::LOCK_NB) as usize]))
    };
    Out::line(&format!("flock = {}", flock(&first, libc::LOCK_EX)));
    Out::line(&format!("flock again = {}", flock(&second, libc::LOCK_EX)));
    Out::line(&format!("flock shared = {}", flock(&second, libc::LOCK_SH)));
    Out::line(&format!("unlock = {}", flock(&first, libc::LOCK_UN)));
    Out::line(&format!("flock freed = {}", flock(&second, libc::LOCK_EX)));

    // struct flock: l_type and l_whence are shorts, then start, length and pid.
    let own = |file: &File, kind: i32, start: u64| {
        let mut lock = [kind as u64, start, 100, 0];
        let command = libc::F_OFD_SETLK as usize;
        Shown(call(libc::SYS_fcntl, [file.as_raw_fd() as usize, command, address_mut(&mut lock)]))
    };
    Out::line(&format!("range = {}", own(&first, libc::F_WRLCK, 0)));
    Out::line(&format!("range again = {}", own(&second, libc::F_RDLCK, 50)));
    Out::line(&format!("range beside = {}", own(&second, libc::F_WRLCK, 100)));

    let page = map(&first, 2 * PAGE)?;
    // SAFETY: within the mapping.
    let second_page = unsafe { page.add(PAGE) };
    // SAFETY: mapped, and nothing else of this process touches it.
    unsafe { second_page.write_volatile(b'm') };
    let mut seen = [0];
    second.read_exact_at(&mut seen, PAGE as u64)?;
    Out::line(&format!("mapped then read = {}", seen[0] as char));
    second.write_all_at(b"w", 1)?;
    // SAFETY: within the mapping.
    let second_byte = unsafe { page.add(1) };
    // SAFETY: as above.
    let seen = unsafe { second_byte.read_volatile() };
    Out::line(&format!("written then mapped = {}", seen as char));
    Out::line(&format!(
        "msync = {}",
        Shown(call(libc::SYS_msync, [page as usize, 2 * PAGE, libc::MS_SYNC as usize]))
    ));
    nameless(path)?;
    executed()
}

/// This program, which may not be changed while it runs: not truncated either by who opens it for reading,
/// and is refused. Most of it has not been read yet.
fn executed() -> Result<()> {
    let program = std::fs::read_link("/proc/self/exe")?;
    for _ in 0..20 {
        let opened = File::options().read(true).custom_flags(libc::O_TRUNC).open(&program);
        let length = std::fs::metadata(&program)?.len();
        let refused = opened.is_err_and(|error| error.raw_os_error() == Some(libc::ETXTBSY));
        if !refused || length == 0 {
            Out::line(&format!("executed = refused {refused}, {length} bytes"));
            return Ok(());
        }
    }
    Out::line("executed = refused");
    Ok(())
}

/// A file without a name, which gets one once it is whole.
fn nameless(path: &str) -> Result<()> {
    let dir = std::path::Path::new(path).parent().unwrap_or(std::path::Path::new("/"));
    let file = File::options().read(true).write(true).custom_flags(libc::O_TMPFILE).mode(0o640).open(dir)?;
    file.write_all_at(b"whole", 0)?;
    let from = CString::new(format!("/proc/self/fd/{}", file.as_raw_fd()))?;
    let to = CString::new(format!("{path}.named"))?;
    let here = signed(libc::AT_FDCWD.into());
    let linked =
        call(libc::SYS_linkat, [here, text(&from), here, text(&to), libc::AT_SYMLINK_FOLLOW as usize]);
    Out::line(&format!("named = {}", Shown(linked)));
    Ok(())
}
