//! Two processes that meet in a directory, as those of two containers do that share a volume.

use std::{
    fmt::Display,
    fs::File,
    io::{Read, Result, Write},
    os::{
        fd::AsRawFd,
        unix::net::{UnixListener, UnixStream},
    },
    path::Path,
};

use crate::{
    calls::{Shown, call},
    out::Out,
    volume::map,
};

const PAGE: usize = 4096;

fn file(dir: &Path, name: &str) -> Result<File> {
    File::options().read(true).write(true).create(true).truncate(false).open(dir.join(name))
}

fn lock(file: &File) -> impl Display {
    Shown(call(libc::SYS_flock, [file.as_raw_fd() as usize, (libc::LOCK_EX | libc::LOCK_NB) as usize]))
}

/// Locks a file in each of `dirs`, maps one, and tells whoever connects to a socket there what is in the mapping, for
/// ever.
pub fn serve(dirs: &[&str]) -> Result<()> {
    let mut threads = Vec::new();
    for dir in dirs.iter().map(|dir| Path::new(*dir).to_owned()) {
        let (locked, mapped) = (file(&dir, "lock")?, file(&dir, "map")?);
        mapped.set_len(PAGE as u64)?;
        println!("lock in {} = {}", dir.display(), lock(&locked));
        let listener = UnixListener::bind(dir.join("socket"))?;
        threads.push(std::thread::spawn(move || -> Result<()> {
            let page = map(&mapped, PAGE)?;
            let _held = locked;
            for stream in listener.incoming() {
                // SAFETY: within a mapping that is never undone.
                let byte = unsafe { page.read_volatile() };
                stream?.write_all(&[byte])?;
            }
            Ok(())
        }));
    }
    Out::line("serving");
    for thread in threads {
        let _ = thread.join();
    }
    Ok(())
}

/// Prints what the lock, the mapping and the socket in `dir` are to another process.
pub fn meet(dir: &str) -> Result<()> {
    let dir = Path::new(dir);
    let mapped = file(dir, "map")?;
    let page = map(&mapped, PAGE)?;
    // SAFETY: within a mapping that is never undone.
    unsafe { page.write_volatile(b'm') };
    Out::line(&format!("lock = {}", lock(&file(dir, "lock")?)));
    let mut heard = [0];
    UnixStream::connect(dir.join("socket"))?.read_exact(&mut heard)?;
    Out::line(&format!("heard = {}", heard[0] as char));
    Ok(())
}
