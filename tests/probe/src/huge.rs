//! Huge pages, mapped.

use std::{fs::File, io::Result};

use crate::{out::Out, volume::map};

const PAGE: usize = 2 << 20;

/// Prints what each page of a file, or of none (`-`), had in it, and writes its number there. Returns the exit code; a page that
/// cannot be had ends the process by SIGBUS.
pub fn print(path: &str, pages: usize) -> i32 {
    match try_print(path, pages) {
        Ok(()) => 0,
        Err(error) => {
            Out::line(&format!("error = {error}"));
            1
        }
    }
}

fn map_anonymous(bytes: usize) -> Result<*mut u8> {
    let access = libc::PROT_READ | libc::PROT_WRITE;
    let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_HUGETLB;
    // SAFETY: a new mapping of nothing else.
    let start = unsafe { libc::mmap(std::ptr::null_mut(), bytes, access, flags, -1, 0) };
    if start == libc::MAP_FAILED { Err(std::io::Error::last_os_error()) } else { Ok(start.cast()) }
}

fn try_print(path: &str, pages: usize) -> Result<()> {
    let start = match path {
        "-" => map_anonymous(pages * PAGE)?,
        path => {
            let file = File::options().read(true).write(true).create(true).truncate(false).open(path)?;
            file.set_len((pages * PAGE) as u64)?;
            map(&file, pages * PAGE)?
        }
    };
    Out::line("mapped");
    for page in 0..pages {
        // SAFETY: within the mapping.
        let first = unsafe { start.add(page * PAGE) };
        // SAFETY: mapped, and nothing else of this process touches it.
        let found = unsafe { first.read_volatile() };
        let number = page as u8 + 1;
        // SAFETY: as above.
        unsafe { first.write_volatile(number) };
        Out::line(&format!("page {number}: {found}"));
    }
    Ok(())
}
